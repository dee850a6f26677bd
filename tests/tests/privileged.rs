//! Privileged containers as engines write them: everything is allowed, inside the microVM. Also
//! devices that other containers ask for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use isopod_tests::{Container, Scope, microvm_only};
use serde_json::{Value, json};

/// Every capability, all devices, nodes for some devices of the host, nothing hidden, nothing
/// read-only.
fn privileged(scope: &Scope) -> Container<'_> {
    let all: Vec<String> = CAPABILITIES.iter().map(|name| format!("CAP_{name}")).collect();
    let names: Vec<&str> = all.iter().map(String::as_str).collect();
    scope.container().capabilities(&names).edit(|c| {
        c["process"]["noNewPrivileges"] = json!(false);
        c["linux"]["maskedPaths"] = Value::Null;
        c["linux"]["readonlyPaths"] = Value::Null;
        c["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
        c["linux"]["devices"] = json!([
            device("/dev/fuse", "c", 10, 229),
            device("/dev/sda", "b", 8, 0),
            device("/dev/kvm", "c", 10, 232),
            device("/dev/loop-control", "c", 10, 237),
        ]);
        for mount in c["mounts"].as_array_mut().unwrap() {
            mount["options"].as_array_mut().unwrap().retain(|option| option != "ro");
        }
    })
}

fn device(path: &str, kind: &str, major: u32, minor: u32) -> Value {
    json!({ "path": path, "type": kind, "major": major, "minor": minor, "fileMode": 0o600 })
}

#[test]
fn a_privileged_container_may_do_everything_in_its_microvm() {
    microvm_only!();
    let scope = Scope::in_pod();
    let script = "set -e
        mount -t tmpfs none /tmp; touch /tmp/made
        mkdir /sys/fs/cgroup/below; rmdir /sys/fs/cgroup/below
        echo 1 > /proc/sys/vm/drop_caches
        hostname other; hostname
        mknod /tmp/kmsg c 1 11; dd if=/tmp/kmsg bs=4096 count=1 2>/dev/null | wc -l
        unshare -m true
        test -c /dev/fuse -a -b /dev/sda -a -c /dev/kvm
        grep CapEff /proc/self/status";
    let out = privileged(&scope).shell(script).run().ok();
    let last = out.stdout.lines().last().unwrap();
    assert_eq!(last.split_whitespace().last(), Some("000001ffffffffff"), "{out}");
    assert!(out.stdout.starts_with("other\n1\n"), "{out}");
    // Nodes that stand for hardware of the host reach nothing.
    let seen = privileged(&scope).probe(&["open", "r", "/dev/sda", "/dev/kvm", "/dev/fuse"]);
    let seen = seen.run_json();
    assert_eq!(seen["/dev/fuse"], json!("ok"));
    for path in ["/dev/sda", "/dev/kvm"] {
        assert!(["ENXIO", "ENODEV"].map(Value::from).contains(&seen[path]), "{seen}");
    }
}

#[test]
fn devices_of_the_guests_kernel_work() {
    microvm_only!();
    let scope = Scope::in_pod();
    let devices = [("/dev/fuse", 10, 229), ("/dev/net/tun", 10, 200)];
    let container = scope.container().probe(&["open", "rw", "/dev/fuse", "/dev/net/tun"]);
    let seen = container.edit(|c| {
        c["linux"]["devices"] =
            devices.iter().map(|(path, major, minor)| device(path, "c", *major, *minor)).collect();
        let rule = |(_, major, minor): &(&str, u32, u32)| {
            json!({ "allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm" })
        };
        c["linux"]["resources"]["devices"] = devices.iter().map(rule).collect();
    });
    assert_eq!(seen.run_json(), json!({ "/dev/fuse": "ok", "/dev/net/tun": "ok" }));
}

#[test]
fn a_device_of_the_host_is_refused_by_name() {
    microvm_only!();
    let scope = Scope::alone();
    for (path, kind, major, minor, words) in [
        ("/dev/sda", "b", 8, 0, "no block device 8:0"),
        ("/dev/kvm", "c", 10, 232, "no char device 10:232"),
        ("/dev/ttyS0", "c", 4, 64, "no char device 4:64"),
    ] {
        let container = scope.container().edit(|c| {
            c["linux"]["devices"] = json!([device(path, kind, major, minor)]);
        });
        container.run().one_line_error(&[&format!("linux.devices[{path}]"), words]);
        scope.assert_nothing_left();
    }
}

/// All capabilities in the order of their numbers (linux/capability.h).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];
