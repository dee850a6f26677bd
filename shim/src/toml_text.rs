//! TOML files: errors that name the file and the line.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// Parses the text of the file at `path`.
///
/// # Errors
///
/// Names the file, the line and the reason.
pub(crate) fn parse<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T> {
    toml::from_str(text).map_err(|e| {
        let reason = e.message().lines().collect::<Vec<_>>().join(" ");
        let start = e.span().map_or(0, |span| span.start);
        let line = text.bytes().take(start).filter(|byte| *byte == b'\n').count() + 1;
        Error::new(format!("{}, line {line}: {reason}", path.display()))
    })
}
