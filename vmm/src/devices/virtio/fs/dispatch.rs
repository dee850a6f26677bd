//! Dispatch of FUSE operations.
//!
//! All other operations get `ENOSYS`, or `ENOTTY`. Linux 6.12 works without them: `ACCESS` (a
//! virtio-fs mount always has `default_permissions`, so the guest's kernel checks), DAX (not
//! offered), `IOCTL`, `POLL`, `BMAP`, `COPY_FILE_RANGE`, `SYNCFS` and `STATX`.

use std::io;

use fuse_backend_rs::abi::fuse_abi::{
    BatchForgetIn, EntryOut, FSYNC_FDATASYNC, FlushIn, ForgetIn, ForgetOne, FsyncIn, GetxattrIn,
    GetxattrOut, InHeader, LinkIn, LkIn, LseekOut, Opcode, OpenOut, ReadIn, ReleaseIn, Rename2In,
    RenameIn, SetxattrIn, WriteOut,
};
use vm_memory::ByteValued;

use super::super::chain::Buffers;
use super::files::Files;
use super::host::error;
use super::init;
use super::lock::Wait;
use super::request::{Body, take};
use super::xattr::XattrReply;

/// `FUSE_TMPFILE` (include/uapi/linux/fuse.h, enum fuse_opcode).
pub(super) const TMPFILE: u32 = 51;

/// The user of a request.
pub(super) struct Caller {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// The answer to a request.
pub(super) enum Answer {
    /// Bytes behind the header.
    Bytes(Vec<u8>),
    /// Number of bytes that are in guest memory already.
    Data(usize),
    /// An answer after this wait.
    Later(Wait),
}

impl Answer {
    fn empty() -> Self {
        Self::Bytes(Vec::new())
    }

    fn of(value: impl ByteValued) -> Self {
        Self::Bytes(value.as_slice().to_vec())
    }

    fn of_made((entry, opened): (EntryOut, OpenOut)) -> Self {
        Self::Bytes([entry.as_slice(), opened.as_slice()].concat())
    }
}

impl From<XattrReply> for Answer {
    fn from(sized: XattrReply) -> Self {
        match sized {
            XattrReply::Value(value) => Self::Bytes(value),
            XattrReply::Length(size) => Self::of(GetxattrOut { size, padding: 0 }),
        }
    }
}

/// Serves a request, whose rest behind the header is `request`. Data that is read goes to `room`.
/// The error's number is the guest's answer.
pub(super) fn serve(
    files: &Files,
    header: &InHeader,
    mut request: Buffers<'_>,
    room: &Buffers<'_>,
) -> io::Result<Answer> {
    if header.opcode == Opcode::Write as u32 {
        let asked = take(&mut request)?;
        let size = files.write(header.nodeid, &asked, &request)? as u32;
        return Ok(Answer::of(WriteOut { size, padding: 0 }));
    }
    let bytes = request.to_vec();
    let mut body = Body::new(&bytes);
    if header.opcode == TMPFILE {
        let asked = body.take()?;
        let caller = Caller { uid: header.uid, gid: header.gid };
        return Ok(Answer::of_made(files.create_unnamed(&caller, header.nodeid, &asked)?));
    }
    let Some(opcode) = named(header.opcode) else { return Err(error(libc::ENOSYS)) };
    match opcode {
        Opcode::Read => files.read(header.nodeid, &body.take()?, room).map(Answer::Data),
        _ => on_names(files, header, opcode, &mut body, room.len()),
    }
}

/// Returns the named operation with this number.
pub(super) fn named(opcode: u32) -> Option<Opcode> {
    (opcode < Opcode::MaxOpcode as u32 && !matches!(opcode, 0 | 7 | 19)).then(|| opcode.into())
}

/// Forgets lookups of nodes. The request has no answer.
pub(super) fn forget(files: &Files, header: &InHeader, request: Buffers<'_>) -> io::Result<()> {
    let bytes = request.to_vec();
    let mut body = Body::new(&bytes);
    if header.opcode == Opcode::Forget as u32 {
        let ForgetIn { nlookup } = body.take()?;
        files.nodes.forget(header.nodeid, nlookup);
        return Ok(());
    }
    let BatchForgetIn { count, .. } = body.take()?;
    for _ in 0..count {
        let ForgetOne { nodeid, nlookup } = body.take()?;
        files.nodes.forget(nodeid, nlookup);
    }
    Ok(())
}

/// Serves operations that look up, make or change names.
fn on_names(
    files: &Files,
    header: &InHeader,
    opcode: Opcode,
    body: &mut Body<'_>,
    room: usize,
) -> io::Result<Answer> {
    let (node, caller) = (header.nodeid, &Caller { uid: header.uid, gid: header.gid });
    Ok(match opcode {
        Opcode::Lookup => {
            let found = files.lookup(node, body.string()?).map_err(spare_mounts)?;
            Answer::of(files.entry_out(&found))
        }
        Opcode::Mkdir => {
            let asked = body.take()?;
            Answer::of(files.make_directory(caller, node, body.string()?, &asked)?)
        }
        Opcode::Mknod => {
            let asked = body.take()?;
            Answer::of(files.make_node(caller, node, body.string()?, &asked)?)
        }
        Opcode::Symlink => {
            let (name, target) = (body.string()?, body.string()?);
            Answer::of(files.make_symlink(caller, node, name, target)?)
        }
        Opcode::Link => {
            let LinkIn { oldnodeid } = body.take()?;
            Answer::of(files.make_link(oldnodeid, node, body.string()?)?)
        }
        Opcode::Create => {
            let asked = body.take()?;
            Answer::of_made(files.create(caller, node, body.string()?, &asked)?)
        }
        Opcode::Unlink => {
            files.remove(node, body.string()?, 0)?;
            Answer::empty()
        }
        Opcode::Rmdir => {
            files.remove(node, body.string()?, libc::AT_REMOVEDIR)?;
            Answer::empty()
        }
        Opcode::Rename => {
            let RenameIn { newdir } = body.take()?;
            let (from, to) = (body.string()?, body.string()?);
            files.rename((node, from), (newdir, to), 0)?;
            Answer::empty()
        }
        Opcode::Rename2 => {
            let Rename2In { newdir, flags, .. } = body.take()?;
            let (from, to) = (body.string()?, body.string()?);
            files.rename((node, from), (newdir, to), flags)?;
            Answer::empty()
        }
        Opcode::Readlink => Answer::Bytes(files.link_target(node)?),
        _ => return on_files(files, header, opcode, body, room),
    })
}

/// Converts a lack of descriptors to `ENOMEM`. After other errors of a lookup, Linux unmounts
/// everything below the name.
fn spare_mounts(e: io::Error) -> io::Error {
    match e.raw_os_error() {
        Some(libc::ENFILE | libc::EMFILE) => error(libc::ENOMEM),
        _ => e,
    }
}

/// Serves operations on open files and directories.
fn on_files(
    files: &Files,
    header: &InHeader,
    opcode: Opcode,
    body: &mut Body<'_>,
    room: usize,
) -> io::Result<Answer> {
    let node = header.nodeid;
    Ok(match opcode {
        Opcode::Open => Answer::of(files.open_node(node, &body.take()?, 0)?),
        Opcode::Opendir => Answer::of(files.open_directory(node, &body.take()?)?),
        Opcode::Readdir | Opcode::Readdirplus => {
            let asked: ReadIn = body.take()?;
            let plus = matches!(opcode, Opcode::Readdirplus);
            Answer::Bytes(files.list(node, &asked, plus, room)?)
        }
        Opcode::Flush => {
            let FlushIn { fh, lock_owner, .. } = body.take()?;
            files.flush(node, fh, lock_owner)?;
            Answer::empty()
        }
        Opcode::Release | Opcode::Releasedir => {
            let ReleaseIn { fh, .. } = body.take()?;
            files.close(node, fh)?;
            Answer::empty()
        }
        Opcode::Fsync | Opcode::Fsyncdir => {
            let FsyncIn { fh, fsync_flags, .. } = body.take()?;
            files.sync(node, fh, fsync_flags & FSYNC_FDATASYNC != 0)?;
            Answer::empty()
        }
        Opcode::Fallocate => {
            files.allocate(node, &body.take()?)?;
            Answer::empty()
        }
        Opcode::Lseek => Answer::of(LseekOut { offset: files.seek(node, &body.take()?)? }),
        Opcode::Getlk => Answer::of(files.get_lock(node, &body.take()?)?),
        Opcode::Setlk | Opcode::Setlkw => {
            let asked: LkIn = body.take()?;
            let wait = matches!(opcode, Opcode::Setlkw);
            files.set_lock(node, &asked, wait)?.map_or_else(Answer::empty, Answer::Later)
        }
        _ => return on_the_rest(files, header, opcode, body),
    })
}

/// Serves operations on attributes, and on the file system as a whole.
fn on_the_rest(
    files: &Files,
    header: &InHeader,
    opcode: Opcode,
    body: &mut Body<'_>,
) -> io::Result<Answer> {
    let node = header.nodeid;
    Ok(match opcode {
        Opcode::Getattr => Answer::of(files.attributes(node, &body.take()?)?),
        Opcode::Setattr => Answer::of(files.set_attributes(node, &body.take()?)?),
        Opcode::Statfs => Answer::of(files.file_system_sizes(node)?),
        Opcode::Getxattr => {
            let GetxattrIn { size, .. } = body.take()?;
            files.attribute(node, body.string()?, size)?.into()
        }
        Opcode::Listxattr => {
            let GetxattrIn { size, .. } = body.take()?;
            files.attribute_names(node, size, header.uid)?.into()
        }
        Opcode::Setxattr => {
            let SetxattrIn { size, flags } = body.take()?;
            let name = body.string()?;
            let value = body.rest();
            if size as usize != value.len() {
                return Err(error(libc::EINVAL));
            }
            files.set_attribute(node, name, value, flags)?;
            Answer::empty()
        }
        Opcode::Removexattr => {
            files.remove_attribute(node, body.string()?)?;
            Answer::empty()
        }
        Opcode::Init => Answer::of(init::answer(files, body)?),
        // The end of a mount. Linux sends no forgets for its nodes.
        Opcode::Destroy => {
            files.forget_all();
            Answer::empty()
        }
        Opcode::Ioctl => return Err(error(libc::ENOTTY)),
        _ => return Err(error(libc::ENOSYS)),
    })
}
