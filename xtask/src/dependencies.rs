//! Compiled dependencies in the cache, so that a new checkout does not compile them again.
//!
//! The cache has copies of cargo's target directories without the crates of this workspace. A
//! checkout that has compiled nothing gets such a copy. Cargo then decides which files are up to
//! date, as in any build.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value as Json;

use crate::build::{self, TARGET};
use crate::process::{self, capture};
use crate::progress::step;
use crate::{apt, cache, repository};

/// Kind of these entries in the cache.
const SHELF: &str = "dependencies";

/// Time after which an unused entry is removed. An entry is as large as a whole target directory.
const KEPT: Duration = Duration::from_secs(14 * 24 * 3600);

/// Debian packages whose static libraries become part of compiled crates.
const PACKAGES: [&str; 2] = ["libc6-dev", "libseccomp-dev"];

/// One of cargo's target directories.
struct TargetDir {
    /// Path relative to the checkout's target directory.
    dir: &'static str,
    /// Folders of compiled files, relative to `dir`: for the host, and for the product.
    profiles: &'static [&'static str],
    /// Cargo's options that select the profile.
    options: &'static [&'static str],
}

/// The target directories of the tests and of the product.
const TARGET_DIRS: [TargetDir; 2] = [
    TargetDir { dir: ".", profiles: &["debug"], options: &[] },
    TargetDir {
        dir: build::STATIC,
        profiles: &["release", build::RELEASE],
        options: &["--release", "--target", TARGET],
    },
];

/// The dependencies of a checkout, under a key over their sources and their compiler.
pub(crate) struct Dependencies {
    key: String,
    /// The names of this workspace's packages.
    own: Vec<String>,
}

impl Dependencies {
    /// The dependencies of this checkout.
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

    /// Copies the cache's entry to the checkout, if there is one and no product has been compiled.
    ///
    /// A copy that fails halfway does no harm: cargo checks each file.
    pub(crate) fn take(&self) -> Result<()> {
        let target = repository::target();
        let entry = cache::root()?.join(SHELF).join(&self.key);
        if target.join(build::STATIC).exists() || !entry.is_dir() {
            return Ok(());
        }
        cache::used(&entry);
        step("copy compiled crates from the cache", || copy(&entry, &target))
    }

    /// Copies the compiled dependencies of the checkout to the cache, unless the cache has them.
    pub(crate) fn keep(&self) -> Result<()> {
        cache::entry(SHELF, &self.key, |dir| {
            step("copy compiled crates to the cache", || {
                copy(&repository::target(), dir)?;
                TARGET_DIRS.iter().try_for_each(|target| self.without_own(target, dir))
            })
        })?;
        cache::forget_unused(&cache::root()?.join(SHELF), KEPT);
        Ok(())
    }

    /// Removes this workspace's crates from the copy in `root`.
    fn without_own(&self, target: &TargetDir, root: &Path) -> Result<()> {
        let mut cargo = build::cargo();
        cargo.args(["clean", "--quiet", "--target-dir"]).arg(root.join(target.dir));
        cargo.args(target.options);
        cargo.args(self.own.iter().flat_map(|package| ["--package", package]));
        capture(&mut cargo).map(drop)
    }
}

/// Copies compiled files, with their times, from one checkout's target directory to another.
///
/// Only directories of a profile are copied. `incremental` is left out: it is only for crates of
/// this workspace.
fn copy(from: &Path, to: &Path) -> Result<()> {
    for target in &TARGET_DIRS {
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
            // Not written in place: an existing file may have other hard links, or be running.
            cp.args(["--archive", "--remove-destination"]).arg(entry.path()).arg(to);
            capture(&mut cp)?;
        }
    }
    Ok(())
}

/// The inputs of compilation beside the manifests.
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
