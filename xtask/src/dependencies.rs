//! Compiled crates of others, kept in the cache: a fresh checkout need not compile them again.
//!
//! Kept is what cargo left in its target directories, without the crates of this workspace. A checkout that
//! has compiled nothing yet gets a copy. Cargo decides itself, as ever, what of it fits.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value as Json;

use crate::build::{self, TARGET};
use crate::process::{self, capture};
use crate::progress::step;
use crate::{apt, cache, repository};

/// Its entries' shelf in the cache.
const SHELF: &str = "dependencies";

/// Entries that nobody has asked for in this time are forgotten: each is as large as all that cargo compiles.
const KEPT: Duration = Duration::from_secs(14 * 24 * 3600);

/// Debian's static libraries that get into compiled crates, beside what [`inputs`] reads.
const PACKAGES: [&str; 2] = ["libc6-dev", "libseccomp-dev"];

/// One of cargo's target directories, relative to the checkout's.
struct Target {
    dir: &'static str,
    /// Where cargo put what it compiled, relative to `dir`: for the host, and for the product.
    profiles: &'static [&'static str],
    /// Cargo's options for the profile.
    options: &'static [&'static str],
}

/// Those of the tests and of the product.
const TARGETS: [Target; 2] = [
    Target { dir: ".", profiles: &["debug"], options: &[] },
    Target {
        dir: build::STATIC,
        profiles: &["release", build::RELEASE],
        options: &["--release", "--target", TARGET],
    },
];

/// The crates of others, by a key over their sources and their compiler.
pub(crate) struct Dependencies {
    key: String,
    /// The names of this workspace's packages.
    own: Vec<String>,
}

impl Dependencies {
    /// Those of this checkout.
    ///
    /// # Errors
    ///
    /// If cargo, rustc or dpkg do not answer, or a manifest cannot be read.
    pub(crate) fn of_checkout() -> Result<Self> {
        let metadata =
            capture(build::cargo().args(["metadata", "--no-deps", "--format-version=1"]))?;
        let metadata: Json = serde_json::from_str(&metadata).context("cargo's metadata")?;
        let packages =
            metadata["packages"].as_array().context("cargo's metadata has no packages")?;
        let texts = |field: &str| -> Vec<String> {
            packages.iter().filter_map(|one| one[field].as_str()).map(str::to_owned).collect()
        };
        let mut parts = inputs()?;
        for manifest in texts("manifest_path") {
            parts.push(cache::part(Path::new(&manifest))?);
        }
        let key = cache::key(parts.iter().map(|part| ("part", &part[..])));
        Ok(Self { key, own: texts("name") })
    }

    /// Gives the checkout a copy, if it has compiled no product yet and the cache has one.
    ///
    /// # Errors
    ///
    /// If files cannot be copied. What is there then does no harm.
    pub(crate) fn take(&self) -> Result<()> {
        let target = repository::target();
        let entry = cache::root()?.join(SHELF).join(&self.key);
        if target.join(build::STATIC).exists() || !entry.is_dir() {
            return Ok(());
        }
        cache::used(&entry);
        step("copy compiled crates from the cache", || copy(&entry, &target))
    }

    /// Keeps what the checkout has compiled, if the cache does not have it.
    ///
    /// # Errors
    ///
    /// If files cannot be copied, or cargo does not remove this workspace's crates from the copy.
    pub(crate) fn keep(&self) -> Result<()> {
        cache::entry(SHELF, &self.key, |dir| {
            step("copy compiled crates to the cache", || {
                copy(&repository::target(), dir)?;
                TARGETS.iter().try_for_each(|target| self.without_own(target, dir))
            })
        })?;
        cache::forget_unused(&cache::root()?.join(SHELF), KEPT);
        Ok(())
    }

    fn without_own(&self, target: &Target, root: &Path) -> Result<()> {
        let mut cargo = build::cargo();
        cargo.args(["clean", "--quiet", "--target-dir"]).arg(root.join(target.dir));
        cargo.args(target.options);
        cargo.args(self.own.iter().flat_map(|package| ["--package", package]));
        capture(&mut cargo).map(drop)
    }
}

/// Copies compiled files, times included, from one checkout's target directory to another. Files beside the
/// directories of a profile are left out, and `incremental`, which serves this workspace's crates only.
fn copy(from: &Path, to: &Path) -> Result<()> {
    for target in &TARGETS {
        for profile in target.profiles {
            let within = |root: &Path| root.join(target.dir).join(profile);
            copy_profile(&within(from), &within(to))?;
        }
    }
    Ok(())
}

fn copy_profile(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    let entries = fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}", from.display()))?;
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_dir && entry.file_name() != "incremental" {
            let mut cp = process::command("cp");
            // A file that is there may be linked to elsewhere, or run.
            cp.args(["--archive", "--remove-destination"]).arg(entry.path()).arg(to);
            capture(&mut cp)?;
        }
    }
    Ok(())
}

/// Everything beside the manifests that decides how crates are compiled.
fn inputs() -> Result<Vec<Vec<u8>>> {
    let root = repository::root();
    let rustc: PathBuf = std::env::var_os("RUSTC").map_or_else(|| "rustc".into(), PathBuf::from);
    let mut compiler = process::command(rustc);
    compiler.arg("-vV").current_dir(root);
    Ok(vec![
        capture(&mut compiler)?.into_bytes(),
        apt::versions(&PACKAGES)?.into_bytes(),
        cache::part(&root.join("Cargo.lock"))?,
        cache::part(&root.join("Cargo.toml"))?,
        cache::part(&root.join(".cargo/config.toml"))?,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_what_cargo_compares() {
        let root = std::env::temp_dir().join(format!("xtask-dependencies-{}", std::process::id()));
        let [from, to] = ["from", "to"].map(|name| root.join(name));
        let profile = from.join("static").join(build::RELEASE);
        for dir in ["debug", "static/release", &format!("static/{}", build::RELEASE)] {
            for part in ["deps", "incremental"] {
                fs::create_dir_all(from.join(dir).join(part)).unwrap();
            }
            fs::write(from.join(dir).join("program"), "").unwrap();
        }
        let library = profile.join("deps/liblibc.rlib");
        fs::write(&library, "compiled").unwrap();
        let then =
            std::time::SystemTime::UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789);
        fs::File::options().write(true).open(&library).unwrap().set_modified(then).unwrap();
        // An older file is replaced: its dependents are newer than the copy.
        fs::create_dir_all(to.join("static").join(build::RELEASE).join("deps")).unwrap();
        let copied = to.join("static").join(build::RELEASE).join("deps/liblibc.rlib");
        fs::write(&copied, "older").unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read(&copied).unwrap(), b"compiled");
        assert_eq!(fs::metadata(&copied).unwrap().modified().unwrap(), then);
        assert!(to.join("debug/deps").is_dir() && to.join("static/release/deps").is_dir());
        assert!(!to.join("debug/incremental").exists() && !to.join("debug/program").exists());
        fs::remove_dir_all(&root).unwrap();
    }
}
