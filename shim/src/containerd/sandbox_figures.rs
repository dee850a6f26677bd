//! Resource use of a whole pod: of its microVM, as the host counts it, and of its network.

use std::{collections::HashMap, path::Path};

use isopod_protocol::agent::ContainerStats;

use crate::{
    engine::{Container, Record},
    error::{Error, Result},
    event_loop::blocking,
    state::StateDir,
};

/// Files of the host's cgroup that are read.
const FILES: [&str; 15] = [
    "cpu.pressure",
    "cpu.stat",
    "io.pressure",
    "io.stat",
    "memory.current",
    "memory.events",
    "memory.max",
    "memory.peak",
    "memory.pressure",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.max",
    "memory.high",
    "pids.current",
    "pids.max",
];

/// The use of the pod whose holder is `container`, with the state directory `dir`. Guest kernel, agent
/// and VMM are included.
///
/// # Errors
///
/// If the pod has no cgroup on the host, or the guest does not answer.
pub(super) async fn figures(container: &Container, dir: &StateDir) -> Result<ContainerStats> {
    let cgroup = Record::read(dir)?.and_then(|record| record.cgroup).ok_or_else(|| {
        Error::new(
            "the pod has no cgroup of its own on this host, which has to have cgroups v2 alone",
        )
    })?;
    let network_devices = container.stats().await?.network_devices;
    let cgroup_files = blocking(move || Ok(read(cgroup.dir()))).await?;
    Ok(ContainerStats { cgroup_files, network_devices, ..ContainerStats::default() })
}

/// The files of a cgroup. A controller that is not enabled has none.
fn read(dir: &Path) -> HashMap<String, String> {
    let file = |name: &str| {
        let text = std::fs::read_to_string(dir.join(name)).ok()?;
        Some((name.to_owned(), text))
    };
    FILES.into_iter().filter_map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_missing_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("memory.current"), "4096\n").unwrap();
        std::fs::write(dir.path().join("cgroup.procs"), "1\n").unwrap();
        let files = read(dir.path());
        assert_eq!((files.len(), files["memory.current"].as_str()), (1, "4096\n"));
    }
}
