//! Extended attributes.

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{OrSay, Outcome, fails, same};

pub(super) fn xattr(dir: &Path, name: &str) -> Outcome {
    let path = dir.join("file");
    std::fs::write(&path, "x").or_say("write")?;
    let path = CString::new(path.as_os_str().as_bytes()).or_say("path")?;
    let name = CString::new(name).or_say("name")?;
    fails("getxattr of none", get(&path, &name), libc::ENODATA)?;
    set(&path, &name, b"one", libc::XATTR_CREATE).or_say("setxattr")?;
    same("value", get(&path, &name).or_say("getxattr")?.as_slice(), b"one")?;
    fails("XATTR_CREATE again", set(&path, &name, b"x", libc::XATTR_CREATE), libc::EEXIST)?;
    set(&path, &name, b"", libc::XATTR_REPLACE).or_say("setxattr with an empty value")?;
    same("empty value", get(&path, &name).or_say("getxattr")?.as_slice(), b"")?;
    let names = list(&path).or_say("listxattr")?;
    same("listed", names.split(|&b| b == 0).any(|n| n == name.as_bytes()), true)?;
    // SAFETY: both strings end in NUL and live across the call.
    checked(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) } as isize)
        .or_say("removexattr")?;
    fails("getxattr of a removed one", get(&path, &name), libc::ENODATA)
}

fn set(path: &CStr, name: &CStr, value: &[u8], flags: i32) -> io::Result<()> {
    let (bytes, len) = (value.as_ptr().cast(), value.len());
    // SAFETY: both strings end in NUL, and `bytes` has `len` bytes; all live across the call.
    let done = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), bytes, len, flags) };
    checked(done as isize).map(drop)
}

fn get(path: &CStr, name: &CStr) -> io::Result<Vec<u8>> {
    let mut value = vec![0_u8; 4096];
    let (bytes, len) = (value.as_mut_ptr().cast(), value.len());
    // SAFETY: both strings end in NUL, and `bytes` has room for `len` bytes; all live across the
    // call.
    let got = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), bytes, len) };
    value.truncate(checked(got)?);
    Ok(value)
}

fn list(path: &CStr) -> io::Result<Vec<u8>> {
    let mut names = vec![0_u8; 4096];
    let (bytes, len) = (names.as_mut_ptr().cast(), names.len());
    // SAFETY: `path` ends in NUL, and `bytes` has room for `len` bytes; both live across the call.
    let got = unsafe { libc::listxattr(path.as_ptr(), bytes, len) };
    names.truncate(checked(got)?);
    Ok(names)
}

fn checked(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
