//! User namespaces: the ids of the container's users in the microVM and on the host.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};

use isopod_tests::{Container, Scope, microvm_only};
use serde_json::json;

/// The outer id of the container's root.
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
    // A file of an unmapped id belongs to nobody (65534), and no capability reaches it.
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

/// Makes file systems that can be mapped, one below the other, with files of two users each.
fn volume(scope: &Scope) -> (String, String) {
    let volume = scope.dir().join("mapped").to_string_lossy().into_owned();
    let (upper, lower) = (format!("{volume}.upper"), format!("{volume}.lower"));
    let mount = format!(
        "mkdir -p {volume}; modprobe loop || true; mount -o loop {upper} {volume}; \
         mount -o loop {lower} {volume}/below"
    );
    let script = format!(
        "set -e; for image in {upper} {lower}; do truncate -s 4M $image; mkfs.ext4 -q $image; done; \
         mkdir {volume}; modprobe loop || true; mount -o loop {upper} {volume}; \
         mkdir {volume}/below; umount {volume}; {mount}; \
         for dir in {volume} {volume}/below; do echo x > $dir/roots; echo x > $dir/theirs; \
         chmod 600 $dir/*s; chown 5:6 $dir/theirs; done"
    );
    scope.program(&["unshare", "--mount", "sh", "-c", &script]).output().ok();
    (volume, mount)
}

#[test]
fn the_files_of_a_mount_can_belong_to_other_ids() {
    microvm_only!();
    let scope = Scope::new();
    let (volume, mount) = volume(&scope);
    let look = "cd /data; stat -c '%u %g' roots theirs below/roots; cat roots below/roots";
    let container = |options: &[&str]| {
        let container = mapped(&scope).capabilities(&["CAP_CHOWN", "CAP_DAC_OVERRIDE"]);
        container.mount("/data", "bind", &volume, options)
    };
    let run = |container: Container<'_>, script: &str| {
        let container = container.shell(script);
        container.command_with_bundle("run", &[]).after_mounting(&mount).output()
    };
    // By the mapping of the container's user namespace. Below the mount nothing is mapped.
    let out = run(container(&["rbind", "idmap"]), look);
    assert_eq!(out.stdout, "0 0\n5 6\n65534 65534\nx\n", "{out}");
    let make = "echo new > /data/new && chown 7:8 /data/new";
    let out = run(container(&["rbind", "ridmap"]), &format!("{look}; {make}")).ok();
    assert_eq!(out.stdout, "0 0\n5 6\n0 0\nx\nx\n", "{out}");
    // Files that the container makes have the ids of the file system.
    let stat = format!("{mount}; stat -c '%u %g' {volume}/new");
    let new = scope.program(&["unshare", "--mount", "sh", "-c", &stat]).output().ok();
    assert_eq!(new.stdout, "7 8\n");
    // By the mount's own mapping, with a user namespace and without.
    let maps = |uid: u32, gid: u32| {
        move |c: &mut serde_json::Value| {
            let mount = c["mounts"].as_array_mut().unwrap().last_mut().unwrap();
            mount["uidMappings"] = json!([{ "containerID": 0, "hostID": uid, "size": 10 }]);
            mount["gidMappings"] = json!([{ "containerID": 0, "hostID": gid, "size": 10 }]);
        }
    };
    let stat = "stat -c '%u %g' /data/roots /data/theirs";
    let out = run(container(&["bind", "idmap"]).edit(maps(BASE + 7, BASE + 8)), stat).ok();
    assert_eq!(out.stdout, "7 8\n12 14\n");
    let plain = scope.container().mount("/data", "bind", &volume, &["bind"]);
    let out = run(plain.edit(maps(1000, 100)), stat).ok();
    assert_eq!(out.stdout, "1000 100\n1005 106\n");
}

#[test]
fn a_mount_that_cannot_be_mapped_is_refused() {
    microvm_only!();
    let scope = Scope::new();
    let container = mapped(&scope).mount("/data", "bind", "/sys/kernel", &["bind", "idmap"]);
    container.run().one_line_error(&["/sys/kernel", "no id-mapped mounts"]);
    let container = scope.container().mount("/data", "bind", "/sys/kernel", &["bind", "idmap"]);
    container.run().one_line_error(&["/data", "user namespace"]);
    scope.assert_nothing_left();
}
