//! The signals that a caller of runc may send to the pid that it takes for the container's, or a
//! terminal to the command in its foreground. All of them are meant for the container's process.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::{Explain, Result};

const USR1: u32 = 10;
const USR2: u32 = 12;

/// `SIGWINCH`: the terminal has a new size.
pub(crate) const WINCH: u32 = 28;

/// `SIGKILL`.
pub(super) const KILL: u32 = 9;

/// Signals that are passed on, as they arrive. While this exists they do nothing else.
#[derive(Debug)]
pub struct Signals(Vec<(u32, Signal)>);

impl Signals {
    /// Takes over their handling.
    ///
    /// # Errors
    ///
    /// If that is not possible.
    pub fn new() -> Result<Self> {
        let kinds = [
            SignalKind::hangup(),
            SignalKind::interrupt(),
            SignalKind::quit(),
            SignalKind::terminate(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
            SignalKind::from_raw(WINCH.cast_signed()),
        ];
        kinds
            .into_iter()
            .map(|kind| Ok((kind.as_raw_value().cast_unsigned(), signal(kind)?)))
            .collect::<std::io::Result<_>>()
            .map(Self)
            .explain(|| "cannot handle signals".into())
    }

    /// The next signal's number.
    pub async fn next(&mut self) -> u32 {
        std::future::poll_fn(|context| {
            for (number, signal) in &mut self.0 {
                if let std::task::Poll::Ready(Some(())) = signal.poll_recv(context) {
                    return std::task::Poll::Ready(*number);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }

    /// The next signal that asks this process to end.
    pub async fn next_ending(&mut self) -> u32 {
        loop {
            let number = self.next().await;
            if !matches!(number, WINCH | USR1 | USR2) {
                return number;
            }
        }
    }
}
