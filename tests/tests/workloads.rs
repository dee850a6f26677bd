//! Programs that people run in containers, from Debian's packages, under Docker.

use std::process::ExitCode;

use isopod_tests::case;
use isopod_tests::engine::cases::work;
use isopod_tests::engine::{Case, Engine, main as suite, tree};

const CASES: &[Case] = &[
    case!(work::redis_under_load),
    case!(work::nginx_serves_files),
    case!(work::python_processes),
    case!(work::parallel_build),
];

fn start() -> Engine {
    let engine = Engine::docker();
    engine.import_tree(&tree("ISOPOD_TEST_WORKLOAD_TREE"), work::IMAGE);
    engine
}

fn main() -> ExitCode {
    suite(start, CASES)
}
