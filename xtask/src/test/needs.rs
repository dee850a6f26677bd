//! What the end-to-end tests use of Debian beside the product: container engines, and what their
//! tests look at them with. apt starts none of them where policy-rc.d says so; the tests start their
//! own, in namespaces of their own.

use crate::apt::Need;

const ENGINE: &str = "engine under test";
const NETWORK: &str = "networks of engines";
const IMAGE: &str = "images for engines";

/// Makes Debian trees.
pub(super) const DEBOOTSTRAP: Need = Need { package: "debootstrap", purpose: IMAGE };

/// For all end-to-end tests.
pub(super) const NEEDS: [Need; 6] = [
    Need { package: "runc", purpose: "runtime to prove tests" },
    Need { package: "iproute2", purpose: NETWORK },
    Need { package: "systemd", purpose: "tests of its scopes" },
    Need { package: "busybox-static", purpose: IMAGE },
    Need { package: "skopeo", purpose: IMAGE },
    Need { package: "umoci", purpose: IMAGE },
];

/// For those that drive engines, beside [`NEEDS`].
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
