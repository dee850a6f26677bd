//! Lookup of the program that `args[0]` names, as in execvp(3), before anything is started.

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, accessat, stat};
use rustix::io::Errno;

use crate::error::{Code, Error, Result};

/// Search path of `execvp` without `PATH` in the environment.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// The program's path for `execve`, or an error in the wording that callers of runtimes know.
///
/// Runs inside the container's root, in the process's working directory and with its credentials.
/// So the kernel will resolve the path in the same way.
pub(crate) fn find(program: &str, env: &[String]) -> Result<CString> {
    if program.contains('/') {
        return match check(Path::new(program)) {
            Ok(()) => to_c(Path::new(program)),
            Err(e @ (Errno::NOENT | Errno::NOTDIR)) => {
                let why = crate::error::reason(&e.into()).to_lowercase();
                Err(not_found(program, &format!("stat {program}: {why}")))
            }
            Err(e) => Err(denied(program, e)),
        };
    }
    let mut refused = None;
    for directory in search_path(env).split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = Path::new(directory).join(program);
        match check(&candidate) {
            Ok(()) => return to_c(&candidate),
            Err(e @ (Errno::ACCESS | Errno::PERM)) => refused = Some(e),
            Err(_) => {}
        }
    }
    match refused {
        Some(e) => Err(denied(program, e)),
        None => Err(not_found(program, "executable file not found in $PATH")),
    }
}

fn search_path(env: &[String]) -> &str {
    env.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH)
}

fn check(path: &Path) -> std::result::Result<(), Errno> {
    let stat = stat(path)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Err(Errno::ISDIR);
    }
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

fn to_c(path: &Path) -> Result<CString> {
    let bytes = <Path as AsRef<OsStr>>::as_ref(path).as_bytes();
    CString::new(bytes).map_err(|_| not_found(&path.to_string_lossy(), "contains a NUL character"))
}

fn not_found(program: &str, why: &str) -> Error {
    Error::new(Code::NotFound, format!("exec: {program:?}: {why}"))
}

fn denied(program: &str, e: Errno) -> Error {
    let why = crate::error::reason(&e.into()).to_lowercase();
    Error::new(Code::PermissionDenied, format!("exec: {program:?}: {why}"))
}

/// The error of a failed `execve`.
pub(crate) fn exec_failed(program: &CString, e: &std::io::Error) -> Error {
    let why = crate::error::reason(e).to_lowercase();
    let message =
        format!("exec {}: {why}", PathBuf::from(OsStr::from_bytes(program.as_bytes())).display());
    let code = match e.raw_os_error() {
        // The lookup found the file a moment ago, so its interpreter is missing.
        Some(libc::ENOENT | libc::ENOTDIR) => Code::NotFound,
        Some(libc::EACCES | libc::EPERM | libc::ENOEXEC | libc::EISDIR) => Code::PermissionDenied,
        _ => Code::Internal,
    };
    Error::new(code, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(path: &str) -> Vec<String> {
        vec!["A=b".into(), format!("PATH={path}")]
    }

    #[test]
    fn programs_are_found_in_path_order() {
        assert_eq!(find("sh", &env("/nowhere:/bin:/usr/bin")).unwrap().as_bytes(), b"/bin/sh");
        assert_eq!(find("/bin/sh", &[]).unwrap().as_bytes(), b"/bin/sh");
        assert_eq!(find("sh", &[]).unwrap().as_bytes(), b"/bin/sh");
    }

    #[test]
    fn messages_are_the_known_ones() {
        let e = find("foo", &env("/bin")).unwrap_err();
        assert_eq!(e.message, r#"exec: "foo": executable file not found in $PATH"#);
        assert_eq!(e.code, Code::NotFound);
        let e = find("/foo", &[]).unwrap_err();
        assert_eq!(e.message, r#"exec: "/foo": stat /foo: no such file or directory"#);
        let e = find("/etc/passwd", &[]).unwrap_err();
        assert_eq!(e.message, r#"exec: "/etc/passwd": permission denied"#);
        assert_eq!(e.code, Code::PermissionDenied);
        let e = find("/etc", &[]).unwrap_err();
        assert_eq!(e.message, r#"exec: "/etc": is a directory"#);
        assert_eq!(find("passwd", &env("/etc")).unwrap_err().code, Code::PermissionDenied);
    }
}
