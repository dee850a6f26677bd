//! The root file system, mounts, masked and read-only paths, seen from inside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use isopod_tests::{Scope, microvm_only, runtime, skip};
use serde_json::{Value, json};

/// A directory on the host for a bind mount, with a file in it.
fn source(scope: &Scope) -> PathBuf {
    let dir = scope.dir().join("source");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "from the host\n").unwrap();
    dir
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect()
}

#[test]
fn a_read_only_root_cannot_be_written() {
    let scope = Scope::in_pod();
    let script = "touch /new; touch /etc/passwd; rm /etc/group; chmod 777 /tmp; touch /dev/shm/ok";
    let container = scope.container().shell(script).edit(|c| c["root"]["readonly"] = json!(true));
    let out = container.run().ok();
    assert_eq!(out.stderr.matches("Read-only file system").count(), 4, "{out}");
    assert!(
        container.bundle.rootfs("/etc/group").exists() && !container.bundle.rootfs("/new").exists()
    );
    let mounts = container.probe(&["mounts"]).run_json();
    assert!(strings(&mounts["/"]["options"]).contains(&"ro"), "{mounts}");
}

#[test]
fn a_writable_root_can_be_written() {
    let scope = Scope::in_pod();
    let container = scope.container().shell("echo new > /new && rm /etc/group");
    container.run().ok();
    assert_eq!(fs::read_to_string(container.bundle.rootfs("/new")).unwrap(), "new\n");
    assert!(!container.bundle.rootfs("/etc/group").exists());
}

#[test]
fn masked_paths_show_nothing() {
    let scope = Scope::in_pod();
    let masked = ["/etc/passwd", "/home", "/proc/uptime", "/does/not/exist"];
    // A path given twice, also by another name, is masked once.
    let masked = [&masked[..], &["/etc/passwd", "/home/", "/proc/self/../uptime"]].concat();
    let script = "cat /etc/passwd /proc/uptime; ls -A /home; echo end; \
                  cut -d ' ' -f 5 /proc/self/mountinfo | grep -E '^/(etc|home|proc/up)' >&2";
    let container = scope.container().shell(script);
    let container = container.edit(|c| c["linux"]["maskedPaths"] = json!(masked));
    let secret = container.bundle.rootfs("/home/secret");
    fs::write(&secret, "secret").unwrap();
    let out = container.run().ok();
    assert_eq!(out.stdout, "end\n");
    if runtime().is_isopod() {
        let mut mounts: Vec<&str> = out.stderr.lines().collect();
        mounts.sort_unstable();
        assert_eq!(mounts, ["/etc/passwd", "/home", "/proc/uptime"]);
    }
    // Masked inside, and untouched on the host.
    assert_eq!(fs::read_to_string(&secret).unwrap(), "secret");
    assert_ne!(fs::metadata(container.bundle.rootfs("/etc/passwd")).unwrap().len(), 0);
}

#[test]
fn read_only_paths_can_be_read_only() {
    let scope = Scope::in_pod();
    let paths = ["/proc/sys", "/etc", "/does/not/exist"];
    let container = scope.container().edit(|c| c["linux"]["readonlyPaths"] = json!(paths));
    let container =
        container.probe(&["open", "w", "/proc/sys/kernel/shmmax", "/etc/passwd", "/etc/group"]);
    let seen = container.run_json();
    for path in ["/proc/sys/kernel/shmmax", "/etc/passwd", "/etc/group"] {
        assert_eq!(seen[path], json!("EROFS"), "{path}");
    }
    let container = scope.container().edit(|c| c["linux"]["readonlyPaths"] = json!(["/etc"]));
    container.shell("cat /etc/passwd && echo x > /tmp/x").run().ok();
}

#[test]
fn the_default_mounts_are_as_asked() {
    let scope = Scope::in_pod();
    let mounts = scope.container().probe(&["mounts"]).run_json();
    let check = |place: &str, kind: &str, options: &[&str], of_fs: &[&str]| {
        assert_eq!(mounts[place]["type"], json!(kind), "{place}");
        let has = strings(&mounts[place]["options"]);
        assert!(options.iter().all(|o| has.contains(o)), "{place}: {has:?}");
        let has = strings(&mounts[place]["super"]);
        assert!(of_fs.iter().all(|o| has.contains(o)), "{place}: {has:?}");
    };
    check("/proc", "proc", &["rw"], &[]);
    check("/dev", "tmpfs", &["nosuid"], &["size=65536k", "mode=755"]);
    check("/dev/pts", "devpts", &["nosuid", "noexec"], &["gid=5", "mode=620", "ptmxmode=666"]);
    check("/dev/shm", "tmpfs", &["nosuid", "nodev", "noexec"], &["size=65536k"]);
    check("/dev/mqueue", "mqueue", &["nosuid", "nodev", "noexec"], &[]);
    check("/sys", "sysfs", &["ro", "nosuid", "nodev", "noexec"], &[]);
    // With runc the type depends on the machine's cgroup version.
    if runtime().is_isopod() {
        check("/sys/fs/cgroup", "cgroup2", &["ro", "nosuid", "nodev", "noexec"], &[]);
    }
}

#[test]
fn a_tmpfs_has_its_size_mode_and_options() {
    let scope = Scope::in_pod();
    let options = ["size=1m", "mode=1750", "uid=1000", "gid=1001", "noexec", "noatime"];
    let script = "stat -c '%a %u %g' /made/tmp; head -c 2000000 /dev/zero > /made/tmp/big; \
                  stat -c %s /made/tmp/big; cp /bin/busybox /tmp/b; /bin/probe mounts";
    let container = scope.container().capabilities(&["CAP_DAC_OVERRIDE"]).shell(script);
    let out = container.mount("/made/tmp", "tmpfs", "tmpfs", &options).run().ok();
    let mut lines = out.stdout.lines();
    assert_eq!(lines.next(), Some("1750 1000 1001"), "{out}");
    assert_eq!(lines.next(), Some("1048576"), "{out}");
    let mounts: Value = serde_json::from_str(lines.next().unwrap()).unwrap();
    let has = strings(&mounts["/made/tmp"]["options"]);
    assert!(has.contains(&"noexec") && has.contains(&"noatime"), "{has:?}");
}

#[test]
fn a_bind_mount_works_both_ways_and_appears_where_nothing_was() {
    let scope = Scope::in_pod();
    let dir = source(&scope);
    let script =
        "cat /made/for/data/file; echo from inside > /made/for/data/new; rm /made/for/data/file";
    let container = scope.container().shell(script);
    let container =
        container.mount("/made/for/data", "bind", dir.to_str().unwrap(), &["rbind", "rw"]);
    assert_eq!(container.run().ok().stdout, "from the host\n");
    assert_eq!(fs::read_to_string(dir.join("new")).unwrap(), "from inside\n");
    assert!(!dir.join("file").exists());
}

#[test]
fn a_read_only_bind_mount_cannot_be_written() {
    let scope = Scope::in_pod();
    let dir = source(&scope);
    let container =
        scope.container().mount("/data", "bind", dir.to_str().unwrap(), &["bind", "ro"]);
    let seen = container.probe(&["open", "rw", "/data/file", "/data"]).run_json();
    assert_eq!(seen["/data/file"], json!("EROFS"));
    let container =
        scope.container().mount("/data", "bind", dir.to_str().unwrap(), &["bind", "ro"]);
    // Not even a process that may mount can write: the mount on the host is read-only too.
    let remount = "mount -o remount,bind,rw /data; echo changed > /data/file; cat /data/file";
    let out = container.capabilities(&["CAP_SYS_ADMIN"]).shell(remount).run();
    if runtime().is_isopod() {
        assert_eq!(out.stdout, "from the host\n", "{out}");
        assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "from the host\n");
    }
}

#[test]
fn a_file_can_be_bind_mounted() {
    let scope = Scope::in_pod();
    let file = source(&scope).join("file");
    let container = scope.container().shell("cat /etc/passwd /new/file; echo inside >> /new/file");
    let container = container.mount("/etc/passwd", "bind", file.to_str().unwrap(), &["bind", "ro"]);
    let container = container.mount("/new/file", "bind", file.to_str().unwrap(), &["bind"]);
    assert_eq!(container.run().ok().stdout, "from the host\nfrom the host\n");
    assert_eq!(fs::read_to_string(&file).unwrap(), "from the host\ninside\n");
}

#[test]
fn options_of_bind_mounts_are_kept() {
    let scope = Scope::in_pod();
    let dir = source(&scope);
    fs::copy("/bin/busybox", dir.join("true")).unwrap();
    fs::set_permissions(dir.join("true"), fs::Permissions::from_mode(0o755)).unwrap();
    let options = ["bind", "nosuid", "nodev", "noexec"];
    let container = scope.container().mount("/data", "bind", dir.to_str().unwrap(), &options);
    let out = container.shell("/data/true; echo $?; /bin/probe mounts").run().ok();
    let mut lines = out.stdout.lines();
    assert_eq!(lines.next(), Some("126"), "{out}");
    let mounts: Value = serde_json::from_str(lines.next().unwrap()).unwrap();
    let has = strings(&mounts["/data"]["options"]);
    assert!(["nosuid", "nodev", "noexec"].iter().all(|o| has.contains(o)), "{has:?}");
}

/// The directory has another file system of the host mounted below.
#[test]
fn recursive_options_hold_below() {
    let scope = Scope::in_pod();
    let dir = source(&scope);
    fs::create_dir(dir.join("below")).unwrap();
    let mount =
        format!("mount -t tmpfs none {0} && echo x > {0}/file", dir.join("below").display());
    let run = |options: &[&str], script: &str| {
        let container = scope.container().shell(script);
        let container = container.mount("/data", "bind", dir.to_str().unwrap(), options);
        container.command_with_bundle("run", &[]).after_mounting(&mount).output().ok().stdout
    };
    let script = "cp /bin/busybox /data/below/true 2>/dev/null && echo written; \
                  /data/below/true 2>/dev/null && echo run; cat /data/below/file";
    assert_eq!(run(&["rbind"], script), "written\nrun\nx\n");
    assert_eq!(run(&["rbind", "rnoexec"], script), "written\nx\n");
    assert_eq!(run(&["rbind", "rro"], script), "x\n");
    // Without `rbind` the mount below is missing.
    assert_eq!(run(&["bind"], "ls /data/below"), "");
}

#[test]
fn a_tmpfs_can_start_with_what_the_image_has() {
    let scope = Scope::in_pod();
    let script = "cat /etc/group | head -n 1; echo more >> /etc/group && tail -n 1 /etc/group; \
                  /bin/probe mounts";
    let container = scope.container().shell(script);
    let container = container.mount("/etc", "tmpfs", "tmpfs", &["tmpcopyup", "mode=755"]);
    let out = container.run().ok();
    let mut lines = out.stdout.lines();
    assert_eq!((lines.next(), lines.next()), (Some("root:x:0:"), Some("more")), "{out}");
    let mounts: Value = serde_json::from_str(lines.next().unwrap()).unwrap();
    assert_eq!(mounts["/etc"]["type"], json!("tmpfs"));
    let image = fs::read_to_string(container.bundle.rootfs("/etc/group")).unwrap();
    assert!(!image.contains("more"), "{image}");
}

#[test]
fn a_missing_bind_source_is_an_error_that_names_it() {
    let scope = Scope::in_pod();
    let container = scope.container().mount("/data", "bind", "/no/such/source", &["bind"]);
    container.run().one_line_error(&["/no/such/source"]);
    scope.assert_nothing_left();
}

/// A root file system may hold links that lead out of it. A mount on such a link must not.
#[test]
fn a_mount_behind_a_link_that_points_outside_lands_inside() {
    let scope = Scope::in_pod();
    let (dir, outside) = (source(&scope), scope.dir().join("outside"));
    fs::create_dir(&outside).unwrap();
    let container = scope.container().args(["cat", "/link/data/file"]);
    symlink(&outside, container.bundle.rootfs("/link")).unwrap();
    let container = container.mount("/link/data", "bind", dir.to_str().unwrap(), &["bind"]);
    assert_eq!(container.run().ok().stdout, "from the host\n");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "something was made outside");
}

#[test]
fn a_relative_root_and_an_absolute_root_are_the_same() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["cat", "/etc/passwd"]);
    let absolute = container.bundle.rootfs("/");
    let container = container.edit(|c| c["root"]["path"] = json!(absolute));
    assert!(container.run().ok().stdout.starts_with("root:"));
}

#[test]
fn propagation_of_the_root_is_as_asked() {
    let scope = Scope::in_pod();
    for (asked, shown) in [("private", 0), ("slave", 0), ("shared", 1)] {
        if shown == 1 && !runtime().is_isopod() {
            skip!("runc 1.1 gives shared propagation to the parent of the root only");
        }
        let container = scope.container().probe(&["mounts"]);
        let container = container.edit(|c| c["linux"]["rootfsPropagation"] = json!(asked));
        let mounts = container.run_json();
        let tags = strings(&mounts["/"]["propagation"]);
        let shared = tags.iter().filter(|t| t.starts_with("shared:")).count();
        assert_eq!(shared, shown, "{asked}: {tags:?}");
    }
}

#[test]
fn propagation_of_a_mount_is_as_asked() {
    let scope = Scope::in_pod();
    let mut container = scope.container().probe(&["mounts"]);
    // A slave mount without a master has no tag, like a private one.
    let asked =
        [("private", ""), ("slave", ""), ("unbindable", "unbindable"), ("shared", "shared:")];
    for (option, _) in asked {
        container = container.mount(&format!("/mnt/{option}"), "tmpfs", "tmpfs", &[option]);
    }
    let mounts = container.run_json();
    for (option, shown) in asked {
        let tags = strings(&mounts[&format!("/mnt/{option}")]["propagation"]).join(" ");
        assert!(tags.is_empty() == shown.is_empty() && tags.starts_with(shown), "{option}: {tags}");
    }
}

#[test]
fn the_root_directory_itself_keeps_its_owner_and_mode() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["stat", "-c", "%a %u %g", "/"]);
    let root = container.bundle.rootfs("/");
    fs::set_permissions(&root, fs::Permissions::from_mode(0o751)).unwrap();
    std::os::unix::fs::chown(&root, Some(0), Some(1000)).unwrap();
    assert_eq!(container.run().ok().stdout, "751 0 1000\n");
    let after = fs::metadata(&root).unwrap();
    assert_eq!((after.mode() & 0o7777, after.gid()), (0o751, 1000));
}

/// Podman's `cp` joins the mount namespace of the container's pid, and takes the root directory
/// there for the container's. It must not be the host's.
#[test]
fn who_enters_the_mount_namespace_finds_the_container() {
    let scope = Scope::in_pod();
    let volume = source(&scope);
    let container = scope.container().args(["sleep", "1000"]).edit(|c| {
        let mounts = c["mounts"].as_array_mut().unwrap();
        let volume = volume.to_string_lossy();
        mounts.push(json!({
            "destination": "/data", "source": volume, "options": ["bind", "ro"]
        }));
        // One in a file system of the guest's own, and one through a link that leads out of the
        // root.
        mounts.push(json!({
            "destination": "/dev/deep", "source": volume, "options": ["bind"]
        }));
        mounts.push(json!({
            "destination": "/link/linked", "source": volume, "options": ["bind"]
        }));
    });
    symlink("/../../home", container.bundle.rootfs("/link")).unwrap();
    container.create();
    let pid = container.state()["pid"].to_string();
    let enter = |script: &str| {
        let words = ["nsenter", "--target", &pid, "--mount", "--", "/bin/sh", "-c", script];
        scope.program(&words).output()
    };
    let script = "echo /*; cat /data/file /home/linked/file; ls /proc /dev; echo sent >/sent";
    let seen = enter(script).ok();
    let rootfs = fs::read_dir(container.bundle.rootfs("/")).unwrap();
    let mut names: Vec<String> = rootfs
        .map(|entry| format!("/{}", entry.unwrap().file_name().to_string_lossy()))
        .filter(|name| name != "/sent")
        .collect();
    names.sort();
    assert!(seen.stdout.starts_with(&names.join(" ")), "{seen} {names:?}");
    assert_eq!(seen.stdout.matches("from the host").count(), 2, "{seen}");
    // Other programs go by /proc/PID/root of that pid instead.
    let root = format!("/proc/{pid}/root");
    let found = scope.program(&["sh", "-c", "cd $0 && cat sent data/file", &root]).output().ok();
    assert!(
        found.stdout.starts_with("sent\n") && found.stdout.contains("from the host"),
        "{found}"
    );
    let refused = enter("echo no >/data/file");
    assert!(refused.stderr.contains("Read-only file system"), "{refused}");
    container.start().ok();
    assert_eq!(container.exec(["cat", "/sent"]).ok().stdout, "sent\n");
    assert!(!std::path::Path::new("/sent").exists());
    container.delete_force();
}

/// Podman's `top` looks for processes in the joined mount namespace. Of the host's processes, only
/// those of the sandbox are there. Nothing leads away from them, even if a link of the container
/// names such a way.
#[test]
fn who_enters_the_mount_namespace_finds_no_other_process_and_no_way_out() {
    microvm_only!();
    let scope = Scope::new();
    let container = scope.container().args(["sleep", "1000"]);
    let pid = container.create().pid;
    let enter = |script: &str| {
        let pid = pid.to_string();
        let words = ["nsenter", "--target", &pid, "--mount", "--", "/bin/sh", "-c", script];
        scope.program(&words).output()
    };
    let mut pids = [pid, scope.child(pid, "isopod-vmm")].map(|pid| pid.to_string());
    pids.sort();
    let of_each = |name: &str| pids.clone().map(|pid| format!("{pid}{name}")).join(" ");
    let seen = enter("cd /proc; echo *; echo [0-9]*/*; echo [0-9]*/ns/*").ok().stdout;
    let files = ["/cmdline", "/ns", "/stat", "/status"];
    let all = pids.clone().map(|pid| files.map(|file| format!("{pid}{file}")).join(" ")).join(" ");
    assert_eq!(seen, format!("{} stat\n{all}\n{}\n", pids.join(" "), of_each("/ns/pid")));
    let said = enter(&format!("grep Name /proc/{pid}/status; grep -c btime /proc/stat"));
    assert_eq!(said.ok().stdout, "Name:\tisopod\n1\n");
    for script in ["mkdir /proc/1", &format!("echo >/proc/{pid}/ns/pid"), "echo >/proc/stat"] {
        assert_ne!(enter(script).status, 0, "{script}");
    }
    container.delete_force();
}
