//! Podman. There is no daemon, so every client is told the directories of this engine.

use std::fs;

use super::{Engine, IMAGE, Kind, With};
use crate::command::Command;

const CLIENT: &str = "/usr/bin/podman";

impl Engine {
    /// Sets up this machine's Podman, Debian's package.
    pub fn podman() -> Self {
        let engine = Self::build(Kind::Podman, None);
        engine.configure_podman();
        let archive = engine.image_archive();
        engine.client(With::Runc).args(["import", &archive, IMAGE]).output().ok();
        engine
    }

    fn configure_podman(&self) {
        let containers = format!(
            r#"[containers]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
static_dir = "{0}/storage/libpod"
volume_path = "{0}/volumes"
tmp_dir = "/run/libpod"
[engine.runtimes]
isopod = ["{1}"]
[network]
network_backend = "netavark"
network_config_dir = "{0}/networks"
"#,
            self.path("").trim_end_matches('/'),
            With::Isopod.path(),
        );
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\nrunroot = \"/run/containers/storage\"\n\
             graphroot = \"{}\"\n",
            self.path("storage"),
        );
        fs::write(self.dir().join("containers.conf"), containers).expect("containers.conf");
        fs::write(self.dir().join("storage.conf"), storage).expect("storage.conf");
    }

    pub(super) fn podman_client(&self, with: With) -> Command<'_> {
        let client = self.inside(&[CLIENT, "--runtime", &with.path()]);
        self.variables().into_iter().fold(client, |client, (name, value)| client.env(name, value))
    }

    pub(super) fn podman_script(&self) -> String {
        let variables = self.variables().map(|(name, value)| format!("{name}={value} "));
        format!("#!/bin/sh\n{}exec {CLIENT} \"$@\"\n", variables.concat())
    }

    fn variables(&self) -> [(&'static str, String); 3] {
        [
            ("CONTAINERS_CONF", self.path("containers.conf")),
            ("CONTAINERS_STORAGE_CONF", self.path("storage.conf")),
            // Without systemd nobody would call health checks at their times.
            ("DISABLE_HC_SYSTEMD", "true".to_owned()),
        ]
    }
}
