//! Descriptors of the caller that a process in the guest is to have beyond its standard streams. They
//! cannot be passed into a microVM, but what goes through some of them can.

use std::{
    fmt,
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use rustix::{
    fs::{FileType, OFlags, fcntl_getfl, fstat, makedev},
    io::{FdFlags, fcntl_getfd, fcntl_setfd},
    net::{
        SocketType, getpeername,
        sockopt::{socket_acceptconn, socket_type},
    },
};
use serde::{Deserialize, Serialize};

use isopod_protocol::MAX_FURTHER_STREAMS;

use crate::error::{Error, Explain, Result};

/// The first after the standard streams.
const FIRST: RawFd = 3;

/// A descriptor whose bytes are relayed. Neither read nor written, it is `/dev/null`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preserved {
    number: RawFd,
    /// The process reads what comes from it.
    pub(super) input: bool,
    /// What the process writes goes to it.
    pub(super) output: bool,
    /// It is a socket.
    pub(super) socket: bool,
}

/// Looks at the first `count` descriptors after the standard streams, as the caller of this program
/// has opened them.
///
/// # Errors
///
/// If one is not open, or cannot be relayed.
pub fn find(count: usize) -> Result<Vec<Preserved>> {
    if count > MAX_FURTHER_STREAMS {
        return Err(Error::new(format!(
            "{count} descriptors are to be preserved; a microVM can have {MAX_FURTHER_STREAMS}"
        )));
    }
    (FIRST..).take(count).map(look).collect()
}

fn look(number: RawFd) -> Result<Preserved> {
    // SAFETY: borrowed for this function, which asks only; if it is not open, the first call says so.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    // What this program has opened itself does not survive an execve, so the caller's has not this flag.
    match fcntl_getfd(fd) {
        Ok(flags) if !flags.contains(FdFlags::CLOEXEC) => {}
        _ => {
            return Err(Error::new(format!(
                "descriptor {number} is to be preserved, but it is not open"
            )));
        }
    }
    let what = || format!("cannot look at descriptor {number}");
    let stat = fstat(fd).explain(what)?;
    let access = fcntl_getfl(fd).explain(what)? & OFlags::ACCMODE;
    let both = Preserved { number, input: true, output: true, socket: false };
    let refusal = |kind: Kind| {
        Err(Error::new(format!(
            "descriptor {number} is {kind}, which cannot be passed into a microVM: pipes, connected \
             stream sockets and terminals can"
        )))
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo if access == OFlags::RDONLY => Ok(Preserved { output: false, ..both }),
        FileType::Fifo if access == OFlags::WRONLY => Ok(Preserved { input: false, ..both }),
        FileType::Fifo => refusal(Kind("a named pipe that is open for both directions")),
        FileType::CharacterDevice if stat.st_rdev == makedev(1, 3) => {
            Ok(Preserved { input: false, output: false, ..both })
        }
        FileType::CharacterDevice if rustix::termios::isatty(fd) => Ok(both),
        FileType::Socket => match socket_type(fd).explain(what)? {
            SocketType::STREAM if socket_acceptconn(fd).unwrap_or(false) => {
                refusal(Kind("a listening socket"))
            }
            SocketType::STREAM if getpeername(fd).is_err() => {
                refusal(Kind("a socket without a connection"))
            }
            SocketType::STREAM => Ok(Preserved { socket: true, ..both }),
            _ => refusal(Kind("a socket for datagrams")),
        },
        FileType::RegularFile => refusal(Kind("a regular file")),
        FileType::Directory => refusal(Kind("a directory")),
        FileType::CharacterDevice | FileType::BlockDevice => refusal(Kind("a device")),
        _ => refusal(Kind("an object of the kernel")),
    }
}

/// What a descriptor is, for a person.
struct Kind(&'static str);

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Preserved {
    /// Its number, which is the same in every process that inherits it.
    pub fn number(self) -> RawFd {
        self.number
    }

    /// Keeps it from the programs that this process executes.
    ///
    /// # Errors
    ///
    /// If it is not open.
    pub(super) fn guard(self) -> Result<()> {
        // SAFETY: borrowed for one call, which fails if the descriptor is not open.
        let fd = unsafe { BorrowedFd::borrow_raw(self.number) };
        fcntl_setfd(fd, FdFlags::CLOEXEC)
            .explain(|| format!("descriptor {} cannot be used", self.number))
    }

    /// Takes it over, to be closed.
    ///
    /// # Errors
    ///
    /// If it is not open.
    pub fn take(self) -> Result<OwnedFd> {
        self.guard()?;
        // SAFETY: it is open, as has just been seen. It was inherited under this number, so nothing
        // in this process has opened it and owns it, and whoever calls this does so once.
        Ok(unsafe { OwnedFd::from_raw_fd(self.number) })
    }
}

/// How many descriptors a service manager has passed to this very process (sd_listen_fds(3)).
pub fn listen_fds() -> usize {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<usize>().ok());
    let own = usize::try_from(std::process::id()).ok();
    if number("LISTEN_PID") == own { number("LISTEN_FDS").unwrap_or(0) } else { 0 }
}
