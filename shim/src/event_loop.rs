//! The event loop of a process: one thread runs it.

use tokio::{
    runtime::{Builder, Runtime},
    task::JoinHandle,
};

use crate::{
    error::{Error, Explain, Result},
    logger::Subject,
};

/// Makes the event loop of the calling thread.
pub(crate) fn event_loop() -> Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .build()
        .explain(|| "cannot start the event loop".into())
}

/// A task that is aborted when this handle is dropped.
#[derive(Debug)]
pub(crate) struct AbortOnDrop<T>(pub(crate) JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs what may block on a thread of its own, so that nothing else in the event loop waits for it.
/// The thread has the namespaces of the event loop's.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let subject = Subject::now();
    tokio::task::spawn_blocking(move || subject.run(work))
        .await
        .unwrap_or_else(|_| Err(Error::new("a thread of the sandbox process failed")))
}
