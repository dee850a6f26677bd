//! The name and the programs that engines are told.

use std::path::{Path, PathBuf};

use super::host::{Host, PROGRAM_FOLDERS};
use crate::error::{Error, Result};

/// Name of containerd's shim.
pub(super) const SHIM: &str = "containerd-shim-isopod-v2";

/// Longest name of a runtime: the handler of a RuntimeClass is a DNS label.
const MAX_HANDLER: usize = 63;

/// The first line of files that `install` writes as a whole.
pub(super) const WRITTEN: &str =
    "# Written by `isopod install`: changes here are lost, `isopod uninstall` removes the file.\n";

/// A runtime, as engines know it.
#[derive(Debug, Clone)]
pub(super) struct Registration {
    /// Name of the runtime: a DNS label, so it needs no quotes in TOML and JSON.
    pub(super) handler: String,
    /// Path of `isopod` on the host. UTF-8 without control characters.
    pub(super) program: String,
}

impl Registration {
    /// Checks the options.
    pub(super) fn new(handler: &str, binary_dir: &Path) -> Result<Self> {
        let label = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let good = (1..=MAX_HANDLER).contains(&handler.len())
            && handler.bytes().all(label)
            && !handler.starts_with('-')
            && !handler.ends_with('-');
        if !good {
            return Err(Error::new(format!(
                "--handler {handler:?}: a name has 1 to {MAX_HANDLER} lower-case letters, digits \
                 and dashes, and no dash at its ends"
            )));
        }
        let program = binary_dir.join("isopod").into_os_string().into_string();
        match program {
            Ok(program) if binary_dir.is_absolute() && !program.contains(char::is_control) => {
                Ok(Self { handler: handler.to_owned(), program })
            }
            _ => Err(Error::new(format!(
                "--binary-dir {}: it has to be an absolute path of UTF-8 text",
                binary_dir.display()
            ))),
        }
    }

    /// Checks that the program is on the host.
    pub(super) fn check_program(&self, host: &Host) -> Result<()> {
        match host.find(Path::new(&self.program))? {
            Some(_) => Ok(()),
            None => Err(Error::new(format!(
                "{} is not on the host: name the directory of isopod there by --binary-dir",
                self.program
            ))),
        }
    }

    /// Path of the shim on the host: beside the program if services find it there, and otherwise in
    /// /usr/local/bin.
    pub(super) fn shim(&self) -> PathBuf {
        let folder = Path::new(&self.program).parent().and_then(Path::to_str);
        let known = PROGRAM_FOLDERS.into_iter().find(|known| Some(*known) == folder);
        Path::new(known.unwrap_or("/usr/local/bin")).join(SHIM)
    }
}

/// A string of TOML or JSON, for a text without control characters.
pub(super) fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_checked() {
        for handler in ["", "-a", "a-", "A", "a.b", "a b", &"a".repeat(64)] {
            let error = Registration::new(handler, Path::new("/bin")).unwrap_err();
            assert!(error.message.starts_with("--handler "), "{error}");
        }
        for dir in ["bin", "/a\nb"] {
            let error = Registration::new("isopod", Path::new(dir)).unwrap_err();
            assert!(error.message.starts_with("--binary-dir "), "{error}");
        }
    }

    #[test]
    fn the_shim_is_where_services_look() {
        let shim = |dir: &str| Registration::new("isopod", Path::new(dir)).unwrap().shim();
        assert_eq!(shim("/usr/bin"), Path::new("/usr/bin").join(SHIM));
        assert_eq!(shim("/usr/local/bin/"), Path::new("/usr/local/bin").join(SHIM));
        assert_eq!(shim("/opt/isopod/bin"), Path::new("/usr/local/bin").join(SHIM));
    }

    #[test]
    fn a_quoted_text_is_the_same_in_both_formats() {
        let text = r#"/a "b" \c é"#;
        assert_eq!(serde_json::from_str::<String>(&quoted(text)).unwrap(), text);
        let toml: toml::Table = toml::from_str(&format!("a = {}", quoted(text))).unwrap();
        assert_eq!(toml["a"].as_str(), Some(text));
    }
}
