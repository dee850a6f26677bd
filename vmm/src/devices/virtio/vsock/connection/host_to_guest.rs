//! The direction from host to guest: bytes of the host socket become data packets for the guest.
//!
//! ```text
//!   the host sends:  Readable <--event, empty socket--> Idle
//!                    Readable --end of file--> Ended --SHUTDOWN--> EndedAndTold
//! ```
//!
//! Bytes stay in the host socket until the guest has room for them. So this direction has no
//! buffer.

use std::io;
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::socket::{Broken, uninterrupted};
use crate::devices::virtio::chain::{Buffers, returned};
use crate::devices::virtio::vsock::packet::{MAX_DATA_LEN, SHUTDOWN_SEND};

/// Progress of the host's data. The end is final (virtio 1.2, 5.10.6.5).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum HostSend {
    /// The socket was empty at the last read. Its next data causes an event.
    #[default]
    Idle,
    /// The socket may have more data. Its epoll is edge-triggered, so no event repeats this.
    Readable,
    /// The host's process sends no more, and the guest has still to get the shutdown.
    Ended,
    /// The guest has got the shutdown.
    EndedAndTold,
}

/// One direction of a stream, from the host socket to the guest. The counters wrap.
#[derive(Debug, Default)]
pub(super) struct HostToGuest {
    /// Bytes sent to the guest (`tx_cnt`).
    sent: Wrapping<u32>,
    /// Buffer size of the guest.
    peer_buf_alloc: u32,
    /// Bytes that the guest has handed on.
    peer_forwarded: Wrapping<u32>,
    host_send: HostSend,
    /// True if the guest receives no more. Data of the host then stays unread.
    guest_receive_closed: bool,
}

impl HostToGuest {
    // ---- credit (5.10.6.3) ----

    /// Takes the credit from a packet of the guest.
    pub(super) fn update_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buf_alloc = buf_alloc;
        self.peer_forwarded = Wrapping(fwd_cnt);
    }

    /// Returns the number of bytes that the guest can take. A guest that lies about its counter, or
    /// makes its buffer smaller than what is on its way, can take none.
    fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub((self.sent - self.peer_forwarded).0)
    }

    /// Returns the number of bytes sent to the guest.
    pub(super) fn sent(&self) -> Wrapping<u32> {
        self.sent
    }

    /// Returns the buffer size of the guest.
    pub(super) fn peer_buf_alloc(&self) -> u32 {
        self.peer_buf_alloc
    }

    /// Returns the number of bytes that the guest has handed on.
    pub(super) fn peer_forwarded(&self) -> Wrapping<u32> {
        self.peer_forwarded
    }

    // ---- data ----

    /// Notes that the host socket is readable, or has hung up. Either way a read shows what is left.
    pub(super) fn set_readable(&mut self) {
        if self.host_send == HostSend::Idle {
            self.host_send = HostSend::Readable;
        }
    }

    /// Returns true if the socket may have data, and the guest can take some.
    pub(super) fn may_send(&self) -> bool {
        self.host_send == HostSend::Readable && !self.guest_receive_closed && self.credit() > 0
    }

    /// Reads from the host socket into `room`, which is not empty, within the guest's credit
    /// (5.10.6.3.2). `Ok(0)` if no data is there now, or if none will come. [`Self::owes_shutdown`] shows the
    /// latter.
    pub(super) fn read(&mut self, socket: &UnixStream, room: &Buffers<'_>) -> Result<u32, Broken> {
        if !self.may_send() {
            return Ok(0);
        }
        let max = self.credit().min(MAX_DATA_LEN) as usize;
        let read = uninterrupted(|| read(socket, room, max)).map_err(|_| Broken)?;
        match read {
            Some(0) => self.host_send = HostSend::Ended,
            Some(len) => self.sent += len as u32,
            None => self.host_send = HostSend::Idle,
        }
        Ok(read.unwrap_or(0) as u32)
    }

    // ---- the end of the host's data ----

    /// Returns true if the host's process sends no more.
    pub(super) fn is_ended(&self) -> bool {
        matches!(self.host_send, HostSend::Ended | HostSend::EndedAndTold)
    }

    /// Returns true if the guest must still learn that the host's process sends no more.
    pub(super) fn owes_shutdown(&self) -> bool {
        self.host_send == HostSend::Ended
    }

    /// Returns the flag for a shutdown that the guest must still get, and notes that it gets it.
    pub(super) fn take_shutdown(&mut self) -> u32 {
        if !self.owes_shutdown() {
            return 0;
        }
        self.host_send = HostSend::EndedAndTold;
        self.told()
    }

    /// Returns the shutdown flag of this direction if the guest has got it, otherwise 0.
    pub(super) fn told(&self) -> u32 {
        if self.host_send == HostSend::EndedAndTold { SHUTDOWN_SEND } else { 0 }
    }

    // ---- the guest's refusal ----

    /// Handles the guest's refusal of more data. The host's process sees it when it writes.
    pub(super) fn close_by_guest(&mut self, socket: &UnixStream) {
        if !self.guest_receive_closed {
            self.guest_receive_closed = true;
            // The call fails only if the peer is gone.
            let _ = socket.shutdown(Shutdown::Read);
        }
    }

    /// Returns true if the guest receives no more.
    pub(super) fn is_closed_by_guest(&self) -> bool {
        self.guest_receive_closed
    }

    /// Returns true if the guest expects no more data.
    pub(super) fn is_done(&self) -> bool {
        self.guest_receive_closed || self.host_send == HostSend::EndedAndTold
    }
}

fn read(socket: &UnixStream, room: &Buffers<'_>, max: usize) -> io::Result<usize> {
    let iovecs = room.iovecs(max);
    // SAFETY: each iovec is a checked piece of guest memory, which stays mapped while the chain
    // borrows it. Only the guest reads the bytes written there.
    returned(unsafe { libc::readv(socket.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::super::tests::{GuestBuffer, sockets};
    use super::*;

    const ROOM: usize = 4096;

    /// Returns a half whose socket may have data, and whose guest has this much room.
    fn readable(buf_alloc: u32) -> HostToGuest {
        let mut half = HostToGuest::default();
        half.update_credit(buf_alloc, 0);
        half.set_readable();
        half
    }

    fn read(half: &mut HostToGuest, socket: &UnixStream) -> Result<u32, Broken> {
        half.read(socket, &GuestBuffer::holding(&[0; ROOM]).chain(true).writable)
    }

    #[test]
    fn credit_is_the_guests_buffer_less_what_is_on_its_way() {
        let mut half = HostToGuest::default();
        for (sent, buf_alloc, fwd_cnt, credit) in [
            (0, 0, 0, 0),
            (0, 1000, 0, 1000),
            (400, 1000, 0, 600),
            (400, 1000, 300, 900),
            (1000, 1000, 0, 0),
            // The counters wrap.
            (100, 1000, u32::MAX - 99, 800),
            (5, u32::MAX, 5, u32::MAX),
            // A smaller buffer, and more bytes handed on than were sent.
            (400, 399, 0, 0),
            (400, 1000, 401, 0),
        ] {
            half.sent = Wrapping(sent);
            half.update_credit(buf_alloc, fwd_cnt);
            assert_eq!(half.credit(), credit, "{sent} {buf_alloc} {fwd_cnt}");
        }
    }

    #[test]
    fn no_packet_is_larger_than_the_credit_or_the_room() {
        let (ours, mut host) = sockets();
        host.write_all(&[1; 3 * ROOM]).unwrap();
        let mut half = readable(ROOM as u32 + 10);
        assert_eq!(read(&mut half, &ours), Ok(ROOM as u32));
        assert_eq!(read(&mut half, &ours), Ok(10));
        assert_eq!((half.may_send(), read(&mut half, &ours)), (false, Ok(0)));
        // The data left needs no further event.
        half.update_credit(ROOM as u32 + 10, 7);
        assert_eq!((half.may_send(), read(&mut half, &ours)), (true, Ok(7)));
        assert_eq!(half.sent.0, ROOM as u32 + 17);
    }

    #[test]
    fn an_empty_socket_is_read_again_only_after_an_event() {
        let (ours, mut host) = sockets();
        let mut half = readable(1000);
        assert_eq!(read(&mut half, &ours), Ok(0));
        assert_eq!(half.host_send, HostSend::Idle);
        host.write_all(b"late").unwrap();
        assert_eq!((half.may_send(), read(&mut half, &ours)), (false, Ok(0)));
        half.set_readable();
        assert_eq!((half.may_send(), read(&mut half, &ours)), (true, Ok(4)));
        assert!(!half.owes_shutdown());
    }

    #[test]
    fn the_end_comes_behind_the_data_and_is_told_once() {
        let (ours, mut host) = sockets();
        host.write_all(b"last").unwrap();
        drop(host);
        let mut half = readable(4);
        assert_eq!((read(&mut half, &ours), read(&mut half, &ours)), (Ok(4), Ok(0)));
        // The end is found by a read, which needs credit.
        assert!(!half.is_ended());
        half.update_credit(4, 4);
        assert_eq!(read(&mut half, &ours), Ok(0));
        assert_eq!((half.is_ended(), half.owes_shutdown(), half.told()), (true, true, 0));
        assert!(!half.is_done());
        assert_eq!((half.take_shutdown(), half.take_shutdown()), (SHUTDOWN_SEND, 0));
        assert_eq!((half.is_ended(), half.told(), half.is_done()), (true, SHUTDOWN_SEND, true));
    }

    #[test]
    fn no_event_undoes_the_end() {
        let (ours, host) = sockets();
        drop(host);
        let mut half = readable(1000);
        assert_eq!(read(&mut half, &ours), Ok(0));
        for state in [HostSend::Ended, HostSend::EndedAndTold] {
            half.set_readable();
            assert_eq!((half.host_send, half.may_send()), (state, false));
            half.take_shutdown();
        }
    }

    #[test]
    fn a_guest_that_receives_no_more_gets_no_data() {
        let (ours, mut host) = sockets();
        host.write_all(b"unwanted").unwrap();
        let mut half = readable(1000);
        half.close_by_guest(&ours);
        assert_eq!((half.may_send(), read(&mut half, &ours)), (false, Ok(0)));
        assert_eq!((half.is_done(), half.is_ended(), half.sent.0), (true, false, 0));
        assert_eq!(host.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn an_end_before_the_guests_refusal_is_still_told() {
        let (ours, host) = sockets();
        drop(host);
        let mut half = readable(1000);
        assert_eq!(read(&mut half, &ours), Ok(0));
        half.close_by_guest(&ours);
        assert_eq!((half.owes_shutdown(), half.take_shutdown()), (true, SHUTDOWN_SEND));
    }

    #[test]
    fn a_host_that_leaves_data_unread_breaks_the_stream_behind_its_own_data() {
        let (mut ours, mut host) = sockets();
        ours.write_all(b"unread").unwrap();
        host.write_all(b"sent").unwrap();
        drop(host);
        let mut half = readable(1000);
        assert_eq!((read(&mut half, &ours), read(&mut half, &ours)), (Ok(4), Err(Broken)));
    }
}
