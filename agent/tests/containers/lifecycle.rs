//! States, exits and signals.

use std::time::Duration;

use isopod_protocol::agent::{ContainerRef, StreamTokens};
use serde_json::json;
use ttrpc::Code;

use super::driver::{Driver, code, context};

pub(crate) async fn statuses(d: &Driver) {
    let done = d.sh("echo out; echo err >&2; exit 7").await;
    assert_eq!((done.exit.status, done.exit.signal), (7, 0));
    assert_eq!((done.out.as_str(), done.err.as_str()), ("out\n", "err\n"));
    assert_eq!(d.sh("true").await.exit.status, 0);
    // The shell is the first process and cannot end itself by a signal; its child can.
    assert_eq!(d.sh("sh -c 'kill -9 $$'; exit $?").await.exit.status, 137);
    let id = d.sleeping(|_| ()).await;
    d.signal(&id, libc::SIGKILL, false).await.unwrap();
    let exit = d.wait(&id, "").await;
    assert_eq!((exit.status, exit.signal, exit.oom_killed), (137, 9, false));
    // A second wait returns at once, and a signal to an ended process is an error.
    assert_eq!(d.wait(&id, "").await.status, 137);
    assert_eq!(d.signal(&id, libc::SIGTERM, false).await.unwrap_err().0, Code::FAILED_PRECONDITION);
    d.delete(&id).await.unwrap();
}

pub(crate) async fn programs_that_cannot_run(d: &Driver) {
    for (program, code, message) in [
        ("foo", Code::NOT_FOUND, r#"exec: "foo": executable file not found in $PATH"#),
        ("/foo", Code::NOT_FOUND, r#"exec: "/foo": stat /foo: no such file or directory"#),
        ("/etc/plain", Code::PERMISSION_DENIED, r#"exec: "/etc/plain": permission denied"#),
        ("/etc", Code::PERMISSION_DENIED, r#"exec: "/etc": is a directory"#),
    ] {
        let mut spec = d.spec("");
        spec["process"]["args"] = json!([program]);
        let e = d.create(&d.name(), &spec, None).await.unwrap_err();
        assert_eq!(e, (code, message.to_owned()));
    }
    let id = d.name();
    let mut spec = d.spec("");
    spec["process"]["args"] = json!(["/bin/broken"]);
    d.create(&id, &spec, None).await.unwrap();
    let e = d.start_container(&id).await.unwrap_err();
    assert_eq!(e, (Code::PERMISSION_DENIED, "exec /bin/broken: exec format error".into()));
    d.wait(&id, "").await;
    d.delete(&id).await.unwrap();
}

pub(crate) async fn wrong_order_changes_nothing(d: &Driver) {
    let id = d.name();
    assert_eq!(d.start_container(&id).await.unwrap_err().0, Code::NOT_FOUND);
    d.create(&id, &d.spec("sleep 1000"), None).await.unwrap();
    assert_eq!(d.create(&id, &d.spec(""), None).await.unwrap_err().0, Code::FAILED_PRECONDITION);
    d.start_container(&id).await.unwrap();
    assert_eq!(d.start_container(&id).await.unwrap_err().0, Code::FAILED_PRECONDITION);
    d.signal(&id, libc::SIGKILL, false).await.unwrap();
    d.wait(&id, "").await;
    assert_eq!(d.start_container(&id).await.unwrap_err().0, Code::FAILED_PRECONDITION);
    let process = d.spec("true")["process"].clone();
    assert_eq!(d.exec(&id, "x", &process, None).await.unwrap_err().0, Code::FAILED_PRECONDITION);
    d.delete(&id).await.unwrap();
    assert_eq!(d.start_container(&id).await.unwrap_err().0, Code::NOT_FOUND);
    // A missing container is no error for a deletion.
    d.delete(&id).await.unwrap();
    for bad in ["", "a/b", ".."] {
        assert_eq!(d.create(bad, &d.spec(""), None).await.unwrap_err().0, Code::INVALID_ARGUMENT);
    }
}

pub(crate) async fn created_containers_can_be_killed(d: &Driver) {
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        let id = d.name();
        d.create(&id, &d.spec("true"), None).await.unwrap();
        d.signal(&id, signal, false).await.unwrap();
        assert_eq!(d.wait(&id, "").await.status, 128 + signal.unsigned_abs());
        assert_eq!(d.start_container(&id).await.unwrap_err().0, Code::FAILED_PRECONDITION);
        d.delete(&id).await.unwrap();
    }
}

pub(crate) async fn a_slow_call_holds_up_no_other(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    // A stream that is never connected keeps this call waiting.
    let tokens = StreamTokens { stdin: u64::MAX, ..Default::default() };
    let (slow, spec) = (d.name(), d.spec("true"));
    let waiting = d.create(&slow, &spec, Some(tokens));
    tokio::select! {
        biased;
        _ = waiting => panic!("the stream does not exist"),
        () = d.end(&id) => {}
    }
}

pub(crate) async fn signals_to_all(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    let io = d.io();
    let script =
        "trap 'echo got; exit 3' USR1; echo up; touch /tmp/up; while :; do sleep 0.05; done";
    let process = d.spec(script);
    d.exec(&id, "x", &process["process"], Some(io.tokens.clone())).await.unwrap();
    let r = ContainerRef { container_id: id.clone(), ..Default::default() };
    // The first shell, its sleep, and the second shell, once it has its handler.
    while d.client.list_processes(context(), &r).await.unwrap().processes.len() < 3
        || !d.file("/tmp/up").exists()
    {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    std::fs::remove_file(d.file("/tmp/up")).unwrap();
    d.signal(&id, libc::SIGUSR1, true).await.unwrap();
    let exit = d.wait(&id, "x").await;
    assert_eq!(exit.status, 3);
    assert_eq!(io.finish(exit).await.out, "up\ngot\n");
    d.signal(&id, libc::SIGKILL, true).await.unwrap();
    assert_eq!(d.wait(&id, "").await.status, 137);
    d.delete(&id).await.unwrap();
}

pub(crate) async fn without_a_pid_namespace_all_end_with_the_first(d: &Driver) {
    let mut spec = d.spec("sleep 1000 & echo $$; exit 5");
    spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "ipc"}]);
    spec.as_object_mut().unwrap().remove("hostname");
    let done = d.run(&spec).await;
    assert_eq!(done.exit.status, 5);
    assert_ne!(done.out, "1\n");
}

pub(crate) async fn exec_joins_the_container(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    let script = "hostname; for n in self/ns/pid 1/ns/pid self/ns/mnt 1/ns/mnt; do \
                  readlink /proc/$n; done; cat /proc/self/cgroup; id -u";
    let done = d.exec_sh(&id, script).await;
    let lines: Vec<&str> = done.out.lines().collect();
    assert_eq!(lines[0], "pod", "{done:?}");
    assert_eq!((lines[1], lines[3]), (lines[2], lines[4]));
    assert_eq!(lines.last(), Some(&"0"));
    assert!(done.out.contains("0::/\n"), "{}", done.out);
    assert_eq!(d.exec_sh(&id, "exit 9").await.exit.status, 9);
    assert_eq!(d.exec_sh(&id, "kill -15 $$").await.exit.signal, 15);
    let process = d.spec("sleep 1000")["process"].clone();
    d.exec(&id, "same", &process, None).await.unwrap();
    assert_eq!(d.exec(&id, "same", &process, None).await.unwrap_err().0, Code::FAILED_PRECONDITION);
    let mut missing = process.clone();
    missing["args"] = json!(["nope"]);
    assert_eq!(d.exec(&id, "m", &missing, None).await.unwrap_err().0, Code::NOT_FOUND);
    d.end(&id).await;
}

pub(crate) async fn statistics_of_a_removed_cgroup_are_an_ended_containers(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    let r = ContainerRef { container_id: id.clone(), ..Default::default() };
    d.client.container_stats(context(), &r).await.unwrap();
    d.signal(&id, libc::SIGKILL, false).await.unwrap();
    d.wait(&id, "").await;
    let group = format!("/proc/{}/root/sys/fs/cgroup/containers/{id}", d.agent_pid());
    // The group takes a moment to become empty.
    while std::fs::remove_dir(&group).is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let e = code(d.client.container_stats(context(), &r).await.unwrap_err());
    assert_eq!(e, (Code::FAILED_PRECONDITION, format!("container {id:?} has ended")));
    d.delete(&id).await.unwrap();
}

pub(crate) async fn signals_are_as_new(d: &Driver) {
    let mut spec = d.spec("");
    spec["process"]["args"] = json!(["grep", "-E", "Sig(Blk|Ign|Cgt)", "/proc/self/status"]);
    let check = |out: &str| {
        let none = "0000000000000000";
        assert_eq!(out, format!("SigBlk:\t{none}\nSigIgn:\t{none}\nSigCgt:\t{none}\n"));
    };
    check(&d.run(&spec).await.out);
    let id = d.sleeping(|_| ()).await;
    check(&d.exec_process(&id, &spec["process"]).await.out);
    d.end(&id).await;
}

pub(crate) async fn files_that_do_not_end_hold_nothing_up(d: &Driver) {
    let (passwd, away) = (d.file("/etc/passwd"), d.file("/etc/passwd.away"));
    std::fs::rename(&passwd, &away).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o644);
    rustix::fs::mkfifoat(rustix::fs::CWD, &passwd, mode).unwrap();
    let id = d.sleeping(|_| ()).await;
    let done = d.exec_sh(&id, "echo $HOME").await;
    d.end(&id).await;
    std::fs::rename(&away, &passwd).unwrap();
    assert_eq!(done.out, "/\n", "{done:?}");
}
