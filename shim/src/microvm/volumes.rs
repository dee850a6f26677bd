//! Copies of the host's volumes in the guest. What the host changes is written there again.

use std::{
    io::{self, ErrorKind as IoErrorKind},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use isopod_protocol::agent::{self, volume_file::Content};
use tokio::time::sleep;

use crate::{
    bundle::{MAX_COPIED_BYTES, Projected, VolumeContent, VolumeFile, VolumeState, read_volume},
    error::{ErrorKind, Explain, Result},
    event_loop::{AbortOnDrop, blocking},
    logger,
    microvm::agent::Agent,
};

/// Time between two looks at a volume. A kubelet changes a volume about once a minute. A watch by
/// inotify for each volume would use up the host's instances (`fs.inotify.max_user_instances`).
const LOOK: Duration = Duration::from_secs(2);

/// Looks after a change, and after the start, that write the volume whatever they find. A kubelet may
/// set owners a moment after the swap, and another container may have written an older version.
const SETTLING: u32 = 3;

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

    /// The state of the volume now.
    fn state(&self) -> VolumeState {
        VolumeState::of(self.tree.as_fd())
    }

    /// Reads the volume, at most `room` bytes. Returns what is left of these too.
    async fn read(&self, room: u64) -> io::Result<(Vec<VolumeFile>, u64)> {
        let open = self.clone();
        let mut room = room;
        let read = move || Ok(read_volume(open.tree.as_fd(), &mut room).map(|files| (files, room)));
        blocking(read).await.unwrap_or_else(|error| Err(io::Error::other(error.message)))
    }

    fn content(&self, files: &[VolumeFile]) -> agent::VolumeContent {
        agent::VolumeContent {
            key: self.volume.key.clone(),
            files: files.iter().map(file).collect(),
            ..Default::default()
        }
    }
}

/// Reads all volumes of a container.
///
/// # Errors
///
/// If one cannot be read, or they have become too large for a copy.
pub(crate) async fn read_all(volumes: &[OpenVolume]) -> Result<Vec<agent::VolumeContent>> {
    let mut room = MAX_COPIED_BYTES;
    let mut contents = Vec::new();
    for open in volumes {
        let what = || format!("cannot copy the volume {}", open.volume.path.display());
        let (files, left) = open.read(room).await.explain(what)?;
        room = left;
        contents.push(open.content(&files));
    }
    Ok(contents)
}

/// Writes what the host changes to the guest, until the result is dropped.
pub(crate) fn follow(open: OpenVolume, agent: Agent) -> AbortOnDrop<()> {
    AbortOnDrop(tokio::spawn(logger::inherit(serve(open, agent))))
}

async fn serve(open: OpenVolume, agent: Agent) {
    let mut seen = open.state();
    let mut settling = SETTLING;
    // The log has one line for a volume that cannot be copied, not one for each look.
    let mut warned = false;
    loop {
        sleep(LOOK).await;
        let state = open.state();
        if state != seen {
            (seen, settling) = (state, SETTLING);
        }
        if settling == 0 {
            continue;
        }
        let written = match open.read(MAX_COPIED_BYTES).await {
            Ok((files, _)) => agent.update_volume(open.content(&files)).await,
            // The next look comes when the kubelet is done.
            Err(error) if error.kind() == IoErrorKind::Interrupted => continue,
            Err(error) => Err(error).explain(|| "cannot read it".into()),
        };
        match written {
            Ok(()) => (settling, warned) = (settling - 1, false),
            Err(error) if error.kind == ErrorKind::VmLost => return,
            Err(error) if warned => log::debug!("{error}"),
            Err(error) => {
                warned = true;
                let path = open.volume.path.display();
                log::warn!("the guest keeps an old copy of the volume {path}: {error}");
            }
        }
    }
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
