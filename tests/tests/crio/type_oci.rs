//! Type `oci`: conmon calls the runtime. CRI-O leaves the infra container out, unless a pod shares
//! its processes or `drop_infra_ctr` is false.

use std::fs;
use std::sync::mpsc::channel;
use std::thread;

use isopod_tests::subreaper::End;
use isopod_tests::{Container, Created, DEADLINE, Scope, microvm_only, runtime};
use nix::sys::stat::Mode;
use serde_json::json;

use crate::pinned_pod::Pod;

const SLEEPER: &str = "echo up; exec sleep 1000";

fn up<'s>(container: &Container<'s>) -> Created<'s> {
    let mut created = container.start_new();
    created.stdout.line_with("up");
    created
}

fn shell(container: &Container<'_>, script: &str) -> String {
    container.exec(["sh", "-c", script]).ok().stdout
}

/// The namespaces, host name and boot that containers of one pod have in common.
fn shared(container: &Container<'_>) -> String {
    let mut script = "cd /proc/self/ns; readlink net ipc uts; hostname".to_owned();
    if runtime().is_isopod() {
        script += "; cat /proc/sys/kernel/random/boot_id";
    }
    shell(container, &script)
}

fn end(container: &Container<'_>, created: &Created<'_>) {
    container.kill("KILL").ok();
    assert_eq!(created.wait().status(), 137);
    container.delete().ok();
}

#[test]
fn a_pod_without_an_infra_container_is_one_microvm() {
    let scope = Scope::new();
    let pod = Pod::new(&scope);
    let [one, two, three] = [(); 3].map(|()| pod.container(SLEEPER));
    let first = up(&one);
    let second = up(&two);
    assert_eq!(shared(&one), shared(&two));
    assert!(shared(&one).contains("the-pod\n"));
    for file in ["mnt", "pid"] {
        let of = |container| shell(container, &format!("readlink /proc/self/ns/{file}"));
        assert_ne!(of(&one), of(&two), "{file}");
    }
    shell(&two, "echo hello >/page; httpd -p 127.0.0.1:8080 -h /");
    assert_eq!(shell(&one, "wget -q -O - http://127.0.0.1:8080/page"), "hello\n");
    // The first container ends, and the others do not notice.
    let before = shared(&two);
    end(&one, &first);
    assert_eq!(shared(&two), before);
    let third = up(&three);
    assert_eq!(shared(&three), before);
    end(&two, &second);
    end(&three, &third);
    // Without containers the microVM is not needed any more.
    scope.wait_for_processes();
    drop(pod);
    scope.assert_nothing_left();
}

#[test]
fn init_containers_come_one_after_the_other() {
    let scope = Scope::new();
    let pod = Pod::new(&scope);
    for status in [0, 7] {
        let script = format!("echo from $(hostname); exit {status}");
        let out = pod.container(&script).run();
        assert_eq!((out.status, &*out.stdout), (status, "from the-pod\n"), "{out}");
    }
    // A container that cannot be made leaves no microVM.
    let missing = pod.container("").args(["/bin/missing"]).run();
    assert_eq!(missing.status, 1, "{missing}");
    scope.wait_for_processes();
    drop(pod);
    scope.assert_nothing_left();
}

#[test]
fn an_infra_container_has_the_microvm() {
    let scope = Scope::new();
    let pod = Pod::new(&scope);
    let infra = pod.infra().shell(SLEEPER);
    let holder = up(&infra);
    let one = pod.container(SLEEPER);
    let first = up(&one);
    assert_eq!(shared(&infra), shared(&one));
    end(&one, &first);
    end(&infra, &holder);
    drop(pod);
    scope.assert_nothing_left();
}

#[test]
fn what_a_killed_holder_leaves_goes_with_its_containers() {
    microvm_only!();
    let scope = Scope::new();
    let pod = Pod::new(&scope);
    let one = pod.container(SLEEPER);
    let first = up(&one);
    let state = scope.runtime().args(["state", &pod.id]).output().ok().stdout;
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    assert_eq!(state["status"], "created");
    scope.program(&["kill", "-9", &state["pid"].to_string()]).output().ok();
    assert_eq!(first.wait(), End::Exited(255));
    one.delete().ok();
    scope.wait_for_processes();
    // The pod can have another one.
    let two = pod.container("exit 5");
    assert_eq!(two.run().status, 5);
    scope.wait_for_processes();
    drop(pod);
    scope.assert_nothing_left();
}

#[test]
fn a_creation_that_is_killed_leaves_no_microvm() {
    microvm_only!();
    let scope = Scope::new();
    let pod = Pod::new(&scope);
    let began = scope.dir().join("began");
    nix::unistd::mkfifo(&began, Mode::from_bits_truncate(0o700)).unwrap();
    // The hook runs when the microVM is there, and the container is not.
    let hook = format!("echo >{}; exec sleep 1000", began.display());
    let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", hook] });
    let one = pod.container("").edit(|c| c["hooks"] = json!({ "createRuntime": [hook] }));
    let (tell, told) = channel();
    let fifo = began.clone();
    thread::spawn(move || tell.send(fs::read_to_string(fifo)));
    let mut creation = one.command_with_bundle("create", &[]).spawn();
    assert_eq!(told.recv_timeout(DEADLINE).unwrap().unwrap(), "\n");
    let state = scope.runtime().args(["state", &pod.id]).output().ok().stdout;
    assert!(state.contains(r#""status": "created""#), "{state}");
    creation.kill();
    creation.wait();
    scope.wait_for_processes();
    fs::remove_file(&began).unwrap();
    drop(pod);
    scope.assert_nothing_left();
}

#[test]
fn containers_that_come_at_once_share_one_microvm() {
    let scope = Scope::new();
    let pod = Pod::new(&scope);
    let serving = pod.container("echo met >/page; httpd -p 127.0.0.1:8080 -h /; exec sleep 1000");
    // It never ends if the two have not met.
    let asking = "until wget -q -O - http://127.0.0.1:8080/page 2>&-; do sleep 0.1; done";
    let asking = pod.container(asking);
    let served = serving.command_with_bundle("run", &[]).spawn();
    let asked = asking.run();
    assert_eq!((asked.status, &*asked.stdout), (0, "met\n"), "{asked}");
    serving.kill("KILL").ok();
    let served = served.output();
    assert_eq!(served.status, 137, "{served}");
    scope.wait_for_processes();
    drop(pod);
    scope.assert_nothing_left();
}
