//! Directories whose entries come and go.

use std::fs;
use std::path::Path;

use nix::dir::Dir;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use serde_json::Value;

/// The names in a directory in the order of readdir(3), `.` and `..` included.
pub(crate) fn list(dir: &str) -> Value {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let opened = Dir::open(dir, flags, Mode::empty()).expect("opendir");
    let name = |entry: nix::Result<nix::dir::Entry>| {
        Value::from(entry.expect("readdir").file_name().to_string_lossy())
    };
    opened.into_iter().map(name).collect()
}

/// Makes files in a directory and removes them again, without an end. Prints `changing` after the
/// first round. A round has a hundred files, so that entries within one listed piece change too.
pub(crate) fn churn(dir: &str) {
    let path = |number| Path::new(dir).join(format!("passing-{number}"));
    for round in 0_u64.. {
        for number in 0..100 {
            fs::write(path(number), "").expect("create");
        }
        for number in 0..100 {
            fs::remove_file(path(number)).expect("unlink");
        }
        if round == 0 {
            println!("changing");
        }
    }
}
