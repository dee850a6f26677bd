//! `state`: prints the state object of the OCI runtime specification.

use clap::Args;

use crate::{
    cli::{Global, print},
    container_id::ContainerId,
    engine::Record,
    error::{Error, Explain, Result},
    state::StateDir,
};

#[derive(Debug, Args)]
pub(super) struct State {
    /// Id of the container.
    id: String,
}

impl State {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = ContainerId::parse(&self.id)?;
        let record = Record::read(&StateDir::open(&global.root, &id)?)?.ok_or_else(|| {
            Error::new(format!(
                "container does not exist: {id} is being created or was left behind"
            ))
        })?;
        let state = serde_json::to_string_pretty(&record.to_oci());
        print(&format!("{}\n", state.explain(|| "cannot write the state".into())?))?;
        Ok(0)
    }
}
