//! `install`, `uninstall` and `config`: the engines themselves read what is written.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use isopod_tests::engine::tree;
use isopod_tests::{Output, Scope, microvm_only, runtime, skip};
use serde_json::Value;

/// Podman as the host's package has it.
const PODMAN: &str = "/usr/bin/podman";

/// The root file system of a host, below the scope's directory.
struct Host<'a> {
    scope: &'a Scope,
    root: PathBuf,
}

impl<'a> Host<'a> {
    /// A host with isopod where the program under test is.
    fn new(scope: &'a Scope) -> Self {
        let host = Self { scope, root: scope.dir().join("host") };
        host.write(runtime().path.to_str().unwrap(), "");
        host
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn isopod(&self, arguments: &[&str]) -> Output {
        let root = format!("--root={}", self.root.display());
        let isopod = runtime().path.to_string_lossy();
        self.scope.program(&[&[&*isopod], arguments, &[&root]].concat()).output()
    }

    /// All folders, files and links with their contents.
    fn files(&self) -> BTreeMap<PathBuf, String> {
        let mut files = BTreeMap::new();
        collect(&self.root, &mut files);
        files
    }

    /// Registers with an engine, and checks that a trial or a second call changes nothing.
    fn install(&self, engine: &str) {
        let before = self.files();
        let trial = self.isopod(&["install", "--dry-run", engine]).ok();
        assert!(trial.stdout.contains("\n+++ /etc/"), "{trial}");
        assert_eq!(self.files(), before);
        let out = self.isopod(&["install", engine]).ok();
        assert!(out.stdout.contains("/etc/") && out.stderr.is_empty(), "{out}");
        let after = self.files();
        let again = self.isopod(&["install", engine]).ok();
        assert_eq!(again.stdout, format!("{engine}: nothing to change\n"));
        assert_eq!(self.files(), after);
    }
}

fn collect(folder: &Path, files: &mut BTreeMap<PathBuf, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = if path.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else if path.is_dir() {
            collect(&path, files);
            String::new()
        } else {
            fs::read_to_string(&path).unwrap()
        };
        files.insert(path, text);
    }
}

#[test]
fn containerd_reads_its_handler_beside_other_settings() {
    microvm_only!();
    let scope = Scope::new();
    let newer = format!("{}/usr/bin/containerd", tree("ISOPOD_TEST_DOCKER_TREE"));
    let own = "version = 2\n# mine\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \
               \"mine:1\"\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  \
               runtime_type = \"io.containerd.runc.v2\"\n";
    // A program of this size takes seconds to begin in a lab, so each reads one file.
    for (program, file) in [("/usr/bin/containerd", None), (&*newer, Some(own))] {
        let host = Host::new(&scope);
        if let Some(text) = file {
            host.write("/etc/containerd/config.toml", text);
        }
        let before = host.files();
        host.install("containerd");
        let config = host.at("/etc/containerd/config.toml");
        // A run of this program alone does not install the machine's own.
        if Path::new(program).exists() {
            let config = config.to_str().unwrap();
            let read = scope.program(&[program, "--config", config, "config", "dump"]);
            let read = read.output().ok().stdout;
            let lines: Vec<&str> = read.lines().map(str::trim).collect();
            let handler = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.isopod]";
            assert!(lines.contains(&handler), "{read}");
            assert!(lines.contains(&"runtime_type = \"io.containerd.isopod.v2\""), "{read}");
            assert!(lines.contains(&"pod_annotations = [\"dev.isopod.*\"]"), "{read}");
            assert_eq!(file.is_some(), lines.contains(&"sandbox_image = \"mine:1\""), "{read}");
        }
        host.isopod(&["uninstall"]).ok();
        assert_eq!(host.files(), before);
        fs::remove_dir_all(&host.root).unwrap();
    }
}

#[test]
fn dockers_file_stays_valid() {
    microvm_only!();
    let scope = Scope::new();
    let dockerd = format!("{}/usr/sbin/dockerd", tree("ISOPOD_TEST_DOCKER_TREE"));
    let host = Host::new(&scope);
    let own = "{\n  \"runtimes\": {\n    \"other\": { \"path\": \"/bin/true\" }\n  },\n  \
               \"log-level\": \"warn\"\n}\n";
    host.write("/etc/docker/daemon.json", own);
    let before = host.files();
    host.install("docker");
    let file = host.at("/etc/docker/daemon.json");
    let validate = [&*dockerd, "--validate", "--config-file", file.to_str().unwrap()];
    scope.program(&validate).output().ok();
    let read: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(read["runtimes"]["isopod"]["path"], runtime().path.to_str().unwrap());
    assert_eq!(read["runtimes"]["other"]["path"], "/bin/true");
    host.isopod(&["uninstall"]).ok();
    assert_eq!(host.files(), before);

    host.write("/etc/docker/daemon.json", "{ \"debug\": yes }\n");
    let before = host.files();
    let out = host.isopod(&["install", "docker"]);
    assert_eq!(out.status, 1, "{out}");
    assert!(out.stderr.contains("daemon.json is no JSON object"), "{out}");
    assert!(out.stderr.contains("\"runtimes\": { \"isopod\": { \"path\": "), "{out}");
    assert_eq!(host.files(), before);
}

#[test]
fn podman_knows_the_runtime_by_its_name() {
    microvm_only!();
    if !Path::new(PODMAN).exists() {
        skip!("podman is not installed");
    }
    let scope = Scope::new();
    let host = Host::new(&scope);
    // Podman makes this file if it is not there.
    host.write("/etc/containers/networks/netavark.lock", "");
    let before = host.files();
    host.install("podman");
    let storage = scope.dir().join("podman");
    let (root, run) = (storage.join("root"), storage.join("run"));
    let options = ["--storage-driver=vfs", "--runtime=isopod", "ps", "--noheading"];
    let list = scope.program(&[PODMAN, "--root", root.to_str().unwrap(), "--runroot"]);
    let list = list.args([run.to_str().unwrap()]).args(options);
    let own = host.at("/etc/containers");
    // Podman refuses a runtime that it does not know, or whose program is not there. Its `info`
    // asks the package manager too, which takes long.
    let list = list.after_mounting(&format!("mount --bind {} /etc/containers", own.display()));
    assert_eq!(list.output().ok().stdout, "");
    let text = fs::read_to_string(host.at("/etc/containers/containers.conf.d/isopod.conf"));
    assert!(text.unwrap().contains(&format!("isopod = [\"{}\"]\n", runtime().path.display())));
    host.isopod(&["uninstall"]).ok();
    assert_eq!(host.files(), before);
}

#[test]
fn crio_gets_a_file_whose_folders_go_with_it() {
    microvm_only!();
    let scope = Scope::new();
    let host = Host::new(&scope);
    let before = host.files();
    host.install("cri-o");
    let text = fs::read_to_string(host.at("/etc/crio/crio.conf.d/isopod.conf")).unwrap();
    assert!(text.contains("[crio.runtime.runtimes.isopod]\nruntime_path = \""), "{text}");
    // The link is beside isopod only if services find it there.
    assert!(text.contains("bin/containerd-shim-isopod-v2\"\nruntime_type = \"vm\"\n"), "{text}");
    host.isopod(&["uninstall"]).ok();
    assert_eq!(host.files(), before);
    let out = host.isopod(&["install"]);
    out.one_line_error(&["no engine is installed", "/usr/bin"]);
}

#[test]
fn the_settings_that_are_printed_are_right() {
    microvm_only!();
    let scope = Scope::new();
    let isopod = runtime().path.to_str().unwrap();
    let printed = scope.program(&[isopod, "config"]).output().ok().stdout;
    let file = scope.dir().join("config.toml");
    let check = |text: &str| {
        fs::write(&file, text).unwrap();
        scope.program(&[isopod, "config", "--check", file.to_str().unwrap()]).output()
    };
    check(&printed).ok();
    check(&printed.replace("#nics = 2", "nics = 3")).ok();
    check(&printed.replace("#nics = 2", "nic = 3")).one_line_error(&["config.toml, line", "nic"]);
    check(&printed.replace("#nics = 2", "nics = 9")).one_line_error(&["nics", "from 0 to 8"]);
    let annotations = "allowed_annotations = [\"dev.isopod.x\"]";
    check(annotations).one_line_error(&["allowed_annotations", "dev.isopod.x"]);
}

#[test]
fn containers_that_still_run_are_named() {
    microvm_only!();
    let scope = Scope::new();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    // Of this machine, so it must change nothing.
    let isopod = runtime().path.to_str().unwrap();
    let out = scope.program(&[isopod, "uninstall", "--dry-run", "podman"]).output().ok();
    let warning = out.stdout.lines().find(|line| line.starts_with("warning: containers still run"));
    assert!(warning.is_some_and(|warning| warning.contains(&container.id)), "{out}");
}
