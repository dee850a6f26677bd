//! The guest image.

use std::path::Path;

use anyhow::Result;

use crate::progress::{say, step};

/// Builds the guest image `image` with the program file `agent` as its `/init`.
pub(crate) fn build(agent: &Path, image: &Path) -> Result<()> {
    step("build the guest image", || {
        let size = isopod_rootfs_builder::build(agent, image)?;
        say(format!("    {} has {} KiB", image.display(), size / 1024));
        Ok(())
    })
}
