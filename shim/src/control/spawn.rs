//! Start of the sandbox process and of the exec relay: this program, executed again.
//!
//! A fresh program image has no half-copied runtime, unlike a fork. It inherits nothing but the
//! standard streams, the preserved descriptors, and the descriptors named on its command line.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command},
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    cgroup::Unit,
    container_id::ContainerId,
    control::message::send,
    descriptor::{inherit_only, take_inherited},
    error::{Explain, Result},
    logger,
    preserved::Preserved,
    state::StateDir,
};

/// A process that was started with a document to work from.
#[derive(Debug)]
pub(crate) struct Launched {
    /// The process.
    pub child: Child,
    /// The connection to the process.
    pub socket: UnixStream,
}

/// Descriptors that a launched process finds on its command line.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct Descriptors {
    /// The connection to the launching process.
    #[arg(long)]
    pub control_fd: RawFd,
    /// The container's state directory.
    #[arg(long)]
    pub state_fd: RawFd,
    /// The log file.
    #[arg(long)]
    pub log_fd: Option<RawFd>,
}

/// Executes this program again as `verb`, in a session of its own, and sends it `document`.
///
/// The new process has this process's standard streams and the preserved descriptors. With `unit`
/// it runs in a scope of systemd.
pub(crate) fn spawn(
    verb: &str,
    id: &ContainerId,
    dir: &StateDir,
    unit: Option<&Unit>,
    preserved: &[Preserved],
    document: &impl Serialize,
) -> Result<Launched> {
    let (mut socket, theirs) = UnixStream::pair().explain(|| "cannot make a socket pair".into())?;
    // A pipe or a terminal is the caller's: with a copy of it left open, the caller would not see
    // its end.
    let log = logger::file().filter(|log| is_regular(*log));
    let (format, debug) = logger::options();
    let mut command = match unit {
        Some(unit) => {
            let program = std::env::current_exe().explain(|| "cannot find isopod".into())?;
            unit.command(&program)
        }
        None => {
            let mut command = Command::new("/proc/self/exe");
            command.arg0("isopod");
            command
        }
    };
    if debug {
        command.arg("--debug");
    }
    if format == logger::Format::Json {
        command.args(["--log-format", "json"]);
    }
    command
        .arg(verb)
        .arg(format!("--control-fd={}", theirs.as_raw_fd()))
        .arg(format!("--state-fd={}", dir.as_fd().as_raw_fd()));
    let mut inherited = vec![theirs.as_raw_fd(), dir.as_fd().as_raw_fd()];
    inherited.extend(preserved.iter().map(|one| one.number()));
    if let Some(log) = log {
        command.arg(format!("--log-fd={}", log.as_raw_fd()));
        inherited.push(log.as_raw_fd());
    }
    command.arg(id.as_str()).current_dir("/");
    // SAFETY: setsid, close_range and fcntl are async-signal-safe. `inherited` was allocated before
    // the fork, so the closure allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            inherit_only(&inherited)
        });
    }
    let child = command.spawn().explain(|| "cannot start the sandbox process".into())?;
    drop(theirs);
    // Closed here. The other ends then see the end when the launched process closes its copies.
    preserved.iter().try_for_each(|one| one.take().map(drop))?;
    send(&mut socket, document).explain(|| "cannot send the launch document".into())?;
    Ok(Launched { child, socket })
}

fn is_regular(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile
    })
}

/// Descriptors of a launched process.
#[derive(Debug)]
pub(crate) struct Given {
    /// The connection to the launching process.
    pub socket: UnixStream,
    /// The state directory, opened in the mount namespace of the launching process. It has the lock
    /// if the launching process held it.
    pub state: OwnedFd,
}

impl Descriptors {
    /// Copies the log file's descriptor.
    pub(crate) fn log_file(&self) -> Result<Option<File>> {
        let Some(number) = self.log_fd else { return Ok(None) };
        // SAFETY: borrowed for one call, which fails if the descriptor is not open. Nothing of this
        // process can have closed it, since nothing has run yet.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let copy =
            fd.try_clone_to_owned().explain(|| format!("descriptor {number} cannot be used"))?;
        Ok(Some(copy.into()))
    }

    /// Takes the descriptors over. Fails if one of them is not open, as when a person types the
    /// hidden verb.
    pub(crate) fn take(self) -> Result<Given> {
        // The logger has a copy of the descriptor.
        drop(self.log_fd.map(take_inherited).transpose()?);
        let (socket, state) = (take_inherited(self.control_fd)?, take_inherited(self.state_fd)?);
        Ok(Given { socket: socket.into(), state })
    }
}

/// Reads the document that [`spawn`] sent, and nothing behind it.
pub(crate) fn read_document<T: DeserializeOwned>(socket: &UnixStream) -> Result<T> {
    let what = || "cannot read the launch document".to_owned();
    let mut json = Vec::new();
    // The launching process sends nothing more until it has an answer, so all buffered bytes belong
    // to the document.
    io::BufRead::read_until(&mut io::BufReader::new(socket), b'\n', &mut json).explain(what)?;
    serde_json::from_slice(&json).explain(what)
}
