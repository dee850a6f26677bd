//! Connections to the loopback addresses of the network namespace that stands for the container's.
//!
//! The container's network stack is in its microVM, so at loopback in the host's namespace nobody
//! listens. `kubectl port-forward` of containerd and CRI-O connects to `localhost` in exactly that
//! namespace. A [`LoopbackCatch`] gives these connections, on every port, to one listening socket.
//! Its owner passes them on to the guest's loopback.
//!
//! ```text
//!  127.0.0.1:PORT, [::1]:PORT ──> BPF program (SK_LOOKUP) ──> listening socket ──> guest
//!  127.0.0.11:53, others      ──> the kernel's own lookup
//! ```
//!
//! A program of type `SK_LOOKUP` (Linux 5.9, `Documentation/bpf/prog_sk_lookup.rst`) needs no
//! netfilter and no rules to clean up. The kernel runs it before its own lookup of a listening
//! socket. So the program takes exactly two addresses: other listeners, such as Docker's name
//! server, keep their connections. A listener at a wildcard address keeps all but those at the two
//! addresses. Packets of established connections do not pass through the program.

use std::{
    ffi::c_char,
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt},
};

use crate::error::{Error, Explain, Result};

/// The network namespace of the calling thread.
const NAMESPACE: &str = "/proc/thread-self/ns/net";

/// `BPF_SK_LOOKUP` of `enum bpf_attach_type` (linux/bpf.h).
const BPF_SK_LOOKUP: u32 = 36;

/// Number of instructions of the program.
const LENGTH: usize = 32;

/// Length of the queue of connections to be accepted.
const BACKLOG: i32 = 128;

/// A BPF program that takes the connections to loopback in a network namespace. Detached when
/// dropped. Accepted connections outlive it.
#[derive(Debug)]
pub(crate) struct LoopbackCatch {
    /// The only reference to the attachment. It keeps the program, and so the map.
    _link: OwnedFd,
}

impl LoopbackCatch {
    /// Attaches the program to the network namespace of the calling thread. Also returns the
    /// listening socket, which is non-blocking. Once closed, the socket catches nothing.
    ///
    /// The interface `lo` has to be up for connections, but not for this call.
    pub(crate) fn new() -> Result<(Self, TcpListener)> {
        let listener =
            listening_socket().explain(|| "cannot listen at loopback for the container".into())?;
        let what = |e| unavailable("cannot catch connections to loopback", e);
        let map = create_map().map_err(what)?;
        set_socket(&map, &listener).map_err(what)?;
        let program = load(&program(map.as_raw_fd())).map_err(what)?;
        let namespace = File::open(NAMESPACE).explain(|| format!("cannot open {NAMESPACE}"))?;
        let link = attach(&program, &namespace).map_err(what)?;
        Ok((Self { _link: link }, listener))
    }
}

/// The port that a caught connection is for, and whether its address is `::1` and not 127.0.0.1.
/// `local` is the local address of the accepted socket.
pub(crate) fn target(local: SocketAddr) -> (u16, bool) {
    // The listening socket's family makes 127.0.0.1 a v4-mapped address.
    (local.port(), local.ip().to_canonical().is_ipv6())
}

/// A listening socket that only the program can reach.
///
/// `bpf_sk_assign` compares the socket's family, not its address: an `AF_INET6` socket takes IPv4
/// too unless it is `IPV6_V6ONLY`. Bound to `::1`, the socket would become so (`__inet6_bind`).
/// Bound to `::`, it would be reachable at every address. Bound to the v4-mapped 127.0.0.1, it is
/// reachable there only, and the program takes that address anyway.
fn listening_socket() -> rustix::io::Result<TcpListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let stream = |family| socket_with(family, SocketType::STREAM, flags, None);
    let (socket, ip) = match stream(AddressFamily::INET6) {
        // A kernel without IPv6.
        Err(Errno::AFNOSUPPORT) => (stream(AddressFamily::INET)?, Ipv4Addr::LOCALHOST.into()),
        socket => {
            let socket = socket?;
            // The sysctl net.ipv6.bindv6only may have set it.
            sockopt::set_ipv6_v6only(&socket, false)?;
            (socket, Ipv4Addr::LOCALHOST.to_ipv6_mapped().into())
        }
    };
    // While `lo` is down, 127.0.0.1 is not yet an address of the namespace.
    sockopt::set_ip_freebind(&socket, true)?;
    bind(&socket, &SocketAddr::new(ip, 0))?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// An instruction, as `struct bpf_insn` (linux/bpf.h).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Bit fields: the source register, then the destination register.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// An instruction from its code, destination register, source register, offset and immediate.
const fn op(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    let registers = if cfg!(target_endian = "little") { from << 4 | to } else { to << 4 | from };
    Instruction { code, registers, offset, immediate }
}

/// The program, for a map with the listening socket.
fn program(map: RawFd) -> [Instruction; LENGTH] {
    // Codes of instructions (linux/bpf.h, linux/bpf_common.h).
    const LOAD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
    const STORE: u8 = 0x62; // BPF_ST | BPF_MEM | BPF_W
    const LOAD_64: u8 = 0x18; // BPF_LD | BPF_IMM | BPF_DW, in two instructions
    const MOVE: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
    const SET: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
    const ADD: u8 = 0x07; // BPF_ALU64 | BPF_ADD | BPF_K
    const IF_EQUAL: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const UNLESS_EQUAL: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
    const JUMP: u8 = 0x05; // BPF_JMP | BPF_JA
    const CALL: u8 = 0x85; // BPF_JMP | BPF_CALL
    const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT
    const PSEUDO_MAP_FD: u8 = 1;

    // Helpers (`enum bpf_func_id`).
    const MAP_LOOKUP_ELEM: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;

    // Fields of `struct bpf_sk_lookup`. Addresses are in network byte order.
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const LOCAL_IP4: i16 = 40;
    const LOCAL_IP6: i16 = 44;

    const SK_PASS: i32 = 1;
    const IPV4: i32 = i32::from_ne_bytes(Ipv4Addr::LOCALHOST.octets());
    /// The last quarter of `::1`. The others are zero.
    const IPV6_END: i32 = 1_i32.to_be();

    // Targets of jumps, as indices into the table.
    const V6: i16 = 8;
    const CATCH: i16 = 16;
    const PASS: i16 = 30;

    let mut program = [
        // Keep the context: calls overwrite r1 to r5.
        op(MOVE, 6, 1, 0, 0),
        // Only TCP.
        op(LOAD, 0, 6, PROTOCOL, 0),
        op(UNLESS_EQUAL, 0, 0, PASS, libc::IPPROTO_TCP),
        // The family is AF_INET or AF_INET6.
        op(LOAD, 0, 6, FAMILY, 0),
        op(IF_EQUAL, 0, 0, V6, libc::AF_INET6),
        // Only 127.0.0.1.
        op(LOAD, 0, 6, LOCAL_IP4, 0),
        op(UNLESS_EQUAL, 0, 0, PASS, IPV4),
        op(JUMP, 0, 0, CATCH, 0),
        // V6: only ::1.
        op(LOAD, 0, 6, LOCAL_IP6, 0),
        op(UNLESS_EQUAL, 0, 0, PASS, 0),
        op(LOAD, 0, 6, LOCAL_IP6 + 4, 0),
        op(UNLESS_EQUAL, 0, 0, PASS, 0),
        op(LOAD, 0, 6, LOCAL_IP6 + 8, 0),
        op(UNLESS_EQUAL, 0, 0, PASS, 0),
        op(LOAD, 0, 6, LOCAL_IP6 + 12, 0),
        op(UNLESS_EQUAL, 0, 0, PASS, IPV6_END),
        // CATCH: r0 = bpf_map_lookup_elem(map, &0), with the key on the stack.
        op(STORE, 10, 0, -4, 0),
        op(LOAD_64, 1, PSEUDO_MAP_FD, 0, map),
        op(0, 0, 0, 0, 0),
        op(MOVE, 2, 10, 0, 0),
        op(ADD, 2, 0, 0, -4),
        op(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        // A listening socket that is closed has left the map.
        op(IF_EQUAL, 0, 0, PASS, 0),
        // bpf_sk_assign(context, socket, 0). If it fails, the kernel looks for a socket itself.
        op(MOVE, 7, 0, 0, 0),
        op(MOVE, 1, 6, 0, 0),
        op(MOVE, 2, 7, 0, 0),
        op(SET, 3, 0, 0, 0),
        op(CALL, 0, 0, 0, SK_ASSIGN),
        // bpf_sk_release(socket). The verifier insists.
        op(MOVE, 1, 7, 0, 0),
        op(CALL, 0, 0, 0, SK_RELEASE),
        // PASS: on with the lookup, with the assigned socket if there is one.
        op(SET, 0, 0, 0, SK_PASS),
        op(EXIT, 0, 0, 0, 0),
    ];
    // The kernel counts a jump from the instruction after it.
    for (next, instruction) in (1..).zip(&mut program) {
        if matches!(instruction.code, IF_EQUAL | UNLESS_EQUAL | JUMP) {
            instruction.offset -= next;
        }
    }
    program
}

/// Makes a map for one socket.
fn create_map() -> io::Result<OwnedFd> {
    const BPF_MAP_CREATE: i32 = 0;
    const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
    // Type, size of a key, size of a value, number of entries.
    bpf(BPF_MAP_CREATE, &[BPF_MAP_TYPE_SOCKMAP, 4, 8, 1_u32]).map(own)
}

/// Puts the socket into the map.
fn set_socket(map: &OwnedFd, socket: &TcpListener) -> io::Result<()> {
    const BPF_MAP_UPDATE_ELEM: i32 = 2;
    #[repr(C)]
    struct Attributes {
        map: u32,
        padding: u32,
        key: *const u32,
        value: *const u64,
        flags: u64,
    }
    let (key, value) = (0, u64::from(number(socket)));
    let attributes =
        Attributes { map: number(map), padding: 0, key: &key, value: &value, flags: 0 };
    bpf(BPF_MAP_UPDATE_ELEM, &attributes).map(drop)
}

/// Has the kernel verify the program and take it.
fn load(program: &[Instruction; LENGTH]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: i32 = 5;
    const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
    #[repr(C)]
    struct Attributes {
        kind: u32,
        length: u32,
        instructions: *const Instruction,
        license: *const c_char,
        log: [u32; 4],
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        attach_type: u32,
    }
    let attributes = Attributes {
        kind: BPF_PROG_TYPE_SK_LOOKUP,
        length: LENGTH as u32,
        instructions: program.as_ptr(),
        // The program's helpers do not ask for the GPL.
        license: c"Apache-2.0".as_ptr(),
        log: [0; 4],
        kernel_version: 0,
        flags: 0,
        name: *b"isopod_loopback\0",
        interface: 0,
        attach_type: BPF_SK_LOOKUP,
    };
    bpf(BPF_PROG_LOAD, &attributes).map(own)
}

/// Attaches the program to the network namespace, until the link is closed.
fn attach(program: &OwnedFd, namespace: &File) -> io::Result<OwnedFd> {
    const BPF_LINK_CREATE: i32 = 28;
    // Program, target, type of attachment, flags.
    bpf(BPF_LINK_CREATE, &[number(program), number(namespace), BPF_SK_LOOKUP, 0]).map(own)
}

/// A descriptor as bpf(2) has it.
fn number(descriptor: &impl AsFd) -> u32 {
    descriptor.as_fd().as_raw_fd().cast_unsigned()
}

/// Calls bpf(2) with a part of `union bpf_attr` (linux/bpf.h) that has no padding. Pointers in the
/// union have 64 bits, as on all of Isopod's targets.
fn bpf<T>(command: i32, attributes: &T) -> io::Result<RawFd> {
    let attributes: *const T = attributes;
    // SAFETY: the kernel reads this many bytes at `attributes`, a reference. The commands above
    // do not write to this process's memory, and their pointers are to values that live across
    // the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    match RawFd::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes a descriptor that bpf(2) has made. All of them are close-on-exec.
fn own(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just opened the descriptor for this call, so nobody else closes it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// The error of a call of bpf(2), with the most likely reason.
fn unavailable(what: &str, e: io::Error) -> Error {
    match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => Error::new(format!(
            "{what}: no permission to use BPF (isopod has to run as root, with CAP_BPF and \
             CAP_NET_ADMIN in the host's user namespace)"
        )),
        Some(libc::EINVAL | libc::ENOSYS) => Error::new(format!(
            "{what}: this host's kernel lacks BPF programs of type SK_LOOKUP (Linux 5.9 has them, \
             with CONFIG_BPF_SYSCALL and CONFIG_BPF_STREAM_PARSER)"
        )),
        _ => Error::because(what, e),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::ErrorKind, net::TcpStream, thread};

    use netlink_packet_route::{
        RouteNetlinkMessage,
        link::{LinkFlags, LinkMessage},
    };
    use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags, unshare_unsafe};

    use super::*;
    use crate::network::netlink::Netlink;

    /// Runs a test in a thread with a network namespace of its own.
    fn in_namespace(test: fn()) {
        let test = move || {
            // SAFETY: a new network namespace leaves descriptors and memory as they are.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            test();
        };
        thread::spawn(test).join().unwrap();
    }

    fn bring_lo_up() {
        let mut lo = LinkMessage::default();
        (lo.header.index, lo.header.flags, lo.header.change_mask) =
            (1, LinkFlags::Up, LinkFlags::Up);
        Netlink::open().unwrap().change(RouteNetlinkMessage::SetLink(lo)).unwrap();
    }

    fn refused(address: impl Into<SocketAddr>) -> bool {
        let tried = TcpStream::connect(address.into());
        tried.is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused)
    }

    #[test]
    fn connections_to_loopback_are_caught_and_no_others() {
        in_namespace(|| {
            let (catch, listener) = LoopbackCatch::new().unwrap();
            bring_lo_up();
            let own_port = listener.local_addr().unwrap().port();
            assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
            listener.set_nonblocking(false).unwrap();
            let name_server = TcpListener::bind("127.0.0.11:53").unwrap();
            let wildcard = TcpListener::bind("0.0.0.0:8080").unwrap();

            for (address, expected) in [
                ("127.0.0.1:1".to_owned(), (1, false)),
                ("127.0.0.1:8080".to_owned(), (8080, false)),
                ("[::1]:53".to_owned(), (53, true)),
                ("[::1]:65535".to_owned(), (65535, true)),
                (format!("127.0.0.1:{own_port}"), (own_port, false)),
            ] {
                let mut client = TcpStream::connect(&address).unwrap();
                let (mut server, peer) = listener.accept().unwrap();
                assert_eq!(target(server.local_addr().unwrap()), expected, "{address}");
                assert_eq!(peer.port(), client.local_addr().unwrap().port());
                io::Write::write_all(&mut server, b"x").unwrap();
                io::Read::read_exact(&mut client, &mut [0]).unwrap();
            }

            for (address, listener) in
                [("127.0.0.11:53", name_server), ("127.0.0.2:8080", wildcard)]
            {
                let client = TcpStream::connect(address).unwrap();
                assert_eq!(listener.accept().unwrap().1, client.local_addr().unwrap());
            }
            assert!(refused(([127, 0, 0, 2], own_port)), "the socket is reachable elsewhere");

            let client = TcpStream::connect("[::1]:80").unwrap();
            let (mut server, _) = listener.accept().unwrap();
            drop(catch);
            assert!(refused(([127, 0, 0, 1], 80)));
            assert!(refused((std::net::Ipv6Addr::LOCALHOST, 80)));
            io::Write::write_all(&mut server, b"x").unwrap();
            io::Read::read_exact(&mut &client, &mut [0]).unwrap();
        });
    }

    #[test]
    fn without_ipv6_ipv4_is_caught_until_the_socket_is_closed() {
        in_namespace(|| {
            std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
            std::fs::write("/proc/sys/net/ipv6/bindv6only", "1").unwrap();
            bring_lo_up();
            let (_catch, listener) = LoopbackCatch::new().unwrap();
            listener.set_nonblocking(false).unwrap();
            let _client = TcpStream::connect("127.0.0.1:80").unwrap();
            let (server, _) = listener.accept().unwrap();
            assert_eq!(target(server.local_addr().unwrap()), (80, false));
            drop(listener);
            assert!(refused(([127, 0, 0, 1], 81)));
        });
    }

    #[test]
    fn a_lack_of_permission_is_named() {
        in_namespace(|| {
            let none = CapabilitySet::empty();
            let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
            rustix::thread::set_capabilities(None, none).unwrap();
            let error = LoopbackCatch::new().unwrap_err().to_string();
            assert!(error.contains("no permission to use BPF"), "{error}");
        });
    }
}
