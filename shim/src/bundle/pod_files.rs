//! Files that the containers of a pod share, if the pod's engine leaves them to the runtime.
//!
//! containerd makes them itself, and mounts them, unless the shim has the pod's sandbox. Then it
//! mounts those that exist in a directory of its own, which it clears whenever it starts. So the shim
//! makes them elsewhere, and each container gets them as mounts that config.json does not have.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Mount, Spec};

use crate::{
    bundle::{
        bind::{Bind, is_bind},
        network_namespace::RESOLV_CONF,
        shm::{PLACE, Shm},
    },
    error::{Explain, Result},
};

/// The file with the pod's host name.
const HOSTNAME: &str = "/etc/hostname";

/// The file with the names of hosts.
const HOSTS: &str = "/etc/hosts";

/// Files, each with its name in the directory.
const FILES: &[(&str, &str)] =
    &[("hostname", HOSTNAME), ("hosts", HOSTS), ("resolv.conf", RESOLV_CONF)];

/// Mode of the files, whatever the umask is.
const MODE: u32 = 0o644;

/// Name of the directory in place of the shared memory. Nothing is ever in it.
const SHM: &str = "shm";

/// Size of the shared memory in bytes, as containerd and Docker have it.
const SHM_SIZE: u64 = 64 << 20;

/// Key of the shared memory in the guest, which has one pod. Keys of directories of the host have a
/// hyphen.
const SHM_KEY: &str = "pod";

/// The files of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodFiles {
    dir: PathBuf,
    /// The files to mount, as in [`FILES`].
    mounted: &'static [(&'static str, &'static str)],
}

impl PodFiles {
    /// Writes the files of a pod to the directory `dir`. Without `resolv_conf`, which is the
    /// content of that file, the pod has the host's.
    ///
    /// # Errors
    ///
    /// If a file cannot be written, or a file of the host cannot be read.
    pub(crate) fn write(dir: &Path, hostname: &str, resolv_conf: Option<&str>) -> Result<Self> {
        let of_host = |path: &str| match fs::read(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            read => read.explain(|| format!("cannot read {path}")),
        };
        let resolv_conf = match resolv_conf {
            Some(text) => text.as_bytes().to_vec(),
            None => of_host(RESOLV_CONF)?,
        };
        let contents = [format!("{hostname}\n").into_bytes(), of_host(HOSTS)?, resolv_conf];
        let dir = fs::canonicalize(dir).explain(|| format!("cannot find {}", dir.display()))?;
        for ((name, _), content) in FILES.iter().zip(contents) {
            let path = dir.join(name);
            fs::write(&path, content)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(MODE)))
                .explain(|| format!("cannot write {}", path.display()))?;
        }
        let shm = dir.join(SHM);
        fs::create_dir_all(&shm).explain(|| format!("cannot make {}", shm.display()))?;
        Ok(Self { dir, mounted: FILES })
    }

    /// Those of the pod's holder: the shared memory alone, which lives as long as somebody has it.
    pub(crate) fn of_holder(&self) -> Self {
        Self { mounted: &[], ..self.clone() }
    }

    /// Adds the mounts of the files. A mount that is there already stays, but for the tmpfs of a
    /// single container at /dev/shm.
    pub(super) fn mount(&self, spec: &mut Spec) {
        let read_only = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
        let linux = spec.linux().as_ref();
        let uids = linux.and_then(|linux| linux.uid_mappings().clone());
        let gids = linux.and_then(|linux| linux.gid_mappings().clone());
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for (name, destination) in self.mounted {
            if at(&mounts, destination).is_some() {
                continue;
            }
            let mut options = vec!["rbind", "rprivate"];
            options.push(if read_only { "ro" } else { "rw" });
            let mut mount = bind(&self.dir.join(name), destination, &options);
            // The files are root's, also in a user namespace.
            mount.set_uid_mappings(uids.clone()).set_gid_mappings(gids.clone());
            mounts.push(mount);
        }
        let options = ["rbind", "rprivate", "nosuid", "noexec", "nodev", "rw"];
        let memory = bind(&self.dir.join(SHM), PLACE, &options);
        match at(&mounts, PLACE) {
            Some(index) if !is_bind(&mounts[index]) => mounts[index] = memory,
            Some(_) => {}
            None => mounts.push(memory),
        }
        spec.set_mounts(Some(mounts));
    }

    /// Has the guest's memory of the pod stand for the directory of the shared memory.
    pub(super) fn share_memory(&self, binds: &mut [Bind]) {
        let source = self.dir.join(SHM);
        for bind in binds.iter_mut().filter(|bind| bind.source == source) {
            let key = SHM_KEY.to_owned();
            bind.shm =
                Some(Shm { key, size: SHM_SIZE, mode: 0o1777, uid: 0, gid: 0, executable: false });
        }
    }
}

/// Position of the mount at `destination`.
fn at(mounts: &[Mount], destination: &str) -> Option<usize> {
    let place = Path::new(destination);
    // Compared by components, because a destination may have double or final slashes.
    mounts.iter().position(|mount| mount.destination().components().eq(place.components()))
}

fn bind(source: &Path, destination: &str, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(source.to_owned()))
        .set_options(Some(options.iter().map(|&option| option.to_owned()).collect()));
    mount
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::bundle::bind::binds;

    fn spec(mounts: &str, more: &str) -> Spec {
        let json = format!(r#"{{"ociVersion":"1.0.2","mounts":[{mounts}]{more}}}"#);
        serde_json::from_str(&json).unwrap()
    }

    fn files(dir: &Path) -> PodFiles {
        PodFiles::write(dir, "web", Some("nameserver 1.2.3.4\n")).unwrap()
    }

    #[test]
    fn a_container_gets_what_it_does_not_mount() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(dir.path());
        assert_eq!(fs::read_to_string(dir.path().join("hostname")).unwrap(), "web\n");
        let hosts = fs::metadata(dir.path().join("hosts")).unwrap();
        assert_eq!(hosts.mode() & 0o777, 0o644);
        let own = r#"{"destination":"/etc//hosts","type":"bind","source":"/etc/hosts",
            "options":["rbind"]},{"destination":"/dev/shm","type":"tmpfs","source":"shm"}"#;
        let mut spec = spec(own, r#","root":{"path":"rootfs","readonly":true}"#);
        files.mount(&mut spec);
        let mounts = spec.mounts().as_ref().unwrap();
        let places: Vec<_> = mounts.iter().map(|mount| mount.destination().display()).collect();
        let places: Vec<_> = places.iter().map(ToString::to_string).collect();
        assert_eq!(places, ["/etc//hosts", "/dev/shm", "/etc/hostname", "/etc/resolv.conf"]);
        assert_eq!(mounts[2].options().as_ref().unwrap(), &["rbind", "rprivate", "ro"]);
        let mut binds = binds(dir.path(), &spec).unwrap();
        files.share_memory(&mut binds);
        let shm = binds.iter().find(|bind| bind.mount == 1).unwrap().shm.clone().unwrap();
        assert_eq!((shm.key.as_str(), shm.size, shm.mode), ("pod", 64 << 20, 0o1777));
        assert!(binds.iter().filter(|bind| bind.mount != 1).all(|bind| bind.shm.is_none()));
    }

    #[test]
    fn the_holder_keeps_the_memory() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec("", "");
        files(dir.path()).of_holder().mount(&mut spec);
        let mounts = spec.mounts().as_ref().unwrap();
        assert_eq!((mounts.len(), mounts[0].destination().as_path()), (1, Path::new(PLACE)));
    }

    #[test]
    fn memory_of_its_own_stays_a_containers_own() {
        let dir = tempfile::tempdir().unwrap();
        let own = r#"{"destination":"/dev/shm","type":"bind","source":"/tmp","options":["bind"]}"#;
        let mut spec = spec(own, "");
        files(dir.path()).mount(&mut spec);
        let mounts = spec.mounts().as_ref().unwrap();
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("/tmp")));
        assert_eq!(mounts.len(), 1 + FILES.len());
    }

    #[test]
    fn files_are_roots_in_a_user_namespace_too() {
        let dir = tempfile::tempdir().unwrap();
        let mapping = r#"[{"containerID":0,"hostID":100000,"size":65536}]"#;
        let linux = format!(r#","linux":{{"uidMappings":{mapping},"gidMappings":{mapping}}}"#);
        let mut spec = spec("", &linux);
        files(dir.path()).mount(&mut spec);
        let mounts = spec.mounts().as_ref().unwrap();
        let mapped = |mount: &Mount| mount.uid_mappings().is_some();
        assert!(
            mounts.iter().all(|mount| mapped(mount) != (mount.destination() == Path::new(PLACE)))
        );
    }
}
