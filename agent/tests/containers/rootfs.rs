//! The container's file system, seen from inside.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::{Value, json};

use super::driver::Driver;
use super::io::Outcome;

async fn with_mounts(d: &Driver, script: &str, mounts: Value) -> Outcome {
    let mut spec = d.spec(script);
    let list = spec["mounts"].as_array_mut().unwrap();
    list.extend(mounts.as_array().unwrap().iter().cloned());
    d.run(&spec).await
}

pub(crate) async fn mount_options(d: &Driver) {
    let mounts = json!([
        {"destination": "/new/place", "type": "tmpfs", "source": "x",
         "options": ["ro", "noexec", "nosuid", "nodev", "noatime", "mode=777", "size=64k", "uid=7"]},
        {"destination": "/home", "type": "tmpfs", "options": ["rw", "rshared", "strictatime"]},
    ]);
    let script = "grep -E ' (/new/place|/home|/sys|/dev|/proc|/sys/fs/cgroup) ' /proc/self/mountinfo; \
                  touch /new/place/x 2>&1; touch /home/y && echo written";
    let done = with_mounts(d, script, mounts).await;
    let line = |path: &str| {
        let path = format!(" {path} ");
        done.out.lines().find(|line| line.contains(&path)).unwrap_or_else(|| panic!("{done:?}"))
    };
    let place = line("/new/place");
    for option in ["ro,nosuid,nodev,noexec,noatime", "size=64k", "mode=777", "uid=7"] {
        assert!(place.contains(option), "{option} in {place}");
    }
    assert!(line("/home").contains("shared:"), "{done:?}");
    assert!(line("/sys").contains("ro,nosuid,nodev,noexec"), "{done:?}");
    assert!(line("/sys/fs/cgroup").contains("cgroup2"), "{done:?}");
    assert!(!line("/proc").contains("shared:"), "{done:?}");
    assert!(done.out.contains("/new/place/x: Read-only file system"), "{done:?}");
    assert!(done.out.ends_with("written\n"), "{done:?}");
}

pub(crate) async fn bind_mounts(d: &Driver) {
    fs::create_dir_all(d.file("/src/dir")).unwrap();
    fs::write(d.file("/src/dir/file"), "in dir\n").unwrap();
    fs::write(d.file("/src/one"), "one file\n").unwrap();
    let source = |name: &str| d.rootfs().join("src").join(name);
    let mounts = json!([
        {"destination": "/b/dir", "type": "bind", "source": source("dir"), "options": ["rbind", "ro"]},
        {"destination": "/b/one", "type": "none", "source": source("one"), "options": ["bind", "rprivate"]},
        {"destination": "/b/rec", "type": "bind", "source": source("dir"), "options": ["rbind", "rro", "rnoexec"]},
    ]);
    let script = "cat /b/dir/file /b/one; touch /b/dir/x 2>&1; touch /b/rec/x 2>&1; \
                  echo more >> /b/one; grep -c ' /b/' /proc/self/mountinfo";
    let done = with_mounts(d, script, mounts).await;
    assert!(done.out.starts_with("in dir\none file\n"), "{done:?}");
    assert_eq!(done.out.matches("Read-only file system").count(), 2, "{done:?}");
    assert!(done.out.ends_with("3\n"), "{done:?}");
    assert_eq!(fs::read_to_string(d.file("/src/one")).unwrap(), "one file\nmore\n");
    let missing =
        json!([{"destination": "/b", "type": "bind", "source": "/no/where", "options": ["bind"]}]);
    let mut spec = d.spec("true");
    spec["mounts"].as_array_mut().unwrap().extend(missing.as_array().unwrap().clone());
    let e = d.create(&d.name(), &spec, None).await.unwrap_err();
    assert_eq!(e.1, "bind /no/where on /b: No such file or directory");
}

pub(crate) async fn hidden_and_read_only_paths(d: &Driver) {
    fs::create_dir_all(d.file("/src/secret")).unwrap();
    fs::write(d.file("/src/secret/key"), "key").unwrap();
    fs::write(d.file("/src/file"), "text").unwrap();
    let mut spec = d.spec(
        "ls /src/secret | wc -l; touch /src/secret/x 2>&1; wc -c < /src/file; \
         echo 1 > /proc/sys/kernel/shmmni 2>/dev/null || echo ro; touch /x 2>&1; mkdir /tmp/y 2>&1; \
         touch /dev/shm/z && echo shm-ok; grep -c ' /proc/sys ' /proc/self/mountinfo",
    );
    spec["root"]["readonly"] = json!(true);
    let masked = spec["linux"]["maskedPaths"].as_array_mut().unwrap();
    masked.extend([json!("/src/secret"), json!("/src/file"), json!("/not/there")]);
    let done = d.run(&spec).await;
    let lines: Vec<&str> = done.out.lines().collect();
    assert_eq!(lines[0], "0", "{done:?}");
    assert!(lines[1].contains("Read-only"), "{done:?}");
    assert_eq!(lines[2..4], ["0", "ro"], "{done:?}");
    assert!(lines[4].contains("Read-only") && lines[5].contains("Read-only"), "{done:?}");
    assert_eq!(lines[6..], ["shm-ok", "1"], "{done:?}");
}

pub(crate) async fn links_do_not_lead_out(d: &Driver) {
    let outside = d.rootfs().parent().unwrap().join("outside");
    let link = d.file("/home/link");
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(&outside, &link).unwrap();
    std::os::unix::fs::symlink("../../../../../../up", d.file("/home/up")).unwrap();
    let mounts = json!([
        {"destination": "/home/link/a", "type": "tmpfs"},
        {"destination": "/home/up", "type": "tmpfs"},
    ]);
    let done = with_mounts(d, "grep -c -E 'outside/a| /up ' /proc/self/mountinfo", mounts).await;
    assert_eq!(done.out, "2\n", "{done:?}");
    assert!(!outside.exists());
    // A /proc that is a link would redirect the masks with it.
    fs::rename(d.file("/proc"), d.file("/proc.away")).unwrap();
    std::os::unix::fs::symlink("/tmp", d.file("/proc")).unwrap();
    let refused = d.create(&d.name(), &d.spec("true"), None).await.unwrap_err();
    fs::remove_file(d.file("/proc")).unwrap();
    fs::rename(d.file("/proc.away"), d.file("/proc")).unwrap();
    assert!(refused.1.contains("/proc is a symbolic link"), "{refused:?}");
}

pub(crate) async fn default_devices(d: &Driver) {
    let mut spec = d.spec(
        "for n in null zero full random urandom tty; do stat -c %n:%t:%T:%a /dev/$n; done; \
         for n in ptmx fd stdin stdout stderr; do readlink /dev/$n; done; \
         stat -c %F:%t:%T:%a:%u:%g /dev/own/fuse; ls -d /dev/console",
    );
    spec["linux"]["devices"] = json!([{"path": "/dev/own/fuse", "type": "c", "major": 10,
        "minor": 229, "fileMode": 0o640, "uid": 7, "gid": 8}]);
    let done = d.run(&spec).await;
    let expected = "/dev/null:1:3:666\n/dev/zero:1:5:666\n/dev/full:1:7:666\n/dev/random:1:8:666\n\
        /dev/urandom:1:9:666\n/dev/tty:5:0:666\npts/ptmx\n/proc/self/fd\n/proc/self/fd/0\n\
        /proc/self/fd/1\n/proc/self/fd/2\ncharacter special file:a:e5:640:7:8\n";
    assert_eq!(done.out, expected, "{}", done.err);
    assert!(done.err.contains("/dev/console"), "{done:?}");
}

pub(crate) async fn tmpfs_copies_up(d: &Driver) {
    let script =
        "cat /etc/plain; stat -c %a /bin/broken /tmp; ls /bin | grep -c .; readlink /bin/sh";
    let mounts = json!([
        {"destination": "/etc", "type": "tmpfs", "options": ["tmpcopyup", "ro"]},
        {"destination": "/bin", "type": "tmpfs", "options": ["tmpcopyup"]},
    ]);
    let done = with_mounts(d, script, mounts).await;
    assert!(done.out.starts_with("not a program\n755\n"), "{done:?}");
    assert!(done.out.ends_with("busybox\n"), "{done:?}");
}

pub(crate) async fn tmpfs_takes_over_the_mode(d: &Driver) {
    for (dir, mode) in [("/src/sticky", 0o1770), ("/src/owned", 0o2750)] {
        fs::create_dir(d.file(dir)).unwrap();
        fs::set_permissions(d.file(dir), fs::Permissions::from_mode(mode)).unwrap();
    }
    std::os::unix::fs::chown(d.file("/src/owned"), Some(7), Some(8)).unwrap();
    let tmpfs = |destination: &str, options: &[&str]| json!({"destination": destination, "type": "tmpfs", "options": options});
    let script = "stat -c %a:%u:%g /src/sticky /src/owned /src/new";
    let of = async |options: &[&str]| {
        let places = ["/src/sticky", "/src/owned", "/src/new"];
        let mounts: Vec<_> = places.iter().map(|place| tmpfs(place, options)).collect();
        let _ = fs::remove_dir(d.file("/src/new"));
        with_mounts(d, script, json!(mounts)).await.out
    };
    assert_eq!(of(&[]).await, "1770:0:0\n2750:0:0\n1777:0:0\n");
    assert_eq!(of(&["mode=700"]).await, "700:0:0\n700:0:0\n700:0:0\n");
    assert_eq!(of(&["uid=9"]).await, "1770:9:0\n2750:9:0\n1777:9:0\n");
    let copied = of(&["tmpcopyup", "gid=9"]).await;
    assert!(copied.starts_with("1770:0:9\n2750:7:9\n"), "{copied}");
}

/// Tests that a container cannot change the guest's own files that it can reach.
pub(crate) async fn files_of_the_guest_are_sealed(d: &Driver) {
    let id = d.name();
    let pid = d.create(&id, &d.spec("true"), None).await.unwrap();
    // The program of the agent, and of a container's process until it calls execve.
    for pid in [1, pid] {
        let exe = format!("/proc/{}/root/proc/{pid}/exe", d.agent_pid());
        let mode = fs::metadata(&exe).unwrap().permissions();
        let e = fs::set_permissions(&exe, mode).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ReadOnlyFilesystem, "{exe}");
    }
    d.end(&id).await;
    // /dev/null as standard input, and in front of a masked file.
    fs::write(d.file("/src/masked"), "text").unwrap();
    let id = d.name();
    let mut spec = d.spec(
        "exec > /src/told; chmod 667 /proc/self/fd/0; stat -c %a /dev/null; \
         stat -c %a:%t:%T /src/masked; chmod 667 /src/masked 2>&1; echo x > /src/masked && echo taken",
    );
    spec["linux"]["maskedPaths"] = json!(["/src/masked"]);
    d.create(&id, &spec, None).await.unwrap();
    d.start_container(&id).await.unwrap();
    d.wait(&id, "").await;
    d.delete(&id).await.unwrap();
    let told = fs::read_to_string(d.file("/src/told")).unwrap();
    assert!(told.starts_with("667\n666:1:3\n"), "{told}");
    assert!(told.contains("Read-only file system"), "{told}");
    assert!(told.ends_with("taken\n"), "{told}");
    let guests = fs::metadata(format!("/proc/{}/root/dev/null", d.agent_pid())).unwrap();
    assert_eq!(guests.permissions().mode() & 0o777, 0o666);
}
