//! The streams of the container's first process.

use std::os::fd::OwnedFd;

use crate::{
    engine::{
        Io,
        stdio::{Release, StandardStreams, release},
    },
    error::Result,
    sandbox_process::launch::Launch,
    terminal::Size,
};

/// Opens the streams, and gives up this process's own. Returns the host's end of a new terminal too.
pub(super) fn open(launch: &Launch) -> Result<(Io, Option<OwnedFd>)> {
    let opened = Io::open(launch.terminal.as_ref(), console_size(launch), &launch.preserved)?;
    release(if launch.detached { Release::All } else { Release::but_for_messages() })?;
    Ok(opened)
}

/// No streams, for a process that has none. This process's own are given up.
pub(super) fn none() -> Result<Io> {
    release(Release::All)?;
    Ok(StandardStreams::default().into())
}

/// `process.consoleSize`, if a terminal can have that size.
fn console_size(launch: &Launch) -> Option<Size> {
    let size = launch.bundle.spec.process().as_ref()?.console_size()?;
    let columns = u16::try_from(size.width()).ok()?;
    let rows = u16::try_from(size.height()).ok()?;
    Some(Size { columns, rows }).filter(|size| *size != Size::default())
}
