//! The product: static binaries, guest kernel and guest image, together in one folder.

use std::ffi::OsString;
use std::fs;
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

/// Cargo's target directory of the product, relative to the checkout's: apart from cargo's other builds,
/// which have other flags.
pub(crate) const STATIC: &str = "static";

/// Where the product's binaries are in that.
pub(crate) const RELEASE: &str = "x86_64-unknown-linux-gnu/release";

/// What compiling the binaries needs from Debian.
const NEEDS: [Need; 2] = [
    Need { package: "libc6-dev", purpose: "static binaries" },
    Need { package: "libseccomp-dev", purpose: "system call filters" },
];

/// Everything that a build needs from Debian.
pub(crate) fn needs() -> impl Iterator<Item = Need> {
    kernel::NEEDS.into_iter().chain(NEEDS)
}

/// What `cargo xtask build --help` prints.
pub(crate) const BUILD_HELP: &str = "\
Usage: cargo xtask build

Builds isopod, isopod-vmm and isopod-agent (static), the guest kernel `vmlinux` and the guest image
`isopod.initramfs`, puts all of them into the folder isopod of cargo's target directory and prints it.
Needs root if Debian packages are missing.";

/// What `cargo xtask kernel --help` prints.
pub(crate) const KERNEL_HELP: &str = "\
Usage: cargo xtask kernel

Builds the guest kernel from Debian's source with the options in guest-kernel/config, or takes it from
the cache (~/.cache/isopod), and prints where the image is. See guest-kernel/README.md.";

/// What `cargo xtask image --help` prints.
pub(crate) const IMAGE_HELP: &str = "\
Usage: cargo xtask image

Compiles the agent, builds the guest image (an initramfs with the agent as /init) and prints where it is.";

/// A command that takes no options but `--help`, builds something and says where it is.
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

/// Builds all five files of the product and returns their folder.
pub(crate) fn build() -> Result<PathBuf> {
    let began = std::time::Instant::now();
    apt::ensure(needs())?;
    // Optimizing the binaries keeps one processor busy at last, and the kernel any number of them.
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
    place_image(&binaries)?;
    say(format!("built {} in {}", product.display(), seconds(began)));
    Ok(product)
}

/// Builds the guest kernel and returns its image.
pub(crate) fn kernel() -> Result<PathBuf> {
    apt::ensure(needs())?;
    let vmlinux = folder()?.join("vmlinux");
    place(&kernel::vmlinux()?, &vmlinux)?;
    Ok(vmlinux)
}

/// Builds the guest image with the agent in it and returns it.
pub(crate) fn image() -> Result<PathBuf> {
    apt::ensure(NEEDS)?;
    place_image(&binaries(&["isopod-agent"])?)
}

fn binaries(packages: &[&str]) -> Result<PathBuf> {
    step(&format!("compile {}", packages.join(", ")), || compile(packages))
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

/// Compiles the static release binaries of `packages` and returns their folder.
pub(crate) fn compile(packages: &[&str]) -> Result<PathBuf> {
    let target = repository::target().join(STATIC);
    let mut cargo = cargo();
    cargo.args(["build", "--release", "--target", TARGET, "--target-dir"]).arg(&target);
    cargo.args(packages.iter().flat_map(|package| ["--package", package]));
    cargo.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", "-C target-feature=+crt-static");
    process::run_logged(&mut cargo, &repository::target().join("compile.log"))?;
    Ok(target.join(RELEASE))
}

/// Cargo, at the root of the checkout.
pub(crate) fn cargo() -> Command {
    let mut cargo = process::command(cargo_program());
    cargo.current_dir(repository::root());
    cargo
}

/// As [`cargo`], for what lets others go first.
pub(crate) fn patient_cargo() -> Command {
    let mut nice = process::command("nice");
    nice.args(["-n", "10"]).arg(cargo_program()).current_dir(repository::root());
    nice
}

fn cargo_program() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Copies a file such that `to` is at any time the old one or the new one.
pub(crate) fn place(from: &Path, to: &Path) -> Result<()> {
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    let new = to.with_file_name(format!(".{name}.new"));
    fs::copy(from, &new)
        .and_then(|_| fs::rename(&new, to))
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}
