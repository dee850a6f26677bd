//! Requests to the guest to forget files. Its kernel keeps every file that it has seen until it
//! needs the memory, and the VMM keeps a descriptor for each of these.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Notify, time::sleep};

use crate::microvm::agent::Agent;

/// Shortest time between two requests: after each of them the guest has to look files up again.
const INTERVAL: Duration = Duration::from_secs(1);

/// The wish that the guest forgets files. Clones share the wish.
#[derive(Debug, Clone, Default)]
pub(crate) struct DropCaches(Arc<Notify>);

impl DropCaches {
    /// Has the guest asked soon. Further wishes until then count as one.
    pub(crate) fn wish(&self) {
        self.0.notify_one();
    }

    /// Asks the guest after a wish, one request at a time, for as long as the guest answers.
    pub(crate) async fn serve(self, agent: Agent) {
        loop {
            self.0.notified().await;
            if let Err(error) = agent.drop_caches().await {
                return log::debug!("{error}");
            }
            sleep(INTERVAL).await;
        }
    }
}
