//! The host's end of a port: sends a command and its input, and shows its output.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Write as _, stderr, stdin};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::command::{Ended, Input, Run, Show};
use super::machine::Machine;
use super::wire::{
    Kind, MAX_INPUT, NONCE_LEN, PORTS, await_answer, greeting, read_frame, write_frame,
};
use crate::progress::step;
use crate::repository;

/// Longest time for a boot of the lab. On an idle machine a boot takes about five seconds.
const BOOT_TIME: Duration = Duration::from_secs(180);

/// Longest time for the lab's answer to a greeting.
///
/// The lab first kills the command of an earlier caller.
const ANSWER_TIME: Duration = Duration::from_secs(120);

/// Time between two checks of QEMU during a boot.
const LOOK: Duration = Duration::from_millis(250);

/// Time between two looks at a lab whose command prints nothing.
const LOOK_FOR_LOSS: Duration = Duration::from_secs(60);

/// Errors after which the lab cannot be used any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lost {
    /// The lab does not answer a greeting.
    Silent,
    /// QEMU has ended.
    Ended,
    /// The virtiofsd of the share of this name has ended, so the lab's file systems hang.
    Share(&'static str),
    /// The lab cannot run a command, or cannot read a file.
    Hung,
}

impl std::error::Error for Lost {}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent => f.write_str("the lab does not answer"),
            Self::Ended => f.write_str("the lab ended while a command ran in it"),
            Self::Share(name) => write!(f, "virtiofsd ended, which the lab's {name} files need"),
            Self::Hung => f.write_str("the lab hangs: it cannot look for a file"),
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
///
/// `lost` is called every minute for as long as the command prints nothing.
pub(super) fn run(
    dir: &Path,
    run: &Run,
    input: Input,
    show: &mut Show<'_>,
    lost: &dyn Fn() -> Option<Lost>,
) -> Result<Ended> {
    let mut port = HostPort::take(dir).context(Lost::Silent)?;
    port.stream.set_read_timeout(Some(ANSWER_TIME)).context("cannot set a time limit")?;
    port.greet().context(Lost::Silent)?;
    // Of a frame that has begun; `await_output` waits for its beginning.
    port.stream.set_read_timeout(Some(ANSWER_TIME)).context("cannot set a time limit")?;
    write_frame(&mut port.stream, Kind::Start, &run.to_json()?).context(Lost::Ended)?;
    let mut writer = port.stream.try_clone().context("cannot duplicate a descriptor")?;
    match input {
        Input::Nothing => write_frame(&mut writer, Kind::Stdin, &[]).context(Lost::Ended)?,
        // Not joined: its read of standard input may never return.
        Input::Own => drop(thread::spawn(move || feed(&mut writer))),
    }
    let mut reader = io::BufReader::with_capacity(64 * 1024, &port.stream);
    loop {
        if reader.buffer().is_empty() {
            let limit = run.quiet_limit;
            // The lab kills the command when this function closes the connection.
            if !await_output(&port.stream, LOOK_FOR_LOSS, limit, lost)? {
                let limit = limit.unwrap_or_default().as_secs();
                return Ok(Ended::Refused(format!("it printed nothing for {limit} s")));
            }
        }
        let (kind, payload) = read_frame(&mut reader).context(Lost::Ended)?;
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

/// Returns whether the lab in `dir` is unable to run a command that looks for files.
///
/// The names are new, so none of the lab's caches answers for the shares.
pub(super) fn hangs(dir: &Path) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let work = repository::target().join(format!("no-file-{now}"));
    let script = format!("test ! -e /no-file-{now} && test ! -e \"$0\"");
    let argv = ["sh", "-c", &script, &work.to_string_lossy()].map(str::to_owned);
    let looked = Run::here(argv.to_vec()).and_then(|look| {
        let look = Run { cwd: "/".into(), quiet_limit: Some(LOOK_FOR_LOSS), ..look };
        run(dir, &look, Input::Nothing, &mut Show::Only(&mut Vec::new()), &|| None)
    });
    !matches!(looked, Ok(Ended::Status(0)))
}

/// Waits until there is something to read. Returns false if nothing comes within `limit`. Every
/// `pause`, `lost` is asked.
fn await_output(
    stream: &UnixStream,
    pause: Duration,
    limit: Option<Duration>,
    lost: &dyn Fn() -> Option<Lost>,
) -> Result<bool> {
    let began = Instant::now();
    let mut losses = 0;
    let pause = pause.min(limit.unwrap_or(pause));
    let pause = PollTimeout::try_from(pause).context("a pause is out of range")?;
    loop {
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, pause) {
            Ok(0) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => return Ok(true),
            Err(error) => return Err(error).context("cannot wait for the lab"),
        }
        let found = lost();
        // The look takes a while, and output may have come meanwhile.
        if poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
            return Ok(true);
        }
        match found {
            // A lab that is busy may fail one look.
            Some(Lost::Hung) if losses == 0 => losses += 1,
            Some(lost) => return Err(lost.into()),
            None => losses = 0,
        }
        if limit.is_some_and(|limit| began.elapsed() >= limit) {
            return Ok(false);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_that_is_lost_is_found_out_before_the_command_is_too_quiet() {
        let (here, mut there) = UnixStream::pair().expect("a pair of sockets");
        let pause = Duration::from_millis(1);
        let wait = |limit, lost: &dyn Fn() -> Option<Lost>| await_output(&here, pause, limit, lost);
        let none = Some(Duration::ZERO);
        assert!(!wait(none, &|| None).expect("a whole lab"));
        let share = || Some(Lost::Share("root"));
        let error = wait(none, &share).expect_err("a lost lab");
        assert_eq!(error.downcast_ref(), Some(&Lost::Share("root")));
        // A busy lab may fail one look.
        assert!(!wait(none, &|| Some(Lost::Hung)).expect("a busy lab"));
        let error = wait(None, &|| Some(Lost::Hung)).expect_err("a lost lab");
        assert_eq!(error.downcast_ref(), Some(&Lost::Hung));
        there.write_all(b"x").expect("a byte");
        assert!(wait(none, &share).expect("something to read"));
    }
}
