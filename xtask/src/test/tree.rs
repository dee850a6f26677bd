//! Debian trees for tests of engines and workloads. debootstrap makes them once, in the cache.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::process::{command, run_logged};
use crate::progress::{say, step};
use crate::{apt, cache, repository};

/// A Debian tree: a root file system with packages of a Debian release.
#[derive(Debug)]
pub(super) struct Tree {
    /// The test programs that need the tree.
    pub(super) programs: &'static [&'static str],
    /// The environment variable of the test program for the tree's path.
    pub(super) variable: &'static str,
    suite: &'static str,
    packages: &'static [&'static str],
}

/// The tree of the workload tests: common programs, a compiler, and Docker.
pub(super) const WORKLOADS: Tree = Tree {
    programs: &["workloads"],
    variable: "ISOPOD_TEST_WORKLOAD_TREE",
    suite: "bookworm",
    packages: &[
        "redis-server",
        "redis-tools",
        "nginx-light",
        "python3-minimal",
        "libpython3-stdlib",
        "make",
        "gcc",
        "libc6-dev",
        "docker.io",
        "iptables",
    ],
};

/// All trees.
pub(super) const TREES: [Tree; 3] = [
    Tree {
        programs: &["docker_newer", "containerd", "install"],
        variable: "ISOPOD_TEST_DOCKER_TREE",
        suite: "trixie",
        packages: &["docker.io", "docker-cli", "iptables", "iproute2", "procps"],
    },
    // The newest containerd. containerd_older is this machine's own.
    Tree {
        programs: &["containerd_newer"],
        variable: "ISOPOD_TEST_CONTAINERD_TREE",
        suite: "sid",
        packages: &["containerd", "runc", "iptables", "iproute2", "procps"],
    },
    WORKLOADS,
];

/// Folders that are emptied: no program in a tree reads them.
const WASTE: [&str; 6] = [
    "var/cache/apt",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
];

impl Tree {
    /// Tells whether a test program needs the tree.
    pub(super) fn is_for(&self, program: &str) -> bool {
        self.programs.contains(&program)
    }

    /// The tree's root directory, from the cache. A missing tree is made, which takes minutes.
    pub(super) fn ensure(&self) -> Result<PathBuf> {
        let packages = self.packages.join(",");
        let waste = WASTE.join(",");
        let parts = [("suite", self.suite), ("packages", &packages), ("waste", &waste)];
        let key = cache::key(parts.map(|(name, value)| (name, value.as_bytes())));
        cache::entry("tree", &key, |dir| {
            let what =
                format!("make a tree of Debian {} for {}", self.suite, self.programs.join(", "));
            say(format!("    {}", self.packages.join(" ")));
            step(&what, || self.make(dir, &packages))
        })
    }

    /// Makes the tree in `dir`.
    fn make(&self, dir: &Path, packages: &str) -> Result<()> {
        let archive = apt::archive()?;
        // In a mount namespace: its end unmounts what debootstrap has mounted in the tree.
        let mut debootstrap = command("unshare");
        debootstrap.args(["--mount", "--propagation=private", "debootstrap", "--variant=minbase"]);
        debootstrap.args([&format!("--include={packages}"), self.suite]).arg(dir).arg(archive);
        debootstrap.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
        run_logged(&mut debootstrap, &repository::target().join("debootstrap.log"))?;
        for waste in WASTE {
            let path = dir.join(waste);
            if path.exists() {
                fs::remove_dir_all(&path)
                    .and_then(|()| fs::create_dir(&path))
                    .with_context(|| format!("cannot empty {}", path.display()))?;
            }
        }
        Ok(())
    }
}
