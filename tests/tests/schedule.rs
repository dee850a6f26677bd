//! `process.scheduler`, `ioPriority`, `execCPUAffinity` and other settings of a process's processor
//! time, read back from inside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use isopod_tests::{Scope, microvm_only};
use serde_json::{Value, json};

/// The probe's view of scheduling after a change of config.json.
fn schedule(scope: &Scope, change: impl FnOnce(&mut Value)) -> Value {
    scope.container().probe(&["report"]).edit(change).run_json()["schedule"].clone()
}

#[test]
fn policy_and_its_parameters_are_as_asked() {
    // runc 1.1 does not know the field yet.
    microvm_only!();
    let scope = Scope::in_pod();
    assert_eq!(schedule(&scope, |_| {})["policy"], json!(0));
    for (asked, policy, nice, priority, flags) in [
        (json!({ "policy": "SCHED_OTHER", "nice": -7 }), 0, -7, 0, 0),
        (json!({ "policy": "SCHED_BATCH", "nice": 5 }), 3, 5, 0, 0),
        (json!({ "policy": "SCHED_IDLE" }), 5, 0, 0, 0),
        (json!({ "policy": "SCHED_RR", "priority": 1 }), 2, 0, 1, 0),
        (
            json!({
                "policy": "SCHED_FIFO", "priority": 42, "flags": ["SCHED_FLAG_RESET_ON_FORK"],
            }),
            1,
            0,
            42,
            1,
        ),
    ] {
        let seen = schedule(&scope, |c| c["process"]["scheduler"] = asked.clone());
        let should_be = (json!(policy), json!(nice), json!(priority), json!(flags));
        let field = |name: &str| seen[name].clone();
        let is = (field("policy"), field("nice"), field("priority"), field("flags"));
        assert_eq!(is, should_be, "{asked}");
    }
}

#[test]
fn a_deadline_is_as_asked() {
    microvm_only!();
    let scope = Scope::in_pod();
    let asked = json!({
        "policy": "SCHED_DEADLINE",
        "runtime": 20_000_000, "deadline": 50_000_000, "period": 100_000_000,
    });
    let seen = schedule(&scope, |c| c["process"]["scheduler"] = asked);
    assert_eq!(seen["policy"], json!(6));
    assert_eq!(seen["deadline"], json!([20_000_000, 50_000_000, 100_000_000]));
}

#[test]
fn io_priority_is_as_asked() {
    microvm_only!();
    let scope = Scope::in_pod();
    for (class, priority, number) in
        [("IOPRIO_CLASS_RT", 3, 1), ("IOPRIO_CLASS_BE", 7, 2), ("IOPRIO_CLASS_IDLE", 0, 3)]
    {
        let asked = json!({ "class": class, "priority": priority });
        let seen = schedule(&scope, |c| c["process"]["ioPriority"] = asked);
        assert_eq!(seen["io"], json!([number, priority]), "{class}");
    }
}

#[test]
fn personality_is_as_asked_for_exec_too() {
    let scope = Scope::in_pod();
    let machine = |domain: &str| {
        let container = scope.container().args(["uname", "-m"]);
        let asked = json!({ "domain": domain });
        container.edit(|c| c["linux"]["personality"] = asked).run().ok().stdout
    };
    assert_eq!(machine("LINUX"), "x86_64\n");
    if !isopod_tests::runtime().is_isopod() {
        isopod_tests::skip!("runc 1.1 does not know the field yet");
    }
    assert_eq!(machine("LINUX32"), "i686\n");
    let container = scope.container().args(["sleep", "1000"]);
    let container = container.edit(|c| c["linux"]["personality"] = json!({ "domain": "LINUX32" }));
    let _created = container.start_new();
    assert_eq!(container.exec_json(&[], &["report"])["schedule"]["personality"], json!(8));
}

/// For exec only, and by the numbers of the guest's processors.
#[test]
fn exec_runs_on_the_processors_that_were_asked_for() {
    microvm_only!();
    let scope = Scope::new();
    let container = scope.container().annotation("dev.isopod.vcpus", "2").edit(|c| {
        c["process"]["execCPUAffinity"] = json!({ "initial": "0", "final": "1" });
        c["process"]["args"] =
            json!(["sh", "-c", "grep Cpus_allowed_list /proc/self/status; sleep 1000"]);
    });
    let mut created = container.start_new();
    assert_eq!(
        created.stdout.line_with("Cpus_allowed_list").split_whitespace().last(),
        Some("0-1")
    );
    let seen = container.exec_json(&[], &["report"]);
    assert_eq!(seen["schedule"]["cpus"], json!([1]));
}

#[test]
fn exec_takes_a_schedule_of_its_own() {
    microvm_only!();
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    let file = scope.dir().join("process.json");
    let process = json!({
        "args": ["/bin/probe", "report"], "cwd": "/", "user": { "uid": 0, "gid": 0 },
        "scheduler": { "policy": "SCHED_BATCH", "nice": 3 },
        "ioPriority": { "class": "IOPRIO_CLASS_IDLE", "priority": 0 },
    });
    std::fs::write(&file, process.to_string()).unwrap();
    let out = container.command("exec", &["--process", file.to_str().unwrap()]).output().ok();
    let seen: Value = serde_json::from_str(&out.stdout).unwrap();
    let seen = &seen["schedule"];
    assert_eq!((&seen["policy"], &seen["nice"]), (&json!(3), &json!(3)));
    assert_eq!(seen["io"][0], json!(3));
}

#[test]
fn clocks_are_shifted_as_asked() {
    microvm_only!();
    let scope = Scope::in_pod();
    let container = scope.container().args([
        "sh",
        "-c",
        "cat /proc/uptime /proc/self/timens_offsets; sleep 1000",
    ]);
    let container = container.edit(|c| {
        c["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "time" }));
        c["linux"]["timeOffsets"] = json!({
            "boottime": { "secs": 5_000_000, "nanosecs": 7 },
            "monotonic": { "secs": 90, "nanosecs": 0 },
        });
    });
    let mut created = container.start_new();
    let uptime = created.stdout.line().unwrap();
    let seconds: f64 = uptime.split_whitespace().next().unwrap().parse().unwrap();
    assert!(seconds > 5_000_000.0, "{uptime}");
    let offsets = [created.stdout.line().unwrap(), created.stdout.line().unwrap()];
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words(&offsets[0]), ["monotonic", "90", "0"]);
    assert_eq!(words(&offsets[1]), ["boottime", "5000000", "7"]);
    let out = container.exec(["cat", "/proc/uptime"]).ok();
    assert!(out.stdout.starts_with("50"), "{out}");
}
