//! Isolation: kernel, namespaces, limits and devices inside are the container's own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command};

use isopod_tests::{Container, Scope, microvm_only, runtime, skip};
use serde_json::{Value, json};

/// The first namespaces of a kernel have fixed inode numbers (include/linux/proc_ns.h).
const FIRST: [(&str, &str); 4] = [
    ("ipc", "ipc:[4026531839]"),
    ("uts", "uts:[4026531838]"),
    ("pid", "pid:[4026531836]"),
    ("cgroup", "cgroup:[4026531835]"),
];

fn report(scope: &Scope, change: impl FnOnce(&mut Value)) -> Value {
    scope.container().probe(&["report"]).edit(change).run_json()
}

#[test]
fn the_kernel_is_not_the_hosts() {
    microvm_only!();
    let scope = Scope::new();
    let seen = report(&scope, |_| {});
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_ne!(seen["boot_id"], json!(host.trim()));
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    println!("host {}, guest {}", release.trim(), seen["kernel"]);
    // Each microVM boots a kernel of its own.
    assert_ne!(report(&scope, |_| {})["boot_id"], seen["boot_id"]);
}

#[test]
fn every_namespace_asked_for_is_the_containers_own() {
    let scope = Scope::new();
    let seen = report(&scope, |_| {});
    let host = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
    for (name, first) in FIRST {
        let own = seen["namespaces"][name].as_str().unwrap();
        assert!(own.starts_with(&format!("{name}:[")) && own != first, "{name}: {own}");
    }
    for name in ["ipc", "uts", "pid", "net", "mnt"] {
        if !runtime().is_isopod() {
            assert_ne!(seen["namespaces"][name], json!(host(name)), "{name}");
        }
    }
    assert_eq!(seen["pid"], json!(1));
}

/// The first network namespace has no fixed inode number, and in a guest no more interfaces than
/// any other. But some settings exist in it alone (net/core/sysctl_net_core.c).
#[test]
fn the_network_namespace_is_not_the_kernels_first() {
    let scope = Scope::in_pod();
    let directory = "/proc/sys/net/core";
    assert!(Path::new(directory).join("netdev_max_backlog").exists(), "this host is a namespace");
    let container = scope.container().shell(&format!("ls {directory}; ls /sys/class/net"));
    let out = container.run().ok();
    let names: Vec<&str> = out.stdout.lines().collect();
    // Every network namespace has this setting, so the directory was seen.
    assert!(names.contains(&"somaxconn"), "{out}");
    assert!(!names.contains(&"netdev_max_backlog"), "{out}");
    assert_eq!(names.last(), Some(&"lo"), "{out}");
}

/// The kernel's first mount namespace cannot be recognised by the mounts below its root. But a
/// process that leaves its root by chroot(2) ends at the root of its mount namespace. Only a mount
/// namespace with a root of its own ends at the container's root.
#[test]
fn the_mount_namespace_ends_at_the_containers_root() {
    let scope = Scope::in_pod();
    let container = scope.container().capabilities(&["CAP_SYS_CHROOT"]).probe(&["escape", "/tmp"]);
    fs::write(container.bundle.rootfs("/mark-of-this-root"), "").unwrap();
    let names = container.run_json();
    let names: Vec<&str> = names.as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
    assert!(names.contains(&"mark-of-this-root"), "{names:?}");
}

/// The uts and cgroup namespaces, the only ones that can be left out; errors.rs has the others.
#[test]
fn a_namespace_not_asked_for_is_the_guests() {
    microvm_only!();
    let scope = Scope::in_pod();
    let seen = report(&scope, |c| {
        let all = c["linux"]["namespaces"].as_array_mut().unwrap();
        all.retain(|n| n["type"] != "uts" && n["type"] != "cgroup");
        // The host name belongs to the uts namespace, so it may not be set without one.
        c.as_object_mut().unwrap().remove("hostname");
    });
    for (name, first) in FIRST.iter().filter(|(name, _)| ["uts", "cgroup"].contains(name)) {
        assert_eq!(seen["namespaces"][name], json!(first), "{name}");
    }
}

#[test]
fn the_containers_cgroup_is_the_root_of_its_cgroup_namespace() {
    let scope = Scope::in_pod();
    let seen = report(&scope, |_| {});
    let lines = seen["cgroup"].as_str().unwrap();
    assert!(lines.lines().all(|l| l.ends_with(":/")), "{lines}");
}

/// The guest's own mounts and its agent are hidden from the container.
#[test]
fn the_mount_table_is_the_containers_own() {
    let scope = Scope::in_pod();
    let mounts = scope.container().probe(&["mounts"]).run_json();
    let places: Vec<&String> = mounts.as_object().unwrap().keys().collect();
    for place in &places {
        let known = ["/", "/dev", "/proc", "/sys"];
        let below = ["/dev/", "/proc/", "/sys/"];
        assert!(
            known.contains(&place.as_str()) || below.iter().any(|b| place.starts_with(b)),
            "{place} of {places:?}"
        );
    }
}

#[test]
fn a_process_over_the_memory_limit_is_killed_and_that_is_said() {
    let scope = Scope::in_pod();
    let limit = json!({ "limit": 64 << 20, "swap": 64 << 20 });
    let container = scope.container().probe(&["eat", "400"]);
    let container = container.edit(|c| c["linux"]["resources"]["memory"] = limit);
    let out = container.run();
    assert_eq!(out.status, 128 + 9, "{out}");
    assert!(out.stdout.contains("16\n") && !out.stdout.contains("ate"), "{out}");
    if runtime().is_isopod() {
        let error = out.stderr.to_lowercase();
        assert!(error.contains("memory") && error.contains("limit"), "{out}");
    }
}

#[test]
fn memory_within_the_limit_is_there() {
    let scope = Scope::in_pod();
    let limit = json!({ "limit": 128 << 20, "swap": 128 << 20 });
    let container = scope.container().probe(&["eat", "100"]);
    let out = container.edit(|c| c["linux"]["resources"]["memory"] = limit).run().ok();
    assert!(out.stdout.ends_with("ate 100\n"), "{out}");
}

#[test]
fn memory_over_the_limit_in_exec_spares_the_container() {
    if !runtime().is_isopod() {
        skip!("lowering a score needs CAP_SYS_RESOURCE on this machine");
    }
    let scope = Scope::in_pod();
    let limit = json!({ "limit": 64 << 20, "swap": 64 << 20 });
    let container = scope.container().args(["sleep", "1000"]);
    let container = container.edit(|c| {
        c["linux"]["resources"]["memory"] = limit;
        // So that the kernel kills the eater, not the first process.
        c["process"]["oomScoreAdj"] = json!(-1000);
    });
    let _created = container.start_new();
    let out =
        container.exec(["sh", "-c", "echo 1000 > /proc/self/oom_score_adj; exec probe eat 400"]);
    assert_eq!(out.status, 128 + 9, "{out}");
    assert_eq!(container.status(), "running");
    container.exec(["true"]).ok();
}

#[test]
fn the_pids_limit_holds_against_a_fork_bomb() {
    let scope = Scope::in_pod();
    let bomb = scope.container().probe(&["fork-bomb"]);
    let bomb = bomb.edit(|c| c["linux"]["resources"]["pids"] = json!({ "limit": 50 }));
    let other = scope.container().args(["sleep", "1000"]);
    let _other_created = other.start_new();
    let mut created = bomb.start_new();
    let line = created.stdout.line_with("EAGAIN");
    let forks: u32 = line.split_whitespace().nth(2).unwrap().parse().unwrap();
    assert!(forks <= 50, "{line}");
    other.exec(["true"]).ok();
    assert_eq!(bomb.status(), "running");
    bomb.kill("KILL").ok();
    assert_eq!(created.wait().status(), 128 + 9);
    bomb.delete().ok();
    other.exec(["true"]).ok();
}

/// A container that makes a device node and opens it. With `CAP_MKNOD` only the device rules can
/// stop it.
fn device_test<'a>(scope: &'a Scope, rules: Value) -> Container<'a> {
    scope
        .container()
        .capabilities(&["CAP_MKNOD", "CAP_SYSLOG"])
        .probe(&["mknod", "/dev/made", "1", "11"])
        .edit(|c| c["linux"]["resources"]["devices"] = rules)
}

#[test]
fn a_device_outside_the_allow_list_is_refused() {
    let scope = Scope::in_pod();
    let nothing = json!([{ "allow": false, "access": "rwm" }]);
    assert_eq!(device_test(&scope, nothing).run_json()["open"], json!("EPERM"));
}

#[test]
fn an_allowed_device_can_be_used_as_far_as_allowed() {
    let scope = Scope::in_pod();
    let rules = |access: &str| {
        json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 1, "minor": 11, "access": access },
        ])
    };
    let seen = device_test(&scope, rules("rwm")).run_json();
    assert_eq!(seen, json!({ "mknod": "ok", "open": "ok" }));
    assert_eq!(device_test(&scope, rules("wm")).run_json()["open"], json!("EPERM"));
    // A later rule wins.
    let mut later = rules("rwm");
    later.as_array_mut().unwrap().push(json!(
        { "allow": false, "type": "c", "major": 1, "minor": 11, "access": "r" }
    ));
    assert_eq!(device_test(&scope, later).run_json()["open"], json!("EPERM"));
}

#[test]
fn the_default_devices_work() {
    let scope = Scope::in_pod();
    let paths = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/ptmx"];
    let seen = scope.container().probe(&[&["open", "rw"], &paths[..]].concat()).run_json();
    for path in paths {
        assert_eq!(seen[path], json!("ok"), "{path}");
    }
    let script = "for link in fd stdin stdout stderr; do readlink /dev/$link; done";
    let out = scope.container().shell(script).run().ok();
    let links = "/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\n";
    assert_eq!(out.stdout, links);
}

#[test]
fn a_device_of_the_specification_is_made() {
    let scope = Scope::in_pod();
    let container =
        scope.container().shell("stat -c '%t %T %a %u %g %F' /dev/mine && cat /dev/mine");
    let out = container
        .capabilities(&["CAP_DAC_OVERRIDE"])
        .edit(|c| {
            c["linux"]["devices"] = json!([{
                "path": "/dev/mine", "type": "c", "major": 1, "minor": 3,
                "fileMode": 0o640, "uid": 1000, "gid": 1001,
            }]);
        })
        .run()
        .ok();
    assert_eq!(out.stdout, "1 3 640 1000 1001 character special file\n");
}

#[test]
fn sysctls_are_as_asked() {
    let scope = Scope::in_pod();
    let paths = ["/proc/sys/kernel/shmmax", "/proc/sys/net/ipv4/ip_unprivileged_port_start"];
    let container = scope.container().probe(&[&["files"], &paths[..]].concat()).edit(|c| {
        c["linux"]["sysctl"] =
            json!({ "kernel.shmmax": "123456", "net.ipv4.ip_unprivileged_port_start": "0" });
    });
    let seen = container.run_json();
    assert_eq!(seen[paths[0]]["text"], json!("123456\n"));
    assert_eq!(seen[paths[1]]["text"], json!("0\n"));
}

/// A process of the host, ended with the test.
struct Stranger(Child);

impl Stranger {
    fn of_user(uid: u32) -> Self {
        Self(Command::new("sleep").arg("10000").uid(uid).gid(uid).spawn().unwrap())
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not even root in the container can read that memory, not even through a bind mount of /proc. On
/// the host a process may read the memory of its own user's processes. The user of a guest is not
/// the host's user with the same id.
#[test]
fn the_memory_of_the_hosts_processes_is_not_to_be_had() {
    let scope = Scope::in_pod();
    let strangers = [0, 1000].map(Stranger::of_user);
    let mut paths = strangers.each_ref().map(|one| format!("/host/{}/mem", one.0.id())).to_vec();
    paths.push("/host/kcore".to_owned());
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    for options in [["rbind", "ro"], ["rbind", "rw"]] {
        let container = scope.container().mount("/host", "bind", "/proc", &options);
        let seen = container.probe(&[&["open", "r"], &paths[..]].concat()).run_json();
        for path in &paths {
            // Either the kernel refuses for want of a capability, or the file server by the file's
            // name.
            let refused = [json!("EACCES"), json!("EPERM")].contains(&seen[path]);
            assert!(refused, "{path}, {options:?}: {}", seen[path]);
        }
    }
    if runtime().is_isopod() {
        let container = scope.container().mount("/host", "bind", "/proc", &["rbind", "ro"]);
        let user = json!({ "uid": 1000, "gid": 1000 });
        let container = container.edit(|c| c["process"]["user"] = user);
        let seen = container.probe(&[&["open", "r"], &paths[..2]].concat()).run_json();
        for path in &paths[..2] {
            assert_eq!(seen[path], json!("EACCES"), "{path}");
        }
    }
}

/// A guest that could run microVMs of its own would reach more of the host's KVM.
#[test]
fn the_processor_has_no_virtualisation_unless_it_is_asked_for() {
    microvm_only!();
    let scope = Scope::new();
    let flags = |container: Container<'_>| {
        let out = container.args(["grep", "-m1", "^flags", "/proc/cpuinfo"]).run().ok();
        out.stdout.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let usual = flags(scope.container());
    assert!(usual.iter().any(|flag| flag == "fpu"), "{usual:?}");
    for hidden in ["svm", "vmx", "smx", "perfctr_core", "perfctr_nb", "perfctr_llc"] {
        assert!(!usual.iter().any(|flag| flag == hidden), "{hidden}");
    }
    let host = fs::read_to_string("/proc/cpuinfo").unwrap();
    let nested = flags(scope.container().annotation("dev.isopod.nested", "true"));
    for flag in ["svm", "vmx"] {
        let has = host.split_whitespace().any(|word| word == flag);
        assert_eq!(nested.iter().any(|word| word == flag), has, "{flag}");
    }
    let wrong = scope.container().annotation("dev.isopod.nested", "yes").run();
    wrong.one_line_error(&["dev.isopod.nested", "true or false"]);
}
