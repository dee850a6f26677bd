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

/// A third of the image, which none of the programs needs: importing it takes minutes in a lab.
const WASTE: [&str; 12] = [
    "./usr/bin/*lto-dump*",
    "./usr/bin/*-dwp",
    "./usr/bin/*-ld.gold",
    "./usr/bin/*-gcov*",
    "./usr/bin/perl*",
    "./usr/lib/gcc/*/*/lto1",
    "./usr/lib/x86_64-linux-gnu/gconv",
    "./usr/lib/x86_64-linux-gnu/lib?san.*",
    "./usr/lib/x86_64-linux-gnu/perl*",
    "./usr/share/zoneinfo",
    "./usr/lib/python3*/test",
    "./var/lib/dpkg",
];

fn start() -> Engine {
    let engine = Engine::docker();
    engine.import_tree(&tree("ISOPOD_TEST_WORKLOAD_TREE"), &WASTE, work::IMAGE);
    engine
}

fn main() -> ExitCode {
    suite(start, CASES)
}
