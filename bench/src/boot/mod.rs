//! The boot benchmark: time until the agent is ready to create a container, and memory and exits.

mod qemu;

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::clock::least;
use crate::figure::Figure;
use crate::{sizes, vmm, workload};

const PEER: &str = "qemu-microvm";

/// Measures everything `runs` times.
///
/// The boot with the fewest units gives all figures of a boot. Isopod and the peer take turns, so a
/// change of the host affects both.
pub(crate) fn measure(programs: &Path, bundle: &Path, runs: usize) -> Result<Vec<Figure>> {
    // The first run of each warms the page cache and does not count.
    vmm::boot(programs)?;
    qemu::boot(programs)?;
    workload::run(programs, bundle)?;
    workload::run_missing(programs, bundle)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let (mut cycles, mut refusals) = (Vec::new(), Vec::new());
    for run in 1..=runs {
        let (our, their) = (vmm::boot(programs)?, qemu::boot(programs)?);
        let cycle = workload::run(programs, bundle)?;
        let refusal = workload::run_missing(programs, bundle)?;
        eprintln!(
            "run {run}: boot-to-ready {:.1}, {PEER} {:.1}, run-true {cycle:.1}, run-missing \
             {refusal:.1}",
            our.units, their.units
        );
        ours.push(our);
        theirs.push(their);
        cycles.push(cycle);
        refusals.push(refusal);
    }
    let fastest = "at least one run";
    let our = ours.iter().min_by(|a, b| a.units.total_cmp(&b.units)).context(fastest)?;
    let their = theirs.iter().min_by(|a, b| a.units.total_cmp(&b.units)).context(fastest)?;
    let beside =
        |figure, unit, value, peer_value| Figure::beside(figure, unit, value, PEER, peer_value);
    let units = |us: u64| us as f64 / 1000.0;
    let mut figures = vec![
        beside("boot-to-ready", "units", our.units, their.units),
        beside("guest-init-at", "units", units(our.hello.init_us), units(their.hello.init_us)),
        beside("guest-ready-at", "units", units(our.hello.ready_us), units(their.hello.ready_us)),
        Figure::alone("run-true", "units", least(cycles)),
        Figure::alone("run-missing", "units", least(refusals)),
        beside("vmm-rss", "KiB", our.overhead_kib as f64, their.overhead_kib as f64),
        beside(
            "guest-at-ready",
            "KiB",
            our.hello.memory_used_kib as f64,
            their.hello.memory_used_kib as f64,
        ),
        Figure::alone("guest-resident", "KiB", our.guest_resident_kib as f64),
    ];
    figures.extend(our.exits.iter().map(|(kind, count)| exits(kind, *count)));
    figures.extend(sizes::measure(programs)?);
    Ok(figures)
}

/// A number of exits. Kinds with `user:` in front are counted by the VMM, the others by KVM.
fn exits(kind: &str, count: u64) -> Figure {
    let name = match kind.strip_prefix("user:") {
        Some(kind) => format!("user-exits {kind}"),
        None => format!("exits {kind}"),
    };
    Figure::alone(name, "exits", count as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_to_the_vmm_have_a_name_of_their_own() {
        assert_eq!(exits("kvm:io_exits", 3).figure, "exits kvm:io_exits");
        assert_eq!(exits("user:port-out", 3).figure, "user-exits port-out");
    }
}
