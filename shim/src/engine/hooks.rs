//! Hooks of config.json that run on the host: prestart, createRuntime, poststart and poststop.
//!
//! A hook runs in the runtime namespace (config.md, "POSIX-platform Hooks"): that of the
//! command that created the container. The sandbox process has left this namespace. So it keeps
//! descriptors of the namespace, by which its children go back.
//!
//! As with runc, the bundle is a hook's working directory, and the container's state is its
//! standard input. The output of a hook is shown only if the hook fails.

use std::{
    collections::VecDeque,
    ffi::{CString, OsString},
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, process::CommandExt, process::ExitStatusExt},
    },
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use oci_spec::runtime::{Hook, Hooks};
use rustix::{
    fs::{MemfdFlags, SeekFrom, memfd_create},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use tokio::{
    io::{AsyncReadExt, unix::AsyncFd},
    net::unix::pipe,
    time::timeout,
};

use crate::{
    descriptor::{inherit_only, wait_for},
    engine::record::Record,
    error::{Error, Explain, Result},
    exit_text::exit_text,
    state::Status,
    text::printable,
};

/// Most bytes of a hook's output to keep.
const MAX_OUTPUT_LEN: usize = 2048;

/// Most reads of the bytes left in the pipe: enough for all that the pipe can hold, but bounded.
const MAX_PIPE_READS: u32 = 64;

/// The point at which hooks run, named as in config.json.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Point {
    /// At creation: the network namespace is there, the microVM is not. Deprecated, but Docker sets
    /// up the network by it.
    Prestart,
    /// At creation, after [`Self::Prestart`].
    CreateRuntime,
    /// After the start of the process, before `start` returns.
    Poststart,
    /// After the deletion of the container, before `delete` returns.
    Poststop,
}

impl Point {
    fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    /// The status in the state object that the hook reads.
    fn status(self) -> Status {
        match self {
            Self::Prestart | Self::CreateRuntime => Status::Creating,
            Self::Poststart => Status::Running,
            Self::Poststop => Status::Stopped,
        }
    }

    fn of(self, hooks: &Hooks) -> &[Hook] {
        let hooks = match self {
            #[allow(deprecated, reason = "Docker uses it")]
            Self::Prestart => hooks.prestart(),
            Self::CreateRuntime => hooks.create_runtime(),
            Self::Poststart => hooks.poststart(),
            Self::Poststop => hooks.poststop(),
        };
        hooks.as_deref().unwrap_or_default()
    }
}

/// Longest time that these hooks may take together; `None` if one of them has no timeout.
pub(crate) fn time_limit(hooks: &[Hook]) -> Option<Duration> {
    hooks.iter().try_fold(Duration::ZERO, |sum, hook| Some(sum.saturating_add(limit_of(hook)?)))
}

fn limit_of(hook: &Hook) -> Option<Duration> {
    hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs)
}

/// The way back to the namespaces and the cgroup that the sandbox process was started in.
#[derive(Debug, Clone)]
pub(crate) struct RuntimeNamespace(Arc<Origin>);

#[derive(Debug)]
struct Origin {
    mount: OwnedFd,
    network: OwnedFd,
    /// `cgroup.procs` of the cgroup, on a host with cgroups v2.
    cgroup: Option<File>,
}

impl RuntimeNamespace {
    /// Opens the namespaces of this process, which is about to leave them, and its cgroup.
    pub(crate) fn open(cgroup: Option<&Path>) -> Result<Self> {
        let open = |kind: &str| {
            let path = format!("/proc/self/ns/{kind}");
            File::open(&path).map(OwnedFd::from).explain(|| format!("cannot open {path}"))
        };
        // If the file is not writable, hooks stay in the cgroup of the sandbox process.
        let cgroup = cgroup
            .and_then(|cgroup| File::options().write(true).open(cgroup.join("cgroup.procs")).ok());
        let origin = Origin { mount: open("mnt")?, network: open("net")?, cgroup };
        Ok(Self(Arc::new(origin)))
    }

    /// Moves the calling process back. For use between `fork` and `execve`: allocates nothing.
    fn enter(&self) -> io::Result<()> {
        let Origin { mount, network, cgroup } = &*self.0;
        if let Some(cgroup) = cgroup {
            // Fails if the cgroup is gone, because its processes have ended. Then the hook stays in
            // the cgroup of the sandbox process.
            let _ = rustix::io::write(cgroup, b"0");
        }
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
        move_into_link_name_space(mount.as_fd(), Some(LinkNameSpaceType::Mount))?;
        Ok(())
    }
}

/// Runs the hooks of `point` one after another, up to the first that fails. `away` is the way back
/// for a process that has left the runtime namespace. Dropping the future kills the hook that runs.
///
/// # Errors
///
/// If a hook cannot be run, does not succeed, or exceeds its timeout.
pub(crate) async fn run(
    point: Point,
    record: &Record,
    away: Option<&RuntimeNamespace>,
) -> Result<()> {
    for (index, hook) in of(point, record).iter().enumerate() {
        run_one(point, index, hook, record, away).await?;
    }
    Ok(())
}

/// Returns true if there are hooks to run at `point`.
pub(crate) fn any(point: Point, record: &Record) -> bool {
    !of(point, record).is_empty()
}

fn of(point: Point, record: &Record) -> &[Hook] {
    record.hooks.as_ref().map_or(&[], |hooks| point.of(hooks))
}

/// Runs all poststop hooks. Failures are only logged, as the specification demands.
pub(crate) async fn run_poststop(record: &Record, away: Option<&RuntimeNamespace>) {
    for (index, hook) in of(Point::Poststop, record).iter().enumerate() {
        if let Err(error) = run_one(Point::Poststop, index, hook, record, away).await {
            log::warn!("container {}: {error}", record.id);
        }
    }
}

async fn run_one(
    point: Point,
    index: usize,
    hook: &Hook,
    record: &Record,
    away: Option<&RuntimeNamespace>,
) -> Result<()> {
    let name = format!("hooks.{}[{index}] ({})", point.name(), hook.path().display());
    log::debug!("container {}: running {name}", record.id);
    let mut process = Process::spawn(hook, &state(point, record)?, &record.bundle, away)
        .explain(|| format!("{name} cannot be run"))?;
    let status = match limit_of(hook) {
        None => process.wait().await,
        Some(limit) => match timeout(limit, process.wait()).await {
            Ok(status) => status,
            Err(_) => {
                // The drop kills the hook.
                drop(process);
                return Err(Error::new(format!(
                    "{name} was killed: it took longer than its timeout of {} seconds",
                    limit.as_secs()
                )));
            }
        },
    };
    let status = status.explain(|| format!("cannot wait for {name}"))?;
    if status.success() {
        return Ok(());
    }
    let how = match status.signal() {
        Some(_) => format!("was {}", exit_text(status)),
        None => format!("failed with {}", exit_text(status)),
    };
    Err(Error::new(match process.said() {
        said if said.is_empty() => format!("{name} {how}"),
        said => format!("{name} {how}: {said}"),
    }))
}

/// The OCI state object for the hook's stdin. A memfd, not a pipe: the hook may exit without
/// reading it.
fn state(point: Point, record: &Record) -> Result<File> {
    let what = || "cannot write the state for a hook".to_owned();
    let state = record.state_at(point.status()).to_string();
    let mut file: File =
        memfd_create("isopod-state", MemfdFlags::CLOEXEC).map(File::from).explain(what)?;
    file.write_all(state.as_bytes()).explain(what)?;
    rustix::fs::seek(&file, SeekFrom::Start(0)).explain(what)?;
    Ok(file)
}

/// A running hook. Dropping it kills the hook and its process group.
struct Process {
    child: Child,
    pidfd: AsyncFd<OwnedFd>,
    reaped: bool,
    output: pipe::Receiver,
    tail: VecDeque<u8>,
}

impl Process {
    fn spawn(
        hook: &Hook,
        stdin: &File,
        bundle: &Path,
        away: Option<&RuntimeNamespace>,
    ) -> io::Result<Self> {
        let image = Image::of(hook)?;
        let bundle = CString::new(bundle.as_os_str().as_bytes())?;
        let away = away.cloned();
        let (output, written) = io::pipe()?;
        let output = pipe::Receiver::from_owned_fd(output.into())?;
        let parent = rustix::process::getpid();
        let mut command = Command::new(hook.path());
        command.stdin(stdin.try_clone()?).stdout(written.try_clone()?).stderr(Stdio::from(written));
        // SAFETY: the closure makes system calls only. Everything that it uses was allocated before
        // the fork, so the closure allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(move || {
                // A process group of its own, to be killed with its descendants. The death signal
                // ends the hook when nobody waits for it any more.
                rustix::process::setpgid(None, None)?;
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                if rustix::process::getppid() != Some(parent) {
                    return Err(Errno::SRCH.into());
                }
                if let Some(away) = &away {
                    away.enter()?;
                }
                // The bundle may have been removed before the container is deleted.
                if rustix::process::chdir(&*bundle).is_err() {
                    rustix::process::chdir(c"/")?;
                }
                inherit_only(&[])?;
                Err(image.execute())
            });
        }
        let mut child = command.spawn()?;
        let watch = |child: &Child| {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            // The child is not reaped before this process waits for it, so the pid is still its
            // own.
            wait_for(pidfd_open(pid.ok_or(Errno::SRCH)?, PidfdFlags::empty())?)
        };
        match watch(&child) {
            Ok(pidfd) => Ok(Self { child, pidfd, reaped: false, output, tail: VecDeque::new() }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e)
            }
        }
    }

    /// Waits for the end of the process, not for that of its output: a hook may leave processes.
    async fn wait(&mut self) -> io::Result<ExitStatus> {
        let mut buffer = [0; 1024];
        let mut open = true;
        loop {
            tokio::select! {
                biased;
                ended = self.pidfd.readable() => {
                    drop(ended?);
                    break;
                }
                read = self.output.read(&mut buffer), if open => match read {
                    Ok(length @ 1..) => keep(&mut self.tail, &buffer[..length]),
                    _ => open = false,
                }
            }
        }
        // The pipe has everything that the hook itself wrote.
        for _ in 0..MAX_PIPE_READS {
            match rustix::io::read(self.output.as_fd(), &mut buffer) {
                Ok(length @ 1..) => keep(&mut self.tail, &buffer[..length]),
                _ => break,
            }
        }
        let status = self.child.wait()?;
        self.reaped = true;
        Ok(status)
    }

    /// The last bytes of the hook's output, on one line.
    fn said(&self) -> String {
        let bytes: Vec<u8> = self.tail.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        printable(&lines.join("; "))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // The hook is not reaped and still leads its group, so the group is its own.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn keep(tail: &mut VecDeque<u8>, bytes: &[u8]) {
    tail.extend(bytes);
    let excess = tail.len().saturating_sub(MAX_OUTPUT_LEN);
    tail.drain(..excess);
}

/// The environment of this process, which is that of the command.
fn own_environment() -> Vec<CString> {
    let entry = |(name, value): (OsString, OsString)| {
        CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).ok()
    };
    std::env::vars_os().filter_map(entry).collect()
}

/// A program with its arguments and environment, ready for execve(2).
struct Image {
    path: CString,
    /// NULL-terminated array of pointers into `_strings`.
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    _strings: [Vec<CString>; 2],
}

// SAFETY: the pointers lead into strings that the image owns. The strings are neither changed nor
// moved in memory until the image is dropped.
unsafe impl Send for Image {}
// SAFETY: nothing is changed through a shared reference.
unsafe impl Sync for Image {}

impl Image {
    fn of(hook: &Hook) -> io::Result<Self> {
        let path = CString::new(hook.path().as_os_str().as_bytes())?;
        let strings = |texts: &Option<Vec<String>>| -> io::Result<Vec<CString>> {
            let texts = texts.iter().flatten();
            texts.map(|text| CString::new(text.as_bytes()).map_err(io::Error::from)).collect()
        };
        let mut args = strings(hook.args())?;
        if args.is_empty() {
            args.push(path.clone());
        }
        // A hook without an environment gets the caller's, as with runc.
        let env = match hook.env() {
            Some(_) => strings(hook.env())?,
            None => own_environment(),
        };
        let pointers = |strings: &[CString]| {
            let pointers = strings.iter().map(|text| text.as_ptr());
            pointers.chain(std::iter::once(std::ptr::null())).collect()
        };
        Ok(Self { argv: pointers(&args), envp: pointers(&env), path, _strings: [args, env] })
    }

    /// Executes the program. Returns only if this fails, with the reason.
    fn execute(&self) -> io::Error {
        // SAFETY: the path is NUL-terminated, and both arrays end with NULL and point to
        // NUL-terminated strings. `self` owns all of it.
        unsafe { libc::execve(self.path.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
        io::Error::last_os_error()
    }
}
