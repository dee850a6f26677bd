//! The Docker of a newer Debian, which connects a container to its networks between `create` and
//! `start`: in a tree of its own.

use std::path::Path;
use std::process::ExitCode;

use isopod_tests::engine::{Engine, cases, main as suite, tree};

fn start() -> Engine {
    Engine::docker_of(Path::new(&tree("ISOPOD_TEST_DOCKER_TREE")))
}

fn main() -> ExitCode {
    suite(start, cases::OF_DOCKER)
}
