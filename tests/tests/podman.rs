//! Podman of Debian's package, as root.

use std::process::ExitCode;

use isopod_tests::case;
use isopod_tests::engine::cases::{OF_DOCKER, pods, watch};
use isopod_tests::engine::{Case, Engine, main as suite};

/// It enters the mount namespace of the process that stands for the container, and reads /proc there.
const TOP: &str = "Podman's own `top`, without options of ps, finds no processes of a guest";

/// What Docker has not.
const OWN: &[Case] = &[
    case!(watch::top_by_ps),
    case!(pods::rootfs),
    case!(pods::pod_without_infra),
    case!(pods::pod_with_infra),
    case!(pods::healthcheck),
    case!(pods::generated_unit),
];

fn main() -> ExitCode {
    let common = OF_DOCKER.iter().map(|case| match case.name {
        "top" => case.not_yet(TOP, &["only USER"]),
        _ => *case,
    });
    let cases: Vec<Case> = common.chain(OWN.iter().copied()).collect();
    suite(Engine::podman, &cases)
}
