//! `bundle`: unpacks an image into a new bundle.

use std::path::PathBuf;

use clap::Args;

use crate::{
    error::Result,
    image::{self, ImageReference},
};

/// Options of `bundle`.
#[derive(Debug, Args)]
pub(super) struct Bundle {
    /// Directory with an OCI image layout, as `skopeo copy docker://NAME oci:DIR:TAG` writes it.
    /// The tag chooses among several images.
    #[arg(value_name = "oci:DIR[:TAG]")]
    image: ImageReference,
    /// Directory of the new bundle: missing, or empty.
    #[arg(value_name = "BUNDLE")]
    bundle: PathBuf,
}

impl Bundle {
    /// Unpacks the image. After a signal, returns 128 and the signal's number, the status that a
    /// shell would see. A failure leaves nothing behind.
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
