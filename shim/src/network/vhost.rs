//! `/dev/vhost-net`: the host's kernel moves the packets of a tap, so that the VMM need not.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixDatagram,
    },
    path::Path,
};

use crate::{
    descriptor,
    error::{Explain, Result},
};

/// The device by which the host's kernel moves packets.
pub(crate) const DEVICE: &str = "/dev/vhost-net";

/// The descriptors for a tap, one for each of its queue pairs.
#[derive(Debug)]
pub(super) enum Vhost {
    /// None, if this host has no such device: the VMM then moves the packets itself.
    Open(Vec<OwnedFd>),
    /// They follow if the tap comes to be used. Each one that is open makes the end of the microVM
    /// wait for a grace period of the kernel.
    Late {
        pairs: u8,
        socket: UnixDatagram,
        /// The VMM's end, until it has it.
        theirs: Option<UnixDatagram>,
    },
}

impl Vhost {
    /// For a tap of this many queue pairs that is used from the start.
    ///
    /// # Errors
    ///
    /// If the device is there and cannot be opened.
    pub(super) fn open(pairs: u8) -> Result<Self> {
        open(pairs).map(Self::Open)
    }

    /// For a tap that is perhaps never used.
    ///
    /// # Errors
    ///
    /// If there are no sockets to be had.
    pub(super) fn late(pairs: u8) -> Result<Self> {
        if !Path::new(DEVICE).exists() {
            return Ok(Self::Open(Vec::new()));
        }
        let what = || "cannot make sockets".to_owned();
        let (socket, theirs) = UnixDatagram::pair().explain(what)?;
        // Nobody reads before the guest uses the device, so this must not wait for room.
        socket.set_nonblocking(true).explain(what)?;
        Ok(Self::Late { pairs, socket, theirs: Some(theirs) })
    }

    /// Has the descriptors follow, if they did not come at first. To be done before the guest first
    /// uses the device.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub(super) fn follow(&self) -> Result<()> {
        let Self::Late { pairs, socket, .. } = self else { return Ok(()) };
        open(*pairs)?
            .iter()
            .try_for_each(|vhost| descriptor::send(socket, vhost, &[0]))
            .explain(|| format!("cannot send {DEVICE} to the VMM"))
    }

    /// As the VMM's configuration has them: those that are open, and the socket for those to come.
    pub(super) fn descriptors(&self) -> (Vec<RawFd>, Option<RawFd>) {
        match self {
            Self::Open(found) => (found.iter().map(AsRawFd::as_raw_fd).collect(), None),
            Self::Late { theirs, .. } => (Vec::new(), theirs.as_ref().map(AsRawFd::as_raw_fd)),
        }
    }

    /// The VMM has its own now.
    pub(super) fn hand_over(&mut self) {
        match self {
            Self::Open(found) => found.clear(),
            Self::Late { theirs, .. } => *theirs = None,
        }
    }
}

/// One descriptor for each queue pair; none if this host has no such device.
fn open(pairs: u8) -> Result<Vec<OwnedFd>> {
    let mut found = Vec::new();
    for _ in 0..pairs {
        match File::options().read(true).write(true).open(DEVICE) {
            Ok(file) => found.push(file.into()),
            Err(e) if is_missing(&e) => return Ok(Vec::new()),
            Err(e) => return Err(e).explain(|| format!("cannot open {DEVICE}")),
        }
    }
    Ok(found)
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO))
}
