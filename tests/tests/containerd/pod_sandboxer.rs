//! Pods whose sandbox the shim has (`sandboxer = "shim"`): they have no first container of containerd's.

use std::time::{Duration, Instant};

use isopod_tests::engine::{Run, SANDBOXER};
use k8s_cri::v1::{ContainerState, NamespaceMode, PodSandboxConfig, PodSandboxState};

use crate::cri::{Cri, Pod, namespaces, script};
use crate::pod_losses::signal;
use crate::pod_observed::was_quiet;

const READY: i32 = PodSandboxState::SandboxReady as i32;
const NOT_READY: i32 = PodSandboxState::SandboxNotready as i32;

#[track_caller]
fn pod<'c, 'r, 'e>(cri: &'c Cri<'r, 'e>, config: PodSandboxConfig) -> Pod<'c, 'r, 'e> {
    cri.try_pod_of(SANDBOXER, config).unwrap_or_else(|error| panic!("RunPodSandbox: {error}"))
}

/// Looks at what the containers of a pod share.
#[track_caller]
fn shares(pod: &Pod<'_, '_, '_>, id: &str, file: &str) {
    assert_eq!(pod.shell(id, "hostname; cat /etc/hostname"), "sandboxer\nsandboxer");
    let resolv = pod.shell(id, "cat /etc/resolv.conf");
    assert_eq!(resolv, "search cluster.local\nnameserver 10.88.7.1");
    pod.shell(id, "test -f /etc/hosts");
    assert_eq!(pod.shell(id, "cat /dev/shm/file"), file);
    assert_eq!(pod.shell(id, "df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2"), "65536");
}

/// A request to a web server at loopback, as `kubectl port-forward` makes it.
fn ask(pod: &Pod<'_, '_, '_>, url: &str) -> String {
    let pid = pod.pod_info()["pid"].to_string();
    let wget = ["nsenter", "--target", &pid, "--net", "busybox", "wget", "-q", "-O", "-", url];
    let run = pod.cri.run;
    run.end(run.engine.on_network(&wget)).ok().stdout
}

/// A pod of two containers, from its start over a restart of containerd to its removal.
pub(crate) fn pod_sandboxer(run: &Run<'_>) {
    let serve = "mkdir /www && echo served >/www/file && httpd -p 127.0.0.1:8080 -h /www; \
                 echo one >/dev/shm/file; sleep 1000";
    let (pod_id, config, two) = {
        let cri = Cri::new(run);
        let pod = pod(&cri, cri.pod_config("sandboxer"));
        let containers = run.ok(&["--namespace", "k8s.io", "container", "ls", "--quiet"]);
        assert!(!containers.contains(&pod.id), "a first container: {containers}");
        assert_eq!(pod.pod_status().state, READY);
        assert!(pod.pod_info()["microvm"]["vcpus"].as_u64().is_some_and(|vcpus| vcpus > 0));

        let one = pod.start(script("one", serve));
        let two = pod.start(script("two", "sleep 1000"));
        pod.shell(&two, "until test -e /dev/shm/file; do sleep 0.1; done");
        let boot = "cat /proc/sys/kernel/random/boot_id";
        assert_eq!(pod.shell(&one, boot), pod.shell(&two, boot));
        [&one, &two].into_iter().for_each(|id| shares(&pod, id, "one"));
        // Processes are each container's own.
        assert!(!pod.shell(&two, "ps -o args").contains("httpd"));
        assert_eq!(ask(&pod, "http://127.0.0.1:8080/file"), "served\n");
        assert!(pod.stats(&two).memory.and_then(|memory| memory.working_set_bytes).is_some());
        let of_pod = pod.pod_stats().linux.expect("statistics").memory.expect("memory");
        // The pod's cgroup has the VMM, with all memory of the guest.
        assert!(of_pod.working_set_bytes.expect("a working set").value > 16 << 20);

        pod.stop(&one, 0);
        assert_eq!(pod.status(&one).exit_code, 137);
        pod.remove_container(&one);
        let mut again = script("one", "sleep 1000");
        again.metadata.as_mut().expect("a name").attempt = 1;
        let one = pod.start(again);
        shares(&pod, &one, "one");
        (pod.id.clone(), pod.config.clone(), two)
    };
    run.engine.kill_containerd_daemon();
    run.engine.start_containerd_daemon();
    let cri = Cri::new(run);
    let pod = cri.known(pod_id, config);
    assert_eq!(pod.pod_status().state, READY);
    assert_eq!(pod.status(&two).state, ContainerState::ContainerRunning as i32);
    shares(&pod, &two, "one");
    // A container of later has the pod's files too, which containerd has none of.
    let three = pod.start(script("three", "sleep 1000"));
    shares(&pod, &three, "one");
    // The holder has kept the memory, when no container has.
    for id in [&two, &three] {
        pod.stop(id, 0);
    }
    let four = pod.start(script("four", "sleep 1000"));
    shares(&pod, &four, "one");
    pod.remove();
}

/// A pod that shares its process namespace: orphans are reaped. Then a pod that is refused.
pub(crate) fn pod_sandboxer_processes(run: &Run<'_>) {
    let cri = Cri::new(run);
    let shared = |pid: NamespaceMode| {
        let mut config = cri.pod_config("sandboxer");
        let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        security.expect("a security context").namespace_options = Some(namespaces(pid));
        config
    };
    let pod = pod(&cri, shared(NamespaceMode::Pod));
    let with = |name: &str, text: &str| {
        let mut config = script(name, text);
        let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        security.expect("a security context").namespace_options =
            Some(namespaces(NamespaceMode::Pod));
        config
    };
    pod.start(with("one", "exec sleep 1111"));
    let two = pod.start(with("two", "exec sleep 2222"));
    let seen = pod.shell(&two, "ps -o args");
    assert!(seen.contains("sleep 1111") && seen.contains("sleep 2222"), "{seen}");
    let orphan = "(sleep 0.2 &); sleep 2; cat /proc/[0-9]*/status | grep -c '^State:.Z'; true";
    assert_eq!(pod.shell(&two, orphan), "0");
    let id = pod.id.clone();
    pod.remove();
    was_quiet(run, &id);

    let config = shared(NamespaceMode::Node);
    let logs = config.log_directory.clone();
    let error = cri.try_pod_of(SANDBOXER, config).map(|pod| pod.remove());
    let error = error.expect_err("a pod with the host's processes");
    assert!(error.contains("hostPID"), "{error}");
    std::fs::remove_dir_all(logs).expect("the logs");
}

/// The VMM is killed, and then the shim of another pod: the pods are not ready, and can be removed.
pub(crate) fn pod_sandboxer_killed(run: &Run<'_>) {
    let cri = Cri::new(run);
    for (program, word) in [("isopod-vmm", "--config-fd"), ("containerd-shim-", "")] {
        let pod = pod(&cri, cri.pod_config("sandboxer"));
        let one = pod.start(script("one", "sleep 1000"));
        let two = pod.start(script("two", "sleep 1000"));
        signal(run, "KILL", program, if word.is_empty() { &pod.id } else { word });
        for id in [one, two] {
            assert_ne!(pod.exited(&id).exit_code, 0);
        }
        let begun = Instant::now();
        while pod.pod_status().state != NOT_READY {
            assert!(begun.elapsed() < Duration::from_secs(60), "{program}: the pod stays ready");
            std::thread::sleep(Duration::from_millis(200));
        }
        pod.remove();
    }
}
