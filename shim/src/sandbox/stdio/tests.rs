use std::{fs::File, os::fd::AsRawFd, time::Duration};

use rustix::pipe::{PipeFlags, pipe_with};

use super::*;

/// Bytes that repeat with no power of two, so that a lost or doubled buffer shows.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

fn pipe() -> (File, OwnedFd) {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    (File::from(read), write)
}

#[test]
fn both_directions_at_once_lose_nothing() {
    const LENGTH: usize = 64 << 20;
    let (input_read, input_write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let (mut output_read, output_write) = pipe();
    let (stdin_here, mut stdin_there) = UnixStream::pair().unwrap();
    let (stdout_here, mut stdout_there) = UnixStream::pair().unwrap();
    let stdin = Stream { local: input_read, remote: stdin_here, token: 1 };
    let stdout = Stream { local: output_write, remote: stdout_here, token: 2 };
    let mut relay = Streams { stdin: Some(stdin), outputs: [Some(stdout), None] }.relay().unwrap();

    let sent = pattern(LENGTH);
    thread::scope(|scope| {
        scope.spawn(|| File::from(input_write).write_all(&sent).unwrap());
        scope.spawn(|| {
            stdout_there.write_all(&sent).unwrap();
            stdout_there.shutdown(Shutdown::Write).unwrap();
        });
        let arrived = scope.spawn(|| {
            let mut all = Vec::new();
            stdin_there.read_to_end(&mut all).unwrap();
            all == sent
        });
        let mut all = Vec::new();
        output_read.read_to_end(&mut all).unwrap();
        assert!(all == sent, "output");
        assert!(arrived.join().unwrap(), "input");
    });
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(relay.finished());
}

#[test]
fn a_file_as_input_ends_with_a_half_close() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"content").unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let (here, mut there) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| relay_input(&file.into(), &here));
        let mut all = String::new();
        there.read_to_string(&mut all).unwrap();
        assert_eq!(all, "content");
        // The other direction is still open.
        there.write_all(b"x").unwrap();
    });
}

#[test]
fn input_is_left_alone_when_nobody_reads_it() {
    let (mut read, write) = pipe();
    let (here, there) = UnixStream::pair().unwrap();
    let local = OwnedFd::from(read.try_clone().unwrap());
    let relay = thread::spawn(move || relay_input(&local, &here));
    drop(there);
    relay.join().unwrap();
    let mut writer = File::from(write);
    writer.write_all(b"unread").unwrap();
    drop(writer);
    let mut rest = String::new();
    read.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "unread");
}

#[test]
fn a_reader_that_goes_away_closes_the_stream() {
    let (read, write) = pipe();
    drop(read);
    let (here, mut there) = UnixStream::pair().unwrap();
    there.write_all(b"x").unwrap();
    relay_output(&here, &write);
    drop(here);
    assert_eq!(there.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_nonblocking_output_gets_everything() {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
    let sent = pattern(1 << 20);
    thread::scope(|scope| {
        let writer = scope.spawn(|| write_all(&write, &sent).unwrap());
        let mut all = Vec::<u8>::new();
        let mut buffer = vec![0; 4096];
        while all.len() < sent.len() {
            match rustix::io::read(&read, &mut buffer) {
                Ok(length) => all.extend(&buffer[..length]),
                Err(Errno::AGAIN) => thread::sleep(Duration::from_millis(1)),
                Err(e) => unreachable!("{e}"),
            }
        }
        writer.join().unwrap();
        assert!(all == sent);
    });
}

#[test]
fn null_devices_are_recognised() {
    assert!(is_null(File::open("/dev/null").unwrap().as_fd()));
    assert!(!is_null(File::open("/dev/zero").unwrap().as_fd()));
    let (read, _write) = pipe();
    assert!(read.as_raw_fd() > 2 && !is_null(read.as_fd()));
}
