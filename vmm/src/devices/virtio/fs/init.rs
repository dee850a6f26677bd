//! The first FUSE request, which settles what both sides can do. It is answered here, because the
//! crate by itself agrees to nothing but reading directories: writes would come 4 KiB at a time.

use std::io;

use fuse_backend_rs::abi::fuse_abi::{
    FsOptions, InitIn, InitIn2, InitOut, KERNEL_MINOR_VERSION, KERNEL_VERSION,
};
use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::transport::Reader;
use vm_memory::ByteValued;

use super::filter::Filter;

/// `FUSE_INIT` (include/uapi/linux/fuse.h, enum fuse_opcode).
pub(super) const OPCODE: u32 = 26;

/// The oldest protocol of a Linux with virtio-fs (5.4).
const OLDEST_MINOR_VERSION: u32 = 31;

/// Most pages of data in one request.
pub(super) const MAX_PAGES: u16 = 256;

/// A page of the guest, in bytes.
pub(super) const PAGE_SIZE: u32 = 4096;

/// What the share can do beside what the crate says of it.
const OPTIONS: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::ASYNC_DIO)
    .union(FsOptions::ATOMIC_O_TRUNC)
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::AUTO_INVAL_DATA)
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::INIT_EXT);

/// The answer to a request of which all but the header is left.
///
/// # Errors
///
/// When the guest speaks no protocol that is spoken here.
pub(super) fn answer(files: &Filter, mut request: Reader<'_>) -> io::Result<Vec<u8>> {
    negotiate(files, &mut request).map(|out| out.as_slice().to_vec())
}

fn negotiate(files: &Filter, request: &mut Reader<'_>) -> io::Result<InitOut> {
    let asked: InitIn = request.read_obj()?;
    let out = InitOut {
        major: KERNEL_VERSION,
        minor: KERNEL_MINOR_VERSION,
        max_readahead: asked.max_readahead,
        max_background: u16::MAX,
        congestion_threshold: u16::MAX / 4 * 3,
        max_write: u32::from(MAX_PAGES) * PAGE_SIZE,
        max_pages: MAX_PAGES,
        time_gran: 1,
        ..Default::default()
    };
    if asked.major > KERNEL_VERSION {
        // The guest asks again in the version that it is given.
        return Ok(out);
    }
    if asked.major < KERNEL_VERSION || asked.minor < OLDEST_MINOR_VERSION {
        return Err(io::Error::from_raw_os_error(libc::EPROTO));
    }
    let mut flags = u64::from(asked.flags);
    if flags & FsOptions::INIT_EXT.bits() != 0 {
        let more: InitIn2 = request.read_obj()?;
        flags |= u64::from(more.flags2) << 32;
    }
    let offered = FsOptions::from_bits_truncate(flags);
    let agreed = (offered & (files.init(offered)? | OPTIONS)).bits();
    Ok(InitOut { flags: agreed as u32, flags2: (agreed >> 32) as u32, ..out })
}
