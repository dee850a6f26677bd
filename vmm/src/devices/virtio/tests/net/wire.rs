//! The host's end: a tap in a network namespace of the calling thread, and a socket on it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::config::NetConfig;
use crate::devices::virtio::net::Net;
use crate::devices::virtio::tests::driver::{Driver, PATIENCE};

pub(super) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// Length of `struct virtio_net_hdr_v1`.
pub(super) const HEADER_LEN: usize = 12;

pub(super) const VHOST_NET: &str = "/dev/vhost-net";

/// Ethertype for local experiments (IEEE 802), so that no protocol of the host answers.
const ETHERTYPE: u16 = 0x88b5;

/// Movers of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mover {
    /// Threads of the device.
    Threads,
    /// The kernel's vhost-net.
    Kernel,
    /// Threads of the device, without a descriptor of vhost-net at the first use.
    DeferredThreads,
    /// The kernel's vhost-net, with descriptors that come after the device was made.
    DeferredKernel,
}

impl Mover {
    pub(super) fn is_kernel(self) -> bool {
        matches!(self, Self::Kernel | Self::DeferredKernel)
    }
}

/// Runs `test` with each mover that this machine has.
pub(super) fn with_each_mover(test: impl Fn(Mover) + Sync) {
    in_namespace(|| test(Mover::Threads));
    in_namespace(|| test(Mover::DeferredThreads));
    if fs::exists(VHOST_NET).unwrap() {
        in_namespace(|| test(Mover::Kernel));
        in_namespace(|| test(Mover::DeferredKernel));
    } else {
        eprintln!("left out in part: needs {VHOST_NET}");
    }
}

/// Runs `test` on a thread with its own network namespace. Both are gone afterwards.
pub(super) fn in_namespace(test: impl FnOnce() + Send) {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if unshare(CloneFlags::CLONE_NEWNET).is_err() || !fs::exists("/dev/net/tun").unwrap() {
                return eprintln!("left out: needs root and /dev/net/tun");
            }
            // Only the test sends frames.
            let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn check(result: libc::c_int) -> libc::c_int {
    assert!(result >= 0, "{}", io::Error::last_os_error());
    result
}

fn named(name: &str) -> libc::ifreq {
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn set_up(socket: &File, name: &str, up: bool) {
    let mut request = named(name);
    request.ifr_ifru.ifru_flags = if up { libc::IFF_UP as libc::c_short } else { 0 };
    // SAFETY: the structure has the length that the kernel expects.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) });
}

/// Opens one queue of a tap. The first open makes the tap.
pub(super) fn open_tap(name: &str, flags: libc::c_int) -> OwnedFd {
    let tap = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = named(name);
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the structure has the length that the kernel expects.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) });
    tap.into()
}

/// A tap that is up, its queues, and a socket on it.
pub(super) struct Wire {
    pub(super) taps: Vec<OwnedFd>,
    pub(super) socket: File,
    name: String,
}

impl Wire {
    pub(super) fn new(queues: usize) -> Self {
        Self::of("tap0", queues, ETHERTYPE)
    }

    /// Makes a tap whose socket sends and receives frames of this type.
    pub(super) fn of(name: &str, queues: usize, ethertype: u16) -> Self {
        let multi = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi;
        let taps = (0..queues).map(|_| open_tap(name, flags)).collect();
        // SAFETY: the call takes numbers only.
        let socket = check(unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(ethertype.to_be()))
        });
        // SAFETY: the descriptor is new and has no other owner.
        let socket = unsafe { File::from_raw_fd(socket) };
        set_up(&socket, name, true);
        let mut request = named(name);
        // SAFETY: the structure has the length that the kernel expects.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut request) });
        // SAFETY: all zeros are valid for numbers.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ethertype.to_be();
        // SAFETY: the kernel has set this field of the union.
        address.sll_ifindex = unsafe { request.ifr_ifru.ifru_ifindex };
        let len = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the length is that of the address.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) });
        Self { taps, socket, name: name.to_owned() }
    }

    /// Takes the tap down, like a pulled cable.
    pub(super) fn take_down(&self) {
        set_up(&self.socket, &self.name, false);
    }

    /// Sets the tap's MTU: the length of a frame without its header.
    pub(super) fn set_mtu(&self, mtu: i32) {
        let mut request = named(&self.name);
        request.ifr_ifru.ifru_mtu = mtu;
        // SAFETY: the structure has the length that the kernel expects.
        check(unsafe {
            libc::ioctl(self.socket.as_raw_fd(), libc::SIOCSIFMTU, &raw const request)
        });
    }

    /// Gives frames through the socket a header with their offloads.
    pub(super) fn with_headers(&self) {
        let on: libc::c_int = 1;
        let len = size_of_val(&on) as libc::socklen_t;
        let (fd, value) = (self.socket.as_raw_fd(), (&raw const on).cast());
        // SAFETY: the length is that of the value.
        check(unsafe { libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, value, len) });
    }

    /// Makes a device on this tap.
    pub(super) fn device(&self, mover: Mover) -> Net {
        let taps: Vec<_> = self.taps.iter().map(|tap| tap.try_clone().unwrap()).collect();
        let count = if mover.is_kernel() { taps.len() } else { 0 };
        let open = || File::options().read(true).write(true).open(VHOST_NET).unwrap();
        let vhost: Vec<File> = (0..count).map(|_| open()).collect();
        if let Mover::Threads | Mover::Kernel = mover {
            let vhost = vhost.into_iter().map(OwnedFd::from).collect();
            return Net::new(taps, vhost, None, &config()).unwrap();
        }
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let net = Net::new(taps, Vec::new(), Some(theirs.into()), &config()).unwrap();
        for file in vhost {
            ours.send_with_fd(&[0][..], file.as_raw_fd()).unwrap();
        }
        net
    }

    pub(super) fn send(&self, frame: &[u8]) {
        assert_eq!((&self.socket).write(frame).unwrap(), frame.len());
    }

    /// Returns the next frame that the guest sent.
    pub(super) fn receive(&self) -> Vec<u8> {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(PATIENCE).unwrap();
        assert_ne!(poll(&mut fds, timeout).unwrap(), 0, "no frame came");
        let mut frame = vec![0; 70_000];
        let len = (&self.socket).read(&mut frame).unwrap();
        frame.truncate(len);
        frame
    }
}

pub(super) fn config() -> NetConfig {
    NetConfig {
        tap_fds: vec![9],
        vhost_fds: Vec::new(),
        vhost_socket_fd: None,
        mac: MAC,
        mtu: Some(1400),
    }
}

/// Makes a frame of `len` bytes. The payload depends on `seed`.
pub(super) fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame = Vec::with_capacity(len);
    frame.extend(MAC);
    frame.extend([2, 0, 0, 0, 0, 1]);
    frame.extend(ETHERTYPE.to_be_bytes());
    frame.extend((frame.len()..len).map(|n| (n as u8).wrapping_mul(31) ^ (n >> 8) as u8 ^ seed));
    frame
}

/// Makes a frame behind a header without offloads.
pub(super) fn packet(len: usize, seed: u8) -> Vec<u8> {
    [vec![0; HEADER_LEN], frame(len, seed)].concat()
}

pub(super) const TRANSMIT_AT: u64 = 0x80_0000;
pub(super) const RECEIVE_AT: u64 = 0x100_0000;

/// Sends a header and a frame from the guest, in pieces of the given lengths.
pub(super) fn transmit(driver: &mut Driver, queue: usize, packet: &[u8], pieces: &[usize]) -> u32 {
    driver.put(TRANSMIT_AT, packet);
    let (mut at, mut rest) = (TRANSMIT_AT, packet.len());
    let mut buffers = Vec::new();
    for piece in pieces.iter().copied().chain([usize::MAX]) {
        let len = piece.min(rest);
        if len > 0 {
            buffers.push((at, len as u32, false));
        }
        (at, rest) = (at + len as u64, rest - len);
    }
    driver.request(queue, &buffers)
}

/// Offers `count` chains of `len` bytes for received packets. Returns their addresses by head.
pub(super) fn make_room(
    driver: &mut Driver,
    queue: usize,
    count: u64,
    len: u32,
) -> HashMap<u16, u64> {
    (0..count)
        .map(|n| {
            let at = RECEIVE_AT + n * u64::from(len.next_multiple_of(16));
            (driver.offer(queue, &[(at, len, true)]), at)
        })
        .collect()
}

/// Takes the guest's next packet. Returns its bytes, and the number of its chains.
pub(super) fn take(driver: &mut Driver, queue: usize, room: &HashMap<u16, u64>) -> (Vec<u8>, u16) {
    let (head, len) = driver.wait_used(queue);
    let mut packet = driver.get(room[&head], len as usize);
    let count = u16::from_le_bytes([packet[10], packet[11]]);
    for _ in 1..count {
        // All chains of a packet become visible with the first.
        let (head, len) = driver.used(queue).unwrap();
        packet.extend(driver.get(room[&head], len as usize));
    }
    (packet, count)
}
