//! The Docker of a newer Debian, which connects a container to its networks between `create` and
//! `start`: in a tree of its own.

use std::path::Path;
use std::process::ExitCode;

use isopod_tests::case;
use isopod_tests::engine::cases::{exec, life, network, process, watch};
use isopod_tests::engine::{Case, Engine, main as suite, tree};

const CASES: &[Case] = &[
    case!(process::exit_statuses),
    case!(process::terminal),
    case!(exec::exec),
    case!(life::detached),
    case!(life::stop),
    case!(life::restart),
    case!(watch::stats),
    case!(network::bridge),
    case!(network::publish),
    case!(network::names_on_a_network),
    case!(network::connect),
    case!(network::none),
    case!(network::host),
];

fn start() -> Engine {
    Engine::docker_of(Path::new(&tree("ISOPOD_TEST_DOCKER_TREE")))
}

fn main() -> ExitCode {
    suite(start, CASES)
}
