//! Versions of a container's state and of the control socket of its sandbox process. They tell a
//! newer or older `isopod` apart before anything is asked.

use serde::Deserialize;

use crate::{
    error::{Error, Explain, Result},
    state::{RECORD_FILE, StateDir},
};

/// Version of the files in a state directory. It is raised by any change that an older or newer
/// isopod cannot read, or would read wrongly.
///
/// The fields that a forced deletion reads stay the same in all versions.
pub const STATE_VERSION: u32 = 3;

/// Version of the control socket's messages. It is raised by any change that one side alone cannot
/// survive. Nobody but the sandbox process talks to the agent, so the agent's protocol does not
/// matter here.
pub const CONTROL_VERSION: u32 = 3;

/// The versions in a record. A missing version is 0, which no isopod has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) struct Versions {
    #[serde(default)]
    version: u32,
    #[serde(default)]
    control_version: u32,
}

impl Versions {
    /// Checks that this isopod can read the state.
    pub(crate) fn check_state(self, id: &str) -> Result<()> {
        if self.version == STATE_VERSION {
            return Ok(());
        }
        Err(Error::new(format!(
            "container {id} was created by another isopod: its state has version {}, and this one \
             reads {STATE_VERSION}. Use that isopod for it, or end it by `isopod delete --force {id}`",
            self.version
        )))
    }

    /// Checks that this isopod can read the state and can talk to the sandbox process.
    pub(crate) fn check(self, id: &str) -> Result<()> {
        self.check_state(id)?;
        if self.control_version == CONTROL_VERSION {
            return Ok(());
        }
        Err(Error::new(format!(
            "container {id} runs under another isopod, whose control socket has version {}, and \
             this one speaks {CONTROL_VERSION}. Use that isopod for it, or end it by `isopod kill \
             {id} KILL` or `isopod delete --force {id}`",
            self.control_version
        )))
    }
}

/// Tells whether some isopod has made the container behind `dir`. Other runtimes have a state.json
/// too, without a version.
pub(crate) fn is_of_isopod(dir: &StateDir) -> bool {
    let versions = |json: Vec<u8>| serde_json::from_slice(&json).ok();
    let versions: Option<Versions> = dir.read(RECORD_FILE).ok().flatten().and_then(versions);
    versions.is_some_and(|versions| versions.version != 0)
}

/// Checks that the container behind `dir` has the versions of this program. A container without a
/// record yet was made by this program.
///
/// # Errors
///
/// If a version differs. The text says what to do.
pub fn check(dir: &StateDir) -> Result<()> {
    let Some(json) = dir.read(RECORD_FILE)? else { return Ok(()) };
    let versions: Versions = serde_json::from_slice(&json)
        .explain(|| dir.path().join(RECORD_FILE).display().to_string())?;
    versions.check(&dir.container_name())
}
