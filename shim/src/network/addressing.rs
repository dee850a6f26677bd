//! Addresses, routes, neighbours and rules of the namespace, as requests for the guest's kernel.
//!
//! An interface has the same index in the guest. So the guest's kernel is asked to make what this
//! kernel lists, without attributes that only describe it.

use std::collections::HashSet;

use isopod_protocol::agent::NetlinkRequest;
use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage},
    neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::{
        RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHop, RouteNextHopFlags,
        RouteType,
    },
    rule::{RuleAttribute, RuleFlags, RuleMessage},
};

use crate::{
    error::{Error, Explain, Result},
    network::{
        interface::{Interface, LOOPBACK},
        netlink::{self, Netlink},
    },
};

/// The table of a namespace's own addresses. The kernel fills it (linux/rtnetlink.h).
const TABLE_LOCAL: u32 = 255;

/// Rules that each namespace has from the beginning, as priority and table.
const DEFAULT_RULES: [(u32, u32); 3] = [(0, TABLE_LOCAL), (32766, 254), (32767, 253)];

/// Requests for the guest's kernel, in the order in which it can carry them out. A route or a rule
/// that cannot be copied is an error.
pub(super) fn requests(
    netlink: &Netlink,
    interfaces: &[Interface],
    addresses: Vec<AddressMessage>,
) -> Result<Vec<NetlinkRequest>> {
    let copied: HashSet<u32> =
        interfaces.iter().map(|interface| interface.index).chain([LOOPBACK]).collect();
    let mut requests: Vec<NetlinkRequest> = addresses
        .into_iter()
        .filter(|address| copied.contains(&address.header.index))
        .filter(|address| !is_standard_loopback(address))
        .map(address)
        .collect();
    requests.extend(neighbours(netlink, &copied)?);
    requests.extend(routes(netlink, &copied)?);
    requests.extend(rules(netlink)?);
    Ok(requests)
}

fn request(what: String, message: RouteNetlinkMessage, flags: u16) -> NetlinkRequest {
    let message = netlink::message(message, NLM_F_ACK | NLM_F_CREATE | flags, 0);
    NetlinkRequest { message, what, ..NetlinkRequest::default() }
}

/// Tells whether an address is one that the kernel gives to loopback when it is brought up:
/// 127.0.0.1 or ::1.
fn is_standard_loopback(address: &AddressMessage) -> bool {
    address.header.index == LOOPBACK
        && address.attributes.iter().any(|attribute| match attribute {
            AddressAttribute::Address(ip) => {
                ip.is_loopback() && matches!(address.header.prefix_len, 8 | 128)
            }
            _ => false,
        })
}

fn address(mut address: AddressMessage) -> NetlinkRequest {
    let mut flags = AddressFlags::empty();
    let mut ip = String::new();
    address.attributes.retain(|attribute| match attribute {
        AddressAttribute::Flags(found) => {
            flags = *found;
            false
        }
        AddressAttribute::Address(found) => {
            ip = found.to_string();
            true
        }
        AddressAttribute::Local(_)
        | AddressAttribute::Label(_)
        | AddressAttribute::Broadcast(_)
        | AddressAttribute::Protocol(_) => true,
        // Lifetimes above all are left out, because nobody prolongs them in the guest.
        _ => false,
    });
    flags &= AddressFlags::Homeaddress | AddressFlags::Mcautojoin;
    // No duplicate address detection: this host has had the address, so nobody else has it. No
    // prefix route: the routes that the kernel would make are copied with all others.
    flags |= AddressFlags::Nodad | AddressFlags::Noprefixroute;
    address.header.flags = AddressHeaderFlags::empty();
    address.attributes.push(AddressAttribute::Flags(flags));
    let what = format!("address {ip}/{}", address.header.prefix_len);
    request(what, RouteNetlinkMessage::NewAddress(address), NLM_F_EXCL)
}

/// Neighbours that somebody has entered by hand.
fn neighbours(netlink: &Netlink, copied: &HashSet<u32>) -> Result<Vec<NetlinkRequest>> {
    let all = netlink.dump(RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()));
    let all = all.explain(|| "cannot list the network's neighbours".into())?;
    let mut found = Vec::new();
    for message in all {
        let RouteNetlinkMessage::NewNeighbour(mut neighbour) = message else { continue };
        let header = &mut neighbour.header;
        let family = matches!(header.family, AddressFamily::Inet | AddressFamily::Inet6);
        if !family || header.state != NeighbourState::Permanent || !copied.contains(&header.ifindex)
        {
            continue;
        }
        header.flags &= NeighbourFlags::Router;
        neighbour.attributes.retain(|attribute| {
            matches!(
                attribute,
                NeighbourAttribute::Destination(_) | NeighbourAttribute::LinkLayerAddress(_)
            )
        });
        let what = format!("neighbour {:?}", neighbour.attributes.first());
        found.push(request(what, RouteNetlinkMessage::NewNeighbour(neighbour), NLM_F_EXCL));
    }
    Ok(found)
}

fn routes(netlink: &Netlink, copied: &HashSet<u32>) -> Result<Vec<NetlinkRequest>> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut list = RouteMessage::default();
        list.header.address_family = family;
        let all = netlink.dump(RouteNetlinkMessage::GetRoute(list));
        for message in all.explain(|| "cannot list the network's routes".into())? {
            let RouteNetlinkMessage::NewRoute(route) = message else { continue };
            if is_copied(&route, copied) {
                found.push(self::route(route)?);
            }
        }
    }
    // A gateway has to be reachable before a route through it can be made.
    found.sort_by_key(|(through_gateway, _)| *through_gateway);
    Ok(found.into_iter().map(|(_, request)| request).collect())
}

fn is_copied(route: &RouteMessage, copied: &HashSet<u32>) -> bool {
    use RouteType::{BlackHole, Prohibit, Throw, Unicast, Unreachable};
    let kinds = [Unicast, BlackHole, Unreachable, Prohibit, Throw];
    let attributes = &route.attributes;
    let table = attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    let ours = attributes.iter().all(|attribute| match attribute {
        RouteAttribute::Oif(index) => copied.contains(index),
        _ => true,
    });
    kinds.contains(&route.header.kind)
        && table.unwrap_or(route.header.table.into()) != TABLE_LOCAL
        && !route.header.flags.contains(RouteFlags::Cloned)
        && ours
}

/// The request for a route. The flag tells whether the route goes through a gateway.
fn route(mut route: RouteMessage) -> Result<(bool, NetlinkRequest)> {
    let what = describe(&route.header, &route.attributes);
    route.header.flags &= RouteFlags::Onlink;
    let mut through_gateway = false;
    keep(&mut route.attributes, &what, &mut through_gateway)?;
    for attribute in &mut route.attributes {
        if let RouteAttribute::MultiPath(hops) = attribute {
            for RouteNextHop { flags, attributes, .. } in hops {
                *flags &= RouteNextHopFlags::Onlink;
                keep(attributes, &what, &mut through_gateway)?;
            }
        }
    }
    // Several routes to one destination may differ in their gateways only.
    Ok((through_gateway, request(what, RouteNetlinkMessage::NewRoute(route), NLM_F_APPEND)))
}

fn keep(
    attributes: &mut Vec<RouteAttribute>,
    what: &str,
    through_gateway: &mut bool,
) -> Result<()> {
    if attributes.iter().any(|a| matches!(a, RouteAttribute::Encap(_))) {
        return Err(Error::new(format!(
            "{what} of the network namespace is a tunnel, which a microVM cannot have: remove it"
        )));
    }
    *through_gateway |=
        attributes.iter().any(|a| matches!(a, RouteAttribute::Gateway(_) | RouteAttribute::Via(_)));
    attributes.retain(|attribute| {
        matches!(
            attribute,
            RouteAttribute::Destination(_)
                | RouteAttribute::Source(_)
                | RouteAttribute::Gateway(_)
                | RouteAttribute::Via(_)
                | RouteAttribute::PrefSource(_)
                | RouteAttribute::Oif(_)
                | RouteAttribute::Priority(_)
                | RouteAttribute::Metrics(_)
                | RouteAttribute::MultiPath(_)
                | RouteAttribute::Realm(_)
                | RouteAttribute::Table(_)
                | RouteAttribute::Preference(_)
        )
    });
    Ok(())
}

fn describe(header: &RouteHeader, attributes: &[RouteAttribute]) -> String {
    let to = attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(to) => {
            Some(format!("{to:?}/{}", header.destination_prefix_length))
        }
        _ => None,
    });
    format!("route {}", to.as_deref().unwrap_or("default"))
}

fn rules(netlink: &Netlink) -> Result<Vec<NetlinkRequest>> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut list = RuleMessage::default();
        list.header.family = family;
        let all = netlink.dump(RouteNetlinkMessage::GetRule(list));
        for message in all.explain(|| "cannot list the network's routing rules".into())? {
            let RouteNetlinkMessage::NewRule(rule) = message else { continue };
            if !is_default(&rule) {
                found.push(self::rule(rule)?);
            }
        }
    }
    Ok(found)
}

fn is_default(rule: &RuleMessage) -> bool {
    let (mut priority, mut table, mut plain) = (0, u32::from(rule.header.table), true);
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Priority(found) => priority = *found,
            RuleAttribute::Table(found) => table = *found,
            RuleAttribute::SuppressPrefixLen(u32::MAX) | RuleAttribute::Protocol(_) => {}
            _ => plain = false,
        }
    }
    plain && DEFAULT_RULES.contains(&(priority, table))
}

fn rule(mut rule: RuleMessage) -> Result<NetlinkRequest> {
    use RuleAttribute as A;
    let priority = rule.attributes.iter().find_map(|attribute| match attribute {
        A::Priority(priority) => Some(*priority),
        _ => None,
    });
    let what = format!("routing rule {}", priority.unwrap_or(0));
    rule.header.flags &= RuleFlags::Invert;
    let strange = rule.attributes.iter().find(|attribute| {
        !matches!(
            attribute,
            A::Destination(_)
                | A::Source(_)
                | A::Iifname(_)
                | A::Oifname(_)
                | A::Goto(_)
                | A::Priority(_)
                | A::FwMark(_)
                | A::FwMask(_)
                | A::Realm(_)
                | A::SuppressIfGroup(_)
                | A::SuppressPrefixLen(_)
                | A::Table(_)
                | A::UidRange(_)
                | A::Protocol(_)
                | A::IpProtocol(_)
                | A::SourcePortRange(_)
                | A::DestinationPortRange(_)
        )
    });
    if let Some(strange) = strange {
        return Err(Error::new(format!(
            "{what} of the network namespace has {strange:?}, which a microVM cannot have: remove it"
        )));
    }
    Ok(request(what, RouteNetlinkMessage::NewRule(rule), NLM_F_EXCL))
}
