//! Copies of the host's volumes in the guest. What the host changes is written there again.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use isopod_protocol::agent::{self, volume_file::Content};
use rustix::{
    fs::inotify::{self, CreateFlags, WatchFlags},
    io::Errno,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    bundle::{Projected, VolumeContent, VolumeFile, read_volume},
    descriptor::wait_for,
    error::{ErrorKind, Explain, Result},
    event_loop::{AbortOnDrop, blocking},
    logger,
    microvm::agent::Agent,
};

/// Most attempts to read a volume that its kubelet changes at the same time.
const ATTEMPTS: u32 = 10;

/// A volume of the host that is open. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct OpenVolume {
    /// The container's wish.
    pub volume: Projected,
    /// A detached mount of the volume. So the host can unmount the volume at any time.
    tree: Arc<OwnedFd>,
}

impl OpenVolume {
    /// The volume that the detached mount `tree` shows.
    pub(crate) fn new(volume: Projected, tree: OwnedFd) -> Self {
        Self { volume, tree: Arc::new(tree) }
    }

    /// Takes the volume apart, to be passed to another process.
    pub(crate) fn into_parts(self) -> Result<(Projected, OwnedFd)> {
        let tree = Arc::try_unwrap(self.tree).or_else(|tree| tree.try_clone());
        Ok((self.volume, tree.explain(|| "cannot duplicate a descriptor".into())?))
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/.", self.tree.as_raw_fd()))
    }
}

/// A volume and what the guest has of it.
#[derive(Debug)]
pub(crate) struct Copied {
    open: OpenVolume,
    /// Readable after a change of the volume's names. A kubelet changes files by a new link.
    changes: AsyncFd<OwnedFd>,
    files: Vec<VolumeFile>,
}

impl Copied {
    /// Reads all volumes.
    ///
    /// # Errors
    ///
    /// If one cannot be read.
    pub(crate) async fn all(volumes: Vec<OpenVolume>) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for open in volumes {
            let path = open.volume.path.clone();
            let copied = Self::of(open).await;
            all.push(copied.explain(|| format!("cannot copy the volume {}", path.display()))?);
        }
        Ok(all)
    }

    async fn of(open: OpenVolume) -> io::Result<Self> {
        // Before the first look, so that no change is missed.
        let changes = watch(&open)?;
        let mut attempt = 1;
        loop {
            match read(&open).await {
                Err(error) if is_gone(&error) && attempt < ATTEMPTS => attempt += 1,
                files => return Ok(Self { files: files?, open, changes }),
            }
        }
    }

    /// The content for the guest.
    pub(crate) fn content(&self) -> agent::VolumeContent {
        agent::VolumeContent {
            key: self.open.volume.key.clone(),
            files: self.files.iter().map(file).collect(),
            ..Default::default()
        }
    }

    /// Writes what the host changes to the guest, until the result is dropped.
    pub(crate) fn follow(self, agent: Agent) -> AbortOnDrop<()> {
        AbortOnDrop(tokio::spawn(logger::inherit(self.serve(agent))))
    }

    async fn serve(mut self, agent: Agent) {
        let path = self.open.volume.path.clone();
        let name = path.display();
        loop {
            if let Err(error) = self.changed().await {
                return log::warn!("changes of the volume {name} are not seen any more: {error}");
            }
            match read(&self.open).await {
                Ok(files) if files == self.files => continue,
                Ok(files) => self.files = files,
                // The removal of what had the file is a change too.
                Err(error) if is_gone(&error) => continue,
                Err(error) => {
                    log::warn!("the guest keeps its copy of the volume {name}: {error}");
                    continue;
                }
            }
            match agent.update_volume(self.content()).await {
                Ok(()) => log::debug!("the guest has a new copy of the volume {name}"),
                Err(error) if error.kind == ErrorKind::VmLost => return,
                Err(error) => log::warn!("the guest keeps its copy of the volume {name}: {error}"),
            }
        }
    }

    /// Waits for changes, and takes all that have been reported.
    async fn changed(&self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        let take = |fd: &OwnedFd| Ok(rustix::io::read(fd, &mut buffer)?);
        self.changes.async_io(Interest::READABLE, take).await?;
        loop {
            match rustix::io::read(self.changes.get_ref(), &mut buffer) {
                Ok(_) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Watches the names in the volume's directory.
fn watch(open: &OpenVolume) -> io::Result<AsyncFd<OwnedFd>> {
    let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let names = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE | WatchFlags::ONLYDIR;
    inotify::add_watch(&fd, open.path(), names)?;
    wait_for(fd)
}

/// Reads the files of a volume.
async fn read(open: &OpenVolume) -> io::Result<Vec<VolumeFile>> {
    let open = open.clone();
    let read = blocking(move || Ok(read_volume(&open.path()))).await;
    read.unwrap_or_else(|error| Err(io::Error::other(error.message)))
}

/// A file has gone between the look at its directory and the look at itself.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

fn file(file: &VolumeFile) -> agent::VolumeFile {
    let content = match &file.content {
        VolumeContent::Directory => None,
        VolumeContent::Data(data) => Some(Content::Data(data.clone())),
        VolumeContent::Link(target) => Some(Content::Target(target.clone())),
    };
    agent::VolumeFile {
        path: file.path.clone(),
        mode: file.mode,
        uid: file.uid,
        gid: file.gid,
        modified_ns: file.modified_ns,
        content,
        ..Default::default()
    }
}
