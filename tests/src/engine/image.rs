//! Images, made here: no registry is asked.

use super::Engine;
use crate::bundle::Bundle;

impl Engine {
    /// Archives a bundle's root file system, for an import.
    pub(super) fn image_archive(&self) -> String {
        let bundle = Bundle::new(self.dir().join("image"));
        let archive = self.path("image.tar");
        let rootfs = bundle.rootfs("/");
        let rootfs = rootfs.to_string_lossy();
        self.scope
            .program(&["tar", "-C", &rootfs, "--numeric-owner", "-cf", &archive, "."])
            .output()
            .ok();
        archive
    }
}
