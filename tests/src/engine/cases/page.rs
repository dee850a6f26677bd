//! The commands on the pages of `docs/` about engines, as they are written there.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::engine::{IMAGE, Run};

const DOCKER: &str = include_str!("../../../../docs/docker.md");
const PODMAN: &str = include_str!("../../../../docs/podman.md");

/// Every command of the page's shell blocks succeeds; `busybox` is the tests' own image here.
pub fn page(run: &Run<'_>) {
    let (page, client) = if run.podman() { (PODMAN, "podman") } else { (DOCKER, "docker") };
    let script: String =
        page.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    let bin = run.engine.dir().join("bin");
    fs::create_dir_all(&bin).expect("a directory");
    let program = bin.join(client);
    fs::write(&program, run.engine.client_script()).expect("a script");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("chmod");
    run.ok(&["tag", IMAGE, "busybox"]);
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", bin.display());
    let command = run.engine.inside(&["sh", "-e", "-x", "-c", &script]).env("PATH", path);
    let said = run.end(command).ok().stdout;
    let lines: Vec<&str> = said.lines().collect();
    let host = run.end(run.engine.inside(&["uname", "-r"])).ok().stdout;
    assert!(!lines[0].is_empty() && lines[0] != host.trim(), "{said}");
    assert!(said.contains("httpd"), "{said}");
    run.ok(&["rmi", "busybox"]);
}
