//! Podman of Debian's package, as root.

use std::process::ExitCode;

use isopod_tests::case;
use isopod_tests::engine::cases::{OF_DOCKER, pods, watch};
use isopod_tests::engine::{Case, Engine, main as suite};

/// Cases of features that Docker lacks.
const OWN: &[Case] = &[
    case!(watch::top_by_ps),
    case!(pods::rootfs),
    case!(pods::pod_without_infra),
    case!(pods::pod_with_infra),
    case!(pods::healthcheck),
    case!(pods::generated_unit),
];

fn main() -> ExitCode {
    let cases: Vec<Case> = OF_DOCKER.iter().chain(OWN).copied().collect();
    suite(Engine::podman, &cases)
}
