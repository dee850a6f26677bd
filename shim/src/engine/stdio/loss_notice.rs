//! The loss notice: a line at the end of an output that says why the microVM is gone.
//!
//! An engine reads the log file of a runtime when a command fails, but no command fails when a
//! microVM is lost. A user who looks for the reason looks at the container's output.

use std::{
    os::fd::OwnedFd,
    sync::mpsc::{Receiver, Sender, channel},
    time::Duration,
};

use rustix::termios::{OutputModes, tcgetattr};

/// Longest time that an ended output waits for a loss notice. The connection to the guest is gone
/// before the sandbox process knows the reason.
///
/// An output that a running container closes is closed so much later.
const LINGER: Duration = Duration::from_secs(1);

/// The sender of a loss notice. Dropping it means that there is none.
#[derive(Debug)]
pub(crate) struct LossNotice(Sender<String>);

/// The receiver of a loss notice, at the end of an output.
#[derive(Debug)]
pub(crate) struct Listener(Receiver<String>);

impl LossNotice {
    pub(crate) fn new() -> (Self, Listener) {
        let (sender, receiver) = channel();
        (Self(sender), Listener(receiver))
    }

    /// Sends the notice, in lines.
    pub(crate) fn say(self, text: String) {
        // Nobody receives it if the reader of the output is gone.
        let _ = self.0.send(text);
    }
}

impl Listener {
    /// Waits until there is a notice, or there will be none, and writes the notice to `output`.
    pub(crate) fn write(self, output: &OwnedFd) {
        let Ok(mut text) = self.0.recv_timeout(LINGER) else { return };
        let raw = |modes: OutputModes| !modes.contains(OutputModes::OPOST | OutputModes::ONLCR);
        if tcgetattr(output).is_ok_and(|terminal| raw(terminal.output_modes)) {
            // The guest's terminal adds the carriage returns of the other output. For this line
            // they are added here.
            text = text.replace('\n', "\r\n");
        }
        let _ = crate::engine::stdio::copy::write_all(output, text.as_bytes());
    }
}
