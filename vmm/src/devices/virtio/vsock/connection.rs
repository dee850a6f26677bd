//! One stream between a guest socket and a host socket.
//!
//! ```text
//!   host opened:   Handshake --CONNECT line--> Requested --RESPONSE--> Open
//!   guest opened:                                                     Open
//!   Open --guest RST, or both ways shut--> Draining (only what the guest sent is left) --> gone
//! ```
//!
//! Flow control is virtio 1.2, 5.10.6.3: each side says how much it can buffer (`buf_alloc`) and how
//! much it has handed on (`fwd_cnt`); counters wrap.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::packet::{MAX_DATA_LEN, Ports, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::state::ConnectionState;
pub(super) use super::state::StreamState as State;
use crate::devices::virtio::chain::{Buffers, returned};

/// What the host side buffers of a guest's data, in bytes, when its reader is slow.
pub(super) const BUF_ALLOC: u32 = 256 * 1024;

/// The guest is told of freed room in steps of this many bytes.
const CREDIT_STEP: u32 = BUF_ALLOC / 4;

/// Longest `CONNECT <port>\n` line.
const CONNECT_LINE_LEN: usize = 32;

/// The stream broke a rule or its host end is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken;

/// What the guest has to be told, one packet each.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Announce {
    pub(super) request: bool,
    pub(super) response: bool,
    pub(super) credit: bool,
}

pub(super) struct Connection {
    pub(super) state: State,
    pub(super) ports: Ports,
    pub(super) announce: Announce,
    /// Is in the muxer's list of those with something for the guest.
    pub(super) listed: bool,
    pub(super) opened_by_guest: bool,
    stream: UnixStream,
    /// The host socket may have more to read (its epoll is edge-triggered).
    readable: bool,

    backlog: VecDeque<u8>,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    announced: Wrapping<u32>,
    /// The guest sends no more; the host socket is told when the backlog is gone.
    guest_send_closed: bool,
    host_write_shut: bool,

    sent: Wrapping<u32>,
    peer_buf_alloc: u32,
    peer_forwarded: Wrapping<u32>,
    guest_receive_closed: bool,
    host_eof: bool,
    /// The host's process takes nothing more: what the guest still sends is dropped.
    host_receive_closed: bool,
    /// Shutdown flags that the guest has been told.
    told: u32,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, ports: Ports, state: State) -> Self {
        Self {
            state,
            ports,
            announce: Announce::default(),
            listed: false,
            opened_by_guest: state == State::Open,
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

    /// Reads the `CONNECT` line and nothing behind it. `Ok(None)` while it is incomplete.
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
        // What follows the line may be there already, and is not announced again.
        self.readable = true;
        port.map(Some).ok_or(Broken)
    }

    /// The guest accepted what the host asked for.
    pub(super) fn open(&mut self) -> Result<(), Broken> {
        self.state = State::Open;
        // The socket is new and its buffer empty, so this cannot be cut short.
        (&self.stream).write_all(format!("OK {}\n", self.ports.host).as_bytes()).map_err(|_| Broken)
    }

    /// Takes the credit that comes with every packet of the guest.
    pub(super) fn update_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buf_alloc = buf_alloc;
        self.peer_forwarded = Wrapping(fwd_cnt);
    }

    /// How much the guest can take, in bytes.
    fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub((self.sent - self.peer_forwarded).0)
    }

    /// Hands data of the guest to the host socket, or keeps it until that can take it.
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

    /// The host socket can take more of the backlog.
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

    /// The host's process has closed its end. What it wrote before may still be on its way to the
    /// guest; the guest's data has nowhere to go.
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
            // A peer that is gone needs no telling.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// The guest shut down one or both directions.
    pub(super) fn guest_shutdown(&mut self, flags: u32) {
        self.guest_send_closed |= flags & SHUTDOWN_SEND != 0;
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_receive_closed {
            self.guest_receive_closed = true;
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.pass_on_shutdown();
    }

    /// Both directions are done: the guest waits for its reset, and not until a slow host process
    /// has read the backlog (it would give up after 8 seconds).
    pub(super) fn is_finished(&self) -> bool {
        self.guest_send_closed && (self.guest_receive_closed || self.told & SHUTDOWN_SEND != 0)
    }

    /// What the guest sent before it went has still to reach the host.
    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// No more packets come for this stream; only its backlog is left.
    pub(super) fn drain(&mut self) {
        self.state = State::Draining;
        self.guest_send_closed = true;
        self.pass_on_shutdown();
    }

    /// The host socket became readable, or hung up.
    pub(super) fn set_readable(&mut self, hung_up: bool) {
        self.readable = true;
        if hung_up {
            self.close_host_receive();
        }
    }

    /// The host's process has closed its end, or the guest may yet get data from it.
    pub(super) fn wants_to_send(&self) -> bool {
        match self.state {
            State::Handshake | State::Draining => false,
            State::Requested => self.announce.request,
            State::Open => {
                let announce = self.announce.response || self.announce.credit;
                let data = self.readable
                    && !self.host_eof
                    && !self.guest_receive_closed
                    && self.credit() > 0;
                announce || data || self.untold_shutdown() != 0
            }
        }
    }

    /// Shutdown flags that the guest has still to be told.
    pub(super) fn untold_shutdown(&self) -> u32 {
        let send = if self.host_eof { SHUTDOWN_SEND } else { 0 };
        let receive = if self.host_receive_closed { SHUTDOWN_RECEIVE } else { 0 };
        (send | receive) & !self.told
    }

    pub(super) fn set_told(&mut self, flags: u32) {
        self.told |= flags;
    }

    /// Fills `room`, which is not empty, from the host socket, as far as the guest's credit goes.
    /// `Ok(0)` when nothing is there for now, or no more will come; the latter shows in
    /// [`Self::untold_shutdown`].
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

    /// All of it but the socket.
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

    /// `fwd_cnt` for a packet to the guest, which thereby knows it.
    pub(super) fn announce_forwarded(&mut self) -> u32 {
        self.announced = self.forwarded;
        self.announce.credit = false;
        self.forwarded.0
    }
}

/// `Some(true)` when the call would block, `Some(false)` when it was interrupted, else `None`.
fn blocked(kind: io::ErrorKind) -> Option<bool> {
    match kind {
        io::ErrorKind::WouldBlock => Some(true),
        io::ErrorKind::Interrupted => Some(false),
        _ => None,
    }
}

fn read(stream: &UnixStream, room: &Buffers<'_>, max: usize) -> io::Result<usize> {
    let iovecs = room.iovecs(max);
    // SAFETY: each iovec is a checked piece of guest memory, which stays mapped for as long as the
    // chain borrows it; only the guest reads what is put there.
    returned(unsafe { libc::readv(stream.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) })
}

fn write(stream: &UnixStream, data: &Buffers<'_>) -> io::Result<usize> {
    let iovecs = data.iovecs(usize::MAX);
    // SAFETY: as for reading; the guest may change the bytes meanwhile, which are its own.
    returned(unsafe { libc::writev(stream.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) })
}

fn peek(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is valid for writes of its length, the descriptor is the stream's own.
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
