//! Standard streams and terminals.

use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use isopod_protocol::agent::{ProcessRef, ResizeTerminalRequest, TerminalSize};
use protobuf::MessageField;
use serde_json::json;

use super::driver::{Driver, context};

const SIZE: usize = 64 << 20;

fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).take(SIZE / 4).flatten().collect()
}

pub(crate) async fn both_ways_at_once(d: &Driver) {
    let id = d.name();
    let io = d.io();
    d.create(&id, &d.spec("cat"), Some(io.tokens.clone())).await.unwrap();
    d.start_container(&id).await.unwrap();
    let sent = pattern();
    let mut stdin = io.stdin.try_clone().unwrap();
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || {
            stdin.write_all(&sent).unwrap();
            stdin.shutdown(std::net::Shutdown::Write).unwrap();
        }
    });
    let began = Instant::now();
    assert_eq!(d.wait(&id, "").await.status, 0);
    writer.join().unwrap();
    assert!(io.bytes().await == sent, "the bytes are not those that were sent");
    println!("       (64 MiB both ways in {} ms)", began.elapsed().as_millis());
    d.delete(&id).await.unwrap();
}

pub(crate) async fn last_line_is_never_lost(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    for i in 0..200 {
        let done =
            d.exec_sh(&id, &format!("echo line {i}; echo last {i} >&2; exit {}", i % 7)).await;
        assert_eq!(done.out, format!("line {i}\n"));
        assert_eq!(done.err, format!("last {i}\n"));
        assert_eq!(done.exit.status, i % 7);
    }
    d.end(&id).await;
}

pub(crate) async fn background_processes_go_on_to_write(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    let script = "{ while ! test -e /tmp/go; do sleep 0.05; done; echo late; } & echo now";
    let io = d.io();
    let process = d.spec(script)["process"].clone();
    d.exec(&id, "a", &process, Some(io.tokens.clone())).await.unwrap();
    // The process has ended, and the count separates its output from later output.
    assert_eq!(d.wait(&id, "a").await.written, [4, 0]);
    std::fs::write(d.file("/tmp/go"), "").unwrap();
    assert_eq!(io.bytes().await, b"now\nlate\n");
    std::fs::remove_file(d.file("/tmp/go")).unwrap();
    d.end(&id).await;
}

pub(crate) async fn ends_of_streams(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    // End of input reaches the process.
    let io = d.io();
    let process = d.spec("cat; echo eof")["process"].clone();
    d.exec(&id, "a", &process, Some(io.tokens.clone())).await.unwrap();
    (&io.stdin).write_all(b"abc ").unwrap();
    io.stdin.shutdown(std::net::Shutdown::Write).unwrap();
    let exit = d.wait(&id, "a").await;
    assert_eq!(io.finish(exit).await.out, "abc eof\n");
    // A process that closes its input closes the host's stream while it runs on.
    let io = d.io();
    let process = d.spec("exec <&-; sleep 1000")["process"].clone();
    d.exec(&id, "b", &process, Some(io.tokens.clone())).await.unwrap();
    let mut stdin = io.stdin.try_clone().unwrap();
    let end = tokio::task::spawn_blocking(move || stdin.read(&mut [0]).unwrap());
    assert_eq!(end.await.unwrap(), 0);
    d.end(&id).await;
}

pub(crate) async fn terminals(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    let mut process =
        d.spec("tty; stty size; read -r line; stty size; echo got $line; exit 4")["process"]
            .clone();
    process["terminal"] = json!(true);
    process["consoleSize"] = json!({"width": 100, "height": 30});
    let io = d.terminal_io();
    d.exec(&id, "t", &process, Some(io.tokens.clone())).await.unwrap();
    let resize = ResizeTerminalRequest {
        container_id: id.clone(),
        exec_id: "t".into(),
        size: MessageField::some(TerminalSize { columns: 132, rows: 43, ..Default::default() }),
        ..Default::default()
    };
    tokio::time::sleep(Duration::from_millis(200)).await;
    d.client.resize_terminal(context(), &resize).await.unwrap();
    (&io.stdin).write_all(b"typed\n").unwrap();
    let exit = d.wait(&id, "t").await;
    assert_eq!(exit.status, 4);
    let out = String::from_utf8(io.bytes().await).unwrap();
    assert_eq!(out, "/dev/pts/0\r\n30 100\r\ntyped\r\n43 132\r\ngot typed\r\n");
    d.end(&id).await;
    console(d).await;
}

/// Tests that the first process's terminal is the container's console.
async fn console(d: &Driver) {
    let id = d.name();
    let mut spec = d.spec("echo to-console > /dev/console; head -c 100000 /dev/zero; echo end");
    spec["process"]["terminal"] = json!(true);
    let io = d.terminal_io();
    d.create(&id, &spec, Some(io.tokens.clone())).await.unwrap();
    let reference = ProcessRef { container_id: id.clone(), ..Default::default() };
    d.start_container(&id).await.unwrap();
    d.client.wait_process(context(), &reference).await.unwrap();
    let out = io.bytes().await;
    assert!(out.starts_with(b"to-console\r\n"), "{:?}", String::from_utf8_lossy(&out[..20]));
    assert!(out.ends_with(b"end\r\n") && out.len() > 100_000);
    d.delete(&id).await.unwrap();
}
