//! The host's side of a container's terminal for `--console-socket`: a pseudo-terminal whose master
//! goes to the caller over a unix socket, by runc's protocol.
//!
//! The guest has a pseudo-terminal of its own, which does all line editing and signals. The host's
//! is raw, and carries only bytes and the window size.

use std::{
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use rustix::{
    fs::{Mode, OFlags},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::{
    descriptor,
    error::{Explain, Result},
    terminal::{self, Size},
};

/// Makes a raw pseudo-terminal and sends the master to the listener at `socket`. The slave, which
/// is returned, becomes the controlling terminal of this process. So a change of its size arrives
/// as `SIGWINCH`.
pub(crate) fn make(socket: &Path, size: Option<Size>) -> Result<OwnedFd> {
    let what = || "cannot make a terminal".to_owned();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).explain(what)?;
    grantpt(&master).explain(what)?;
    unlockpt(&master).explain(what)?;
    let slave = ioctl_tiocgptpeer(&master, flags).explain(what)?;
    terminal::make_raw(&slave)?;
    if let Some(size) = size {
        let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&slave, size).explain(what)?;
    }
    rustix::process::ioctl_tiocsctty(&slave)
        .explain(|| "cannot take the terminal as the controlling one".into())?;
    let name = ptsname(&master, Vec::new()).explain(what)?;
    send(socket, &master, name.as_bytes())
        .explain(|| format!("cannot send the terminal to {}", socket.display()))?;
    Ok(slave)
}

/// Sends a descriptor to the listener at `path`, with `name` as the text of the message.
pub(crate) fn send(path: &Path, fd: &OwnedFd, name: &[u8]) -> std::io::Result<()> {
    descriptor::send(connect(path)?, fd, name)
}

/// Connects to a socket. The path may be longer than `sun_path` of a socket address (unix(7)).
fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let socket = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::MaybeUninit;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_descriptor_arrives_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let file = OwnedFd::from(std::fs::File::open("/dev/zero").unwrap());
        send(&path, &file, b"/dev/pts/7").unwrap();

        let (stream, _) = listener.accept().unwrap();
        let mut name = [0; 64];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [std::io::IoSliceMut::new(&mut name)];
        let message =
            rustix::net::recvmsg(&stream, &mut slices, &mut control, RecvFlags::empty()).unwrap();
        assert_eq!(&name[..message.bytes], b"/dev/pts/7");
        let received: Option<OwnedFd> = control.drain().find_map(|item| match item {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let received = received.unwrap();
        let link = format!("/proc/self/fd/{}", received.as_raw_fd());
        assert_eq!(std::fs::read_link(link).unwrap(), Path::new("/dev/zero"));
        assert!(send(&dir.path().join("none"), &file, b"x").is_err());
    }
}
