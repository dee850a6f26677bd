//! Limits as cgroup files, and the size of the microVM.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::io::Write as _;
use std::path::Path;

use isopod_tests::{Container, Scope, microvm_only, runtime, skip};
use serde_json::{Value, json};

fn files(container: Container<'_>, paths: &[&str]) -> Value {
    container.probe(&[&["files"], paths].concat()).run_json()
}

#[test]
fn limits_are_in_the_containers_cgroup() {
    if !runtime().is_isopod() && !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        skip!("this machine has no cgroup v2 for {}", runtime().path.display());
    }
    let scope = Scope::new();
    let container = scope.container().edit(|c| {
        let resources = &mut c["linux"]["resources"];
        resources["cpu"] =
            json!({ "quota": 150_000, "period": 100_000, "shares": 2048, "cpus": "0-1" });
        resources["memory"] =
            json!({ "limit": 128 << 20, "swap": 192 << 20, "reservation": 32 << 20 });
        resources["pids"] = json!({ "limit": 77 });
    });
    let name = |file: &str| format!("/sys/fs/cgroup/{file}");
    let should_be = [
        ("cpu.max", "150000 100000"),
        ("cpuset.cpus", "0-1"),
        ("memory.max", "134217728"),
        ("memory.low", "33554432"),
        ("pids.max", "77"),
    ];
    let mut paths: Vec<String> = should_be.iter().map(|(file, _)| name(file)).collect();
    paths.push(name("cpu.weight"));
    paths.push(name("memory.swap.max"));
    let mut paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    // A host's kernel may have them turned off.
    let pressure = ["cpu", "memory", "io"].map(|kind| name(&format!("{kind}.pressure")));
    paths.extend(pressure.each_ref().map(String::as_str));
    let seen = files(container, &paths);
    for path in
        pressure.iter().filter(|path| runtime().is_isopod() || !seen[*path]["text"].is_null())
    {
        let text = seen[path].to_string();
        assert!(text.contains("some avg10="), "{path}: {text}");
    }
    for (file, value) in should_be {
        assert_eq!(seen[name(file)]["text"], json!(format!("{value}\n")), "{file}");
    }
    // Shares of 2048 are twice the default: 79 by the older conversion, about 170 by the newer.
    let weight: u32 = seen[name("cpu.weight")]["text"].as_str().unwrap().trim().parse().unwrap();
    assert!((79..=200).contains(&weight), "cpu.weight is {weight}");
    // A host's kernel without swap has no such file; the guest's kernel has swap.
    let swap = &seen[name("memory.swap.max")];
    if runtime().is_isopod() || swap["error"] != "ENOENT" {
        assert_eq!(swap["text"], json!("67108864\n"));
    }
}

/// Limits that only newer kernels and runtimes have, or only one version of cgroups.
#[test]
fn further_limits_are_in_the_containers_cgroup() {
    microvm_only!();
    let scope = Scope::new();
    let resources = json!({
        "devices": [{ "allow": false, "access": "rwm" }],
        "cpu": { "quota": 50_000, "period": 100_000, "burst": 20_000, "idle": 1 },
        "blockIO": { "weight": 500 },
        "hugepageLimits": [{ "pageSize": "2MB", "limit": 4_194_304 }],
        "unified": { "memory.high": "67108864", "pids.max": "55", "cpuset.cpus": "7" },
    });
    let should_be = [
        ("cpu.max", "50000 100000"),
        ("cpu.max.burst", "20000"),
        ("cpu.idle", "1"),
        ("io.weight", "default 4950"),
        ("hugetlb.2MB.max", "4194304"),
        ("hugetlb.2MB.rsvd.max", "4194304"),
        ("memory.high", "67108864"),
        ("pids.max", "55"),
        ("cpuset.cpus", "0"),
    ];
    let paths = should_be.map(|(file, _)| format!("/sys/fs/cgroup/{file}"));
    let container = scope.container().edit(|c| c["linux"]["resources"] = resources);
    let seen = files(container, &paths.each_ref().map(String::as_str));
    for ((file, value), path) in should_be.iter().zip(&paths) {
        assert_eq!(seen[path]["text"], json!(format!("{value}\n")), "{file}");
    }
}

#[test]
fn the_microvm_has_a_cpu_for_each_of_the_quota() {
    microvm_only!();
    let scope = Scope::new();
    for (quota, cpus) in [(100_000, 1), (150_000, 2)] {
        let container = scope.container().args(["grep", "-c", "^processor", "/proc/cpuinfo"]);
        let limit = json!({ "quota": quota, "period": 100_000 });
        let out = container.edit(|c| c["linux"]["resources"]["cpu"] = limit).run().ok();
        assert_eq!(out.stdout, format!("{cpus}\n"), "quota {quota}");
    }
}

#[test]
fn processors_of_the_host_become_as_many_of_the_microvm() {
    microvm_only!();
    let scope = Scope::new();
    for (limits, cpus) in [
        (json!({ "cpus": "3" }), "0"),
        (json!({ "cpus": "2-3,7", "mems": "0" }), "0-2"),
        (json!({ "cpus": "0-3", "quota": 50_000, "period": 100_000 }), "0"),
    ] {
        let container = scope.container().args(["cat", "/sys/fs/cgroup/cpuset.cpus"]);
        let out = container.edit(|c| c["linux"]["resources"]["cpu"] = limits.clone()).run().ok();
        assert_eq!(out.stdout.trim(), cpus, "{limits}");
    }
}

#[test]
fn a_microvm_may_have_more_vcpus_than_the_host() {
    microvm_only!();
    let scope = Scope::new();
    let container = scope.container().annotation("dev.isopod.vcpus", "8");
    let out = container.args(["grep", "-c", "^processor", "/proc/cpuinfo"]).run().ok();
    assert_eq!(out.stdout, "8\n");
}

#[test]
fn memory_that_the_guest_frees_goes_back_to_the_host() {
    microvm_only!();
    const MIB: u64 = 200;
    let scope = Scope::new();
    let script = format!(
        "head -c {} /dev/zero >/tmp/x; echo full; read line; rm /tmp/x; \
         while sleep 1; do echo tick; done",
        MIB << 20
    );
    let container = scope.container().mount("/tmp", "tmpfs", "tmpfs", &[]).shell(&script);
    let pid_file = container.pid_file();
    let options = ["--pid-file", pid_file.to_str().unwrap()];
    let mut run = container.command_with_bundle("run", &options).stdin_piped().spawn();
    let mut stdin = run.take_stdin();
    run.stdout.line_with("full");
    let sandbox: i32 = std::fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    let status = format!("/proc/{}/status", scope.child(sandbox, "isopod-vmm"));
    let resident_mib = || -> u64 {
        let status = std::fs::read_to_string(&status).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    };
    let full = resident_mib();
    assert!(full > MIB, "{full} MiB");
    writeln!(stdin).unwrap();
    // The guest reports free pages in rounds, some seconds apart by its own clock. The container
    // `tick`s by that clock.
    let given_back = (0..60).any(|_| {
        run.stdout.line_with("tick");
        resident_mib() + MIB * 3 / 4 < full
    });
    assert!(given_back, "{full} MiB, now {} MiB", resident_mib());
    container.kill("KILL").ok();
    run.wait();
}

#[test]
fn annotations_give_the_microvms_size() {
    microvm_only!();
    let scope = Scope::new();
    let script = "grep -c ^processor /proc/cpuinfo; grep MemTotal /proc/meminfo";
    let container = scope
        .container()
        .annotation("dev.isopod.vcpus", "3")
        .annotation("dev.isopod.memory_mib", "300")
        .shell(script);
    let out = container.run().ok();
    let (cpus, memory) = out.stdout.split_once('\n').unwrap();
    let memory: u64 = memory.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert_eq!(cpus, "3");
    // The kernel keeps some for itself.
    assert!((240 << 10..=300 << 10).contains(&memory), "{memory} KiB");
}

#[test]
fn annotations_that_make_no_sense_are_refused() {
    microvm_only!();
    let scope = Scope::new();
    for (name, value) in [
        ("dev.isopod.vcpus", "0"),
        ("dev.isopod.vcpus", "33"),
        ("dev.isopod.vcpus", "two"),
        ("dev.isopod.memory_mib", "1"),
        ("dev.isopod.memory_mib", "-5"),
    ] {
        let container = scope.container().annotation(name, value);
        container.run().one_line_error(&[name, value]);
        scope.assert_nothing_left();
    }
}

#[test]
fn four_gib_of_memory_work_across_the_32_bit_hole() {
    microvm_only!();
    let scope = Scope::new();
    let container = scope
        .container()
        .annotation("dev.isopod.memory_mib", "4096")
        .annotation("dev.isopod.vcpus", "2")
        .capabilities(&["CAP_SYS_ADMIN"])
        .probe(&["hole"]);
    let seen = container.run_json();
    println!("{seen}");
    let number = |name: &str| seen[name].as_u64().unwrap();
    assert!(number("total_kib") > 3800 << 10, "{seen}");
    assert!(number("pages_below_4g") >= 16384, "{seen}");
    assert!(number("pages_above_4g") >= 16384, "{seen}");
    // The device hole is below 4 GiB, so 4 GiB of memory end above that address.
    assert!(number("highest_address") > 4 << 30, "{seen}");
    assert_eq!(number("wrong_marks"), 0, "{seen}");
}
