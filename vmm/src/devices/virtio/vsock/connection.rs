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

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::packet::{MAX_DATA_LEN, Ports, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::state::{ConnectionState, StreamState};
use crate::devices::virtio::chain::{Buffers, returned};

/// Bytes of a guest's data that the host side buffers for a slow reader.
pub(super) const BUF_ALLOC: u32 = 256 * 1024;

/// Bytes of freed room after which the guest gets its credit.
const CREDIT_STEP: u32 = BUF_ALLOC / 4;

/// Longest `CONNECT <port>\n` line.
const CONNECT_LINE_LEN: usize = 32;

/// Error of a stream that broke a rule, or whose host end is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken;

/// Packets without data that the guest must get.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Announce {
    pub(super) request: bool,
    pub(super) response: bool,
    pub(super) credit: bool,
}

pub(super) struct Connection {
    pub(super) state: StreamState,
    pub(super) ports: Ports,
    pub(super) announce: Announce,
    /// True while the muxer lists the stream among those with a packet for the guest.
    pub(super) listed: bool,
    pub(super) opened_by_guest: bool,
    stream: UnixStream,
    /// True if the host socket may have more data (its epoll is edge-triggered).
    readable: bool,

    backlog: VecDeque<u8>,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    announced: Wrapping<u32>,
    /// True if the guest sends no more. The host socket is shut down once the backlog is empty.
    guest_send_closed: bool,
    host_write_shut: bool,

    sent: Wrapping<u32>,
    peer_buf_alloc: u32,
    peer_forwarded: Wrapping<u32>,
    guest_receive_closed: bool,
    host_eof: bool,
    /// True if the host's process reads no more. Later data of the guest is dropped.
    host_receive_closed: bool,
    /// Shutdown flags that the guest has got.
    told: u32,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, ports: Ports, state: StreamState) -> Self {
        Self {
            state,
            ports,
            announce: Announce::default(),
            listed: false,
            opened_by_guest: state == StreamState::Open,
            stream,
            readable: false,
            backlog: VecDeque::new(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            guest_send_closed: false,
            host_write_shut: false,
            sent: Wrapping(0),
            peer_buf_alloc: 0,
            peer_forwarded: Wrapping(0),
            guest_receive_closed: false,
            host_eof: false,
            host_receive_closed: false,
            told: 0,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Reads the `CONNECT` line and nothing behind it. `Ok(None)` while the line is incomplete.
    pub(super) fn read_connect_line(&mut self) -> Result<Option<u32>, Broken> {
        let mut peeked = [0u8; CONNECT_LINE_LEN];
        let len = match peek(&self.stream, &mut peeked) {
            Ok(0) => return Err(Broken),
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(_) => return Err(Broken),
        };
        let Some(end) = peeked[..len].iter().position(|b| *b == b'\n') else {
            return if len == CONNECT_LINE_LEN { Err(Broken) } else { Ok(None) };
        };
        let line = &mut peeked[..=end];
        (&self.stream).read_exact(line).map_err(|_| Broken)?;
        let port = std::str::from_utf8(&line[..end])
            .ok()
            .and_then(|text| text.strip_prefix("CONNECT "))
            .and_then(|port| port.trim_end_matches('\r').parse().ok());
        // Data behind the line may be there already, and causes no further event.
        self.readable = true;
        port.map(Some).ok_or(Broken)
    }

    /// Opens the stream after the guest has accepted the host's request.
    pub(super) fn open(&mut self) -> Result<(), Broken> {
        self.state = StreamState::Open;
        // The socket is new and its buffer empty, so the write is complete.
        (&self.stream).write_all(format!("OK {}\n", self.ports.host).as_bytes()).map_err(|_| Broken)
    }

    /// Takes the credit from a packet of the guest.
    pub(super) fn update_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buf_alloc = buf_alloc;
        self.peer_forwarded = Wrapping(fwd_cnt);
    }

    /// Returns the number of bytes that the guest can take.
    fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub((self.sent - self.peer_forwarded).0)
    }

    /// Writes data of the guest to the host socket, or buffers what the socket does not take.
    pub(super) fn receive(&mut self, mut data: Buffers<'_>) -> Result<(), Broken> {
        self.received += data.len() as u32;
        if (self.received - self.forwarded).0 > BUF_ALLOC || self.guest_send_closed {
            return Err(Broken);
        }
        while self.backlog.is_empty() && !data.is_empty() && !self.host_receive_closed {
            match write(&self.stream, &data) {
                Ok(written) => {
                    self.forwarded += written as u32;
                    data.split_to(written).ok_or(Broken)?;
                }
                Err(e) => match blocked(e.kind()) {
                    Some(true) => break,
                    Some(false) => {}
                    None => self.close_host_receive(),
                },
            }
        }
        if self.host_receive_closed {
            self.forwarded = self.received;
        } else if !data.is_empty() {
            self.backlog.extend(data.to_vec());
        }
        self.note_credit();
        Ok(())
    }

    /// Writes more of the backlog to the host socket.
    pub(super) fn flush(&mut self) {
        while !self.backlog.is_empty() {
            match self.stream.write(self.backlog.as_slices().0) {
                Ok(written) => {
                    self.backlog.drain(..written);
                    self.forwarded += written as u32;
                }
                Err(e) => match blocked(e.kind()) {
                    Some(true) => break,
                    Some(false) => {}
                    None => self.close_host_receive(),
                },
            }
        }
        if self.backlog.is_empty() {
            self.backlog.shrink_to(0);
        }
        self.note_credit();
        self.pass_on_shutdown();
    }

    /// Handles the close of the host's end. Earlier data of the host may still be on its way to the
    /// guest. The guest's data has no receiver.
    fn close_host_receive(&mut self) {
        self.host_receive_closed = true;
        self.backlog.clear();
        self.forwarded = self.received;
    }

    fn note_credit(&mut self) {
        self.announce.credit |= (self.forwarded - self.announced).0 >= CREDIT_STEP;
    }

    fn pass_on_shutdown(&mut self) {
        if self.guest_send_closed && self.backlog.is_empty() && !self.host_write_shut {
            self.host_write_shut = true;
            // The call fails only if the peer is gone.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// Handles the guest's shutdown of one or both directions.
    pub(super) fn guest_shutdown(&mut self, flags: u32) {
        self.guest_send_closed |= flags & SHUTDOWN_SEND != 0;
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_receive_closed {
            self.guest_receive_closed = true;
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.pass_on_shutdown();
    }

    /// Returns true if both directions are done. The guest then waits for its reset, for at most 8
    /// seconds. So the reset does not wait until a slow host process has read the backlog.
    pub(super) fn is_finished(&self) -> bool {
        self.guest_send_closed && (self.guest_receive_closed || self.told & SHUTDOWN_SEND != 0)
    }

    /// Returns true if data of the guest has still to reach the host.
    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Ends the stream, except for its backlog.
    pub(super) fn drain(&mut self) {
        self.state = StreamState::Draining;
        self.guest_send_closed = true;
        self.pass_on_shutdown();
    }

    /// Notes that the host socket is readable, or has hung up.
    pub(super) fn set_readable(&mut self, hung_up: bool) {
        self.readable = true;
        if hung_up {
            self.close_host_receive();
        }
    }

    /// Returns true if the stream has, or may have, a packet for the guest.
    pub(super) fn wants_to_send(&self) -> bool {
        match self.state {
            StreamState::Handshake | StreamState::Draining => false,
            StreamState::Requested => self.announce.request,
            StreamState::Open => {
                let announce = self.announce.response || self.announce.credit;
                let data = self.readable
                    && !self.host_eof
                    && !self.guest_receive_closed
                    && self.credit() > 0;
                announce || data || self.untold_shutdown() != 0
            }
        }
    }

    /// Returns the shutdown flags that the guest has still to get.
    pub(super) fn untold_shutdown(&self) -> u32 {
        let send = if self.host_eof { SHUTDOWN_SEND } else { 0 };
        let receive = if self.host_receive_closed { SHUTDOWN_RECEIVE } else { 0 };
        (send | receive) & !self.told
    }

    pub(super) fn set_told(&mut self, flags: u32) {
        self.told |= flags;
    }

    /// Reads from the host socket into `room`, which is not empty, within the guest's credit.
    /// `Ok(0)` if no data is there now, or if none will come. [`Self::untold_shutdown`] shows the
    /// latter.
    pub(super) fn read_for_guest(&mut self, room: &Buffers<'_>) -> Result<u32, Broken> {
        let max = self.credit().min(MAX_DATA_LEN) as usize;
        if max == 0 || !self.readable || self.host_eof || self.guest_receive_closed {
            return Ok(0);
        }
        loop {
            match read(&self.stream, room, max) {
                Ok(0) => {
                    self.host_eof = true;
                    return Ok(0);
                }
                Ok(read) => {
                    self.sent += read as u32;
                    return Ok(read as u32);
                }
                Err(e) => match blocked(e.kind()) {
                    Some(true) => {
                        self.readable = false;
                        return Ok(0);
                    }
                    Some(false) => {}
                    None => return Err(Broken),
                },
            }
        }
    }

    /// Returns the state, without the socket.
    pub(super) fn state(&self) -> ConnectionState {
        ConnectionState {
            state: self.state,
            host_port: self.ports.host,
            guest_port: self.ports.guest,
            opened_by_guest: self.opened_by_guest,
            announce_request: self.announce.request,
            announce_response: self.announce.response,
            announce_credit: self.announce.credit,
            backlog: self.backlog.iter().copied().collect(),
            received: self.received.0,
            forwarded: self.forwarded.0,
            announced: self.announced.0,
            guest_send_closed: self.guest_send_closed,
            host_write_shut: self.host_write_shut,
            sent: self.sent.0,
            peer_buf_alloc: self.peer_buf_alloc,
            peer_forwarded: self.peer_forwarded.0,
            guest_receive_closed: self.guest_receive_closed,
            host_eof: self.host_eof,
            host_receive_closed: self.host_receive_closed,
            told: self.told,
        }
    }

    /// Returns `fwd_cnt` for a packet to the guest, and notes that the guest knows it.
    pub(super) fn announce_forwarded(&mut self) -> u32 {
        self.announced = self.forwarded;
        self.announce.credit = false;
        self.forwarded.0
    }
}

/// Returns `Some(true)` if the call would block, `Some(false)` if it was interrupted, otherwise
/// `None`.
fn blocked(kind: io::ErrorKind) -> Option<bool> {
    match kind {
        io::ErrorKind::WouldBlock => Some(true),
        io::ErrorKind::Interrupted => Some(false),
        _ => None,
    }
}

fn read(stream: &UnixStream, room: &Buffers<'_>, max: usize) -> io::Result<usize> {
    let iovecs = room.iovecs(max);
    // SAFETY: each iovec is a checked piece of guest memory, which stays mapped while the chain
    // borrows it. Only the guest reads the bytes written there.
    returned(unsafe { libc::readv(stream.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) })
}

fn write(stream: &UnixStream, data: &Buffers<'_>) -> io::Result<usize> {
    let iovecs = data.iovecs(usize::MAX);
    // SAFETY: as for reading. The guest may change the bytes meanwhile, which are its own.
    returned(unsafe { libc::writev(stream.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) })
}

fn peek(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is valid for writes of its length, and the descriptor is the stream's own.
    let result = unsafe {
        libc::recv(
            stream.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::MSG_PEEK | libc::MSG_DONTWAIT,
        )
    };
    returned(result)
}
