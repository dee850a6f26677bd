//! Starting the sandbox process and the detached `exec` relay: this program, executed again.
//!
//! A fresh program image rather than a fork: no half-copied runtime, nothing inherited but the
//! standard streams and the descriptors named on its command line.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::PathBuf,
    process::{Child, Command},
    time::Duration,
};

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{control, limits, pod::Membership, preserved::Preserved};
use crate::{
    bundle::{Bind, Filter, VmSize},
    cgroup::{Place, Unit},
    error::{Error, Explain, Result},
    logger,
    network::Namespace,
    settings::Artifacts,
    state::{Id, StateDir},
    terminal::Size,
};

/// Everything that a sandbox process needs to know. All paths are absolute.
#[derive(Debug, Serialize, Deserialize)]
pub struct Launch {
    /// The container.
    pub id: Id,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its root file system on the host.
    pub rootfs: PathBuf,
    /// config.json as checked, with host paths.
    pub spec: Spec,
    /// Its system call filter.
    pub seccomp: Option<Filter>,
    /// Its bind mounts.
    pub binds: Vec<Bind>,
    /// The programs of its createContainer hooks.
    pub hooks: Vec<PathBuf>,
    /// Size of the microVM.
    pub vm: VmSize,
    /// The microVM has virtualisation extensions.
    pub nested: bool,
    /// The microVM that it is to live in, if that is not one of its own.
    pub pod: Option<Membership>,
    /// Which namespace's network it gets.
    pub network: Namespace,
    /// Network devices that it gets for a namespace without interfaces.
    pub spare_nics: u8,
    /// What the microVM is made of.
    pub artifacts: Artifacts,
    /// The cgroup that it belongs to, if the host has such.
    pub cgroup: Option<Place>,
    /// Where its terminal is, if it has one.
    pub terminal: Option<Terminal>,
    /// The command that creates it does not stay until its end.
    pub detached: bool,
    /// What its process gets beyond the standard streams, from descriptor 3 on.
    pub preserved: Vec<Preserved>,
    /// What the operator adds to the guest kernel's command line.
    pub kernel_params: String,
    /// The microVM shares what its kernel does not change with others.
    pub share_kernel: bool,
    /// How long the guest may take to boot.
    pub boot_timeout: Duration,
    /// Parents of the state directory that were made for it, and go when it does.
    pub made: Vec<PathBuf>,
    /// The guest kernel's console is to be kept in the state directory.
    pub console_log: bool,
    /// Who created the container.
    pub owner_uid: u32,
    /// [`crate::clock::monotonic_us`] when the command began.
    pub command_us: u64,
}

/// The host side of a container's terminal.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Terminal {
    /// The terminal that this process inherited.
    Inherited {
        /// Its size, if there is one: a terminal can be asked for where no stream is one.
        size: Option<Size>,
    },
    /// A new one, whose master goes to whoever listens on this unix socket.
    Socket {
        /// The socket's path.
        path: PathBuf,
    },
}

/// A process that was started with a document to work from.
#[derive(Debug)]
pub struct Launched {
    /// The process.
    pub child: Child,
    /// The connection to it.
    pub socket: UnixStream,
}

/// Descriptors that a launched process finds on its command line.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Descriptors {
    /// The connection to the process that launched this one.
    #[arg(long)]
    pub control_fd: RawFd,
    /// The container's state directory.
    #[arg(long)]
    pub state_fd: RawFd,
    /// The log file.
    #[arg(long)]
    pub log_fd: Option<RawFd>,
}

/// Executes this program again as `verb`, in a session of its own, with this process's standard
/// streams and the preserved descriptors, and in a scope of systemd if there is to be one. Sends it
/// `document`.
///
/// # Errors
///
/// If no process can be started, or it ends before it has read the document.
pub fn spawn(
    verb: &str,
    id: &Id,
    dir: &StateDir,
    unit: Option<&Unit>,
    preserved: &[Preserved],
    document: &impl Serialize,
) -> Result<Launched> {
    let (mut socket, theirs) = UnixStream::pair().explain(|| "cannot make a socket pair".into())?;
    // A pipe or a terminal is the caller's, who would wait for its end.
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
    // SAFETY: setsid, close_range and fcntl are async-signal-safe and `inherited` was allocated
    // before the fork, so the closure allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            inherit_only(&inherited)
        });
    }
    let child = command.spawn().explain(|| "cannot start the sandbox process".into())?;
    drop(theirs);
    // Closed here, so that who is at their other ends hears of it when that process does so.
    preserved.iter().try_for_each(|one| one.take().map(drop))?;
    control::send(&mut socket, document)
        .explain(|| "cannot hand over to the sandbox process".into())?;
    Ok(Launched { child, socket })
}

fn is_regular(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile
    })
}

/// Lets the given descriptors through the next `execve`, and no others but the standard streams, and
/// gives the program the limit of descriptors that this process was started with. For use between
/// `fork` and `execve`.
///
/// # Errors
///
/// If a descriptor is not open.
pub(super) fn inherit_only(descriptors: &[RawFd]) -> io::Result<()> {
    limits::restore()?;
    // SAFETY: close_range(2) with CLOSE_RANGE_CLOEXEC only sets flags; no pointer is passed.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    for fd in descriptors {
        // SAFETY: the caller's descriptors stay open until execve: nothing between fork and here
        // closes one.
        let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    }
    Ok(())
}

/// What a launched process was given.
#[derive(Debug)]
pub struct Given {
    /// The connection to the process that launched it.
    pub socket: UnixStream,
    /// The state directory, opened in the mount namespace of the process that launched it, with
    /// its lock if that held one.
    pub state: OwnedFd,
}

impl Descriptors {
    /// A copy of the log file's descriptor.
    ///
    /// # Errors
    ///
    /// If it is not open.
    pub fn log_file(&self) -> Result<Option<File>> {
        let Some(number) = self.log_fd else { return Ok(None) };
        // SAFETY: borrowed for one call, which fails if the descriptor is not open; nothing of this
        // process can have closed it, since nothing has run yet.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let copy =
            fd.try_clone_to_owned().explain(|| format!("descriptor {number} cannot be used"))?;
        Ok(Some(copy.into()))
    }

    /// Takes the descriptors over.
    ///
    /// # Errors
    ///
    /// If one of them is not open, as when a person types the hidden verb.
    pub fn take(self) -> Result<Given> {
        let take = |fd: RawFd| {
            if fd <= 2 {
                return Err(Error::new(format!("descriptor {fd} is a standard stream")));
            }
            // SAFETY: at this point of a launched process nothing has been opened yet and the
            // number comes from the command line that was made for it, so nothing else owns it.
            // That it is open is checked by the next call, before it is used for anything.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            match rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC) {
                Ok(()) => Ok(fd),
                Err(e) => {
                    // Closing what is not open would abort.
                    let number = std::os::fd::IntoRawFd::into_raw_fd(fd);
                    Err(e).explain(|| format!("descriptor {number} cannot be used"))
                }
            }
        };
        // The log has a copy of it.
        drop(self.log_fd.map(take).transpose()?);
        Ok(Given { socket: take(self.control_fd)?.into(), state: take(self.state_fd)? })
    }
}

/// Reads the document that [`spawn`] sent, and nothing behind it.
///
/// # Errors
///
/// If it does not arrive or is not valid.
pub fn read_document<T: DeserializeOwned>(socket: &UnixStream) -> Result<T> {
    let what = || "cannot read what to do".to_owned();
    let mut json = Vec::new();
    // The launching process sends nothing more until it has an answer, so whatever is buffered
    // belongs to the document.
    io::BufRead::read_until(&mut io::BufReader::new(socket), b'\n', &mut json).explain(what)?;
    serde_json::from_slice(&json).explain(what)
}
