//! Type `vm`: CRI-O speaks to the shim. It never executes the shim's `delete`.

use std::path::Path;

use isopod_tests::{Scope, microvm_only};
use serde_json::json;

use crate::pinned_pod::Pod;
use crate::vm_container::{CREATED, NOT_FOUND, Outcome, RUNNING, STOPPED, Task};

/// A namespace of a container's processes.
fn namespace(task: &mut Task<'_>, file: &str) -> String {
    task.shell(&format!("readlink /proc/self/ns/{file}"))
}

/// Ends a pod's infra container, and with it the shim. Nothing is left then.
fn end(scope: &Scope, mut infra: Task<'_>) {
    let address = infra.address.clone();
    infra.kill(9).unwrap();
    assert_eq!(infra.wait(), 137);
    infra.remove();
    scope.wait_for_processes();
    let socket = address.strip_prefix("unix://").unwrap();
    assert!(!Path::new(socket).exists());
    assert!(states(scope).is_empty());
}

/// The state directories of this scope's tasks.
fn states(scope: &Scope) -> Vec<String> {
    let entries = std::fs::read_dir("/run/isopod/containerd/default").into_iter().flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.contains(scope.name())).collect()
}

#[test]
fn a_pod_from_its_first_call_to_its_last() {
    microvm_only!();
    let scope = Scope::new();
    let pod = Pod::new(&scope);
    let mut infra = Task::create(&scope, pod.infra());
    assert_eq!(infra.state().number(4), CREATED);
    infra.start();
    assert_eq!(infra.state().number(4), RUNNING);

    let script = "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done";
    let mut one = Task::create(&scope, pod.container(script));
    let hungry = pod.container("sleep 1; exec tail /dev/zero").edit(|c| {
        c["linux"]["resources"]["memory"] = json!({ "limit": 32 << 20, "swap": 32 << 20 });
    });
    let mut two = Task::create(&scope, hungry);
    assert_eq!((&one.address, &two.address), (&infra.address, &infra.address));
    one.start();
    // One microVM, and the pod's namespaces.
    for file in ["net", "ipc", "uts"] {
        assert_eq!(namespace(&mut infra, file), namespace(&mut one, file), "{file}");
    }
    assert_ne!(namespace(&mut infra, "pid"), namespace(&mut one, "pid"));
    assert_eq!(one.shell("hostname"), "the-pod\n");
    let page = "echo hello >/page; httpd -p 127.0.0.1:8080 -h /";
    infra.shell(page);
    assert_eq!(one.shell("wget -q -O - http://127.0.0.1:8080/page"), "hello\n");

    let echoed = one.exec("cat; exit 4", "typed\n");
    assert_eq!(echoed, Outcome { status: 4, stdout: "typed\n".to_owned() });
    let (kind, metrics) = one.stats();
    assert_eq!(kind, "io.containerd.cgroups.v2.Metrics");
    // pids, cpu, memory: CRI-O takes it for granted that they are there.
    for field in 1..=4 {
        assert!(field == 3 || metrics.message(field).is_some(), "{metrics:?}");
    }
    one.update(&json!({ "pids": { "limit": 33 } }));
    assert_eq!(one.shell("cat /sys/fs/cgroup/pids.max"), "33\n");
    let id = one.id();
    one.client.ok("Pause", &id);
    one.client.ok("Resume", &id);

    // CRI-O is started again.
    one.reconnect();
    let state = one.state();
    assert_eq!(state.number(4), RUNNING);
    assert_eq!(state.text(6), one.container.bundle.dir.join("stdout").to_string_lossy());
    one.kill(0).unwrap();
    one.kill(15).unwrap();
    assert_eq!(one.wait(), 3);
    assert_eq!((one.state().number(4), one.state().number(9)), (STOPPED, 3));
    assert_eq!(one.kill(0).unwrap_err().code, NOT_FOUND);
    assert_eq!(one.remove(), "up\n");

    // The kill at the memory limit, as CRI-O hears of it.
    let told = two.container.bundle.dir.join("oom");
    assert!(!told.exists());
    two.start();
    assert_eq!(two.wait(), 137);
    assert!(told.exists());
    two.remove();
    end(&scope, infra);
    drop(pod);
    scope.assert_nothing_left();
}

#[test]
fn what_a_killed_shim_leaves_goes_with_the_next_pod() {
    microvm_only!();
    let scope = Scope::new();
    let mut pod = Pod::new(&scope);
    let mut lost = Task::create(&scope, pod.infra());
    lost.start();
    let id = lost.id();
    let shim = lost.client.ok("Connect", &id).number(1);
    scope.program(&["kill", "-9", &shim.to_string()]).output().ok();
    scope.wait_for_processes();
    assert_eq!(states(&scope), [pod.id.as_str()]);
    drop(lost);
    pod.id = format!("{}next", scope.name());
    let mut infra = Task::create(&scope, pod.infra());
    assert_eq!(states(&scope), [pod.id.as_str()]);
    infra.start();
    end(&scope, infra);
    drop(pod);
    scope.assert_nothing_left();
}

#[test]
fn the_hosts_namespaces_are_refused() {
    microvm_only!();
    let scope = Scope::new();
    let pod = Pod::new(&scope);
    let infra = pod.infra().edit(|c| {
        for namespace in c["linux"]["namespaces"].as_array_mut().unwrap() {
            if namespace["type"] == "ipc" {
                namespace["path"] = json!("/proc/self/ns/ipc");
            }
        }
    });
    let refused = Task::try_create(&scope, infra).err().expect("a refusal");
    assert!(refused.text.contains("hostIPC"), "{refused:?}");
    scope.wait_for_processes();
    drop(pod);
    scope.assert_nothing_left();
}
