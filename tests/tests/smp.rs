//! What shows only on a machine with two processors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use isopod_tests::{Scope, microvm_only, skip};
use serde_json::json;

#[test]
fn two_vcpus_run_at_the_same_time() {
    microvm_only!();
    if std::thread::available_parallelism().is_ok_and(|n| n.get() < 2) {
        skip!("this machine has one CPU");
    }
    let scope = Scope::new();
    let container = scope.container().annotation("dev.isopod.vcpus", "2").probe(&["parallel"]);
    let seen = container.run_json();
    println!("{seen}");
    assert_eq!(seen["cpus"], json!(2));
    assert_eq!(seen["ran_on"], json!([0, 1]));
    assert_eq!(seen["parallel"], json!(true), "{seen}");
}
