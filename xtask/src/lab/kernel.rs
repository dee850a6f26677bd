//! The lab's kernel: Debian's cloud kernel, unpacked into the cache.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::process::{capture, command};
use crate::progress::step;
use crate::{apt, cache};

/// Kind of these entries in the cache.
const KIND: &str = "lab-kernel";
/// Debian's metapackage of the cloud kernel.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub(crate) struct LabKernel {
    /// The compressed kernel image.
    pub(crate) image: PathBuf,
    /// Its `/lib/modules/<release>`.
    pub(crate) modules: PathBuf,
    /// Release, as `uname -r` prints it in the lab.
    pub(crate) release: String,
}

/// The lab's kernel: any version in the cache, otherwise the newest of Debian.
pub(crate) fn ensure() -> Result<LabKernel> {
    let shelf = cache::root()?.join(KIND);
    let mut cached: Vec<PathBuf> = match fs::read_dir(&shelf) {
        Ok(entries) => entries.filter_map(Result::ok).map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    };
    // Locks and unfinished entries have a dot in front.
    cached.retain(|path| {
        path.is_dir() && !path.file_name().unwrap_or_default().to_string_lossy().starts_with('.')
    });
    cached.sort();
    let entry = match cached.pop() {
        Some(entry) => entry,
        None => step("fetch the lab's kernel", fetch)?,
    };
    locate(&entry)
}

/// Unpacks the newest kernel into the cache.
fn fetch() -> Result<PathBuf> {
    let meta = apt::find(PACKAGE, |_| true)?;
    let image = meta
        .depends()?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("{PACKAGE} {} depends on no kernel image", meta.version))?;
    let offer = apt::find(&image, |version| version == meta.version)?;
    cache::entry(KIND, &format!("{image}_{}", offer.version), |dir| {
        offer.unpack(dir)?;
        // depmod reads /lib/modules only.
        if !dir.join("lib").exists() {
            symlink("usr/lib", dir.join("lib"))
                .with_context(|| format!("cannot link {}/lib", dir.display()))?;
        }
        let kernel = locate(dir)?;
        capture(command("/sbin/depmod").arg("-b").arg(dir).arg(&kernel.release)).map(drop)
    })
}

/// Finds the files of an unpacked kernel package.
fn locate(entry: &Path) -> Result<LabKernel> {
    // Debian 13 and later have the modules below /usr.
    let shelves = ["lib/modules", "usr/lib/modules"].map(|shelf| entry.join(shelf));
    let shelf = shelves.iter().find(|shelf| shelf.is_dir()).unwrap_or(&shelves[0]);
    let mut releases =
        fs::read_dir(shelf).with_context(|| format!("cannot list {}", shelf.display()))?;
    let modules = releases
        .next()
        .with_context(|| format!("{} is empty; remove {}", shelf.display(), entry.display()))?
        .with_context(|| format!("cannot list {}", shelf.display()))?
        .path();
    let release = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(LabKernel { image: entry.join(format!("boot/vmlinuz-{release}")), modules, release })
}

impl LabKernel {
    /// Files of the modules `wanted` and of their dependencies, in the order to load them.
    ///
    /// Built-in modules have no file.
    pub(crate) fn load_order(&self, wanted: &[&str]) -> Result<Vec<PathBuf>> {
        let path = self.modules.join("modules.dep");
        let dependencies =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let path = self.modules.join("modules.builtin");
        let builtin =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut order = Vec::new();
        let mut seen = HashSet::new();
        for name in wanted {
            if builtin.lines().any(|line| module_name(line) == *name) {
                continue;
            }
            // Lines are `file: dependency dependency ...`; the last dependency is loaded first.
            let (file, needed) = dependencies
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(file, _)| module_name(file) == *name)
                .with_context(|| {
                    format!("the lab's kernel {} has no module {name}", self.release)
                })?;
            for file in needed.split_whitespace().rev().chain([file]) {
                if seen.insert(file.to_owned()) {
                    order.push(self.modules.join(file));
                }
            }
        }
        Ok(order)
    }
}

/// Name of the module in a file: `kvm_amd` for `kernel/arch/x86/kvm/kvm-amd.ko.xz`.
pub(crate) fn module_name(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.split('.').next().unwrap_or(base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::module_name;

    #[test]
    fn module_names_are_those_of_the_kernel() {
        assert_eq!(module_name("kernel/drivers/virtio/virtio_pci.ko"), "virtio_pci");
        assert_eq!(module_name("kernel/arch/x86/kvm/kvm-amd.ko.xz"), "kvm_amd");
    }
}
