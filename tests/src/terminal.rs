//! Pseudo-terminals: a person's, and the container's, which comes over a console socket.

use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::deadline::DEADLINE;
use crate::reader::Reader;

mod ioctl {
    nix::ioctl_write_ptr_bad!(
        #[doc = "Sets the size of a terminal, and tells its foreground processes (SIGWINCH)."]
        set_window_size,
        libc::TIOCSWINSZ,
        nix::pty::Winsize
    );
}

/// The master of a pseudo-terminal.
#[derive(Debug)]
pub struct Terminal {
    master: std::fs::File,
    /// The terminal's output.
    pub screen: Reader,
}

impl Terminal {
    /// Wraps a master.
    pub fn new(master: OwnedFd) -> Self {
        let copy = master.try_clone().expect("a descriptor");
        Self { master: master.into(), screen: Reader::new(copy) }
    }

    /// A new terminal of this size, and its slave for a program.
    pub fn open(columns: u16, rows: u16) -> (Self, OwnedFd) {
        let OpenptyResult { master, slave } =
            openpty(&window(columns, rows), None).expect("cannot make a pseudo-terminal");
        (Self::new(master), slave)
    }

    /// Changes the size, as dragging a window's border does.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = window(columns, rows);
        // SAFETY: TIOCSWINSZ reads one `winsize`, and `size` is one that lives across the call.
        unsafe { ioctl::set_window_size(self.master.as_raw_fd(), &raw const size) }
            .expect("cannot resize the terminal");
    }

    /// Types `text`.
    pub fn keys(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("cannot write to the terminal");
    }
}

fn window(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// The listening socket to which a runtime sends the master of a container's terminal.
#[derive(Debug)]
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Listens in `dir`.
    pub fn bind(dir: &Path) -> Self {
        let path = dir.join("console");
        let listener = UnixListener::bind(&path).expect("cannot bind a console socket");
        Self { listener, path }
    }

    /// The path for `--console-socket`.
    pub fn path(&self) -> &str {
        self.path.to_str().expect("a path of text")
    }

    /// Receives a terminal from the runtime.
    #[track_caller]
    pub fn terminal(&self) -> Terminal {
        readable(&self.listener, "a connection to the console socket");
        let (stream, _) = self.listener.accept().expect("accept");
        readable(&stream, "a descriptor on the console socket");
        let (fd, _) = receive(&stream).expect("no descriptor came over the console socket");
        Terminal::new(fd)
    }

    /// Receives a descriptor of any kind from the runtime, and the text with it.
    #[track_caller]
    pub fn descriptor(&self) -> (OwnedFd, String) {
        readable(&self.listener, "a connection to the socket");
        let (stream, _) = self.listener.accept().expect("accept");
        readable(&stream, "a descriptor on the socket");
        receive(&stream).expect("no descriptor came over the socket")
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[track_caller]
fn readable(fd: &impl AsFd, what: &str) {
    let timeout = PollTimeout::try_from(DEADLINE).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    assert!(poll(&mut fds, timeout).expect("poll") > 0, "waited {DEADLINE:?} for {what}");
}

fn receive(stream: &UnixStream) -> io::Result<(OwnedFd, String)> {
    let mut name = [0; 4096];
    let mut iov = [IoSliceMut::new(&mut name)];
    let mut space = cmsg_space!([i32; 4]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just made these descriptors for this process, and nothing else
            // knows their numbers.
            received.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let length = message.bytes;
    let text = String::from_utf8_lossy(&name[..length]).into_owned();
    match <[OwnedFd; 1]>::try_from(received) {
        Ok([fd]) => Ok((fd, text)),
        Err(fds) => Err(io::Error::other(format!("{} descriptors instead of one", fds.len()))),
    }
}
