use std::{collections::BTreeMap, fs, os::unix::fs::symlink, path::Path};

use crate::install::*;

/// The section of the plugin for Kubernetes in files of version 2.
const V2: &str = "plugins.\"io.containerd.grpc.v1.cri\".containerd";

/// The same from version 3 on.
const V3: &str = "plugins.\"io.containerd.cri.v1.runtime\".containerd";

const CONTAINERD: &str = "etc/containerd/config.toml";
const DOCKER: &str = "etc/docker/daemon.json";
const PODMAN: &str = "etc/containers/containers.conf.d/isopod.conf";
const CRIO: &str = "etc/crio/crio.conf.d/isopod.conf";

/// A host with isopod in /usr/local/bin, and the shim's link as `cargo xtask install` makes it.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new(files: &[(&str, &str)]) -> Self {
        let world = Self { dir: tempfile::tempdir().unwrap() };
        world.write("usr/local/bin/isopod", "program");
        symlink("isopod", world.dir.path().join("usr/local/bin").join(registration::SHIM)).unwrap();
        for (path, text) in files {
            world.write(path, text);
        }
        world
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.dir.path().join(path)).unwrap()
    }

    fn toml(&self, path: &str) -> toml::Table {
        toml::from_str(&self.read(path)).unwrap()
    }

    fn options(&self, engines: &[Engine]) -> Options {
        Options {
            root: self.dir.path().to_owned(),
            binary_dir: "/usr/local/bin".into(),
            handler: "isopod".into(),
            engines: engines.to_vec(),
            dry_run: false,
        }
    }

    /// Files and links with their contents.
    fn files(&self) -> BTreeMap<String, String> {
        let mut files = BTreeMap::new();
        collect(self.dir.path(), &mut files);
        files
    }

    /// Registers with one engine, as often and in all the ways that must change nothing more.
    fn install(&self, engine: Engine) -> String {
        let before = self.files();
        let options = self.options(&[engine]);
        let dry = install(&Options { dry_run: true, ..options.clone() }).unwrap();
        assert_eq!((dry.failures, self.files()), (Vec::new(), before.clone()));
        let report = install(&options).unwrap();
        assert_eq!(report.failures, []);
        assert_eq!(dry.text.contains("+++ "), before != self.files(), "{}", dry.text);
        let after = self.files();
        let again = install(&options).unwrap();
        assert_eq!((again.failures, self.files()), (Vec::new(), after));
        assert!(again.text.contains("nothing to change"), "{}", again.text);
        let dry = install(&Options { dry_run: true, ..options }).unwrap();
        assert_eq!(dry.text, again.text);
        report.text
    }

    fn uninstall(&self, engine: Engine) {
        let report = uninstall(&self.options(&[engine])).unwrap();
        assert_eq!(report.failures, []);
    }

    /// The error for an engine whose configuration is left alone.
    fn refused(&self, engine: Engine) -> Error {
        let before = self.files();
        let mut report = install(&self.options(&[engine])).unwrap();
        assert_eq!(self.files(), before);
        report.failures.remove(0)
    }

    /// Installs and uninstalls: all files have to be as before.
    fn there_and_back(files: &[(&str, &str)], engine: Engine) -> Self {
        let world = Self::new(files);
        let before = world.files();
        world.install(engine);
        world.uninstall(engine);
        assert_eq!(world.files(), before);
        world.install(engine);
        world
    }
}

fn collect(folder: &Path, files: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_symlink() {
            files.insert(path.display().to_string(), format!("{:?}", fs::read_link(&path)));
        } else if path.is_dir() {
            collect(&path, files);
        } else {
            files.insert(path.display().to_string(), fs::read_to_string(&path).unwrap());
        }
    }
}

fn containerds(table: &toml::Table, plugin: &str) -> Option<toml::Value> {
    let key = ["plugins", plugin, "containerd", "runtimes", "isopod"];
    block::at(table, &key).cloned()
}

#[test]
fn containerd_of_version_2_gets_lines_at_the_end() {
    let runc = format!("[{V2}.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n");
    for text in [
        "version = 2\n".to_owned(),
        "version = 2".to_owned(),
        format!("# mine\r\nversion = 2 # two\n\n{runc}"),
        format!("version = 2\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n{runc}\n\n"),
        "version = 2\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    [plugins.\"io.\
         containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\"\n"
            .to_owned(),
    ] {
        let world = World::there_and_back(&[(CONTAINERD, &text)], Engine::Containerd);
        assert!(world.read(CONTAINERD).starts_with(&text));
        let isopod = containerds(&world.toml(CONTAINERD), "io.containerd.grpc.v1.cri").unwrap();
        assert_eq!(isopod["runtime_type"].as_str(), Some("io.containerd.isopod.v2"));
        assert_eq!(isopod["pod_annotations"][0].as_str(), Some("dev.isopod.*"));
    }
}

#[test]
fn containerd_without_a_file_gets_one() {
    let world = World::there_and_back(&[], Engine::Containerd);
    assert_eq!(world.toml(CONTAINERD)["version"].as_integer(), Some(2));
    // Lines that others add stay.
    world.write(CONTAINERD, &(world.read(CONTAINERD) + "[grpc]\n"));
    world.uninstall(Engine::Containerd);
    assert!(world.read(CONTAINERD).ends_with("version = 2\n[grpc]\n"));
}

#[test]
fn containerd_of_later_versions_gets_a_file_of_its_own() {
    let own = "etc/containerd/conf.d/isopod.toml";
    for version in [3, 4] {
        let text = format!(
            "version = {version}\nimports = ['/etc/containerd/conf.d/*.toml', '/etc/x.toml']\n"
        );
        let world = World::there_and_back(&[(CONTAINERD, &text)], Engine::Containerd);
        assert_eq!(world.read(CONTAINERD), text);
        assert_eq!(world.toml(own)["version"].as_integer(), Some(version));
        assert!(containerds(&world.toml(own), "io.containerd.cri.v1.runtime").is_some());
    }
    let world = World::there_and_back(&[(CONTAINERD, "version = 3\n")], Engine::Containerd);
    assert!(containerds(&world.toml(CONTAINERD), "io.containerd.cri.v1.runtime").is_some());
    // Once the folder is imported, the lines move there.
    let more = format!("imports = [\"conf.d/*.toml\"]\n{}", world.read(CONTAINERD));
    world.write(CONTAINERD, &more);
    world.install(Engine::Containerd);
    assert_eq!(world.read(CONTAINERD), "imports = [\"conf.d/*.toml\"]\nversion = 3\n");
    assert!(world.read(own).starts_with(registration::WRITTEN));
    world.uninstall(Engine::Containerd);
    assert!(!world.dir.path().join(own).exists());
}

#[test]
fn a_containerd_that_is_not_understood_is_left_alone() {
    let other = format!("version = 2\n[{V2}.runtimes.isopod]\nruntime_type = \"x\"\n");
    let other_3 = format!("version = 3\n[{V3}.runtimes.isopod]\nruntime_type = \"x\"\n");
    for (text, why) in [
        ("", "version 1"),
        ("root = \"/x\"\n", "version 1"),
        ("version = 5\n", "version 5"),
        ("version = \"2\"\n", "is no number"),
        ("version = 2\n[x\n", "line 2"),
        (&*other, "with other values"),
        (&*other_3, "with other values"),
        ("version = 2\nplugins = {}\n", "no further table"),
        ("version = 2\nimports = [\"/etc/*/x.toml\"]\n", "a pattern that is not known"),
        ("version = 3\nimports = [\"/etc/y.toml\"]\n", "/etc/y.toml has plugins."),
        ("version = 2\nimports = [\"/etc/z*.toml\"]\n", "/etc/zz.toml has the section"),
    ] {
        let imported = format!("[{V2}]\nsandbox_image = \"x\"\n");
        let files = [(CONTAINERD, text), ("etc/y.toml", &*other_3), ("etc/zz.toml", &*imported)];
        let error = World::new(&files).refused(Engine::Containerd);
        assert!(error.message.contains(why), "{error}");
        assert!(error.message.contains("config.toml"), "{error}");
        let later = text.starts_with("version = 3") || text.starts_with("version = 5");
        let plugin = if later { V3 } else { V2 };
        assert_eq!(error.details[0], format!("[{plugin}.runtimes.isopod]"), "{error}");
    }
    let world = World::new(&[(CONTAINERD, "version = 5\n")]);
    fs::remove_file(world.dir.path().join("usr/local/bin").join(registration::SHIM)).unwrap();
    world.refused(Engine::Containerd);
    fs::remove_file(world.dir.path().join(CONTAINERD)).unwrap();
    symlink("/none", world.dir.path().join(CONTAINERD)).unwrap();
    let error = world.refused(Engine::Containerd);
    assert!(error.message.contains("a symbolic link to nothing"), "{error}");
}

#[test]
fn a_runtime_that_is_there_already_is_left() {
    let lines =
        "runtime_type = \"io.containerd.isopod.v2\"\npod_annotations = [\"dev.isopod.*\"]\n";
    let v2 = format!("version = 2\n[{V2}.runtimes.isopod]\n{lines}snapshotter = \"native\"\n");
    let v3 = format!("version = 3\nimports = [\"/etc/i.toml\"]\n[{V3}.runtimes.isopod]\n{lines}");
    let podman = "[engine.runtimes]\nisopod = [\"/usr/local/bin/isopod\"]\n";
    for (engine, path, text) in [
        (Engine::Containerd, CONTAINERD, &*v2),
        (Engine::Containerd, CONTAINERD, &*v3),
        (Engine::Podman, "etc/containers/containers.conf", podman),
        (Engine::Podman, PODMAN, podman),
        (Engine::Docker, DOCKER, r#"{"runtimes": {"isopod": {"path": "/usr/local/bin/isopod"}}}"#),
    ] {
        let world = World::new(&[(path, text)]);
        world.install(engine);
        assert_eq!(world.read(path), text);
        if engine != Engine::Docker {
            let report = uninstall(&world.options(&[engine])).unwrap();
            assert!(report.failures[0].message.contains("has not written"), "{report:?}");
            assert_eq!(world.read(path), text);
        }
    }
    let disabled = "disabled_plugins = [\"cri\"]\n";
    let text = World::new(&[(CONTAINERD, disabled)]).install(Engine::Containerd);
    assert!(text.contains("disables the plugin for Kubernetes"), "{text}");
}

#[test]
fn docker_keeps_all_other_bytes() {
    for text in [
        "{}",
        "{}\n",
        "{ \"log-level\" : \"warn\" }",
        "{\n\t\"runtimes\": {\n\t\t\"runsc\": {\"path\": \"/x\"}\n\t},\n\t\"debug\": true\n}\n",
        "{\"runtimes\":{}}",
        "{\"runtimes\": { }, \"debug\": true}",
    ] {
        let world = World::there_and_back(&[(DOCKER, text)], Engine::Docker);
        let json: serde_json::Value = serde_json::from_str(&world.read(DOCKER)).unwrap();
        assert_eq!(json["runtimes"]["isopod"]["path"], "/usr/local/bin/isopod");
    }
    let world = World::there_and_back(&[], Engine::Docker);
    assert!(world.read(DOCKER).starts_with("{\n    \"runtimes\": {"));
    world.uninstall(Engine::Docker);
    assert!(!world.dir.path().join(DOCKER).exists());
}

#[test]
fn a_docker_that_is_not_understood_is_left_alone() {
    for (text, why) in [
        ("", "is no JSON object"),
        ("[]", "is no JSON object"),
        ("{\"a\": 1,}", "is no JSON object"),
        ("{\"runtimes\": []}", "runtimes in /etc/docker/daemon.json is no object"),
        ("{\"runtimes\": {}, \"runtimes\": {}}", "twice"),
        ("{\"runtimes\": {\"isopod\": {\"path\": \"/x\"}}}", "with other values"),
        ("{\"runtimes\": {\"isopod\": {\"runtimeType\": \"x\"}}}", "with other values"),
    ] {
        let error = World::new(&[(DOCKER, text)]).refused(Engine::Docker);
        assert!(error.message.contains(why), "{error}");
        assert!(error.details.concat().contains(r#""path": "/usr/local/bin/isopod""#), "{error}");
    }
}

#[test]
fn podman_and_crio_get_a_file_of_their_own() {
    let world = World::there_and_back(
        &[("etc/containers/containers.conf", "[engine]\nruntime = \"crun\"\n")],
        Engine::Podman,
    );
    let runtimes = &world.toml(PODMAN)["engine"]["runtimes"];
    assert_eq!(runtimes["isopod"][0].as_str(), Some("/usr/local/bin/isopod"));
    let world = World::there_and_back(&[("etc/crio/crio.conf.d/a", "[crio]\n")], Engine::CriO);
    let runtime = &world.toml(CRIO)["crio"]["runtime"]["runtimes"]["isopod"];
    assert_eq!(runtime["runtime_type"].as_str(), Some("vm"));
    let shim = runtime["runtime_path"].as_str().unwrap();
    assert_eq!(shim, "/usr/local/bin/containerd-shim-isopod-v2");

    let other = "[crio.runtime.runtimes.isopod]\nruntime_type = \"oci\"\n";
    for (engine, path, text) in [
        (Engine::Podman, PODMAN, "[engine.runtimes]\nisopod = [\"/x\"]\n"),
        (Engine::Podman, PODMAN, "# mine\n"),
        (Engine::Podman, "etc/containers/containers.conf", "[engine.runtimes]\nisopod = []\n"),
        (Engine::Podman, "usr/share/containers/containers.conf", "x"),
        (Engine::CriO, "etc/crio/crio.conf", other),
        (Engine::CriO, "etc/crio/crio.conf.d/10-x", other),
    ] {
        let error = World::new(&[(path, text)]).refused(engine);
        assert!(error.message.contains(path) && !error.details.is_empty(), "{error}");
    }
}

#[test]
fn the_default_runtime_of_an_engine_is_not_taken_away() {
    let v2 = format!("version = 2\n[{V2}]\ndefault_runtime_name = \"isopod\"\n");
    for (engine, path, text, key) in [
        (Engine::Containerd, CONTAINERD, &*v2, "default_runtime_name"),
        (Engine::Docker, DOCKER, "{\"default-runtime\": \"isopod\"}", "default-runtime"),
        (
            Engine::Podman,
            "etc/containers/containers.conf",
            "[engine]\nruntime=\"isopod\"",
            "runtime",
        ),
        (
            Engine::CriO,
            "etc/crio/crio.conf",
            "[crio.runtime]\ndefault_runtime=\"isopod\"",
            "default",
        ),
    ] {
        let world = World::new(&[(path, text)]);
        world.install(engine);
        let before = world.files();
        let report = uninstall(&world.options(&[engine])).unwrap();
        assert!(report.failures[0].message.contains(key), "{report:?}");
        assert_eq!(world.files(), before);
    }
}

#[test]
fn all_installed_engines_are_found() {
    let world = World::new(&[("usr/bin/podman", ""), ("usr/sbin/dockerd", "")]);
    let before = world.files();
    let report = install(&world.options(&[])).unwrap();
    assert_eq!(report.failures, []);
    assert!(report.text.contains("docker: next: systemctl reload docker"), "{}", report.text);
    assert!(!world.dir.path().join(CONTAINERD).exists());
    assert!(world.read(DOCKER).contains("isopod") && world.read(PODMAN).contains("isopod"));
    uninstall(&world.options(&[])).unwrap();
    assert_eq!(world.files(), before);
    assert_eq!(uninstall(&world.options(&[])).unwrap().text, "nothing to remove\n");

    let error = install(&World::new(&[]).options(&[])).unwrap_err();
    assert!(error.message.starts_with("no engine is installed"), "{error}");
    let nowhere = Options { binary_dir: "/opt/bin".into(), ..world.options(&[]) };
    let error = install(&nowhere).unwrap_err();
    assert!(error.message.contains("--binary-dir"), "{error}");
}

#[test]
fn one_engine_that_is_left_alone_does_not_stop_the_others() {
    let world = World::new(&[(DOCKER, "x")]);
    let report = install(&world.options(&[Engine::Docker, Engine::Podman])).unwrap();
    assert_eq!(report.failures.len(), 1);
    assert!(report.text.starts_with("podman: made "), "{}", report.text);
}

#[test]
fn another_handler_has_a_registration_of_its_own() {
    let world = World::new(&[(CONTAINERD, "version = 2\n")]);
    for engine in Engine::ALL {
        world.install(engine);
    }
    let before = world.files();
    let options = Options { handler: "other".into(), ..world.options(&Engine::ALL) };
    assert_eq!(install(&options).unwrap().failures, []);
    assert!(world.read(CONTAINERD).contains("runtimes.other]"));
    assert_eq!(uninstall(&options).unwrap().failures, []);
    assert_eq!(world.files(), before);
}

#[test]
fn the_shims_link_is_made_where_services_look() {
    let world = World::new(&[("opt/x/isopod", "other program")]);
    let link = world.dir.path().join("usr/local/bin").join(registration::SHIM);
    let options = Options { binary_dir: "/opt/x".into(), ..world.options(&[Engine::CriO]) };
    let error = install(&options).unwrap_err();
    assert!(error.message.contains("belongs to another isopod"), "{error}");
    fs::remove_file(&link).unwrap();
    let before = world.files();
    install(&options).unwrap();
    assert_eq!(fs::read_link(&link).unwrap().to_str(), Some("/opt/x/./isopod"));
    // An engine that was not named still needs it.
    let containerd = Options { engines: vec![Engine::Containerd], ..options.clone() };
    uninstall(&containerd).unwrap();
    assert!(link.is_symlink());
    uninstall(&options).unwrap();
    assert_eq!(world.files(), before);

    let beside = world.options(&[Engine::Containerd]);
    install(&beside).unwrap();
    assert_eq!(fs::read_link(&link).unwrap().to_str(), Some("./isopod"));
    install(&beside).unwrap();
    // Another place of the program replaces it.
    install(&Options { engines: vec![Engine::CriO], ..options }).unwrap();
    assert_eq!(fs::read_link(&link).unwrap().to_str(), Some("/opt/x/./isopod"));
}
