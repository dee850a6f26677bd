//! Facts about a pod that a kubelet gets to know: statistics, ends, limits.

use isopod_tests::engine::Run;
use k8s_cri::v1::{LinuxContainerResources, NamespaceMode};

use crate::cri::{Cri, container, script};

/// A process that goes over its container's memory limit. The other container of the pod goes on.
pub(crate) fn pod_out_of_memory(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("memory"));
    let other = pod.start(script("other", "sleep 1000"));
    let mut greedy = script("greedy", "x=0123456789; while :; do x=$x$x; done");
    let linux = greedy.linux.get_or_insert_default();
    linux.resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 32 << 20,
        memory_swap_limit_in_bytes: 32 << 20,
        ..LinuxContainerResources::default()
    });
    let greedy = pod.start(greedy);
    let status = pod.exited(&greedy);
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status:?}");
    assert_eq!(pod.shell(&other, "echo alive"), "alive");
    pod.stop(&other, 0);
    assert_eq!(pod.status(&other).reason, "Error");
    pod.remove();
}

/// Statistics are those of the container.
pub(crate) fn pod_stats(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("stats"));
    let id = pod.start(script("busy", "x=$(head -c 20000000 /dev/zero | tr '\\0' x); sleep 1000"));
    let idle = pod.start(script("idle", "sleep 1000"));
    let memory = |id: &str| {
        let memory = pod.stats(id).memory.expect("memory");
        memory.working_set_bytes.expect("a working set").value
    };
    let begun = std::time::Instant::now();
    while memory(&id) < 15_000_000 {
        assert!(begun.elapsed().as_secs() < 60, "{} bytes", memory(&id));
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    assert!(memory(&idle) < 8_000_000, "{} bytes", memory(&idle));
    let cpu = pod.stats(&id).cpu.expect("cpu");
    assert!(cpu.usage_core_nano_seconds.expect("a usage").value > 0);
    pod.remove();
}

/// A limit that is changed while the container runs.
pub(crate) fn pod_update(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("update"));
    let id = pod.start(script("one", "sleep 1000"));
    let resources = LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        ..LinuxContainerResources::default()
    };
    pod.update(&id, resources);
    assert_eq!(pod.shell(&id, "cat /sys/fs/cgroup/memory.max"), (64 << 20).to_string());
    assert_eq!(pod.shell(&id, "cat /sys/fs/cgroup/cpu.max"), "50000 100000");
    pod.remove();
}

/// A program that does not exist fails its container, and not the pod.
pub(crate) fn pod_missing_program(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("missing"));
    let id = pod.create(container("none", &["/bin/missing"]));
    let error = pod.try_start(&id).expect_err("a start of nothing");
    assert!(error.contains("/bin/missing"), "{error}");
    let id = pod.start(script("one", "exit 0"));
    assert_eq!(pod.exited(&id).exit_code, 0);
    pod.remove();
}

/// An exec that its caller gives up ends in the container.
pub(crate) fn pod_exec_timeout(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("exec"));
    let id = pod.start(script("one", "sleep 1000"));
    let error = pod.exec_within(&id, "exec sleep 4321", 1).expect_err("a timeout");
    assert!(error.contains("timeout") || error.contains("deadline"), "{error}");
    let begun = std::time::Instant::now();
    while pod.shell(&id, "ps").contains("4321") {
        assert!(begun.elapsed().as_secs() < 30, "it goes on");
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    pod.remove();
}

/// Processes of a pod that shares its process namespace, and a container that looks into another's.
pub(crate) fn pod_processes(run: &Run<'_>) {
    let cri = Cri::new(run);
    let mut config = cri.pod_config("shared");
    let shared = crate::cri::namespaces(NamespaceMode::Pod);
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    security.expect("a security context").namespace_options = Some(shared.clone());
    let pod = cri.pod(config);
    let with = |name: &str, text: &str, options: &k8s_cri::v1::NamespaceOption| {
        let mut config = script(name, text);
        let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        security.expect("a security context").namespace_options = Some(options.clone());
        config
    };
    let one = pod.start(with("one", "exec sleep 1111", &shared));
    let two = pod.start(with("two", "exec sleep 2222", &shared));
    let seen = pod.shell(&two, "ps -o args");
    assert!(seen.contains("sleep 1111") && seen.contains("sleep 2222"), "{seen}");
    pod.remove();
    drop(one);

    // As `kubectl debug --target` asks for it.
    let pod = cri.pod(cri.pod_config("target"));
    let one = pod.start(script("one", "exec sleep 1111"));
    let mut target = crate::cri::namespaces(NamespaceMode::Target);
    target.target_id = one;
    let debug = pod.start(with("debug", "exec sleep 2222", &target));
    let seen = pod.shell(&debug, "ps -o pid,args");
    assert!(seen.lines().any(|line| line.trim().starts_with("1 sleep 1111")), "{seen}");
    pod.remove();
}

/// The microVM has the size of its pod, whatever its containers' limits.
pub(crate) fn pod_size(run: &Run<'_>) {
    let cri = Cri::new(run);
    let mut config = cri.pod_config("size");
    config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 250_000,
        memory_limit_in_bytes: 512 << 20,
        ..LinuxContainerResources::default()
    });
    let pod = cri.pod(config);
    let id = pod.start(script("one", "sleep 1000"));
    assert_eq!(pod.shell(&id, "grep -c ^processor /proc/cpuinfo"), "3");
    let total = pod.shell(&id, "grep MemTotal /proc/meminfo");
    let kib: u64 = total.split_whitespace().nth(1).expect("a number").parse().expect("a number");
    assert!((512 << 10..640 << 10).contains(&kib), "{total}");
    pod.remove();
}
