//! System calls on the host's files, with flags that are safe against a hostile guest.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Creates an error from an error number.
pub(super) fn error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// Converts the return value of a system call to a result.
pub(super) fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Checks that a guest's name is a single component (`EINVAL`). Otherwise `..` of the share's root
/// would lead to the VMM's own directory.
pub(super) fn component(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(error(libc::EINVAL)),
        _ => Ok(name),
    }
}

/// Opens `name` in `dir`, with `O_CLOEXEC`.
pub(super) fn open_at(
    dir: BorrowedFd<'_>,
    name: &CStr,
    flags: i32,
    mode: u32,
) -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string, and the call keeps none of its arguments.
    let fd = unsafe { libc::openat(dir.as_raw_fd(), name.as_ptr(), flags | libc::O_CLOEXEC, mode) };
    done(fd)?;
    // SAFETY: the descriptor was just made, and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens a path descriptor of `name`. Links are not followed, and no driver or pipe is opened.
pub(super) fn open_path(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    open_at(dir, name, libc::O_PATH | libc::O_NOFOLLOW, 0)
}

/// The directory `/proc/self/fd`, through which an open file can be opened again.
pub(super) struct ProcSelfFd(OwnedFd);

impl ProcSelfFd {
    /// Opens the directory. Fails if procfs is not mounted, or not for this process.
    pub(super) fn open() -> io::Result<Self> {
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        open_at(cwd(), c"/proc/self/fd", flags, 0).map(Self)
    }

    /// Opens the file of `fd` again with other flags.
    pub(super) fn reopen(&self, fd: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
        open_at(self.0.as_fd(), &number(fd), flags, 0)
    }

    pub(super) fn chmod(&self, fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
        let name = number(fd);
        // SAFETY: the name is a C string, and the call keeps none of its arguments.
        done(unsafe { libc::fchmodat(self.0.as_raw_fd(), name.as_ptr(), mode, 0) })
    }

    pub(super) fn set_times(
        &self,
        fd: BorrowedFd<'_>,
        times: &[libc::timespec; 2],
    ) -> io::Result<()> {
        let name = number(fd);
        // SAFETY: the name is a C string, and the array has the two times that the call reads.
        done(unsafe { libc::utimensat(self.0.as_raw_fd(), name.as_ptr(), times.as_ptr(), 0) })
    }

    /// Links the file of `fd` as `name` in `dir`. This way needs no capability, unlike
    /// `AT_EMPTY_PATH`.
    pub(super) fn link(
        &self,
        fd: BorrowedFd<'_>,
        dir: BorrowedFd<'_>,
        name: &CStr,
    ) -> io::Result<()> {
        let from = number(fd);
        let follow = libc::AT_SYMLINK_FOLLOW;
        let (here, there) = (self.0.as_raw_fd(), dir.as_raw_fd());
        // SAFETY: the names are C strings, and the call keeps none of its arguments.
        done(unsafe { libc::linkat(here, from.as_ptr(), there, name.as_ptr(), follow) })
    }
}

fn number(fd: BorrowedFd<'_>) -> CString {
    // A decimal number contains no NUL.
    CString::new(fd.as_raw_fd().to_string()).unwrap_or_default()
}

/// Returns a path of the file of `fd`, for calls that take nothing else.
pub(super) fn path_of(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default()
}

/// Returns the working directory, for absolute paths.
pub(super) fn cwd() -> BorrowedFd<'static> {
    // SAFETY: `AT_FDCWD` is not a descriptor that could be closed.
    unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) }
}

/// Returns the type of the file system (`f_type` of statfs(2)).
pub(super) fn file_system(fd: BorrowedFd<'_>) -> io::Result<libc::__fsword_t> {
    let mut out = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel fills in the structure, which needs no valid content before.
    done(unsafe { libc::fstatfs(fd.as_raw_fd(), out.as_mut_ptr()) })?;
    // SAFETY: the call has succeeded, and zeros are valid as well.
    Ok(unsafe { out.assume_init() }.f_type)
}

/// Returns the sizes of the file system.
pub(super) fn statvfs(fd: BorrowedFd<'_>) -> io::Result<libc::statvfs64> {
    let mut out = MaybeUninit::<libc::statvfs64>::zeroed();
    // SAFETY: the kernel fills in the structure, which needs no valid content before.
    done(unsafe { libc::fstatvfs64(fd.as_raw_fd(), out.as_mut_ptr()) })?;
    // SAFETY: the call has succeeded, and zeros are valid as well.
    Ok(unsafe { out.assume_init() })
}

/// Returns the target of the link `name` in `dir`, or of `dir` itself if the name is empty.
pub(super) fn read_link(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Vec<u8>> {
    let mut target = vec![0u8; libc::PATH_MAX as usize];
    let room = target.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most the buffer's length.
    let len = unsafe { libc::readlinkat(dir.as_raw_fd(), name.as_ptr(), room, target.len()) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    target.truncate(len);
    Ok(target)
}
