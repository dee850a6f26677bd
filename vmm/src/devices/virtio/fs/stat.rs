//! Attributes and identity of a file on the host.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use fuse_backend_rs::abi::fuse_abi::{ATTR_SUBMOUNT, Attr};

use super::host::done;

/// Identity of a file: mount, file system and inode. A file with two bind mounts has two
/// identities, and the guest gets two file systems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    pub(super) mount: u64,
    device: (u32, u32),
    inode: u64,
}

/// File system and inode: the file, through any mount.
pub(super) type FileNumber = ((u32, u32), u64);

impl Identity {
    pub(super) fn file(&self) -> FileNumber {
        (self.device, self.inode)
    }
}

/// Time of birth, if the file system has one. An inode number is used again once a file is gone.
pub(super) type Birth = Option<(i64, u32)>;

/// Result of statx(2).
#[derive(Clone, Copy)]
pub(super) struct Stat(libc::statx);

const WANTED: u32 = libc::STATX_BASIC_STATS | libc::STATX_BTIME;

/// Requests a mount number that is never used again, since Linux 6.8. Older kernels return the
/// short number.
const STATX_MNT_ID_UNIQUE: u32 = 0x4000;

impl Stat {
    /// Returns the attributes of an open file.
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Self::at(fd, c"", libc::AT_EMPTY_PATH, STATX_MNT_ID_UNIQUE)
    }

    /// Returns the mount number of an open file in mountinfo.
    pub(super) fn listed_mount(fd: BorrowedFd<'_>) -> io::Result<u64> {
        Self::at(fd, c"", libc::AT_EMPTY_PATH, 0).map(|stat| stat.0.stx_mnt_id)
    }

    /// Returns the attributes of `name` in `dir`. Links and automount points are not followed.
    pub(super) fn of_name(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Self> {
        Self::at(dir, name, 0, STATX_MNT_ID_UNIQUE)
    }

    fn at(dir: BorrowedFd<'_>, name: &CStr, flags: i32, more: u32) -> io::Result<Self> {
        let wanted = WANTED | libc::STATX_MNT_ID | more;
        let flags = flags | libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
        let mut out = MaybeUninit::<libc::statx>::zeroed();
        let (dir, name, room) = (dir.as_raw_fd(), name.as_ptr(), out.as_mut_ptr());
        // SAFETY: the name is a C string, and the kernel fills in the structure.
        done(unsafe { libc::statx(dir, name, flags, wanted, room) })?;
        // SAFETY: the call has succeeded, and zeros are valid as well.
        Ok(Self(unsafe { out.assume_init() }))
    }

    pub(super) fn identity(&self) -> Identity {
        Identity {
            mount: self.0.stx_mnt_id,
            device: (self.0.stx_dev_major, self.0.stx_dev_minor),
            inode: self.0.stx_ino,
        }
    }

    pub(super) fn birth(&self) -> Birth {
        let known = self.0.stx_mask & libc::STATX_BTIME != 0;
        known.then_some((self.0.stx_btime.tv_sec, self.0.stx_btime.tv_nsec))
    }

    /// Returns the type of the file (`S_IFMT`).
    pub(super) fn kind(&self) -> u32 {
        u32::from(self.0.stx_mode) & libc::S_IFMT
    }

    pub(super) fn inode(&self) -> u64 {
        self.0.stx_ino
    }

    pub(super) fn links(&self) -> u32 {
        self.0.stx_nlink
    }

    /// Returns true for the root of a mount. It has a place in the tree even without a name.
    pub(super) fn is_mount_root(&self) -> bool {
        self.0.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0
    }

    /// Converts the attributes to FUSE's.
    pub(super) fn attr(&self, submount: bool) -> Attr {
        let of = &self.0;
        let (major, minor) = (of.stx_rdev_major, of.stx_rdev_minor);
        Attr {
            ino: of.stx_ino,
            size: of.stx_size,
            blocks: of.stx_blocks,
            atime: of.stx_atime.tv_sec as u64,
            mtime: of.stx_mtime.tv_sec as u64,
            ctime: of.stx_ctime.tv_sec as u64,
            atimensec: of.stx_atime.tv_nsec,
            mtimensec: of.stx_mtime.tv_nsec,
            ctimensec: of.stx_ctime.tv_nsec,
            mode: of.stx_mode.into(),
            nlink: of.stx_nlink,
            uid: of.stx_uid,
            gid: of.stx_gid,
            // new_encode_dev() of Linux.
            rdev: (minor & 0xff) | major << 8 | (minor & !0xff) << 12,
            blksize: of.stx_blksize,
            flags: if submount { ATTR_SUBMOUNT } else { 0 },
        }
    }
}
