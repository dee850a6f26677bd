//! The bundle of a pod's holder: a container that is made, and never started.
//!
//! Engines make a first container for a pod that does nothing, so that the pod's namespaces outlive
//! each other container. CRI-O can leave it out, and keeps the namespaces on the host by files.
//! containerd leaves it out if the shim has the pod's sandbox. The guest has namespaces of its own,
//! which only a container can hold.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{
    bundle::{
        load::Bundle,
        oci_spec_quirks::SPEC_VERSION,
        pod::{CRIO_TYPE, POD_ID},
    },
    error::{Explain, Result},
};

/// The program of a holder in its root file system. It is looked for, and never executed.
pub(crate) const HOLDER_PROGRAM: &str = "/holder";

/// Directory of a holder's root file system in its state directory.
const ROOTFS: &str = "rootfs";

/// First part of the name of a holder's cgroup.
const CGROUP: &str = "isopod";

/// The part of a holder's config.json that differs from pod to pod.
#[derive(Debug, Default)]
pub(crate) struct HolderSpec {
    /// Host name of the pod.
    pub hostname: Option<String>,
    /// `process.oomScoreAdj`.
    pub oom_score_adj: Option<i32>,
    /// `linux`, with the namespaces of the pod.
    pub linux: Value,
    /// `annotations`.
    pub annotations: Value,
}

impl HolderSpec {
    /// The config.json. Its root file system is at `rootfs` in the bundle.
    pub(crate) fn json(&self) -> Value {
        // The holder executes nothing. The capability has the share serve devices of containers.
        json!({
            "ociVersion": SPEC_VERSION,
            "hostname": self.hostname,
            "process": {
                "user": { "uid": 0, "gid": 0 },
                "args": [HOLDER_PROGRAM],
                "cwd": "/",
                "capabilities": { "bounding": ["CAP_MKNOD"] },
                "oomScoreAdj": self.oom_score_adj,
            },
            "root": { "path": ROOTFS },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            ],
            "linux": self.linux,
            "annotations": self.annotations,
        })
    }
}

impl Bundle {
    /// The bundle of the holder of pod `pod`, whose state directory is `dir`, for the pod's first
    /// container. The microVM has room for more containers.
    ///
    /// # Errors
    ///
    /// If `pod` cannot be a part of a specification.
    pub(crate) fn holder(&self, pod: &str, dir: &Path) -> Result<Self> {
        let of_spec = self.spec.linux().as_ref();
        let process = self.spec.process().as_ref();
        let cgroup = of_spec.and_then(|linux| linux.cgroups_path().as_deref());
        let spec = HolderSpec {
            hostname: self.hostname(),
            oom_score_adj: process.and_then(|process| process.oom_score_adj()),
            linux: json!({
                "cgroupsPath": cgroup.map(|path| beside(path, pod)),
                "namespaces": [
                    { "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" },
                    { "type": "network" },
                ],
            }),
            annotations: json!({ CRIO_TYPE: "sandbox", POD_ID: pod }),
        };
        Ok(Self {
            dir: dir.to_owned(),
            spec: serde_json::from_value(spec.json()).explain(|| "cannot describe a pod".into())?,
            seccomp: None,
            rootfs: dir.join(ROOTFS),
            binds: Vec::new(),
            disks: Vec::new(),
            hooks: Vec::new(),
            vm: self.vm.for_a_pod(),
            nested: self.nested,
            network: self.network.clone(),
            nics: None,
            joined: Vec::new(),
        })
    }

    /// The host name of the pod: CRI-O tells its containers by a variable.
    fn hostname(&self) -> Option<String> {
        let process = self.spec.process().as_ref();
        let env = process.and_then(|process| process.env().as_deref()).unwrap_or_default();
        let variable = || env.iter().find_map(|entry| entry.strip_prefix("HOSTNAME="));
        let name = self.spec.hostname().as_deref().or_else(variable)?;
        Some(name.to_owned()).filter(|name| !name.is_empty())
    }
}

/// The cgroup of a holder, beside that of a container of its pod: in the cgroup of the pod.
fn beside(path: &Path, pod: &str) -> PathBuf {
    let text = path.to_string_lossy();
    match text.split(':').collect::<Vec<_>>()[..] {
        // systemd's form.
        [slice, _, _] if !path.is_absolute() => format!("{slice}:{CGROUP}:{pod}").into(),
        _ => path.with_file_name(format!("{CGROUP}-{pod}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_is_in_the_cgroup_of_its_pod() {
        for (path, holders) in [
            ("/kubepods/besteffort/pod1/crio-web", "/kubepods/besteffort/pod1/isopod-p"),
            ("kubepods-pod1.slice:crio:web", "kubepods-pod1.slice:isopod:p"),
        ] {
            assert_eq!(beside(Path::new(path), "p"), Path::new(holders));
        }
    }
}
