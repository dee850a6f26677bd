//! The share between host and guest: each side sees the other's writes, as a file system should.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use isopod_tests::{Container, PROBE_PATH, Scope, bounded, runtime};
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use serde_json::json;

/// Docker's default capabilities for files, so that files can belong to any user.
const FILE_CAPABILITIES: [&str; 7] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_MKNOD",
    "CAP_SETGID",
    "CAP_SETUID",
];

fn container(scope: &Scope) -> Container<'_> {
    scope.container().capabilities(&FILE_CAPABILITIES)
}

/// Mode, owner and group as `stat` shows them.
fn seen(path: &Path) -> (u32, u32, u32) {
    let found = fs::symlink_metadata(path).unwrap();
    (found.mode() & 0o7777, found.uid(), found.gid())
}

#[test]
fn what_is_written_inside_is_on_the_host_with_owner_and_mode() {
    let scope = Scope::in_pod();
    let script = "umask 022; cd /root; echo text > plain; mkdir -m 2750 dir; ln -s plain link; mkfifo fifo; \
                  echo x > owned; chmod 4711 owned; chown 1000:1001 dir; ln plain hard";
    let container = container(&scope).shell(script);
    container.run().ok();
    let host = |name: &str| container.bundle.rootfs("/root").join(name);
    assert_eq!(fs::read_to_string(host("plain")).unwrap(), "text\n");
    assert_eq!(seen(&host("plain")), (0o644, 0, 0));
    assert_eq!(seen(&host("dir")), (0o2750, 1000, 1001));
    assert_eq!(seen(&host("owned")), (0o4711, 0, 0));
    assert_eq!(fs::read_link(host("link")).unwrap(), Path::new("plain"));
    assert!(fs::metadata(host("fifo")).unwrap().file_type().is_fifo());
    assert_eq!(
        fs::metadata(host("hard")).unwrap().ino(),
        fs::metadata(host("plain")).unwrap().ino()
    );
}

#[test]
fn what_another_user_writes_belongs_to_that_user() {
    let scope = Scope::in_pod();
    let container = scope.container().shell("umask 027; echo x > /home/file; mkdir /home/dir");
    let container = container.edit(|c| {
        c["process"]["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [1002] });
    });
    chown(container.bundle.rootfs("/home"), Some(1000), Some(1001)).unwrap();
    container.run().ok();
    assert_eq!(seen(&container.bundle.rootfs("/home/file")), (0o640, 1000, 1001));
    assert_eq!(seen(&container.bundle.rootfs("/home/dir")), (0o750, 1000, 1001));
}

#[test]
fn a_user_may_not_do_what_the_mode_forbids() {
    let scope = Scope::in_pod();
    let paths = ["/etc/secret", "/etc/group-only", "/etc/passwd"];
    let container = scope.container().probe(&[&["open", "rw"], &paths[..]].concat()).edit(|c| {
        c["process"]["user"] = json!({ "uid": 1000, "gid": 1000, "additionalGids": [1002] });
    });
    for (path, mode, group) in [("/etc/secret", 0o600, 0), ("/etc/group-only", 0o660, 1002)] {
        let path = container.bundle.rootfs(path);
        fs::write(&path, "x").unwrap();
        chown(&path, Some(0), Some(group)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    }
    let opened = container.run_json();
    let should_be =
        json!({ "/etc/secret": "EACCES", "/etc/group-only": "ok", "/etc/passwd": "EACCES" });
    assert_eq!(opened, should_be);
}

#[test]
fn what_the_host_has_is_seen_inside_with_owner_and_mode() {
    let scope = Scope::in_pod();
    let stat = "stat -c '%n %a %u %g %s %F' /home/*; cat /home/b; readlink /home/d";
    let container = container(&scope).shell(stat);
    let host = |name: &str| container.bundle.rootfs("/home").join(name);
    fs::create_dir(host("a")).unwrap();
    fs::write(host("b"), "hello\n").unwrap();
    fs::write(host("c"), "").unwrap();
    symlink("b", host("d")).unwrap();
    for (name, mode, uid, gid) in [("a", 0o1770, 5, 6), ("b", 0o604, 70000, 7), ("c", 0o6755, 0, 8)]
    {
        chown(host(name), Some(uid), Some(gid)).unwrap();
        fs::set_permissions(host(name), Permissions::from_mode(mode)).unwrap();
    }
    let out = container.run().ok();
    let lines: Vec<&str> = out.stdout.lines().collect();
    assert!(lines[0].starts_with("/home/a 1770 5 6 ") && lines[0].ends_with(" directory"), "{out}");
    assert_eq!(lines[1], "/home/b 604 70000 7 6 regular file");
    assert_eq!(lines[2], "/home/c 6755 0 8 0 regular empty file");
    assert!(lines[3].starts_with("/home/d 777 0 0 1 symbolic link"), "{out}");
    assert_eq!(lines[4..], ["hello", "b"]);
}

#[test]
fn what_the_host_changes_meanwhile_is_seen_inside() {
    let scope = Scope::in_pod();
    let container = container(&scope).args(["sleep", "1000"]);
    let _created = container.start_new();
    let host = |name: &str| container.bundle.rootfs("/home").join(name);
    let inside = |script: &str| container.exec(["sh", "-c", script]).ok().stdout;
    for round in 0..5 {
        // A name that was looked up in vain, then made.
        inside(&format!("test ! -e /home/new-{round}"));
        fs::write(host(&format!("new-{round}")), format!("{round}")).unwrap();
        let shown =
            bounded(|| container.exec(["test", "-e", &format!("/home/new-{round}")]).status == 0);
        assert!(shown, "a new file on the host never shows up inside");
        assert_eq!(inside(&format!("cat /home/new-{round}")), format!("{round}"));
    }
    fs::remove_file(host("new-0")).unwrap();
    let gone = bounded(|| container.exec(["test", "-e", "/home/new-0"]).status != 0);
    assert!(gone, "a file that was removed on the host never goes away inside");
}

#[test]
fn what_is_written_inside_is_on_the_host_at_once() {
    let scope = Scope::in_pod();
    let container = container(&scope).args(["sleep", "1000"]);
    let _created = container.start_new();
    for round in 0..5 {
        container
            .exec(["sh", "-c", &format!("echo {round} >> /home/log; echo {round} > /home/n")])
            .ok();
        let text = |name: &str| fs::read_to_string(container.bundle.rootfs(name)).unwrap();
        assert_eq!(text("/home/log").lines().count(), round + 1);
        assert_eq!(text("/home/n"), format!("{round}\n"));
    }
}

/// Returns whether this machine's file systems take attributes of users: tmpfs does since Linux
/// 6.6.
fn has_attributes(scope: &Scope) -> bool {
    let probe = runtime().probe.to_str().unwrap();
    let dir = scope.dir().join("xattr");
    fs::create_dir(&dir).unwrap();
    let out = scope.program(&[probe, "xattr", dir.to_str().unwrap(), "user.isopod"]).output().ok();
    out.stdout == "\"ok\"\n"
}

/// Runs the probe's expectations in `dir` and fails with those that do not hold.
#[track_caller]
fn assert_posix(scope: &Scope, container: Container<'_>, dir: &str) {
    let container = container.capabilities(&FILE_CAPABILITIES);
    let outcome = container.probe(&["posix", dir, "user.isopod"]).run_json();
    assert_holds(&outcome, has_attributes(scope));
}

#[track_caller]
fn assert_holds(outcome: &serde_json::Value, attributes: bool) {
    let all = outcome.as_object().unwrap();
    let holds = |name: &str, outcome: &serde_json::Value| match (name, attributes) {
        ("xattr", false) => outcome.as_str().unwrap().contains("Operation not supported"),
        _ => *outcome == json!("ok"),
    };
    let broken: Vec<_> = all.iter().filter(|(name, outcome)| !holds(name, outcome)).collect();
    assert!(broken.is_empty() && all.len() == 23, "{broken:#?}");
}

/// Makes a file system that takes attributes, with `content` in it. Returns its directory and the
/// command that mounts it there.
fn file_system_with_attributes(scope: &Scope, content: Option<&Path>) -> (String, String) {
    let volume = scope.dir().join("volume").to_string_lossy().into_owned();
    let mount = format!("modprobe loop || true; mount -o loop {volume}.image {volume}");
    let fill = content.map_or_else(String::new, |content| {
        format!("; {mount}; cp -a {}/. {volume}; mkdir {volume}/volume", content.display())
    });
    let make = format!(
        "set -e; truncate -s 64M {volume}.image; mkfs.ext4 -q -b 4096 {volume}.image; mkdir {volume}{fill}"
    );
    scope.program(&["unshare", "--mount", "sh", "-c", &make]).output().ok();
    (volume, mount)
}

#[test]
fn a_volume_of_another_file_system_is_posix_with_attributes_of_either_kind() {
    let scope = Scope::in_pod();
    let (volume, mount) = file_system_with_attributes(&scope, None);
    let capabilities = [&FILE_CAPABILITIES[..], &["CAP_SYS_ADMIN"]].concat();
    let script = format!(
        "cd /data; mkdir user trusted; {PROBE_PATH} posix user user.isopod; \
         {PROBE_PATH} xattr trusted trusted.isopod"
    );
    let container = scope.container().mount("/data", "bind", &volume, &["rbind"]);
    let container = container.capabilities(&capabilities).shell(&script);
    let out = container.command_with_bundle("run", &[]).after_mounting(&mount).output().ok();
    let (posix, trusted) = out.stdout.split_once('\n').unwrap();
    assert_holds(&serde_json::from_str(posix).unwrap(), true);
    assert_eq!(trusted, "\"ok\"\n", "{out}");
}

#[test]
fn an_overlay_inside_remembers_what_was_removed() {
    let scope = Scope::in_pod();
    let container = scope.container();
    let root = container.bundle.rootfs("");
    let (volume, mount) = file_system_with_attributes(&scope, Some(&root));
    // On the root file system and on a volume, a directory that was removed and made again is
    // empty. It still is after another mount of the overlay.
    let script = "set -e; for d in /over /data/over; do mkdir -p $d/lower/dir/sub $d/upper $d/work $d/m; \
         echo x > $d/lower/dir/sub/file; echo y > $d/lower/gone; \
         mnt() { mount -t overlay o -o lowerdir=$d/lower,upperdir=$d/upper,workdir=$d/work $d/m; }; \
         mnt; rm -r $d/m/dir $d/m/gone; mkdir $d/m/dir; echo $d $(ls $d/m $d/m/dir | wc -w); \
         umount $d/m; mnt; echo $d $(ls $d/m $d/m/dir | wc -w); mv $d/m/dir $d/m/other; \
         touch $d/m/gone; rm -r $d/m/other; echo $d $(ls $d/m); umount $d/m; done";
    let capabilities = [&FILE_CAPABILITIES[..], &["CAP_SYS_ADMIN"]].concat();
    let source = format!("{volume}/volume");
    let container = container.mount("/data", "bind", &source, &["rbind"]).shell(script);
    let container = container.capabilities(&capabilities).edit(|c| {
        c["root"]["path"] = json!(volume);
    });
    let out = container.command_with_bundle("run", &[]).after_mounting(&mount).output().ok();
    // `ls` prints two names of directories before their entries, and the name of the one directory.
    let expected = ["/over", "/data/over"].map(|d| format!("{d} 3\n{d} 3\n{d} gone\n")).concat();
    assert_eq!(out.stdout, expected, "{out}");
}

#[test]
fn the_root_file_system_is_posix() {
    let scope = Scope::in_pod();
    let container = scope.container();
    assert_posix(&scope, container, "/home");
    // The host's view of the probe's files: the mapping's writes and the names.
    let made = scope.dir().join("bundle-1/rootfs/home");
    let mapped = fs::read(made.join("mmap/file")).unwrap();
    assert_eq!((mapped.len(), mapped[5000], mapped[6000]), (8192, b'm', b'w'));
    assert_eq!(fs::read(made.join("append/log")).unwrap().len(), 64_000);
    let sparse = fs::metadata(made.join("sparse/file")).unwrap();
    assert!(sparse.len() > 1 << 30 && sparse.blocks() * 512 < 1 << 20);
    assert!(made.join("long-names").join("n".repeat(255)).exists());
}

#[test]
fn a_bind_mount_is_posix() {
    let scope = Scope::in_pod();
    let dir = scope.dir().join("data");
    fs::create_dir(&dir).unwrap();
    let container = scope.container().mount("/data", "bind", dir.to_str().unwrap(), &["rbind"]);
    assert_posix(&scope, container, "/data");
    let owned = seen(&dir.join("mode-and-owner/file"));
    assert_eq!(owned, (0o750, 1000, 1001));
}

/// The names by readdir(3) in the probe's container, sorted, each as often as it came.
fn listed(container: &Container<'_>, dir: &str) -> Vec<String> {
    let names = container.exec_json(&[], &["list", dir]);
    let mut names: Vec<String> = serde_json::from_value(names).unwrap();
    names.sort();
    names
}

#[test]
fn a_directory_lists_itself_and_its_parent_once() {
    let scope = Scope::in_pod();
    let container = container(&scope).args(["sleep", "1000"]);
    let host = |path: &str| container.bundle.rootfs(path);
    fs::create_dir(host("/home/empty")).unwrap();
    fs::create_dir(host("/home/full")).unwrap();
    fs::write(host("/home/full/.file"), "").unwrap();
    let _created = container.start_new();
    assert_eq!(listed(&container, "/home/empty"), [".", ".."]);
    assert_eq!(listed(&container, "/home/full"), [".", "..", ".file"]);
    assert_eq!(listed(&container, "/home"), [".", "..", "empty", "full"]);
    let shown = container.exec(["ls", "-a", "/home/full", "/home/empty"]).ok().stdout;
    assert_eq!(shown, "/home/empty:\n.\n..\n\n/home/full:\n.\n..\n.file\n");
    let root = listed(&container, "/");
    assert_eq!(root.iter().filter(|name| [".", ".."].contains(&&***name)).count(), 2, "{root:?}");
}

/// Checks that a listing has each name once that exists from its beginning to its end, whatever
/// comes and goes meanwhile (readdir(3p)).
#[track_caller]
fn assert_stays_listed(container: &Container<'_>, stable: &[String]) {
    for _ in 0..10 {
        let mut names = listed(container, "/home");
        names.retain(|name| !name.starts_with("passing-"));
        assert_eq!(names.len(), stable.len(), "{:?}", difference(&names, stable));
        assert!(names == stable, "{:?}", difference(&names, stable));
    }
}

/// Makes a thousand files in /home. Returns the names of a whole listing, sorted.
fn thousand(container: &Container<'_>) -> Vec<String> {
    let mut names: Vec<String> = (0..1000).map(|n| format!("a-name-that-stays-{n}")).collect();
    for name in &names {
        fs::write(container.bundle.rootfs("/home").join(name), "").unwrap();
    }
    names.extend([".".to_owned(), "..".to_owned()]);
    names.sort();
    names
}

/// The names listed too often or too rarely, with their count and the expected count.
fn difference(names: &[String], stable: &[String]) -> Vec<(String, usize, usize)> {
    let count = |list: &[String], name: &String| list.iter().filter(|n| *n == name).count();
    let mut all = [names, stable].concat();
    all.sort();
    all.dedup();
    let counted = all.into_iter().map(|n| (n.clone(), count(names, &n), count(stable, &n)));
    counted.filter(|(_, is, should_be)| is != should_be).collect()
}

#[test]
fn a_large_directory_is_listed_whole_while_the_guest_changes_it() {
    let scope = Scope::in_pod();
    let container = container(&scope).args(["sleep", "1000"]);
    let stable = thousand(&container);
    let _created = container.start_new();
    let mut job = container.command("exec", &[]).args([PROBE_PATH, "churn", "/home"]).spawn();
    job.stdout.line_with("changing");
    assert_stays_listed(&container, &stable);
    assert_eq!(job.ended(), None, "nothing changed the directory any more");
}

#[test]
fn links_and_dots_that_lead_outside_do_not() {
    let scope = Scope::in_pod();
    let secret = scope.dir().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("file"), "secret").unwrap();
    let absolute = secret.join("file");
    let dots = format!("{}{}", "../".repeat(40), absolute.display());
    let container = container(&scope);
    for (name, target) in [("absolute", absolute.to_str().unwrap()), ("dots", &*dots)] {
        symlink(target, container.bundle.rootfs("/home").join(name)).unwrap();
    }
    symlink(&secret, container.bundle.rootfs("/home/dir")).unwrap();
    let paths =
        ["/home/absolute", "/home/dots", "/home/dir/file", &*dots, absolute.to_str().unwrap()];
    let container = container.args([&[PROBE_PATH, "files"], &paths[..]].concat());
    for (path, outcome) in container.run_json().as_object().unwrap() {
        assert_eq!(outcome["error"], json!("ENOENT"), "{path}");
    }
    let container =
        container.shell("echo x > /home/absolute; echo x > /home/dir/new; ls -a /.. /../..");
    let out = container.run();
    assert!(!out.stdout.contains("bundle") && !out.stdout.contains("state"), "{out}");
    assert_eq!(fs::read_to_string(&absolute).unwrap(), "secret");
    assert!(!secret.join("new").exists());
}

/// The guest sees the containers' directories and nothing beside them.
#[test]
fn neither_the_bundle_nor_the_state_directory_can_be_reached() {
    let scope = Scope::in_pod();
    let container = container(&scope);
    fs::write(container.bundle.dir.join("beside-the-rootfs"), "secret").unwrap();
    let out =
        container.shell("find / -xdev -name beside-the-rootfs; find / -name config.json").run();
    assert_eq!(out.stdout, "", "{out}");
}

/// A container with a volume, and the volume on the host.
fn with_volume<'a>(scope: &'a Scope, name: &str) -> (Container<'a>, std::path::PathBuf) {
    let dir = scope.dir().join(name);
    fs::create_dir_all(&dir).unwrap();
    let source = dir.to_str().unwrap();
    (container(scope).mount("/data", "bind", source, &["rbind"]), dir)
}

#[test]
fn a_volume_is_coherent_with_the_host() {
    let scope = Scope::in_pod();
    let (container, dir) = with_volume(&scope, "data");
    let host = |name: &str| dir.join(name);
    fs::write(host("log"), "").unwrap();
    let container = container.shell("tail -f /data/log > /root/followed & wait");
    let _created = container.start_new();
    let inside = |script: &str| container.exec(["sh", "-c", script]).ok().stdout;
    for round in 0..5 {
        // The guest knows a file, and the host replaces or removes it. A write goes at once to the
        // file that has the name now.
        fs::write(host("file"), "old").unwrap();
        assert_eq!(inside("cat /data/file"), "old");
        if round % 2 == 0 {
            fs::remove_file(host("file")).unwrap();
        } else {
            fs::write(host("new"), "new").unwrap();
            fs::rename(host("new"), host("file")).unwrap();
        }
        let written = inside(&format!("echo {round} > /data/file; cat /data/file"));
        assert_eq!(written, format!("{round}\n"));
        assert_eq!(fs::read_to_string(host("file")).unwrap(), format!("{round}\n"));
        fs::write(host("file"), "longer than before").unwrap();
        assert_eq!(inside("cat /data/file"), "longer than before");
        let mut log = fs::OpenOptions::new().append(true).open(host("log")).unwrap();
        writeln!(log, "line {round}").unwrap();
        let followed = bounded(|| inside("cat /root/followed").ends_with(&format!("{round}\n")));
        assert!(followed, "tail -f does not see what the host appends");
    }
    // Processes that map a file have one memory, however often the file is opened meanwhile.
    let count = format!(
        "for n in 1 2 3 4; do {PROBE_PATH} count /data/shared 20 & done; wait; od -An -tu8 -N8 /data/shared"
    );
    assert_eq!(inside(&count).trim(), "80000");
    assert_eq!(fs::read(host("shared")).unwrap()[..8], 80_000_u64.to_le_bytes());
}

#[test]
fn a_lock_holds_between_containers_and_for_the_host() {
    const KINDS: [&str; 2] = ["flock", "fcntl"];
    let scope = Scope::in_pod();
    let (holder, dir) = with_volume(&scope, "data");
    let hold = KINDS
        .map(|kind| format!("{PROBE_PATH} posix-hold {kind} /data/{kind} /data/{kind}.held & "));
    let holder = holder.shell(&format!("{}wait", hold.concat()));
    let _created = holder.start_new();
    let held = |kind: &str| dir.join(format!("{kind}.held")).exists();
    assert!(bounded(|| KINDS.iter().all(|kind| held(kind))));
    let probe = runtime().probe.to_str().unwrap();
    let on_the_host = |kind: &str| {
        let file = dir.join(kind);
        scope.program(&[probe, "posix-lock", kind, file.to_str().unwrap()]).output().ok().stdout
    };
    assert_eq!(KINDS.map(on_the_host), ["\"locked\"\n"; 2]);
    let (other, _) = with_volume(&scope, "data");
    let try_both =
        KINDS.map(|kind| format!("{PROBE_PATH} posix-lock {kind} /data/{kind}; ")).concat();
    assert_eq!(other.shell(&try_both).run().ok().stdout, "\"locked\"\n\"locked\"\n");
    holder.kill("KILL").ok();
    let free = bounded(|| KINDS.iter().all(|kind| on_the_host(kind) == "\"free\"\n"));
    assert!(free, "a lock outlives its container");
}

/// The holder of the lock does not matter, nor for how long: here the host holds it to the end.
#[test]
fn a_process_that_waits_for_a_lock_ends_with_a_signal() {
    let scope = Scope::in_pod();
    let (container, dir) = with_volume(&scope, "data");
    let file = fs::File::create(dir.join("flock")).unwrap();
    let _flock = Flock::lock(file, FlockArg::LockExclusive).unwrap();
    let file = fs::File::create(dir.join("fcntl")).unwrap();
    let whole = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&whole)).unwrap();
    let script = format!(
        "for kind in flock fcntl; do for signal in INT ALRM KILL; do
             timeout -s $signal 1 {PROBE_PATH} posix-wait $kind /data/$kind
             echo $kind $signal $?
         done; done"
    );
    let out = container.shell(&script).run().ok();
    let ends = ["INT 130", "ALRM 142", "KILL 137"];
    let expected: Vec<String> = ["flock", "fcntl"]
        .into_iter()
        .flat_map(|kind| ends.map(|end| format!("{kind} {end}")))
        .collect();
    assert_eq!(out.stdout.lines().collect::<Vec<_>>(), expected, "{out}");
}
