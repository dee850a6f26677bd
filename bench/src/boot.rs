//! The boot benchmark: how long until a container can be made, and what that costs.

use std::path::Path;

use anyhow::Result;

use crate::clock::least;
use crate::figure::Figure;
use crate::{qemu, sizes, vmm, workload};

const PEER: &str = "qemu-microvm";

/// Measures everything `runs` times and takes the least. Isopod and the peer take turns, so that a
/// change of the host between them falls on both.
pub(crate) fn measure(programs: &Path, bundle: &Path, runs: usize) -> Result<Vec<Figure>> {
    // The first of each warms the page cache and does not count.
    let mut ours = vec![vmm::boot(programs)?];
    let mut theirs = vec![qemu::boot(programs)?];
    workload::run(programs, bundle, "bench-warm")?;
    ours.clear();
    theirs.clear();
    let mut cycles = Vec::new();
    for run in 0..runs {
        ours.push(vmm::boot(programs)?);
        theirs.push(qemu::boot(programs)?);
        cycles.push(workload::run(programs, bundle, &format!("bench-{run}"))?);
        if let (Some(our), Some(their), Some(cycle)) = (ours.last(), theirs.last(), cycles.last()) {
            eprintln!(
                "run {}: boot-to-ready {:.1}, {PEER} {:.1}, run-true {cycle:.1}",
                run + 1,
                our.units,
                their.units
            );
        }
    }
    let of = |f: &dyn Fn(&vmm::Boot) -> f64| least(ours.iter().map(f));
    let of_peer = |f: &dyn Fn(&qemu::Boot) -> f64| least(theirs.iter().map(f));
    let mut figures = vec![
        Figure::beside(
            "boot-to-ready",
            "units",
            of(&|boot| boot.units),
            PEER,
            of_peer(&|boot| boot.units),
        ),
        Figure::alone("guest-init-at", "units", of(&|b| b.hello.init_us as f64 / 1000.0)),
        Figure::alone("guest-ready-at", "units", of(&|b| b.hello.ready_us as f64 / 1000.0)),
        Figure::alone("run-true", "units", least(cycles)),
        Figure::beside(
            "vmm-rss",
            "KiB",
            of(&|boot| boot.overhead_kib as f64),
            PEER,
            of_peer(&|boot| boot.overhead_kib as f64),
        ),
        Figure::alone("guest-at-ready", "KiB", of(&|b| b.hello.memory_used_kib as f64)),
        Figure::alone("guest-resident", "KiB", of(&|b| b.guest_resident_kib as f64)),
    ];
    if let Some(last) = ours.last() {
        figures.extend(
            last.exits.iter().map(|(kind, count)| {
                Figure::alone(format!("exits {kind}"), "exits", *count as f64)
            }),
        );
    }
    figures.extend(sizes::measure(programs)?);
    Ok(figures)
}
