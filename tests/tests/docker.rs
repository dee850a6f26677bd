//! Docker of Debian's docker.io package.

use std::process::ExitCode;

use isopod_tests::engine::{Engine, cases, main as suite};

fn main() -> ExitCode {
    suite(Engine::docker, cases::OF_DOCKER)
}
