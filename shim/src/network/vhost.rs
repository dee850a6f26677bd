//! `/dev/vhost-net`: the host's kernel moves the packets of a tap instead of the VMM.

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

/// The device of vhost-net.
pub(crate) const DEVICE: &str = "/dev/vhost-net";

/// Descriptors of vhost-net for a tap, one for each queue pair.
#[derive(Debug)]
pub(super) enum Vhost {
    /// Open descriptors. Without such a device there are none, and the VMM moves the packets
    /// itself.
    Open(Vec<OwnedFd>),
    /// Descriptors that follow when the tap comes to be used. Each open descriptor makes the end of
    /// the microVM wait for a grace period of RCU.
    Late {
        pairs: u8,
        socket: UnixDatagram,
        /// The VMM's end of `socket`, until the VMM has it.
        theirs: Option<UnixDatagram>,
    },
}

impl Vhost {
    /// Opens descriptors for a tap of this many queue pairs that is used from the start.
    pub(super) fn open(pairs: u8) -> Result<Self> {
        open(pairs).map(Self::Open)
    }

    /// Makes the socket for a tap that may never be used.
    pub(super) fn late(pairs: u8) -> Result<Self> {
        if !Path::new(DEVICE).exists() {
            return Ok(Self::Open(Vec::new()));
        }
        let what = || "cannot make sockets".to_owned();
        let (socket, theirs) = UnixDatagram::pair().explain(what)?;
        // Nobody reads before the guest uses the device, so a send must not wait for room.
        socket.set_nonblocking(true).explain(what)?;
        Ok(Self::Late { pairs, socket, theirs: Some(theirs) })
    }

    /// Sends the descriptors to the VMM, if they did not come at first. To be called before the
    /// guest first uses the device.
    pub(super) fn follow(&self) -> Result<()> {
        let Self::Late { pairs, socket, .. } = self else { return Ok(()) };
        open(*pairs)?
            .iter()
            .try_for_each(|vhost| descriptor::send(socket, vhost, &[0]))
            .explain(|| format!("cannot send {DEVICE} to the VMM"))
    }

    /// Open descriptors, and the socket for those to come, for the VMM's configuration.
    pub(super) fn descriptors(&self) -> (Vec<RawFd>, Option<RawFd>) {
        match self {
            Self::Open(found) => (found.iter().map(AsRawFd::as_raw_fd).collect(), None),
            Self::Late { theirs, .. } => (Vec::new(), theirs.as_ref().map(AsRawFd::as_raw_fd)),
        }
    }

    /// Closes this process's copies, because the VMM has its own now.
    pub(super) fn hand_over(&mut self) {
        match self {
            Self::Open(found) => found.clear(),
            Self::Late { theirs, .. } => *theirs = None,
        }
    }
}

/// Opens one descriptor for each queue pair, or none if this host has no such device.
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
