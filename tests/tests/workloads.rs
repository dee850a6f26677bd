//! Programs that people run in containers, from Debian's packages, under Podman.

use std::process::ExitCode;

use isopod_tests::case;
use isopod_tests::engine::cases::work;
use isopod_tests::engine::{Case, Engine, main as suite};

const CASES: &[Case] = &[
    case!(work::redis_under_load),
    case!(work::nginx_serves_files),
    case!(work::python_processes),
    case!(work::parallel_build),
    case!(work::docker_in_a_container),
];

fn main() -> ExitCode {
    suite(Engine::podman, CASES)
}
