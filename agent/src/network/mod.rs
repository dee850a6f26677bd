//! The network of a container: devices of the guest become interfaces of the container's network
//! namespace, with the addresses and routes that the host says.

mod loopback;
mod netlink;
mod resolver;

use std::fs;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::path::Path;

use isopod_protocol::agent::{Network, NetworkInterface};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

pub(crate) use self::loopback::loopback_up;
use self::netlink::{LinkRequest, Netlink};
use crate::error::{Context as _, Error, Result};

/// Where the kernel lists the devices of the guest's first network namespace.
const DEVICES: &str = "/sys/class/net";

/// Moves devices into the network namespace of a process, and sets them up there. The namespace is
/// the process's own, and nothing has been set up in it but, perhaps, loopback.
///
/// # Errors
///
/// A device that is not there, or the first step that failed.
pub(crate) fn set_up(network: &Network, pid: i32, pidfd: &OwnedFd) -> Result<()> {
    let guest = Netlink::open()?;
    for interface in &network.interfaces {
        let name = &interface.name;
        let device = device(&interface.device_mac)
            .ok_or_else(|| Error::internal(format!("the guest has no device for {name}")))?;
        guest
            .request(&moved(device, interface, pid))
            .context(|| format!("give network interface {name} to the container"))?;
    }
    // The namespace is a thread's own, so a thread of its own goes there and ends.
    std::thread::scope(|scope| {
        let inside = std::thread::Builder::new().spawn_scoped(scope, || {
            move_into_thread_name_spaces(pidfd.as_fd(), ThreadNameSpaceType::NETWORK)
                .context(|| "enter the container's network namespace")?;
            set_up_inside(network)
        });
        let inside = inside.context(|| "start a thread for the network")?;
        inside.join().unwrap_or_else(|_| Err(Error::internal("the thread for the network failed")))
    })
}

/// Index of the device with this MAC address, which has not been given away yet.
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

/// One request for all of it: a device is moved first and changed then, while it is still down.
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
    // Some routes need it.
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
    let address = address.map_err(|_| Error::invalid("resolver", &network.resolver))?;
    resolver::serve(address)
}
