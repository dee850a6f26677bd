//! The interfaces of the namespace that a microVM takes over.

use std::{collections::HashSet, fs, io, path::Path};

use isopod_protocol::agent::NetworkSetting;
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::AddressMessage,
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
};

use crate::{
    error::{Error, Explain, Result},
    network::{netlink::Netlink, tap},
};

/// Index of the loopback interface of every network namespace (`LOOPBACK_IFINDEX`).
pub(super) const LOOPBACK: u32 = 1;

/// An interface that is up or has an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: [u8; 6],
    /// MTU in bytes, without the Ethernet header.
    pub(super) mtu: u32,
    pub(super) up: bool,
}

/// The interfaces for the microVM, in the order of their indices: all that are up or have an
/// address.
///
/// Loopback and Isopod's own taps are left out. So are ports of another interface, whose frames are
/// those of their master. An interface that is not an Ethernet interface is an error.
pub(super) fn scan(netlink: &Netlink, addresses: &[AddressMessage]) -> Result<Vec<Interface>> {
    let addressed: HashSet<u32> = addresses.iter().map(|address| address.header.index).collect();
    let links = netlink.links().explain(|| "cannot list the network interfaces".into())?;
    let mut found = Vec::new();
    for link in &links {
        let up = link.header.flags.contains(LinkFlags::Up);
        let unused = !up && !addressed.contains(&link.header.index);
        if unused || link.header.flags.contains(LinkFlags::Loopback) || is_port(link) {
            continue;
        }
        let interface = interface(link, up)?;
        if !(interface.name.starts_with(tap::PREFIX) && is_tap(link)) {
            found.push(interface);
        }
    }
    found.sort_by_key(|interface| interface.index);
    Ok(found)
}

/// The addresses of all interfaces.
pub(super) fn addresses(netlink: &Netlink) -> Result<Vec<AddressMessage>> {
    let all = netlink.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()));
    let all = all.explain(|| "cannot list the network addresses".into())?;
    Ok(all
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(address) => Some(address),
            _ => None,
        })
        .collect())
}

fn interface(link: &LinkMessage, up: bool) -> Result<Interface> {
    let (mut name, mut mac, mut mtu) = (None, None, None);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(bytes) => mtu = Some(*bytes),
            _ => {}
        }
    }
    let name = name.unwrap_or_else(|| link.header.index.to_string());
    match (mac, mtu) {
        (Some(mac), Some(mtu)) if link.header.link_layer_type == LinkLayerType::Ether => {
            Ok(Interface { index: link.header.index, name, mac, mtu, up })
        }
        _ => Err(Error::new(format!(
            "interface {name} is not an Ethernet interface (it is {:?}), and a microVM can have no \
             other",
            link.header.link_layer_type
        ))),
    }
}

fn is_port(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::Controller(_)))
}

fn is_tap(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Tun)),
        _ => false,
    })
}

/// The settings of IPv6 for the guest's kernel, which makes no addresses by itself. This host's
/// kernel has made them already, and they are copied. Only router advertisements bring others, if
/// the namespace takes them.
pub(super) fn settings(interfaces: &[Interface]) -> Result<Vec<NetworkSetting>> {
    let mut settings = vec![setting("lo", "disable_ipv6", disabled("lo")?)];
    for interface in interfaces {
        let name = &interface.name;
        // 1 is IN6_ADDR_GEN_MODE_NONE (linux/if_link.h).
        settings.push(setting(name, "addr_gen_mode", "1".into()));
        settings.push(setting(name, "disable_ipv6", disabled(name)?));
        if let Some(value) = read(name, "accept_ra")? {
            settings.push(setting(name, "accept_ra", value));
        }
    }
    Ok(settings)
}

/// The setting `disable_ipv6`. On a host without IPv6 it is 1.
fn disabled(name: &str) -> Result<String> {
    Ok(read(name, "disable_ipv6")?.unwrap_or_else(|| "1".into()))
}

fn setting(interface: &str, key: &str, value: String) -> NetworkSetting {
    NetworkSetting {
        path: format!("ipv6/conf/{interface}/{key}"),
        value,
        ..NetworkSetting::default()
    }
}

fn read(interface: &str, key: &str) -> Result<Option<String>> {
    let path = Path::new("/proc/sys/net/ipv6/conf").join(interface).join(key);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).explain(|| format!("cannot read {}", path.display())),
    }
}
