//! The product: static binaries, guest kernel and guest image in one folder.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result};
use lexopt::prelude::*;

use crate::apt::{self, Need};
use crate::process::joined;
use crate::progress::{say, seconds, step};
use crate::{image, kernel, process, repository};

/// The target triple of the product.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Cargo's target directory of the product, relative to the checkout's target directory.
///
/// The product is compiled with other flags than cargo's other builds, so it needs its own.
pub(crate) const STATIC: &str = "static";

/// Folder of the product's binaries, relative to [`STATIC`].
pub(crate) const RELEASE: &str = "x86_64-unknown-linux-gnu/release";

/// Debian packages for compiling the binaries.
const NEEDS: [Need; 2] = [
    Need { package: "libc6-dev", purpose: "static binaries" },
    Need { package: "libseccomp-dev", purpose: "system call filters" },
];

/// Debian packages for a build.
pub(crate) fn needs() -> impl Iterator<Item = Need> {
    kernel::NEEDS.into_iter().chain(NEEDS)
}

/// Help text of `cargo xtask build`.
pub(crate) const BUILD_HELP: &str = "\
Usage: cargo xtask build

Builds isopod, isopod-vmm and isopod-agent (static), the guest kernel `vmlinux` and the guest image
`isopod.initramfs`. Puts them into the folder isopod of cargo's target directory. Prints its path.
Needs root if Debian packages are missing.";

/// Help text of `cargo xtask kernel`.
pub(crate) const KERNEL_HELP: &str = "\
Usage: cargo xtask kernel

Builds the guest kernel from Debian's source with the options in guest-kernel/config, or takes it
from the cache (~/.cache/isopod). Prints the path of the image. See guest-kernel/README.md.";

/// Help text of `cargo xtask image`.
pub(crate) const IMAGE_HELP: &str = "\
Usage: cargo xtask image

Compiles the agent and builds the guest image, an initramfs with the agent as /init. Prints the
path of the image.";

/// Runs a build command: its only option is `--help`, and it prints the path of its result.
pub(crate) fn main(
    mut args: lexopt::Parser,
    help: &str,
    build: fn() -> Result<PathBuf>,
) -> Result<i32> {
    match args.next()? {
        Some(Long("help") | Short('h')) => {
            println!("{help}");
            return Ok(0);
        }
        Some(arg) => return Err(arg.unexpected().into()),
        None => {}
    }
    println!("{}", build()?.display());
    Ok(0)
}

/// Builds all files of the product. Returns their folder.
pub(crate) fn build() -> Result<PathBuf> {
    let began = std::time::Instant::now();
    apt::ensure(needs())?;
    // In parallel: the last step of the binaries (LTO) uses one processor, the kernel all of them.
    let (kernel, binaries) = thread::scope(|scope| {
        let kernel = scope.spawn(kernel);
        let binaries = binaries(&["isopod-agent", "isopod-vmm", "isopod-shim"]);
        (joined(kernel), binaries)
    });
    kernel?;
    let binaries = binaries?;
    let product = folder()?;
    for name in ["isopod", "isopod-vmm"] {
        place(&binaries.join(name), &product.join(name))?;
    }
    link_shim(&product)?;
    place_image(&binaries)?;
    say(format!("built {} in {}", product.display(), seconds(began)));
    Ok(product)
}

/// Builds the guest kernel. Returns its image.
pub(crate) fn kernel() -> Result<PathBuf> {
    apt::ensure(needs())?;
    let vmlinux = folder()?.join("vmlinux");
    place(&kernel::vmlinux()?, &vmlinux)?;
    Ok(vmlinux)
}

/// Builds the guest image with the agent in it. Returns its path.
pub(crate) fn image() -> Result<PathBuf> {
    apt::ensure(NEEDS)?;
    place_image(&binaries(&["isopod-agent"])?)
}

fn binaries(packages: &[&str]) -> Result<PathBuf> {
    let programs: Vec<&str> = packages.iter().map(|package| program(package)).collect();
    step(&format!("compile {}", programs.join(", ")), || compile(packages))
}

/// Name of a package's program.
fn program(package: &str) -> &str {
    if package == "isopod-shim" { "isopod" } else { package }
}

fn place_image(binaries: &Path) -> Result<PathBuf> {
    let product = folder()?;
    let agent = product.join("isopod-agent");
    place(&binaries.join("isopod-agent"), &agent)?;
    let image = product.join("isopod.initramfs");
    image::build(&agent, &image)?;
    Ok(image)
}

fn folder() -> Result<PathBuf> {
    let product = repository::product();
    fs::create_dir_all(&product).with_context(|| format!("cannot create {}", product.display()))?;
    Ok(product)
}

/// Compiles the static release binaries of `packages`. Returns their folder.
pub(crate) fn compile(packages: &[&str]) -> Result<PathBuf> {
    let target = repository::target().join(STATIC);
    let mut cargo = cargo();
    cargo.args(["build", "--release", "--target", TARGET, "--target-dir"]).arg(&target);
    cargo.args(packages.iter().flat_map(|package| ["--package", package]));
    cargo.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", "-C target-feature=+crt-static");
    process::run_logged(&mut cargo, &repository::target().join("compile.log"))?;
    Ok(target.join(RELEASE))
}

/// Cargo in the root of the checkout.
pub(crate) fn cargo() -> Command {
    let mut cargo = process::command(cargo_program());
    cargo.current_dir(repository::root());
    cargo
}

/// Cargo with a lower priority (nice 10), for builds that other work should overtake.
pub(crate) fn patient_cargo() -> Command {
    let mut nice = process::command("nice");
    nice.args(["-n", "10"]).arg(cargo_program()).current_dir(repository::root());
    nice
}

fn cargo_program() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Name under which `isopod` is containerd's shim.
const SHIM: &str = "containerd-shim-isopod-v2";

/// Makes the link by which containerd finds its shim, beside `isopod` in `folder`. Returns its path.
pub(crate) fn link_shim(folder: &Path) -> Result<PathBuf> {
    let (link, new) = (folder.join(SHIM), folder.join(format!(".{SHIM}.new")));
    let _ = fs::remove_file(&new);
    symlink("isopod", &new)
        .and_then(|()| fs::rename(&new, &link))
        .with_context(|| format!("cannot make the link {}", link.display()))?;
    Ok(link)
}

/// Copies `from` to `to`, replacing `to` atomically.
pub(crate) fn place(from: &Path, to: &Path) -> Result<()> {
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    let new = to.with_file_name(format!(".{name}.new"));
    fs::copy(from, &new)
        .and_then(|_| fs::rename(&new, to))
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}
