//! The direction from guest to host: the guest's data packets become bytes of the host socket.
//!
//! ```text
//!   the guest sends:    Open --SHUTDOWN or RST--> Closed --empty backlog--> ShutOnHost
//!   the host receives:  Open --hang-up, or failed write--> Closed --SHUTDOWN--> ClosedAndTold
//! ```
//!
//! The two lines are independent. Three rules tie them to the data:
//!
//! - Every byte is in the backlog or forwarded, and the backlog is at most [`BUF_ALLOC`] long.
//! - The host sees the guest's end of data only behind the whole backlog.
//! - A host that reads no more leaves no backlog. Later data is dropped, and counts as forwarded.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::socket::{Broken, uninterrupted};
use crate::devices::virtio::chain::{Buffers, returned};
use crate::devices::virtio::vsock::packet::SHUTDOWN_RECEIVE;

/// Bytes of a guest's data that the host side buffers for a slow reader.
pub(in crate::devices::virtio::vsock) const BUF_ALLOC: u32 = 256 * 1024;

/// Bytes of freed room after which the guest gets its credit.
const CREDIT_STEP: u32 = BUF_ALLOC / 4;

/// Progress of the guest's end of data. Each step is final (virtio 1.2, 5.10.6.5).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum GuestSend {
    #[default]
    Open,
    /// The guest sends no more, and the host has still to get the backlog.
    Closed,
    /// The host socket is shut down for writing.
    ShutOnHost,
}

/// Progress of the host's refusal of data. Each step is final (virtio 1.2, 5.10.6.5).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum HostReceive {
    #[default]
    Open,
    /// The host's process reads no more, and the guest has still to get the shutdown.
    Closed,
    /// The guest has got the shutdown.
    ClosedAndTold,
}

/// One direction of a stream, from the guest to the host socket. The counters wrap.
#[derive(Debug, Default)]
pub(super) struct GuestToHost {
    /// Data that the host socket has not taken yet.
    backlog: VecDeque<u8>,
    /// Bytes received from the guest.
    received: Wrapping<u32>,
    /// Value of [`Self::forwarded`] that the guest knows.
    announced: Wrapping<u32>,
    guest_send: GuestSend,
    host_receive: HostReceive,
}

impl GuestToHost {
    // ---- data ----

    /// Writes data of the guest to the host socket, or buffers what the socket does not take.
    ///
    /// Data beyond the announced room breaks the stream (5.10.6.3.1), and so does data after the
    /// guest's shutdown (5.10.6.5).
    pub(super) fn receive(
        &mut self,
        socket: &UnixStream,
        mut data: Buffers<'_>,
    ) -> Result<(), Broken> {
        let buffered = self.backlog.len() + data.len();
        if buffered > BUF_ALLOC as usize || self.is_closed_by_guest() {
            return Err(Broken);
        }
        self.received += data.len() as u32;
        // Earlier data goes first, so nothing is written past a backlog.
        while self.backlog.is_empty() && !data.is_empty() && !self.is_closed_by_host() {
            match uninterrupted(|| write(socket, &data)) {
                Ok(Some(written)) => drop(data.split_to(written).ok_or(Broken)?),
                Ok(None) => break,
                Err(_) => self.close_by_host(),
            }
        }
        if !self.is_closed_by_host() && !data.is_empty() {
            self.backlog.extend(data.to_vec());
        }
        Ok(())
    }

    /// Writes more of the backlog to the host socket, and the guest's end of data behind it.
    pub(super) fn flush(&mut self, socket: &UnixStream) {
        let mut writer = socket;
        while !self.backlog.is_empty() {
            match uninterrupted(|| writer.write(self.backlog.as_slices().0)) {
                Ok(Some(written)) => drop(self.backlog.drain(..written)),
                Ok(None) => break,
                Err(_) => self.close_by_host(),
            }
        }
        if self.backlog.is_empty() {
            self.backlog.shrink_to(0);
        }
        self.pass_on_shutdown(socket);
    }

    /// Returns the data that has still to reach the host.
    pub(super) fn backlog(&self) -> &VecDeque<u8> {
        &self.backlog
    }

    // ---- credit (5.10.6.3) ----

    /// Returns the number of bytes received from the guest.
    pub(super) fn received(&self) -> Wrapping<u32> {
        self.received
    }

    /// Returns the number of bytes that no longer take room here: `fwd_cnt` of a packet.
    pub(super) fn forwarded(&self) -> Wrapping<u32> {
        self.received - Wrapping(self.backlog.len() as u32)
    }

    /// Returns the last `fwd_cnt` that the guest got.
    pub(super) fn announced(&self) -> Wrapping<u32> {
        self.announced
    }

    /// Returns true if much room has been freed since the last packet to the guest. A guest without
    /// credit waits for this news.
    pub(super) fn owes_credit(&self) -> bool {
        (self.forwarded() - self.announced).0 >= CREDIT_STEP
    }

    /// Returns `fwd_cnt` for a packet to the guest, and notes that the guest knows it.
    pub(super) fn announce(&mut self) -> u32 {
        self.announced = self.forwarded();
        self.announced.0
    }

    // ---- the guest's end of data ----

    /// Handles the end of the guest's data. The host sees it once the backlog is empty.
    pub(super) fn close_by_guest(&mut self, socket: &UnixStream) {
        if self.guest_send == GuestSend::Open {
            self.guest_send = GuestSend::Closed;
        }
        self.pass_on_shutdown(socket);
    }

    /// Returns true if the guest sends no more.
    pub(super) fn is_closed_by_guest(&self) -> bool {
        self.guest_send != GuestSend::Open
    }

    /// Returns true if the host socket is shut down for writing.
    pub(super) fn is_shut_on_host(&self) -> bool {
        self.guest_send == GuestSend::ShutOnHost
    }

    fn pass_on_shutdown(&mut self, socket: &UnixStream) {
        if self.guest_send == GuestSend::Closed && self.backlog.is_empty() {
            self.guest_send = GuestSend::ShutOnHost;
            // The call fails only if the peer is gone.
            let _ = socket.shutdown(Shutdown::Write);
        }
    }

    // ---- the host's refusal ----

    /// Handles the close of the host's end: the guest's data has no receiver.
    pub(super) fn close_by_host(&mut self) {
        if self.host_receive == HostReceive::Open {
            self.host_receive = HostReceive::Closed;
        }
        self.backlog.clear();
    }

    /// Returns true if the host's process reads no more.
    pub(super) fn is_closed_by_host(&self) -> bool {
        self.host_receive != HostReceive::Open
    }

    /// Returns true if the guest must still learn that the host's process reads no more.
    pub(super) fn owes_shutdown(&self) -> bool {
        self.host_receive == HostReceive::Closed
    }

    /// Returns the flag for a shutdown that the guest must still get, and notes that it gets it.
    pub(super) fn take_shutdown(&mut self) -> u32 {
        if !self.owes_shutdown() {
            return 0;
        }
        self.host_receive = HostReceive::ClosedAndTold;
        self.told()
    }

    /// Returns the shutdown flag of this direction if the guest has got it, otherwise 0.
    pub(super) fn told(&self) -> u32 {
        if self.host_receive == HostReceive::ClosedAndTold { SHUTDOWN_RECEIVE } else { 0 }
    }
}

fn write(socket: &UnixStream, data: &Buffers<'_>) -> io::Result<usize> {
    let iovecs = data.iovecs(usize::MAX);
    // SAFETY: each iovec is a checked piece of guest memory, which stays mapped while the chain
    // borrows it. The guest may change the bytes meanwhile, which are its own.
    returned(unsafe { libc::writev(socket.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) })
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::super::tests::{GuestBuffer, sockets};
    use super::*;

    /// Receives `len` bytes of this value.
    fn receive(
        half: &mut GuestToHost,
        socket: &UnixStream,
        value: u8,
        len: u32,
    ) -> Result<(), Broken> {
        let buffer = GuestBuffer::holding(&vec![value; len as usize]);
        half.receive(socket, buffer.chain(false).readable)
    }

    /// Fills the host socket, so that all later data goes to the backlog.
    fn fill(half: &mut GuestToHost, socket: &UnixStream) {
        while half.backlog.is_empty() {
            receive(half, socket, 1, 4096).unwrap();
        }
    }

    /// Reads until the socket has no more. True at the end of the data.
    fn read_all(mut host: &UnixStream, got: &mut Vec<u8>) -> bool {
        host.set_nonblocking(true).unwrap();
        host.read_to_end(got).is_ok()
    }

    #[test]
    fn data_is_bounded_by_the_announced_room() {
        let (ours, _host) = sockets();
        let mut half = GuestToHost::default();
        fill(&mut half, &ours);
        let left = BUF_ALLOC - half.backlog.len() as u32;
        for len in [left / 2, left - left / 2, 0] {
            assert_eq!(receive(&mut half, &ours, 1, len), Ok(()));
            assert_eq!((half.received - half.forwarded()).0 as usize, half.backlog.len());
        }
        assert_eq!(half.backlog.len(), BUF_ALLOC as usize);
        assert_eq!(receive(&mut half, &ours, 1, 1), Err(Broken));
    }

    #[test]
    fn credit_is_owed_for_each_quarter_of_the_room_even_as_the_counters_wrap() {
        let (ours, host) = sockets();
        let start = Wrapping(u32::MAX - CREDIT_STEP / 2);
        let mut half = GuestToHost { received: start, announced: start, ..Default::default() };
        let mut got = Vec::new();
        for (len, owed) in [(CREDIT_STEP - 1, false), (1, true), (1, true)] {
            receive(&mut half, &ours, 1, len).unwrap();
            read_all(&host, &mut got);
            half.flush(&ours);
            assert_eq!(half.owes_credit(), owed, "after {} bytes", got.len());
        }
        assert_eq!(half.announce(), (start + Wrapping(CREDIT_STEP + 1)).0);
        assert!(!half.owes_credit());
    }

    #[test]
    fn data_in_the_backlog_earns_no_credit() {
        let (ours, _host) = sockets();
        let mut half = GuestToHost::default();
        fill(&mut half, &ours);
        half.announce();
        receive(&mut half, &ours, 1, CREDIT_STEP).unwrap();
        assert!(!half.owes_credit());
    }

    #[test]
    fn the_end_of_the_guests_data_comes_behind_the_backlog() {
        let (ours, host) = sockets();
        let mut half = GuestToHost::default();
        fill(&mut half, &ours);
        receive(&mut half, &ours, 2, 1000).unwrap();
        half.close_by_guest(&ours);
        assert_eq!(half.guest_send, GuestSend::Closed);
        assert_eq!(receive(&mut half, &ours, 3, 1), Err(Broken));
        let mut got = Vec::new();
        while !read_all(&host, &mut got) {
            half.flush(&ours);
        }
        assert_eq!(half.guest_send, GuestSend::ShutOnHost);
        assert_eq!((got.len() as u32, half.backlog.capacity()), (half.forwarded().0, 0));
        assert!(got.ends_with(&[2; 1000]));
        // A second shutdown changes nothing.
        half.close_by_guest(&ours);
        assert_eq!(half.guest_send, GuestSend::ShutOnHost);
    }

    #[test]
    fn without_a_backlog_the_end_of_the_guests_data_comes_at_once() {
        let (ours, host) = sockets();
        let mut half = GuestToHost::default();
        receive(&mut half, &ours, 1, 10).unwrap();
        half.close_by_guest(&ours);
        let mut got = Vec::new();
        assert!(half.is_shut_on_host() && read_all(&host, &mut got));
        assert_eq!(got, [1; 10]);
    }

    #[test]
    fn data_for_a_host_that_reads_no_more_is_dropped() {
        let (ours, host) = sockets();
        let mut half = GuestToHost::default();
        fill(&mut half, &ours);
        drop(host);
        half.flush(&ours);
        // More than the room: nothing of it is kept.
        for _ in 0..5 {
            assert_eq!(receive(&mut half, &ours, 1, CREDIT_STEP), Ok(()));
            assert_eq!((half.forwarded(), half.backlog.len()), (half.received, 0));
        }
        assert!(half.owes_credit());
        half.close_by_guest(&ours);
        assert_eq!(receive(&mut half, &ours, 1, 1), Err(Broken));
    }

    #[test]
    fn the_guest_is_told_once_that_the_host_reads_no_more() {
        let (ours, host) = sockets();
        let mut half = GuestToHost::default();
        assert_eq!((half.owes_shutdown(), half.take_shutdown(), half.told()), (false, 0, 0));
        drop(host);
        receive(&mut half, &ours, 1, 1).unwrap();
        assert_eq!((half.owes_shutdown(), half.told()), (true, 0));
        assert_eq!((half.take_shutdown(), half.told()), (SHUTDOWN_RECEIVE, SHUTDOWN_RECEIVE));
        // A later hang-up is the same end.
        half.close_by_host();
        assert_eq!((half.owes_shutdown(), half.take_shutdown()), (false, 0));
        assert_eq!(half.told(), SHUTDOWN_RECEIVE);
    }
}
