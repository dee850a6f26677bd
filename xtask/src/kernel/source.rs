//! The guest kernel's source: a Debian source package.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::apt::{self, Offer};
use crate::process::command;
use crate::progress::say;

/// Large parts of the source that an x86-64 kernel does not need; they are not unpacked.
const UNUSED: [&str; 5] = [
    "*/Documentation/*/*",
    "*/arch/*/boot/dts/*",
    "*/drivers/gpu/drm/amd/include/*",
    "*/tools/perf/*",
    "*/tools/testing/*",
];

/// The Debian package with the kernel source, and its pinned version (`guest-kernel/version`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pin {
    /// Name of the Debian package.
    pub(super) package: String,
    /// Its full Debian version.
    pub(super) version: String,
}

impl Pin {
    /// Reads `guest-kernel/version`.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| {
            format!("{} must have one line: a Debian package and its version", path.display())
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines =
            text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
        let mut words = lines.next()?.split_whitespace();
        let pin = Self { package: words.next()?.to_owned(), version: words.next()?.to_owned() };
        (words.next().is_none() && lines.next().is_none() && pin.series().is_some()).then_some(pin)
    }

    /// Common prefix of the versions of one stable series: `6.12.` for `6.12.117-1`.
    fn series(&self) -> Option<&str> {
        let (second_dot, _) = self.version.match_indices('.').nth(1)?;
        self.version.get(..=second_dot)
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.package, self.version)
    }
}

/// A version without the suffix of a rebuild for another Debian release.
///
/// It is `6.12.1-1` for `6.12.1-1~deb12u1` and for `6.12.1-1~bpo12+1`, which have the same source.
pub(super) fn base(version: &str) -> &str {
    match version.rsplit_once('~') {
        Some((base, rebuild)) if rebuild.starts_with("deb") || rebuild.starts_with("bpo") => base,
        _ => version,
    }
}

/// The pinned version if the archive has it, otherwise the newest of the same series.
pub(super) fn offer(pin: &Pin) -> Result<Offer> {
    // An archive keeps only the newest version of a package, so a missing pin is no error. A
    // lasting error comes up again in the next search.
    if let Ok(offer) = apt::find(&pin.package, |version| base(version) == base(&pin.version)) {
        return Ok(offer);
    }
    let series = pin.series().unwrap_or(&pin.version);
    let offer =
        apt::find(&pin.package, |version| version.starts_with(series)).with_context(|| {
            format!(
                "cannot get {} {series}*; if Debian has dropped it, raise guest-kernel/version to \
             a series that Debian has",
                pin.package
            )
        })?;
    say(format!("    {pin} is not available; taking {} of the same series", offer.version));
    Ok(offer)
}

/// Unpacks the kernel source in the package file `deb` into the folder `tree`.
pub(super) fn unpack(deb: &Path, package: &str, tree: &Path) -> Result<()> {
    let mut files = Stage::first(command("dpkg-deb").arg("--fsys-tarfile").arg(deb))?;
    let mut archive = Stage::after(
        &mut files,
        command("tar")
            .args(["--extract", "--to-stdout"])
            .arg(format!("./usr/src/{package}.tar.xz")),
    )?;
    let mut tar = command("tar");
    tar.args(["--extract", "--xz", "--strip-components=1", "--no-same-owner"]);
    tar.args(UNUSED.map(|pattern| format!("--exclude={pattern}")));
    tar.arg("--directory").arg(tree).env("XZ_OPT", "-T0");
    let last = Stage::after(&mut archive, &mut tar)?;
    // In reverse: a stage ends when its input ends, or when it has failed.
    last.finish().and(archive.finish()).and(files.finish())
}

/// One process of a pipeline.
struct Stage {
    program: String,
    child: Child,
    output: Option<ChildStdout>,
}

impl Stage {
    fn first(command: &mut Command) -> Result<Self> {
        Self::start(command.stdin(Stdio::null()))
    }

    fn after(previous: &mut Self, command: &mut Command) -> Result<Self> {
        let input = previous.output.take().map_or_else(Stdio::null, Stdio::from);
        Self::start(command.stdin(input))
    }

    fn start(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {program}"))?;
        let output = child.stdout.take();
        Ok(Self { program, child, output })
    }

    fn finish(mut self) -> Result<()> {
        // Without a reader the process gets SIGPIPE instead of blocking.
        drop(self.output.take());
        let status =
            self.child.wait().with_context(|| format!("cannot wait for {}", self.program))?;
        if !status.success() {
            bail!("{} failed ({status}) while unpacking the kernel's source", self.program);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rebuilds_have_the_same_base() {
        for version in ["6.12.1-1", "6.12.1-1~deb12u1", "6.12.1-1~bpo12+1", "6.12.1-1~bpo13+10"] {
            assert_eq!(base(version), "6.12.1-1");
        }
        assert_eq!(base("6.12~rc1-1~exp1"), "6.12~rc1-1~exp1");
        assert_eq!(base("6.12~rc1-1~bpo12+1"), "6.12~rc1-1");
    }

    #[test]
    fn pin_is_one_line() {
        let pin = Pin::parse("# comment\n\nlinux-source-6.12  6.12.117-1~deb12u1\n").unwrap();
        assert_eq!(pin.to_string(), "linux-source-6.12 6.12.117-1~deb12u1");
        assert_eq!(pin.series(), Some("6.12."));
        for wrong in ["", "linux-source-6.12", "a 6.12", "a 6.12.1 b", "a 6.12.1\nb 6.12.2\n"] {
            assert_eq!(Pin::parse(wrong), None, "{wrong:?}");
        }
    }
}
