//! Versions of a container's state and of its sandbox's protocols. They tell a newer or older
//! `isopod` apart before anything is asked.

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Explain, Result},
    state::{RECORD_FILE, StateDir},
};

/// Version of the files in a state directory. It is raised by any change that an older or newer
/// isopod cannot read, or would read wrongly.
///
/// The fields that a forced deletion reads stay the same in all versions.
pub const STATE_VERSION: u32 = 1;

/// Version of the control socket's messages. It is raised by any change that one side alone cannot
/// survive.
pub const CONTROL_VERSION: u32 = 1;

/// Versions of the protocols of a running sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protocols {
    /// The protocol of the agent in the guest.
    pub agent: u32,
    /// The protocol of the sandbox process, over the control socket.
    pub control: u32,
}

impl Protocols {
    /// The versions of this program.
    pub const OWN: Self =
        Self { agent: isopod_protocol::PROTOCOL_VERSION, control: CONTROL_VERSION };
}

/// Versions of a container's state and of its sandbox's protocols. A missing version is 0, which no
/// isopod has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) struct Versions {
    #[serde(default)]
    version: u32,
    protocols: Option<Protocols>,
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

    /// Checks that this isopod can read the state and speaks both protocols of the sandbox.
    pub(crate) fn check(self, id: &str) -> Result<()> {
        self.check_state(id)?;
        match self.protocols {
            Some(Protocols::OWN) => Ok(()),
            other => {
                let Protocols { agent, control } =
                    other.unwrap_or(Protocols { agent: 0, control: 0 });
                let own = Protocols::OWN;
                Err(Error::new(format!(
                    "container {id} runs under another isopod, whose protocols have version {agent} \
                     (agent) and {control} (control), and this one speaks {} and {}. Use that isopod \
                     for it, or end it by `isopod kill {id} KILL` or `isopod delete --force {id}`",
                    own.agent, own.control
                )))
            }
        }
    }
}

/// Checks that the sandbox behind `dir` has the versions of this program. A sandbox without a
/// record yet was started by this program.
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
