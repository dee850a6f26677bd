//! Terminals: raw mode that is given back, and sizes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::termios::{self, OptionalActions, Termios};
use serde::{Deserialize, Serialize};

use crate::error::{Explain, Result};

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// The size of the terminal behind a descriptor, or `None` if it is not a terminal.
pub fn size(terminal: impl AsFd) -> Option<Size> {
    let size = termios::tcgetwinsize(terminal).ok()?;
    Some(Size { columns: size.ws_col, rows: size.ws_row })
}

/// The first of the standard streams that is a terminal.
pub fn of_this_process() -> Option<BorrowedFd<'static>> {
    [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()]
        .into_iter()
        .find(|stream| termios::isatty(stream))
}

/// Puts a terminal into raw mode for good: every byte passes through unchanged.
///
/// # Errors
///
/// If it is not a terminal.
pub fn make_raw(terminal: impl AsFd) -> Result<()> {
    set_raw(terminal.as_fd()).map(drop)
}

fn set_raw(terminal: BorrowedFd<'_>) -> Result<Termios> {
    let before = termios::tcgetattr(terminal)
        .explain(|| "cannot read the settings of the terminal".into())?;
    let mut raw = before.clone();
    raw.make_raw();
    termios::tcsetattr(terminal, OptionalActions::Now, &raw)
        .explain(|| "cannot set the terminal to raw mode".into())?;
    Ok(before)
}

/// A terminal in raw mode, until this is dropped.
#[derive(Debug)]
pub struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// Puts `terminal` into raw mode.
    ///
    /// # Errors
    ///
    /// If it is not a terminal, or descriptors have run out.
    pub fn enter(terminal: impl AsFd) -> Result<Self> {
        let terminal = terminal
            .as_fd()
            .try_clone_to_owned()
            .explain(|| "cannot duplicate the terminal's descriptor".into())?;
        let before = set_raw(terminal.as_fd())?;
        Ok(Self { terminal, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no settings.
        let _ = termios::tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};

    #[test]
    fn raw_mode_is_given_back() {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        let modes = |fd: &OwnedFd| termios::tcgetattr(fd).unwrap().local_modes;
        let before = modes(&slave);
        let raw = RawMode::enter(&slave).unwrap();
        assert_ne!(modes(&slave), before);
        drop(raw);
        assert_eq!(modes(&slave), before);
        assert_eq!(size(&slave), Some(Size::default()));
        assert_eq!(size(std::fs::File::open("/dev/null").unwrap()), None);
    }
}
