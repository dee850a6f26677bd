//! A tap: the host's end of a network device of the microVM.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkMessage},
};

use crate::{
    error::{Error, Explain, Result},
    network::{netlink::Netlink, vhost::Vhost},
};

/// Prefix of a tap's name. A number follows.
pub(super) const PREFIX: &str = "isopod";

/// Largest number of queue pairs of a device. More vCPUs share them.
const MAX_QUEUES: u8 = 8;

/// `TUNSETIFF` and `TUNSETPERSIST` (linux/if_tun.h).
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;

/// The lifetime of a tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// Ends with the tap's last descriptor. Its close waits until the kernel has taken the tap
    /// apart.
    Microvm,
    /// Ends with the tap's network namespace, and nobody waits for that.
    Namespace,
}

/// A tap with its queues.
#[derive(Debug)]
pub(super) struct Tap {
    pub(super) name: String,
    pub(super) index: u32,
    /// One descriptor for each queue pair.
    pub(super) queues: Vec<OwnedFd>,
    pub(super) vhost: Vhost,
}

impl Tap {
    /// Makes a tap in the network namespace of this process, and brings it up. A `spare` tap may
    /// never be used.
    pub(super) fn new(
        netlink: &Netlink,
        number: usize,
        vcpus: u8,
        life: Life,
        spare: bool,
    ) -> Result<Self> {
        let name = format!("{PREFIX}{number}");
        let count = vcpus.clamp(1, MAX_QUEUES);
        let queues = (0..count).map(|_| queue(&name, count > 1)).collect::<Result<Vec<_>>>()?;
        if life == Life::Namespace
            && let [first, ..] = &queues[..]
        {
            outlive_descriptors(first).explain(|| format!("cannot keep the tap {name}"))?;
        }
        let vhost = if spare { Vhost::late(count) } else { Vhost::open(count) }?;
        silence(&name)?;
        let index = rustix::net::netdevice::name_to_index(&socket()?, &name)
            .explain(|| format!("cannot find the tap {name}"))?;
        let tap = Self { name, index, queues, vhost };
        tap.set_up(netlink, None)?;
        Ok(tap)
    }

    /// Sets the MTU of the tap to that of its interface.
    pub(super) fn set_mtu(&self, netlink: &Netlink, mtu: u32) -> Result<()> {
        self.set_up(netlink, Some(mtu))
    }

    fn set_up(&self, netlink: &Netlink, mtu: Option<u32>) -> Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = self.index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        link.attributes.extend(mtu.map(LinkAttribute::Mtu));
        netlink.change(RouteNetlinkMessage::SetLink(link)).explain(|| match mtu {
            Some(mtu) => format!("cannot give the tap {} an MTU of {mtu}", self.name),
            None => format!("cannot bring up the tap {}", self.name),
        })
    }
}

fn socket() -> Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .explain(|| "cannot open a socket".into())
}

/// Opens a queue of the tap `name`. The first queue makes the tap.
fn queue(name: &str, several: bool) -> Result<OwnedFd> {
    const DEVICE: &str = "/dev/net/tun";
    let file = File::options().read(true).write(true).open(DEVICE).map_err(|e| {
        let hint = match e.kind() {
            io::ErrorKind::PermissionDenied => " (isopod has to run as root)",
            _ => " (is the kernel module tun loaded? `modprobe tun` loads it)",
        };
        Error::new(format!("{}{hint}", Error::because(format!("cannot open {DEVICE}"), e)))
    })?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if several {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    // SAFETY: `ifreq` is plain data for which zeros are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The copy is shorter than the field, so a NUL stays at its end.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an `ifreq`, which lives across the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if result == 0 {
        return Ok(file.into());
    }
    Err(match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::EBUSY) => Error::new(format!(
            "there is a tap {name} already: it is used by another microVM, and containers in different \
             microVMs cannot share a network namespace"
        )),
        e if e.kind() == io::ErrorKind::PermissionDenied => {
            Error::new(format!("no permission to make the tap {name}: isopod has to run as root"))
        }
        e => Error::because(format!("cannot make the tap {name}"), e),
    })
}

fn outlive_descriptors(queue: &OwnedFd) -> io::Result<()> {
    // SAFETY: the argument of this request is a number.
    match unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETPERSIST, 1) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Disables this host's IPv6 on the tap. The tap is a wire, and the host's IPv6 must not greet the
/// guest over it.
fn silence(name: &str) -> Result<()> {
    let path = Path::new("/proc/sys/net/ipv6/conf").join(name).join("disable_ipv6");
    match fs::write(&path, "1") {
        // A host without IPv6 has no such file.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written.explain(|| format!("cannot write {}", path.display())),
    }
}
