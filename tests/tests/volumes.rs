//! Volumes: bind mounts of host directories and files, and the host's mounts below them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use isopod_tests::{Container, Scope, bounded, runtime, skip};
use serde_json::{Value, json};

/// A directory of the host with mounts of its own below it. Unmounted when dropped.
struct Volume<'a> {
    scope: &'a Scope,
    path: PathBuf,
}

impl<'a> Volume<'a> {
    /// Mounts a tmpfs that propagates the mounts below it, as systemd makes all mounts.
    fn new(scope: &'a Scope, name: &str) -> Self {
        let path = scope.dir().join(name);
        fs::create_dir(&path).unwrap();
        let volume = Self { scope, path };
        volume.shell(
            "mount -t tmpfs -o size=3m,mode=755 none . && cd \"$PWD\" && mount --make-shared .",
        );
        volume
    }

    /// Runs a script in the directory.
    #[track_caller]
    fn shell(&self, script: &str) {
        let script = format!("cd '{}' && {{ {script}; }}", self.path.display());
        self.scope.program(&["sh", "-c", &script]).output().ok();
    }

    /// Mounts a tmpfs on a new directory in the volume, with one file.
    #[track_caller]
    fn mount(&self, name: &str) {
        let mount = "mount -t tmpfs -o mode=755 none";
        self.shell(&format!("mkdir -p {name}; {mount} {name}; echo {name} > {name}/file"));
    }

    /// Unmounts a directory in the volume, once nothing keeps it busy any more.
    #[track_caller]
    fn unmount(&self, name: &str) {
        let path = self.path.join(name);
        let program = ["umount", path.to_str().unwrap()];
        assert!(bounded(|| self.scope.program(&program).output().status == 0), "{name} is busy");
    }

    fn source(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

impl Drop for Volume<'_> {
    fn drop(&mut self) {
        let script =
            format!("while umount --recursive --lazy '{}'; do :; done", self.path.display());
        self.scope.program(&["sh", "-c", &script]).output();
    }
}

fn shell(container: &Container<'_>, script: &str) -> String {
    container.exec(["sh", "-c", script]).ok().stdout
}

#[test]
fn a_volume_follows_the_host_as_its_propagation_says() {
    let scope = Scope::new();
    let asked: [(&str, &[&str], bool); 4] = [
        ("private", &["rbind", "rprivate"], false),
        ("unbindable", &["rbind", "runbindable"], false),
        ("slave", &["rbind", "rslave"], true),
        // As with runc.
        ("none", &["rbind"], true),
    ];
    let volumes = asked.map(|(name, ..)| Volume::new(&scope, name));
    let mut container = scope.container().args(["sleep", "1000"]);
    for ((name, options, _), volume) in asked.iter().zip(&volumes) {
        volume.mount("old");
        container = container.mount(&format!("/{name}"), "bind", volume.source(), options);
    }
    let _created = container.start_new();
    for ((name, _, follows), volume) in asked.iter().zip(&volumes) {
        assert_eq!(shell(&container, &format!("cat /{name}/old/file")), "old\n", "{name}");
        volume.mount("new");
        let seen = shell(&container, &format!("cat /{name}/new/file || true"));
        assert_eq!(seen, if *follows { "new\n" } else { "" }, "{name}");
        // The guest knows a file below the mount, but none is open.
        shell(&container, &format!("cat /{name}/old/file"));
        volume.unmount("old");
        // A container with a mount of its own goes on to show it.
        let there = || container.exec(["test", "-e", &format!("/{name}/old/file")]).status == 0;
        if *follows {
            assert!(bounded(|| !there()), "{name}: what the host unmounts stays inside");
            volume.unmount("new");
        } else {
            assert!(there(), "{name}: what the host unmounts goes inside");
        }
    }
    container.delete_force().ok();
    drop(volumes);
    scope.assert_nothing_left();
}

/// A loop device of the host over a new file. Detached when dropped.
struct Loop<'a> {
    scope: &'a Scope,
    path: String,
    numbers: (u64, u64),
}

impl<'a> Loop<'a> {
    fn new(scope: &'a Scope, name: &str, mib: u32) -> Self {
        let file = scope.dir().join(name);
        let script = format!(
            "modprobe loop; truncate -s {mib}M '{0}' && losetup --find --show '{0}'",
            file.display()
        );
        let path = scope.program(&["sh", "-c", &script]).output().ok().stdout.trim().to_owned();
        let device = fs::metadata(&path).unwrap().rdev();
        let numbers = (device >> 8 & 0xfff, device & 0xff);
        Self { scope, path, numbers }
    }

    /// Adds the device to a container's configuration, with these letters of access.
    fn add(&self, config: &mut Value, path: &str, access: &str) {
        let (major, minor) = self.numbers;
        let device = json!({ "path": path, "type": "b", "major": major, "minor": minor,
            "fileMode": 0o600 });
        let rule = json!({ "allow": true, "type": "b", "major": major, "minor": minor,
            "access": access });
        for (list, entry) in [("/linux/devices", device), ("/linux/resources/devices", rule)] {
            let (parent, name) = list.rsplit_once('/').unwrap();
            let list = &mut config.pointer_mut(parent).unwrap()[name];
            if !list.is_array() {
                *list = json!([]);
            }
            list.as_array_mut().unwrap().push(entry);
        }
    }

    #[track_caller]
    fn host(&self, program: &[&str]) -> String {
        let program: Vec<&str> = program.iter().copied().chain([&*self.path]).collect();
        self.scope.program(&program).output().ok().stdout
    }
}

impl Drop for Loop<'_> {
    fn drop(&mut self) {
        self.scope.program(&["losetup", "--detach", &self.path]).output();
    }
}

/// A block device of the host, and a file system on another: what the container writes is there
/// for the host and for the next container. A device without write access stays as it is.
#[test]
fn block_devices_of_the_host() {
    let scope = Scope::new();
    let [raw, files] = ["raw", "files"].map(|name| Loop::new(&scope, name, 16));
    files.host(&["mkfs.ext4", "-q"]);
    let run = |access: &str, script: &str| {
        let container = scope.container().mount("/data", "ext4", &files.path, &["rw"]);
        let container = container.edit(|config| raw.add(config, "/dev/disk", access)).shell(script);
        container.run()
    };
    let script = "echo hello | dd of=/dev/disk bs=512 seek=2 conv=notrunc,fsync 2>/dev/null; \
        blockdev --getsize64 /dev/disk; stat -f -c %T /data; mkdir /data/dir; echo rows >/data/dir/file";
    let out = run("rwm", script).ok();
    assert_eq!(out.stdout, "16777216\next2/ext3\n");
    files.host(&["fsck.ext4", "-fn"]);
    let read = "dd bs=512 skip=2 count=1 2>/dev/null </dev/disk | head -n 1; cat /data/dir/file; \
        echo lost | dd of=/dev/disk bs=512 seek=2 conv=notrunc,fsync && echo written; true";
    let out = run("r", read).ok();
    assert_eq!(out.stdout, "hello\nrows\n");
    assert!(out.stderr.contains("not permitted"), "{out}");
    drop((raw, files));
    scope.assert_nothing_left();
}

/// Runs a program with other settings of Isopod, in a mount namespace of its own: `$0` is the text
/// of the settings file.
const WITH_SETTINGS: &str = "mount -t tmpfs none /mnt && cp -a /etc/. /mnt && mkdir -p /mnt/isopod \\
    && echo \"$0\" >/mnt/isopod/config.toml && mount --move /mnt /etc && exec \"$@\"";

/// Asks a unix socket three things, one of them an answer, and prints the answers. The program is the
/// host's, started once: it is large.
const CLIENT: &str = r#"L=/host/lib/x86_64-linux-gnu; $L/ld-linux-x86-64.so.2 --library-path $L \
    /host/bin/perl -I $L/perl-base -MSocket -e '
    sub ask {
        socket(my $s, PF_UNIX, SOCK_STREAM, 0); connect($s, pack_sockaddr_un("/socket")) or die "$!";
        syswrite $s, $_[0]; shutdown $s, 1;
        chomp(my $answer = <$s>); eof $s or die "more"; $answer
    }
    print ask("one"), "\n", ask("two"), "\n", ask(ask("three")), "\n"'"#;

/// Sends each question back with a mark, until it is "end". Starts again after the first one.
fn answer(mut listener: UnixListener, path: &Path) {
    for number in 0.. {
        let (mut stream, _) = listener.accept().unwrap();
        let mut question = String::new();
        stream.read_to_string(&mut question).unwrap();
        if question == "end" {
            return;
        }
        // With runc a bind mount shows the old socket for ever.
        if number == 0 && runtime().is_isopod() {
            fs::remove_file(path).unwrap();
            listener = UnixListener::bind(path).unwrap();
        }
        writeln!(stream, "{question}!").unwrap();
    }
}

/// A socket of the host that the operator shares: bytes go both ways, each direction has an end of
/// its own, and a daemon that starts again is found again. Any other socket is refused by name.
#[test]
fn a_socket_of_the_host() {
    let scope = Scope::new();
    let path = scope.dir().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let container = || {
        let container = scope.container().mount("/host", "bind", "/usr", &["bind", "ro"]);
        let script = format!("stat -c %F,%a /socket; {CLIENT}");
        container.mount("/socket", "bind", path.to_str().unwrap(), &["bind"]).shell(&script)
    };
    let settings = format!("host_sockets = [\"{}/*\"]", scope.dir().display());
    let through = ["unshare", "--mount", "sh", "-c", WITH_SETTINGS, &settings];
    let out = std::thread::scope(|threads| {
        threads.spawn(|| answer(listener, &path));
        let out = container().command_with_bundle("run", &[]).through(&through).output();
        UnixStream::connect(&path).unwrap().write_all(b"end").unwrap();
        out
    });
    assert_eq!(out.ok().stdout, "socket,640\none!\ntwo!\nthree!!\n");
    if runtime().is_isopod() {
        container().run().one_line_error(&["mounts[", "(/socket)", "host_sockets"]);
    }
    fs::remove_file(&path).unwrap();
    scope.assert_nothing_left();
}

/// Two file systems of the host whose files have equal inode numbers, one with a third below it.
#[test]
fn mounts_are_told_apart() {
    let scope = Scope::new();
    let [a, b] = ["a", "b"].map(|name| Volume::new(&scope, name));
    for volume in [&a, &b] {
        volume.shell("for i in 1 2 3; do echo $PWD$i >$i; ln $i link$i; done; mkdir sub");
    }
    let ino = |volume: &Volume<'_>, name: &str| fs::metadata(volume.path.join(name)).unwrap().ino();
    if ino(&a, "1") != ino(&b, "1") {
        skip!("tmpfs on this host numbers the inodes of all");
    }
    b.shell("mount -t tmpfs -o size=1m,mode=755,noexec none sub; echo deep >sub/1; ln sub/1 sub/2");
    let script = "\
        for p in '/a/1 /b/1' '/a/1 /b/sub/1' '/a/1 /file' '/file /other'; do set -- $p; \
            [ $(stat -c %d:%i $1) != $(stat -c %d:%i $2) ] || echo $1 is $2; done; \
        cp /a/1 /b/1 && cp /file /other && cmp /a/1 /b/1 && cmp /file /other && echo copied; \
        tar -C / -cf - a b file other | tar -tvf - | awk '/ -> / { split($(NF-2), x, \"/\"); \
            split($NF, y, \"/\"); if (x[1] != y[1]) print x[1], y[1] }'; \
        df -k /a /b/sub /file | awk 'NR > 1 { print $2 }'; \
        find /b -xdev -type f | wc -l; find / -xdev -path '/a/*' | wc -l; \
        grep -c ' /b/sub [^ ]*noexec' /proc/self/mountinfo; \
        mount -t tmpfs none /tmp && mkdir /tmp/u /tmp/w /tmp/m && \
        mount -t overlay -o lowerdir=/b,upperdir=/tmp/u,workdir=/tmp/w none /tmp/m && \
        ls /tmp/m && ls /tmp/m/sub | wc -l && echo new >/tmp/m/sub/new && cat /tmp/m/sub/new";
    let options = ["rbind", "rprivate"];
    let capabilities = ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_CHOWN"];
    let container = scope
        .container()
        .capabilities(&capabilities)
        .mount("/a", "bind", a.source(), &options)
        .mount("/b", "bind", b.source(), &options)
        .mount("/file", "bind", a.path.join("2").to_str().unwrap(), &options)
        .mount("/other", "bind", b.path.join("2").to_str().unwrap(), &options)
        .shell(script);
    let out = container.run().ok();
    // A bound file has a device of its own inside; with runc it has that of its file system.
    let linked = if runtime().is_isopod() { "" } else { "file a\nother b\n" };
    let expected = format!(
        "copied\n{linked}3072\n1024\n3072\n6\n0\n1\n1\n2\n3\nlink1\nlink2\nlink3\nsub\n0\nnew\n"
    );
    assert_eq!(out.stdout, expected, "{out}");
    assert_eq!(fs::read(a.path.join("1")).unwrap(), fs::read(b.path.join("1")).unwrap());
}

/// Only the guest writes to its root file system, so the guest's kernel remembers the files for as
/// long as it has memory. The kernel is asked to forget some, long before they are as many as the
/// host keeps.
#[test]
fn a_guest_forgets_the_files_of_a_large_tree() {
    let scope = Scope::new();
    // A quarter of the files that the host keeps for 128 MiB. The memory has room for all of them.
    let container = scope.container().annotation("dev.isopod.memory_mib", "128");
    let tree = container.bundle.rootfs("/tree");
    let script =
        "mkdir $1; cd $1; for i in $(seq 330); do mkdir $i; (cd $i && touch $(seq 100)); done";
    scope.program(&["sh", "-c", script, "sh", tree.to_str().unwrap()]).output().ok();
    let forgotten = if runtime().is_isopod() {
        "until set -- $(cat /proc/sys/fs/inode-nr); [ $1 -lt 31000 ]; do sleep 1; done;"
    } else {
        ""
    };
    let walk = |dir| format!("find {dir} -type f | wc -l");
    let container = container.shell(&format!("{}; {forgotten} {}", walk("/tree"), walk("/tree/1")));
    // With no more descriptors than this, not all files that the guest knows are open.
    let limit = ["prlimit", "--nofile=1024:1024"];
    let out = container.command_with_bundle("run", &[]).through(&limit).output().ok();
    assert_eq!(out.stdout, "33000\n100\n", "{out}");
}
