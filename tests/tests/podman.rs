//! Podman of Debian's package, as root.

use std::process::ExitCode;

use isopod_tests::case;
use isopod_tests::engine::cases::{
    build, exec, files, life, limits, network, page, pods, process, security, watch,
};
use isopod_tests::engine::{Case, Engine, main as suite};

/// It enters the mount namespace of the process that stands for the container, and reads /proc there.
const TOP: &str = "Podman's own `top`, without options of ps, finds no processes of a guest";

const CASES: &[Case] = &[
    case!(process::exit_statuses),
    case!(process::streams),
    case!(process::terminal),
    case!(process::identity),
    case!(process::kernel),
    case!(process::init),
    case!(exec::exec),
    case!(exec::exec_detached),
    case!(life::detached),
    case!(life::created_and_started),
    case!(life::stop),
    case!(life::kill),
    case!(life::restart),
    case!(life::restart_policy),
    case!(life::attach),
    case!(life::pause),
    case!(files::volumes),
    case!(files::memory_file_systems),
    case!(files::copy),
    case!(files::own_root),
    case!(limits::cgroup_limits),
    case!(limits::out_of_memory),
    case!(limits::update),
    case!(limits::ulimits_and_sysctls),
    case!(security::capabilities),
    case!(security::no_new_privileges),
    case!(security::seccomp),
    case!(security::device),
    case!(security::privileged),
    case!(network::bridge),
    case!(network::publish),
    case!(network::names_on_a_network),
    case!(network::none),
    case!(network::host),
    case!(network::of_another_container),
    case!(network::connect),
    case!(watch::top).not_yet(TOP, &["only USER"]),
    case!(watch::top_by_ps),
    case!(watch::stats),
    case!(watch::inspect),
    case!(watch::events),
    case!(page::page).isopod_only(),
    case!(build::build),
    case!(pods::rootfs),
    case!(pods::pod_without_infra),
    case!(pods::pod_with_infra),
    case!(pods::healthcheck),
    case!(pods::generated_unit),
];

fn main() -> ExitCode {
    suite(Engine::podman, CASES)
}
