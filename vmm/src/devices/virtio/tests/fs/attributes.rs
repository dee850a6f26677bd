//! Tests of extended attributes, device nodes and procfs.

use std::os::unix::fs::{MetadataExt, symlink};

use super::*;

const READLINK: u32 = 5;
const LISTXATTR: u32 = 23;
const REMOVEXATTR: u32 = 24;
const RENAME2: u32 = 45;

impl FsGuest {
    fn set_xattr(&mut self, node: u64, name: &str, value: &str) -> i32 {
        let head = [value.len() as u32, 0].map(u32::to_le_bytes).concat();
        let body = [&head, name.as_bytes(), &[0], value.as_bytes()].concat();
        self.ask(SETXATTR, node, &body).0
    }

    fn xattr(&mut self, node: u64, name: &str) -> Result<String, i32> {
        let body = [&[200, 0, 0, 0, 0, 0, 0, 0], name.as_bytes(), &[0]].concat();
        match self.ask(GETXATTR, node, &body) {
            (0, value) => Ok(String::from_utf8(value).unwrap()),
            (error, _) => Err(error),
        }
    }

    fn xattrs(&mut self, node: u64, size: u32) -> Result<Vec<u8>, i32> {
        match self.ask(LISTXATTR, node, &[size, 0].map(u32::to_le_bytes).concat()) {
            (0, names) => Ok(names),
            (error, _) => Err(error),
        }
    }

    fn remove_xattr(&mut self, node: u64, name: &str) -> i32 {
        self.ask_name(REMOVEXATTR, node, 0, name)
    }

    fn mknod(&mut self, name: &str, mode: u32, rdev: u32) -> i32 {
        let head = [mode, rdev, 0, 0].map(u32::to_le_bytes).concat();
        self.ask(MKNOD, ROOT, &[&head, name.as_bytes(), &[0]].concat()).0
    }
}

/// Returns an attribute of a file on the host.
fn host_xattr(guest: &FsGuest, file: &str, name: &str) -> Option<String> {
    let path = std::ffi::CString::new(guest.path(file).to_str().unwrap()).unwrap();
    let name = std::ffi::CString::new(name).unwrap();
    let mut value = vec![0u8; 200];
    let room = value.as_mut_ptr().cast();
    // SAFETY: path and name are C strings, and the kernel writes at most the given length.
    let len = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), room, value.len()) };
    value.truncate(usize::try_from(len).ok()?);
    Some(String::from_utf8(value).unwrap())
}

#[test]
fn trusted_attributes_are_kept_under_a_name_that_needs_no_rights() {
    let mut guest = FsGuest::new();
    let file = guest.lookup(ROOT, "file").unwrap();
    if guest.set_xattr(file, "user.mine", "u") == libc::EOPNOTSUPP {
        return eprintln!("left out: the file system has no attributes");
    }
    assert_eq!(guest.set_xattr(file, "trusted.overlay.opaque", "y"), 0);
    assert_eq!(guest.xattr(file, "trusted.overlay.opaque").as_deref(), Ok("y"));
    let kept = host_xattr(&guest, "file", "user.isopod.trusted.overlay.opaque");
    assert_eq!(kept.as_deref(), Some("y"));
    assert_eq!(host_xattr(&guest, "file", "trusted.overlay.opaque"), None);
    let mut names = guest.xattrs(file, 200).unwrap();
    let len = names.len();
    let mut names: Vec<_> = names.split_mut(|byte| *byte == 0).map(|name| name.to_vec()).collect();
    names.sort();
    assert_eq!(names, [&b""[..], b"trusted.overlay.opaque", b"user.mine"]);
    assert_eq!(guest.xattrs(file, 0).unwrap()[..4], (len as u32).to_le_bytes());
    assert_eq!(guest.xattrs(file, len as u32 - 1), Err(libc::ERANGE));
    // The guest cannot use the reserved names.
    for name in ["user.isopod.trusted.overlay.opaque", "user.isopod.x"] {
        assert_eq!(guest.xattr(file, name), Err(libc::EOPNOTSUPP));
        assert_eq!(guest.set_xattr(file, name, "n"), libc::EOPNOTSUPP);
        assert_eq!(guest.remove_xattr(file, name), libc::EOPNOTSUPP);
    }
    assert_eq!(guest.remove_xattr(file, "trusted.overlay.opaque"), 0);
    assert_eq!(guest.xattr(file, "trusted.overlay.opaque"), Err(libc::ENODATA));
    for name in ["security.selinux", "security.ima", "system.other", "none"] {
        assert_eq!(guest.set_xattr(file, name, "v"), libc::EOPNOTSUPP, "{name}");
    }
}

#[test]
fn devices_are_made_only_where_the_container_may() {
    let mut guest = FsGuest::new();
    let whiteout = guest.mknod("whiteout", libc::S_IFCHR, 0);
    if whiteout == libc::EPERM {
        return eprintln!("left out: needs root, or Linux 5.8");
    }
    assert_eq!(whiteout, 0);
    for (mode, rdev) in [(libc::S_IFCHR, 0x103), (libc::S_IFBLK, 0x103), (libc::S_IFBLK, 0)] {
        assert_eq!(guest.mknod("device", mode | 0o600, rdev), libc::EPERM, "{mode:o} {rdev:x}");
    }
    assert!(!guest.path("device").exists());
    assert_eq!(guest.mknod("fifo", libc::S_IFIFO | 0o600, 0x103), 0);
    // overlayfs leaves a whiteout in place of a renamed file.
    let to = [&ROOT.to_le_bytes()[..], &[4, 0, 0, 0, 0, 0, 0, 0], b"file\0moved\0"].concat();
    assert_eq!(guest.ask(RENAME2, ROOT, &to).0, 0);
    let left = fs::symlink_metadata(guest.path("file")).unwrap();
    assert_eq!((left.mode() & libc::S_IFMT, left.rdev()), (libc::S_IFCHR, 0));
    let directory = Arc::clone(&guest.directory);
    let allowed = FsConfig { devices: true, ..config() };
    let device = Fs::new(&allowed).unwrap();
    device.share().open_for(guest.path("").to_str().unwrap(), None, 100).unwrap();
    let mut allowed =
        FsGuest { driver: Driver::started(Box::new(device)), directory }.initialised();
    assert_eq!(allowed.mknod("device", libc::S_IFCHR | 0o600, 0x103), 0);
    assert_eq!(fs::symlink_metadata(guest.path("device")).unwrap().rdev(), 0x103);
}

/// A guest whose share is a directory of procfs.
fn guest_of_proc(path: &str) -> FsGuest {
    let device = Fs::new(&config()).unwrap();
    device.share().open_for(path, None, 100).unwrap();
    let directory = Arc::new(tempfile::tempdir().unwrap());
    FsGuest { driver: Driver::started(Box::new(device)), directory }.initialised()
}

#[test]
fn files_of_procfs_that_show_another_process_stay_closed() {
    let mut guest = guest_of_proc("/proc");
    let pid = std::process::id().to_string();
    let process = guest.lookup(ROOT, &pid).unwrap();
    let task = guest.lookup(process, "task").unwrap();
    let task = guest.lookup(task, &pid).unwrap();
    for dir in [process, task] {
        for name in ["mem", "environ", "maps", "smaps", "pagemap", "auxv", "io", "stack"] {
            let node = guest.lookup(dir, name).unwrap();
            assert_eq!(guest.open(OPEN, node, libc::O_RDONLY), Err(libc::EACCES), "{name}");
        }
        for name in ["root", "cwd", "exe"] {
            let node = guest.lookup(dir, name).unwrap();
            assert_eq!(guest.ask(READLINK, node, &[]).0, libc::EACCES, "{name}");
        }
        let descriptors = guest.lookup(dir, "fd").unwrap();
        assert_eq!(guest.open(OPENDIR, descriptors, 0), Err(libc::EACCES));
        let first = guest.lookup(descriptors, "0").unwrap();
        assert_eq!(guest.ask(READLINK, first, &[]).0, libc::EACCES);
        let status = guest.lookup(dir, "status").unwrap();
        assert!(guest.open(OPEN, status, libc::O_RDONLY).is_ok());
    }
}

#[test]
fn a_share_that_is_itself_closed_has_nothing_open() {
    let path = format!("/proc/{}/task", std::process::id());
    let mut guest = guest_of_proc(&path);
    let first = guest.lookup(ROOT, &std::process::id().to_string()).unwrap();
    let memory = guest.lookup(first, "mem").unwrap();
    assert_eq!(guest.open(OPEN, memory, libc::O_RDONLY), Err(libc::EACCES));
}

#[test]
fn a_link_to_a_closed_file_is_not_followed_here() {
    let mut guest = FsGuest::new();
    symlink(format!("/proc/{}/mem", std::process::id()), guest.path("link")).unwrap();
    let link = guest.lookup(ROOT, "link").unwrap();
    assert_eq!(guest.open(OPEN, link, libc::O_RDONLY), Err(libc::EBADF));
}
