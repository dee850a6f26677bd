//! Volumes of pods, as the kubelet prepares them: directories and file systems of the host.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use isopod_tests::engine::{REPORTING, Run};
use k8s_cri::v1::{Capability, ContainerConfig, Device};

use crate::cri::{Cri, mount, script};

/// A directory of the host for the case's volumes.
pub(crate) fn directory(run: &Run<'_>, name: &str) -> PathBuf {
    let path = run.engine.dir().join(run.name(name));
    std::fs::create_dir_all(&path).expect("a volume");
    path
}

/// Two containers share directories, on disk and in memory.
pub(crate) fn pod_volumes(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("volumes"));
    let empty = directory(run, "empty-dir");
    // The kubelet's name for such a volume.
    let memory = directory(run, "memory").join("kubernetes.io~empty-dir/memory");
    std::fs::create_dir_all(&memory).expect("a volume");
    let target = memory.to_string_lossy().into_owned();
    let options = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", &target];
    run.end(run.engine.inside(&options)).ok();
    let mut one = script("one", "sleep 1000");
    one.mounts = vec![mount(&empty, "/data"), mount(&memory, "/memory")];
    let mut two = script("two", "sleep 1000");
    two.mounts = one.mounts.clone();
    let (one, two) = (pod.start(one), pod.start(two));
    pod.shell(&one, "echo disk >/data/file; echo memory >/memory/file; echo shm >/dev/shm/file");
    assert_eq!(pod.shell(&two, "cat /data/file /memory/file /dev/shm/file"), "disk\nmemory\nshm");
    assert_eq!(std::fs::read_to_string(empty.join("file")).expect("a file"), "disk\n");
    let types = "stat -f -c %T /memory /dev/shm";
    assert_eq!(pod.shell(&one, types), "tmpfs\ntmpfs");
    // The file systems' sizes are those that were asked for.
    let size = pod.shell(&one, "df -k /memory | tail -1");
    assert_eq!(size.split_whitespace().nth(1), Some("16384"), "{size}");
    pod.remove();
    run.end(run.engine.inside(&["umount", &target])).ok();
    for volume in [empty, directory(run, "memory")] {
        std::fs::remove_dir_all(volume).expect("a volume");
    }
}

/// A configMap: the kubelet swaps a link, and the container sees the new content.
pub(crate) fn pod_config_map(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("config"));
    let volume = directory(run, "config-map");
    let write = |version: &str| {
        std::fs::create_dir(volume.join(version)).expect("a version");
        std::fs::write(volume.join(version).join("key"), version).expect("a key");
        symlink(version, volume.join("..new")).expect("a link");
        std::fs::rename(volume.join("..new"), volume.join("..data")).expect("a swap");
    };
    write("..one");
    symlink("..data/key", volume.join("key")).expect("a link");
    let mut config = script("one", "sleep 1000");
    config.mounts = vec![k8s_cri::v1::Mount { readonly: true, ..mount(&volume, "/config") }];
    let id = pod.start(config);
    assert_eq!(pod.shell(&id, "cat /config/key"), "..one");
    assert_ne!(pod.exec(&id, "echo x >/config/key").status, 0);
    write("..two");
    std::fs::remove_dir_all(volume.join("..one")).expect("the old version");
    let begun = Instant::now();
    while pod.exec(&id, "cat /config/key").stdout != "..two" {
        assert!(begun.elapsed() < Duration::from_secs(10), "the old content stays");
    }
    pod.remove();
    std::fs::remove_dir_all(volume).expect("the volume");
}

/// A kubelet changes a secret. A container that has waited for that by inotify hears of it, and all
/// containers see the new content. A script of a volume can be executed.
pub(crate) fn pod_projected_volumes(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("projected"));
    let root = directory(run, "kubelet");
    // The kubelet's name for such a volume.
    let volume = root.join("pods/uid/volumes/kubernetes.io~secret/keys");
    std::fs::create_dir_all(&volume).expect("a volume");
    let write = |version: &str| {
        std::fs::create_dir(volume.join(version)).expect("a version");
        let key = volume.join(version).join("key");
        std::fs::write(&key, format!("#!/bin/sh\necho {version}\n")).expect("a key");
        std::fs::set_permissions(&key, PermissionsExt::from_mode(0o750)).expect("a mode");
        std::os::unix::fs::chown(&key, None, Some(2000)).expect("a group");
        symlink(version, volume.join("..new")).expect("a link");
        std::fs::rename(volume.join("..new"), volume.join("..data")).expect("a swap");
    };
    write("..one");
    symlink("..data/key", volume.join("key")).expect("a link");
    let secret = || k8s_cri::v1::Mount { readonly: true, ..mount(&volume, "/secret") };
    let of_the_tree =
        |host: &str, at: &str| k8s_cri::v1::Mount { readonly: true, ..mount(Path::new(host), at) };
    // inotify_init1, and inotify_add_watch for IN_MOVED_TO (asm/unistd_64.h, linux/inotify.h).
    let watch = "exec /usr/bin/perl -e '$| = 1; $fd = syscall(294, 0); \
        $path = \"/secret\"; syscall(254, $fd, $path, 0x80); print \"waiting\\n\"; \
        open($events, \"<&=\", $fd); sysread($events, $event, 4096); print \"heard\\n\"; sleep 1000'";
    let mut watcher = script("watcher", watch);
    watcher.mounts = vec![
        secret(),
        of_the_tree("/usr", "/usr"),
        of_the_tree("/usr/lib", "/lib"),
        of_the_tree("/usr/lib64", "/lib64"),
    ];
    let mut other = script("other", "sleep 1000");
    other.mounts = vec![secret()];
    let (_watcher, other) = (pod.start(watcher), pod.start(other));
    let begun = Instant::now();
    let heard = |text: &str| {
        while pod.log("watcher") != text {
            assert!(begun.elapsed() < Duration::from_secs(60), "{}", pod.log("watcher"));
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    heard("waiting");
    let look = "/secret/key; stat -L -c '%a %g' /secret/key; stat -c %F /secret/key";
    assert_eq!(pod.shell(&other, look), "..one\n750 2000\nsymbolic link");
    assert_ne!(pod.exec(&other, "echo x >/secret/..data/key").status, 0);
    write("..two");
    std::fs::remove_dir_all(volume.join("..one")).expect("the old version");
    heard("waiting\nheard");
    assert_eq!(pod.shell(&other, look), "..two\n750 2000\nsymbolic link");
    let begun = Instant::now();
    while pod.shell(&other, "ls -A /secret") != "..data\n..two\nkey" {
        assert!(begun.elapsed() < Duration::from_secs(10), "the old version stays");
    }
    pod.remove();
    std::fs::remove_dir_all(root).expect("the volume");
}

/// A volume that is read-only with all mounts in it, which a kubelet asks for if the handler can.
pub(crate) fn pod_recursive_read_only(run: &Run<'_>) {
    let cri = Cri::new(run);
    // containerd asks only shims that it takes for runc's.
    let handler = if run.isopod() { REPORTING } else { run.with.name() };
    let features = cri.features(handler);
    assert!(features.recursive_read_only_mounts && features.user_namespaces, "{features:?}");
    let pod = cri.try_pod_of(handler, cri.pod_config("recursive")).expect("a pod");
    let volume = directory(run, "volume");
    let inner = volume.join("inner").to_string_lossy().into_owned();
    std::fs::create_dir(&inner).expect("a directory");
    run.end(run.engine.inside(&["mount", "-t", "tmpfs", "tmpfs", &inner])).ok();
    run.end(run.engine.inside(&["touch", &format!("{inner}/file")])).ok();
    let mut config = script("one", "sleep 1000");
    let mount = mount(&volume, "/data");
    config.mounts = vec![k8s_cri::v1::Mount { readonly: true, recursive_read_only: true, ..mount }];
    let id = pod.start(config);
    assert_eq!(pod.shell(&id, "ls /data/inner"), "file");
    let write = "for at in /data /data/inner; do touch $at/x 2>&1 | sed 's/.*: //'; done";
    let refused = "Read-only file system";
    assert_eq!(pod.shell(&id, write), format!("{refused}\n{refused}"));
    pod.remove();
    run.end(run.engine.inside(&["umount", &inner])).ok();
    std::fs::remove_dir_all(volume).expect("the volume");
}

/// Single files and directories of the host.
pub(crate) fn pod_host_paths(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("paths"));
    let volume = directory(run, "host-path");
    std::fs::write(volume.join("file"), "from the host").expect("a file");
    std::fs::create_dir(volume.join("sub")).expect("a directory");
    let mut config = script("one", "sleep 1000");
    config.mounts = vec![mount(&volume.join("file"), "/file"), mount(&volume.join("sub"), "/sub")];
    let id = pod.start(config);
    assert_eq!(pod.shell(&id, "cat /file; echo x >/sub/new"), "from the host");
    assert_eq!(std::fs::read_to_string(volume.join("sub/new")).expect("a file"), "x\n");
    pod.remove();
    std::fs::remove_dir_all(volume).expect("the volume");
}

/// Two block volumes: containers that come and go have one disk of the host. A file system on the
/// other one keeps its rows for the next container, and for the next pod.
pub(crate) fn pod_block_volumes(run: &Run<'_>) {
    let cri = Cri::new(run);
    let volume = directory(run, "block");
    let [raw, files] = ["raw", "files"].map(|name| LoopDevice::new(run, &volume.join(name)));
    run.end(run.engine.on_network(&["mkfs.ext4", "-q", &files.path])).ok();
    let pod = cri.pod(cri.pod_config("block"));
    let one = pod.start(raw.on(script("one", "sleep 1000"), "/dev/xvda", "rwm"));
    let two = raw.on(script("two", "sleep 1000"), "/dev/xvda", "rwm");
    let two = pod.start(files.on(two, "/dev/xvdb", "rwm"));
    pod.shell(&one, "echo one | dd of=/dev/xvda conv=notrunc,fsync");
    let append = |row: &str| {
        format!("{MOUNT} && echo {row} | dd of=/data/rows oflag=append conv=notrunc,fsync")
    };
    // One disk has one cache.
    let steps = "head -n 1 /dev/xvda; blockdev --getsize64 /dev/xvda; \
        echo two | dd of=/dev/xvda seek=1 conv=notrunc";
    let read = pod.shell(&two, &format!("{steps} && {}", append("first")));
    assert_eq!(read, "one\n8388608");
    for id in [&one, &two] {
        pod.stop(id, 0);
    }
    let read =
        run.end(run.engine.inside(&["dd", &format!("if={}", raw.path), "bs=512", "count=2"]));
    assert!(read.ok().stdout.contains("two"), "what is written comes before the container's end");
    let three = raw.on(script("three", "sleep 1000"), "/dev/xvda", "r");
    let three = pod.start(files.on(three, "/dev/xvdb", "rwm"));
    let steps = "head -n 1 /dev/xvda; echo x >/dev/xvda && echo written";
    assert_eq!(pod.shell(&three, &format!("{steps}; {}", append("second"))), "one");
    pod.remove();
    let pod = cri.pod(cri.pod_config("block-again"));
    let four = pod.start(files.on(script("four", "sleep 1000"), "/dev/xvdb", "rwm"));
    let rows = format!("{MOUNT} && cat /data/rows && umount /data");
    assert_eq!(pod.shell(&four, &rows), "first\nsecond");
    pod.remove();
    run.end(run.engine.on_network(&["fsck.ext4", "-fn", &files.path])).ok();
    for device in [raw, files] {
        device.detach();
    }
    std::fs::remove_dir_all(volume).expect("the volume");
}

/// Mounts the file system of a block volume in a container.
const MOUNT: &str = "mkdir -p /data && mount -t ext4 /dev/xvdb /data";

/// A loop device of the host, as a volume plugin may have it.
struct LoopDevice<'r, 'e> {
    run: &'r Run<'e>,
    path: String,
}

impl<'r, 'e> LoopDevice<'r, 'e> {
    /// A device over a new file.
    fn new(run: &'r Run<'e>, file: &Path) -> Self {
        let file = file.display();
        let script =
            format!("modprobe loop || true; truncate -s 8M {file}; losetup --find --show {file}");
        // The engine's tree may lack these programs.
        let made = run.end(run.engine.on_network(&["sh", "-ec", &script]));
        Self { run, path: made.ok().stdout.trim().to_owned() }
    }

    /// The container with the device at `path`. It may mount file systems.
    fn on(&self, mut config: ContainerConfig, path: &str, permissions: &str) -> ContainerConfig {
        config.devices.push(Device {
            container_path: path.to_owned(),
            host_path: self.path.clone(),
            permissions: permissions.to_owned(),
        });
        let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        security.expect("a security context").capabilities = Some(Capability {
            add_capabilities: vec!["SYS_ADMIN".to_owned()],
            ..Capability::default()
        });
        config
    }

    /// Detaches the device, which nobody has open any more.
    fn detach(self) {
        let losetup = |argv: &[&str]| self.run.end(self.run.engine.on_network(argv)).ok();
        losetup(&["losetup", "--detach", &self.path]);
        let list = losetup(&["losetup", "--list", "--noheadings", "--output", "NAME"]);
        let in_use = list.stdout.lines().any(|name| name.trim() == self.path);
        assert!(!in_use, "{} is in use", self.path);
    }
}
