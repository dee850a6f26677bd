//! Tests of the share in the jail.

use super::*;

/// Makes a mount namespace of this thread's own, with the jail around `share` as its root. `None`
/// without root.
pub(super) fn jail(share: &std::path::Path) -> Option<crate::jail::OuterRoot> {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).ok()?;
    let none: Option<&str> = None;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).unwrap();
    mount(Some(share), share, none, MsFlags::MS_BIND, none).unwrap();
    Some(crate::jail::enter(&fs::File::open(share).unwrap().into()).unwrap())
}

#[test]
fn the_share_is_served_in_the_jail_with_its_attributes() {
    let directory = Arc::new(tempfile::tempdir().unwrap());
    // Removed outside, because the jail does not show the directory.
    let outside = Arc::clone(&directory);
    std::thread::spawn(move || {
        let share = directory.path().join("share");
        fs::create_dir(&share).unwrap();
        fs::write(share.join("file"), "content").unwrap();
        let Some(jail) = jail(&share) else { return eprintln!("left out: needs root") };
        let device = Fs::new(&config()).unwrap();
        device.share().open(crate::jail::SHARE, Some(jail.clone())).unwrap();
        jail.enter_share().unwrap();
        let mut guest = FsGuest { driver: Driver::started(Box::new(device)), directory };
        let init = [7u32, 38, 0, 0].map(u32::to_le_bytes).concat();
        assert_eq!(guest.ask(INIT, ROOT, &init).0, 0);
        let file = guest.lookup(ROOT, "file").unwrap();
        let handle = guest.open(OPEN, file, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(file, handle), (0, b"content".to_vec()));
        assert_eq!(guest.lookup(ROOT, ".."), Err(libc::EINVAL));
        assert_eq!(guest.lookup(ROOT, "proc"), Err(libc::ENOENT));
        // Some file systems have no such attributes, but the file must not be missing.
        let set = [&[1, 0, 0, 0, 0, 0, 0, 0][..], b"user.x\0v"].concat();
        let (error, _) = guest.ask(SETXATTR, file, &set);
        assert!(matches!(error, 0 | libc::EOPNOTSUPP), "{error}");
        let get = [&[9, 0, 0, 0, 0, 0, 0, 0][..], b"user.x\0"].concat();
        let (error, value) = guest.ask(GETXATTR, file, &get);
        assert!(matches!((error, &value[..]), (0, b"v") | (libc::EOPNOTSUPP, _)), "{error}");
        let caps = [&[9, 0, 0, 0, 0, 0, 0, 0][..], b"security.capability\0"].concat();
        let (error, _) = guest.ask(GETXATTR, file, &caps);
        assert!(matches!(error, libc::ENODATA | libc::EOPNOTSUPP), "{error}");
    })
    .join()
    .unwrap();
    drop(outside);
}
