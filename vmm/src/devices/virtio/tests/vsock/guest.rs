//! The guest's side of the socket device, with packets in place of chains.

use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::super::driver::{Driver, PATIENCE};
use super::super::state::state;
pub(super) use crate::devices::virtio::vsock::packet::{HEADER_LEN, Header, Op};
use crate::devices::virtio::vsock::{MuxerState, Vsock};

pub(super) const CID: u64 = 3;
pub(super) const RECEIVE: usize = 0;
pub(super) const TRANSMIT: usize = 1;

/// Address of the packets that the guest sends.
const SENT_AT: u64 = 0x20_0000;
/// Address of the guest's receive buffers.
const RECEIVED_AT: u64 = 0x100_0000;
/// Length of a receive buffer in bytes, as in Linux.
const BUFFER_LEN: u32 = 4096;
/// Buffer size that the guest announces, less than the tests send.
pub(super) const CREDIT: u32 = 10_000;

pub(super) struct VsockGuest {
    pub(super) driver: Driver,
    path: tempfile::TempDir,
    connector: UnixDatagram,
    /// Addresses of the receive buffers. The next one to give comes first.
    buffers: Vec<u64>,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl VsockGuest {
    pub(super) fn new() -> Self {
        let mut guest = Self::without_buffers();
        for _ in 0..64 {
            guest.give_buffer();
        }
        guest
    }

    /// Makes a guest without receive buffers.
    pub(super) fn without_buffers() -> Self {
        let path = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(path.path().join("vsock.sock")).unwrap();
        let (ours, theirs) = seqpacket_pair();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let vsock = Vsock::new(CID as u32, listener, theirs).unwrap();
        let driver = Driver::started(Box::new(vsock));
        let buffers = (0..64).map(|n| RECEIVED_AT + n * u64::from(BUFFER_LEN)).collect();
        Self { driver, path, connector: ours, buffers, buf_alloc: CREDIT, fwd_cnt: 0 }
    }

    /// Returns the device's state of its streams.
    pub(super) fn streams(&mut self) -> MuxerState {
        state(&mut self.driver).device.unwrap().own.read().unwrap()
    }

    pub(super) fn give_buffer(&mut self) {
        let at = self.buffers.remove(0);
        self.buffers.push(at);
        self.driver.offer(RECEIVE, &[(at, BUFFER_LEN, true)]);
    }

    /// Gives new buffers to a device that was reset and started again.
    pub(super) fn restart(&mut self) {
        self.buffers.sort_unstable();
        for _ in 0..64 {
            self.give_buffer();
        }
    }

    /// Receives the next packet of the device.
    pub(super) fn receive(&mut self) -> (Header, Vec<u8>) {
        let (_, len) = self.driver.wait_used(RECEIVE);
        // Buffers come back in the order in which they were given.
        let at = self.buffers[0];
        let header = Header::from_bytes(self.driver.get(at, HEADER_LEN).try_into().unwrap());
        assert_eq!(len, HEADER_LEN as u32 + header.len);
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (2, CID, 1));
        let data = self.driver.get(at + HEADER_LEN as u64, header.len as usize);
        self.give_buffer();
        (header, data)
    }

    /// Receives the next packet of the device, if there is one.
    pub(super) fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (_, _) = self.driver.used(RECEIVE)?;
        let at = self.buffers[0];
        let header = Header::from_bytes(self.driver.get(at, HEADER_LEN).try_into().unwrap());
        let data = self.driver.get(at + HEADER_LEN as u64, header.len as usize);
        self.give_buffer();
        Some((header, data))
    }

    pub(super) fn expect(&mut self, op: Op) -> Header {
        let (header, _) = self.receive();
        assert_eq!(Op::from_raw(header.op), Some(op), "{header:?}");
        header
    }

    /// Receives the next packet of this kind to this port, and skips others.
    pub(super) fn until(&mut self, op: Op, port: u32) -> Header {
        loop {
            let (header, _) = self.receive();
            if header.dst_port == port && Op::from_raw(header.op) == Some(op) {
                return header;
            }
        }
    }

    /// Makes a header from a guest port to a host port.
    pub(super) fn header(&self, guest: u32, host: u32, op: Op) -> Header {
        Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: guest,
            dst_port: host,
            kind: 1,
            op: op as u16,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    /// Sends a packet in several buffers, as Linux sends a large one.
    pub(super) fn send_packet(&mut self, header: Header, data: &[u8]) {
        let header = Header { len: data.len() as u32, ..header };
        self.driver.put(SENT_AT, &header.to_bytes());
        self.driver.put(SENT_AT + 0x1000, data);
        let mut chain = vec![(SENT_AT, HEADER_LEN as u32, false)];
        for (n, part) in data.chunks(30_000).enumerate() {
            chain.push((SENT_AT + 0x1000 + 30_000 * n as u64, part.len() as u32, false));
        }
        self.driver.request(TRANSMIT, &chain);
    }

    pub(super) fn send(&mut self, guest: u32, host: u32, op: Op) {
        self.send_packet(self.header(guest, host, op), &[]);
    }

    pub(super) fn shut_down(&mut self, guest: u32, host: u32, flags: u32) {
        let header = Header { flags, ..self.header(guest, host, Op::Shutdown) };
        self.send_packet(header, &[]);
    }

    /// Connects a client of the host that asks for a port of the guest.
    pub(super) fn client(&self, line: &str) -> UnixStream {
        let mut client = UnixStream::connect(self.path.path().join("vsock.sock")).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.set_write_timeout(Some(PATIENCE)).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        client
    }

    /// Opens a stream from the host to this port. Returns the client, and its host port.
    pub(super) fn open_from_host(&mut self, port: u32) -> (UnixStream, u32) {
        let mut client = self.client(&format!("CONNECT {port}\n"));
        let request = self.until(Op::Request, port);
        self.send(port, request.src_port, Op::Response);
        let ok = format!("OK {}\n", request.src_port);
        let mut answer = vec![0; ok.len()];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, ok.as_bytes());
        (client, request.src_port)
    }

    /// Receives a stream that the guest opens, as the sandbox process does: the port and one end.
    pub(super) fn accept(&self) -> (u32, UnixStream) {
        let mut port = [0; 4];
        let (len, fd) = self.connector.recv_with_fd(&mut port).unwrap();
        assert_eq!(len, 4);
        let stream = UnixStream::from(OwnedFd::from(fd.unwrap()));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        (u32::from_le_bytes(port), stream)
    }

    /// Opens a stream from the guest. Returns the host's end.
    pub(super) fn open_from_guest(&mut self, guest: u32, host: u32) -> UnixStream {
        self.send(guest, host, Op::Request);
        self.until(Op::Response, guest);
        let (port, stream) = self.accept();
        assert_eq!(port, host);
        stream
    }
}

fn seqpacket_pair() -> (UnixDatagram, UnixDatagram) {
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the array has room for both descriptors.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) }, 0);
    // SAFETY: the descriptors are new and have no other owner.
    fds.map(|fd| UnixDatagram::from(unsafe { OwnedFd::from_raw_fd(fd) })).into()
}
