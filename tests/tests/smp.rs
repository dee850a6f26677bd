//! Tests that need a machine with two processors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use isopod_tests::{Netns, Output, PROBE_PATH, RunningCommand, Scope, microvm_only, runtime, skip};
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

/// One queue pair for each vCPU.
#[test]
fn a_network_device_has_a_queue_for_each_vcpu() {
    microvm_only!();
    let scope = Scope::alone();
    let (inner, outer) = Netns::pair(&scope, 1500);
    let probe = runtime().probe.to_string_lossy().into_owned();
    let len = 2_000_001_u64.to_string();
    let script = format!(
        "ls /sys/class/net/eth0/queues && for port in 1 2 3 4; do \
         {PROBE_PATH} tcp-server 10.77.0.2:$port {len} & done; wait"
    );
    let container = scope.container().join(&inner).annotation("dev.isopod.vcpus", "2");
    let mut created = container.shell(&script).start_new();
    let queues: Vec<String> = (0..4).filter_map(|_| created.stdout.line()).collect();
    assert_eq!(queues, ["rx-0", "rx-1", "tx-0", "tx-1"]);
    for _ in 0..4 {
        created.stdout.line_with("listening");
    }
    let client = |port| {
        let address = format!("10.77.0.2:{port}");
        outer.program(&[&probe, "tcp-client", &address, &len]).spawn()
    };
    let clients: Vec<_> = (1..5).map(client).collect();
    let clients: Vec<Output> = clients.into_iter().map(RunningCommand::output).collect();
    created.wait();
    // The servers' output tells why a client failed.
    let servers = format!("{}{}", created.stdout.rest(), created.stderr.rest());
    assert!(clients.iter().all(|client| client.status == 0), "{servers}{clients:?}");
}
