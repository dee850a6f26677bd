//! Images, made here: no registry is asked for anything.

use super::{Engine, With};
use crate::bundle::Bundle;

impl Engine {
    /// An archive of a bundle's root file system, to import.
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

    /// Imports a directory as an image, without what fits the patterns of `waste`.
    pub fn import_tree(&self, tree: &str, waste: &[&str], image: &str) {
        let excludes: String = waste.iter().map(|one| format!("--exclude='{one}' ")).collect();
        let script = format!("tar -C \"$0\" {excludes} -c . | \"$@\"");
        let client = self.client(With::Runc).args(["import", "-", image]);
        client.through(&["sh", "-c", &script, tree]).output().ok();
    }
}
