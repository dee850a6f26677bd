//! User namespaces: who the container's users are in the microVM and on the host.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};

use isopod_tests::{Container, Scope};
use serde_json::json;

/// What root of the container is outside.
const BASE: u32 = 100_000;

/// A container with a user namespace, and a root file system that belongs to it.
fn mapped(scope: &Scope) -> Container<'_> {
    let container = scope.container().edit(|c| {
        c["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
        let mappings = json!([{ "containerID": 0, "hostID": BASE, "size": 65536 }]);
        c["linux"]["uidMappings"] = mappings.clone();
        c["linux"]["gidMappings"] = mappings;
    });
    let root = container.bundle.rootfs("/");
    let out = scope.program(&["chown", "-R", "100000:100000", root.to_str().unwrap()]).output();
    out.ok();
    container
}

#[test]
fn ids_are_mapped() {
    let scope = Scope::new();
    let container = mapped(&scope).shell("cat /proc/self/uid_map /proc/self/gid_map; id -u; id -g");
    let out = container.run().ok();
    let lines: Vec<String> =
        out.stdout.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(lines, ["0 100000 65536", "0 100000 65536", "0", "0"]);
}

#[test]
fn files_belong_to_the_mapped_users_on_both_sides() {
    let scope = Scope::new();
    let volume = scope.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    chown(&volume, Some(BASE), Some(BASE)).unwrap();
    fs::write(volume.join("theirs"), "x").unwrap();
    chown(volume.join("theirs"), Some(BASE + 7), Some(BASE + 8)).unwrap();
    fs::write(volume.join("hosts"), "secret").unwrap();
    fs::set_permissions(volume.join("hosts"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .unwrap();
    let script = "echo text > /data/own && chown 5:6 /data/own && \
        stat -c '%u %g' /data/own /data/theirs /data/hosts; cat /data/hosts || echo refused";
    let container = mapped(&scope)
        .shell(script)
        .capabilities(&["CAP_CHOWN", "CAP_DAC_OVERRIDE"])
        .mount("/data", "bind", volume.to_str().unwrap(), &["bind"]);
    let out = container.run().ok();
    // What is not mapped belongs to nobody, whom no capability reaches.
    assert_eq!(out.stdout, "5 6\n7 8\n65534 65534\nrefused\n");
    let own = fs::metadata(volume.join("own")).unwrap();
    assert_eq!((own.uid(), own.gid()), (BASE + 5, BASE + 6));
}

#[test]
fn the_usual_mounts_and_devices_are_there() {
    let scope = Scope::new();
    let container = mapped(&scope).probe(&["mounts"]);
    let mounts = container.run_json();
    for (path, kind) in [
        ("/proc", "proc"),
        ("/sys", "sysfs"),
        ("/sys/fs/cgroup", "cgroup2"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),
        ("/dev/mqueue", "mqueue"),
    ] {
        if path == "/sys/fs/cgroup" && !isopod_tests::runtime().is_isopod() {
            continue;
        }
        assert_eq!(mounts[path]["type"], json!(kind), "{path}");
    }
    let paths = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/ptmx"];
    let seen = mapped(&scope).probe(&[&["open", "rw"], &paths[..]].concat()).run_json();
    for path in paths {
        assert_eq!(seen[path], json!("ok"), "{path}");
    }
}

#[test]
fn exec_is_in_the_user_namespace_and_another_user_is_mapped() {
    let scope = Scope::new();
    let container = mapped(&scope).args(["sleep", "1000"]);
    let _created = container.start_new();
    let seen = container.exec_json(&["--user", "3:4"], &["report"]);
    assert_eq!((&seen["uid"][0], &seen["gid"][0]), (&json!(3), &json!(4)));
    let own = container.exec(["readlink", "/proc/self/ns/user"]).ok().stdout;
    let first = container.exec(["readlink", "/proc/1/ns/user"]).ok().stdout;
    assert_eq!(own, first);
}
