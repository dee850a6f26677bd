//! Processes that are killed under a pod: containerd, the shim, the VMM.

use std::time::{Duration, Instant};

use isopod_tests::engine::Run;
use k8s_cri::v1::ContainerState;

use crate::cri::{Cri, script};

/// Sends a signal to the process whose command line has both words.
pub(crate) fn signal(run: &Run<'_>, signal: &str, program: &str, word: &str) {
    let line = format!("pgrep -f '{program}.*{word}'");
    let pids = run.end(run.engine.inside(&["sh", "-c", &line])).ok().stdout;
    assert!(!pids.is_empty(), "no {program} of {word}");
    for pid in pids.split_whitespace() {
        run.end(run.engine.inside(&["kill", "-s", signal, pid]));
    }
}

/// containerd is killed and started again under a pod.
pub(crate) fn pod_restart(run: &Run<'_>) {
    let (id, short, pod_id, config) = {
        let cri = Cri::new(run);
        let pod = cri.pod(cri.pod_config("restart"));
        let short = pod.start(script("short", "sleep 4; exit 7"));
        let id = pod.start(script("one", "while :; do echo line; sleep 1; done"));
        (id, short, pod.id.clone(), pod.config.clone())
    };
    run.engine.kill_containerd_daemon();
    std::thread::sleep(Duration::from_secs(5));
    run.engine.start_containerd_daemon();
    let cri = Cri::new(run);
    let pod = cri.known(pod_id, config);
    assert_eq!(pod.exited(&short).exit_code, if run.isopod() { 7 } else { 255 });
    assert_eq!(pod.status(&id).state, ContainerState::ContainerRunning as i32);
    assert_eq!(pod.shell(&id, "echo inside"), "inside");
    let lines = pod.log("one").lines().count();
    let begun = Instant::now();
    while pod.log("one").lines().count() < lines + 2 {
        assert!(begun.elapsed() < Duration::from_secs(30), "the log does not go on");
        std::thread::sleep(Duration::from_millis(200));
    }
    pod.remove();
}

/// The shim is killed: the containers have ended, and the pod can be removed.
pub(crate) fn pod_shim_killed(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("shim"));
    let id = pod.start(script("one", "sleep 1000"));
    signal(run, "KILL", "containerd-shim-", &pod.id);
    assert_ne!(pod.exited(&id).exit_code, 0);
    pod.remove();
    if !run.isopod() {
        // runc's shim leaves its socket.
        run.end(run.engine.inside(&["sh", "-c", "rm /run/containerd/s/*"])).ok();
    }
}

/// The VMM is killed: both containers have ended, and the pod can be removed.
pub(crate) fn pod_vmm_killed(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("vmm"));
    let one = pod.start(script("one", "sleep 1000"));
    let two = pod.start(script("two", "sleep 1000"));
    signal(run, "KILL", "isopod-vmm", "--config-fd");
    for id in [one, two] {
        assert_eq!(pod.exited(&id).exit_code, 255);
    }
    assert!(pod.try_create(script("three", "true")).is_err());
    pod.remove();
}

/// The VMM is stopped, so the guest answers nothing: a container can be stopped, and the pod removed.
pub(crate) fn pod_vmm_stopped(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("stopped"));
    let [one, two] = ["one", "two"].map(|name| pod.start(script(name, "sleep 1000")));
    signal(run, "STOP", "isopod-vmm", "--config-fd");
    pod.stop(&one, 1);
    assert_ne!(pod.exited(&one).exit_code, 0);
    assert_eq!(pod.status(&two).state, ContainerState::ContainerRunning as i32);
    pod.remove();
}

/// A microVM that does not boot fails its pod, with the last lines of the guest's console.
pub(crate) fn pod_does_not_boot(run: &Run<'_>) {
    let cri = Cri::new(run);
    let settings = "mkdir -p /etc/isopod && mount -t tmpfs none /etc/isopod && \
                    echo 'kernel_params = \"rdinit=/missing\"' >/etc/isopod/config.toml";
    run.end(run.engine.inside(&["sh", "-c", settings])).ok();
    let config = cri.pod_config("boot");
    let logs = config.log_directory.clone();
    let error = cri.try_pod(config).map(|pod| pod.remove());
    run.end(run.engine.inside(&["umount", "/etc/isopod"])).ok();
    let error = error.expect_err("no pod boots without its first process");
    assert!(error.contains("Kernel panic - not syncing"), "{error}");
    std::fs::remove_dir_all(logs).expect("the logs");
    let pod = cri.pod(cri.pod_config("boots"));
    pod.remove();
}
