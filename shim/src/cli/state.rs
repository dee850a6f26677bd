//! `state`: the OCI runtime specification's state object.

use clap::Args;

use super::{Global, print};
use crate::{
    error::{Error, Explain, Result},
    state::{Id, StateDir},
};

#[derive(Debug, Args)]
pub(super) struct State {
    /// The container.
    id: String,
}

impl State {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = Id::parse(&self.id)?;
        let record = StateDir::open(&global.root, &id)?.record()?.ok_or_else(|| {
            Error::new(format!(
                "container does not exist: {id} is being created or was left behind"
            ))
        })?;
        let state = serde_json::to_string_pretty(&record.to_oci());
        print(&format!("{}\n", state.explain(|| "cannot write the state".into())?))?;
        Ok(0)
    }
}
