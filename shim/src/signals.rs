//! Signals for the container's process. A caller of runc sends them to the pid that it takes for
//! the container's, and a terminal sends them to its foreground command.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::{Explain, Result};

/// Signals that are not passed on, beside the two that cannot be handled. They are about this
/// process itself: ends of children, its own writes, sockets, memory accesses and instructions. The
/// others are stops by a terminal that this process shares with other commands.
const OWN: [i32; 12] = [
    libc::SIGCHLD,
    libc::SIGPIPE,
    libc::SIGURG,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGSEGV,
    libc::SIGSYS,
];

/// Signals that ask a process to end. Only these interrupt an operation that is under way.
const ENDING: [i32; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// `SIGWINCH`: the terminal has a new size.
pub(crate) const WINCH: u32 = 28;

/// `SIGKILL`.
pub(crate) const KILL: u32 = 9;

/// Signals to pass on, as they arrive. While this exists they do nothing else.
#[derive(Debug)]
pub struct Signals(Vec<(u32, Signal)>);

impl Signals {
    /// Takes over the handling of the signals that are passed on.
    pub fn new() -> Result<Self> {
        passed_on()
            .map(|number| Ok((number.cast_unsigned(), signal(SignalKind::from_raw(number))?)))
            .collect::<std::io::Result<_>>()
            .map(Self)
            .explain(|| "cannot handle signals".into())
    }

    /// Number of the next signal.
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

    /// Number of the next signal that asks this process to end.
    pub async fn next_ending(&mut self) -> u32 {
        loop {
            let number = self.next().await;
            if is_ending(number) {
                return number;
            }
        }
    }
}

/// Tells whether a signal asks a process to end.
pub(crate) fn is_ending(number: u32) -> bool {
    ENDING.contains(&number.cast_signed())
}

/// Makes this process, and the program that it becomes, ignore the signals that [`Signals`] passes
/// on. For use between `fork` and `execve`: makes system calls and no more.
pub(crate) fn ignore() -> std::io::Result<()> {
    for number in passed_on() {
        // SAFETY: SIG_IGN is a disposition for every signal that can be handled. This process loses
        // no handler that would run before the next `execve`.
        if unsafe { libc::signal(number, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Numbers of all signals that are passed on. The C library keeps those between the last standard
/// signal and the first real-time signal.
fn passed_on() -> impl Iterator<Item = i32> {
    let standard = (1..=libc::SIGSYS).filter(|number| {
        !OWN.contains(number) && !matches!(*number, libc::SIGKILL | libc::SIGSTOP)
    });
    standard.chain(libc::SIGRTMIN()..=libc::SIGRTMAX())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_that_is_not_this_processs_own_arrives() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut signals = Signals::new().unwrap();
            for number in [libc::SIGALRM, libc::SIGPWR, libc::SIGABRT, libc::SIGRTMIN(), 64] {
                // SAFETY: the signal is handled.
                assert_eq!(unsafe { libc::raise(number) }, 0);
                assert_eq!(signals.next().await, number.cast_unsigned());
            }
            for number in [libc::SIGUSR1, libc::SIGHUP] {
                // SAFETY: as above.
                assert_eq!(unsafe { libc::raise(number) }, 0);
            }
            assert_eq!(signals.next_ending().await, libc::SIGHUP.cast_unsigned());
        });
    }
}
