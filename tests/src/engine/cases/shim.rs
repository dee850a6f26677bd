//! Docker with Isopod's own shim for containerd, in the place of the shim for runc.

use crate::engine::Run;

/// The runtime of Docker's configuration that names the shim.
const SHIM: &str = "--runtime=isopod-shim";

/// A container with a network, from its creation to its removal.
pub fn docker_shim(run: &Run<'_>) {
    let out = run.run(&[SHIM], &["sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!((out.status, &*out.stdout, &*out.stderr), (3, "out\n", "err\n"), "{out}");
    assert_eq!(
        run.stdout(&[SHIM, "--memory=64m"], &["cat", "/sys/fs/cgroup/memory.max"]),
        "67108864"
    );
    let script = "mkdir /www; echo served >/www/file; httpd -p 80 -h /www; echo up; sleep 1000";
    let options = [SHIM, "--network=bridge", "--publish=127.0.0.1:18090:80"];
    let server = run.start_shell(&options, script);
    server.await_log("up");
    let address = server.inspect(".NetworkSettings.IPAddress");
    for host in [&*address, "127.0.0.1:18090"] {
        let url = format!("http://{host}/file");
        let fetch = ["busybox", "wget", "-q", "-O-", &url];
        assert_eq!(run.end(run.engine.on_network(&fetch)).ok().stdout, "served\n", "{url}");
    }
    let out = server.exec(&[], &["sh", "-c", "echo inside; exit 4"]);
    assert_eq!((out.status, &*out.stdout), (4, "inside\n"), "{out}");
    server.ok(&["pause"]);
    assert_eq!(server.inspect(".State.Status"), "paused");
    server.ok(&["unpause"]);
    server.ok(&["stop", "--time=0"]);
    assert_eq!(server.inspect(".State.ExitCode"), "137");
    server.ok(&["start"]);
    server.shell("until wget -q -O /dev/null http://127.0.0.1/file; do sleep 0.1; done");
    server.remove();
}
