//! The place of a container on the host, outside the microVM: record, cgroup, hooks.

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{
    bundle::{Bind, Bundle, RESOLV_CONF},
    cgroup::{Cgroup, CpuLimits},
    engine::{
        hooks::{self, Point},
        record::Record,
        runtime_namespace::RuntimeNamespace,
    },
    error::{Explain, Result},
    event_loop::blocking,
    network::Network,
    state::{PROCESS_FILE, StateDir},
};

/// Longest time for a VMM to end that was killed.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// The place of a container on the host.
pub(crate) struct Place {
    pub(crate) dir: Arc<StateDir>,
    /// The record as it is until the engine has the container.
    pub(crate) record: Record,
    /// Namespaces and cgroup that the hooks run in, if there are hooks.
    pub(crate) origin: Option<RuntimeNamespace>,
    /// True once the record is written: the container exists from then on.
    known: bool,
}

/// Makes a cgroup, and may move the calling process into it.
pub(crate) type MakeCgroup = fn(&Cgroup) -> Result<()>;

impl Place {
    /// The place of a container with this record in the state directory `dir`. Nothing is made yet.
    pub(crate) fn new(
        dir: Arc<StateDir>,
        record: Record,
        origin: Option<RuntimeNamespace>,
    ) -> Self {
        Self { dir, record, origin, known: false }
    }

    /// Makes the place. `cgroup_is_asked_for` is true if the container cannot do without its cgroup.
    /// Returns the network of the namespace that this thread is in.
    ///
    /// # Errors
    ///
    /// If a part cannot be made, or a hook fails. [`Self::take_down`] removes the rest.
    pub(crate) async fn prepare(
        &mut self,
        bundle: &Bundle,
        make_cgroup: MakeCgroup,
        cgroup_is_asked_for: bool,
    ) -> Result<Network> {
        let network = Network::new(bundle.network.clone(), resolv_conf(bundle))?;
        self.record.network = network.taken();
        let process = serde_json::to_vec(bundle.spec.process())
            .explain(|| "cannot write the process".into())?;
        self.dir.write(PROCESS_FILE, &process)?;
        self.record.write(&self.dir)?;
        self.known = true;
        if let Some(cgroup) = &self.record.cgroup
            && let Err(error) = make_cgroup(cgroup)
        {
            self.record.cgroup = None;
            if cgroup_is_asked_for {
                return Err(error);
            }
            log::debug!("no cgroup of its own: {error}");
            self.record.write(&self.dir)?;
        }
        for point in [Point::Prestart, Point::CreateRuntime] {
            hooks::run(point, &self.record, self.origin.as_ref()).await?;
        }
        Ok(network)
    }

    /// Limits the microVM on the host, if its limits are the container's.
    pub(crate) async fn limit(&self) -> Result<()> {
        let cgroup = self.record.cgroup.clone().filter(|_| self.record.bounds_microvm());
        let Some(cgroup) = cgroup else { return Ok(()) };
        let limits = CpuLimits::of(&self.record.resources);
        // systemd's client is waited for.
        blocking(move || cgroup.limit(&limits)).await
    }

    /// Removes the place, after everything that was made in the microVM. This process has left the
    /// container's cgroup.
    pub(crate) async fn take_down(self) {
        let Self { dir, record, origin, known } = self;
        // A VMM that was killed holds devices and its cgroup until it has gone.
        if let Some(vmm) = record.vmm
            && !matches!(blocking(move || Ok(vmm.wait(END_TIMEOUT))).await, Ok(true))
        {
            log::error!("the VMM of container {} does not end", record.id);
        }
        if let Some(cgroup) = record.cgroup.clone()
            && let Err(error) = blocking(move || cgroup.remove()).await
        {
            log::error!("{error}");
        }
        match dir.remove() {
            Ok(true) if known => hooks::run_poststop(&record, origin.as_ref()).await,
            Ok(_) => {}
            Err(error) => log::error!("{error}"),
        }
    }
}

/// The host's file that is the container's /etc/resolv.conf, if the engine mounts one.
fn resolv_conf(bundle: &Bundle) -> Option<PathBuf> {
    let mounts = bundle.spec.mounts().as_ref()?;
    let mounted = |bind: &&Bind| {
        mounts.get(bind.mount).is_some_and(|mount| mount.destination() == RESOLV_CONF)
    };
    bundle.binds.iter().find(mounted).map(|bind| bind.source.clone())
}
