//! The place of a container on the host, outside the microVM: record, cgroup, hooks.

use std::{path::PathBuf, sync::Arc, time::Duration};

use oci_spec::runtime::LinuxResources;

use crate::{
    bundle::{Bind, RESOLV_CONF},
    cgroup::{CgroupPlan, CpuLimits},
    clock,
    engine::{
        Record, RuntimeNamespace,
        hooks::{self, Point},
    },
    error::{Error, Explain, Result},
    event_loop::blocking,
    network::Network,
    oom_score,
    process_id::ProcessId,
    sandbox_process::launch::Launch,
    state::{
        PROCESS_FILE, StateDir, Status,
        versions::{CONTROL_VERSION, STATE_VERSION},
    },
};

/// Longest time for a VMM to end that was killed.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// The place of a container on the host.
pub(super) struct Place {
    pub(super) dir: Arc<StateDir>,
    /// The record as it is until the engine has the container.
    pub(super) record: Record,
    /// Namespaces and cgroup that this process comes from, if there are hooks.
    pub(super) origin: Option<RuntimeNamespace>,
    /// True once the record is written: the container exists from then on.
    known: bool,
}

impl Place {
    /// The place of the container in the state directory `dir`. Nothing is made yet.
    pub(super) fn new(
        launch: &Launch,
        dir: &Arc<StateDir>,
        origin: Option<RuntimeNamespace>,
    ) -> Result<Self> {
        Ok(Self { dir: Arc::clone(dir), record: first_record(launch)?, origin, known: false })
    }

    /// Makes the place. Returns the network of the namespace that this process is in.
    pub(super) async fn prepare(&mut self, launch: &Launch) -> Result<Network> {
        let network = Network::new(launch.bundle.network.clone(), resolv_conf(launch))?;
        self.record.network = network.taken();
        let process = serde_json::to_vec(launch.bundle.spec.process())
            .explain(|| "cannot write the process".into())?;
        self.dir.write(PROCESS_FILE, &process)?;
        self.record.write(&self.dir)?;
        self.known = true;
        self.enter_cgroup(launch)?;
        for point in [Point::Prestart, Point::CreateRuntime] {
            hooks::run(point, &self.record, self.origin.as_ref()).await?;
        }
        let process = launch.bundle.spec.process().as_ref();
        oom_score::adjust(process.and_then(|process| process.oom_score_adj()))?;
        Ok(network)
    }

    /// Moves this process into the container's cgroup: callers of runc look for the cgroup of its
    /// pid. All later processes of the sandbox inherit it.
    fn enter_cgroup(&mut self, launch: &Launch) -> Result<()> {
        let Some(cgroup) = &self.record.cgroup else { return Ok(()) };
        let Err(error) = cgroup.enter() else { return Ok(()) };
        self.record.cgroup = None;
        if launch.cgroup.as_ref().is_some_and(CgroupPlan::is_asked_for) {
            return Err(error);
        }
        log::debug!("no cgroup of its own: {error}");
        self.record.write(&self.dir)
    }

    /// The processes of the host that stand for the container.
    pub(super) fn processes(&self) -> Vec<i32> {
        let processes = [Some(self.record.sandbox), self.record.vmm].into_iter().flatten();
        processes.map(|process| process.pid).collect()
    }

    /// Limits the microVM on the host, if its limits are the container's.
    pub(super) async fn limit(&self) -> Result<()> {
        let cgroup = self.record.cgroup.clone().filter(|_| self.record.bounds_microvm());
        let Some(cgroup) = cgroup else { return Ok(()) };
        let limits = CpuLimits::of(&self.record.resources);
        // systemd's client is waited for.
        blocking(move || cgroup.limit(&limits)).await
    }

    /// Removes the place, after everything that was made in the microVM.
    pub(super) async fn take_down(self, launch: &Launch) {
        // A VMM that was killed holds devices and its cgroup until it has gone.
        if let Some(vmm) = self.record.vmm
            && !matches!(blocking(move || Ok(vmm.wait(END_TIMEOUT))).await, Ok(true))
        {
            log::error!("the VMM of container {} does not end", launch.id);
        }
        if let (Some(cgroup), Some(plan)) = (&self.record.cgroup, &launch.cgroup) {
            cgroup.leave(plan.caller());
            let cgroup = cgroup.clone();
            if let Err(error) = blocking(move || cgroup.remove()).await {
                log::error!("{error}");
            }
        }
        match self.dir.remove() {
            Ok(true) if self.known => {
                hooks::run_poststop(&self.record, self.origin.as_ref()).await;
            }
            Ok(_) => {}
            Err(error) => log::error!("{error}"),
        }
    }
}

/// The record of a container at its beginning.
fn first_record(launch: &Launch) -> Result<Record> {
    let sandbox = ProcessId::own().ok_or_else(|| Error::new("cannot read /proc/self/stat"))?;
    let bundle = &launch.bundle;
    let annotations = bundle.spec.annotations().iter().flatten();
    Ok(Record {
        version: STATE_VERSION,
        control_version: CONTROL_VERSION,
        id: launch.id.clone(),
        oci_version: bundle.spec.version().clone(),
        bundle: bundle.dir.clone(),
        rootfs: bundle.rootfs.clone(),
        sandbox,
        vmm: None,
        vm: bundle.vm,
        pod: launch.pod.as_ref().map(|member| member.pod.clone()),
        resources: resources(launch),
        status: Status::Creating,
        created: clock::timestamp(),
        owner_uid: launch.owner_uid,
        annotations: annotations.map(|(key, value)| (key.clone(), value.clone())).collect(),
        cgroup: launch.cgroup.as_ref().map(CgroupPlan::plan).transpose()?,
        hooks: bundle.spec.hooks().clone(),
        exit: None,
        error: None,
        lost: false,
        network: None,
    })
}

/// The limits of config.json, without rules for devices: no update changes these.
fn resources(launch: &Launch) -> LinuxResources {
    let linux = launch.bundle.spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().clone());
    let mut resources = resources.unwrap_or_default();
    resources.set_devices(None);
    resources
}

/// The host's file that is the container's /etc/resolv.conf, if the engine mounts one.
fn resolv_conf(launch: &Launch) -> Option<PathBuf> {
    let mounts = launch.bundle.spec.mounts().as_ref()?;
    let mounted = |bind: &&Bind| {
        mounts.get(bind.mount).is_some_and(|mount| mount.destination() == RESOLV_CONF)
    };
    launch.bundle.binds.iter().find(mounted).map(|bind| bind.source.clone())
}
