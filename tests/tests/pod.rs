//! Containers of a pod: several in one microVM, which share namespaces and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::time::Instant;

use isopod_tests::subreaper::End;
use isopod_tests::{Container, Created, DEADLINE, PROBE_PATH, RunningCommand, Scope, microvm_only};
use serde_json::{Value, json};

/// The namespaces that Podman shares by default, by their names in config.json and in /proc.
const SHARED: [(&str, &str); 3] = [("network", "net"), ("ipc", "ipc"), ("uts", "uts")];

/// The first container of a pod.
fn first(scope: &Scope) -> (Container<'_>, Created<'_>) {
    let container = scope
        .container()
        .annotation("io.kubernetes.cri-o.ContainerType", "sandbox")
        .edit(|c| c["hostname"] = json!("the-pod"))
        .shell("echo up; exec sleep 1000");
    let mut created = container.start_new();
    created.stdout.line_with("up");
    (container, created)
}

/// A further container of the pod whose first container has this pid.
fn member<'a>(scope: &'a Scope, pid: i32) -> Container<'a> {
    sharing(scope.container(), pid, &SHARED)
        .annotation("io.kubernetes.cri-o.ContainerType", "container")
        .shell("echo up; exec sleep 1000")
}

fn sharing<'a>(container: Container<'a>, pid: i32, shared: &[(&str, &str)]) -> Container<'a> {
    container.sharing(pid, shared).edit(|c| {
        c.as_object_mut().unwrap().remove("hostname");
    })
}

fn up<'a>(container: &Container<'a>) -> Created<'a> {
    let mut created = container.start_new();
    created.stdout.line_with("up");
    created
}

/// A namespace of a container's processes.
fn namespace(container: &Container<'_>, file: &str) -> String {
    container.exec(["readlink", &format!("/proc/self/ns/{file}")]).ok().stdout
}

fn shell(container: &Container<'_>, script: &str) -> String {
    container.exec(["sh", "-c", script]).ok().stdout
}

#[test]
fn a_container_shares_namespaces_with_the_first() {
    let scope = Scope::new();
    let (first, created) = first(&scope);
    let one = member(&scope, created.pid);
    let _one = up(&one);
    for (_, file) in SHARED {
        assert_eq!(namespace(&first, file), namespace(&one, file), "{file}");
    }
    for file in ["mnt", "pid", "cgroup"] {
        assert_ne!(namespace(&first, file), namespace(&one, file), "{file}");
    }
    assert_eq!(shell(&one, "hostname"), "the-pod\n");
    // A server of one container is reachable from the other, on their common loopback.
    shell(&one, "echo hello >/page; httpd -p 127.0.0.1:8080 -h /");
    assert_eq!(shell(&first, "wget -q -O - http://127.0.0.1:8080/page"), "hello\n");
    // Files and processes are not shared.
    assert_eq!(first.exec(["test", "-e", "/page"]).status, 1);
    assert!(!shell(&first, "ps -o args").contains("httpd"));
    one.delete_force().ok();
    first.delete_force().ok();
    scope.assert_nothing_left();
}

#[test]
fn it_has_no_microvm_of_its_own() {
    microvm_only!();
    let scope = Scope::new();
    let (first, created) = first(&scope);
    let before = scope.census();
    let one = member(&scope, created.pid);
    let other = member(&scope, created.pid);
    let (mut first_one, _second) = (up(&one), up(&other));
    let boot_id =
        |container: &Container<'_>| shell(container, "cat /proc/sys/kernel/random/boot_id");
    assert_eq!(boot_id(&first), boot_id(&one));
    assert_eq!(boot_id(&first), boot_id(&other));
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", first_one.pid));
    assert_eq!(children.unwrap(), "");
    let held = held(&scope, created.pid);
    // The member ends, is deleted and made again, and the others do not notice.
    one.kill("TERM").ok();
    assert_eq!(one.kill("KILL").status, 0);
    assert_eq!(first_one.wait(), End::Exited(137));
    one.delete().ok();
    other.delete_force().ok();
    assert_eq!(scope.census().since(&before), Vec::<String>::new());
    first_one = up(&one);
    assert_eq!(boot_id(&first), boot_id(&one));
    one.kill("KILL").ok();
    first_one.wait();
    one.delete().ok();
    assert_eq!(scope.census().since(&before), Vec::<String>::new());
    // The microVM holds nothing of the deleted member either.
    let [mounts, seen, files] = self::held(&scope, created.pid);
    let of_one = one.bundle.dir.to_string_lossy().into_owned();
    for list in [&mounts, &seen, &files] {
        assert!(!list.contains(&of_one) && !list.contains(&one.id), "{list}");
    }
    assert!(held.iter().any(|list| list.contains(&one.id)), "{held:?}");
    first.delete_force().ok();
    scope.assert_nothing_left();
}

/// The mounts of a pod's sandbox process and of its VMM, and the VMM's open files.
fn held(scope: &Scope, pid: i32) -> [String; 3] {
    let vmm = scope.child(pid, "isopod-vmm");
    let mounts = |pid| fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let files = scope.program(&["ls", "-l", &format!("/proc/{vmm}/fd")]).output().ok().stdout;
    [mounts(pid), mounts(vmm), files]
}

#[test]
fn mounts_of_the_host_stay_when_it_goes() {
    microvm_only!();
    let scope = Scope::new();
    let (first, created) = first(&scope);
    let volume = scope.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    let source = volume.to_string_lossy().into_owned();
    let below = volume.join("below");
    let mount = format!(
        "mount -t tmpfs none {source} && mount --make-shared {source} && mkdir {source}/below && \
         mount -t tmpfs none {source}/below && echo kept >{source}/below/file"
    );
    scope.program(&["sh", "-c", &mount]).output().ok();
    let one = member(&scope, created.pid)
        .mount("/volume", "bind", &source, &["rbind", "rw"])
        .shell("cat /volume/below/file");
    let out = one.run();
    let still = fs::read_to_string(below.join("file"));
    // Mounts that the host makes while a member runs come and go with it as well.
    let two = member(&scope, created.pid).mount("/volume", "bind", &source, &["rbind", "rw"]);
    let _two = up(&two);
    let over = format!("mount -t tmpfs none {source}/below && mount -t tmpfs none {source}");
    scope.program(&["sh", "-c", &over]).output().ok();
    two.delete_force().ok();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let kept = mounts.lines().filter(|line| line.contains(&source)).count();
    scope.program(&["umount", "--recursive", &source]).output().ok();
    scope.program(&["umount", "--recursive", &source]).output().ok();
    assert_eq!((out.status, out.stdout.as_str()), (0, "kept\n"), "{out}");
    assert_eq!(still.unwrap(), "kept\n");
    assert_eq!(kept, 4, "{mounts}");
    let again = member(&scope, created.pid).args(["true"]);
    assert_eq!(again.run().status, 0);
    first.delete_force().ok();
    scope.assert_nothing_left();
}

/// A container whose /dev/shm is bound from the host.
fn with_shm<'a>(container: Container<'a>, source: &str) -> Container<'a> {
    let options = ["rbind", "nosuid", "noexec", "nodev", "rprivate"];
    let without = container.edit(|c| {
        c["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] != "/dev/shm");
    });
    without.mount("/dev/shm", "bind", source, &options)
}

/// Sets a mark in a page of shared memory, and waits for the mark of another container.
fn meet<'a>(container: &Container<'a>, own: &str, other: &str) -> RunningCommand<'a> {
    let probe = [PROBE_PATH, "meet", "/dev/shm/page", own, other];
    container.command("exec", &[]).args(probe).spawn()
}

/// Engines make this for the containers of a pod: a tmpfs of the host, bound at /dev/shm by each.
#[test]
fn shared_memory_is_one_for_all_containers() {
    let scope = Scope::new();
    let host = scope.dir().join("shm");
    fs::create_dir(&host).unwrap();
    let source = host.to_string_lossy().into_owned();
    let mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=1777", "shm", &source];
    scope.program(&mount).output().ok();
    let first = with_shm(scope.container(), &source)
        .annotation("io.kubernetes.cri-o.ContainerType", "sandbox")
        .shell("echo up; exec sleep 1000");
    let mut created = first.start_new();
    created.stdout.line_with("up");
    let one = with_shm(member(&scope, created.pid), &source);
    let _one = up(&one);
    for container in [&first, &one] {
        assert_eq!(shell(container, "stat -f -c '%b %S %t' /dev/shm"), "512 4096 1021994\n");
        assert_eq!(shell(container, "stat -c '%a %u %g' /dev/shm"), "1777 0 0\n");
    }
    shell(&first, "echo text >/dev/shm/file");
    assert_eq!(shell(&one, "cat /dev/shm/file"), "text\n");
    let (a, b) = (meet(&first, "0", "1"), meet(&one, "1", "0"));
    assert_eq!((a.output().ok().stdout, b.output().ok().stdout), ("met\n".into(), "met\n".into()));
    // The shared memory outlives a member.
    one.delete_force().ok();
    let again = with_shm(member(&scope, created.pid), &source);
    let _again = up(&again);
    assert_eq!(shell(&again, "cat /dev/shm/file"), "text\n");
    again.delete_force().ok();
    first.delete_force().ok();
    scope.program(&["umount", &source]).output().ok();
    scope.assert_nothing_left();
}

#[test]
fn a_creation_that_is_given_up_leaves_nothing_in_the_guest() {
    microvm_only!();
    let scope = Scope::new();
    let (first, created) = first(&scope);
    let before = scope.census();
    // A hook in the guest that does not end by itself.
    let one = member(&scope, created.pid);
    let root = format!("/run/isopod/shared/{}/rootfs", one.id);
    let script = format!(": >{root}/begun; kill -STOP $$");
    let hook = json!({ "path": "/bin/busybox", "args": ["sh", "-c", script] });
    let one = one.edit(|c| c["hooks"] = json!({ "createContainer": [hook] }));
    let mut job = one.command_with_bundle("create", &[]).spawn();
    let until = Instant::now() + DEADLINE;
    while !one.bundle.rootfs("/begun").exists() {
        assert!(Instant::now() < until && job.ended().is_none(), "no hook runs");
        shell(&first, "true");
    }
    job.kill();
    job.wait();
    while one.command("state", &[]).output().status == 0 {
        assert!(Instant::now() < until, "it is still there");
    }
    assert_eq!(scope.census().since(&before), Vec::<String>::new());
    // The name is free in the guest.
    let one = one.edit(|c| drop(c.as_object_mut().unwrap().remove("hooks"))).args(["true"]);
    assert_eq!(one.run().status, 0);
    first.delete_force().ok();
    scope.assert_nothing_left();
}

#[test]
fn its_exit_status_output_and_volumes_are_its_own() {
    let scope = Scope::new();
    let (first, created) = first(&scope);
    let volume = scope.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("in"), "from the host\n").unwrap();
    let source = volume.to_string_lossy().into_owned();
    let one = member(&scope, created.pid)
        .mount("/volume", "bind", &source, &["rbind", "rw"])
        .mount("/fixed", "bind", &source, &["rbind", "ro"])
        .shell("cat /volume/in; echo back >/volume/out; echo err >&2; >/fixed/x; exit 7");
    let out = one.run();
    assert_eq!((out.status, out.stdout.as_str()), (7, "from the host\n"), "{out}");
    assert!(out.stderr.starts_with("err\n") && out.stderr.contains("Read-only"), "{out}");
    assert_eq!(fs::read_to_string(volume.join("out")).unwrap(), "back\n");
    // Again, with the same name: nothing of the first run is left there.
    let out = one.run();
    assert_eq!(out.status, 7, "{out}");
    first.delete_force().ok();
    scope.assert_nothing_left();
}

#[test]
fn its_limits_pauses_and_statistics_are_its_own() {
    microvm_only!();
    let scope = Scope::new();
    let (first, created) = first(&scope);
    let one = member(&scope, created.pid)
        .edit(|c| c["linux"]["resources"]["pids"] = json!({ "limit": 11 }));
    let _one = up(&one);
    let limit = "cat /sys/fs/cgroup/pids.max";
    assert_eq!((shell(&one, limit).as_str(), shell(&first, limit).as_str()), ("11\n", "max\n"));
    one.command("pause", &[]).output().ok();
    assert_eq!((one.status().as_str(), first.status().as_str()), ("paused", "running"));
    assert_eq!(shell(&first, "echo runs"), "runs\n");
    one.command("resume", &[]).output().ok();
    let events = one.command("events", &["--stats"]).output().ok().stdout;
    let events: Value = serde_json::from_str(&events).unwrap();
    assert_eq!(events["data"]["pids"]["limit"], 11, "{events}");
    one.delete_force().ok();
    first.delete_force().ok();
    scope.assert_nothing_left();
}

#[test]
fn processes_can_be_shared_too() {
    let scope = Scope::new();
    let (first, created) = first(&scope);
    let shared = [&SHARED[..], &[("pid", "pid")]].concat();
    let one = sharing(member(&scope, created.pid), created.pid, &shared);
    let _one = up(&one);
    assert_eq!(namespace(&first, "pid"), namespace(&one, "pid"));
    let seen = shell(&one, "ps -o pid,args");
    assert!(seen.lines().any(|line| line.trim() == "1 sleep 1000"), "{seen}");
    one.kill("KILL").ok();
    one.delete_force().ok();
    assert_eq!(shell(&first, "echo lives"), "lives\n");
    first.delete_force().ok();
    scope.assert_nothing_left();
}

#[test]
fn the_end_of_the_first_is_the_end_of_all() {
    microvm_only!();
    let scope = Scope::new();
    let (first, created) = first(&scope);
    let one = member(&scope, created.pid);
    let other = up(&one);
    first.kill("KILL").ok();
    created.wait();
    // The guest ends its processes before it goes.
    assert_eq!(other.wait(), End::Exited(137));
    assert_eq!(one.status(), "stopped");
    one.delete().ok();
    first.delete().ok();
    scope.assert_nothing_left();
}

#[test]
fn a_lost_microvm_is_lost_to_all() {
    microvm_only!();
    let scope = Scope::new();
    let (first, created) = first(&scope);
    let one = member(&scope, created.pid);
    let mut other = up(&one);
    let vmm = scope.child(created.pid, "isopod-vmm");
    scope.program(&["kill", "-9", &vmm.to_string()]).output().ok();
    created.wait();
    assert_eq!(other.wait(), End::Exited(255));
    let said = other.stderr.so_far();
    assert!(said.contains(&first.id) && said.lines().count() == 1, "{said}");
    assert_eq!(one.status(), "stopped");
    one.exec(["true"]).one_line_error(&[&one.id]);
    one.delete().ok();
    first.delete().ok();
    scope.assert_nothing_left();
}

/// The sandbox process of the first container has all containers of the pod.
#[test]
fn a_killed_sandbox_process_is_the_end_of_all() {
    microvm_only!();
    let scope = Scope::new();
    let (first, created) = first(&scope);
    let one = member(&scope, created.pid);
    let other = up(&one);
    scope.program(&["kill", "-9", &created.pid.to_string()]).output().ok();
    created.wait();
    assert_eq!(other.wait(), End::Exited(255));
    let state = one.state();
    let error = state["annotations"]["dev.isopod.error"].as_str().unwrap_or_default();
    assert!(state["status"] == "stopped" && error.contains(&first.id), "{state}");
    one.delete().ok();
    first.delete().ok();
    scope.assert_nothing_left();
}

#[test]
fn a_killed_sandbox_process_leaves_nothing_after_delete() {
    microvm_only!();
    let scope = Scope::new();
    let (first, created) = first(&scope);
    let before = scope.census();
    let one = member(&scope, created.pid);
    let other = up(&one);
    scope.program(&["kill", "-9", &other.pid.to_string()]).output().ok();
    other.wait();
    assert_eq!(one.status(), "stopped");
    one.delete().ok();
    assert_eq!(scope.census().since(&before), Vec::<String>::new());
    // Nothing is left in the guest either: the name is free again.
    let _again = up(&one);
    one.delete_force().ok();
    first.delete_force().ok();
    scope.assert_nothing_left();
}

#[test]
fn what_a_running_microvm_cannot_give_is_refused() {
    microvm_only!();
    let scope = Scope::new();
    let (first, created) = first(&scope);
    let before = scope.census();
    let refused = |container: Container<'_>, words: &[&str]| {
        container.run().one_line_error(words);
    };
    let one = || member(&scope, created.pid);
    refused(
        one().edit(|c| c["linux"]["resources"]["memory"] = json!({ "limit": 4_u64 << 30 })),
        &["4096 MiB", "2048 MiB", "dev.isopod.memory_mib"],
    );
    refused(
        one().edit(|c| {
            c["linux"]["namespaces"]
                .as_array_mut()
                .unwrap()
                .push(json!({ "type": "user", "path": format!("/proc/{}/ns/user", created.pid) }));
            let map = json!([{ "containerID": 0, "hostID": 1000, "size": 10 }]);
            c["linux"]["uidMappings"] = map.clone();
            c["linux"]["gidMappings"] = map;
        }),
        &["linux.uidMappings", "whose user namespace it shares"],
    );
    refused(
        one().edit(|c| {
            let path = format!("/proc/{}/ns/time", created.pid);
            let namespace = json!({ "type": "time", "path": path });
            c["linux"]["namespaces"].as_array_mut().unwrap().push(namespace);
        }),
        &["time namespace", "cannot be shared"],
    );
    // A process of the host, and a container without an annotation of its pod.
    refused(sharing(one(), 1, &SHARED), &["process 1 is no container's"]);
    refused(
        sharing(scope.container(), created.pid, &SHARED[..1]).args(["true"]),
        &["--network container:"],
    );
    // A missing program, noticed when everything else has been made.
    let missing = one().args(["no-such-program"]).run();
    assert_eq!(missing.status, 1, "{missing}");
    assert_eq!(scope.census().since(&before), Vec::<String>::new());
    first.delete_force().ok();
    scope.assert_nothing_left();
}
