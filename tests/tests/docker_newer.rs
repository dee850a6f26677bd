//! The Docker of a newer Debian, in a tree of its own: its differences from the Docker that
//! `docker` tests with all cases.

use std::path::Path;
use std::process::ExitCode;

use isopod_tests::case;
use isopod_tests::engine::cases::{build, containerd, exec, files, life, limits, network};
use isopod_tests::engine::cases::{page, process, security, shim, watch};
use isopod_tests::engine::{Case, Engine, main as suite, tree};

/// Cases whose way through engine, shim or runtime differs from the older version's: Docker 26
/// beside 20.10, containerd 1.7 beside 1.6. The other cases reach the runtime as before.
const CASES: &[Case] = &[
    // The network is connected between `create` and `start`, at each start, and no longer by a
    // hook.
    case!(network::bridge),
    case!(network::none),
    case!(network::host),
    case!(network::of_another_container),
    case!(life::created_and_started),
    case!(life::restart),
    // The newer shim reports exits, executions and terminals in another order. It counts a cgroup's
    // memory in another way.
    case!(process::terminal),
    case!(exec::exec),
    case!(limits::out_of_memory),
    case!(watch::stats),
    // The configuration differs: mounts that are read-only down to their last submount, another
    // seccomp profile, no inheritable capabilities, more masked paths, another init.
    case!(files::volumes),
    case!(files::memory_file_systems),
    case!(security::capabilities),
    case!(security::seccomp),
    case!(security::privileged),
    case!(process::init),
    // The newer client: its own builder, and the commands of the documentation's page.
    case!(build::build),
    case!(page::page).isopod_only(),
    // Isopod's own shim.
    case!(shim::docker_shim).isopod_only(),
    // Docker's own containerd, without Docker.
    case!(containerd::containerd_task),
];

fn start() -> Engine {
    Engine::docker_of(Path::new(&tree("ISOPOD_TEST_DOCKER_TREE")))
}

fn main() -> ExitCode {
    suite(start, CASES)
}
