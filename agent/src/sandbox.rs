//! The state of the guest as a whole: its containers, and what is done once for all of them.
//!
//! There is one lock for the table of containers, held for lookups only; everything that takes time
//! happens on a container of its own, so that no call on one holds up a call on another.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use isopod_protocol::SHARED_DIR;
use isopod_protocol::agent::Network;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
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
}

/// What the table has of a container.
enum Known {
    /// It is being created, in this cgroup once that has been made.
    Creating(Option<Arc<Cgroup>>),
    There(Arc<Container>),
}

impl Sandbox {
    pub(crate) fn new(reaper: Arc<Reaper>, streams: Arc<Streams>) -> Self {
        let set_up = AtomicBool::new(false);
        Self { reaper, streams, containers: Mutex::default(), settled: Notify::new(), set_up }
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
        fs::create_dir_all(SHARED_DIR).context(|| format!("create {SHARED_DIR}"))?;
        mount(tag, SHARED_DIR, "virtiofs", MountFlags::empty(), None)
            .context(|| format!("mount the shared directory {tag:?} on {SHARED_DIR}"))
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
    ) -> Result<i32> {
        check_id(&id)?;
        match self.containers().entry(id.clone()) {
            Entry::Occupied(_) => return Err(Error::state(format!("container {id:?} exists"))),
            Entry::Vacant(vacant) => vacant.insert(Known::Creating(None)),
        };
        let created = self.build(&id, document, connections, screen, network).await;
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
    ) -> Result<Container> {
        let name = id.to_owned();
        let cgroup = Arc::new(blocking(move || Cgroup::create(&name)).await?);
        // From here on its processes can be ended by whoever deletes it.
        self.containers().insert(id.to_owned(), Known::Creating(Some(Arc::clone(&cgroup))));
        self.settled.notify_waiters();
        let reaper = Arc::clone(&self.reaper);
        let find = |id: &str| self.container(id);
        let made = Arc::clone(&cgroup);
        let created = Container::create(reaper, made, document, connections, screen, network, find);
        let created = created.await;
        if created.is_err()
            && let Err(left) = blocking(move || cgroup.remove()).await
        {
            log_warn!("{left}");
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
                None => return forget_files().await,
                // Without its cgroup no process of it can be born any more.
                Some(Some(cgroup)) => blocking(move || cgroup.remove()).await?,
                Some(None) => {}
            }
            settled.await;
        };
        container.end().await?;
        container.remove().await?;
        forget_files().await?;
        let mut containers = self.containers();
        // Unless somebody else has deleted it meanwhile and there is a new one with its name.
        if let Some(Known::There(known)) = containers.get(id)
            && Arc::ptr_eq(known, &container)
        {
            containers.remove(id);
        }
        Ok(())
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

/// Has the kernel forget the files that nobody uses: the host holds each one that this kernel knows of,
/// those of a container that is no more among them, and its file systems with them.
async fn forget_files() -> Result<()> {
    blocking(|| {
        fs::write("/proc/sys/vm/drop_caches", "2").context(|| "have the kernel forget files")
    })
    .await
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
    if Path::new(SHARED_DIR).exists()
        && let Err(e) = unmount(SHARED_DIR, UnmountFlags::DETACH)
    {
        // It is only mounted once the sandbox has been set up.
        if e != rustix::io::Errno::INVAL {
            log_warn!("unmount {SHARED_DIR}: {e}");
        }
    }
    if let Err(e) = rustix::system::reboot(RebootCommand::Restart) {
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
