//! What a guest may ask for.
//!
//! Operations that are not here are answered with `ENOSYS`, or `ENOTTY`. Linux 6.12 goes on without
//! them: `ACCESS` (a virtio-fs mount always has `default_permissions`, so that the guest's kernel
//! checks them), locks and DAX (not offered), `IOCTL`, `POLL`, `BMAP`, `COPY_FILE_RANGE`, `SYNCFS`,
//! `TMPFILE` and `STATX`.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FsOptions, OpenOptions, SetattrValid, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
};

use super::{Filter, error, host_flags};

/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX` (include/uapi/linux/limits.h). The crate allocates whatever
/// size it is asked for.
const XATTR_MAX: u32 = 65536;

impl FileSystem for Filter {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.files.init(capable)
    }

    /// The end of a mount, where Linux forgets no node by itself. The crate's own way is to clear
    /// its map and open the root again: not while other requests use them.
    fn destroy(&self) {
        let ctx = Context::default();
        let remains = self.held.take_all();
        for (handle, held) in remains.handles {
            let _ = self.close_held(&ctx, handle, held);
        }
        for (node, count) in remains.nodes {
            self.files.forget(&ctx, node, count);
        }
    }

    /// Linux asks for `.` and `..` for an export by NFS only, which is not offered. Above the share's
    /// root there is the antechamber.
    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        if matches!(name.to_bytes(), b"." | b"..") {
            return Err(error(libc::EINVAL));
        }
        self.entry(|| self.files.lookup(ctx, parent, name))
    }

    fn forget(&self, ctx: &Context, inode: u64, count: u64) {
        let count = self.held.take_node(inode, count);
        if count > 0 {
            self.files.forget(ctx, inode, count);
        }
    }

    fn getattr(
        &self,
        ctx: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        self.files.getattr(ctx, inode, handle)
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.files.setattr(ctx, inode, attr, handle, valid)
    }

    fn readlink(&self, ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.files.readlink(ctx, inode)
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.entry(|| self.files.symlink(ctx, target, parent, name))
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.entry(|| self.files.mknod(ctx, parent, name, mode, rdev, umask))
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.entry(|| self.files.mkdir(ctx, parent, name, mode, umask))
    }

    fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.files.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.files.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: &Context,
        from: u64,
        from_name: &CStr,
        to: u64,
        to_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.files.rename(ctx, from, from_name, to, to_name, flags)
    }

    fn link(&self, ctx: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.entry(|| self.files.link(ctx, inode, parent, name))
    }

    fn open(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let flags = host_flags(flags)?;
        self.held.room()?;
        let opened = self.files.open(ctx, inode, flags, fuse_flags)?;
        if let Some(handle) = opened.0 {
            self.held.add_handle(handle, inode, flags);
        }
        Ok(opened)
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let flags = host_flags(args.flags)?;
        if flags & libc::O_DIRECTORY as u32 != 0 {
            return Err(error(libc::EINVAL));
        }
        let exclusive = args.flags & libc::O_EXCL as u32 != 0;
        let flags = flags | (libc::O_EXCL | libc::O_CLOEXEC) as u32;
        self.held.room()?;
        // A guest that creates has not asked whether its user may open a file that is there already.
        // It looks again on `ESTALE`, and asks.
        let created = self.files.create(ctx, parent, name, CreateIn { flags, ..args });
        let created = created.map_err(|e| match e.raw_os_error() {
            Some(libc::EEXIST) if !exclusive => error(libc::ESTALE),
            _ => e,
        })?;
        self.held.add_node(created.0.inode);
        if let Some(handle) = created.1 {
            self.held.add_handle(handle, created.0.inode, flags);
        }
        Ok(created)
    }

    fn read(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        // The flags are those that the crate has, so that it changes none.
        let flags = self.held.handle(handle, inode)?.flags;
        self.files.read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let held = self.held.handle(handle, inode)?;
        // Of the flags that `fcntl` changes, this one alone makes a difference. What was written to
        // a mapping has its place.
        let changed = (flags ^ held.flags) & libc::O_APPEND as u32 != 0;
        let appends = held.flags & libc::O_APPEND as u32 != 0;
        let (handle, flags) = match (delayed_write, changed, appends) {
            (true, _, true) | (false, true, _) => self.twin(ctx, handle, held)?,
            _ => (handle, held.flags),
        };
        let delayed = delayed_write;
        self.files
            .write(ctx, inode, handle, r, size, offset, lock_owner, delayed, flags, fuse_flags)
    }

    fn flush(&self, ctx: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.files.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.files.fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.files.fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: &Context,
        inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let held = self.held.take_handle(handle, inode)?;
        self.close_held(ctx, handle, held)
    }

    fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        self.files.statfs(ctx, inode)
    }

    fn setxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.files.setxattr(ctx, inode, name, value, flags)
    }

    fn getxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        if size > XATTR_MAX {
            return Err(error(libc::E2BIG));
        }
        self.files.getxattr(ctx, inode, name, size)
    }

    fn listxattr(&self, ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        if size > XATTR_MAX {
            return Err(error(libc::E2BIG));
        }
        self.files.listxattr(ctx, inode, size)
    }

    fn removexattr(&self, ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.files.removexattr(ctx, inode, name)
    }

    fn opendir(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (handle, options, _) = self.open(ctx, inode, flags | libc::O_DIRECTORY as u32, 0)?;
        Ok((handle, options))
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.files.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.release(ctx, inode, flags, handle, false, false, None)
    }

    fn lseek(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.files.lseek(ctx, inode, handle, offset, whence)
    }
}
