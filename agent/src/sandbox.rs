//! The state of the guest as a whole: its containers, and what is done once for all of them.
//!
//! There is one lock for the table of containers, held for lookups only; everything that takes time
//! happens on a container of its own, so that no call on one holds up a call on another.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::io::Write as _;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use isopod_protocol::agent::{Network, SharedMemory};
use rustix::system::RebootCommand;
use rustix::time::{ClockId, Timespec, clock_settime};
use tokio::sync::Notify;

use crate::container::cgroup::{self, Cgroup};
use crate::container::stdio::Connections;
use crate::container::terminal::Screen;
use crate::container::{Container, Document, blocking};
use crate::error::{Code, Context as _, Error, Result};
use crate::log::log_warn;
use crate::reaper::Reaper;
use crate::share::{self, Forgetting};
use crate::shm::SharedMemories;
use crate::stream::Streams;

/// Longest id of a container: it becomes the name of a cgroup.
const MAX_ID: usize = 255;

/// Everything that the agent knows.
pub(crate) struct Sandbox {
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) streams: Arc<Streams>,
    containers: Mutex<HashMap<String, Known>>,
    /// Told when a creation gets on, succeeds or fails.
    settled: Notify,
    set_up: AtomicBool,
    forgetting: Arc<Forgetting>,
    memories: Arc<SharedMemories>,
}

/// What the table has of a container.
enum Known {
    /// It is being created, in this cgroup once that has been made.
    Creating(Option<Arc<Cgroup>>),
    There(Arc<Container>),
}

impl Known {
    /// The pid of a container's first process, if that has not ended.
    fn init(&self) -> Option<i32> {
        let Self::There(container) = self else { return None };
        let init = container.process("").ok()?;
        (!init.has_ended()).then(|| init.pid())
    }
}

impl Sandbox {
    pub(crate) fn new(reaper: Arc<Reaper>, streams: Arc<Streams>) -> Self {
        let set_up = AtomicBool::new(false);
        Self {
            reaper,
            streams,
            containers: Mutex::default(),
            settled: Notify::new(),
            set_up,
            forgetting: Arc::default(),
            memories: Arc::default(),
        }
    }

    /// Mounts the shared directory, sets the clock and mixes in entropy.
    ///
    /// # Errors
    ///
    /// It has been done before, or the step that failed.
    pub(crate) fn set_up(&self, tag: &str, realtime_ns: u64, entropy: &[u8]) -> Result<()> {
        if self.set_up.swap(true, Ordering::Relaxed) {
            return Err(Error::state("the sandbox has been set up before"));
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
    ///
    /// # Errors
    ///
    /// The id is in use or cannot be used, or what [`Container::create`] reports.
    pub(crate) async fn create(
        &self,
        id: String,
        document: Document,
        connections: Connections,
        screen: Screen,
        network: Option<Network>,
        memory: Vec<SharedMemory>,
    ) -> Result<i32> {
        check_id(&id)?;
        match self.containers().entry(id.clone()) {
            Entry::Occupied(_) => return Err(Error::state(format!("container {id:?} exists"))),
            Entry::Vacant(vacant) => vacant.insert(Known::Creating(None)),
        };
        let created = self.build(&id, document, connections, screen, network, memory).await;
        let pid = created.and_then(|container| {
            let pid = container.process("")?.pid();
            self.containers().insert(id.clone(), Known::There(Arc::new(container)));
            Ok(pid)
        });
        if pid.is_err() {
            self.containers().remove(&id);
        }
        self.settled.notify_waiters();
        pid
    }

    /// Builds a container of which there is nothing yet but its place in the table.
    async fn build(
        &self,
        id: &str,
        document: Document,
        connections: Connections,
        screen: Screen,
        network: Option<Network>,
        memory: Vec<SharedMemory>,
    ) -> Result<Container> {
        let name = id.to_owned();
        let cgroup = Arc::new(blocking(move || Cgroup::create(&name)).await?);
        // From here on its processes can be ended by whoever deletes it.
        self.containers().insert(id.to_owned(), Known::Creating(Some(Arc::clone(&cgroup))));
        self.settled.notify_waiters();
        let reaper = Arc::clone(&self.reaper);
        let find = |id: &str| self.container(id);
        let made = Arc::clone(&cgroup);
        let created = match self.join_memory(id, memory).await {
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

    /// Ends and forgets a container, if there is one of this name. Its creation fails, if that is under
    /// way.
    ///
    /// # Errors
    ///
    /// Something of it cannot be removed; it can then be deleted again.
    pub(crate) async fn delete(&self, id: &str) -> Result<()> {
        let container = loop {
            let mut settled = pin!(self.settled.notified());
            // Before the look, so that nothing is missed between the two.
            settled.as_mut().enable();
            let creating = match self.containers().get(id) {
                None => None,
                Some(Known::There(container)) => break Arc::clone(container),
                Some(Known::Creating(cgroup)) => Some(cgroup.clone()),
            };
            match creating {
                // Its creation may have looked at files.
                None => return release(id).await,
                // Without its cgroup no process of it can be born any more.
                Some(Some(cgroup)) => blocking(move || cgroup.remove()).await?,
                Some(None) => {}
            }
            settled.await;
        };
        container.end().await?;
        container.remove().await?;
        self.leave_memory(id).await?;
        release(id).await?;
        let mut containers = self.containers();
        // Unless somebody else has deleted it meanwhile and there is a new one with its name.
        if let Some(Known::There(known)) = containers.get(id)
            && Arc::ptr_eq(known, &container)
        {
            containers.remove(id);
        }
        Ok(())
    }

    async fn join_memory(&self, id: &str, wanted: Vec<SharedMemory>) -> Result<()> {
        let (all, id) = (Arc::clone(&self.memories), id.to_owned());
        blocking(move || all.join(&id, &wanted)).await
    }

    async fn leave_memory(&self, id: &str) -> Result<()> {
        let (all, id) = (Arc::clone(&self.memories), id.to_owned());
        blocking(move || all.leave(&id)).await
    }

    /// Has the kernel forget the files that nobody uses, at most once a second.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub(crate) async fn forget_files(&self) -> Result<()> {
        let forgetting = Arc::clone(&self.forgetting);
        let inits: Vec<i32> = self.containers().values().filter_map(Known::init).collect();
        blocking(move || forgetting.forget(&inits)).await
    }

    /// The container with this id.
    ///
    /// # Errors
    ///
    /// There is none, or it is being created.
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

/// Lets go of the container's part of the share.
async fn release(id: &str) -> Result<()> {
    let id = id.to_owned();
    blocking(move || share::release(&id)).await
}

fn check_id(id: &str) -> Result<()> {
    let usable = (1..=MAX_ID).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+-.".contains(&b))
        && !matches!(id, "." | "..");
    // The kernel keeps these names for a cgroup's own files.
    if usable && !id.starts_with("cgroup.") {
        return Ok(());
    }
    Err(Error::new(Code::InvalidArgument, format!("{id:?} cannot be the id of a container")))
}

/// Ends all containers, writes everything back and restarts the machine, which ends the microVM.
pub(crate) fn power_off() {
    cgroup::kill_all_containers();
    rustix::fs::sync();
    if let Err(e) = share::detach() {
        log_warn!("{e}");
    }
    // The kernel's farewell on the console would take two exits for each letter.
    let console_level = |level: &str| std::fs::write("/proc/sys/kernel/printk", level);
    let _ = console_level("0");
    if let Err(e) = rustix::system::reboot(RebootCommand::Restart) {
        let _ = console_level("7");
        crate::log::log_error!("the guest cannot be restarted: {e}");
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
