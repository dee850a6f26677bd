//! Descriptors of the caller for a process in the guest, beyond its standard streams. They cannot
//! be passed into a microVM, but the bytes of some of them can be relayed.

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

/// The first descriptor after the standard streams.
const FIRST: RawFd = 3;

/// A descriptor whose bytes are relayed. One without input and output is `/dev/null`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preserved {
    number: RawFd,
    /// The process in the guest reads from it.
    pub(crate) input: bool,
    /// The process in the guest writes to it.
    pub(crate) output: bool,
    /// The descriptor is a socket.
    pub(crate) socket: bool,
}

/// Checks the first `count` descriptors after the standard streams, as the caller of this program
/// has opened them. A descriptor that is not open or cannot be relayed is an error.
pub fn find(count: usize) -> Result<Vec<Preserved>> {
    if count > MAX_FURTHER_STREAMS {
        return Err(Error::new(format!(
            "{count} descriptors are to be preserved; a microVM can have {MAX_FURTHER_STREAMS}"
        )));
    }
    (FIRST..).take(count).map(look).collect()
}

fn look(number: RawFd) -> Result<Preserved> {
    // SAFETY: borrowed for this function, which only asks. If the descriptor is not open, the first
    // call says so.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    // Descriptors that this program has opened itself are close-on-exec. Those of the caller are
    // not.
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

/// The kind of a descriptor, for a message.
struct Kind(&'static str);

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Preserved {
    /// Number of the descriptor, the same in every process that inherits it.
    pub fn number(self) -> RawFd {
        self.number
    }

    /// Keeps the descriptor from the programs that this process executes.
    pub(crate) fn guard(self) -> Result<()> {
        // SAFETY: borrowed for one call, which fails if the descriptor is not open.
        let fd = unsafe { BorrowedFd::borrow_raw(self.number) };
        fcntl_setfd(fd, FdFlags::CLOEXEC)
            .explain(|| format!("descriptor {} cannot be used", self.number))
    }

    /// Takes ownership of the descriptor, to close it.
    pub fn take(self) -> Result<OwnedFd> {
        self.guard()?;
        // SAFETY: the descriptor is open, as the line above has found. It was inherited under this
        // number, so nothing in this process has opened it and owns it. A caller takes a descriptor
        // once.
        Ok(unsafe { OwnedFd::from_raw_fd(self.number) })
    }
}

/// Number of descriptors that a service manager has passed to this very process (sd_listen_fds(3)).
pub fn listen_fds() -> usize {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<usize>().ok());
    let own = usize::try_from(std::process::id()).ok();
    if number("LISTEN_PID") == own { number("LISTEN_FDS").unwrap_or(0) } else { 0 }
}
