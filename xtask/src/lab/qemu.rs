//! Where QEMU and its virtiofsd are: installed, or unpacked into the cache where they cannot be.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::apt;

/// Where Debian has the virtiofsd of its QEMU package.
const VIRTIOFSD: &str = "usr/lib/qemu/virtiofsd";

/// Where Debian has the virtiofsd of a package of its own.
pub(super) const VIRTIOFSD_RUST: &str = "/usr/libexec/virtiofsd";

/// The virtiofsd that came with QEMU; newer releases have a package for it.
pub(super) fn own_virtiofsd() -> Option<PathBuf> {
    let installed = Some(Path::new("/").join(VIRTIOFSD));
    let unpacked = apt::unpacked("qemu-system-common").map(|dir| dir.join(VIRTIOFSD));
    [installed, unpacked].into_iter().flatten().find(|path| path.exists())
}

/// Whether there is any virtiofsd to start.
pub(super) fn has_virtiofsd() -> bool {
    own_virtiofsd().is_some() || Path::new(VIRTIOFSD_RUST).exists()
}

/// The virtiofsd to start.
pub(crate) fn virtiofsd() -> Result<PathBuf> {
    let package = Some(PathBuf::from(VIRTIOFSD_RUST)).filter(|path| path.exists());
    own_virtiofsd().or(package).with_context(|| {
        format!(
            "there is no virtiofsd in /{VIRTIOFSD} or {VIRTIOFSD_RUST}; install one of the Debian \
             packages qemu-system-common (12) and virtiofsd (13)"
        )
    })
}

/// The variables by which a QEMU that was unpacked is found, and finds its own modules. None for an
/// installed one.
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
