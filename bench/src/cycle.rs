//! The cycle benchmark: the calls of a container engine for a container that does nothing, beside
//! runtimes without a microVM.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::clock::least;
use crate::figure::Figure;
use crate::runtime::Runtime;
use crate::vmm;

/// Measures each runtime `runs` times.
///
/// The runtimes take turns, so a change of the host affects all of them.
pub(crate) fn measure(programs: &Path, bundle: &Path, runs: usize) -> Result<Vec<Figure>> {
    nix::sys::prctl::set_child_subreaper(true).context("cannot become a subreaper")?;
    let isopod = Runtime::new("isopod", programs.join("isopod"))?;
    let peers = [Runtime::new("runc", "runc")?, Runtime::new("crun", "crun")?];
    let all: Vec<&Runtime> = [&isopod].into_iter().chain(&peers).collect();
    let (mut boots, mut cycles) = (Vec::new(), vec![Vec::new(); all.len()]);
    // The first run of each warms the page cache and does not count.
    for run in 0..=runs {
        let boot = vmm::boot(programs)?.units;
        let round: Vec<f64> = all.iter().map(|r| r.cycle(bundle)).collect::<Result<_>>()?;
        let shown = all.iter().zip(&round).map(|(r, units)| format!(", {} {units:.1}", r.name));
        eprintln!("run {run}: boot-to-ready {boot:.1}{}", shown.collect::<String>());
        if run == 0 {
            continue;
        }
        boots.push(boot);
        for (cycles, units) in cycles.iter_mut().zip(round) {
            cycles.push(units);
        }
    }
    let boot = least(boots);
    let cycles: Vec<f64> = cycles.into_iter().map(least).collect();
    let mut figures = vec![Figure::alone("boot-to-ready", "units", boot)];
    for (peer, units) in peers.iter().zip(&cycles[1..]) {
        figures.push(Figure::beside("cycle", "units", cycles[0], peer.name, *units));
        let beyond = cycles[0] - boot;
        figures.push(Figure::beside("cycle-beyond-boot", "units", beyond, peer.name, *units));
    }
    let ours = least(isopod.execs(bundle, runs)?);
    for peer in &peers {
        let theirs = least(peer.execs(bundle, runs)?);
        figures.push(Figure::beside("exec", "units", ours, peer.name, theirs));
    }
    Ok(figures)
}
