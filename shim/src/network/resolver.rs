//! The name server that an engine runs in the container's network namespace.
//!
//! On networks that users define, Docker serves names at [`RESOLVER`]. It redirects that address to
//! a socket of its own in the namespace. A guest has another loopback. So the agent answers at that
//! address in the guest, and passes all questions to the sandbox process, which is in the
//! namespace.
//!
//! The name server asks other servers from the namespace too. Their answers must not go to the
//! guest.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
};

use crate::error::{Explain, Result};

/// Docker's name server on every network that users define (libnetwork, `resolverIPSandbox`).
pub(crate) const RESOLVER: SocketAddr =
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11)), 53);

/// Ports for the namespace's own sockets from now on: the uppermost part of all ports. The guest's
/// kernel gives none of them to a socket by itself. Answers of name servers to these ports are not
/// for the guest.
pub(super) const PORTS: (u16, u16) = (0xf000, 0xffff);

/// Tells whether a resolv.conf names the engine's name server.
pub(super) fn is_named_in(resolv_conf: Option<&Path>) -> Result<bool> {
    let Some(path) = resolv_conf else { return Ok(false) };
    let text = match fs::read_to_string(path) {
        // Without the file nobody has been told of a name server.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        text => text.explain(|| format!("cannot read {}", path.display()))?,
    };
    Ok(names(&text).any(|ip| ip == RESOLVER.ip()))
}

/// The name servers of a resolv.conf(5).
fn names(text: &str) -> impl Iterator<Item = IpAddr> {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok())?
    })
}

/// Makes the kernel choose ports from [`PORTS`] in the namespace of this process.
pub(super) fn reserve_ports() -> Result<()> {
    const FILE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    let (first, last) = PORTS;
    fs::write(FILE, format!("{first} {last}")).explain(|| format!("cannot write {FILE}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engines_name_server_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        for (text, named) in [
            ("search example\nnameserver 127.0.0.11\noptions ndots:0\n", true),
            ("nameserver\t192.0.2.1\nnameserver 127.0.0.11", true),
            ("# nameserver 127.0.0.11\nnameserver 127.0.0.1\nnameserver x\nnameserver", false),
            ("", false),
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(is_named_in(Some(&path)).unwrap(), named, "{text:?}");
        }
        assert!(!is_named_in(None).unwrap());
        assert!(!is_named_in(Some(&dir.path().join("none"))).unwrap());
    }
}
