//! `bundle`: an image becomes a bundle.

use std::path::PathBuf;

use clap::Args;

use crate::{
    error::Result,
    image::{self, ImageReference},
};

/// Options of `bundle`.
#[derive(Debug, Args)]
pub(super) struct Bundle {
    /// The image: a directory with an OCI image layout, as `skopeo copy docker://NAME oci:DIR:TAG`
    /// makes one, and a tag if there are several images in it.
    #[arg(value_name = "oci:DIR[:TAG]")]
    image: ImageReference,
    /// The bundle to make: a new directory, or an empty one.
    #[arg(value_name = "BUNDLE")]
    bundle: PathBuf,
}

impl Bundle {
    /// Unpacks the image. After a signal the status is the one that a shell would see, 128 and its
    /// number.
    ///
    /// # Errors
    ///
    /// The image cannot be unpacked. Nothing is left then.
    pub(super) fn run(&self) -> Result<u8> {
        match (image::unpack(&self.image, &self.bundle), image::interrupted_by()) {
            (Err(error), Some(signal)) => {
                log::error!("{error}");
                Ok(128 + signal)
            }
            (Err(error), None) => Err(error),
            (Ok(()), _) => Ok(0),
        }
    }
}
