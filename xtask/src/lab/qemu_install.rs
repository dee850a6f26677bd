//! Paths of QEMU and virtiofsd: installed on the machine, or unpacked into the cache.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::apt;

/// The virtiofsd of the package `qemu-system-common` (Debian 12).
const VIRTIOFSD: &str = "usr/lib/qemu/virtiofsd";

/// The virtiofsd of the package `virtiofsd` (Debian 13).
pub(super) const VIRTIOFSD_RUST: &str = "/usr/libexec/virtiofsd";

/// The virtiofsd of QEMU's package, installed or unpacked, if there is one.
pub(super) fn own_virtiofsd() -> Option<PathBuf> {
    let installed = Some(Path::new("/").join(VIRTIOFSD));
    let unpacked = apt::unpacked("qemu-system-common").map(|dir| dir.join(VIRTIOFSD));
    [installed, unpacked].into_iter().flatten().find(|path| path.exists())
}

/// Tells if there is a virtiofsd.
pub(super) fn has_virtiofsd() -> bool {
    own_virtiofsd().is_some() || Path::new(VIRTIOFSD_RUST).exists()
}

/// The virtiofsd to start: QEMU's own if there is one, otherwise the separate package's.
pub(crate) fn virtiofsd() -> Result<PathBuf> {
    let package = Some(PathBuf::from(VIRTIOFSD_RUST)).filter(|path| path.exists());
    own_virtiofsd().or(package).with_context(|| {
        format!(
            "there is no virtiofsd in /{VIRTIOFSD} or {VIRTIOFSD_RUST}; install one of the Debian \
             packages qemu-system-common (12) and virtiofsd (13)"
        )
    })
}

/// Environment variables for an unpacked QEMU: `PATH`, and the folder of its modules.
///
/// An installed QEMU needs none.
pub(crate) fn environment() -> Vec<(String, String)> {
    if Path::new("/usr/bin/qemu-system-x86_64").exists() {
        return Vec::new();
    }
    let (Some(program), Some(common)) =
        (apt::unpacked("qemu-system-x86"), apt::unpacked("qemu-system-common"))
    else {
        return Vec::new();
    };
    let path = std::env::var("PATH").unwrap_or_default();
    let modules = common.join(format!("usr/lib/{}-linux-gnu/qemu", std::env::consts::ARCH));
    vec![
        ("PATH".to_owned(), format!("{}:{path}", program.join("usr/bin").display())),
        ("QEMU_MODULE_DIR".to_owned(), modules.display().to_string()),
    ]
}
