//! The network of a container. Devices of the guest become interfaces of the container's network
//! namespace, with addresses and routes from the host.

mod forward;
mod loopback;
mod netlink;
mod resolver;

use std::fs;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::path::Path;

use isopod_protocol::agent::{Network, NetworkInterface};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

pub(crate) use self::forward::{Forwards, connect};
pub(crate) use self::loopback::loopback_up;
use self::netlink::{LinkRequest, Netlink};
use crate::error::{Context as _, Error, Result};

/// Directory of the devices in the guest's first network namespace.
const DEVICES: &str = "/sys/class/net";

/// Moves devices into the network namespace of a process, and configures them there. The namespace
/// is the process's own, and unconfigured except perhaps for loopback.
pub(crate) fn set_up(network: &Network, pid: i32, pidfd: &OwnedFd) -> Result<()> {
    let guest = Netlink::open()?;
    for interface in &network.interfaces {
        let name = &interface.name;
        let device = device(&interface.device_mac).ok_or_else(|| {
            Error::internal(format!("the guest has no network device for {name}"))
        })?;
        guest
            .request(&moved(device, interface, pid))
            .context(|| format!("move network interface {name} to the container"))?;
    }
    // setns(2) changes a thread's namespace, so a short-lived thread enters the container's.
    std::thread::scope(|scope| {
        let inside = std::thread::Builder::new().spawn_scoped(scope, || {
            move_into_thread_name_spaces(pidfd.as_fd(), ThreadNameSpaceType::NETWORK)
                .context(|| "enter the container's network namespace")?;
            set_up_inside(network)
        });
        let inside = inside.context(|| "start the network thread")?;
        inside.join().unwrap_or_else(|_| Err(Error::internal("the network thread panicked")))
    })
}

/// Index of the device with this MAC address, if no container has it yet.
fn device(mac: &[u8]) -> Option<i32> {
    let mac: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    let mac = mac.join(":");
    fs::read_dir(DEVICES).ok()?.flatten().find_map(|entry| {
        let read = |file: &str| fs::read_to_string(entry.path().join(file)).ok();
        if read("address")?.trim() != mac {
            return None;
        }
        read("ifindex")?.trim().parse().ok()
    })
}

/// Builds one request for move and change. The kernel moves a device first and changes it then,
/// while it is still down.
fn moved(device: i32, interface: &NetworkInterface, pid: i32) -> Vec<u8> {
    LinkRequest::new(device)
        .attribute(libc::IFLA_NET_NS_PID, &pid.to_ne_bytes())
        .attribute(libc::IFLA_NEW_IFINDEX, &interface.index.to_ne_bytes())
        .attribute(libc::IFLA_IFNAME, &[interface.name.as_bytes(), b"\0"].concat())
        .attribute(libc::IFLA_ADDRESS, &interface.mac)
        .attribute(libc::IFLA_MTU, &interface.mtu.to_ne_bytes())
        .into_bytes()
}

fn set_up_inside(network: &Network) -> Result<()> {
    let netlink = Netlink::open()?;
    for setting in &network.settings {
        let path = Path::new("/proc/sys/net").join(&setting.path);
        fs::write(&path, &setting.value).context(|| format!("write {}", path.display()))?;
    }
    // Some routes need loopback.
    loopback_up()?;
    for interface in network.interfaces.iter().filter(|interface| interface.up) {
        let up = LinkRequest::new(interface.index.cast_signed()).up().into_bytes();
        netlink
            .request(&up)
            .context(|| format!("bring network interface {} up", interface.name))?;
    }
    for request in &network.requests {
        netlink
            .request(&request.message)
            .context(|| format!("set up {} of the network", request.what))?;
    }
    if network.resolver.is_empty() {
        return Ok(());
    }
    let address = network.resolver.parse();
    let address = address.map_err(|_| {
        Error::invalid("resolver", format!("{:?} is not an address and port", network.resolver))
    })?;
    resolver::serve(address)
}
