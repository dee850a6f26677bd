//! User namespaces that tell the kernel how it has to map the ids of a mount (mount_setattr(2),
//! `MOUNT_ATTR_IDMAP`).

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
};

use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{WaitId, WaitIdOptions, waitid},
};

use crate::{
    bundle::IdMap,
    error::{Error, Result},
    mount::mount_setattr,
};

/// Maps the ids of a detached tree of mounts. `source` is for the error text.
pub(crate) fn apply(tree: BorrowedFd<'_>, map: &IdMap, source: &Path) -> Result<()> {
    let what = || format!("cannot map the ids of {}", source.display());
    let namespace = user_namespace(map).map_err(|e| Error::because(what(), e))?;
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: namespace.as_raw_fd().unsigned_abs().into(),
    };
    mount_setattr(tree, map.recursive, &attr).map_err(|e| match e.raw_os_error() {
        Some(libc::EINVAL) => Error::new(format!(
            "{}: its file system, or this host's kernel for it, has no id-mapped mounts",
            what()
        )),
        Some(libc::EPERM) => Error::new(format!("{}: they are mapped already", what())),
        _ => Error::because(what(), e),
    })
}

/// Makes a user namespace with these mappings and no process.
fn user_namespace(map: &IdMap) -> io::Result<OwnedFd> {
    let (gate, open) = pipe_with(PipeFlags::CLOEXEC)?;
    let (pid, pidfd) = clone_user(gate.as_raw_fd(), open.as_raw_fd())?;
    drop(gate);
    let namespace = write_maps(pid, map).and_then(|()| File::open(format!("/proc/{pid}/ns/user")));
    drop(open);
    // The child sends no signal at its end, so waitid(2) needs `__WALL`.
    let options =
        WaitIdOptions::EXITED | WaitIdOptions::from_bits_retain(libc::__WALL.cast_unsigned());
    waitid(WaitId::PidFd(pidfd.as_fd()), options)?;
    namespace.map(OwnedFd::from)
}

fn write_maps(pid: i32, map: &IdMap) -> io::Result<()> {
    for (file, text) in [("uid_map", &map.uids), ("gid_map", &map.gids)] {
        fs::write(format!("/proc/{pid}/{file}"), text).map_err(|e| {
            let map = text.trim_end().replace('\n', ", ");
            io::Error::new(e.kind(), format!("the kernel refuses the {file} {map:?}"))
        })?;
    }
    Ok(())
}

/// Makes a child in a user namespace of its own. It ends when all other copies of `open` are
/// closed.
fn clone_user(gate: RawFd, open: RawFd) -> io::Result<(i32, OwnedFd)> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: `clone_args` is plain data, in which zeros mean that nothing is asked for.
    let mut clone: libc::clone_args = unsafe { std::mem::zeroed() };
    clone.flags = (libc::CLONE_NEWUSER | libc::CLONE_PIDFD).cast_unsigned().into();
    clone.pidfd = (&raw mut pidfd) as u64;
    // SAFETY: without CLONE_VM and without a stack this is a fork: the child has a copy of this
    // memory. The child makes system calls only, touches no lock and never returns.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw mut clone, size_of::<libc::clone_args>()) };
    if pid == 0 {
        let mut byte = 0_u8;
        // SAFETY: the descriptor table is a copy, and nothing in this process uses the descriptor.
        unsafe { libc::close(open) };
        // SAFETY: at most one byte is read into a live variable.
        unsafe { libc::read(gate, (&raw mut byte).cast(), 1) };
        // SAFETY: ends this process and runs nothing else of it.
        unsafe { libc::_exit(0) };
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has stored a new descriptor in `pidfd`, and nothing else owns it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok((i32::try_from(pid).map_err(io::Error::other)?, pidfd))
}
