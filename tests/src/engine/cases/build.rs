//! Images built under the runtime.

use std::fs;

use crate::engine::{IMAGE, Run, With};

/// Docker's own builder runs each `RUN` in a container of the default runtime. Podman's builder
/// uses the runtime that the client is told.
pub fn build(run: &Run<'_>) {
    let dir = run.engine.dir().join(run.name("context"));
    fs::create_dir(&dir).expect("a directory");
    fs::write(dir.join("data"), "copied\n").expect("a file");
    let recipe = format!(
        "FROM {IMAGE}\nENV FROM_BUILD=yes\nCOPY data /data\nWORKDIR /work\n\
         RUN uname -r >kernel && cat /data >>kernel\n\
         RUN mkdir -p deep/er && ln -s ../kernel deep/er/link && chmod 4755 /work/kernel\n\
         USER alice\nCMD [\"sh\", \"-c\", \"id -un; cat kernel; stat -c %a kernel; echo $FROM_BUILD\"]\n"
    );
    fs::write(dir.join("Dockerfile"), recipe).expect("a recipe");
    let image = run.name("image");
    let dir = dir.to_string_lossy();
    let said = if run.podman() {
        // Below the parent cgroup of the engine's containers.
        let parent = format!("--cgroup-parent={}/build", run.engine.cgroup());
        let build = run.client(&["build", "--isolation=oci", &parent, "--tag", &image, &dir]);
        run.end(build.env("TMPDIR", run.engine.path("")))
    } else {
        run.engine.set_default_runtime(run.with);
        let built = run.output(&["build", "--tag", &image, &dir]);
        run.engine.set_default_runtime(With::Runc);
        built
    };
    let said = said.ok();
    assert!(said.stdout.contains("Successfully"), "{said}");
    let said = run.end(run.command_of(&image, "run", &["--rm"], &[])).ok().stdout;
    let lines: Vec<&str> = said.lines().collect();
    let host = run.end(run.engine.inside(&["uname", "-r"])).ok().stdout;
    assert_eq!(lines[0], "alice");
    assert_eq!(lines[1] != host.trim(), run.isopod(), "{said}");
    assert_eq!(lines[2..], ["copied", "4755", "yes"]);
    run.ok(&["rmi", &image]);
}
