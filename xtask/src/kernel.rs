//! The guest kernel, built from Debian's kernel source with the patches in `guest-kernel/patches`
//! and the options in `guest-kernel/config`.

mod compile;
mod elf;
mod options;
mod patches;
mod source;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::apt::Need;
use crate::progress::{say, step};
use crate::{cache, repository};

use options::KernelOptions;
use patches::Patches;
use source::Pin;

/// Debian packages for building a kernel.
pub(crate) const NEEDS: [Need; 9] = [
    Need { package: "bc", purpose: "guest kernel build" },
    Need { package: "binutils", purpose: "guest kernel build" },
    Need { package: "bison", purpose: "guest kernel build" },
    Need { package: "flex", purpose: "guest kernel build" },
    Need { package: "gcc", purpose: "compiler and linker" },
    Need { package: "libelf-dev", purpose: "guest kernel build" },
    Need { package: "make", purpose: "guest kernel build" },
    Need { package: "patch", purpose: "guest kernel build" },
    Need { package: "xz-utils", purpose: "unpacking the kernel" },
];

/// The guest kernel's image, from the cache. A missing image is built, which takes minutes.
pub(crate) fn vmlinux() -> Result<PathBuf> {
    let folder = repository::root().join("guest-kernel");
    let pin = Pin::read(&folder.join("version"))?;
    let options = KernelOptions::read(&folder.join("config"))?;
    let patches = Patches::read(&folder.join("patches"))?;
    let key = cache::key([
        ("source", pin.to_string().as_bytes()),
        ("patches", patches.text().as_bytes()),
        ("options", options.text().as_bytes()),
        ("recipe", compile::recipe()?.as_bytes()),
    ]);
    let entry = cache::entry("kernel", &key, |dir| build(&pin, &patches, &options, dir))?;
    let version = entry.join("version");
    let built = fs::read_to_string(&version)
        .with_context(|| format!("cannot read {}", version.display()))?;
    if source::base(&built) != source::base(&pin.version) {
        say(format!("guest kernel is {built}: Debian no longer has {}", pin.version));
    }
    Ok(entry.join("vmlinux"))
}

/// Builds a cache entry in `dir`: the image `vmlinux`, its configuration `config`, and the Debian
/// `version` of its source.
fn build(pin: &Pin, patches: &Patches, options: &KernelOptions, dir: &Path) -> Result<()> {
    let work = dir.join("work");
    let tree = work.join("source");
    fs::create_dir_all(&tree).with_context(|| format!("cannot create {}", tree.display()))?;
    let offer = source::offer(pin)?;
    let package =
        step(&format!("download {} {}", offer.package, offer.version), || offer.download(&work))?;
    step("unpack the guest kernel's source", || source::unpack(&package, &offer.package, &tree))?;
    step("patch and configure the guest kernel", || {
        patches.apply(&tree, &repository::target().join("kernel.log"))?;
        compile::configure(&tree, &work, options, &offer.version)
    })?;
    let image = compile::compile(&tree, &work, &offer.version)?;
    step("check the guest kernel, and remove its source", || {
        keep(&image, &work, &offer.version, dir)?;
        fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))
    })
}

/// Checks the compiled `image` and copies the files of the cache entry from `work` to `dir`.
fn keep(image: &Path, work: &Path, built: &str, dir: &Path) -> Result<()> {
    let vmlinux = dir.join("vmlinux");
    compile::strip(image, &vmlinux)?;
    elf::check(&vmlinux)?;
    let config = dir.join("config");
    fs::copy(work.join(compile::CONFIG), &config)
        .with_context(|| format!("cannot write {}", config.display()))?;
    let version = dir.join("version");
    fs::write(&version, built).with_context(|| format!("cannot write {}", version.display()))
}
