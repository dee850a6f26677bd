//! Running relays, and the wait for their end.

use std::{
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Weak, atomic::Ordering},
    thread,
    time::Duration,
};

use tokio::{
    sync::{oneshot, watch},
    time::{Instant, sleep_until, timeout_at},
};

use crate::{
    engine::stdio::{copy::Flow, loss_notice::LossNotice},
    error::{Explain, Result},
};

/// Further time for a guest to send the output of a process that has ended. The agent has all of
/// the output by then, and ends the stream behind it.
const PATIENCE: Patience = Patience { interval: Duration::from_secs(1), intervals: 30 };

/// Time in which the readers of a killed process take nothing of its output: then the rest is
/// dropped, as a kill drops what a process has not written yet.
const READERS_PATIENCE: Duration = Duration::from_secs(5);

/// Longest wait, measured in looks: one for each interval.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub(crate) interval: Duration,
    pub(crate) intervals: u32,
}

/// An output that is relayed.
#[derive(Debug)]
pub(crate) struct Output {
    /// The output's bytes on their way. The thread owns them, and closes the connection at its end.
    pub(crate) flow: Weak<Flow>,
    pub(crate) finished: oneshot::Receiver<()>,
    /// Bytes that have been written to the local descriptor.
    pub(crate) written: watch::Receiver<u64>,
    /// Bytes received by the time that the process was known to have ended.
    pub(crate) ended_at: Option<u64>,
    /// Number of looks since then at which the thread was waiting for the guest.
    pub(crate) waited: u32,
}

impl Output {
    /// Ends the stream if the guest takes too long, or sends more than it can have had. Time
    /// without a local reader does not count against the guest.
    fn look(&mut self, most: u64, patience: Patience) {
        let Some(flow) = self.flow.upgrade() else { return };
        let received = flow.received.load(Ordering::Relaxed);
        let ended_at = *self.ended_at.get_or_insert(received);
        self.waited += u32::from(flow.waiting.load(Ordering::Relaxed));
        if self.waited > patience.intervals || received - ended_at > most {
            log::warn!("the guest does not end the output of a process that has ended: cut off");
            // Bytes that have been received already can still be read.
            let _ = flow.remote.shutdown(Shutdown::Both);
        }
    }
}

/// The readers of a process's output, and how much they have taken.
#[derive(Debug)]
pub(crate) struct Readers {
    outputs: Vec<(Weak<Flow>, watch::Receiver<u64>)>,
    patience: Duration,
    /// Bytes taken by the last look, and the time of the next.
    taken: u64,
    next_look: Option<Instant>,
}

impl Readers {
    /// Waits until output has waited for a reader for some seconds, while nothing was taken. Never
    /// ends if no output waits for a reader. A cancelled wait goes on when it is repeated.
    pub(crate) async fn stopped_reading(&mut self) {
        loop {
            let first = self.next_look.is_none();
            if let Some(look) = self.next_look {
                sleep_until(look).await;
            }
            let taken = self.outputs.iter().map(|(_, written)| *written.borrow()).sum();
            if !first && taken == self.taken && self.has_output() {
                log::warn!("output of a killed process is dropped: nobody reads it");
                return;
            }
            self.taken = taken;
            self.next_look = Some(Instant::now() + self.patience);
        }
    }

    /// Tells if output has been received that is not taken yet.
    fn has_output(&self) -> bool {
        self.outputs.iter().any(|(flow, written)| {
            let received = flow.upgrade().map(|flow| flow.received.load(Ordering::Relaxed));
            received.is_some_and(|received| received > *written.borrow())
        })
    }
}

/// Running relays.
#[derive(Debug, Default)]
pub(crate) struct Relay {
    /// Connections of the inputs. The threads own them, and close them at the end.
    pub(crate) inputs: Vec<Weak<UnixStream>>,
    pub(crate) outputs: Vec<Output>,
    pub(crate) loss_notice: Option<LossNotice>,
    pub(crate) next_look: Option<Instant>,
}

impl Relay {
    /// Ends the inputs, whatever the guest does: nothing more is read from the local descriptors,
    /// which others read too.
    pub(crate) fn end_inputs(&mut self) {
        for input in self.inputs.drain(..).filter_map(|input| input.upgrade()) {
            // It may be closed already.
            let _ = input.shutdown(Shutdown::Both);
        }
    }

    /// Ends all streams of a process that nobody waits for any more.
    pub(crate) fn cut_off(&mut self) {
        self.end_inputs();
        for flow in self.outputs.iter().filter_map(|output| output.flow.upgrade()) {
            let _ = flow.remote.shutdown(Shutdown::Both);
        }
    }

    /// The readers of the outputs.
    pub(crate) fn readers(&self) -> Readers {
        self.readers_with(READERS_PATIENCE)
    }

    pub(crate) fn readers_with(&self, patience: Duration) -> Readers {
        let watched = |output: &Output| (output.flow.clone(), output.written.clone());
        let outputs = self.outputs.iter().map(watched).collect();
        Readers { outputs, patience, taken: 0, next_look: None }
    }

    /// Notes that the process has ended: then there is no loss notice.
    pub(crate) fn process_ended(&mut self) {
        self.loss_notice = None;
    }

    /// Sends the loss notice, to be written after all output that has arrived.
    pub(crate) fn say(&mut self, text: String) {
        if let Some(words) = self.loss_notice.take() {
            words.say(text);
        }
    }

    /// Waits until all output of a process that has ended has been written. Readers may take as
    /// long as they like, the guest half a minute at most.
    ///
    /// The guest cannot have kept more than `most` bytes, the size of its memory. A cancelled wait
    /// can be repeated.
    pub(crate) async fn finished(&mut self, most: u64) {
        self.finished_within(most, PATIENCE).await;
    }

    /// Waits until all output has ended, however long this takes. A cancelled wait can be repeated.
    pub(crate) async fn outputs_ended(&mut self) {
        while let Some(output) = self.outputs.last_mut() {
            let _ = (&mut output.finished).await;
            self.outputs.pop();
        }
    }

    /// Waits until each output has been written up to its mark, or has ended. The guest and the
    /// readers have as long as in [`Self::finished`]. An output without a mark has to end.
    pub(crate) async fn written(&mut self, marks: &[u64], most: u64) {
        self.written_within(marks, most, PATIENCE).await;
    }

    pub(crate) async fn written_within(&mut self, marks: &[u64], most: u64, patience: Patience) {
        let mut marks = marks.iter().copied();
        for output in &mut self.outputs {
            let mark = marks.next().unwrap_or(u64::MAX);
            loop {
                let limit = Instant::now() + patience.interval;
                // An error means that the output has ended.
                if timeout_at(limit, output.written.wait_for(|written| *written >= mark))
                    .await
                    .is_ok()
                {
                    break;
                }
                output.look(most, patience);
            }
        }
    }

    pub(crate) async fn finished_within(&mut self, most: u64, patience: Patience) {
        while let Some(output) = self.outputs.last_mut() {
            let look = *self.next_look.get_or_insert_with(|| Instant::now() + patience.interval);
            // An error means that the thread is gone, so the output is finished too.
            if timeout_at(look, &mut output.finished).await.is_ok() {
                self.outputs.pop();
                continue;
            }
            self.next_look = None;
            for output in &mut self.outputs {
                output.look(most, patience);
            }
        }
    }
}

pub(crate) fn start(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(64 * 1024)
        .spawn(body)
        .map(drop)
        .explain(|| format!("cannot start the thread for {name}"))
}
