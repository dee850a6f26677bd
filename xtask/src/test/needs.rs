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

/// The package that compiles the end-to-end tests, beside those of any build.
pub(super) const COMPILE: Option<Need> =
    Some(Need { package: "protobuf-compiler", purpose: "the tests' client for pods" });

/// Packages of all end-to-end tests.
pub(super) const NEEDS: [Need; 7] = [
    Need { package: "runc", purpose: "runtime to prove tests" },
    Need { package: "iproute2", purpose: NETWORK },
    Need { package: "systemd", purpose: "tests of its scopes" },
    Need { package: "busybox-static", purpose: IMAGE },
    Need { package: "skopeo", purpose: IMAGE },
    Need { package: "umoci", purpose: IMAGE },
    DEBOOTSTRAP,
];

/// Further packages of the tests that drive engines.
pub(super) const ENGINES: [Need; 9] = [
    Need { package: "containernetworking-plugins", purpose: NETWORK },
    Need { package: "docker.io", purpose: ENGINE },
    Need { package: "podman", purpose: ENGINE },
    Need { package: "crun", purpose: "runtime to prove tests" },
    Need { package: "catatonit", purpose: "init of engines" },
    Need { package: "netavark", purpose: NETWORK },
    Need { package: "aardvark-dns", purpose: NETWORK },
    Need { package: "iptables", purpose: NETWORK },
    Need { package: "e2fsprogs", purpose: "a disk for the layers of images" },
];
