use std::{
    fs::File,
    io::{self, ErrorKind, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    thread,
    time::Duration,
};

use rustix::{
    io::Errno,
    pipe::{PipeFlags, pipe_with},
};
use tokio::time::timeout;

use crate::{
    descriptor::is_null,
    engine::stdio::{
        Relay,
        completion::Patience,
        copy::{Flow, copy_input, copy_output, pass_on, write_all},
        streams::{Stream, Streams},
    },
};

/// Bytes whose period is no power of two, so that a lost or doubled buffer shows.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

fn pipe() -> (File, OwnedFd) {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    (File::from(read), write)
}

fn stream(local: OwnedFd, remote: UnixStream) -> Stream {
    Stream {
        local,
        remote,
        token: 1,
        socket: false,
        on_demand: false,
        client: false,
        listener: None,
    }
}

fn streams(inputs: Vec<Stream>, output: Stream) -> Streams {
    let outputs = vec![output];
    Streams { inputs, outputs, terminal: false, last_is_for_messages: true, loss_notice: None }
}

#[test]
fn both_directions_at_once_lose_nothing() {
    const LENGTH: usize = 64 << 20;
    let (input_read, input_write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let (mut output_read, output_write) = pipe();
    let (stdin_here, mut stdin_there) = UnixStream::pair().unwrap();
    let (stdout_here, mut stdout_there) = UnixStream::pair().unwrap();
    let (stdin, stdout) = (stream(input_read, stdin_here), stream(output_write, stdout_here));
    let mut relay = streams(vec![stdin], stdout).relay().unwrap();

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
    runtime().block_on(relay.finished(0));
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
}

/// One output, with its reading end and the guest's end.
fn one_stream() -> (Streams, File, UnixStream) {
    let (read, write) = pipe();
    let (here, there) = UnixStream::pair().unwrap();
    (streams(vec![], stream(write, here)), read, there)
}

/// Like [`one_stream`], relayed.
fn one_output() -> (Relay, File, UnixStream) {
    let (streams, read, there) = one_stream();
    (streams.relay().unwrap(), read, there)
}

#[test]
fn last_words_come_after_all_output() {
    let (streams, read, mut there) = one_stream();
    let mut relay = streams.with_loss_notice().relay().unwrap();
    there.write_all(b"output\n").unwrap();
    relay.say("words\n".into());
    drop(there);
    assert_eq!(io::read_to_string(read).unwrap(), "output\nwords\n");
    runtime().block_on(relay.finished(0));
}

#[test]
fn there_are_no_last_words_of_a_process_that_ended() {
    let (streams, read, there) = one_stream();
    let mut relay = streams.with_loss_notice().relay().unwrap();
    relay.process_ended();
    relay.say("words\n".into());
    drop(there);
    assert_eq!(io::read_to_string(read).unwrap(), "");
}

const IMPATIENT: Patience = Patience { interval: Duration::from_millis(1), intervals: 20 };

#[test]
fn a_guest_that_keeps_a_stream_open_is_not_waited_for() {
    let (mut relay, mut read, mut there) = one_output();
    there.write_all(b"last words").unwrap();
    runtime().block_on(relay.finished_within(u64::MAX, IMPATIENT));
    let mut all = String::new();
    read.read_to_string(&mut all).unwrap();
    assert_eq!(all, "last words");
    assert_eq!(there.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn a_guest_that_never_stops_sending_is_cut_off() {
    let (mut relay, mut read, mut there) = one_output();
    thread::scope(|scope| {
        let sender = scope.spawn(move || while there.write_all(&[b'y'; 4096]).is_ok() {});
        scope.spawn(move || io::copy(&mut read, &mut io::sink()).unwrap());
        let endless = Patience { intervals: u32::MAX, ..IMPATIENT };
        runtime().block_on(relay.finished_within(1 << 20, endless));
        sender.join().unwrap();
    });
}

#[test]
fn output_waits_for_its_reader_however_long_that_takes() {
    let (mut relay, mut read, mut there) = one_output();
    let sent = pattern(1 << 20);
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            there.write_all(&sent).unwrap();
            there.shutdown(Shutdown::Write).unwrap();
        });
        // The pipe is full, so the relay waits for the reader.
        let size = rustix::pipe::fcntl_getpipe_size(&read).unwrap() as u64;
        while rustix::io::ioctl_fionread(&read).unwrap() < size {
            thread::yield_now();
        }
        let looks = Duration::from_millis(10 * u64::from(IMPATIENT.intervals));
        let finished = relay.finished_within(u64::MAX, IMPATIENT);
        runtime().block_on(async { tokio::time::timeout(looks, finished).await }).unwrap_err();
        let reader = scope.spawn(|| {
            let mut all = Vec::new();
            read.read_to_end(&mut all).unwrap();
            all == sent
        });
        runtime().block_on(relay.finished(u64::MAX));
        assert!(reader.join().unwrap());
        sender.join().unwrap();
    });
}

#[test]
fn what_was_written_in_time_is_told_from_what_follows() {
    let (mut relay, mut read, mut there) = one_output();
    there.write_all(b"in time").unwrap();
    runtime().block_on(relay.written(&[7], 0));
    assert_eq!(rustix::io::ioctl_fionread(&read).unwrap(), 7);
    there.write_all(b", late").unwrap();
    let mut all = [0; 13];
    read.read_exact(&mut all).unwrap();
    assert_eq!(&all, b"in time, late");
    drop(there);
    runtime().block_on(relay.outputs_ended());
}

#[test]
fn a_guest_that_promises_more_than_it_sends_is_cut_off() {
    let (mut relay, mut read, mut there) = one_output();
    there.write_all(b"a").unwrap();
    runtime().block_on(relay.written_within(&[2], u64::MAX, IMPATIENT));
    let mut all = String::new();
    read.read_to_string(&mut all).unwrap();
    assert_eq!(all, "a");
}

#[test]
fn a_file_as_input_ends_with_a_half_close() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"content").unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let (here, mut there) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| copy_input(&file.into(), &here));
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
    let relay = thread::spawn(move || copy_input(&local, &here));
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
    copy_output(&Flow::new(here).0, &write);
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

/// Others may read the same input: a shell whose terminal a command was given.
#[test]
fn an_ended_input_is_left_to_others_whatever_the_guest_does() {
    let (input_read, input_write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let mut others = File::from(input_read.try_clone().unwrap());
    let (here, mut there) = UnixStream::pair().unwrap();
    let (_read, write) = pipe();
    let (out_here, _out_there) = UnixStream::pair().unwrap();
    let streams = streams(vec![stream(input_read, here)], stream(write, out_here));
    let mut relay = streams.relay().unwrap();
    let mut input = File::from(input_write);
    input.write_all(b"first").unwrap();
    let mut first = [0; 5];
    there.read_exact(&mut first).unwrap();

    relay.end_inputs();
    // The guest keeps its end open.
    assert_eq!(there.read(&mut [0]).unwrap(), 0);
    input.write_all(b"second").unwrap();
    drop(input);
    assert_eq!(io::read_to_string(&mut others).unwrap(), "second");
}

/// A client reads its terminal itself, and not before the input is wanted.
#[test]
fn a_client_passes_input_on_once_it_is_wanted() {
    let (input_read, input_write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let others = input_read.try_clone().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let client = thread::spawn(move || pass_on(&input_read, &ours));
    File::from(input_write).write_all(b"typed").unwrap();
    let (here, mut there) = UnixStream::pair().unwrap();
    let (_read, write) = pipe();
    let (out_here, _out_there) = UnixStream::pair().unwrap();
    let input = Stream { client: true, on_demand: true, ..stream(theirs.into(), here) };
    let _relay = streams(vec![input], stream(write, out_here)).relay().unwrap();
    assert_eq!(rustix::io::ioctl_fionread(&others).unwrap(), 5);
    there.write_all(&[0]).unwrap();
    assert_eq!(io::read_to_string(&mut there).unwrap(), "typed");
    client.join().unwrap();
}

#[tokio::test]
async fn a_reader_has_stopped_if_output_waits_for_it() {
    let patience = Duration::from_millis(10);
    let (mut output_read, output_write) = pipe();
    let (here, mut there) = UnixStream::pair().unwrap();
    let relay = streams(Vec::new(), stream(output_write, here)).relay().unwrap();
    let mut readers = relay.readers_with(patience);
    assert!(timeout(patience * 10, readers.stopped_reading()).await.is_err(), "nothing was sent");
    // More than the pipe holds.
    there.write_all(&pattern(96 << 10)).unwrap();
    readers.stopped_reading().await;

    drop(there);
    assert_eq!(io::copy(&mut output_read, &mut io::sink()).unwrap(), 96 << 10);
    assert!(timeout(patience * 10, readers.stopped_reading()).await.is_err(), "all was read");
}
