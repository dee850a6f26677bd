//! The state of the guest as a whole: its containers, and set-up common to all of them.
//!
//! The table of containers has one lock, held for lookups only. Slow work happens on one container,
//! and so does not delay calls on another.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::io::Write as _;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use isopod_protocol::agent::{HostSocket, Network, SharedMemory, VolumeContent};
use rustix::system::RebootCommand;
use rustix::time::{ClockId, Timespec, clock_settime};
use tokio::sync::Notify;

use crate::container::cgroup::{self, Cgroup};
use crate::container::stdio::Connections;
use crate::container::terminal::Screen;
use crate::container::{Container, Document, blocking};
use crate::error::{Code, Context as _, Error, Result};
use crate::host_sockets::HostSockets;
use crate::log::log_warn;
use crate::network::Forwards;
use crate::reaper::Reaper;
use crate::share::{self, CacheDrops};
use crate::shm::SharedMemories;
use crate::stream::Streams;

/// Longest id of a container, which becomes the name of a cgroup.
const MAX_ID: usize = 255;

/// The agent's state.
pub(crate) struct Guest {
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) streams: Arc<Streams>,
    pub(crate) forwards: Forwards,
    containers: Mutex<HashMap<String, Known>>,
    /// Notified when a creation proceeds, succeeds or fails.
    settled: Notify,
    set_up: AtomicBool,
    cache_drops: Arc<CacheDrops>,
    memories: Arc<SharedMemories>,
    host_sockets: HostSockets,
}

/// Sources of a container's mounts that the guest has in place of the host's.
pub(crate) struct Sources {
    pub(crate) memory: Vec<SharedMemory>,
    /// Contents of some of these memories.
    pub(crate) volumes: Vec<VolumeContent>,
    pub(crate) sockets: Vec<HostSocket>,
}

/// An entry of the table of containers.
enum Known {
    /// A container that is being created, with its cgroup once there is one.
    Creating(Option<Arc<Cgroup>>),
    There(Arc<Container>),
}

impl Known {
    /// The pid of a container's first process, unless it has ended.
    fn init(&self) -> Option<i32> {
        let Self::There(container) = self else { return None };
        let init = container.process("").ok()?;
        (!init.has_ended()).then(|| init.pid())
    }
}

impl Guest {
    pub(crate) fn new(reaper: Arc<Reaper>, streams: Arc<Streams>) -> Self {
        let set_up = AtomicBool::new(false);
        Self {
            reaper,
            streams,
            forwards: Forwards::default(),
            containers: Mutex::default(),
            settled: Notify::new(),
            set_up,
            cache_drops: Arc::default(),
            memories: Arc::default(),
            host_sockets: HostSockets::default(),
        }
    }

    /// Mounts the shared directory, sets the clock and mixes in entropy. A second call is an error.
    pub(crate) fn set_up(&self, tag: &str, realtime_ns: u64, entropy: &[u8]) -> Result<()> {
        if self.set_up.swap(true, Ordering::Relaxed) {
            return Err(Error::state("the guest has been set up before"));
        }
        if realtime_ns != 0 {
            let seconds = i64::try_from(realtime_ns / 1_000_000_000);
            let nanoseconds = i64::try_from(realtime_ns % 1_000_000_000);
            if let (Ok(tv_sec), Ok(tv_nsec)) = (seconds, nanoseconds) {
                clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec })
                    .context(|| "set the guest's clock")?;
            }
        }
        if !entropy.is_empty() {
            fs::File::options()
                .write(true)
                .open("/dev/urandom")
                .and_then(|mut pool| pool.write_all(entropy))
                .context(|| "mix entropy into the guest's random pool")?;
        }
        share::attach(tag)
    }

    /// Creates a container and returns the pid of its first process.
    pub(crate) async fn create(
        &self,
        id: String,
        document: Document,
        connections: Connections,
        screen: Screen,
        network: Option<Network>,
        sources: Sources,
    ) -> Result<i32> {
        let Sources { memory, volumes, sockets } = sources;
        check_id(&id)?;
        match self.containers().entry(id.clone()) {
            Entry::Occupied(_) => {
                return Err(Error::state(format!("container {id:?} exists already")));
            }
            Entry::Vacant(vacant) => vacant.insert(Known::Creating(None)),
        };
        let created = match self.host_sockets.join(&id, &sockets) {
            Ok(()) => {
                self.build(&id, document, connections, screen, network, (memory, volumes)).await
            }
            Err(error) => Err(error),
        };
        let pid = created.and_then(|container| {
            let pid = container.process("")?.pid();
            self.containers().insert(id.clone(), Known::There(Arc::new(container)));
            Ok(pid)
        });
        if pid.is_err() {
            self.host_sockets.leave(&id);
            self.containers().remove(&id);
        }
        self.settled.notify_waiters();
        pid
    }

    /// Builds a container that so far has only an entry in the table.
    async fn build(
        &self,
        id: &str,
        document: Document,
        connections: Connections,
        screen: Screen,
        network: Option<Network>,
        (memory, volumes): (Vec<SharedMemory>, Vec<VolumeContent>),
    ) -> Result<Container> {
        let name = id.to_owned();
        let cgroup = Arc::new(blocking(move || Cgroup::create(&name)).await?);
        // From here on a deletion can end the container's processes.
        self.containers().insert(id.to_owned(), Known::Creating(Some(Arc::clone(&cgroup))));
        self.settled.notify_waiters();
        let reaper = Arc::clone(&self.reaper);
        let find = |id: &str| self.container(id);
        let made = Arc::clone(&cgroup);
        let prepared = match self.join_memory(id, memory).await {
            // Another container may have a newer copy already, which its host side keeps up to date.
            Ok(made) => {
                let new = volumes.into_iter().filter(|content| made.contains(&content.key));
                self.write_volumes(new.collect()).await
            }
            Err(error) => Err(error),
        };
        let created = match prepared {
            Ok(()) => {
                Container::create(reaper, made, document, connections, screen, network, find).await
            }
            Err(error) => Err(error),
        };
        if created.is_err() {
            for left in [self.leave_memory(id).await, blocking(move || cgroup.remove()).await] {
                if let Err(left) = left {
                    log_warn!("{left}");
                }
            }
        }
        created
    }

    /// Ends and forgets a container, and makes a creation under way fail. A missing container is no
    /// error.
    ///
    /// After an error the container can be deleted again.
    pub(crate) async fn delete(&self, id: &str) -> Result<()> {
        let container = loop {
            let mut settled = pin!(self.settled.notified());
            // Enabled before the lookup, so that no notification is lost between the two.
            settled.as_mut().enable();
            let creating = match self.containers().get(id) {
                None => None,
                Some(Known::There(container)) => break Arc::clone(container),
                Some(Known::Creating(cgroup)) => Some(cgroup.clone()),
            };
            match creating {
                // A failed creation may have looked up files of the share.
                None => return release(id).await,
                // Without its cgroup the container can get no more processes.
                Some(Some(cgroup)) => blocking(move || cgroup.remove()).await?,
                Some(None) => {}
            }
            settled.await;
        };
        container.end().await?;
        container.remove().await?;
        self.host_sockets.leave(id);
        self.leave_memory(id).await?;
        release(id).await?;
        let mut containers = self.containers();
        // Another call may have deleted the container meanwhile, and a new one may have its name.
        if let Some(Known::There(known)) = containers.get(id)
            && Arc::ptr_eq(known, &container)
        {
            containers.remove(id);
        }
        Ok(())
    }

    async fn join_memory(&self, id: &str, wanted: Vec<SharedMemory>) -> Result<Vec<String>> {
        let (all, id) = (Arc::clone(&self.memories), id.to_owned());
        blocking(move || all.join(&id, &wanted)).await
    }

    /// Writes the contents of volumes into their shared memories.
    pub(crate) async fn write_volumes(&self, contents: Vec<VolumeContent>) -> Result<()> {
        if contents.is_empty() {
            return Ok(());
        }
        let all = Arc::clone(&self.memories);
        blocking(move || contents.iter().try_for_each(|content| all.write(content))).await
    }

    async fn leave_memory(&self, id: &str) -> Result<()> {
        let (all, id) = (Arc::clone(&self.memories), id.to_owned());
        blocking(move || all.leave(&id)).await
    }

    /// Drops unused dentries and inodes from the kernel's caches, at most once a second.
    pub(crate) async fn drop_caches(&self) -> Result<()> {
        let cache_drops = Arc::clone(&self.cache_drops);
        let inits: Vec<i32> = self.containers().values().filter_map(Known::init).collect();
        blocking(move || cache_drops.request(&inits)).await
    }

    /// The container with this id. A container that is still being created is an error.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        match self.containers().get(id) {
            Some(Known::There(container)) => Ok(Arc::clone(container)),
            Some(Known::Creating(_)) => {
                Err(Error::state(format!("container {id:?} is being created")))
            }
            None => Err(Error::new(Code::NotFound, format!("no container {id:?}"))),
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Releases the container's part of the share.
async fn release(id: &str) -> Result<()> {
    let id = id.to_owned();
    blocking(move || share::release(&id)).await
}

fn check_id(id: &str) -> Result<()> {
    let usable = (1..=MAX_ID).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+-.".contains(&b))
        && !matches!(id, "." | "..");
    // The kernel reserves this prefix for a cgroup's own files.
    if usable && !id.starts_with("cgroup.") {
        return Ok(());
    }
    Err(Error::new(Code::InvalidArgument, format!("{id:?} cannot be the id of a container")))
}

/// Ends all containers, syncs all file systems and restarts the machine, which ends the microVM.
pub(crate) fn power_off() {
    cgroup::kill_all_containers();
    rustix::fs::sync();
    if let Err(e) = share::detach() {
        log_warn!("{e}");
    }
    // The kernel's restart message would cost two VM exits for each character on the console.
    let console_level = |level: &str| std::fs::write("/proc/sys/kernel/printk", level);
    let _ = console_level("0");
    if let Err(e) = rustix::system::reboot(RebootCommand::Restart) {
        let _ = console_level("7");
        crate::log::log_error!("cannot restart the guest: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::check_id;

    #[test]
    fn ids_become_names_of_cgroups() {
        for id in ["a", "A-b_c.d+0", &"x".repeat(255)] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "cgroup.procs", "a b", &"x".repeat(256)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
