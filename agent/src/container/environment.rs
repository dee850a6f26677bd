//! The environment of a process.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, openat};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Bytes of a passwd file that are read at most. The image is hostile, and the buffer counts as the
/// container's memory.
const MAX_PASSWD: u64 = 4 << 20;

/// Refuses entries that are not NAME=VALUE.
pub(crate) fn check(env: &[String], field: &str) -> Result<()> {
    for (i, entry) in env.iter().enumerate() {
        let why = match entry.split_once('=') {
            Some(("", _)) => "has no name in front of its '='",
            Some(_) => continue,
            None => "has no '='; entries are NAME=VALUE",
        };
        return Err(Error::invalid(format!("{field}[{i}]"), format!("{entry:?} {why}")));
    }
    Ok(())
}

/// The environment for `execve`: each name once, with the value of its last entry.
///
/// Most programs use the first of two entries, but callers append an entry to override. A missing
/// or empty `HOME` is set from `passwd`.
pub(crate) fn complete(env: &[String], uid: u32, passwd: &Path) -> Vec<String> {
    let mut places: HashMap<&str, usize> = HashMap::with_capacity(env.len());
    let mut complete: Vec<String> = Vec::with_capacity(env.len() + 1);
    for entry in env {
        let name = name(entry);
        match places.get(name) {
            Some(&place) => complete[place].clone_from(entry),
            None => {
                places.insert(name, complete.len());
                complete.push(entry.clone());
            }
        }
    }
    let home = places.get("HOME").copied();
    if home.is_none_or(|place| complete[place] == "HOME=") {
        let entry = format!("HOME={}", home_of(uid, passwd));
        match home {
            Some(place) => complete[place] = entry,
            None => complete.push(entry),
        }
    }
    complete
}

fn name(entry: &str) -> &str {
    entry.split_once('=').map_or(entry, |(name, _)| name)
}

/// The home directory of a user by the image's own passwd file, or `/`.
fn home_of(uid: u32, passwd: &Path) -> String {
    let text = read_file(passwd).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let home = text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let found = fields.len() >= 6 && fields[2].parse() == Ok(uid) && !fields[5].is_empty();
        found.then(|| fields[5].to_owned())
    });
    home.unwrap_or_else(|| "/".into())
}

/// Reads the start of a regular file. Anything else in its place, such as a FIFO, could block the
/// read or make it endless.
fn read_file(path: &Path) -> std::io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = openat(CWD, path, flags, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL.into());
    }
    let mut bytes = Vec::new();
    std::fs::File::from(file).take(MAX_PASSWD).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(env: &[&str]) -> Vec<String> {
        env.iter().map(|&entry| entry.to_owned()).collect()
    }

    #[test]
    fn the_last_of_each_name_wins() {
        let env = owned(&["TERM=a", "PATH=/bin", "HOME=/h", "TERM=b=c", "PATHS=x", "TERM="]);
        let none = Path::new("/nowhere");
        assert_eq!(complete(&env, 0, none), ["TERM=", "PATH=/bin", "HOME=/h", "PATHS=x"]);
    }

    #[test]
    fn what_is_no_variable_is_refused_by_index() {
        assert!(check(&owned(&["A=", "B=x=y"]), "env").is_ok());
        let e = check(&owned(&["A=b", "PLAIN"]), "env").unwrap_err();
        assert_eq!(e.message, r#"env[1]: "PLAIN" has no '='; entries are NAME=VALUE"#);
        let e = check(&owned(&["=x"]), "env").unwrap_err();
        assert_eq!(e.message, r#"env[0]: "=x" has no name in front of its '='"#);
    }

    #[test]
    fn home_is_found_by_uid() {
        let path = std::env::temp_dir().join(format!("isopod-passwd-{}", std::process::id()));
        std::fs::write(&path, "root:x:0:0::/root:/bin/sh\nbad\nu:x:7:7:U:/home/u:/bin/sh\n")
            .unwrap();
        assert_eq!(complete(&[], 7, &path), ["HOME=/home/u"]);
        assert_eq!(complete(&owned(&["HOME=/h", "HOME=", "A=b"]), 8, &path), ["HOME=/", "A=b"]);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn only_regular_files_are_read() {
        let path = std::env::temp_dir().join(format!("isopod-fifo-{}", std::process::id()));
        rustix::fs::mkfifoat(CWD, &path, Mode::RUSR).unwrap();
        assert_eq!(home_of(0, &path), "/");
        std::fs::remove_file(path).unwrap();
        assert_eq!(home_of(0, Path::new("/dev/zero")), "/");
    }
}
