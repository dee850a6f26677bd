//! What stands between the guest and the crate that serves files: requests that would do harm there
//! are refused or changed here, after they have been read from the guest's memory for good.

mod operations;

use std::io;

use fuse_backend_rs::abi::fuse_abi::{EntryOut, ROOT_ID};
use fuse_backend_rs::api::filesystem::{Context, DirEntry, Entry, FileSystem};
use fuse_backend_rs::passthrough::PassthroughFs;

use super::held::{Handle, Held, Opened};

/// Flags of an open that are the host's matter.
const HOST_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_DIRECTORY
    | libc::O_DSYNC
    | libc::O_NOATIME
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_TRUNC;

/// Flags of an open that are the guest's matter. `O_DIRECT` is one of them: it bypasses the guest's
/// cache, and what the guest reads and writes need not be aligned as the host's device wants it.
const GUEST_FLAGS: i32 = libc::O_ASYNC
    | libc::O_CLOEXEC
    | libc::O_CREAT
    | libc::O_DIRECT
    | libc::O_EXCL
    | libc::O_NOCTTY
    | libc::O_NOFOLLOW
    | O_LARGEFILE
    | FMODE_EXEC
    | FMODE_NONOTIFY;

/// The libc's is 0 where it is always on.
const O_LARGEFILE: i32 = 0o100_000;

/// Linux's own, which it does not take off (include/linux/fs.h): an open by `execve`, and one by
/// fanotify, which is a different bit in each version.
const FMODE_EXEC: i32 = 1 << 5;
const FMODE_NONOTIFY: i32 = 1 << 25 | 1 << 26;

/// The files of the share, as the guest may use them.
pub(super) struct Filter {
    files: PassthroughFs,
    held: Held,
}

fn error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// What the crate gets of the flags of an open. Flags that are not known could be any: with `O_PATH`
/// the host's kernel would ignore `O_CREAT` and `O_EXCL`, and follow a link.
fn host_flags(flags: u32) -> io::Result<u32> {
    if flags & !(HOST_FLAGS | GUEST_FLAGS) as u32 != 0 {
        return Err(error(libc::EINVAL));
    }
    Ok(flags & HOST_FLAGS as u32)
}

impl Filter {
    /// `files` for a guest that may have `max_descriptors` of nodes and handles.
    pub(super) fn new(files: PassthroughFs, max_descriptors: usize) -> Self {
        Self { files, held: Held::new(max_descriptors) }
    }

    /// Forgets all that a guest had. Nothing else may be asked meanwhile.
    ///
    /// # Errors
    ///
    /// When the share cannot be opened again.
    pub(super) fn begin(&self) -> io::Result<()> {
        drop(self.held.take_all());
        self.files.destroy();
        self.held.forgot_files();
        self.files.getattr(&Context::default(), ROOT_ID, None).map(|_| ())
    }

    /// Lists a directory from `offset`, until `add` returns 0. The entry's inode number is the one
    /// that `stat` gives. With `plus`, each entry that is added is one lookup more.
    ///
    /// # Errors
    ///
    /// What the share says.
    pub(super) fn list(
        &self,
        ctx: &Context,
        (node, handle): (u64, u64),
        (size, offset): (u32, u64),
        plus: bool,
        add: &mut dyn FnMut(&DirEntry<'_>, EntryOut) -> usize,
    ) -> io::Result<()> {
        self.held.room_for_files()?;
        self.files.readdirplus(ctx, node, handle, size, offset, &mut |entry, found| {
            let child = found.inode;
            self.held.saw_node(child);
            // A name is listed in any case.
            let tell = plus && self.held.room().is_ok();
            let len = add(&entry, if tell { found.into() } else { EntryOut::default() });
            match (len, tell) {
                (0, _) => {}
                (_, true) => self.held.add_node(child),
                (_, false) => self.files.forget(ctx, child, 1),
            }
            Ok(len)
        })
    }

    /// Asks the crate for an entry, if the guest may have one more.
    fn entry(&self, ask: impl FnOnce() -> io::Result<Entry>) -> io::Result<Entry> {
        self.held.room()?;
        let entry = ask()?;
        self.held.add_node(entry.inode);
        Ok(entry)
    }

    /// The file of a handle with the other `O_APPEND`. The crate would change the handle's own by
    /// `F_SETFL`, and when that fails, close a descriptor that it still uses.
    fn twin(&self, ctx: &Context, handle: u64, held: Handle) -> io::Result<Opened> {
        if let Some(twin) = held.twin {
            return Ok(twin);
        }
        self.held.room()?;
        let once = (libc::O_TRUNC | libc::O_EXCL) as u32;
        let flags = (held.flags & !once) ^ libc::O_APPEND as u32;
        let (opened, ..) = self.files.open(ctx, held.node, flags, 0)?;
        let fresh = (opened.ok_or_else(|| error(libc::ENOSYS))?, flags);
        let twin = self.held.add_twin(handle, fresh);
        if twin != Some(fresh) {
            self.close(ctx, held.node, fresh.0)?;
        }
        twin.ok_or_else(|| error(libc::EBADF))
    }

    fn close(&self, ctx: &Context, node: u64, handle: u64) -> io::Result<()> {
        self.files.release(ctx, node, 0, handle, false, false, None)
    }

    fn close_held(&self, ctx: &Context, handle: u64, held: Handle) -> io::Result<()> {
        let closed = self.close(ctx, held.node, handle);
        if let Some((twin, _)) = held.twin {
            self.close(ctx, held.node, twin)?;
        }
        closed
    }
}
