//! Expectations of any engine's containers, one function a case.

pub mod build;
pub mod containerd;
pub mod exec;
pub mod files;
pub mod life;
pub mod limits;
pub mod network;
pub mod page;
pub mod pods;
pub mod process;
pub mod security;
pub mod shim;
pub mod watch;
pub mod work;

use super::Case;
use crate::case;

/// The cases of Docker, and of Podman too: all parts of their command lines that involve a runtime.
pub const OF_DOCKER: &[Case] = &[
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
    case!(life::lost).isopod_only(),
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
    case!(watch::top),
    case!(watch::stats),
    case!(watch::inspect),
    case!(watch::events),
    case!(page::page).isopod_only(),
    case!(build::build),
];
