//! Makes a bundle of an OCI image that `skopeo` or another tool has laid out in a directory.
//!
//! - [`layout`] finds the image and checks its parts.
//! - [`layer`] reads each layer through [`blob`] (digest and size), a decompressor and [`archive`].
//! - [`extract`] applies the layer's entries to [`tree`]. No entry can leave the tree.
//! - [`config`] writes config.json.
//! - [`staging`] has a directory beside the bundle's place. When the directory is complete, it
//!   becomes the bundle. Otherwise it is removed.
//!
//! Layers are hostile, because everybody who can run a container can make one. They are read once.
//! Memory is bounded, except for a few bytes for each file of a layer.

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

/// Unpacks the image into `bundle`, which must not exist or be an empty directory. The caller has
/// to be root. After an error nothing is left.
///
/// From now on SIGHUP, SIGINT and SIGTERM end the unpacking and not the process: see
/// [`interrupted_by`].
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

#[cfg(test)]
mod tests;
