//! Files and devices: reading, opening and making them.

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

/// The outcome of opening each path: `ok`, or the name of the error. `mode` is one of `r`, `w`,
/// `rw`, `create` and `list`.
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

/// Makes a character device and opens it. Returns both outcomes.
pub(crate) fn mknod(path: &str, major: u64, minor: u64) -> Value {
    let made =
        sys_mknod(path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor));
    let made = made.map_or_else(|e| name(e as i32), |()| "ok".to_owned());
    json!({ "mknod": made, "open": open("r", &[path])[path] })
}

/// Leaves the root directory, as a process with `CAP_SYS_CHROOT` can. After a chroot(2) below the
/// working directory no root stops the way up. Returns the names in the topmost directory.
pub(crate) fn escape(below: &str) -> Value {
    std::env::set_current_dir("/").expect("chdir");
    std::os::unix::fs::chroot(below).expect("chroot");
    // Deeper than any directory; the topmost one is its own parent.
    for _ in 0..64 {
        std::env::set_current_dir("..").expect("chdir");
    }
    let entries = fs::read_dir(".").expect("readdir").flatten();
    entries.map(|entry| Value::from(entry.file_name().to_string_lossy())).collect()
}

/// The name of an error number: `EPERM` for 1.
pub(crate) fn name(errno: i32) -> String {
    format!("{:?}", nix::errno::Errno::from_raw(errno))
}
