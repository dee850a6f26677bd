//! Tests of the capabilities for serving the share: each is necessary, and together they suffice.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::thread::CapabilitySet;

use super::*;
use crate::devices::virtio::tests::driver::PATIENCE;
use crate::devices::virtio::worker::borrow;
use crate::jail;

const SETATTR: u32 = 4;

/// A user id without any rights.
const OTHER: u32 = 4321;

/// Encodes a `struct fuse_setattr_in` that sets the fields of these bits.
fn attributes(valid: u32, mode: u32, uid: u32) -> Vec<u8> {
    let mut body = vec![0; 88];
    body[..4].copy_from_slice(&valid.to_le_bytes());
    body[68..72].copy_from_slice(&mode.to_le_bytes());
    body[76..80].copy_from_slice(&uid.to_le_bytes());
    body
}

impl FsGuest {
    fn change(&mut self, name: &str, valid: u32, mode: u32, uid: u32) -> bool {
        let file = self.lookup(ROOT, name).unwrap();
        self.ask(SETATTR, file, &attributes(valid, mode, uid)).0 == 0
    }

    /// Makes the directory `new` for this user and group.
    fn make_for(&mut self, uid: u32, gid: u32) -> bool {
        let body = [&0o755u32.to_le_bytes()[..], &[0; 4], b"new\0"].concat();
        let mut request = header(MKDIR, ROOT, body.len());
        request[24..28].copy_from_slice(&uid.to_le_bytes());
        request[28..32].copy_from_slice(&gid.to_le_bytes());
        self.send(&[request, body].concat());
        self.driver.get(ANSWER + 4, 4) == [0; 4]
            && fs::metadata("/new").is_ok_and(|made| (made.uid(), made.gid()) == (uid, gid))
    }
}

/// A capability, and a request that succeeds only with it.
type Operation = (CapabilitySet, fn(&mut FsGuest) -> bool);

const OPERATIONS: [Operation; 9] = [
    (CapabilitySet::CHOWN, |guest| {
        guest.change("file", 1 << 1, 0, OTHER) && fs::metadata("/file").unwrap().uid() == OTHER
    }),
    (CapabilitySet::DAC_OVERRIDE, |guest| {
        let file = guest.lookup(ROOT, "theirs").unwrap();
        guest.open(OPEN, file, libc::O_RDWR).is_ok()
    }),
    (CapabilitySet::FOWNER, |guest| guest.change("theirs", 1, 0o644, 0)),
    (CapabilitySet::FSETID, |guest| {
        guest.change("grouped", 1, 0o2755, 0)
            && fs::metadata("/grouped").unwrap().permissions().mode() & 0o7777 == 0o2755
    }),
    (CapabilitySet::SETUID, |guest| guest.make_for(OTHER, 0)),
    (CapabilitySet::SETGID, |guest| guest.make_for(0, OTHER)),
    // The share's root is open to its owner only, who is another user.
    (CapabilitySet::SETPCAP, |guest| guest.make_for(OTHER, OTHER)),
    (CapabilitySet::MKNOD, |guest| {
        // Mode, device (1, 3), mask.
        let head = [libc::S_IFCHR | 0o600, 0x103, 0, 0].map(u32::to_le_bytes).concat();
        guest.ask(MKNOD, ROOT, &[&head[..], b"null\0"].concat()).0 == 0
    }),
    (CapabilitySet::SETFCAP, |guest| {
        let file = guest.lookup(ROOT, "file").unwrap();
        // A vfs_cap_data of revision 2 with CAP_CHOWN permitted, in the short form of the request.
        let value = [0x0200_0000, 1, 0, 0, 0].map(u32::to_le_bytes).concat();
        let head = [20, 0].map(u32::to_le_bytes).concat();
        let set = [&head[..], b"security.capability\0", &value[..]].concat();
        guest.ask(SETXATTR, file, &set).0 == 0
    }),
];

/// Runs `test` in a jail around a share. When the device starts, the thread has only these
/// capabilities. `None` without root.
fn in_jail<T: Send + 'static>(
    kept: CapabilitySet,
    test: impl FnOnce(FsGuest) -> T + Send + 'static,
) -> Option<T> {
    let directory = Arc::new(tempfile::tempdir().unwrap());
    // Removed outside, because the jail does not show the directory.
    let outside = Arc::clone(&directory);
    let result = std::thread::spawn(move || {
        let share = directory.path().join("share");
        fs::create_dir(&share).unwrap();
        fs::set_permissions(&share, fs::Permissions::from_mode(0o750)).unwrap();
        for name in ["file", "theirs", "grouped"] {
            fs::write(share.join(name), "content").unwrap();
        }
        chown(share.join("grouped"), None, Some(OTHER)).ok()?;
        chown(share.join("theirs"), Some(OTHER), Some(OTHER)).ok()?;
        fs::set_permissions(share.join("theirs"), fs::Permissions::from_mode(0o000)).unwrap();
        let jail = jailed::jail(&share)?;
        let device = Fs::new(&FsConfig { devices: true, ..config() }).unwrap();
        device.share().open(jail::SHARE, Some(jail.clone())).unwrap();
        jail.enter_share().unwrap();
        jail::keep_only(kept).unwrap();
        Some(test(FsGuest { driver: Driver::started(Box::new(device)), directory }))
    })
    .join()
    .unwrap();
    drop(outside);
    result
}

fn begin(guest: &mut FsGuest) {
    let init = [7u32, 38, 0, 0].map(u32::to_le_bytes).concat();
    assert_eq!(guest.ask(INIT, ROOT, &init).0, 0);
}

#[test]
fn each_capability_is_needed_and_all_are_enough() {
    for (capability, operation) in OPERATIONS {
        for kept in [jail::SERVING, jail::SERVING - capability] {
            let done = in_jail(kept, move |mut guest| {
                begin(&mut guest);
                operation(&mut guest)
            });
            let Some(done) = done else { return eprintln!("left out: needs root") };
            assert_eq!(done, kept == jail::SERVING, "{capability:?}, with {kept:?}");
        }
    }
}

#[test]
fn a_driver_that_begins_anew_is_served_with_the_same_capabilities() {
    let served = in_jail(jail::SERVING, |mut guest| {
        for _ in 0..2 {
            begin(&mut guest);
            assert!(guest.lookup(ROOT, "file").is_ok());
            guest.driver.reset();
            guest.driver.start();
        }
    });
    if served.is_none() {
        return eprintln!("left out: needs root");
    }
    let refused = in_jail(jail::SERVING - CapabilitySet::SYS_CHROOT, |guest| {
        let mut given = [PollFd::new(borrow(guest.driver.end.event()), PollFlags::POLLIN)];
        poll(&mut given, PollTimeout::try_from(PATIENCE).unwrap()).unwrap();
        guest.driver.end.reason().is_some()
    });
    assert_eq!(refused, Some(true));
}

#[test]
fn capabilities_that_are_given_up_do_not_come_back() {
    let status = std::thread::spawn(|| {
        jail::keep_only(jail::SERVING).ok()?;
        fs::read_to_string("/proc/thread-self/status").ok()
    });
    let Some(status) = status.join().unwrap() else { return eprintln!("left out: needs root") };
    let set = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    for name in ["CapBnd:", "CapPrm:", "CapEff:"] {
        assert_eq!(set(name) & !jail::SERVING.bits(), 0, "{name}");
    }
    assert_eq!((set("CapInh:"), set("CapAmb:")), (0, 0));
}
