//! The host's end of a port: sends a command and its input, and shows its output.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Write as _, stderr, stdin};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use super::command::{Ended, Input, Run, Show};
use super::machine::Machine;
use super::wire::{
    Kind, MAX_INPUT, NONCE_LEN, PORTS, await_answer, greeting, read_frame, write_frame,
};
use crate::progress::step;

/// Longest time for a boot of the lab. On an idle machine a boot takes about five seconds.
const BOOT_TIME: Duration = Duration::from_secs(180);

/// Longest time for the lab's answer to a greeting.
///
/// The lab first kills the command of an earlier caller.
const ANSWER_TIME: Duration = Duration::from_secs(120);

/// Time between two checks of QEMU during a boot.
const LOOK: Duration = Duration::from_millis(250);

/// Errors after which the lab cannot be used any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lost {
    Silent,
    Ended,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent => f.write_str("the lab does not answer"),
            Self::Ended => f.write_str("the lab ended while a command ran in it"),
        }
    }
}

/// An exclusive connection to a port.
struct HostPort {
    stream: UnixStream,
    _lock: Flock<File>,
}

impl HostPort {
    /// Takes a free port of the lab in `dir`. Waits for the first port if all are in use.
    fn take(dir: &Path) -> Result<Self> {
        let open = |number: usize| {
            let path = dir.join(format!("port{number}.lock"));
            File::create(&path).with_context(|| format!("cannot create {}", path.display()))
        };
        for number in 0..PORTS {
            match Flock::lock(open(number)?, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Self::connect(dir, number, lock),
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => {}
                Err((_, error)) => return Err(error).context("cannot lock a port of the lab"),
            }
        }
        let lock = open(0)?;
        let lock =
            step(&format!("wait for one of the {PORTS} commands that run in the lab"), || {
                Flock::lock(lock, FlockArg::LockExclusive)
                    .map_err(|(_, error)| error)
                    .context("cannot lock a port of the lab")
            })?;
        Self::connect(dir, 0, lock)
    }

    fn connect(dir: &Path, number: usize, lock: Flock<File>) -> Result<Self> {
        let at = File::open(dir).with_context(|| format!("cannot open {}", dir.display()))?;
        let path = format!("/proc/self/fd/{}/port{number}.sock", at.as_raw_fd());
        let stream = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to {}/port{number}.sock", dir.display()))?;
        Ok(Self { stream, _lock: lock })
    }

    /// Synchronises with the lab; see [`super::wire`].
    fn greet(&mut self) -> io::Result<()> {
        let mut nonce = [0; NONCE_LEN];
        File::open("/dev/urandom")?.read_exact(&mut nonce)?;
        self.stream.write_all(&greeting(&nonce))?;
        await_answer(&mut self.stream, &nonce)
    }
}

/// Waits until the booting lab in `dir` answers.
pub(super) fn await_boot(dir: &Path, machine: &mut Machine) -> Result<()> {
    let began = Instant::now();
    let mut port = HostPort::take(dir)?;
    let (answered, answer) = std::sync::mpsc::channel();
    let waiting = port.stream.try_clone().context("cannot duplicate a descriptor")?;
    thread::scope(|scope| {
        scope.spawn(move || answered.send(port.greet()));
        let outcome = loop {
            match answer.recv_timeout(LOOK) {
                Ok(greeted) => break greeted.context("the lab does not answer"),
                Err(_) => {
                    if let Err(error) = still_booting(machine, began) {
                        break Err(error);
                    }
                }
            }
        };
        // Ends the read of the other thread, which the scope waits for.
        let _ = waiting.shutdown(std::net::Shutdown::Both);
        outcome
    })
}

/// Fails if QEMU has ended or [`BOOT_TIME`] is over.
fn still_booting(machine: &mut Machine, began: Instant) -> Result<()> {
    if let Some(status) = machine.ended()? {
        bail!("the lab did not boot: QEMU ended ({status}){}", machine.last_lines());
    }
    if began.elapsed() > BOOT_TIME {
        let limit = BOOT_TIME.as_secs();
        bail!("the lab did not boot within {limit} s{}", machine.last_lines());
    }
    Ok(())
}

/// Runs a command in the lab in `dir`. Its standard error goes to this process's own.
pub(super) fn run(dir: &Path, run: &Run, input: Input, show: &mut Show<'_>) -> Result<Ended> {
    let mut port = HostPort::take(dir).context(Lost::Silent)?;
    port.stream.set_read_timeout(Some(ANSWER_TIME)).context("cannot set a time limit")?;
    port.greet().context(Lost::Silent)?;
    port.stream.set_read_timeout(run.quiet_limit).context("cannot set a time limit")?;
    write_frame(&mut port.stream, Kind::Start, &run.to_json()?).context(Lost::Ended)?;
    let mut writer = port.stream.try_clone().context("cannot duplicate a descriptor")?;
    match input {
        Input::Nothing => write_frame(&mut writer, Kind::Stdin, &[]).context(Lost::Ended)?,
        // Not joined: its read of standard input may never return.
        Input::Own => drop(thread::spawn(move || feed(&mut writer))),
    }
    let mut reader = io::BufReader::with_capacity(64 * 1024, &port.stream);
    loop {
        let (kind, payload) = match read_frame(&mut reader) {
            Ok(frame) => frame,
            // The lab kills the command when this function closes the connection.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let limit = run.quiet_limit.unwrap_or_default().as_secs();
                return Ok(Ended::Refused(format!("it printed nothing for {limit} s")));
            }
            Err(error) => return Err(error).context(Lost::Ended),
        };
        let shown = match kind {
            Kind::Stdout => show.stdout(&payload),
            Kind::Stderr => stderr().write_all(&payload),
            Kind::Exit => {
                let status = payload.first_chunk().context("the lab sent a broken frame")?;
                return Ok(Ended::Status(i32::from_le_bytes(*status)));
            }
            Kind::Refused => {
                return Ok(Ended::Refused(String::from_utf8_lossy(&payload).into_owned()));
            }
            Kind::Pad | Kind::Start | Kind::Stdin => bail!("the lab sent a broken frame"),
        };
        shown.context("cannot write the command's output")?;
    }
}

/// Sends this process's standard input.
fn feed(port: &mut UnixStream) -> io::Result<()> {
    let mut chunk = [0; MAX_INPUT];
    loop {
        // A read of 0 bytes is the end of input, and so is an empty frame.
        let length = stdin().lock().read(&mut chunk)?;
        write_frame(port, Kind::Stdin, &chunk[..length])?;
        if length == 0 {
            return Ok(());
        }
    }
}
