//! Tests of mounts below the share.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use nix::mount::{MsFlags, mount, umount};

use super::locks::Lock;
use super::*;
use crate::devices::virtio::tests::driver::PATIENCE;

const STATFS: u32 = 17;
const SUBMOUNT: u32 = 1;

/// Runs `test` in a thread with its own mounts. Left out without root.
fn with_mounts(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_err() {
            return eprintln!("left out: needs root");
        }
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        test();
    });
    thread.join().unwrap();
}

fn mount_tmpfs(path: &Path, size: &str) {
    fs::create_dir_all(path).unwrap();
    mount(Some("none"), path, Some("tmpfs"), MsFlags::empty(), Some(size)).unwrap();
}

fn bind(from: &Path, to: &Path) {
    let none: Option<&str> = None;
    mount(Some(from), to, none, MsFlags::MS_BIND, none).unwrap();
}

/// A `fuse_entry_out`: node, seconds for which the name may be cached, inode, flags.
struct Looked {
    node: u64,
    seconds: u64,
    inode: u64,
    flags: u32,
}

impl FsGuest {
    fn look(&mut self, node: u64, name: &str) -> Looked {
        let (error, entry) = self.ask(LOOKUP, node, &[name.as_bytes(), &[0]].concat());
        assert_eq!(error, 0, "{name}");
        let word = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
        assert_eq!(word(16), word(24), "name and attributes are trusted alike");
        let flags = u32::from_le_bytes(entry[124..128].try_into().unwrap());
        Looked { node: word(0), seconds: word(16), inode: word(40), flags }
    }

    fn blocks(&mut self, node: u64) -> u64 {
        let (error, sizes) = self.ask(STATFS, node, &[]);
        assert_eq!(error, 0);
        u64::from_le_bytes(sizes[..8].try_into().unwrap())
    }
}

#[test]
fn each_mount_begins_a_file_system_of_its_own() {
    with_mounts(|| {
        let mut guest = FsGuest::new();
        mount_tmpfs(&guest.path("a"), "size=4m");
        mount_tmpfs(&guest.path("b"), "size=8m");
        mount_tmpfs(&guest.path("b/nested"), "size=16m");
        for name in ["a/file", "b/file", "b/nested/file"] {
            fs::write(guest.path(name), name).unwrap();
        }
        fs::create_dir(guest.path("b/plain")).unwrap();
        let inode = |guest: &FsGuest, name: &str| fs::metadata(guest.path(name)).unwrap().ino();
        assert_eq!(inode(&guest, "a/file"), inode(&guest, "b/nested/file"), "nothing to confuse");
        let (a, b) = (guest.look(ROOT, "a"), guest.look(ROOT, "b"));
        let (nested, plain) = (guest.look(b.node, "nested"), guest.look(b.node, "plain"));
        assert_eq!(
            [a.flags, b.flags, nested.flags, plain.flags],
            [SUBMOUNT, SUBMOUNT, SUBMOUNT, 0]
        );
        let mut nodes = Vec::new();
        for (dir, name) in [(a.node, "a/file"), (b.node, "b/file"), (nested.node, "b/nested/file")]
        {
            let file = guest.look(dir, "file");
            assert_eq!((file.inode, file.flags), (inode(&guest, name), 0));
            let handle = guest.open(OPEN, file.node, libc::O_RDONLY).unwrap();
            assert_eq!(guest.read(file.node, handle), (0, name.into()));
            nodes.push(file.node);
        }
        nodes.dedup();
        assert_eq!(nodes.len(), 3);
        let blocks = [a.node, b.node, nested.node, plain.node].map(|node| guest.blocks(node));
        assert_eq!(blocks, [1024, 2048, 4096, 2048]);
        // A listing contains the mounts' names, but no nodes for them.
        for opcode in [READDIR, READDIRPLUS] {
            let entries = guest.entries(opcode, b.node, 0, 4096);
            let told = |name: &str| entries.iter().find(|entry| entry.name == name).unwrap().node;
            let none = (opcode == READDIRPLUS).then_some(0);
            assert_eq!([told("nested"), told("plain")], [none, none]);
        }
        assert_eq!(guest.look(b.node, "nested").node, nested.node);
    });
}

#[test]
fn one_directory_mounted_twice_is_two() {
    with_mounts(|| {
        let mut guest = FsGuest::new();
        for name in ["one", "two"] {
            fs::create_dir(guest.path(name)).unwrap();
            bind(&guest.path("dir"), &guest.path(name));
        }
        fs::write(guest.path("dir/file"), "").unwrap();
        let places = ["dir", "one", "two"].map(|name| guest.look(ROOT, name));
        let files = places.each_ref().map(|place| guest.look(place.node, "file"));
        assert_eq!(files[1].inode, files[0].inode);
        assert!(files[0].node != files[1].node && files[1].node != files[2].node);
        assert_eq!(places.map(|place| place.flags), [0, SUBMOUNT, SUBMOUNT]);
    });
}

#[test]
fn a_process_has_the_same_locks_by_both_mounts_of_a_directory() {
    with_mounts(|| {
        let mut guest = FsGuest::new();
        fs::create_dir(guest.path("a")).unwrap();
        fs::write(guest.path("a/file"), "").unwrap();
        fs::create_dir(guest.path("b")).unwrap();
        bind(&guest.path("a"), &guest.path("b"));
        let [mine, again] = ["a", "b"].map(|name| {
            let dir = guest.lookup(ROOT, name).unwrap();
            let node = guest.lookup(dir, "file").unwrap();
            Lock::whole(node, guest.open(OPEN, node, libc::O_RDWR).unwrap(), 0)
        });
        assert_eq!((guest.set_lock(mine), guest.set_lock(again)), (0, 0));
        assert_eq!(guest.set_lock(again.owner(2)), libc::EAGAIN);
        assert_eq!(guest.flush(again), 0);
        assert_eq!(guest.set_lock(mine.owner(2)), 0, "a close by one of them releases them");
    });
}

#[test]
fn a_mount_that_comes_or_goes_changes_the_node() {
    with_mounts(|| {
        let mut guest = FsGuest::new();
        let before = guest.look(ROOT, "dir");
        mount_tmpfs(&guest.path("dir"), "size=4m");
        let mounted = guest.look(ROOT, "dir");
        assert_ne!(before.node, mounted.node);
        assert_eq!((before.flags, mounted.flags), (0, SUBMOUNT));
        nix::mount::umount2(&guest.path("dir"), nix::mount::MntFlags::MNT_DETACH).unwrap();
        let after = guest.look(ROOT, "dir");
        assert_eq!((after.node, after.flags), (before.node, 0));
    });
}

#[test]
fn a_guest_that_only_looked_leaves_a_mount_of_the_host_free() {
    with_mounts(|| {
        let mut guest = FsGuest::new();
        mount_tmpfs(&guest.path("volume"), "size=4m");
        let below = guest.path("volume/below");
        mount_tmpfs(&below, "size=4m");
        fs::create_dir(below.join("dir")).unwrap();
        fs::write(below.join("dir/file"), "content").unwrap();
        let volume = guest.look(ROOT, "volume");
        let mounted = guest.look(volume.node, "below");
        let dir = guest.look(mounted.node, "dir");
        let file = guest.look(dir.node, "file");
        let handle = guest.open(OPEN, file.node, libc::O_RDONLY).unwrap();
        assert_eq!(umount(&below), Err(nix::Error::EBUSY), "a file is open there");
        assert_eq!(guest.close(RELEASE, file.node, handle), 0);
        // Idle descriptors are closed, and opened again on demand.
        wait_until(|| count_in(&below) == 0);
        let handle = guest.open(OPEN, file.node, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(file.node, handle), (0, b"content".to_vec()));
        assert_eq!(guest.close(RELEASE, file.node, handle), 0);
        wait_until(|| umount(&below).is_ok());
        assert_eq!(guest.open(OPEN, file.node, libc::O_RDONLY), Err(libc::ESTALE));
        let plain = guest.look(volume.node, "below");
        assert_eq!(plain.flags, 0);
        assert_eq!(guest.lookup(plain.node, "dir"), Err(libc::ENOENT));
    });
}

/// Counts this process's descriptors in a directory tree.
fn count_in(tree: &Path) -> usize {
    let descriptors = fs::read_dir("/proc/self/fd").unwrap();
    let targets = descriptors.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    targets.filter(|target| target.starts_with(tree)).count()
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "it never happens");
        std::thread::yield_now();
    }
}

#[test]
fn only_a_root_file_system_is_trusted_for_a_while() {
    with_mounts(|| {
        let mut guest = FsGuest::new();
        mount_tmpfs(&guest.path("id/rootfs"), "size=4m");
        mount_tmpfs(&guest.path("id/rootfs/mounted"), "size=4m");
        fs::create_dir_all(guest.path("id/rootfs/rootfs")).unwrap();
        mount_tmpfs(&guest.path("id/mounts/rootfs"), "size=4m");
        fs::create_dir(guest.path("id/plain")).unwrap();
        for name in ["rootfs/file", "rootfs/mounted/file", "mounts/rootfs/file", "plain/file"] {
            fs::write(guest.path("id").join(name), "").unwrap();
        }
        let id = guest.look(ROOT, "id");
        let rootfs = guest.look(id.node, "rootfs");
        let mounted = guest.look(rootfs.node, "mounted");
        let inner = guest.look(rootfs.node, "rootfs");
        let mounts = guest.look(id.node, "mounts");
        let volume = guest.look(mounts.node, "rootfs");
        let plain = guest.look(id.node, "plain");
        let files = [rootfs.node, mounted.node, volume.node, plain.node];
        let files = files.map(|dir| guest.look(dir, "file").seconds);
        assert_eq!(files, [1, 0, 0, 0]);
        // A listing contains nodes of files there, but not of mounts.
        let entries = guest.entries(READDIRPLUS, rootfs.node, 0, 4096);
        let told = |name: &str| entries.iter().find(|entry| entry.name == name).unwrap().node;
        assert_eq!((told("rootfs"), told("mounted")), (Some(inner.node), Some(0)));
        guest.forget(inner.node, 2);
        assert_eq!(guest.open(OPENDIR, inner.node, 0), Err(libc::EBADF));
        let places = [id, rootfs, mounted, inner, mounts, volume, plain];
        assert_eq!(places.map(|place| place.seconds), [0, 1, 0, 1, 0, 0, 0]);
    });
}

#[test]
fn a_bound_file_whose_name_is_gone_can_still_be_opened() {
    with_mounts(|| {
        let mut guest = FsGuest::new();
        fs::write(guest.path("dir/bound"), "").unwrap();
        bind(&guest.path("file"), &guest.path("dir/bound"));
        fs::write(guest.path("new"), "new").unwrap();
        fs::rename(guest.path("new"), guest.path("file")).unwrap();
        let dir = guest.look(ROOT, "dir");
        let bound = guest.look(dir.node, "bound");
        let handle = guest.open(OPEN, bound.node, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(bound.node, handle), (0, b"content".to_vec()));
    });
}
