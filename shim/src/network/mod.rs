//! The network of a container: interfaces of a network namespace on the host become network devices
//! of the microVM.
//!
//! ```text
//!  host: the container's network namespace, in which sandbox process and VMM live
//!    eth0 (made by an engine) <── tc redirect, both ways ──> isopod0 (tap)
//!                                                               │ frames
//!  guest: the container's network namespace                     │
//!    eth0: same name, index, MAC, MTU, addresses, routes <── virtio-net
//! ```
//!
//! The host's own stack in that namespace no longer sees the interface's frames. The interfaces
//! that are in the namespace at create decide how many devices the microVM has. A namespace that is
//! empty then may be filled until the container is started ([`Network::fill`]). So its microVM gets
//! spare devices, whose taps wait for their interfaces.

mod addressing;
mod interface;
mod loopback;
mod namespace;
mod netlink;
mod redirect;
mod resolver;
mod tap;
mod trial;
mod vhost;

use std::{os::fd::AsRawFd, path::PathBuf};

use isopod_protocol::agent;
use isopod_vmm::config::{MAX_NET_DEVICES, NetConfig};
use serde::{Deserialize, Serialize};

use self::{
    interface::Interface,
    netlink::Netlink,
    redirect::Mark,
    tap::{Life, Tap},
};
pub(crate) use self::{
    loopback::{LoopbackCatch, target as loopback_target},
    namespace::enter,
    resolver::RESOLVER,
    trial::{Trial, try_out},
    vhost::DEVICE as VHOST_NET,
};
use crate::{
    bundle::{NICS_ANNOTATION, NetworkNamespace},
    error::{Error, Explain, Result},
    random::random_u64,
};

/// Redirects to remove from a namespace that outlives the sandbox, as state.json has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RedirectRecord {
    /// Path of the namespace.
    namespace: PathBuf,
    /// Mark of the sandbox's redirects.
    mark: Mark,
}

/// The network devices of a microVM, and their connections. Disconnected when dropped.
#[derive(Debug)]
pub(crate) struct Network {
    namespace: NetworkNamespace,
    netlink: Option<Netlink>,
    mark: Mark,
    nics: Vec<Nic>,
    /// Interfaces that have a redirect, and the indices of their taps.
    connected: Vec<(Interface, u32)>,
    /// There was no interface when the container was created.
    was_empty: bool,
    /// The container's /etc/resolv.conf on the host.
    resolv_conf: Option<PathBuf>,
}

/// A network device of the microVM.
#[derive(Debug)]
struct Nic {
    tap: Tap,
    /// MAC address that the guest finds in the device.
    mac: [u8; 6],
    mtu: Option<u16>,
}

impl Network {
    /// The network of a namespace that this process is in already. Nothing has been made yet.
    pub(crate) fn new(namespace: NetworkNamespace, resolv_conf: Option<PathBuf>) -> Result<Self> {
        Ok(Self {
            namespace,
            netlink: None,
            mark: Mark::new()?,
            nics: Vec::new(),
            connected: Vec::new(),
            was_empty: false,
            resolv_conf,
        })
    }

    /// The record for a `delete`, in case this process is killed.
    pub(crate) fn taken(&self) -> Option<RedirectRecord> {
        match &self.namespace {
            NetworkNamespace::Path(path) => {
                Some(RedirectRecord { namespace: path.clone(), mark: self.mark.clone() })
            }
            NetworkNamespace::None | NetworkNamespace::Own | NetworkNamespace::Pod(_) => None,
        }
    }

    /// Makes a tap for each interface, or `spares` taps if there is no interface. Returns the
    /// guest's part of the work.
    ///
    /// A namespace that another microVM has already, or that has something a microVM cannot have,
    /// is an error.
    pub(crate) fn connect(&mut self, vcpus: u8, spares: u8) -> Result<Option<agent::Network>> {
        if !self.has_namespace() {
            return Ok(None);
        }
        let netlink = self.netlink.insert(Netlink::open()?);
        let addresses = interface::addresses(netlink)?;
        let interfaces = interface::scan(netlink, &addresses)?;
        self.was_empty = interfaces.is_empty();
        let life =
            if self.namespace == NetworkNamespace::Own { Life::Namespace } else { Life::Microvm };
        if self.was_empty {
            for number in 0..spares.min(MAX_NET_DEVICES) {
                let tap = Tap::new(netlink, number.into(), vcpus, life, true);
                let tap = tap.map_err(|e| self.namespace.explain(e))?;
                self.nics.push(Nic { tap, mac: random_mac()?, mtu: None });
            }
            return Ok(None);
        }
        if interfaces.len() > MAX_NET_DEVICES.into() {
            return Err(Error::new(format!(
                "{} has {} interfaces, and a microVM can have {MAX_NET_DEVICES} at most",
                self.namespace.name(),
                interfaces.len()
            )));
        }
        for interface in &interfaces {
            redirect::claim(netlink, interface).map_err(|e| self.namespace.explain(e))?;
        }
        for (number, interface) in interfaces.iter().enumerate() {
            let mtu = u16::try_from(interface.mtu).map_err(|_| mtu_too_large(interface))?;
            let tap = Tap::new(netlink, number, vcpus, life, false);
            let tap = tap.map_err(|e| self.namespace.explain(e))?;
            self.nics.push(Nic { tap, mac: interface.mac, mtu: Some(mtu) });
        }
        self.redirect(&interfaces, addresses).map(Some)
    }

    /// Tells whether there is a namespace, new or not, that this process is in and nobody else
    /// serves.
    pub(crate) fn has_namespace(&self) -> bool {
        matches!(self.namespace, NetworkNamespace::Own | NetworkNamespace::Path(_))
    }

    /// Looks at the namespace again at start. Between create and start an engine may have filled an
    /// empty namespace, and may serve names in it.
    ///
    /// Errors are as with [`Self::connect`]. More interfaces than devices are an error too.
    pub(crate) fn complete(&mut self) -> Result<Option<agent::Network>> {
        let mut network = self.fill()?;
        if self.has_namespace() && resolver::is_named_in(self.resolv_conf.as_deref())? {
            self.serve_names()?;
            network.get_or_insert_default().resolver = RESOLVER.to_string();
        }
        Ok(network)
    }

    /// Connects the interfaces of a namespace that was empty at create.
    fn fill(&mut self) -> Result<Option<agent::Network>> {
        let Some(netlink) = self.netlink.as_ref().filter(|_| self.was_empty) else {
            return Ok(None);
        };
        let addresses = interface::addresses(netlink)?;
        let interfaces = interface::scan(netlink, &addresses)?;
        if interfaces.is_empty() {
            return Ok(None);
        }
        if interfaces.len() > self.nics.len() {
            return Err(Error::new(format!(
                "{} got {} interfaces after the container was created, and its microVM has {} spare \
                 network devices: set the annotation {NICS_ANNOTATION}, or nics in {}, to {0}",
                self.namespace.name(),
                interfaces.len(),
                self.nics.len(),
                crate::settings::CONFIG_FILE,
            )));
        }
        for interface in &interfaces {
            redirect::claim(netlink, interface).map_err(|e| self.namespace.explain(e))?;
        }
        self.was_empty = false;
        self.redirect(&interfaces, addresses).map(Some)
    }

    /// Connects the interfaces with the first taps, one by one.
    fn redirect(
        &mut self,
        interfaces: &[Interface],
        addresses: Vec<netlink_packet_route::address::AddressMessage>,
    ) -> Result<agent::Network> {
        let Some(netlink) = &self.netlink else { return Ok(agent::Network::default()) };
        // Read before a redirect changes anything.
        let requests = addressing::requests(netlink, interfaces, addresses)?;
        let settings = interface::settings(interfaces)?;
        let mut guest = agent::Network { requests, settings, ..Default::default() };
        for (interface, nic) in interfaces.iter().zip(&self.nics) {
            nic.tap.vhost.follow()?;
            redirect::connect(netlink, interface, &nic.tap, &self.mark)
                .map_err(|e| self.namespace.explain(e))?;
            self.connected.push((interface.clone(), nic.tap.index));
            guest.interfaces.push(agent::NetworkInterface {
                device_mac: nic.mac.to_vec(),
                mac: interface.mac.to_vec(),
                name: interface.name.clone(),
                index: interface.index,
                mtu: interface.mtu,
                up: interface.up,
                ..Default::default()
            });
        }
        Ok(guest)
    }

    /// Lets the name server in the namespace ask other servers. Their answers come in at the
    /// interfaces, and would go to the guest.
    fn serve_names(&self) -> Result<()> {
        let Some(netlink) = &self.netlink else { return Ok(()) };
        resolver::reserve_ports()?;
        for (interface, tap) in &self.connected {
            redirect::pass_names(netlink, interface, *tap, &self.mark)?;
        }
        Ok(())
    }

    /// The devices for the VMM's configuration.
    pub(crate) fn config(&self) -> Vec<NetConfig> {
        let config = |Nic { tap, mac, mtu }: &Nic| {
            let tap_fds = tap.queues.iter().map(AsRawFd::as_raw_fd).collect();
            let (vhost_fds, vhost_socket_fd) = tap.vhost.descriptors();
            NetConfig { tap_fds, vhost_fds, vhost_socket_fd, mac: *mac, mtu: *mtu }
        };
        self.nics.iter().map(config).collect()
    }

    /// Leaves the taps to the VMM alone, so that they end with it.
    pub(crate) fn hand_over(&mut self) {
        for nic in &mut self.nics {
            nic.tap.queues.clear();
            nic.tap.vhost.hand_over();
        }
    }

    /// Removes the redirects, so the interfaces are as they were.
    pub(crate) fn disconnect(&mut self) {
        let Some(netlink) = &self.netlink else { return };
        for (interface, _) in self.connected.drain(..) {
            // An interface that is gone has taken the redirect along.
            if let Err(e) = redirect::disconnect(netlink, interface.index, &self.mark) {
                log::warn!("cannot remove the redirect of interface {}: {e}", interface.name);
            }
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.disconnect();
    }
}

impl RedirectRecord {
    /// Removes the redirects of a sandbox whose processes are gone.
    pub(crate) fn remove(&self) -> Result<()> {
        let what = || format!("cannot clean up network namespace {}", self.namespace.display());
        // A namespace that is gone has no redirects.
        if !namespace::is_there(&self.namespace) {
            return Ok(());
        }
        let work = || {
            namespace::enter_path(&self.namespace)?;
            let netlink = Netlink::open()?;
            for link in netlink.links().explain(what)? {
                redirect::clear(&netlink, link.header.index, &self.mark).explain(what)?;
            }
            Ok(())
        };
        // A thread of its own enters the namespace, and ends.
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, work).explain(what)?;
            thread.join().unwrap_or_else(|_| Err(Error::new(what())))
        })
    }
}

fn mtu_too_large(interface: &Interface) -> Error {
    Error::new(format!(
        "interface {} has an MTU of {}; that of a microVM's device can be 65535 at most",
        interface.name, interface.mtu
    ))
}

/// A locally administered MAC address, for a device that does not have an interface's yet.
fn random_mac() -> Result<[u8; 6]> {
    let [a, b, c, d, e, ..] = random_u64()?.to_ne_bytes();
    Ok([0x02, a, b, c, d, e])
}
