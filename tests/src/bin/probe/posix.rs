//! Expectations of a POSIX file system, one function each.

mod content;
mod names;
mod xattr;

use std::fmt::Debug;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use serde_json::{Map, Value, json};

/// The failure of an expectation, in words.
type Outcome = Result<(), String>;

/// Tries every expectation in a sub-directory of `dir`. Maps its name to `ok` or the failure.
/// `xattr` is the name of an extended attribute that the file system behind `dir` takes.
pub(crate) fn report(dir: &str, xattr: &str) -> Value {
    type Expectation = fn(&Path) -> Outcome;
    let all: [(&str, Expectation); 22] = [
        ("rename over", names::rename_over),
        ("rename no replace", names::rename_no_replace),
        ("rename directory", names::rename_directory),
        ("unlink while open", names::unlink_while_open),
        ("hard links", names::hard_links),
        ("symbolic links", names::symbolic_links),
        ("dot dot", names::dot_dot),
        ("long names", names::long_names),
        ("many names", names::many_names),
        ("exclusive create", names::exclusive_create),
        ("mode and owner", names::mode_and_owner),
        ("times", names::times),
        ("special files", names::special_files),
        ("append", content::append),
        ("mmap", content::mmap_shared),
        ("fsync", content::fsync),
        ("sparse", content::sparse),
        ("truncate", content::truncate),
        ("large offsets", content::large_offsets),
        ("punch hole", content::punch_hole),
        ("flock", flock),
        ("fcntl locks", fcntl_locks),
    ];
    let mut found = Map::new();
    let mut add = |name: &str, outcome: Outcome| {
        found.insert(name.to_owned(), outcome.map_or_else(|e| json!(e), |()| json!("ok")));
    };
    for (name, expectation) in all {
        let own = Path::new(dir).join(name.replace(' ', "-"));
        add(name, fs::create_dir_all(&own).or_say("mkdir").and_then(|()| expectation(&own)));
    }
    let own = Path::new(dir).join("xattr");
    add("xattr", fs::create_dir_all(&own).or_say("mkdir").and_then(|()| xattr::xattr(&own, xattr)));
    found.into()
}

/// Tries only the extended attribute `name` in `dir`: `ok` or the failure.
pub(crate) fn xattr(dir: &str, name: &str) -> Value {
    xattr::xattr(Path::new(dir), name).map_or_else(|e| json!(e), |()| json!("ok"))
}

/// Adds the name of the attempt to an error.
trait OrSay<T> {
    fn or_say(self, what: &str) -> Result<T, String>;
}

impl<T, E: std::fmt::Display> OrSay<T> for Result<T, E> {
    fn or_say(self, what: &str) -> Result<T, String> {
        self.map_err(|e| format!("{what}: {e}"))
    }
}

fn same<T: PartialEq + Debug>(what: &str, is: T, should_be: T) -> Outcome {
    if is == should_be {
        return Ok(());
    }
    Err(format!("{what} is {is:?} and not {should_be:?}"))
}

/// Checks that the call failed with this error.
fn fails<T>(what: &str, result: io::Result<T>, errno: i32) -> Outcome {
    match result {
        Ok(_) => Err(format!("{what} succeeded")),
        Err(e) if e.raw_os_error() == Some(errno) => Ok(()),
        Err(e) => Err(format!("{what}: {e} instead of {}", io::Error::from_raw_os_error(errno))),
    }
}

/// Runs this program again, as another process.
fn another(args: &[&str]) -> Result<Child, String> {
    Command::new("/proc/self/exe")
        .args(args)
        .stdout(Stdio::piped())
        .spawn()
        .or_say("another process")
}

fn locked_elsewhere(kind: &str, path: &Path) -> Result<bool, String> {
    let child = another(&["posix-lock", kind, &path.to_string_lossy()])?;
    let out = child.wait_with_output().or_say("another process")?;
    let said = String::from_utf8_lossy(&out.stdout);
    match said.trim() {
        "\"locked\"" => Ok(true),
        "\"free\"" => Ok(false),
        other => Err(format!("another process said {other}")),
    }
}

fn flock(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = File::create(&path).or_say("create")?;
    let held =
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| format!("flock: {e}"))?;
    same("held lock", locked_elsewhere("flock", &path)?, true)?;
    let _file = held.unlock().map_err(|(_, e)| format!("unlock: {e}"))?;
    same("released lock", locked_elsewhere("flock", &path)?, false)
}

fn fcntl_locks(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let mut file = File::create(&path).or_say("create")?;
    file.write_all(&[0; 100]).or_say("write")?;
    fcntl(&file, FcntlArg::F_SETLK(&record(libc::F_WRLCK))).or_say("F_SETLK")?;
    same("held lock", locked_elsewhere("fcntl", &path)?, true)?;
    fcntl(&file, FcntlArg::F_SETLK(&record(libc::F_UNLCK))).or_say("F_UNLCK")?;
    same("released lock", locked_elsewhere("fcntl", &path)?, false)
}

/// A lock of the first ten bytes of a file.
fn record(kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 10,
        l_pid: 0,
    }
}

fn stay(mark: &str) {
    File::create(mark).expect("the mark");
    loop {
        nix::unistd::pause();
    }
}

/// Takes a lock, makes the file `mark`, and stays.
pub(crate) fn hold(kind: &str, path: &str, mark: &str) {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(false).open(path);
    let file = file.expect("the file");
    if kind == "fcntl" {
        fcntl(&file, FcntlArg::F_SETLK(&record(libc::F_WRLCK))).expect("fcntl");
        return stay(mark);
    }
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e);
    let _held = lock.expect("flock");
    stay(mark);
}

/// Waits for a lock, and reports that it has it.
pub(crate) fn wait(kind: &str, path: &str) {
    let file = File::options().read(true).write(true).open(path).expect("the file");
    if kind == "fcntl" {
        fcntl(&file, FcntlArg::F_SETLKW(&record(libc::F_WRLCK))).expect("fcntl");
        return println!("locked");
    }
    let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e);
    let _held = lock.expect("flock");
    println!("locked");
}

/// The state of a lock: `locked` if another process holds it, `free`, or an error.
pub(crate) fn try_lock(kind: &str, path: &str) -> Value {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(e) => return json!(e.to_string()),
    };
    let outcome = if kind == "flock" {
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map(drop).map_err(|(_, e)| e)
    } else {
        fcntl(&file, FcntlArg::F_SETLK(&record(libc::F_WRLCK))).map(drop)
    };
    match outcome {
        Ok(()) => json!("free"),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => json!("locked"),
        Err(e) => json!(e.to_string()),
    }
}

/// Appends 500 lines of 64 bytes, each 63 times `mark`.
pub(crate) fn append(path: &str, mark: &str) {
    let mut file = File::options().append(true).open(path).expect("open to append");
    let line = format!("{}\n", mark.repeat(63));
    for _ in 0..500 {
        file.write_all(line.as_bytes()).expect("append");
    }
}
