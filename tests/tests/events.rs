//! `events`: figures in runc's form, and OOM kills.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use isopod_tests::{Container, Scope, microvm_only, runtime};
use serde::Deserialize;
use serde_json::{Value, json};

/// The fields of runc's `types.Event` and `types.Stats` that callers read. A number of 0 may be
/// left out where runc leaves it out.
#[derive(Debug, Deserialize)]
struct RuntimeEvent {
    #[serde(rename = "type")]
    kind: String,
    id: String,
    data: Option<Stats>,
}

#[derive(Debug, Deserialize)]
#[expect(dead_code, reason = "that it is there is what counts")]
struct Stats {
    cpu: Cpu,
    memory: Memory,
    pids: Pids,
    blkio: Value,
    hugetlb: std::collections::HashMap<String, Value>,
    intel_rdt: Value,
    network_interfaces: Option<Vec<Value>>,
}

#[derive(Debug, Deserialize)]
struct Cpu {
    usage: CpuUsage,
    throttling: Value,
}

#[derive(Debug, Deserialize)]
struct CpuUsage {
    total: u64,
    kernel: u64,
    user: u64,
}

#[derive(Debug, Deserialize)]
struct Memory {
    usage: MemoryEntry,
    swap: MemoryEntry,
    raw: std::collections::HashMap<String, u64>,
}

#[derive(Debug, Deserialize)]
struct MemoryEntry {
    limit: u64,
    #[serde(default)]
    usage: u64,
}

#[derive(Debug, Deserialize)]
struct Pids {
    #[serde(default)]
    current: u64,
    #[serde(default)]
    limit: u64,
}

#[track_caller]
fn event(line: &str) -> RuntimeEvent {
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))
}

#[track_caller]
fn stats(container: &Container<'_>) -> (Stats, String) {
    let out = container.command("events", &["--stats"]).output().ok();
    let event = event(&out.stdout);
    assert_eq!((&*event.kind, &event.id), ("stats", &container.id), "{out}");
    (event.data.unwrap(), out.stdout)
}

const MIB: u64 = 1 << 20;

#[test]
fn stats_are_those_of_the_container() {
    let scope = Scope::in_pod();
    let script = "head -c 20971520 /dev/zero >/dev/shm/x; sleep 1000 & echo up; wait";
    let container = scope.container().shell(script).edit(|c| {
        c["linux"]["resources"]["memory"] = json!({ "limit": 128 * MIB, "swap": 192 * MIB });
        c["linux"]["resources"]["pids"] = json!({ "limit": 77 });
    });
    let mut created = container.start_new();
    created.stdout.line_with("up");
    let (seen, text) = stats(&container);
    assert_eq!(seen.memory.usage.limit, 128 * MIB, "{text}");
    assert!((20 * MIB..128 * MIB).contains(&seen.memory.usage.usage), "{text}");
    assert_eq!((seen.pids.current, seen.pids.limit), (2, 77), "{text}");
    let usage = &seen.cpu.usage;
    assert!(usage.total > 0 && usage.kernel + usage.user <= usage.total + 1_000_000, "{text}");
    assert!(seen.cpu.throttling.is_object(), "{text}");
    if runtime().is_isopod() {
        assert_eq!(seen.memory.swap.limit, 192 * MIB, "{text}");
        assert!(seen.memory.swap.usage >= seen.memory.usage.usage, "{text}");
        assert!(seen.memory.raw["shmem"] >= 20 * MIB, "{text}");
    }
    container.exec(["sh", "-c", "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done"]).ok();
    assert!(stats(&container).0.cpu.usage.total > usage.total);
}

#[test]
fn what_has_no_limit_says_so() {
    microvm_only!();
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.create();
    let (seen, text) = stats(&container);
    assert_eq!((seen.memory.usage.limit, seen.pids.limit), (u64::MAX, 0), "{text}");
    assert_eq!(seen.network_interfaces, None, "{text}");
}

#[test]
fn stats_come_in_an_interval_until_the_container_ends() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let created = container.start_new();
    let mut events = container.command("events", &["--interval", "300ms"]).spawn();
    for _ in 0..2 {
        let line = event(&events.stdout.line().unwrap());
        assert_eq!((&*line.kind, line.id), ("stats", container.id.clone()));
        assert_eq!(line.data.unwrap().pids.current, 1);
    }
    container.kill("KILL").ok();
    created.wait();
    assert_eq!(events.wait().status(), 0, "{}", events.stderr.so_far());
    for line in events.stdout.rest().lines() {
        assert_eq!(event(line).kind, "stats");
    }
}

#[test]
fn an_oom_kill_is_an_event() {
    microvm_only!();
    let scope = Scope::in_pod();
    // The first process lives on when its child is killed.
    let script = "echo up; read line </go; probe eat 200; echo eaten $?; sleep 1000";
    let container = scope.container().shell(script).edit(|c| {
        c["linux"]["resources"]["memory"] = json!({ "limit": 64 * MIB, "swap": 64 * MIB });
    });
    scope.program(&["mkfifo", container.bundle.rootfs("/go").to_str().unwrap()]).output().ok();
    let mut created = container.start_new();
    created.stdout.line_with("up");
    let mut events = container.command("events", &["--interval", "1s"]).spawn();
    // The first event shows that `events` watches.
    assert_eq!(event(&events.stdout.line().unwrap()).kind, "stats");
    container.exec(["sh", "-c", "echo >/go"]).ok();
    created.stdout.line_with("eaten 137");
    let oom = loop {
        let line = event(&events.stdout.line().expect("no event of an OOM kill"));
        if line.kind != "stats" {
            break line;
        }
    };
    assert_eq!((&*oom.kind, oom.id, oom.data.is_none()), ("oom", container.id.clone(), true));
    container.kill("KILL").ok();
    assert_eq!(events.wait().status(), 0, "{}", events.stderr.so_far());
}

#[test]
fn events_of_a_lost_microvm_fail() {
    microvm_only!();
    let scope = Scope::new();
    let container = scope.container().args(["sleep", "1000"]);
    let created = container.start_new();
    let mut events = container.command("events", &["--interval", "300ms"]).spawn();
    events.stdout.line_with("stats");
    let vmm = scope.child(created.pid, "isopod-vmm");
    scope.program(&["kill", "-9", &vmm.to_string()]).output().ok();
    assert_ne!(events.wait().status(), 0);
    let said = events.stderr.rest();
    assert!(said.contains("microVM"), "{said:?}");
}

#[test]
fn what_does_not_run_has_no_events() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["true"]);
    container.start_new().wait();
    for options in [&["--stats"][..], &[]] {
        let out = container.command("events", options).output();
        assert_ne!(out.status, 0, "{out}");
    }
    let out = container.command("events", &["--interval", "0s"]).output();
    assert_ne!(out.status, 0, "{out}");
}
