//! Pseudo-terminals from the container's own devpts.

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

/// Initial settings of a terminal.
#[derive(Debug, Clone, Copy, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Screen {
    /// Size, if it is known.
    pub(crate) size: Option<Size>,
    /// True to write newlines without a carriage return before them.
    pub(crate) plain_newlines: bool,
}

/// Both ends of a pseudo-terminal.
pub(crate) struct Terminal {
    pub(crate) master: OwnedFd,
    pub(crate) slave: OwnedFd,
}

impl Terminal {
    /// Opens a new terminal of the devpts at `/dev/pts` below `root`.
    pub(crate) fn open(root: BorrowedFd<'_>) -> Result<Self> {
        let flags = OFlags::RDWR | OFlags::NOCTTY;
        let master = path::open(root, Path::new("/dev/pts/ptmx"), flags)
            .context(|| "open a terminal in the devpts that has to be mounted on /dev/pts")?;
        unlockpt(&master).context(|| "unlock the terminal")?;
        // The slave is opened by descriptor, because its path in the container may lead anywhere.
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = ioctl_tiocgptpeer(&master, flags).context(|| "open the terminal")?;
        Ok(Self { master, slave })
    }

    /// Binds the terminal on the container's `/dev/console`.
    pub(crate) fn bind_console(&self, root: BorrowedFd<'_>) -> Result<()> {
        let what = || "bind the terminal on /dev/console";
        let target = path::open_or_make(root, Path::new("/dev/console"), Missing::File);
        let target = target.context(what)?;
        let tree = mounts::clone_tree(self.slave.as_fd(), Path::new(""), false).context(what)?;
        mounts::attach(tree, target).context(what)
    }
}

/// Turns off the translation of newlines. The terminal at the other end of the relay adds the
/// carriage returns. Without one there, they would end up in the caller's data.
pub(crate) fn keep_newlines(terminal: impl AsFd) -> Result<()> {
    let what = || "set the output modes of the terminal";
    let mut modes = tcgetattr(&terminal).context(what)?;
    modes.output_modes.remove(OutputModes::ONLCR);
    tcsetattr(terminal, OptionalActions::Now, &modes).context(what)
}

/// Sets the size that programs see. The kernel sends them SIGWINCH.
pub(crate) fn resize(terminal: impl AsFd, size: Size) -> Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).context(|| "set the size of the terminal")
}
