//! Names of a container's users, from its own `/etc/passwd`.
//!
//! The file is read in the mount namespace of the container's sandbox process. The root of that
//! namespace is the container's root, with its volumes. The content is the container's, so it is
//! bounded and not trusted.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    os::fd::AsFd,
    thread,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2},
    io::Errno,
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

use crate::process_id::ProcessId;

/// User names by user id.
pub(super) type Names = HashMap<u32, String>;

/// Most bytes of a passwd file that are read.
const MAX_PASSWD: u64 = 4 << 20;

/// Longest name that useradd(8) makes.
const MAX_NAME: usize = 32;

/// Reads the names that a container has for its users, by its sandbox process. Empty if there is no
/// readable passwd file: users are shown by their numbers then.
pub(super) fn of_container(sandbox: ProcessId) -> Names {
    // A thread can enter a mount namespace once it shares its root with no other thread (setns(2)).
    let read = thread::Builder::new().spawn(move || read_passwd(sandbox));
    let text = read.and_then(|thread| {
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread failed")))
    });
    match text {
        Ok(text) => parse(&text),
        Err(error) => {
            log::debug!("the container's /etc/passwd: {error}");
            Names::new()
        }
    }
}

fn read_passwd(sandbox: ProcessId) -> io::Result<String> {
    let namespace = File::open(format!("/proc/{}/ns/mnt", sandbox.pid))?;
    // The process still lives, so the namespace is its own.
    if !sandbox.is_alive() {
        return Err(Errno::SRCH.into());
    }
    // SAFETY: with CLONE_FS only this thread's root and working directory become its own;
    // descriptors and memory stay shared.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = openat2(CWD, "/etc/passwd", flags, Mode::empty(), resolve)?;
    // Another kind of file, such as a FIFO, could block the reader or never end.
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL.into());
    }
    let mut bytes = Vec::new();
    File::from(file).take(MAX_PASSWD).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The first name of each user. A name with unusual characters is left out: it would break the
/// table.
fn parse(passwd: &str) -> Names {
    let mut names = Names::new();
    for line in passwd.lines() {
        let mut fields = line.split(':');
        let (Some(name), Some(uid)) = (fields.next(), fields.nth(1)) else { continue };
        let sound = |c: char| c.is_ascii_alphanumeric() || "._-$".contains(c);
        if let (Ok(uid), 1..=MAX_NAME, true) = (uid.parse(), name.len(), name.chars().all(sound)) {
            names.entry(uid).or_insert_with(|| name.to_owned());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_fit_into_a_table_are_taken() {
        let long = "x".repeat(33);
        let passwd = format!(
            "root:x:0:0:root:/root:/bin/sh\ntoor:x:0:0::/:\n\x1b[2J:x:1:1::/:\na b:x:2:2::/:\n\
             {long}:x:3:3::/:\nshort\n:x:4:4::/:\nalice:x:1000:1000::/home:/bin/sh\n"
        );
        let names = [(0, "root".to_owned()), (1000, "alice".to_owned())];
        assert_eq!(parse(&passwd), names.into());
    }
}
