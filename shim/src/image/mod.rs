//! An OCI image, as `skopeo` and others lay it out in a directory, becomes a bundle.
//!
//! [`layout`] finds the image and checks what it consists of; [`layer`] reads each layer through
//! [`blob`] (digest and size), a decompressor and [`archive`]; [`extract`] applies its entries to
//! [`tree`], which cannot be left whatever a layer says; [`config`] writes config.json. All of it
//! happens in a directory beside the bundle's place ([`staging`]), which becomes the bundle when it
//! is complete and is removed otherwise.
//!
//! Layers are hostile: whoever can run a container can make one. They are read once, in bounded
//! memory but for a few bytes for each file of a layer.

mod archive;
mod blob;
mod config;
mod extract;
mod layer;
mod layout;
mod metadata;
mod name;
mod reference;
mod remove;
mod staging;
mod tree;
mod user;
mod watch;
mod zstd;

use std::path::Path;

use self::{layout::Layout, staging::Staging, tree::Tree, watch::Watch};
pub use self::{reference::ImageReference, watch::interrupted_by};
use crate::{
    bundle::write_spec,
    error::{Error, Result},
};

/// Name of the root file system in the bundle.
const ROOTFS: &str = "rootfs";

/// Unpacks the image into `bundle`, which must not exist or be an empty directory.
///
/// SIGHUP, SIGINT and SIGTERM end it early from now on: see [`interrupted_by`].
///
/// # Errors
///
/// Not root, no such image, an image that is damaged, hostile or for another platform, or no room.
/// Nothing is left then.
pub fn unpack(image: &ImageReference, bundle: &Path) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::new(
            "no permission to give files to their owners: isopod bundle has to run as root",
        ));
    }
    watch::catch_signals()?;
    make_bundle(image, bundle)
}

fn make_bundle(image: &ImageReference, bundle: &Path) -> Result<()> {
    let watch = Watch::new();
    let layout = Layout::open(&image.dir)?;
    let image = layout.find(image.tag.as_deref())?;
    let staging = Staging::new(bundle)?;
    let mut tree = Tree::create(staging.dir(), ROOTFS)?;
    for (index, layer) in image.layers.iter().enumerate() {
        watch.layer(index, image.layers.len(), layer.descriptor.size());
        tree.begin_layer();
        let applied = layer::apply(&layout, layer, &mut tree, &watch);
        applied.map_err(|e| {
            let number = format!("layer {} of {}", index + 1, image.layers.len());
            Error::because(format!("{number} ({})", layer.descriptor.digest()), e)
        })?;
    }
    let spec = config::spec(&image.config, &mut tree)?;
    watch.check()?;
    write_spec(&staging.path().join("config.json"), &spec)?;
    staging.finish()
}

/// Something that an image says, for a message: on one line whatever it holds.
fn quoted(bytes: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(bytes))
}

#[cfg(test)]
mod tests;
