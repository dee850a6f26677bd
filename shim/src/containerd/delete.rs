//! The action `delete`: removes what is left of a task, and prints how it has ended. containerd
//! executes it after each removal, also if there is nothing left.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::api::DeleteResponse;

use crate::{
    bundle::is_crios,
    container_id::ContainerId,
    containerd::{
        flags::Flags,
        messages::{encoded, print, timestamp},
        pod_thread::{remove_empty_roots, root_of},
        process::UNKNOWN_EXIT,
    },
    control::{
        is_answered,
        remains::{remove, remove_unread},
    },
    engine::{Record, Remains, Request, records},
    error::{Error, Result},
    event_loop::event_loop,
    process_id::ProcessId,
    state::{StateDir, Status, ids},
};

/// Longest time for a shim of another version to end after SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Removes the remains of a task.
pub(super) fn delete(flags: &Flags) -> Result<()> {
    let id = ContainerId::parse(&flags.id)?;
    let root = root_of(&flags.namespace);
    let mut response = DeleteResponse {
        exit_status: UNKNOWN_EXIT,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..DeleteResponse::default()
    };
    if root.join(id.as_str()).exists() {
        let dir = StateDir::open(&root, &id)?;
        // Read first: it goes with the directory.
        let remains = Remains::read(&dir);
        match Record::read(&dir) {
            Ok(record) => {
                if let Some(record) = &record {
                    response.pid = record.pid.unsigned_abs();
                    if let Some(exit) = record.exit {
                        response.exit_status = exit.status.into();
                    }
                }
                end(&dir, record.as_ref())?;
            }
            // The programs have been replaced since the pod began.
            Err(unread) => end_unread(&dir, &remains, unread)?,
        }
        if let Some(shim) = remains.sandbox.filter(|_| !remains.member) {
            remove_members(&root, shim)?;
        }
        remove_empty_roots(&root);
    }
    if let Some(bundle) = &flags.bundle {
        remove_address(bundle);
    }
    print(&encoded(&response)?)
}

/// Removes what is left of CRI-O's containers whose shims have ended. CRI-O does not ask for it: it
/// never executes the action `delete`. What cannot be removed stays for the next attempt: no failure
/// may keep a new pod from its start.
pub(super) fn sweep(namespace: &str) {
    let root = root_of(namespace);
    for (dir, record) in records(&root).into_iter().flatten() {
        let is_left = is_crios(&record.annotations) && !record.sandbox.is_alive();
        // Nobody hears of it: CRI-O takes all that `start` writes for the address.
        if is_left && let Err(error) = sweep_one(&dir, &record) {
            log::warn!("{error}");
        }
    }
}

fn sweep_one(dir: &StateDir, record: &Record) -> Result<()> {
    event_loop()?.block_on(remove(dir, Some(record)))?;
    // The address of the first container is the shim's socket, which is the others' too.
    remove_address(&record.bundle);
    Ok(())
}

/// Ends a container and removes its remains.
fn end(dir: &StateDir, record: Option<&Record>) -> Result<()> {
    // A shim that lives has other containers. Without its first process it removes this one when
    // the pod ends.
    if let Some(record) = record.filter(|record| record.pod.is_some() && record.sandbox.is_alive())
    {
        if record.status != Status::Stopped {
            is_answered(dir, Request::Destroy)?;
        }
        return Ok(());
    }
    event_loop()?.block_on(remove(dir, record))
}

/// Does the same as [`end`] for a container whose record cannot be read because of `unread`.
fn end_unread(dir: &StateDir, remains: &Remains, unread: Error) -> Result<()> {
    if remains.member && remains.sandbox.is_some_and(|shim| shim.is_alive()) {
        return Ok(());
    }
    remove_unread(dir, unread, KILL_TIMEOUT)
}

/// Removes the remains of further containers of a pod whose shim has ended. containerd from 2.3 on
/// asks for the first container only.
fn remove_members(root: &Path, shim: ProcessId) -> Result<()> {
    for id in ids(root)? {
        let Ok(dir) = StateDir::open(root, &id) else { continue };
        let remains = Remains::read(&dir);
        if !remains.member || remains.sandbox != Some(shim) {
            continue;
        }
        match Record::read(&dir) {
            Ok(record) => event_loop()?.block_on(remove(&dir, record.as_ref()))?,
            Err(unread) => remove_unread(&dir, unread, KILL_TIMEOUT)?,
        }
    }
    Ok(())
}

/// Removes the socket of a shim that does not run any more.
fn remove_address(bundle: &Path) {
    let Ok(address) = std::fs::read_to_string(bundle.join("address")) else { return };
    let Some(path) = address.trim_end().strip_prefix("unix://") else { return };
    if std::os::unix::net::UnixStream::connect(path).is_err() {
        let _ = std::fs::remove_file(path);
    }
}
