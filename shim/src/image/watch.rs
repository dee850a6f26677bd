//! Signals and progress while an image is unpacked.

use std::{
    cell::Cell,
    io::{self, IsTerminal, Read, Write},
    sync::atomic::{AtomicI32, Ordering},
    time::{Duration, Instant},
};

use crate::error::{Error, Result};

/// Time before the first progress line.
const PATIENCE: Duration = Duration::from_secs(10);

/// Time between two progress lines.
const INTERVAL: Duration = Duration::from_millis(500);

/// The signal that has asked for the end, or 0.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

/// The number of the signal that has ended an unpacking, if one has.
pub fn interrupted_by() -> Option<u8> {
    u8::try_from(CAUGHT.load(Ordering::Relaxed)).ok().filter(|signal| *signal != 0)
}

/// Watches signals, and shows progress.
#[derive(Debug)]
pub(super) struct Watch {
    began: Instant,
    shown: Cell<Option<Instant>>,
    terminal: bool,
    layer: Cell<usize>,
    layers: Cell<usize>,
    size: Cell<u64>,
    read: Cell<u64>,
}

impl Watch {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            shown: Cell::default(),
            terminal: io::stderr().is_terminal(),
            layer: Cell::default(),
            layers: Cell::default(),
            size: Cell::default(),
            read: Cell::default(),
        }
    }

    /// Begins a layer, of this index among `count`, with its size in bytes.
    pub(super) fn layer(&self, index: usize, count: usize, size: u64) {
        self.layer.set(index + 1);
        self.layers.set(count);
        self.size.set(size);
        self.read.set(0);
    }

    /// Shows progress from time to time, and fails after a signal. To be called often.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(signal) = interrupted_by() {
            return Err(Error::new(format!("ended by signal {signal}")));
        }
        if self.terminal && self.began.elapsed() >= PATIENCE {
            let due = self.shown.get().is_none_or(|shown| shown.elapsed() >= INTERVAL);
            if due {
                self.shown.set(Some(Instant::now()));
                show(&self.line());
            }
        }
        Ok(())
    }

    fn line(&self) -> String {
        let mib = |bytes: u64| bytes >> 20;
        format!(
            "\runpacking layer {} of {}, {} of {} MiB, {} s\x1b[K",
            self.layer.get(),
            self.layers.get(),
            mib(self.read.get()),
            mib(self.size.get()),
            self.began.elapsed().as_secs()
        )
    }

    /// A reader that counts the bytes of a layer's blob.
    pub(super) fn counted<R: Read>(&self, source: R) -> Counted<'_, R> {
        Counted { watch: self, source }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.shown.get().is_some() {
            show("\r\x1b[K");
        }
    }
}

/// A reader that counts its bytes.
#[derive(Debug)]
pub(super) struct Counted<'a, R> {
    watch: &'a Watch,
    source: R,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.watch.check().map_err(io::Error::other)?;
        let n = self.source.read(buffer)?;
        self.watch.read.set(self.watch.read.get() + n as u64);
        Ok(n)
    }
}

fn show(text: &str) {
    // If standard error takes nothing, nobody waits for the line.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Makes SIGHUP, SIGINT and SIGTERM end an unpacking, and not the process itself.
pub(super) fn catch_signals() -> Result<()> {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM] {
        catch(signal).map_err(|e| Error::because("cannot catch signals", e))?;
    }
    Ok(())
}

/// Records `signal` when it comes. An ignored signal stays ignored, as nohup(1) has it.
fn catch(signal: i32) -> io::Result<()> {
    extern "C" fn note(signal: i32) {
        CAUGHT.store(signal, Ordering::Relaxed);
    }
    // SAFETY: all zero bytes are a value of this plain struct of numbers.
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: null means that nothing is changed; `old` is live and of the right type.
    if unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut old) } < 0 {
        return Err(io::Error::last_os_error());
    }
    if old.sa_sigaction == libc::SIG_IGN {
        return Ok(());
    }
    let mut new = old;
    new.sa_sigaction = note as extern "C" fn(i32) as libc::sighandler_t;
    // Without SA_RESTART a system call that waits for data ends, and its caller sees the signal.
    new.sa_flags = 0;
    // SAFETY: `new` is initialised. The handler lives as long as the program, and only stores to an
    // atomic, which is safe at any moment.
    if unsafe { libc::sigaction(signal, &raw const new, std::ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_how_far_it_is() {
        let watch = Watch::new();
        watch.layer(1, 3, 10 << 20);
        let mut blob = watch.counted(io::repeat(0).take(5 << 20));
        io::copy(&mut blob, &mut io::sink()).unwrap();
        assert!(watch.line().contains("layer 2 of 3, 5 of 10 MiB, 0 s"), "{:?}", watch.line());
    }
}
