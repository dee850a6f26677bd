//! Terminals: sizes, and raw mode that ends again.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use rustix::termios::{self, OptionalActions, OutputModes, Termios};
use serde::{Deserialize, Serialize};

use crate::error::{Explain, Result};

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Number of characters in a line.
    pub columns: u16,
    /// Number of lines.
    pub rows: u16,
}

/// The host's side of a container's terminal.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Terminal {
    /// The terminal that this process inherited.
    Inherited {
        /// Size, if there is one. A terminal can be asked for although no stream is a terminal.
        size: Option<Size>,
    },
    /// A new terminal, whose master goes to the listener at this unix socket.
    Socket {
        /// The socket's path.
        path: PathBuf,
    },
}

/// The size of the terminal behind a descriptor, or `None` if it is not a terminal.
pub fn size(terminal: impl AsFd) -> Option<Size> {
    let size = termios::tcgetwinsize(terminal).ok()?;
    Some(Size { columns: size.ws_col, rows: size.ws_row })
}

/// The terminal that a person sits at: the first standard stream that is a terminal, or else the
/// controlling terminal.
pub fn of_this_process() -> Option<OwnedFd> {
    let streams = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    let stream = streams.into_iter().find(|stream| termios::isatty(stream));
    match stream {
        Some(stream) => stream.try_clone_to_owned().ok(),
        None => File::options().read(true).write(true).open("/dev/tty").ok().map(OwnedFd::from),
    }
}

/// Puts a terminal into raw mode for good: every byte passes through unchanged.
pub fn make_raw(terminal: impl AsFd) -> Result<()> {
    set_raw(terminal.as_fd(), false).map(drop)
}

fn set_raw(terminal: BorrowedFd<'_>, lines: bool) -> Result<Termios> {
    let before = termios::tcgetattr(terminal)
        .explain(|| "cannot read the settings of the terminal".into())?;
    let mut raw = before.clone();
    raw.make_raw();
    if lines {
        raw.output_modes.insert(OutputModes::OPOST);
    }
    termios::tcsetattr(terminal, OptionalActions::Now, &raw)
        .explain(|| "cannot set the terminal to raw mode".into())?;
    Ok(before)
}

/// A terminal in raw mode, until this is dropped. Output processing (`OPOST`) stays on: the guest's
/// end of the relay leaves newlines as they are, and this terminal makes lines of them.
#[derive(Debug)]
pub struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// Puts `terminal` into raw mode.
    pub fn enter(terminal: impl AsFd) -> Result<Self> {
        let terminal = terminal
            .as_fd()
            .try_clone_to_owned()
            .explain(|| "cannot duplicate the terminal's descriptor".into())?;
        let before = set_raw(terminal.as_fd(), true)?;
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
        let output = termios::tcgetattr(&slave).unwrap().output_modes;
        assert!(output.contains(OutputModes::OPOST | OutputModes::ONLCR));
        drop(raw);
        assert_eq!(modes(&slave), before);
        assert_eq!(size(&slave), Some(Size::default()));
        assert_eq!(size(std::fs::File::open("/dev/null").unwrap()), None);
    }
}
