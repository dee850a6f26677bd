//! The options in `guest-kernel/config/*.config`, and their comparison with a built configuration.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// Options of the fragments, in order: lines `CONFIG_A=y` or `# CONFIG_A is not set`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KernelOptions {
    lines: Vec<String>,
}

impl KernelOptions {
    /// Reads all fragments in the folder `dir`.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let mut options = Self { lines: Vec::new() };
        for path in fragments(dir)? {
            let text = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            options.add(&text).with_context(|| format!("in {}", path.display()))?;
        }
        Ok(options)
    }

    /// Adds the options of a fragment. Each option may be set or unset once.
    fn add(&mut self, fragment: &str) -> Result<()> {
        for line in fragment.lines().map(str::trim_end) {
            let Some(name) = option_name(line) else {
                if line.is_empty() || line.starts_with('#') {
                    continue;
                }
                bail!("`{line}` is neither an option nor a comment");
            };
            if let Some(other) = self.lines.iter().find(|l| option_name(l) == Some(name)) {
                bail!("`{line}` repeats the option `{other}`");
            }
            self.lines.push(line.to_owned());
        }
        Ok(())
    }

    /// The options, one a line. Comments are left out, so a changed comment causes no new build.
    pub(super) fn text(&self) -> String {
        self.lines.iter().map(|line| format!("{line}\n")).collect()
    }

    /// Checks that the kernel configuration `config` has every option of the fragments.
    ///
    /// Kconfig drops an option without a word if a dependency is missing, or if another option
    /// selects the opposite.
    pub(super) fn verify(&self, config: &str) -> Result<()> {
        let mut wrong = Vec::new();
        for line in &self.lines {
            let Some(name) = option_name(line) else { continue };
            let got = config.lines().find(|l| option_name(l) == Some(name));
            let unset = line.starts_with('#');
            match got {
                Some(got) if got == line => {}
                // An option with unmet dependencies is not in the file, so it is not set.
                None if unset => {}
                Some(got) => wrong.push(format!("    asked for `{line}`, got `{got}`")),
                None => wrong.push(format!("    asked for `{line}`, got nothing")),
            }
        }
        if !wrong.is_empty() {
            bail!(
                "the kernel does not take these options; see what they depend on:\n{}",
                wrong.join("\n")
            );
        }
        Ok(())
    }
}

/// The fragments in `dir`, sorted by name.
fn fragments(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list {}", dir.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "config") {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        bail!("{} has no *.config files", dir.display());
    }
    paths.sort();
    Ok(paths)
}

/// Name of the option that a line sets or unsets, such as `CONFIG_A`.
fn option_name(line: &str) -> Option<&str> {
    let name = match line.strip_prefix("# ") {
        Some(rest) => rest.strip_suffix(" is not set")?,
        None => line.split_once('=')?.0,
    };
    let word = name.strip_prefix("CONFIG_")?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (!word.is_empty() && word.bytes().all(plain)).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(fragment: &str) -> KernelOptions {
        let mut options = KernelOptions { lines: Vec::new() };
        options.add(fragment).unwrap();
        options
    }

    #[test]
    fn comments_are_left_out() {
        let options =
            options("# About A.\n\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=\"a b\"\n");
        assert_eq!(options.text(), "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=\"a b\"\n");
    }

    #[test]
    fn what_is_not_an_option_is_refused() {
        for wrong in ["CONFIG_A", "FOO=y", "CONFIG_A=y\n# CONFIG_A is not set"] {
            assert!(KernelOptions { lines: Vec::new() }.add(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn dropped_options_are_named() {
        let options =
            options("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=14\n# CONFIG_D is not set\n");
        options.verify("CONFIG_A=y\nCONFIG_C=14\n# CONFIG_D is not set\n").unwrap();
        let error = options.verify("CONFIG_B=y\nCONFIG_C=15\n").unwrap_err().to_string();
        for name in ["`CONFIG_A=y`, got nothing", "got `CONFIG_B=y`", "got `CONFIG_C=15`"] {
            assert!(error.contains(name), "{name}: {error}");
        }
        assert!(!error.contains("CONFIG_D"), "{error}");
    }
}
