//! Features of Podman that Docker lacks.

use std::fs;

use crate::bundle::Bundle;
use crate::engine::{IMAGE, Run};

/// `--rootfs`: a directory in the place of an image.
pub fn rootfs(run: &Run<'_>) {
    let bundle = Bundle::new(run.engine.dir().join(run.name("bundle")));
    let rootfs = bundle.rootfs("/");
    let options = ["--rm", "--rootfs"];
    let command = run.command_of(
        &rootfs.to_string_lossy(),
        "run",
        &options,
        &["sh", "-c", "echo hi >/new; cat /new"],
    );
    assert_eq!(run.end(command).ok().stdout, "hi\n");
    assert_eq!(fs::read_to_string(bundle.rootfs("/new")).unwrap_or_default(), "hi\n");
}

/// A pod without an infra container: its containers share only a name and a life.
pub fn pod_without_infra(run: &Run<'_>) {
    let pod = run.name("pod");
    run.ok(&["pod", "create", "--infra=false", "--share=", "--name", &pod]);
    let members = ["a", "b"].map(|_| run.start(&["--pod", &pod], &["sleep", "1000"]));
    assert_eq!(members[1].shell("echo alive"), "alive");
    run.ok(&["pod", "stop", "--time", "0", &pod]);
    run.ok(&["pod", "start", &pod]);
    assert_eq!(members[0].shell("echo again"), "again");
    run.ok(&["pod", "rm", "--force", "--time", "0", &pod]);
}

/// A pod with an infra container: the members share its namespaces, and so its microVM.
pub fn pod_with_infra(run: &Run<'_>) {
    let pod = run.name("pod");
    let infra = format!("--infra-image={IMAGE}");
    // With a cgroup of the pod as their parent, containers of runc cannot open their devices.
    let parent = "--share-parent=false";
    run.ok(&["pod", "create", &infra, "--infra-command=sleep 1000", parent, "--name", &pod]);
    let members = ["a", "b"].map(|_| run.start(&["--pod", &pod], &["sleep", "1000"]));
    let boots =
        members.each_ref().map(|c| c.shell("cat /proc/sys/kernel/random/boot_id; hostname"));
    assert_eq!(boots[0], boots[1]);
    assert!(boots[0].ends_with(&pod), "{boots:?}");
    members[0].shell("echo hello >/page; httpd -p 127.0.0.1:8080 -h /");
    assert_eq!(members[1].shell("wget -q -O - http://127.0.0.1:8080/page"), "hello");
    let file = run.engine.path(&run.name("sent"));
    fs::write(&file, "sent\n").expect("a file");
    run.ok(&["cp", &file, &format!("{}:/sent", members[1].name)]);
    assert_eq!(members[1].shell("cat /sent"), "sent");
    run.ok(&["pod", "stop", "--time", "0", &pod]);
    assert_eq!(members[1].inspect(".State.Running"), "false");
    run.ok(&["pod", "start", &pod]);
    assert_eq!(members[0].shell("cat /page"), "hello");
    run.ok(&["pod", "rm", "--force", "--time", "0", &pod]);
}

/// `healthcheck run` runs a command in the container and believes its status.
pub fn healthcheck(run: &Run<'_>) {
    let options = ["--health-cmd=test -e /well", "--health-interval=disable", "--health-retries=1"];
    let container = run.start(&options, &["sleep", "1000"]);
    assert_ne!(run.output(&["healthcheck", "run", &container.name]).status, 0);
    container.shell("touch /well");
    run.ok(&["healthcheck", "run", &container.name]);
    assert_eq!(container.inspect(".State.Health.Status"), "healthy");
    container.remove();
}

/// The unit of `generate systemd`: its start and stop commands work, twice each.
pub fn generated_unit(run: &Run<'_>) {
    let container = run.make("create", &[], &["sh", "-c", "echo up; exec sleep 1000"]);
    let unit = container.ok(&["generate", "systemd", "--name", "--time", "1"]);
    let unit = unit.replace("\\\n", " ");
    let command = |key: &str| -> Vec<String> {
        let line = unit.lines().find_map(|line| line.strip_prefix(key));
        let line = line.unwrap_or_else(|| panic!("no {key} in {unit}"));
        // The client's options in the unit are skipped: this engine's client has its own.
        let verb = line.split_whitespace().skip_while(|word| !["start", "stop"].contains(word));
        verb.map(str::to_owned).collect()
    };
    let call = |key: &str| {
        let words = command(key);
        run.ok(&words.iter().map(String::as_str).collect::<Vec<_>>());
    };
    for _ in 0..2 {
        call("ExecStart=");
        assert_eq!(container.inspect(".State.Running"), "true");
        call("ExecStop=");
        assert_eq!(container.inspect(".State.Running"), "false");
    }
    container.remove();
}
