//! One queue of a tap, the host's end of the wire (Linux, `Documentation/networking/tuntap.rst`).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::packet::HEADER_LEN;
use crate::devices::virtio::chain::returned;

/// Flags that the tap must have been opened with.
const WANTED: [(libc::c_int, &str); 3] = [
    (libc::IFF_TAP, "IFF_TAP"),
    (libc::IFF_NO_PI, "IFF_NO_PI"),
    (libc::IFF_VNET_HDR, "IFF_VNET_HDR"),
];

/// A queue of a tap. Its packets begin with the header of a network device.
pub(super) struct Tap {
    file: File,
    /// True while the host's kernel gives packets to this queue.
    attached: AtomicBool,
}

impl Tap {
    /// Takes a queue that is attached. Fails if the descriptor is not a tap's, or lacks one of the
    /// flags.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let tap = Self { file: File::from(fd), attached: AtomicBool::new(true) };
        let flags = tap.flags()?;
        for (flag, name) in WANTED {
            if flags & flag != flag {
                let message = format!("the tap was opened without {name}");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
        }
        let status = OFlag::from_bits_retain(fcntl(&tap.file, FcntlArg::F_GETFL)?);
        fcntl(&tap.file, FcntlArg::F_SETFL(status | OFlag::O_NONBLOCK))?;
        let len = HEADER_LEN as libc::c_int;
        // SAFETY: the call reads the integer behind the pointer.
        check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })?;
        Ok(tap)
    }

    /// Returns the flags that the tap was opened with.
    fn flags(&self) -> io::Result<libc::c_int> {
        let mut request = empty_request();
        // SAFETY: the call fills in the structure behind the pointer, and nothing else.
        check(unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
        // SAFETY: the call has set this field of the union, and all fields are plain numbers.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        Ok(libc::c_int::from(flags as u16))
    }

    /// Sets the offloads of all queues of the tap (`TUN_F_*`): the work that the host's kernel may
    /// leave to the reader. The kernel does all other work before it gives a packet to a queue.
    /// Fails if the kernel does not know one of them.
    pub(super) fn set_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        // SAFETY: the argument is a number.
        check(unsafe {
            libc::ioctl(self.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads))
        })
    }

    /// Attaches the queue, or detaches it: the host's kernel gives packets to attached queues only.
    /// Fails if the tap has a single queue, or is gone.
    pub(super) fn attach(&self, attach: bool) -> io::Result<()> {
        if self.attached.load(Ordering::Relaxed) == attach {
            return Ok(());
        }
        let mut request = empty_request();
        let flag = if attach { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: the call reads the structure behind the pointer.
        check(unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) })?;
        self.attached.store(attach, Ordering::Relaxed);
        Ok(())
    }

    /// Reads one packet. A part that does not fit is lost.
    ///
    /// # Safety
    ///
    /// Each buffer is memory of this process that may be written, even while others write it.
    pub(super) unsafe fn read(&self, buffers: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller guarantees the buffers.
        returned(unsafe { libc::readv(self.as_raw_fd(), buffers.as_ptr(), buffers.len() as i32) })
    }

    /// Writes one packet.
    ///
    /// # Safety
    ///
    /// Each buffer is memory of this process that may be read while others write it.
    pub(super) unsafe fn write(&self, buffers: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller guarantees the buffers.
        returned(unsafe { libc::writev(self.as_raw_fd(), buffers.as_ptr(), buffers.len() as i32) })
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn empty_request() -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
