//! The host's end of a port: hands a command over, feeds it and shows its output.

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

use super::machine::Machine;
use super::wire::{Kind, MAX_INPUT, NONCE_LEN, await_answer, greeting, read_frame, write_frame};
use super::{PORTS, Run};
use crate::progress::say;
use crate::timed::Timed;

/// How long a lab may take to boot. On an idle machine it takes some five seconds.
const BOOT_TIME: Duration = Duration::from_secs(180);

/// How long a lab may take to answer a caller: it ends an earlier caller's command first.
const ANSWER_TIME: Duration = Duration::from_secs(120);

/// How long to wait before looking again whether the lab's machine still lives.
const LOOK: Duration = Duration::from_millis(250);

/// Where a command's standard input comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    /// There is none.
    Nothing,
    /// This process's own.
    Own,
}

/// Where a command's standard output goes.
#[derive(Debug)]
pub(crate) enum Show<'a> {
    /// To this process's own.
    Through,
    /// To this process's own, and here too.
    Also(&'a mut Vec<u8>),
    /// Here only.
    Only(&'a mut Vec<u8>),
    /// Here, and to this process's own line by line.
    Timed(&'a mut Timed),
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With an exit status as a shell gives it: 128 and the signal if one killed it.
    Status(i32),
    /// It could not be started: why.
    Refused(String),
}

impl Ended {
    /// The exit status that a shell would give.
    pub(crate) fn status(&self) -> i32 {
        match self {
            Self::Status(status) => *status,
            Self::Refused(_) => 127,
        }
    }
}

/// What an error is about after which the lab is of no more use.
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

/// A port that is ours until it is dropped.
struct Port {
    stream: UnixStream,
    _lock: Flock<File>,
}

impl Port {
    /// Takes a free port of the lab in `dir`; waits for one when all are in use.
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
        say(format!("the lab runs {PORTS} commands already; waiting for one of them"));
        let lock = Flock::lock(open(0)?, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .context("cannot lock a port of the lab")?;
        Self::connect(dir, 0, lock)
    }

    fn connect(dir: &Path, number: usize, lock: Flock<File>) -> Result<Self> {
        let at = File::open(dir).with_context(|| format!("cannot open {}", dir.display()))?;
        let path = format!("/proc/self/fd/{}/port{number}.sock", at.as_raw_fd());
        let stream = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to {}/port{number}.sock", dir.display()))?;
        Ok(Self { stream, _lock: lock })
    }

    /// Finds common ground with the lab's end.
    fn greet(&mut self) -> io::Result<()> {
        let mut nonce = [0; NONCE_LEN];
        File::open("/dev/urandom")?.read_exact(&mut nonce)?;
        self.stream.write_all(&greeting(&nonce))?;
        await_answer(&mut self.stream, &nonce)
    }
}

/// Waits until the lab in `dir` answers.
pub(super) fn await_boot(dir: &Path, machine: &mut Machine) -> Result<()> {
    let began = Instant::now();
    let mut port = Port::take(dir)?;
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
        // Ends the other thread if it still waits.
        let _ = waiting.shutdown(std::net::Shutdown::Both);
        outcome
    })
}

fn still_booting(machine: &mut Machine, began: Instant) -> Result<()> {
    if let Some(status) = machine.ended()? {
        bail!("the lab did not boot: QEMU ended ({status}){}", machine.last_words());
    }
    if began.elapsed() > BOOT_TIME {
        let limit = BOOT_TIME.as_secs();
        bail!("the lab did not boot within {limit} s{}", machine.last_words());
    }
    Ok(())
}

/// Runs a command in the lab in `dir`, with its standard error on this process's own.
pub(super) fn run(dir: &Path, run: &Run, input: Input, show: &mut Show<'_>) -> Result<Ended> {
    let mut port = Port::take(dir).context(Lost::Silent)?;
    port.stream.set_read_timeout(Some(ANSWER_TIME)).context("cannot set a time limit")?;
    port.greet().context(Lost::Silent)?;
    port.stream.set_read_timeout(run.quiet_limit).context("cannot set a time limit")?;
    write_frame(&mut port.stream, Kind::Start, &run.to_json()?).context(Lost::Ended)?;
    let mut writer = port.stream.try_clone().context("cannot duplicate a descriptor")?;
    match input {
        Input::Nothing => write_frame(&mut writer, Kind::Stdin, &[]).context(Lost::Ended)?,
        // It may wait for input for ever, so nobody waits for it.
        Input::Own => drop(thread::spawn(move || feed(&mut writer))),
    }
    let mut reader = io::BufReader::with_capacity(64 * 1024, &port.stream);
    loop {
        let (kind, payload) = match read_frame(&mut reader) {
            Ok(frame) => frame,
            // Leaving ends the command.
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

fn feed(port: &mut UnixStream) -> io::Result<()> {
    let mut chunk = [0; MAX_INPUT];
    loop {
        // Nothing read is the end of input, which an empty frame stands for.
        let length = stdin().lock().read(&mut chunk)?;
        write_frame(port, Kind::Stdin, &chunk[..length])?;
        if length == 0 {
            return Ok(());
        }
    }
}
