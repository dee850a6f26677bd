//! containerd with the shims of runc and of Isopod: tasks by containerd's own client, and pods as a
//! kubelet asks for them.
//!
//! `cargo xtask test` runs the program three times: all cases with the containerd of a newer Debian,
//! and a few with the containerd of this machine and with the newest one.

#![allow(clippy::expect_used, clippy::panic, reason = "a failed step ends the case")]

mod cri;
mod disk;
mod pod_basics;
mod pod_company;
mod pod_losses;
mod pod_network;
mod pod_observed;
mod pod_rights;
mod pod_rounds;
mod pod_sandboxer;
mod pod_truth;
mod pod_volumes;
mod tasks;

use std::path::Path;
use std::process::ExitCode;

use isopod_tests::case;
use isopod_tests::engine::{Case, Engine, main as suite, tree};

const CASES: &[Case] = &[
    case!(tasks::task),
    case!(tasks::streams),
    case!(tasks::events),
    case!(tasks::terminal),
    case!(tasks::logs),
    case!(tasks::restart),
    case!(tasks::killed_shim),
    case!(tasks::annotation).isopod_only(),
    case!(pod_basics::pod),
    case!(pod_truth::pod_out_of_memory),
    case!(pod_truth::pod_stats),
    case!(pod_truth::pod_update),
    case!(pod_truth::pod_missing_program),
    case!(pod_truth::pod_exec_timeout),
    case!(pod_truth::pod_processes),
    case!(pod_truth::pod_size).isopod_only(),
    case!(pod_network::pod_port_forward),
    case!(pod_network::pod_host_port),
    case!(pod_losses::pod_restart),
    case!(pod_losses::pod_shim_killed),
    case!(pod_losses::pod_vmm_killed).isopod_only(),
    case!(pod_losses::pod_vmm_stopped).isopod_only(),
    case!(pod_losses::pod_does_not_boot).isopod_only(),
    case!(pod_company::pod_sidecar),
    case!(pod_company::pod_rules),
    case!(pod_company::pod_plugins),
    case!(pod_volumes::pod_volumes),
    case!(pod_volumes::pod_config_map),
    case!(pod_volumes::pod_projected_volumes),
    case!(pod_volumes::pod_host_paths),
    case!(pod_volumes::pod_block_volumes),
    case!(pod_rights::pod_privileged),
    case!(pod_rights::pod_users),
    case!(pod_rights::pod_user_namespace),
    case!(pod_rights::pod_of_the_host).isopod_only(),
    case!(pod_rounds::pod_rounds),
];

/// Cases whose way through containerd differs between its versions: the answer of the shim's `start`,
/// the file with the shim's address, the format of the configuration, events, statistics, and the
/// network namespace of a pod.
const OF_VERSIONS: &[Case] = &[
    case!(tasks::task),
    case!(tasks::events),
    case!(tasks::restart),
    case!(tasks::killed_shim),
    case!(pod_basics::pod),
    case!(pod_truth::pod_stats),
    case!(pod_network::pod_port_forward),
];

/// Further cases of the newest containerd. It maps owners for pods with a user namespace, it reports
/// what a handler can do, and it may leave a pod's first container to the shim, which runc's shim does
/// not offer for pods.
const OF_THE_NEWEST: &[Case] = &[
    case!(pod_rights::pod_user_namespace),
    case!(pod_volumes::pod_recursive_read_only),
    case!(pod_sandboxer::pod_sandboxer).isopod_only(),
    case!(pod_sandboxer::pod_sandboxer_processes).isopod_only(),
    case!(pod_sandboxer::pod_sandboxer_killed).isopod_only(),
];

fn usual() -> Engine {
    Engine::containerd_of(Path::new(&tree("ISOPOD_TEST_DOCKER_TREE")))
}

fn newest() -> Engine {
    let tree = tree("ISOPOD_TEST_CONTAINERD_TREE");
    disk::with_disk(Engine::containerd_with_more_handlers(Path::new(&tree)))
}

fn main() -> ExitCode {
    match std::env::var("ISOPOD_TEST_VERSION").unwrap_or_default().as_str() {
        "" => suite(usual, CASES),
        "containerd_older" => suite(Engine::containerd, OF_VERSIONS),
        "containerd_newer" => suite(newest, &[OF_VERSIONS, OF_THE_NEWEST].concat()),
        other => panic!("ISOPOD_TEST_VERSION is {other:?}, which is no version of the engine"),
    }
}
