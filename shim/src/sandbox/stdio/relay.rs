//! The end of running relays, as those who wait for it see it.

use std::{
    net::Shutdown,
    sync::{Weak, atomic::Ordering},
    thread,
    time::Duration,
};

use tokio::{
    sync::{oneshot, watch},
    time::{Instant, timeout_at},
};

use super::{copy::Flow, last_words::LastWords};
use crate::error::{Explain, Result};

/// Further time of a guest for the output of a process that has ended. The agent has all of it, and ends
/// the stream behind it.
const PATIENCE: Patience = Patience { interval: Duration::from_secs(1), intervals: 30 };

/// Most time to wait for somebody, as far as it is noticed: by a look each interval.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    pub(super) interval: Duration,
    pub(super) intervals: u32,
}

/// An output that is relayed.
#[derive(Debug)]
pub(super) struct Output {
    /// The thread has it, and closes it at its end.
    pub(super) flow: Weak<Flow>,
    pub(super) finished: oneshot::Receiver<()>,
    /// Bytes that have been written here.
    pub(super) written: watch::Receiver<u64>,
    /// Bytes sent by the time that its process was known to have ended.
    pub(super) ended_at: Option<u64>,
    /// In how many looks since then the guest was waited for.
    pub(super) waited: u32,
}

impl Output {
    /// Ends the stream if the guest takes too long, or sends more than it can have had. Time in which
    /// nobody reads here is not the guest's.
    fn look(&mut self, most: u64, patience: Patience) {
        let Some(flow) = self.flow.upgrade() else { return };
        let received = flow.received.load(Ordering::Relaxed);
        let ended_at = *self.ended_at.get_or_insert(received);
        self.waited += u32::from(flow.waiting.load(Ordering::Relaxed));
        if self.waited > patience.intervals || received - ended_at > most {
            log::warn!("the guest does not end the output of a process that has ended: cut off");
            // Bytes already received can still be read.
            let _ = flow.remote.shutdown(Shutdown::Both);
        }
    }
}

/// Running relays.
#[derive(Debug, Default)]
pub struct Relay {
    pub(super) inputs: Vec<oneshot::Receiver<()>>,
    pub(super) outputs: Vec<Output>,
    pub(super) last_words: Option<LastWords>,
    pub(super) next_look: Option<Instant>,
}

impl Relay {
    /// The process has ended: nothing is to be said of that.
    pub fn process_ended(&mut self) {
        self.last_words = None;
    }

    /// Says why there is no more output, if nobody else does, once all that has come is written.
    pub fn say(&mut self, text: String) {
        if let Some(words) = self.last_words.take() {
            words.say(text);
        }
    }

    /// Waits until all output of a process that has ended has been written, for as long as it takes
    /// whoever reads it, and at most half a minute for the guest. That cannot have kept more than
    /// `most` bytes, the size of its memory. Can be waited for again if cancelled.
    pub async fn finished(&mut self, most: u64) {
        self.finished_within(most, PATIENCE).await;
    }

    /// Waits until all output has ended, however long that takes. Can be waited for again if cancelled.
    pub async fn outputs_ended(&mut self) {
        while let Some(output) = self.outputs.last_mut() {
            let _ = (&mut output.finished).await;
            self.outputs.pop();
        }
    }

    /// As [`Self::outputs_ended`], for all input as well.
    pub(super) async fn all_ended(&mut self) {
        self.outputs_ended().await;
        while let Some(input) = self.inputs.last_mut() {
            let _ = input.await;
            self.inputs.pop();
        }
    }

    /// Waits until as much of each output has been written as `marks` say, or has ended. The guest and
    /// readers have as long as in [`Self::finished`]. An output without a mark has to end.
    pub(super) async fn written(&mut self, marks: &[u64], most: u64) {
        self.written_within(marks, most, PATIENCE).await;
    }

    pub(super) async fn written_within(&mut self, marks: &[u64], most: u64, patience: Patience) {
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

    pub(super) async fn finished_within(&mut self, most: u64, patience: Patience) {
        while let Some(output) = self.outputs.last_mut() {
            let look = *self.next_look.get_or_insert_with(|| Instant::now() + patience.interval);
            // An error means that the thread is gone, which is as finished as can be.
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

pub(super) fn start(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(64 * 1024)
        .spawn(body)
        .map(drop)
        .explain(|| format!("cannot start the thread for {name}"))
}
