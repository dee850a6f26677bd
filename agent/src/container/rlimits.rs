//! `process.rlimits`.

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

use crate::error::{Context as _, Error, Result};
use crate::oci::PosixRlimit;

/// Soft limit on open files, unless the specification sets one. It suits programs that use
/// select(2); others can raise it themselves.
const DEFAULT_NOFILE: u64 = 1024;

/// Sets limits of the calling process that the specification leaves out.
pub(crate) fn set_defaults(limits: &[PosixRlimit]) -> Result<()> {
    if limits.iter().any(|limit| limit.kind == "RLIMIT_NOFILE") {
        return Ok(());
    }
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = Some(maximum.unwrap_or(u64::MAX).min(DEFAULT_NOFILE));
    setrlimit(Resource::Nofile, Rlimit { current, maximum })
        .context(|| "set the default limit on open files")
}

/// Sets the limits of a process, or of the calling process without a `pid`.
pub(crate) fn set(pid: Option<Pid>, limits: &[PosixRlimit]) -> Result<()> {
    for limit in limits {
        let name = &limit.kind;
        let Some(resource) = resource(name) else {
            return Err(Error::invalid("process.rlimits", format!("{name:?} is unknown")));
        };
        // The largest number means no limit.
        let bound = |value| (value != u64::MAX).then_some(value);
        let values = Rlimit { current: bound(limit.soft), maximum: bound(limit.hard) };
        prlimit(pid, resource, values).context(|| format!("set process.rlimits {name}"))?;
    }
    Ok(())
}

/// The kernel's limit with a name such as `RLIMIT_CORE`.
pub(crate) fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_STACK" => Resource::Stack,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        _ => return None,
    })
}
