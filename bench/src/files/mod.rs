//! The file benchmark: file operations of a guest on files of the host, beside Debian's virtiofsd
//! under QEMU with the same guest kernel.
//!
//! Both guests have two directories: a Debian tree, which is their root, and a volume in the host's
//! memory. Files to read are there before a guest boots, so the guest's caches are cold. A program
//! in the guest does the work and measures each part by the guest's clock, which follows the
//! machine's clock.

mod ground;
mod guest;
mod qemu;
mod work;

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use self::ground::Ground;
use self::guest::{MEMORY_MIB, PROGRAM, VOLUME};
use self::work::Parts;
use crate::clock::least;
use crate::figure::Figure;
use crate::guest::KERNEL_PARAMS;
use crate::runtime::Runtime;

pub(crate) use self::work::work;

/// Name of the peer.
const PEER: &str = "virtiofsd";

/// Inputs of the benchmark.
pub(crate) struct Files<'a> {
    /// Folder of Isopod's programs and the guest kernel.
    pub(crate) programs: &'a Path,
    /// The bundle for containers.
    pub(crate) bundle: &'a Path,
    /// The guests' root: a Debian tree with gcc and tar.
    pub(crate) tree: &'a Path,
    /// Program file of virtiofsd.
    pub(crate) server: &'a Path,
}

impl Files<'_> {
    /// Does the work `runs` times in each kind of guest, each time in a new guest on new files.
    ///
    /// The two kinds take turns, so a change of the host affects both.
    pub(crate) fn measure(&self, runs: usize) -> Result<Vec<Figure>> {
        nix::sys::prctl::set_child_subreaper(true).context("cannot become a subreaper")?;
        let isopod =
            Runtime::new("isopod", self.programs.join("isopod"))?.kernel_params(KERNEL_PARAMS);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        // The first run of each warms the page cache and does not count.
        for run in 0..=runs {
            let our = self.in_container(&isopod)?;
            show(run, isopod.name, &our);
            let their = self.in_qemu()?;
            show(run, PEER, &their);
            if run > 0 {
                ours.push(our);
                theirs.push(their);
            }
        }
        let first = ours.first().context("at least one run")?;
        let part = |all: &[Parts], at: usize| least(all.iter().map(|parts| parts[at].1));
        let beside = first.iter().enumerate().map(|(at, (name, _))| {
            Figure::beside(name, "units", part(&ours, at), PEER, part(&theirs, at))
        });
        Ok(beside.collect())
    }

    fn in_container(&self, runtime: &Runtime) -> Result<Parts> {
        let ground = Ground::new(self.tree)?;
        let running = runtime.start_changed(self.bundle, |config| {
            config["process"]["args"] = json!([PROGRAM, "work", VOLUME]);
            config["root"] = json!({ "path": self.tree, "readonly": true });
            config["annotations"] = json!({
                "dev.isopod.vcpus": "1",
                "dev.isopod.memory_mib": MEMORY_MIB.to_string(),
            });
            let volume = json!({
                "destination": VOLUME, "type": "bind", "source": ground.volume(),
                "options": ["rbind", "rw"],
            });
            let scratch = json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs" });
            if let Some(mounts) = config["mounts"].as_array_mut() {
                mounts.extend([volume, scratch]);
            }
            // tar changes the owner of files.
            let capabilities = json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID"]);
            for set in ["bounding", "effective", "permitted"] {
                config["process"]["capabilities"][set] = capabilities.clone();
            }
        })?;
        running.wait()?;
        results(&ground)
    }

    fn in_qemu(&self) -> Result<Parts> {
        let ground = Ground::new(self.tree)?;
        qemu::run(self.programs, self.server, &ground)?;
        results(&ground)
    }
}

fn show(run: usize, name: &str, parts: &Parts) {
    let parts: Vec<String> =
        parts.iter().map(|(part, units)| format!("{part} {units:.1}")).collect();
    eprintln!("{name}, run {run}: {}", parts.join(", "));
}

/// Results that the guest has written to the volume.
fn results(ground: &Ground) -> Result<Parts> {
    let path = ground.volume().join(work::RESULTS);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("the guest has left no {}", path.display()))?;
    let parts: Parts = serde_json::from_str(&text).context("the guest's results")?;
    if parts.is_empty() {
        bail!("the guest has done nothing");
    }
    Ok(parts)
}
