//! The patches of the kernel's source in `guest-kernel/patches/*.patch`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::process::{command, run_logged, tail};

/// Number of log lines in an error message.
const LOG_LINES: usize = 30;

/// Patches in the order of their file names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Patches {
    files: Vec<(PathBuf, String)>,
}

impl Patches {
    /// Reads all patches in the folder `dir`.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let mut files = Vec::new();
        let entries =
            fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
        for entry in entries {
            let path = entry.with_context(|| format!("cannot list {}", dir.display()))?.path();
            if path.extension().is_some_and(|extension| extension == "patch") {
                let text = fs::read_to_string(&path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                files.push((path, text));
            }
        }
        files.sort();
        Ok(Self { files })
    }

    /// All patches without their descriptions, so a changed description causes no new build.
    pub(super) fn text(&self) -> String {
        self.files.iter().map(|(_, text)| text.find("--- ").map_or("", |at| &text[at..])).collect()
    }

    /// Applies the patches to the source in `tree`.
    ///
    /// The lines of a change may have moved, but their context must match exactly (no fuzz).
    pub(super) fn apply(&self, tree: &Path, log: &Path) -> Result<()> {
        for (path, _) in &self.files {
            let mut patch = command("patch");
            patch.args(["--batch", "--forward", "--fuzz=0", "--strip=1"]);
            patch.arg("--directory").arg(tree).arg("--input").arg(path);
            if run_logged(&mut patch, log).is_err() {
                bail!(
                    "{} does not apply to this kernel source; adapt it to the version in \
                     guest-kernel/version:\n{}",
                    path.display(),
                    tail(log, LOG_LINES)
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATCH: &str = "Why.\n\n--- a/file\n+++ b/file\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n";

    #[test]
    fn a_patch_applies_exactly_or_fails() {
        let name = format!("xtask-patches-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("a.patch"), PATCH).unwrap();
        fs::write(dir.join("README"), "no patch").unwrap();
        let patches = Patches::read(&dir).unwrap();
        assert_eq!(patches.text(), PATCH["Why.\n\n".len()..]);
        let (file, log) = (dir.join("file"), dir.join("log"));
        fs::write(&file, "zero\none\ntwo\nthree\n").unwrap();
        patches.apply(&dir, &log).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "zero\none\n2\nthree\n");
        // Once more, and around other lines.
        for content in ["zero\none\n2\nthree\n", "one\ntwo\n3\n"] {
            fs::write(&file, content).unwrap();
            let error = patches.apply(&dir, &log).unwrap_err().to_string();
            assert!(error.contains("a.patch does not apply"), "{error}");
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
