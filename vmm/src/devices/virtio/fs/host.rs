//! System calls on the host's files, each with the flags that a hostile guest must not choose.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Makes an error of a number.
pub(super) fn error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// Makes a result of the number that a system call returned.
pub(super) fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A name of the guest's, which has to be a single component: `..` of the share's root would be the
/// VMM's own directory.
///
/// # Errors
///
/// `EINVAL`.
pub(super) fn component(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(error(libc::EINVAL)),
        _ => Ok(name),
    }
}

/// Opens `name` in `dir`; the kernel closes the descriptor on `execve`.
pub(super) fn open_at(
    dir: BorrowedFd<'_>,
    name: &CStr,
    flags: i32,
    mode: u32,
) -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string, and the call keeps none of its arguments.
    let fd = unsafe { libc::openat(dir.as_raw_fd(), name.as_ptr(), flags | libc::O_CLOEXEC, mode) };
    done(fd)?;
    // SAFETY: the descriptor was just made, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens whatever `name` is, without following it and without a driver's or a pipe's doing.
pub(super) fn open_path(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    open_at(dir, name, libc::O_PATH | libc::O_NOFOLLOW, 0)
}

/// `/proc/self/fd`, through which an open file can be opened once more.
pub(super) struct ProcSelfFd(OwnedFd);

impl ProcSelfFd {
    /// Opens the directory.
    ///
    /// # Errors
    ///
    /// When procfs is not mounted, or not this process's.
    pub(super) fn open() -> io::Result<Self> {
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        open_at(cwd(), c"/proc/self/fd", flags, 0).map(Self)
    }

    /// Opens the file of `fd` with other flags.
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
        // SAFETY: the name is a C string and there are two times, as the call wants them.
        done(unsafe { libc::utimensat(self.0.as_raw_fd(), name.as_ptr(), times.as_ptr(), 0) })
    }

    /// Makes `name` in `dir` one more name of the file of `fd`. Unlike `AT_EMPTY_PATH`, this way
    /// needs no capability.
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
    // A number has no NUL in it.
    CString::new(fd.as_raw_fd().to_string()).unwrap_or_default()
}

/// The path of the file of `fd`, for calls that take nothing else.
pub(super) fn path_of(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default()
}

/// The working directory, for absolute paths.
pub(super) fn cwd() -> BorrowedFd<'static> {
    // SAFETY: `AT_FDCWD` is no descriptor that could be closed.
    unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) }
}

/// Type of the file system (`f_type` of statfs(2)).
pub(super) fn file_system(fd: BorrowedFd<'_>) -> io::Result<libc::__fsword_t> {
    let mut out = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel fills in the structure, which may be anything before.
    done(unsafe { libc::fstatfs(fd.as_raw_fd(), out.as_mut_ptr()) })?;
    // SAFETY: the call has succeeded; zeros are valid as well.
    Ok(unsafe { out.assume_init() }.f_type)
}

/// Sizes of the file system.
pub(super) fn statvfs(fd: BorrowedFd<'_>) -> io::Result<libc::statvfs64> {
    let mut out = MaybeUninit::<libc::statvfs64>::zeroed();
    // SAFETY: the kernel fills in the structure, which may be anything before.
    done(unsafe { libc::fstatvfs64(fd.as_raw_fd(), out.as_mut_ptr()) })?;
    // SAFETY: the call has succeeded; zeros are valid as well.
    Ok(unsafe { out.assume_init() })
}

/// The target of a link: `name` in `dir`, or the file of `dir` itself with an empty name.
pub(super) fn read_link(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Vec<u8>> {
    let mut target = vec![0u8; libc::PATH_MAX as usize];
    let room = target.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most as many bytes as the buffer has.
    let len = unsafe { libc::readlinkat(dir.as_raw_fd(), name.as_ptr(), room, target.len()) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    target.truncate(len);
    Ok(target)
}
