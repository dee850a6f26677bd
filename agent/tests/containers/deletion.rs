//! Deletion of further processes.

use std::time::Duration;

use isopod_protocol::agent::{ContainerRef, StreamTokens};
use serde_json::Value;
use ttrpc::Code;

use super::driver::{Driver, code, context, process_ref};

/// Processes in the test of leaks.
const MANY: usize = 1000;

/// Most threads of the agent after many processes, one after the other.
const MAX_THREADS: usize = 32;

fn container(id: &str) -> ContainerRef {
    ContainerRef { container_id: id.into(), ..Default::default() }
}

fn process(d: &Driver, script: &str) -> Value {
    d.spec(script)["process"].clone()
}

async fn delete(d: &Driver, id: &str, exec_id: &str) -> Result<(), (Code, String)> {
    d.client.delete_process(context(), &process_ref(id, exec_id)).await.map(drop).map_err(code)
}

/// Waits until a number of processes are in the container.
async fn until_there_are(d: &Driver, id: &str, count: usize) {
    let mut list = Vec::new();
    for _ in 0..1000 {
        list = d.client.list_processes(context(), &container(id)).await.unwrap().processes;
        if list.len() == count {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("not {count} processes: {list:?}");
}

/// Asserts that a process is not known, and that another process can have its id.
async fn assert_forgotten(d: &Driver, id: &str, exec_id: &str) {
    assert_eq!(d.try_wait(id, exec_id).await.unwrap_err().0, Code::NOT_FOUND);
    d.exec(id, exec_id, &process(d, "exit 4"), None).await.unwrap();
    assert_eq!(d.wait(id, exec_id).await.status, 4);
}

pub(crate) async fn a_running_process_is_killed_alone(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    d.exec(&id, "a", &process(d, "sleep 1000 & exec sleep 1001"), None).await.unwrap();
    // The container's shell and its sleep, and the same of the process.
    until_there_are(d, &id, 4).await;
    let mut waiting = std::pin::pin!(d.wait(&id, "a"));
    // The wait is sent first.
    assert!(tokio::time::timeout(Duration::from_millis(50), waiting.as_mut()).await.is_err());
    delete(d, &id, "a").await.unwrap();
    let exit = waiting.await;
    assert_eq!((exit.status, exit.signal), (137, libc::SIGKILL.unsigned_abs()));
    assert_forgotten(d, &id, "a").await;
    until_there_are(d, &id, 3).await;
    d.end(&id).await;
}

pub(crate) async fn a_process_whose_streams_are_missing_never_runs(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    let token = d.token();
    let tokens = StreamTokens { stdout: token, ..Default::default() };
    let script = process(d, "touch /tmp/ran");
    let mut starting = std::pin::pin!(d.exec(&id, "a", &script, Some(tokens)));
    assert!(tokio::time::timeout(Duration::from_millis(50), starting.as_mut()).await.is_err());
    assert_eq!(d.try_wait(&id, "a").await.unwrap_err().0, Code::FAILED_PRECONDITION);
    assert_eq!(d.exec(&id, "a", &script, None).await.unwrap_err().0, Code::FAILED_PRECONDITION);
    delete(d, &id, "a").await.unwrap();
    // The id is free while the first process still waits for its stream.
    assert_forgotten(d, &id, "a").await;
    let _stream = d.connect_stream(token);
    let e = starting.await.unwrap_err();
    assert_eq!(e, (Code::FAILED_PRECONDITION, r#"process "a" has been deleted"#.into()));
    assert_eq!(d.wait(&id, "a").await.status, 4, "the second process is gone too");
    assert!(!d.file("/tmp/ran").exists());
    d.end(&id).await;
}

pub(crate) async fn a_process_that_is_being_set_up_never_runs(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    until_there_are(d, &id, 2).await;
    // In a frozen container the set-up makes no progress.
    d.client.pause_container(context(), &container(&id)).await.unwrap();
    let script = process(d, "touch /tmp/ran");
    let starting = d.exec(&id, "a", &script, None);
    let deleting = async {
        until_there_are(d, &id, 3).await;
        delete(d, &id, "a").await.unwrap();
        d.client.resume_container(context(), &container(&id)).await.unwrap();
    };
    let (started, ()) = tokio::join!(starting, deleting);
    let e = started.unwrap_err();
    assert_eq!(e, (Code::FAILED_PRECONDITION, r#"process "a" has been deleted"#.into()));
    until_there_are(d, &id, 2).await;
    assert!(!d.file("/tmp/ran").exists());
    assert_forgotten(d, &id, "a").await;
    d.end(&id).await;
}

/// The host may give up its call at any time, so the deletion can follow without a pause.
pub(crate) async fn a_process_that_is_deleted_at_once_never_runs(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    let script = process(d, "touch /tmp/ran");
    for _ in 0..50 {
        // Sent in this order, on one connection.
        let (started, deleted) = tokio::join!(d.exec(&id, "a", &script, None), delete(d, &id, "a"));
        assert_eq!(started.unwrap_err().0, Code::FAILED_PRECONDITION);
        deleted.unwrap();
    }
    assert_forgotten(d, &id, "a").await;
    assert!(!d.file("/tmp/ran").exists());
    d.end(&id).await;
}

pub(crate) async fn an_ended_process_is_forgotten(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    d.exec(&id, "a", &process(d, "exit 3"), None).await.unwrap();
    assert_eq!(d.wait(&id, "a").await.status, 3);
    assert_eq!(d.wait(&id, "a").await.status, 3);
    delete(d, &id, "a").await.unwrap();
    delete(d, &id, "a").await.unwrap();
    assert_forgotten(d, &id, "a").await;
    d.end(&id).await;
}

pub(crate) async fn missing_processes_are_no_error(d: &Driver) {
    delete(d, &d.name(), "a").await.unwrap();
    let id = d.sleeping(|_| ()).await;
    delete(d, &id, "a").await.unwrap();
    let e = delete(d, &id, "").await.unwrap_err();
    assert_eq!(e.0, Code::INVALID_ARGUMENT);
    assert_eq!(d.exec_sh(&id, "exit 5").await.exit.status, 5);
    d.end(&id).await;
    delete(d, &id, "a").await.unwrap();
}

pub(crate) async fn a_thousand_processes_leave_nothing(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    let before = d.resources().await;
    let (short, long) = (process(d, "echo x"), process(d, "exec sleep 1000"));
    for i in 0..MANY {
        let exec_id = d.name();
        // Every other process is killed by its deletion.
        let script = if i % 2 == 0 { &short } else { &long };
        let io = d.io();
        d.exec(&id, &exec_id, script, Some(io.tokens.clone())).await.unwrap();
        if i % 2 == 0 {
            d.wait(&id, &exec_id).await;
        }
        delete(d, &id, &exec_id).await.unwrap();
        io.bytes().await;
        assert_eq!(d.try_wait(&id, &exec_id).await.unwrap_err().0, Code::NOT_FOUND);
    }
    // Each entry of the agent's table would hold a pidfd.
    d.settle(&before).await;
    // Idle threads of the agent's pool stay for some seconds.
    let threads = std::fs::read_dir(format!("/proc/{}/task", d.agent_pid())).unwrap().count();
    assert!(threads <= MAX_THREADS, "{threads} threads");
    d.end(&id).await;
}
