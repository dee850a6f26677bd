//! `update`, read back from the container's cgroup.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::path::Path;

use isopod_tests::{Container, Created, Output, Scope, microvm_only, runtime, skip};
use serde_json::{Value, json};

macro_rules! needs_cgroup_v2 {
    () => {
        let v2 = Path::new("/sys/fs/cgroup/cgroup.controllers");
        if !runtime().is_isopod() && !v2.exists() {
            skip!("this machine has no cgroup v2 for {}", runtime().path.display());
        }
    };
}

const MIB: u64 = 1 << 20;

fn limited(scope: &Scope) -> Container<'_> {
    scope.container().args(["sleep", "1000"]).edit(|c| {
        let resources = &mut c["linux"]["resources"];
        resources["memory"] = json!({ "limit": 128 * MIB, "swap": 192 * MIB });
        resources["cpu"] = json!({ "quota": 50_000, "period": 100_000, "cpus": "0" });
        resources["pids"] = json!({ "limit": 77 });
    })
}

/// A file of the container's cgroup, without the end of its line.
#[track_caller]
fn cgroup(container: &Container<'_>, file: &str) -> String {
    let path = format!("/sys/fs/cgroup/{file}");
    let seen = container.exec_json(&[], &["files", &path]);
    seen[&path]["text"].as_str().unwrap_or_else(|| panic!("{file}: {seen}")).trim_end().to_owned()
}

fn update(container: &Container<'_>, options: &[&str]) -> Output {
    container.command("update", options).output()
}

#[track_caller]
fn assert_as_created(container: &Container<'_>) {
    assert_eq!(cgroup(container, "memory.max"), (128 * MIB).to_string());
    assert_eq!(cgroup(container, "cpu.max"), "50000 100000");
    assert_eq!(cgroup(container, "pids.max"), "77");
}

#[test]
fn burst_idle_and_weight_follow_what_they_depend_on() {
    // runc 1.1 has neither of the first two.
    microvm_only!();
    let scope = Scope::in_pod();
    let container = limited(&scope);
    let _created: Created<'_> = container.start_new();
    update(&container, &["--cpu-burst", "20000"]).ok();
    assert_eq!(cgroup(&container, "cpu.max.burst"), "20000");
    update(&container, &["--cpu-quota", "10000", "--cpu-burst", "5000"]).ok();
    assert_eq!(cgroup(&container, "cpu.max"), "10000 100000");
    assert_eq!(cgroup(&container, "cpu.max.burst"), "5000");
    update(&container, &["--cpu-burst", "20000"]).one_line_error(&["burst", "20000", "10000"]);
    update(&container, &["--cpu-quota", "-1"]).ok();
    assert_eq!(cgroup(&container, "cpu.max"), "max 100000");
    assert_eq!(cgroup(&container, "cpu.max.burst"), "0");
    update(&container, &["--cpu-shares", "512"]).ok();
    update(&container, &["--cpu-idle", "1"]).ok();
    assert_eq!(cgroup(&container, "cpu.idle"), "1");
    update(&container, &["--cpu-idle", "0", "--cpu-shares", "2048"]).ok();
    assert_eq!(cgroup(&container, "cpu.idle"), "0");
    assert_eq!(cgroup(&container, "cpu.weight"), "79");
    update(&container, &["--kernel-memory", "64M", "--kernel-memory-tcp", "64M"]).ok();
    update(&container, &["--mem-bw-schema", "MB:0=1"]).one_line_error(&["mem-bw-schema"]);
}

#[test]
fn options_change_what_they_name_and_nothing_else() {
    needs_cgroup_v2!();
    let scope = Scope::in_pod();
    let container = limited(&scope);
    let _created: Created<'_> = container.start_new();
    update(&container, &["--memory", "96m", "--memory-swap=160MiB"]).ok();
    assert_eq!(cgroup(&container, "memory.max"), (96 * MIB).to_string());
    assert_eq!(cgroup(&container, "pids.max"), "77");
    if runtime().is_isopod() {
        assert_eq!(cgroup(&container, "memory.swap.max"), (64 * MIB).to_string());
    }
    update(&container, &["--memory-reservation", "32M", "--pids-limit", "50"]).ok();
    assert_eq!(cgroup(&container, "memory.low"), (32 * MIB).to_string());
    assert_eq!(cgroup(&container, "memory.max"), (96 * MIB).to_string());
    assert_eq!(cgroup(&container, "pids.max"), "50");
    update(&container, &["--cpu-quota", "30000"]).ok();
    assert_eq!(cgroup(&container, "cpu.max"), "30000 100000");
    // The quota of the earlier update still counts.
    update(&container, &["--cpu-period", "60000", "--cpu-share", "1024"]).ok();
    assert_eq!(cgroup(&container, "cpu.max"), "30000 60000");
    update(&container, &["--pids-limit", "-1", "--cpu-quota", "-1"]).ok();
    assert_eq!(cgroup(&container, "pids.max"), "max");
    assert_eq!(cgroup(&container, "cpu.max"), "max 60000");
    update(&container, &["--memory", "-1"]).ok();
    assert_eq!(cgroup(&container, "memory.max"), "max");
}

#[test]
fn json_comes_from_a_file_or_from_standard_input() {
    needs_cgroup_v2!();
    let scope = Scope::in_pod();
    let container = limited(&scope);
    let _created = container.start_new();
    let file = scope.dir().join("resources.json");
    std::fs::write(&file, json!({ "pids": { "limit": 33 } }).to_string()).unwrap();
    // The other options do not count then.
    let options = ["--resources", file.to_str().unwrap(), "--memory", "64m"];
    update(&container, &options).ok();
    assert_eq!(cgroup(&container, "pids.max"), "33");
    assert_eq!(cgroup(&container, "memory.max"), (128 * MIB).to_string());
    let json = json!({ "memory": { "limit": 100 * MIB, "swap": 200 * MIB } }).to_string();
    container.command("update", &["-r", "-"]).stdin(json).output().ok();
    assert_eq!(cgroup(&container, "memory.max"), (100 * MIB).to_string());
    // As Docker sends it: a field that is zero, empty or null leaves its limit unchanged.
    let neutral = json!({
        "devices": null, "hugepageLimits": null, "network": null, "rdma": {}, "unified": {},
        "memory": { "limit": 0, "swap": null, "kernel": 0 }, "blockIO": { "weight": 0 },
        "cpu": { "shares": 0, "cpus": "", "mems": "" },
    });
    if runtime().is_isopod() {
        container.command("update", &["-r", "-"]).stdin(neutral.to_string()).output().ok();
        assert_eq!(cgroup(&container, "memory.max"), (100 * MIB).to_string());
        assert_eq!(cgroup(&container, "pids.max"), "33");
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    microvm_only!();
    let scope = Scope::in_pod();
    let container = limited(&scope);
    let _created = container.start_new();
    for (options, words) in [
        (&["--memory", "1x"][..], &["1x"][..]),
        (&["--memory", "96m", "--memory-swap", "90m"], &["memory.swap"]),
        (&["--cpu-rt-runtime", "5"], &["realtimeRuntime"]),
        (&["--cpuset-mems", "1"], &["mems"]),
        (&["--l3-cache-schema", "L3:0=f"], &["--l3-cache-schema"]),
        (&["--resources", "/no/such/file"], &["/no/such/file"]),
        // The kernel's least quota is 1 ms, and the limits set before the failure are taken back.
        (&["--pids-limit", "50", "--cpu-quota", "1"], &["cpu.max", &container.id]),
    ] {
        let out = update(&container, options);
        assert_ne!(out.status, 0, "{out}");
        for word in words {
            assert!(out.stderr.contains(word), "{word}: {out}");
        }
        assert_as_created(&container);
    }
    let out = container.command("update", &["-r", "-"]).stdin("[]").output();
    out.one_line_error(&["standard input"]);
    assert_as_created(&container);
}

#[test]
fn memory_beyond_the_microvms_is_refused_with_the_way_out() {
    microvm_only!();
    let scope = Scope::new();
    let container = scope.container().args(["sleep", "1000"]);
    let container = container.annotation("dev.isopod.memory_mib", "300");
    let _created = container.start_new();
    let out = update(&container, &["--memory", "300m"]);
    out.one_line_error(&["300 MiB", "231 MiB", "dev.isopod.memory_mib", &container.id]);
    assert_eq!(cgroup(&container, "memory.max"), "max");
    update(&container, &["--memory", "231m"]).ok();
    assert_eq!(cgroup(&container, "memory.max"), (231 * MIB).to_string());
}

#[test]
fn processors_are_those_of_the_microvm_and_too_many_are_said() {
    microvm_only!();
    let scope = Scope::new();
    let container = scope.container().args(["sleep", "1000"]).annotation("dev.isopod.vcpus", "2");
    let _created = container.start_new();
    let out = update(&container, &["--cpuset-cpus", "5"]).ok();
    assert_eq!((cgroup(&container, "cpuset.cpus"), &*out.stderr), ("0".to_owned(), ""));
    let out = update(&container, &["--cpuset-cpus", "4-7"]).ok();
    assert_eq!(cgroup(&container, "cpuset.cpus"), "0-1");
    assert!(out.stderr.contains("warning") && out.stderr.contains("4-7"), "{out}");
    let out = update(&container, &["--cpu-quota", "300000", "--cpuset-cpus", "0"]).ok();
    assert_eq!(cgroup(&container, "cpu.max"), "300000 100000");
    assert!(out.stderr.contains("2 processors"), "{out}");
}

#[test]
fn only_what_is_there_can_be_updated() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["true"]);
    let refused = || {
        let out = update(&container, &["--pids-limit", "5"]);
        assert_ne!(out.status, 0, "{out}");
    };
    refused();
    container.start_new().wait();
    refused();
}

#[test]
fn a_limit_below_what_is_in_use_can_be_checked_first() {
    microvm_only!();
    let scope = Scope::in_pod();
    let container = limited(&scope);
    let _created = container.start_new();
    let json = json!({ "memory": { "limit": 4096, "checkBeforeUpdate": true } }).to_string();
    let out = container.command("update", &["-r", "-"]).stdin(json).output();
    out.one_line_error(&["in use", "4096"]);
    assert_as_created(&container);
}

#[test]
fn a_paused_container_can_be_updated() {
    needs_cgroup_v2!();
    let scope = Scope::in_pod();
    let container = limited(&scope);
    let _created = container.start_new();
    container.command("pause", &[]).output().ok();
    update(&container, &["--pids-limit", "44"]).ok();
    container.command("resume", &[]).output().ok();
    assert_eq!(cgroup(&container, "pids.max"), "44");
    let state: Value = container.state();
    assert_eq!(state["status"], json!("running"));
}
