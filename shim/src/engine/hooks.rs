//! Hooks of config.json that run on the host: prestart, createRuntime, poststart and poststop.
//!
//! A hook runs in the runtime namespace (config.md, "POSIX-platform Hooks"): that of the
//! command that created the container. The sandbox process has left this namespace. So it keeps
//! descriptors of the namespace, by which its children go back.
//!
//! As with runc, the bundle is a hook's working directory, and the container's state is its
//! standard input. The output of a hook is shown only if the hook fails.

use std::{fs::File, io::Write, os::unix::process::ExitStatusExt, time::Duration};

use oci_spec::runtime::{Hook, Hooks};
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create};
use tokio::time::timeout;

use crate::{
    engine::{hook_process::HookProcess, record::Record, runtime_namespace::RuntimeNamespace},
    error::{Error, Explain, Result},
    exit_text::exit_text,
    state::Status,
    text::seconds,
};

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

/// Longest time that the createContainer hooks may take. If one of them may take for ever, so may
/// the creation.
pub(crate) fn creation_limit(hooks: Option<&Hooks>) -> Duration {
    let hooks = hooks.and_then(|hooks| hooks.create_container().as_deref());
    time_limit(hooks.unwrap_or_default()).unwrap_or(Duration::MAX)
}

fn limit_of(hook: &Hook) -> Option<Duration> {
    hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs)
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
    let mut process = HookProcess::spawn(hook, &state(point, record)?, &record.bundle, away)
        .explain(|| format!("{name} cannot be run"))?;
    let status = match limit_of(hook) {
        None => process.wait().await,
        Some(limit) => match timeout(limit, process.wait()).await {
            Ok(status) => status,
            Err(_) => {
                // The drop kills the hook.
                drop(process);
                return Err(Error::new(format!(
                    "{name} was killed: it took longer than its timeout of {}",
                    seconds(limit)
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
