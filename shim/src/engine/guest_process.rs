//! A process in the guest, as the host stands for it: the first one of a container, or an exec's.

use std::os::fd::OwnedFd;

use crate::{
    microvm::agent::Agent,
    signals::WINCH,
    terminal::{self, Size},
};

/// A process in the guest.
pub(crate) struct GuestProcess {
    /// The connection to the agent, about this process.
    pub(crate) agent: Agent,
    /// The host's end of the terminal. None if there is no terminal, or if the caller reports the
    /// changes of its size.
    console: Option<OwnedFd>,
}

impl GuestProcess {
    /// A process with the host's end of its terminal, if it has one.
    pub(crate) fn new(agent: Agent, console: Option<OwnedFd>) -> Self {
        Self { agent, console }
    }

    /// Passes a signal on that this process got, or decided on. `SIGWINCH` is not passed on: the
    /// terminal in the guest gets the size of the host's. A task of its own waits for the answer.
    pub(crate) fn pass_on(&self, number: u32) {
        let size = self.console.as_ref().and_then(terminal::size);
        let size = size.filter(|size| *size != Size::default());
        let agent = self.agent.clone();
        tokio::spawn(async move {
            let passed_on = match (number, size) {
                (WINCH, None) => Ok(()),
                (WINCH, Some(size)) => agent.resize(size).await,
                (number, _) => agent.signal(number, false).await,
            };
            if let Err(error) = passed_on {
                log::debug!("{error}");
            }
        });
    }
}
