//! Limits, read back from the container's own cgroup and from its processes.

use serde_json::{Value, json};

use crate::engine::{Container, Run};

const FILES: [&str; 5] = ["memory.max", "memory.swap.max", "cpu.max", "pids.max", "cpu.weight"];

fn cgroup(container: &Container<'_, '_>) -> Vec<String> {
    let script = FILES.map(|file| format!("cat /sys/fs/cgroup/{file}")).join("; ");
    container.shell(&script).lines().map(str::to_owned).collect()
}

/// `-m`, `--memory-swap`, `--cpus`, `--cpu-shares`, `--cpuset-cpus`, `--pids-limit`.
pub fn cgroup_limits(run: &Run<'_>) {
    let options = [
        "--memory=200m",
        "--memory-swap=200m",
        "--cpus=0.5",
        "--cpu-shares=512",
        "--cpuset-cpus=0",
        "--pids-limit=50",
    ];
    let container = run.start(&options, &["sleep", "1000"]);
    assert_eq!(cgroup(&container), ["209715200", "0", "50000 100000", "50", "20"]);
    assert_eq!(container.shell("cat /sys/fs/cgroup/cpuset.cpus"), "0");
    container.remove();
}

/// A process above its memory limit is killed, and the container with it.
pub fn out_of_memory(run: &Run<'_>) {
    let options = ["--memory=64m", "--memory-swap=64m"];
    let container =
        run.make("run", &[&["--detach"], &options[..]].concat(), &["probe", "eat", "200"]);
    assert_eq!(container.wait(), 137);
    container.remove();
}

/// `update` changes the limits of a running container.
pub fn update(run: &Run<'_>) {
    let container = run.start(&["--memory=200m", "--memory-swap=400m"], &["sleep", "1000"]);
    container.ok(&["update", "--memory=100m", "--memory-swap=300m", "--cpus=0.25"]);
    let now = cgroup(&container);
    assert_eq!(now[..3], ["104857600", "209715200", "25000 100000"]);
    // Podman 4 has no option for this limit.
    if !run.podman() {
        container.ok(&["update", "--pids-limit=33"]);
        assert_eq!(cgroup(&container)[3], "33");
    }
    container.remove();
}

/// `--ulimit` and `--sysctl`.
pub fn ulimits_and_sysctls(run: &Run<'_>) {
    let options = [
        "--ulimit=nofile=123:456",
        "--ulimit=core=0:0",
        "--sysctl=net.ipv4.ip_unprivileged_port_start=99",
        "--sysctl=kernel.msgmax=4242",
    ];
    let read = "probe report; \
                cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/msgmax";
    let said = run.shell(&options, read);
    let (report, sysctls) = said.split_once('\n').expect("lines");
    let seen: Value = serde_json::from_str(report).expect("a report");
    assert_eq!(seen["rlimits"]["RLIMIT_NOFILE"], json!([123, 456]));
    assert_eq!(seen["rlimits"]["RLIMIT_CORE"], json!([0, 0]));
    assert_eq!(sysctls, "99\n4242");
}
