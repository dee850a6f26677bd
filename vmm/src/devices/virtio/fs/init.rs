//! The first FUSE request (`FUSE_INIT`), which negotiates version and features.

use std::io;

use fuse_backend_rs::abi::fuse_abi::{
    FsOptions, InitIn, InitIn2, InitOut, KERNEL_MINOR_VERSION, KERNEL_VERSION,
};

use super::files::Files;
use super::host::error;
use super::request::Body;

/// Minor protocol version of the oldest Linux with virtio-fs (5.4).
const OLDEST_MINOR_VERSION: u32 = 31;

/// Most pages of data in one request.
pub(super) const MAX_PAGES: u16 = 256;

/// Page size of the guest in bytes.
pub(super) const PAGE_SIZE: u32 = 4096;

/// Features of the share, without a write-back cache and without files that need no open.
const OPTIONS: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::ASYNC_DIO)
    .union(FsOptions::ATOMIC_O_TRUNC)
    .union(FsOptions::AUTO_INVAL_DATA)
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::DO_READDIRPLUS)
    .union(FsOptions::FLOCK_LOCKS)
    .union(FsOptions::HANDLE_KILLPRIV_V2)
    .union(FsOptions::INIT_EXT)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::POSIX_LOCKS)
    .union(FsOptions::READDIRPLUS_AUTO)
    .union(FsOptions::SUBMOUNTS);

/// Answers the request. `EPROTO` if the guest's protocol version is too old.
pub(super) fn answer(files: &Files, body: &mut Body<'_>) -> io::Result<InitOut> {
    let asked: InitIn = body.take()?;
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
        // The guest sends the request again in this version.
        return Ok(out);
    }
    if asked.major < KERNEL_VERSION || asked.minor < OLDEST_MINOR_VERSION {
        return Err(error(libc::EPROTO));
    }
    let mut flags = u64::from(asked.flags);
    if flags & FsOptions::INIT_EXT.bits() != 0 {
        let more: InitIn2 = body.take()?;
        flags |= u64::from(more.flags2) << 32;
    }
    let agreed = FsOptions::from_bits_truncate(flags) & OPTIONS;
    files.set_submounts(agreed.contains(FsOptions::SUBMOUNTS));
    let agreed = agreed.bits();
    Ok(InitOut { flags: agreed as u32, flags2: (agreed >> 32) as u32, ..out })
}
