//! What goes on beside unpacking: signals that end it, and a line for who waits.

use std::{
    cell::Cell,
    io::{self, IsTerminal, Read, Write},
    sync::atomic::{AtomicI32, Ordering},
    time::{Duration, Instant},
};

use crate::error::{Error, Result};

/// Nobody needs to be told before this long.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often the line is written again.
const INTERVAL: Duration = Duration::from_millis(500);

/// The signal that asks for the end, or 0.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

/// The number of the signal that has ended an unpacking, if one has.
pub fn interrupted_by() -> Option<u8> {
    u8::try_from(CAUGHT.load(Ordering::Relaxed)).ok().filter(|signal| *signal != 0)
}

/// Sees to signals and progress.
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

    /// A layer begins: its index, how many there are, and its size in bytes.
    pub(super) fn layer(&self, index: usize, count: usize, size: u64) {
        self.layer.set(index + 1);
        self.layers.set(count);
        self.size.set(size);
        self.read.set(0);
    }

    /// To be called often.
    ///
    /// # Errors
    ///
    /// A signal has asked for the end.
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

    /// Counts what is read from a layer's blob.
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

/// A reader whose bytes are counted.
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
    // Nobody is there to be told, then.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Has the usual signals end an unpacking instead of the process, until that ends.
pub(super) fn catch_signals() -> Result<()> {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM] {
        catch(signal).map_err(|e| Error::because("cannot catch signals", e))?;
    }
    Ok(())
}

/// Takes note of `signal` unless it is ignored, as nohup(1) has it.
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
    // What waits for data in a system call is woken and looks.
    new.sa_flags = 0;
    // SAFETY: `new` is initialised; the handler only stores to an atomic, which is safe at any
    // moment, and lives as long as the program.
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
