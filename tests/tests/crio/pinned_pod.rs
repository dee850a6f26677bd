//! A pod as CRI-O makes it: namespaces that are pinned as files, and annotations.

use std::fs;

use isopod_tests::{Container, Netns, Scope};
use serde_json::json;

/// A pod's namespaces.
pub(crate) struct Pod<'s> {
    scope: &'s Scope,
    /// Id of the pod, which is that of its infra container.
    pub(crate) id: String,
    pub(crate) network: Netns<'s>,
}

impl<'s> Pod<'s> {
    /// Pins namespaces, as CRI-O's `pinns` does.
    pub(crate) fn new(scope: &'s Scope) -> Self {
        let network = Netns::new(scope, "pod");
        let pod = Self { scope, id: format!("{}pod", scope.name()), network };
        let pins = ["ipc", "uts"].map(|kind| {
            fs::write(pod.pin(kind), "").expect("a file");
            format!("--{kind}={}", pod.pin(kind))
        });
        scope.program(&["unshare", &pins[0], &pins[1], "true"]).output().ok();
        pod
    }

    fn pin(&self, kind: &str) -> String {
        self.scope.dir().join(format!("{kind}ns")).to_string_lossy().into_owned()
    }

    fn join<'c>(&self, container: Container<'c>, kind: &str) -> Container<'c> {
        let paths = [("ipc", self.pin("ipc")), ("uts", self.pin("uts"))];
        container
            .join(&self.network)
            .annotation("io.container.manager", "cri-o")
            .annotation("io.kubernetes.cri-o.SandboxID", &self.id)
            .annotation("io.kubernetes.cri-o.ContainerType", kind)
            .edit(|c| {
                for namespace in c["linux"]["namespaces"].as_array_mut().expect("namespaces") {
                    if let Some((_, path)) = paths.iter().find(|(n, _)| namespace["type"] == *n) {
                        namespace["path"] = json!(path);
                    }
                }
                c["hostname"] = json!("the-pod");
            })
    }

    /// The infra container, whose program only waits.
    pub(crate) fn infra(&self) -> Container<'s> {
        let mut container = self.join(self.scope.container(), "sandbox").args(["sleep", "10000"]);
        container.id.clone_from(&self.id);
        container
    }

    /// A container with a shell script.
    pub(crate) fn container(&self, script: &str) -> Container<'s> {
        self.join(self.scope.container(), "container").shell(script)
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        let unmount = || {
            for kind in ["ipc", "uts"] {
                self.scope.program(&["umount", &self.pin(kind)]).output();
                let _ = fs::remove_file(self.pin(kind));
            }
        };
        // The test may have failed already; no panic may hide that.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(unmount));
    }
}
