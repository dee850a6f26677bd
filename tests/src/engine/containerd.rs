//! containerd: the daemon as a child of the engine's subreaper, with its plugin for Kubernetes (CRI).

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{Engine, IMAGE, Kind, With};
use crate::command::Command;

const DAEMON: &str = "/usr/bin/containerd";
const CLIENT: &str = "/usr/bin/ctr";

/// The image of a pod's first container.
const PAUSE_IMAGE: &str = "docker.io/library/isopod-pause:latest";

/// The handler whose pods have no first container: the shim has their sandboxes.
pub const SANDBOXER: &str = "isopod-sandbox";

/// The handler whose features containerd reports to a kubelet: containerd asks only the shims that it
/// takes for runc's.
pub const REPORTING: &str = "isopod-reporting";

/// Namespaces of containerd that have the images: the client's, and the plugin's.
const NAMESPACES: [&str; 2] = ["default", "k8s.io"];

impl Engine {
    /// Starts this machine's containerd, Debian's package.
    pub fn containerd() -> Self {
        Self::start_containerd(None, "")
    }

    /// Starts the containerd of a Debian tree.
    pub fn containerd_of(tree: &Path) -> Self {
        Self::start_containerd(Some(tree), "")
    }

    /// Like [`Engine::containerd_of`], with the handlers [`SANDBOXER`] and [`REPORTING`] too.
    /// containerd 2.0 and later know such handlers.
    pub fn containerd_with_more_handlers(tree: &Path) -> Self {
        let shim = Path::new(&With::Isopod.path()).with_file_name("containerd-shim-isopod-v2");
        let shim = shim.display();
        let handlers = format!(
            r#"    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{SANDBOXER}]
      runtime_type = "io.containerd.isopod.v2"
      sandboxer = "shim"
      privileged_without_host_devices = false
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{REPORTING}]
      runtime_type = "io.containerd.runc.v2"
      runtime_path = "{shim}"
      privileged_without_host_devices = false
"#
        );
        Self::start_containerd(Some(tree), &handlers)
    }

    fn start_containerd(tree: Option<&Path>, more_handlers: &str) -> Self {
        let engine = Self::build(Kind::Containerd, tree);
        engine.configure_containerd(more_handlers);
        engine.start_containerd_daemon();
        engine.import_images();
        engine
    }

    /// Starts the daemon, which finds the pods of an earlier one.
    pub fn start_containerd_daemon(&self) {
        let programs = With::Isopod.path();
        let programs = Path::new(&programs).parent().unwrap_or(Path::new("/")).display();
        // containerd finds a shim by its name in PATH.
        let script = format!(
            "PATH={programs}:$PATH exec {DAEMON} -c \"$0/config.toml\" >>\"$0/daemon.log\" 2>&1"
        );
        let dir = self.path("");
        let job = self.inside(&["sh", "-c", &script, dir.trim_end_matches('/')]).spawn();
        let daemon = job.pid;
        self.daemon.set(Some(daemon));
        self.await_socket(daemon, "containerd.sock");
        self.containerd_client().args(["version"]).output().ok();
    }

    /// Kills the daemon. Shims and pods go on.
    pub fn kill_containerd_daemon(&self) {
        let daemon = self.daemon.take().expect("a daemon");
        self.scope.keeper().signal(daemon, libc::SIGKILL).expect("a daemon that lives");
        self.scope.keeper().wait(daemon, crate::DEADLINE).expect("the daemon's end");
    }

    fn configure_containerd(&self, more_handlers: &str) {
        let dir = self.path("");
        let dir = dir.trim_end_matches('/');
        let config = format!(
            r#"version = 2
root = "{dir}/containerd"
state = "/run/containerd"
[grpc]
  address = "{dir}/containerd.sock"
[debug]
  level = "debug"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  enable_unprivileged_ports = true
  enable_unprivileged_icmp = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{dir}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      privileged_without_host_devices = false
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.isopod]
      runtime_type = "io.containerd.isopod.v2"
      privileged_without_host_devices = false
{more_handlers}"#
        );
        fs::write(self.dir().join("config.toml"), config).expect("config.toml");
        fs::create_dir(self.dir().join("cni")).expect("cni");
        let network = json!({
            "cniVersion": "0.4.0",
            "name": "isopod-pods",
            "plugins": [
                {
                    "type": "bridge", "bridge": "isopodcni0", "isGateway": true, "ipMasq": false,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": format!("{dir}/cni-addresses"),
                        "ranges": [[{ "subnet": "10.88.7.0/24" }], [{ "subnet": "fd00:88:7::/64" }]],
                        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
                    },
                },
                { "type": "portmap", "capabilities": { "portMappings": true } },
            ],
        });
        fs::write(self.dir().join("cni/10-pods.conflist"), network.to_string()).expect("a network");
    }

    /// containerd's own client.
    pub(super) fn containerd_client(&self) -> Command<'_> {
        self.inside(&[CLIENT, "--address", &self.path("containerd.sock")])
    }

    pub(super) fn containerd_script(&self) -> String {
        let socket = self.path("containerd.sock");
        format!("#!/bin/sh\nexec {CLIENT} --address {socket} \"$@\"\n")
    }

    /// Runs a task, so that containerd and the shim have made what they make once.
    pub(super) fn first_task(&self, with: With) {
        let runtime = format!("io.containerd.{}.v2", with.name());
        let cgroup = format!("{}/first", self.cgroup());
        let options = ["run", "--rm", "--runtime", &runtime, "--cgroup", &cgroup];
        self.containerd_client().args(options).args([&image(IMAGE), "first", "/bin/true"]).output();
    }

    /// Imports the image of the cases, and that of a pod's first container.
    fn import_images(&self) {
        let layer = self.image_archive();
        for (name, command) in [
            (image(IMAGE), json!(["/bin/sh"])),
            (PAUSE_IMAGE.to_owned(), json!(["/bin/sleep", "1000000"])),
        ] {
            let archive = self.image_layout(&name, &layer, &command);
            for namespace in NAMESPACES {
                let options = ["--namespace", namespace, "image", "import", &archive];
                self.containerd_client().args(options).output().ok();
            }
        }
    }

    /// Makes an archive of an image with one layer, as the OCI image specification has it.
    fn image_layout(&self, name: &str, layer: &str, command: &Value) -> String {
        let dir = self.dir().join("layout");
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).expect("a layout");
        let layer = self.blob(&blobs, &fs::read(layer).expect("the layer"));
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "config": { "Cmd": command, "Env": ["PATH=/bin"] },
            "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
        });
        let config = self.blob(&blobs, config.to_string().as_bytes());
        let typed = |blob: &Value, kind: &str| {
            let kind = format!("application/vnd.oci.image.{kind}");
            json!({ "mediaType": kind, "digest": blob["digest"], "size": blob["size"] })
        };
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": typed(&config, "config.v1+json"),
            "layers": [typed(&layer, "layer.v1.tar")],
        });
        let manifest = self.blob(&blobs, manifest.to_string().as_bytes());
        let mut entry = typed(&manifest, "manifest.v1+json");
        entry["annotations"] = json!({ "io.containerd.image.name": name });
        let index = json!({ "schemaVersion": 2, "manifests": [entry] });
        fs::write(dir.join("index.json"), index.to_string()).expect("the index");
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("a layout");
        let archive = self.path("layout.tar");
        let dir_text = dir.to_string_lossy();
        self.scope.program(&["tar", "-C", &dir_text, "-cf", &archive, "."]).output().ok();
        fs::remove_dir_all(&dir).expect("the layout");
        archive
    }

    /// Writes a blob under its digest. Returns digest and size.
    fn blob(&self, blobs: &Path, content: &[u8]) -> Value {
        let file = blobs.join("new");
        fs::write(&file, content).expect("a blob");
        let sum = self.scope.program(&["sha256sum", &file.to_string_lossy()]).output().ok().stdout;
        let digest = sum.split_whitespace().next().expect("a digest").to_owned();
        fs::rename(&file, blobs.join(&digest)).expect("a blob");
        json!({ "digest": format!("sha256:{digest}"), "size": content.len() })
    }
}

/// The full name of an image.
fn image(name: &str) -> String {
    format!("docker.io/library/{name}:latest")
}
