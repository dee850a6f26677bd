//! The files for one guest: a Debian tree, and a volume in a new tmpfs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

/// Size in bytes of the file for sequential reads and writes.
pub(super) const BULK: usize = 16 << 20;

/// Size in bytes of each file for random reads or writes.
pub(super) const SPAN: usize = 8 << 20;

/// Number of small files in a directory.
pub(super) const MANY: usize = 500;

/// Number of source files of the C program, beside `main.c`.
pub(super) const SOURCES: usize = 2;

/// Mount options of the volume's tmpfs.
const SIZE: &str = "size=256m,mode=755";

/// A directory with two mounts: `root`, the tree, and `volume`.
///
/// Mounts and directory are removed when the value is dropped.
pub(super) struct Ground {
    dir: TempDir,
    mounted: Vec<PathBuf>,
}

impl Ground {
    /// Mounts tree and volume, and fills the volume. After an error nothing is left.
    pub(super) fn new(tree: &Path) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a directory")?;
        let mut ground = Self { dir, mounted: Vec::new() };
        let nothing: Option<&str> = None;
        let root = ground.point("root")?;
        mount(Some(tree), &root, nothing, MsFlags::MS_BIND, nothing)
            .with_context(|| format!("cannot bind {}", tree.display()))?;
        ground.mounted.push(root);
        let volume = ground.point("volume")?;
        mount(Some("tmpfs"), &volume, Some("tmpfs"), MsFlags::empty(), Some(SIZE))
            .context("cannot mount a file system in memory")?;
        ground.mounted.push(volume);
        ground.fill()?;
        Ok(ground)
    }

    /// Makes a mount point.
    fn point(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.path().join(name);
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// The directory with both mounts.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The volume.
    pub(super) fn volume(&self) -> PathBuf {
        self.dir.path().join("volume")
    }

    /// Makes the volume's files.
    fn fill(&self) -> Result<()> {
        let volume = self.volume();
        let write = |name: &str, content: &[u8]| {
            let path = volume.join(name);
            fs::write(&path, content).with_context(|| path.display().to_string())
        };
        fs::copy("/proc/self/exe", volume.join("isopod-bench")).context("the bench itself")?;
        write("bulk", &vec![0x55; BULK])?;
        write("span", &vec![0x55; SPAN])?;
        write("written", &vec![0x55; SPAN])?;
        for dir in ["many", "source"] {
            fs::create_dir(volume.join(dir)).context(dir)?;
        }
        for number in 0..MANY {
            write(&format!("many/{number}"), b"a few words of a small file\n")?;
        }
        self.sources(&write)?;
        self.archive()
    }

    /// Writes a C program of a few files. Each file includes system headers.
    fn sources(&self, write: &impl Fn(&str, &[u8]) -> Result<()>) -> Result<()> {
        let mut main = "#include <stdio.h>\n".to_owned();
        let mut sum = "0".to_owned();
        for number in 0..SOURCES {
            let part = format!(
                "#include <stdlib.h>\n#include <string.h>\n\
                 int part{number}(int n) {{ return abs(n) + {number}; }}\n"
            );
            write(&format!("source/part{number}.c"), part.as_bytes())?;
            main.push_str(&format!("int part{number}(int);\n"));
            sum.push_str(&format!(" + part{number}({number})"));
        }
        main.push_str(&format!("int main(void) {{ printf(\"%d\\n\", {sum}); return 0; }}\n"));
        write("source/main.c", main.as_bytes())
    }

    /// Makes a tar archive of 10 directories with 20 files each, of 10 bytes to 20 kB.
    fn archive(&self) -> Result<()> {
        let dir = tempfile::tempdir().context("cannot make a directory")?;
        for outer in 0..10_usize {
            let at = dir.path().join(format!("tree/{outer}"));
            fs::create_dir_all(&at).context("the archive's tree")?;
            for inner in 0..20_usize {
                let content = vec![b'x'; 10 + outer * inner * 110];
                fs::write(at.join(inner.to_string()), content).context("the archive's tree")?;
            }
        }
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(dir.path()).arg("-cf").arg(self.volume().join("tree.tar")).arg("tree");
        let output = tar.output().context("tar")?;
        if !output.status.success() {
            bail!("tar: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        for point in self.mounted.iter().rev() {
            if let Err(error) = umount2(point, MntFlags::MNT_DETACH) {
                eprintln!("isopod-bench: unmounting {}: {error}", point.display());
            }
        }
    }
}
