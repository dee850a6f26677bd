//! Pseudo-terminals, from the container's own devpts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{OptionalActions, OutputModes, Winsize, tcgetattr, tcsetattr, tcsetwinsize};

use super::mounts;
use super::path::{self, Missing};
use crate::error::{Context as _, Result};

/// Columns and rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Size {
    pub(crate) columns: u16,
    pub(crate) rows: u16,
}

/// How a new terminal is to begin.
#[derive(Debug, Clone, Copy, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Screen {
    /// Its size, if that is known.
    pub(crate) size: Option<Size>,
    /// No carriage return is put before a newline.
    pub(crate) plain_newlines: bool,
}

/// Both ends of a pseudo-terminal.
pub(crate) struct Terminal {
    pub(crate) master: OwnedFd,
    pub(crate) slave: OwnedFd,
}

impl Terminal {
    /// Opens a new terminal of the devpts at `/dev/pts` below `root`.
    ///
    /// # Errors
    ///
    /// The container has no devpts there, or the kernel refuses.
    pub(crate) fn open(root: BorrowedFd<'_>) -> Result<Self> {
        let flags = OFlags::RDWR | OFlags::NOCTTY;
        let master = path::open(root, Path::new("/dev/pts/ptmx"), flags)
            .context(|| "open a terminal in the devpts that has to be mounted on /dev/pts")?;
        unlockpt(&master).context(|| "unlock the terminal")?;
        // By descriptor: the path of the other end may be anything in there.
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = ioctl_tiocgptpeer(&master, flags).context(|| "open the terminal")?;
        Ok(Self { master, slave })
    }

    /// Shows the terminal as the container's `/dev/console`.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn bind_console(&self, root: BorrowedFd<'_>) -> Result<()> {
        let what = || "bind the terminal on /dev/console";
        let target = path::open_or_make(root, Path::new("/dev/console"), Missing::File);
        let target = target.context(what)?;
        let tree = mounts::clone_tree(self.slave.as_fd(), Path::new(""), false).context(what)?;
        mounts::attach(tree, target).context(what)
    }
}

/// Has the terminal pass on newlines as they are written. The terminal at the other end of the relay puts
/// the carriage returns in, and where there is none they would be in the caller's data.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn keep_newlines(terminal: impl AsFd) -> Result<()> {
    let what = || "set the output modes of the terminal";
    let mut modes = tcgetattr(&terminal).context(what)?;
    modes.output_modes.remove(OutputModes::ONLCR);
    tcsetattr(terminal, OptionalActions::Now, &modes).context(what)
}

/// Sets the size that programs see, and tells them by SIGWINCH.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn resize(terminal: impl AsFd, size: Size) -> Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).context(|| "set the size of the terminal")
}
