//! Debian packages of the end-to-end tests: container engines, and tools of the tests.
//!
//! The tests start their own engines, in separate namespaces. apt may start the packages' services
//! too, unless policy-rc.d forbids it.

use crate::apt::Need;

const ENGINE: &str = "engine under test";
const NETWORK: &str = "networks of engines";
const IMAGE: &str = "images for engines";

/// The package that makes Debian trees.
pub(super) const DEBOOTSTRAP: Need = Need { package: "debootstrap", purpose: IMAGE };

/// Packages of all end-to-end tests.
pub(super) const NEEDS: [Need; 6] = [
    Need { package: "runc", purpose: "runtime to prove tests" },
    Need { package: "iproute2", purpose: NETWORK },
    Need { package: "systemd", purpose: "tests of its scopes" },
    Need { package: "busybox-static", purpose: IMAGE },
    Need { package: "skopeo", purpose: IMAGE },
    Need { package: "umoci", purpose: IMAGE },
];

/// Further packages of the tests that drive engines.
pub(super) const ENGINES: [Need; 8] = [
    Need { package: "docker.io", purpose: ENGINE },
    Need { package: "podman", purpose: ENGINE },
    Need { package: "crun", purpose: "runtime to prove tests" },
    Need { package: "catatonit", purpose: "init of engines" },
    Need { package: "netavark", purpose: NETWORK },
    Need { package: "aardvark-dns", purpose: NETWORK },
    Need { package: "iptables", purpose: NETWORK },
    DEBOOTSTRAP,
];
