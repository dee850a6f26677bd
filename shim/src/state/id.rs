//! Names of containers, with runc's rules.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Longest id in bytes: it is the name of a directory.
const MAX_LEN: usize = 255;

/// A container's id: letters, digits and `_ + - .`, and neither `.` nor `..`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(String);

impl Id {
    /// Checks an id.
    ///
    /// # Errors
    ///
    /// If it is not a valid one.
    pub fn parse(text: &str) -> Result<Self> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
        if text.is_empty()
            || text.len() > MAX_LEN
            || matches!(text, "." | "..")
            || !text.chars().all(allowed)
        {
            return Err(Error::new(format!(
                "invalid container id {text:?}: it has to be 1 to {MAX_LEN} letters, digits and \
                 any of _ + - . (no slash)"
            )));
        }
        Ok(Self(text.to_owned()))
    }

    /// A random id, for a container that nobody named.
    ///
    /// # Errors
    ///
    /// If the kernel has no random numbers.
    pub fn random() -> Result<Self> {
        Ok(Self(format!("isopod-{:016x}", crate::sandbox::random_u64()?)))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Id {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        Self::parse(&text)
    }
}

impl From<Id> for String {
    fn from(id: Id) -> Self {
        id.0
    }
}
