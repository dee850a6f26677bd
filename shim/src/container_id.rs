//! Ids of containers, by runc's rules.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Longest id in bytes. The id is the name of a directory.
const MAX_LEN: usize = 255;

/// A container's id: letters, digits and `_ + - .`, and neither `.` nor `..`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

impl ContainerId {
    /// Checks an id.
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
    pub fn random() -> Result<Self> {
        Ok(Self(format!("isopod-{:016x}", crate::random::random_u64()?)))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for ContainerId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        Self::parse(&text)
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_follow_runcs_rules() {
        for good in ["a", "A-b_c+d.e", "...", "0", &"x".repeat(255)] {
            assert_eq!(ContainerId::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "/", "a b", "ä", "a\n", "a:b", &"x".repeat(256)] {
            let error = ContainerId::parse(bad).unwrap_err();
            assert!(error.message.contains("invalid container id"), "{error}");
        }
    }
}
