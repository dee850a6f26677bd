//! Streams and terminals.

use std::io::{self, Read, Write};

use isopod_tests::pattern::{Pattern, compare};
use nix::pty::Winsize;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;

nix::ioctl_read_bad!(get_window_size, libc::TIOCGWINSZ, Winsize);

/// Writes `len` bytes of pattern 1 to standard output, and checks that standard input is `len`
/// bytes of pattern 2. Reports the outcome on standard error. Both streams are served at once,
/// because the other end does the same.
pub(crate) fn duplex(len: u64) {
    let writer = std::thread::spawn(move || {
        let mut stdout = io::stdout().lock();
        let copied = io::copy(&mut Pattern::new(1, len), &mut stdout).expect("standard output");
        stdout.flush().expect("standard output");
        copied
    });
    let input = compare(Pattern::new(2, len), io::stdin().lock());
    let written = writer.join().expect("the writer");
    match input {
        Ok(()) => eprintln!("wrote {written}, read {len} as sent"),
        Err(e) => eprintln!("wrote {written}, but input: {e}"),
    }
}

/// Prints the terminal's size at first and after every change, until a line comes in.
pub(crate) fn window() {
    let mut winch = SigSet::empty();
    winch.add(Signal::SIGWINCH);
    // Blocked first, so that no change falls between the first look and the wait.
    winch.thread_block().expect("sigprocmask");
    let signals = SignalFd::new(&winch).expect("signalfd");
    std::thread::spawn(move || {
        loop {
            print_size();
            let _ = signals.read_signal();
        }
    });
    let _ = io::stdin().read(&mut [0; 16]);
    println!("bye");
}

fn print_size() {
    let mut size = Winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one `winsize`, and `size` is one.
    match unsafe { get_window_size(0, &raw mut size) } {
        Ok(_) => println!("size {}x{}", size.ws_col, size.ws_row),
        Err(e) => println!("no size: {e}"),
    }
}
