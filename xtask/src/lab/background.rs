//! The background lab: `lab up` starts a process that holds it until `lab down`.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _, stdout};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use super::boot::{OWN_PROGRAM, directory, shelf};
use super::{Ended, Input, Lab, LabOptions, Run, Show, client};
use crate::progress::{say, short_step, step};

/// Name of the background lab.
const NAME: &str = "up";

/// Line that the holder of the background lab prints when the lab has booted.
const READY: &str = "ready";

/// Log file of the holder of the background lab.
fn log() -> PathBuf {
    shelf().join("up.log")
}

/// Boots the background lab unless it runs.
pub(crate) fn up(options: &LabOptions) -> Result<()> {
    if let Some(pid) = holder()? {
        say(format!("the lab runs already (process {pid})"));
        return Ok(());
    }
    fs::create_dir_all(shelf()).context("cannot create the lab's directory")?;
    let messages = log();
    let messages_file =
        File::create(&messages).with_context(|| format!("cannot write {}", messages.display()))?;
    let mut command = Command::new(OWN_PROGRAM);
    command.args(["lab", "hold", "--cpus", &options.cpus.to_string()]);
    command.args(["--memory", &options.memory_mib.to_string()]);
    if options.count {
        command.arg("--count");
    }
    // In its own session, so that the end of this terminal's session does not end the lab.
    let new_session = || nix::unistd::setsid().map(drop).map_err(std::io::Error::from);
    // SAFETY: between fork and exec the closure makes one system call (setsid), which is
    // async-signal-safe, and touches no memory.
    unsafe { command.pre_exec(new_session) };
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(messages_file)
        .spawn()
        .context("cannot start the lab's process")?;
    let pipe = child.stdout.take().context("the lab's process has no output")?;
    let mut line = String::new();
    step("boot the lab in the background", || {
        BufReader::new(pipe).read_line(&mut line).context("cannot read from the lab's process")?;
        if line.trim() == READY {
            return Ok(());
        }
        let status = child.wait().context("cannot wait for the lab's process")?;
        let said = fs::read_to_string(&messages).unwrap_or_default();
        bail!("the lab did not come up ({status})\n{}", said.trim_end())
    })?;
    say("`cargo xtask lab run -- COMMAND` runs commands in it, `cargo xtask lab down` ends it");
    Ok(())
}

/// Holds the background lab. [`up`] starts a process for this.
pub(crate) fn hold(options: &LabOptions) -> Result<()> {
    // Before any thread starts: threads inherit the blocked signals.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("cannot block signals")?;
    let mut lab = Lab::boot(NAME, options)?;
    let own = std::process::id();
    fs::write(lab.dir.join("pid"), own.to_string()).context("cannot write the lab's process id")?;
    writeln!(stdout(), "{READY}").context("cannot report that the lab is up")?;
    // The reader of the pipe has ended.
    let null = File::options().write(true).open("/dev/null").context("cannot open /dev/null")?;
    nix::unistd::dup2_stdout(&null).context("cannot let go of standard output")?;
    let qemu = lab.machine.pid();
    thread::spawn(move || {
        if signals.wait().is_ok() {
            // Not SIGTERM: QEMU has inherited it blocked.
            let _ = kill(qemu, Signal::SIGKILL);
        }
    });
    lab.wait()?;
    // Dropping the lab removes its files; the holder's log keeps this message.
    say(format!("the lab has ended{}", lab.machine.last_lines()));
    Ok(())
}

/// Ends the background lab and waits for the end of its holder.
pub(crate) fn down() -> Result<()> {
    let Some(pid) = holder()? else {
        say("no lab runs in the background");
        return Ok(());
    };
    let lock = directory(NAME).join("lock");
    let file = File::open(&lock).with_context(|| format!("cannot open {}", lock.display()))?;
    // Fails only if the holder has ended by itself.
    let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    // The kernel releases the lock when the holder ends.
    short_step("end the lab", || Flock::lock(file, FlockArg::LockExclusive))
        .map_err(|(_, error)| error)
        .context("cannot wait for the lab's end")?;
    say("the lab is down");
    Ok(())
}

/// Prints the state of the background lab. Returns the exit status: 0 if it runs, otherwise 1.
pub(crate) fn status() -> Result<i32> {
    match holder()? {
        Some(pid) => {
            let dir = directory(NAME);
            println!("up: process {pid}, console {}", dir.join("console.log").display());
            Ok(0)
        }
        None => {
            println!("down");
            Ok(1)
        }
    }
}

/// Runs a command in the background lab.
pub(crate) fn run(run: &Run, input: Input) -> Result<Ended> {
    if holder()?.is_none() {
        bail!("no lab runs in the background; `cargo xtask lab up` boots one");
    }
    client::run(&directory(NAME), run, input, &mut Show::Through, &|| None).map_err(|error| {
        if error.is::<client::Lost>() {
            error.context(format!("the lab was lost; its last messages are in {}", log().display()))
        } else {
            error
        }
    })
}

/// Process id of the holder of the background lab, if the lab runs.
fn holder() -> Result<Option<i32>> {
    let dir = directory(NAME);
    let Ok(lock) = File::open(dir.join("lock")) else { return Ok(None) };
    match Flock::lock(lock, FlockArg::LockSharedNonblock) {
        Ok(_) => return Ok(None),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {}
        Err((_, error)) => return Err(error).context("cannot ask for the lab's lock"),
    }
    let pid = fs::read_to_string(dir.join("pid"))
        .context("the lab is still booting, or is going down; try again")?;
    pid.trim().parse().map(Some).context("the lab's process id is not a number")
}
