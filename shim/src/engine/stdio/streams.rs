//! Connected streams: relayed by threads of this process.

use std::{
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
};

use tokio::sync::oneshot;

use crate::{
    engine::stdio::{
        completion::{Output, Relay, start},
        copy::{self, Flow, InputEnd, copy_input, copy_output, is_wanted},
        loss_notice::{Listener, LossNotice},
    },
    error::Result,
};

/// A local descriptor and its connection to the guest.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) local: OwnedFd,
    pub(super) remote: UnixStream,
    pub(super) token: u64,
    /// True if `local` is a socket, whose other end is to hear of the end of the output.
    pub(super) socket: bool,
    /// True if nothing is read from `local` before the guest's process waits for input.
    pub(super) on_demand: bool,
    /// True if a client passes the input on, and waits until it is wanted.
    pub(super) client: bool,
    /// Waits for a loss notice at the end of the output.
    pub(super) listener: Option<Listener>,
}

/// Connected streams that are not relayed yet.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(super) inputs: Vec<Stream>,
    /// Outputs: descriptors from 3 on, then standard output and standard error.
    pub(super) outputs: Vec<Stream>,
    /// True if the last input and the last output are a terminal's, as far as they are connected.
    pub(super) terminal: bool,
    /// True if the last output is standard error, or the terminal.
    pub(super) last_is_for_messages: bool,
    pub(super) loss_notice: Option<LossNotice>,
}

impl Streams {
    /// Has standard error, or the terminal, wait at its end for the notice of [`Relay::say`].
    pub(crate) fn with_loss_notice(mut self) -> Self {
        if let Some(stream) = self.outputs.last_mut().filter(|_| self.last_is_for_messages) {
            let (words, listener) = LossNotice::new();
            (self.loss_notice, stream.listener) = (Some(words), Some(listener));
        }
        self
    }

    /// Starts to relay, with a thread for each stream.
    pub(crate) fn relay(self) -> Result<Relay> {
        let mut outputs = Vec::new();
        for stream in self.outputs {
            let (done, finished) = oneshot::channel();
            let Stream { local, remote, socket, listener, .. } = stream;
            let (flow, written) = Flow::new(remote);
            let flow = Arc::new(flow);
            let looked_at = Arc::downgrade(&flow);
            start("output", move || {
                copy_output(&flow, &local);
                if let Some(listener) = listener {
                    listener.write(&local);
                }
                if socket {
                    let _ = rustix::net::shutdown(&local, rustix::net::Shutdown::Write);
                }
                // Closed before anybody hears of the end.
                drop((flow, local));
                // Fails if nobody waits any more.
                let _ = done.send(());
            })?;
            outputs.push(Output { flow: looked_at, finished, written, ended_at: None, waited: 0 });
        }
        let mut terminal =
            self.terminal.then(|| outputs.last().map(|last| last.flow.clone())).flatten();
        let mut inputs = Vec::new();
        for Stream { local, remote, on_demand, client, .. } in self.inputs.into_iter().rev() {
            let shown = terminal.take().filter(|_| client || rustix::termios::isatty(&local));
            let remote = Arc::new(remote);
            inputs.push(Arc::downgrade(&remote));
            // Nobody waits for this thread. It ends when the guest's process has ended.
            start("input", move || {
                let wanted = !on_demand || is_wanted(&remote);
                if wanted && client {
                    // A client that is gone sends nothing anyway.
                    let _ = copy::want(&local);
                }
                if wanted
                    && copy_input(&local, &remote) == InputEnd::HungUp
                    && let Some(flow) = shown.and_then(|shown| shown.upgrade())
                {
                    // The guest hangs up its terminal in turn.
                    let _ = flow.remote.shutdown(Shutdown::Both);
                }
            })?;
        }
        Ok(Relay { inputs, outputs, loss_notice: self.loss_notice, next_look: None })
    }
}
