//! The part of rtnetlink(7) that makes single requests.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::retry_on_intr;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

use crate::error::{Context as _, Result};

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// Buffer for an acknowledgement: a header, an error number and the request. A request that does
/// not fit is cut off, and not needed.
const ANSWER: usize = 1024;

/// A connection to the kernel about one network namespace.
pub(super) struct Netlink(OwnedFd);

impl Netlink {
    /// Connects to the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        let (kind, flags) = (SocketType::RAW, SocketFlags::CLOEXEC);
        socket_with(AddressFamily::NETLINK, kind, flags, None)
            .map(Self)
            .context(|| "open a netlink socket")
    }

    /// Sends a request that asks for an acknowledgement, and waits for the acknowledgement.
    pub(super) fn request(&self, message: &[u8]) -> io::Result<()> {
        retry_on_intr(|| send(&self.0, message, SendFlags::empty()))?;
        let mut answer = [0; ANSWER];
        let (_, length) = retry_on_intr(|| recv(&self.0, &mut answer[..], RecvFlags::empty()))?;
        let kind = answer.get(4..6).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
        let code = answer.get(HEADER..HEADER + 4).filter(|_| length >= HEADER + 4);
        match (kind.map(i32::from), code) {
            (Some(libc::NLMSG_ERROR), Some(code)) => {
                let code = i32::from_ne_bytes([code[0], code[1], code[2], code[3]]);
                if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// A request to change an interface (`RTM_SETLINK`).
pub(super) struct LinkRequest(Vec<u8>);

impl LinkRequest {
    /// Starts a request about the interface with this index.
    pub(super) fn new(index: i32) -> Self {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        let mut bytes = vec![0; 4];
        bytes.extend(libc::RTM_SETLINK.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        // Sequence and port, then family and type of `struct ifinfomsg`.
        bytes.extend([0; 12]);
        bytes.extend(index.to_ne_bytes());
        // Flags, and the mask of flags to change.
        bytes.extend([0; 8]);
        Self(bytes)
    }

    /// Brings the interface up.
    pub(super) fn up(mut self) -> Self {
        let up = libc::IFF_UP.to_ne_bytes();
        self.0[HEADER + 8..][..4].copy_from_slice(&up);
        self.0[HEADER + 12..][..4].copy_from_slice(&up);
        self
    }

    /// Adds an attribute, which has to be shorter than 64 KiB.
    pub(super) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// The whole message.
    pub(super) fn into_bytes(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_laid_out_as_the_kernel_reads_it() {
        let bytes = LinkRequest::new(2).attribute(libc::IFLA_IFNAME, b"eth0\0").up().into_bytes();
        assert_eq!(
            bytes,
            [
                44, 0, 0, 0, 19, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, // nlmsghdr
                0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, // ifinfomsg
                9, 0, 3, 0, b'e', b't', b'h', b'0', 0, 0, 0, 0,
            ]
        );
    }

    #[test]
    fn the_kernels_refusal_comes_back() {
        let netlink = Netlink::open().unwrap();
        // No interface has this index.
        let error = netlink.request(&LinkRequest::new(i32::MAX).into_bytes()).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EPERM)), "{error}");
    }
}
