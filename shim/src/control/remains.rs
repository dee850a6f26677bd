//! The remains of a container whose processes have ended, or are to end: removed by its record.

use std::time::Duration;

use crate::{
    cgroup::Cgroup,
    control::client,
    engine::{Pod, Record, Remains, hooks},
    error::{Error, Result},
    network::RedirectRecord,
    state::StateDir,
};

/// Longest time for the processes of a sandbox to end after SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Removes the remains of a container, by its record, and runs its poststop hooks. First kills a
/// sandbox process that still runs.
///
/// A part that cannot be removed does not keep the other parts. Only the state directory stays
/// then, for the next attempt. The error is the first failure.
pub(crate) async fn remove(dir: &StateDir, record: Option<&Record>) -> Result<()> {
    let network = match record {
        Some(record) => {
            end_processes(record)?;
            record.network.as_ref().map_or(Ok(()), RedirectRecord::remove)
        }
        None => Ok(()),
    };
    // Another process has the lock, and is about to remove the container too.
    if !dir.try_lock()? {
        return network;
    }
    // The sandbox process of a pod lets a member go when the member's own process has gone. If it
    // cannot do so now, it does so later, and that keeps nobody from removing the rest.
    if record.is_some_and(|record| record.pod.is_some())
        && let Err(error) = client::wait_gone(dir)
    {
        log::warn!("{error}");
    }
    let cgroup = record.and_then(|record| record.cgroup.as_ref()).map_or(Ok(()), Cgroup::remove);
    // Everything that can be removed is removed. The rest stays for the next attempt.
    let mut failures = [network, cgroup].into_iter().filter_map(Result::err);
    if let Some(first) = failures.next() {
        failures.for_each(|other| log::warn!("{other}"));
        return Err(first);
    }
    if let (true, Some(record)) = (dir.remove()?, record) {
        hooks::run_poststop(record, None).await;
    }
    match record.and_then(|record| record.pod.as_ref()) {
        Some(pod) => Box::pin(remove_killed_holder(pod)).await,
        None => Ok(()),
    }
}

/// Removes what is left of a pod's holder that was killed: it cannot remove itself, and its engine
/// does not know of it. Does nothing for a first container of an engine's.
pub(crate) async fn remove_killed_holder(pod: &Pod) -> Result<()> {
    if !pod.holder || pod.process.is_alive() {
        return Ok(());
    }
    let Ok(dir) = StateDir::open_path(&pod.dir) else { return Ok(()) };
    // The pod may have another holder by now.
    match Record::read(&dir)?.filter(|record| record.sandbox == pod.process) {
        Some(record) => remove(&dir, Some(&record)).await,
        None => Ok(()),
    }
}

/// Removes the remains of a container whose record cannot be read because of `unread`. First kills
/// its sandbox process and its VMM, which have `limit` each to end. Poststop hooks are not run.
///
/// Processes in a pod's microVM end with that microVM.
///
/// # Errors
///
/// `unread` itself if the container's directory is in use by somebody else.
pub(crate) fn remove_unread(dir: &StateDir, unread: Error, limit: Duration) -> Result<()> {
    let Remains { sandbox, vmm, cgroup, network, .. } = Remains::read(dir);
    for process in [sandbox, vmm].into_iter().flatten() {
        process.kill(limit);
    }
    // If the lock is free, the sandbox process is gone, and the VMM with it.
    if !dir.try_lock()? {
        return Err(unread);
    }
    match (&cgroup, &network) {
        (Some(_), _) | (_, Some(_)) => log::warn!("{unread}"),
        (None, None) => log::warn!(
            "{unread}; its cgroup, and its redirects in a network namespace of others, are \
             unknown and stay"
        ),
    }
    let network = network.map_or(Ok(()), |taken| taken.remove());
    let cgroup = cgroup.map_or(Ok(()), |cgroup| cgroup.remove());
    network.and(cgroup)?;
    dir.remove().map(drop)
}

/// Kills the sandbox process and the VMM. While one of them lives, its resources cannot be removed.
pub(crate) fn end_processes(record: &Record) -> Result<()> {
    let processes = [Some(record.sandbox), record.vmm].into_iter().flatten();
    // Both are killed, even if the first does not end.
    let left: Vec<_> = processes.filter(|process| !process.kill(KILL_TIMEOUT)).collect();
    match left.first() {
        None => Ok(()),
        Some(process) => Err(Error::new(format!(
            "process {} of container {} does not end when it is killed",
            process.pid, record.id
        ))),
    }
}
