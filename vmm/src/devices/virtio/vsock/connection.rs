//! One stream between a guest socket and a host socket.
//!
//! ```text
//!   host opened:   Handshake --CONNECT line--> Requested --RESPONSE--> Open
//!   guest opened:                                                     Open
//!   Open --guest RST, or both ways shut--> Draining (only what the guest sent is left) --> gone
//! ```
//!
//! Flow control follows virtio 1.2, 5.10.6.3. Each side announces the size of its buffer
//! (`buf_alloc`) and the number of bytes handed on (`fwd_cnt`). The counters wrap.

mod guest_to_host;
mod host_to_guest;
mod socket;
#[cfg(test)]
mod tests;

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

pub(super) use self::guest_to_host::BUF_ALLOC;
use self::guest_to_host::GuestToHost;
use self::host_to_guest::HostToGuest;
pub(super) use self::socket::Broken;
use super::packet::{Ports, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::state::{ConnectionState, StreamState};
use crate::devices::virtio::chain::{Buffers, returned};

/// Longest `CONNECT <port>\n` line.
const CONNECT_LINE_LEN: usize = 32;

/// Packets without data that the guest must get.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Announce {
    pub(super) request: bool,
    pub(super) response: bool,
    pub(super) credit: bool,
}

/// A stream. Each direction is a type of its own. The packets to the guest carry news of both.
pub(super) struct Connection {
    pub(super) state: StreamState,
    pub(super) ports: Ports,
    pub(super) announce: Announce,
    /// True while the muxer lists the stream among those with a packet for the guest.
    pub(super) listed: bool,
    pub(super) opened_by_guest: bool,
    /// The host socket, which never blocks.
    socket: UnixStream,
    to_host: GuestToHost,
    to_guest: HostToGuest,
}

impl Connection {
    pub(super) fn new(socket: UnixStream, ports: Ports, state: StreamState) -> Self {
        Self {
            state,
            ports,
            announce: Announce::default(),
            listed: false,
            opened_by_guest: state == StreamState::Open,
            socket,
            to_host: GuestToHost::default(),
            to_guest: HostToGuest::default(),
        }
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    // ---- the opening ----

    /// Reads the `CONNECT` line and nothing behind it. `Ok(None)` while the line is incomplete.
    pub(super) fn read_connect_line(&mut self) -> Result<Option<u32>, Broken> {
        let mut peeked = [0u8; CONNECT_LINE_LEN];
        let len = match peek(&self.socket, &mut peeked) {
            Ok(0) => return Err(Broken),
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(_) => return Err(Broken),
        };
        let Some(end) = peeked[..len].iter().position(|b| *b == b'\n') else {
            return if len == CONNECT_LINE_LEN { Err(Broken) } else { Ok(None) };
        };
        let line = &mut peeked[..=end];
        (&self.socket).read_exact(line).map_err(|_| Broken)?;
        let port = std::str::from_utf8(&line[..end])
            .ok()
            .and_then(|text| text.strip_prefix("CONNECT "))
            .and_then(|port| port.trim_end_matches('\r').parse().ok());
        // Data behind the line may be there already, and causes no further event.
        self.to_guest.set_readable();
        port.map(Some).ok_or(Broken)
    }

    /// Opens the stream after the guest has accepted the host's request.
    pub(super) fn open(&mut self) -> Result<(), Broken> {
        self.state = StreamState::Open;
        // The socket is new and its buffer empty, so the write is complete.
        (&self.socket).write_all(format!("OK {}\n", self.ports.host).as_bytes()).map_err(|_| Broken)
    }

    // ---- from the guest ----

    /// Takes the credit from a packet of the guest.
    pub(super) fn update_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.to_guest.update_credit(buf_alloc, fwd_cnt);
    }

    /// Writes data of the guest to the host socket, or buffers what the socket does not take.
    pub(super) fn receive(&mut self, data: Buffers<'_>) -> Result<(), Broken> {
        self.to_host.receive(&self.socket, data)?;
        self.note_credit();
        Ok(())
    }

    /// Handles the guest's shutdown of one or both directions. Flags of earlier shutdowns stay set
    /// (5.10.6.5).
    pub(super) fn guest_shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.to_guest.close_by_guest(&self.socket);
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.to_host.close_by_guest(&self.socket);
        }
    }

    /// Returns true if both directions are done. The guest then waits for its reset (5.10.6.5),
    /// Linux for at most 8 seconds. So the reset does not wait until a slow host process has read
    /// the backlog.
    pub(super) fn is_finished(&self) -> bool {
        self.to_host.is_closed_by_guest() && self.to_guest.is_done()
    }

    /// Ends the stream, except for its backlog. The guest gets no more packets of it: it may use the
    /// ports again.
    pub(super) fn drain(&mut self) {
        self.state = StreamState::Draining;
        self.announce = Announce::default();
        self.to_host.close_by_guest(&self.socket);
    }

    // ---- from the host ----

    /// Notes that the host socket is readable, or has hung up. After a hang-up, earlier data of the
    /// host may still be on its way to the guest.
    pub(super) fn set_readable(&mut self, hung_up: bool) {
        self.to_guest.set_readable();
        if hung_up {
            self.to_host.close_by_host();
        }
    }

    /// Writes more of the backlog to the host socket.
    pub(super) fn flush(&mut self) {
        self.to_host.flush(&self.socket);
        self.note_credit();
    }

    /// Returns true if data of the guest has still to reach the host.
    pub(super) fn has_backlog(&self) -> bool {
        !self.to_host.backlog().is_empty()
    }

    fn note_credit(&mut self) {
        self.announce.credit |= self.to_host.owes_credit();
    }

    // ---- to the guest ----

    /// Returns true if the stream has, or may have, a packet for the guest.
    pub(super) fn wants_to_send(&self) -> bool {
        match self.state {
            StreamState::Handshake | StreamState::Draining => false,
            StreamState::Requested => self.announce.request,
            StreamState::Open => {
                let announce = self.announce.response || self.announce.credit;
                let shutdown = self.to_host.owes_shutdown() || self.to_guest.owes_shutdown();
                announce || self.to_guest.may_send() || shutdown
            }
        }
    }

    /// Reads from the host socket into `room`, which is not empty, within the guest's credit.
    /// `Ok(0)` if no data is there now, or if none will come. [`Self::take_shutdown`] shows the
    /// latter.
    pub(super) fn read_for_guest(&mut self, room: &Buffers<'_>) -> Result<u32, Broken> {
        self.to_guest.read(&self.socket, room)
    }

    /// Returns the shutdown flags that the guest has still to get, and notes that it gets them.
    pub(super) fn take_shutdown(&mut self) -> u32 {
        self.to_guest.take_shutdown() | self.to_host.take_shutdown()
    }

    /// Returns `fwd_cnt` for a packet to the guest, and notes that the guest knows it.
    pub(super) fn announce_forwarded(&mut self) -> u32 {
        self.announce.credit = false;
        self.to_host.announce()
    }

    /// Returns the state, without the socket.
    pub(super) fn state(&self) -> ConnectionState {
        let Self { to_host, to_guest, .. } = self;
        ConnectionState {
            state: self.state,
            host_port: self.ports.host,
            guest_port: self.ports.guest,
            opened_by_guest: self.opened_by_guest,
            announce_request: self.announce.request,
            announce_response: self.announce.response,
            announce_credit: self.announce.credit,
            backlog: to_host.backlog().iter().copied().collect(),
            received: to_host.received().0,
            forwarded: to_host.forwarded().0,
            announced: to_host.announced().0,
            guest_send_closed: to_host.is_closed_by_guest(),
            host_write_shut: to_host.is_shut_on_host(),
            sent: to_guest.sent().0,
            peer_buf_alloc: to_guest.peer_buf_alloc(),
            peer_forwarded: to_guest.peer_forwarded().0,
            guest_receive_closed: to_guest.is_closed_by_guest(),
            host_eof: to_guest.is_ended(),
            host_receive_closed: to_host.is_closed_by_host(),
            told: to_guest.told() | to_host.told(),
        }
    }
}

fn peek(socket: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is valid for writes of its length, and the descriptor is the socket's own.
    let result = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::MSG_PEEK | libc::MSG_DONTWAIT,
        )
    };
    returned(result)
}
