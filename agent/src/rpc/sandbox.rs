//! Calls about the guest as a whole.

use std::sync::Arc;

use isopod_protocol::agent::{Empty, SetupSandboxRequest};

use crate::error::{Error, Result};
use crate::sandbox::{Sandbox, power_off};

pub(super) async fn set_up(sandbox: Arc<Sandbox>, request: SetupSandboxRequest) -> Result<Empty> {
    let set_up = move || {
        sandbox.set_up(&request.shared_tag, request.realtime_ns, &request.entropy)?;
        Ok(Empty::default())
    };
    // Mounting asks the host and waits for it.
    tokio::task::spawn_blocking(set_up).await.map_err(|e| Error::internal(e.to_string()))?
}

pub(super) async fn shut_down() -> Result<Empty> {
    tokio::task::spawn_blocking(power_off).await.map_err(|e| Error::internal(e.to_string()))?;
    Err(Error::internal("the guest is still running"))
}
