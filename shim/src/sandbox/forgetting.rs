//! Requests to the guest to forget files: its kernel keeps every file that it has seen, and the VMM a
//! descriptor of each, until the memory is needed for something else.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Notify, time::sleep};

use super::agent::Agent;

/// The least time between two requests: each costs the guest what it would soon look up again.
const INTERVAL: Duration = Duration::from_secs(1);

/// The wish that the guest forgets. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Forgetting(Arc<Notify>);

impl Forgetting {
    /// Has the guest asked soon. Wishes that come until then are one.
    pub(super) fn wish(&self) {
        self.0.notify_one();
    }

    /// Asks the guest whenever that is wished for, one request at a time, for as long as it answers.
    pub(super) async fn serve(self, agent: Agent) {
        loop {
            self.0.notified().await;
            if let Err(error) = agent.forget_files().await {
                return log::debug!("{error}");
            }
            sleep(INTERVAL).await;
        }
    }
}
