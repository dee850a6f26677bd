//! What may be read, opened and made here.

use std::fs;

use nix::fcntl::{OFlag, open as sys_open};
use nix::sys::stat::{Mode, SFlag, makedev, mknod as sys_mknod};
use serde_json::{Map, Value, json};

/// The contents of files, or the error of reading them.
pub(crate) fn files(paths: &[&str]) -> Value {
    let read = |path: &str| match fs::read(path) {
        Ok(bytes) => json!({ "text": String::from_utf8_lossy(&bytes) }),
        Err(e) => json!({ "error": name(e.raw_os_error().unwrap_or(0)) }),
    };
    paths.iter().map(|&path| (path.to_owned(), read(path))).collect::<Map<_, _>>().into()
}

/// Whether paths can be opened: `ok`, or the name of the error. `mode` is one of `r`, `w`, `rw`,
/// `create` and `list`.
pub(crate) fn open(mode: &str, paths: &[&str]) -> Value {
    let flags = match mode {
        "r" => OFlag::O_RDONLY,
        "w" => OFlag::O_WRONLY,
        "rw" => OFlag::O_RDWR,
        "create" => OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL,
        "list" => OFlag::O_RDONLY | OFlag::O_DIRECTORY,
        other => panic!("no mode {other}"),
    };
    let flags = flags | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let outcome = |path: &str| match sys_open(path, flags, Mode::from_bits_truncate(0o644)) {
        Ok(_) if mode == "list" => {
            fs::read_dir(path).map_or_else(|e| e.to_string(), |d| format!("{} entries", d.count()))
        }
        Ok(_) => "ok".to_owned(),
        Err(e) => name(e as i32),
    };
    paths.iter().map(|&path| (path.to_owned(), outcome(path).into())).collect::<Map<_, _>>().into()
}

/// Makes a character device and opens it: the outcome of either.
pub(crate) fn mknod(path: &str, major: u64, minor: u64) -> Value {
    let made =
        sys_mknod(path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor));
    let made = made.map_or_else(|e| name(e as i32), |()| "ok".to_owned());
    json!({ "mknod": made, "open": open("r", &[path])[path] })
}

/// Leaves the root directory as a process with `CAP_SYS_CHROOT` can: by a root below the working
/// directory, which then is nobody's root on the way up. The names in the directory it comes to.
pub(crate) fn escape(below: &str) -> Value {
    std::env::set_current_dir("/").expect("chdir");
    std::os::unix::fs::chroot(below).expect("chroot");
    // More than anything is deep; the topmost directory is its own parent.
    for _ in 0..64 {
        std::env::set_current_dir("..").expect("chdir");
    }
    let entries = fs::read_dir(".").expect("readdir").flatten();
    entries.map(|entry| Value::from(entry.file_name().to_string_lossy())).collect()
}

/// `EPERM` for 1, and so on.
pub(crate) fn name(errno: i32) -> String {
    format!("{:?}", nix::errno::Errno::from_raw(errno))
}
