//! The event loop of a process: one thread runs it.

use tokio::runtime::{Builder, Runtime};

use crate::error::{Explain, Result};

/// Makes the event loop of the calling thread.
pub(crate) fn event_loop() -> Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .build()
        .explain(|| "cannot start the event loop".into())
}
