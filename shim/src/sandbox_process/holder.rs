//! The holder of a pod whose engine makes no first container: it boots the microVM, and ends with
//! the last container in it.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::{
    bundle::HOLDER_PROGRAM,
    control::connection::Connection,
    engine::Sandbox,
    error::{Explain, Result},
};

/// Directories of the root file system that are mount points. Root of a user namespace could not make
/// them in the guest.
const MOUNT_POINTS: [&str; 2] = ["proc", "dev"];

/// Makes the root file system of a holder at `rootfs`, in a tmpfs of this thread's mount namespace.
/// The guest can write to it, so it is small. The directory `rootfs` may be there.
pub(crate) fn make_root(rootfs: &Path) -> Result<()> {
    let what = || format!("cannot make the root file system {}", rootfs.display());
    fs::DirBuilder::new().recursive(true).mode(0o700).create(rootfs).explain(what)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("isopod", rootfs, "tmpfs", flags, c"mode=0755,size=64k,nr_inodes=64").explain(what)?;
    for name in MOUNT_POINTS {
        fs::create_dir(rootfs.join(name)).explain(what)?;
    }
    let program = rootfs.join(HOLDER_PROGRAM.trim_start_matches('/'));
    let made = fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(program);
    made.map(drop).explain(what)
}

/// Unmounts the root file system, so that its directory can be removed.
pub(super) fn remove_root(rootfs: &Path) {
    // It may be missing. If this fails, the end of the process unmounts it.
    let _ = unmount(rootfs, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
}

/// Waits until the command that has launched the holder is gone, and the microVM has no other
/// container. Nobody can add one from then on.
pub(super) async fn unused(sandbox: Sandbox, launcher: &mut Connection) {
    // A command that wants the microVM holds it before it goes.
    while matches!(launcher.receive().await, Ok(Some(_))) {}
    sandbox.left_alone().await;
}
