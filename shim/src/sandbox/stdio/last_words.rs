//! What an output says of its microVM when that was lost. An engine reads the log file of a runtime when
//! a command of it fails, and there is none then: who looks for why a container is gone looks at what it
//! has written.

use std::{
    os::fd::OwnedFd,
    sync::mpsc::{Receiver, Sender, channel},
    time::Duration,
};

use rustix::termios::{OutputModes, tcgetattr};

/// How long an output that has ended stays open if nobody says why it has: the connection to the guest
/// is gone before the process that knows. A container that closes its output and goes on closes it so
/// much later.
const LINGER: Duration = Duration::from_secs(1);

/// Where to say it, or that there is nothing to say.
#[derive(Debug)]
pub(super) struct LastWords(Sender<String>);

/// Who waits for it at the end of the output.
#[derive(Debug)]
pub(super) struct Listener(Receiver<String>);

impl LastWords {
    pub(super) fn new() -> (Self, Listener) {
        let (sender, receiver) = channel();
        (Self(sender), Listener(receiver))
    }

    /// Says it, in lines.
    pub(super) fn say(self, text: String) {
        // Nobody listens if nobody reads the output any more.
        let _ = self.0.send(text);
    }
}

impl Listener {
    /// Waits until it is known whether there is something to say, and writes it to `output`.
    pub(super) fn write(self, output: &OwnedFd) {
        let Ok(mut text) = self.0.recv_timeout(LINGER) else { return };
        let raw = |modes: OutputModes| !modes.contains(OutputModes::OPOST | OutputModes::ONLCR);
        if tcgetattr(output).is_ok_and(|terminal| raw(terminal.output_modes)) {
            // The guest's end is the one that turned lines into what a terminal takes.
            text = text.replace('\n', "\r\n");
        }
        let _ = super::copy::write_all(output, text.as_bytes());
    }
}
