//! Redirects of frames between an interface and a tap. Frames that come in at one go out at the
//! other. Each of the two has an ingress queueing discipline with one filter (tc-mirred(8)).
//!
//! The filter on the interface bears a mark, so that it is known again: the interface is not the
//! sandbox's, and may outlive it.

use std::{fmt, io};

use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{
        TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
        TcActionType, TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcFilterU32,
        TcFilterU32Option, TcHandle, TcHeader, TcMessage, TcMirror, TcMirrorActionType, TcOption,
        TcU32Key, TcU32Selector, TcU32SelectorFlags,
    },
};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Explain, Result},
    network::{interface::Interface, netlink::Netlink, resolver::PORTS, tap::Tap},
    random::random_u64,
};

/// Prefix of all marks.
const MARK_PREFIX: &str = "isopod";

/// `ETH_P_ALL`: frames of every protocol.
const ETH_P_ALL: u16 = 3;

/// `ETH_P_IP` and `ETH_P_ARP`.
const ETH_P_IP: u16 = 0x0800;
const ETH_P_ARP: u16 = 0x0806;

/// Kinds of queueing disciplines for incoming frames.
const INGRESS: &str = "ingress";
const CLSACT: &str = "clsact";

/// The mark of one sandbox's redirects: the cookie of their actions, 16 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Mark(String);

impl Mark {
    /// A mark that no other sandbox has.
    pub(super) fn new() -> Result<Self> {
        let number = random_u64()? & ((1 << 40) - 1);
        Ok(Self(format!("{MARK_PREFIX}{number:010x}")))
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Connects a claimed interface with a tap. If another sandbox has been faster, or this host's
/// kernel cannot do it, nothing is left on the interface.
pub(super) fn connect(
    netlink: &Netlink,
    interface: &Interface,
    tap: &Tap,
    mark: &Mark,
) -> Result<()> {
    let what = || format!("cannot redirect interface {} to a tap", interface.name);
    tap.set_mtu(netlink, interface.mtu)?;
    netlink.create(qdisc(tap.index)).map_err(|e| lacking(what(), e))?;
    netlink.create(filter(tap.index, interface.index, mark)).map_err(|e| lacking(what(), e))?;
    match netlink.create(qdisc(interface.index)) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            // The discipline that was found empty. Of two filters with one priority the kernel
            // takes the first, so the interface cannot become two sandboxes'.
            if !matches!(ingress(netlink, interface.index).explain(what)?, Ingress::Empty) {
                return Err(taken(interface));
            }
        }
        made => made.explain(what)?,
    }
    netlink.create(filter(interface.index, tap.index, mark)).map_err(|e| {
        if e.kind() == io::ErrorKind::AlreadyExists {
            return taken(interface);
        }
        // This is the discipline that has just been made, and bears no mark yet.
        let _ = remove_empty(netlink, interface.index);
        Error::because(what(), e)
    })
}

/// Redirects one tap to another, to find out whether this host's kernel can.
pub(super) fn try_out(netlink: &Netlink, from: &Tap, to: &Tap, mark: &Mark) -> Result<()> {
    let what = || "cannot redirect a tap to another".to_owned();
    netlink.create(qdisc(from.index)).map_err(|e| lacking(what(), e))?;
    netlink.create(filter(from.index, to.index, mark)).map_err(|e| lacking(what(), e))
}

/// Removes a queueing discipline that has no filter, and so does nothing.
fn remove_empty(netlink: &Netlink, index: u32) -> io::Result<()> {
    match ingress(netlink, index)? {
        Ingress::Empty => netlink.change(RouteNetlinkMessage::DelQueueDiscipline(qdisc_of(index))),
        _ => Ok(()),
    }
}

/// Removes from an interface what a killed sandbox has left: the redirect with its mark, or the
/// discipline that was to bear the mark.
pub(super) fn clear(netlink: &Netlink, index: u32, mark: &Mark) -> io::Result<()> {
    disconnect(netlink, index, mark)?;
    remove_empty(netlink, index)
}

/// The error of a request for traffic control, with advice if the kernel lacks it. A tap's requests
/// come first, so they are the first to fail.
fn lacking(what: String, e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::NotFound => Error::new(format!(
            "{what}: this host's kernel lacks traffic control (`modprobe -a sch_ingress cls_matchall \
             act_mirred` may load it)"
        )),
        _ => Error::because(what, e),
    }
}

/// Removes the redirect with this mark from an interface, if there is one.
pub(super) fn disconnect(netlink: &Netlink, index: u32, mark: &Mark) -> io::Result<()> {
    match ingress(netlink, index)? {
        Ingress::Redirect { mark: found, .. } if found == *mark => {
            netlink.change(RouteNetlinkMessage::DelQueueDiscipline(qdisc_of(index)))
        }
        _ => Ok(()),
    }
}

/// Checks that nobody else has the interface, and removes a redirect that a killed sandbox process
/// has left. The interface of another microVM is an error, and so is one whose incoming frames
/// somebody else handles.
pub(super) fn claim(netlink: &Netlink, interface: &Interface) -> Result<()> {
    let what = || format!("cannot look at the traffic control of interface {}", interface.name);
    match ingress(netlink, interface.index).explain(what)? {
        // A sandbox process that is killed while it makes its redirect leaves an empty discipline.
        Ingress::Nothing | Ingress::Empty => Ok(()),
        Ingress::Other(kind) => Err(Error::new(format!(
            "interface {} has a queueing discipline {kind} already, whose filters a microVM would \
             bypass: remove it (`tc qdisc del dev {0} {kind}`)",
            interface.name
        ))),
        Ingress::Redirect { to, .. } if exists(netlink, to).explain(what)? => Err(taken(interface)),
        // The tap is gone, and so is the microVM. Nobody has cleaned up after a killed sandbox
        // process.
        Ingress::Redirect { mark, .. } => disconnect(netlink, interface.index, &mark).explain(what),
    }
}

fn taken(interface: &Interface) -> Error {
    Error::new(format!(
        "interface {} is used by another microVM: a microVM takes the interfaces of a network \
         namespace for itself, so containers in different microVMs cannot share one; give each a \
         network of its own",
        interface.name
    ))
}

/// The handler of the frames that come in at an interface.
enum Ingress {
    Nothing,
    /// A discipline like that of a redirect, without any filter.
    Empty,
    /// A redirect of a sandbox, with the index of its target.
    Redirect {
        mark: Mark,
        to: u32,
    },
    /// A discipline that somebody else has made.
    Other(String),
}

fn ingress(netlink: &Netlink, index: u32) -> io::Result<Ingress> {
    let list = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::with_index(signed(index)));
    let kind = netlink.dump(list)?.into_iter().find_map(|message| match message {
        RouteNetlinkMessage::NewQueueDiscipline(found)
            if found.header.index == signed(index) && found.header.parent == TcHandle::INGRESS =>
        {
            kind_of(&found)
        }
        _ => None,
    });
    let Some(kind) = kind else { return Ok(Ingress::Nothing) };
    if kind != INGRESS {
        return Ok(Ingress::Other(kind));
    }
    let mut list = TcMessage::with_index(signed(index));
    list.header.parent = TcHandle { major: u16::MAX, minor: 0 };
    let filters = netlink.dump(RouteNetlinkMessage::GetTrafficFilter(list))?;
    let filters: Vec<TcMessage> = filters
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewTrafficFilter(found) => Some(found),
            _ => None,
        })
        .filter(|found| found.header.index == signed(index))
        .collect();
    Ok(match filters.iter().find_map(redirect_of) {
        Some((mark, to)) => Ingress::Redirect { mark, to },
        None if filters.is_empty() => Ingress::Empty,
        None => Ingress::Other(kind),
    })
}

fn kind_of(message: &TcMessage) -> Option<String> {
    message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) if kind == INGRESS || kind == CLSACT => Some(kind.clone()),
        _ => None,
    })
}

/// The mark and the target of a sandbox's filter.
fn redirect_of(message: &TcMessage) -> Option<(Mark, u32)> {
    let options = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let actions = options.iter().find_map(|option| match option {
        TcOption::MatchAll(TcFilterMatchAllOption::Action(actions)) => Some(actions),
        _ => None,
    })?;
    let action = actions.first()?;
    let mark = action.attributes.iter().find_map(|attribute| match attribute {
        TcActionAttribute::Cookie(cookie) => String::from_utf8(cookie.clone()).ok(),
        _ => None,
    })?;
    let to = action.attributes.iter().find_map(|attribute| match attribute {
        TcActionAttribute::Options(options) => options.iter().find_map(|option| match option {
            TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) => Some(mirror.ifindex),
            _ => None,
        }),
        _ => None,
    });
    // An action whose target is gone has no index.
    mark.starts_with(MARK_PREFIX).then(|| (Mark(mark), to.unwrap_or_default()))
}

fn exists(netlink: &Netlink, index: u32) -> io::Result<bool> {
    let links = netlink.links()?;
    Ok(links.iter().any(|link| link.header.index == index))
}

fn qdisc(index: u32) -> RouteNetlinkMessage {
    RouteNetlinkMessage::NewQueueDiscipline(qdisc_of(index))
}

fn qdisc_of(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(signed(index));
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    message.attributes.push(TcAttribute::Kind(INGRESS.to_owned()));
    message
}

/// A filter that sends out at `to` every frame that comes in at `from`.
fn filter(from: u32, to: u32, mark: &Mark) -> RouteNetlinkMessage {
    let mirred = mirred(TcMirrorActionType::EgressRedir, TcActionType::Stolen, to, mark);
    match_all(from, Priority::Redirect, ETH_P_ALL, mirred)
}

/// Purposes of an interface's filters, in the order in which the kernel tries the filters.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Priority {
    AddressResolution = 1,
    NameServer = 2,
    Redirect = 3,
}

fn mirred(kind: TcMirrorActionType, then: TcActionType, to: u32, mark: &Mark) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = then;
    mirror.eaction = kind;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Cookie(mark.0.clone().into_bytes()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    action
}

fn match_all(at: u32, priority: Priority, protocol: u16, action: TcAction) -> RouteNetlinkMessage {
    let options = vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![action]))];
    new_filter(at, priority, protocol, TcFilterMatchAll::KIND, options)
}

fn new_filter(
    at: u32,
    priority: Priority,
    protocol: u16,
    kind: &str,
    options: Vec<TcOption>,
) -> RouteNetlinkMessage {
    let header = TcHeader {
        index: signed(at),
        parent: TcHandle { major: u16::MAX, minor: 0 },
        info: ((priority as u32) << 16) | u32::from(protocol.to_be()),
        ..TcHeader::default()
    };
    let attributes = vec![TcAttribute::Kind(kind.to_owned()), TcAttribute::Options(options)];
    RouteNetlinkMessage::NewTrafficFilter(TcMessage::from_parts(header, attributes))
}

/// Leaves answers of name servers to this host's stack, if they are for ports of the namespace's
/// own. Also lets this host's stack learn of neighbours beside the guest. The stack and the guest
/// have the same addresses, so both announce the same.
pub(super) fn pass_names(
    netlink: &Netlink,
    interface: &Interface,
    tap: u32,
    mark: &Mark,
) -> Result<()> {
    let what = || format!("cannot let the name server of interface {} ask others", interface.name);
    let copy = mirred(TcMirrorActionType::EgressMirror, TcActionType::Ok, tap, mark);
    let copy = match_all(interface.index, Priority::AddressResolution, ETH_P_ARP, copy);
    netlink.create(copy).map_err(|e| lacking(what(), e))?;
    create_pass_answers(netlink, interface.index, &what())
}

/// Makes the filters for answers of name servers.
fn create_pass_answers(netlink: &Netlink, index: u32, what: &str) -> Result<()> {
    for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_TCP] {
        let filter = pass_answers(index, protocol.cast_unsigned());
        netlink.create(filter).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::new(format!(
                "{what}: this host's kernel lacks a filter (`modprobe cls_u32` may load it)"
            )),
            _ => Error::because(what.to_owned(), e),
        })?;
    }
    Ok(())
}

/// Tries the filters that networks of Docker's users need, at a tap with a redirect.
pub(super) fn try_names(netlink: &Netlink, tap: &Tap) -> Result<()> {
    create_pass_answers(netlink, tap.index, "the name server of Docker cannot be asked")
}

/// A filter that takes IPv4 packets from port 53 to one of [`PORTS`], and does nothing with them.
/// Fragments, and packets with options, are the guest's.
fn pass_answers(at: u32, protocol: u32) -> RouteNetlinkMessage {
    /// The port of name servers.
    const DOMAIN: u32 = 53;
    let ports = u32::from(PORTS.0);
    let key = |off, mask, val| {
        let mut key = TcU32Key::default();
        (key.off, key.mask, key.val) = (off, mask, val);
        key
    };
    let keys = vec![
        // Version 4, and a header of 20 bytes.
        key(0, 0xff00_0000, 0x4500_0000),
        // Neither a first nor a later fragment.
        key(4, 0x0000_3fff, 0),
        key(8, 0x00ff_0000, protocol << 16),
        key(20, 0xffff_0000 | ports, (DOMAIN << 16) | ports),
    ];
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = u8::try_from(keys.len()).unwrap_or(u8::MAX);
    selector.keys = keys;
    let options = vec![
        // Any class will do: the classification ends at a filter with a class.
        TcOption::U32(TcFilterU32Option::ClassId(TcHandle { major: 1, minor: 1 })),
        TcOption::U32(TcFilterU32Option::Selector(selector)),
    ];
    new_filter(at, Priority::NameServer, ETH_P_IP, TcFilterU32::KIND, options)
}

/// Converts the index of an interface to a signed number, as traffic control has it. Indices are
/// positive.
fn signed(index: u32) -> i32 {
    index.cast_signed()
}
