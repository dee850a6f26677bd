//! The view from the jail, and later mounts in it.
//!
//! Namespaces belong to threads, so threads of the test stand for host and VMM. The test needs
//! root, and is left out otherwise.

// The lint's exception for tests does not cover their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::channel;
use std::thread;

use isopod_vmm::jail;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

const NOTHING: Option<&str> = None;

fn names(directory: &str) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Mounts `directory` on itself and shares it, in a mount namespace of this thread's own, as the
/// sandbox process does. False without root.
fn share(directory: &Path) -> bool {
    match unshare(CloneFlags::CLONE_NEWNS) {
        Ok(()) => {}
        Err(Errno::EPERM) => return false,
        Err(e) => panic!("{e}"),
    }
    mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOTHING).unwrap();
    mount(Some(directory), directory, NOTHING, MsFlags::MS_BIND, NOTHING).unwrap();
    mount(NOTHING, directory, NOTHING, MsFlags::MS_SHARED, NOTHING).unwrap();
    true
}

#[test]
fn only_the_share_is_seen_and_later_mounts_arrive() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("share");
    fs::create_dir_all(path.join("later")).unwrap();
    fs::write(directory.path().join("secret"), "secret").unwrap();
    fs::write(path.join("file"), "content").unwrap();

    thread::spawn(move || {
        if !share(&path) {
            eprintln!("left out: needs root");
            return;
        }
        let (entered, has_entered) = channel();
        let (mounted, has_mounted) = channel();
        let (seen, has_seen) = channel();
        let root = OwnedFd::from(File::open(&path).unwrap());
        let vmm = thread::spawn(move || {
            let outer_root = jail::enter(&root).unwrap();
            assert_eq!(names("/"), ["proc", "share"]);
            assert_eq!(names("/proc"), ["self"]);
            assert_eq!(names("/proc/self"), ["fd", "mountinfo"]);
            assert_eq!(File::create("/new").unwrap_err().raw_os_error(), Some(libc::EROFS));
            outer_root.enter_share().unwrap();
            for directory in ["/", "/..", "/../..", "."] {
                assert_eq!(names(directory), ["file", "later"], "{directory}");
            }
            assert!(!Path::new("/proc").exists());
            entered.send(()).unwrap();
            has_mounted.recv().unwrap();
            assert_eq!(names("/later"), ["arrived"]);
            seen.send(()).unwrap();
            has_mounted.recv().unwrap();
            assert!(names("/later").is_empty());
            outer_root.keep_thread().unwrap();
            assert_eq!(names("/"), ["proc", "share"]);
            assert_eq!(fs::read("/share/file").unwrap(), b"content");
        });
        if has_entered.recv().is_ok() {
            let later = path.join("later");
            mount(Some("none"), &later, Some("tmpfs"), MsFlags::empty(), NOTHING).unwrap();
            fs::write(later.join("arrived"), "").unwrap();
            mounted.send(()).unwrap();
            has_seen.recv().unwrap();
            umount2(&later, MntFlags::MNT_DETACH).unwrap();
            mounted.send(()).unwrap();
        }
        vmm.join().unwrap();
    })
    .join()
    .unwrap();
    assert_eq!(fs::read(directory.path().join("secret")).unwrap(), b"secret");
}
