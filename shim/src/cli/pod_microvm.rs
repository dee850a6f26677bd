//! The microVM of a pod whose namespaces CRI-O has pinned.
//!
//! The pod's infra container has it. CRI-O may leave that container out: then the first container
//! that comes has a holder boot the microVM, and the holder ends with the last container.

use std::{fs::File, time::Duration};

use rustix::fs::{FlockOperation, flock};

use crate::{
    bundle::{Bundle, Holder, NetworkNamespace},
    cgroup::CgroupPlan,
    cli::{Global, new_container::NewContainer},
    container_id::ContainerId,
    control::{attend::Hold, connection::Connection, remains::remove},
    engine::{Record, records},
    error::{Error, Explain, Result},
    event_loop::blocking,
    host,
    microvm::{boot::BootSettings, disks::spare_disks},
    sandbox_process::{Launch, Membership},
    signals::Signals,
    state::StateDir,
};

/// Longest time for a holder that is ending to be gone.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Number of microVMs of one pod whose ends a creation may cross.
const MAX_ENDS: usize = 4;

/// Keeps other commands from looking for the microVM of this container's pod, so that only one of
/// them has it booted. `None` if the pod's namespaces are not pinned.
pub(super) async fn lock(bundle: &Bundle) -> Result<Option<File>> {
    let (Some(_), NetworkNamespace::Path(path)) = (pinned(bundle), &bundle.network) else {
        return Ok(None);
    };
    let path = path.clone();
    // The namespace is the pod's alone, and lives as long as the pod. The kernel lets go of the lock
    // when this process ends.
    blocking(move || {
        let what = || format!("cannot lock the network namespace {}", path.display());
        let file = File::open(&path).explain(what)?;
        flock(&file, FlockOperation::LockExclusive).explain(what)?;
        Ok(Some(file))
    })
    .await
}

/// Finds the microVM of a container's pod, or has one booted. With it comes what keeps the microVM
/// until the container is in it. `None` if the container has a microVM of its own.
pub(super) async fn find(
    global: &Global,
    bundle: &Bundle,
    mut signals: Signals,
) -> Result<(Option<Membership>, Option<Hold>, Signals)> {
    let find = || Membership::find(&global.root, &bundle.joined);
    let Some(id) = pinned(bundle) else { return Ok((find()?, None, signals)) };
    let pod = ContainerId::parse(id)?;
    for _ in 0..MAX_ENDS {
        let mut launcher = None;
        let mut found = find()?;
        if found.is_none() {
            let launched: Connection;
            (launched, signals) = launch(global, bundle, &pod, signals).await?;
            // A new holder stays until this is dropped.
            launcher = Some(launched);
            found = find()?;
        }
        if let Some(found) = found {
            if !found.pod.holder {
                return Ok((Some(found), None, signals));
            }
            if let Some(held) = Hold::take(&found.pod).await? {
                return Ok((Some(found), Some(held), signals));
            }
        }
        drop(launcher);
        clear(global, &pod).await?;
    }
    Err(Error::new(format!("the microVM of pod {pod} ends before a container can be made in it")))
}

/// Id of the pod that has the container's namespaces, if they are pinned.
fn pinned(bundle: &Bundle) -> Option<&str> {
    bundle.joined.iter().find_map(|joined| match &joined.holder {
        Holder::Pod(id) => Some(id.as_str()),
        Holder::Process(_) => None,
    })
}

/// Starts a holder, and waits until its microVM is there. The holder ends with the connection, if
/// nothing else keeps it.
async fn launch(
    global: &Global,
    bundle: &Bundle,
    pod: &ContainerId,
    signals: Signals,
) -> Result<(Connection, Signals)> {
    if !matches!(bundle.network, NetworkNamespace::Path(_)) {
        return Err(Error::new(format!(
            "linux.namespaces: pod {pod} has no microVM yet, and the container does not share its \
             network: share the pod's network namespace"
        )));
    }
    clear(global, pod).await?;
    sweep(global).await?;
    let bundle = bundle.holder(pod.as_str(), &global.root.join(pod.as_str()))?;
    let boot = BootSettings::of_host(global.debug)?;
    let linux = bundle.spec.linux().as_ref();
    let path = linux.and_then(|linux| linux.cgroups_path().as_deref());
    let cgroup = CgroupPlan::find(path, global.systemd_cgroup, pod)?;
    let spare_disks = spare_disks(&bundle)?;
    drop(host::open_kvm()?);
    let dir = StateDir::create(&global.root, pod)?;
    let launch = Launch {
        id: pod.clone(),
        bundle,
        pod: None,
        holder: true,
        spare_nics: 0,
        spare_disks,
        boot,
        cgroup,
        terminal: None,
        detached: true,
        preserved: Vec::new(),
        made: dir.made().to_vec(),
        command_us: global.began_us,
    };
    Ok(NewContainer::launch(dir, &launch, signals).await?.into_parts())
}

/// Waits until an earlier holder of the pod is gone, and removes what it has left if it was killed.
async fn clear(global: &Global, pod: &ContainerId) -> Result<()> {
    let Ok(dir) = StateDir::open(&global.root, pod) else { return Ok(()) };
    let record = Record::read(&dir)?;
    if record.as_ref().is_some_and(|record| !record.holder) {
        return Err(Error::new(format!("the first container of pod {pod} has ended")));
    }
    if let Some(process) = record.map(|record| record.sandbox)
        && !blocking(move || Ok(process.wait(END_TIMEOUT))).await?
    {
        let pid = process.pid;
        return Err(Error::new(format!("process {pid} of pod {pod} is ending, and does not end")));
    }
    // A holder without a record has not begun yet, or has removed the record already.
    let dir = blocking(move || dir.lock().map(|()| dir)).await?;
    let record = Record::read(&dir)?;
    remove(&dir, record.as_ref()).await
}

/// Removes what killed holders of other pods have left, of whose ends nobody else hears. What cannot
/// be removed stays for the next attempt.
async fn sweep(global: &Global) -> Result<()> {
    for (dir, record) in records(&global.root)? {
        if record.holder
            && !record.sandbox.is_alive()
            && let Err(error) = remove(&dir, Some(&record)).await
        {
            log::warn!("{error}");
        }
    }
    Ok(())
}
