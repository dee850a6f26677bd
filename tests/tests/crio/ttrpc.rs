//! A small client of ttrpc, with the messages that a shim takes: what CRI-O's library sends.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use isopod_tests::DEADLINE;

/// The service that CRI-O calls.
const SERVICE: &str = "containerd.task.v2.Task";

/// Types of a frame.
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

/// Length of a frame's header: length and stream in network order, type, flags.
const HEADER: usize = 10;

/// A message of protobuf that is being written.
#[derive(Debug, Clone, Default)]
pub(crate) struct Message(pub(crate) Vec<u8>);

/// The fields of a message that was read. Of a field that comes twice the last one counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Fields {
    numbers: HashMap<u64, u64>,
    bytes: HashMap<u64, Vec<u8>>,
}

/// An error of a call: a code of gRPC and a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) code: u64,
    pub(crate) text: String,
}

/// The answer to a call.
pub(crate) type Answer = Result<Fields, Status>;

/// Calls whose answers are on their way, by their streams. `None` once the connection has ended.
type Waiting = Arc<Mutex<Option<HashMap<u32, Sender<Answer>>>>>;

/// A connection to a shim. It carries several calls at once.
#[derive(Debug)]
pub(crate) struct Client {
    socket: UnixStream,
    waiting: Waiting,
    next: u32,
}

impl Message {
    pub(crate) fn text(self, field: u64, text: &str) -> Self {
        self.bytes(field, text.as_bytes())
    }

    pub(crate) fn bytes(mut self, field: u64, bytes: &[u8]) -> Self {
        varint(&mut self.0, field << 3 | 2);
        varint(&mut self.0, bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    pub(crate) fn number(mut self, field: u64, number: u64) -> Self {
        varint(&mut self.0, field << 3);
        varint(&mut self.0, number);
        self
    }

    /// A document with its type, as `google.protobuf.Any`.
    pub(crate) fn any(self, field: u64, kind: &str, json: &serde_json::Value) -> Self {
        let url = format!("types.containerd.io/opencontainers/runtime-spec/1/{kind}");
        let any = Self::default().text(1, &url).text(2, &json.to_string());
        self.bytes(field, &any.0)
    }
}

fn varint(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

impl Fields {
    fn read(mut from: &[u8]) -> Self {
        let mut fields = Self::default();
        while !from.is_empty() {
            let tag = number(&mut from);
            let field = tag >> 3;
            match tag & 7 {
                0 => drop(fields.numbers.insert(field, number(&mut from))),
                kind => {
                    let length = match kind {
                        1 => 8,
                        2 => usize::try_from(number(&mut from)).expect("a length"),
                        5 => 4,
                        _ => panic!("field {field} is of type {kind}"),
                    };
                    let (value, rest) = from.split_at(length);
                    fields.bytes.insert(field, value.to_owned());
                    from = rest;
                }
            }
        }
        fields
    }

    /// A number. protobuf leaves out a 0.
    pub(crate) fn number(&self, field: u64) -> u64 {
        self.numbers.get(&field).copied().unwrap_or(0)
    }

    pub(crate) fn text(&self, field: u64) -> String {
        let bytes = self.bytes.get(&field).cloned().unwrap_or_default();
        String::from_utf8(bytes).expect("text")
    }

    /// A message inside this one.
    pub(crate) fn message(&self, field: u64) -> Option<Self> {
        self.bytes.get(&field).map(|bytes| Self::read(bytes))
    }
}

fn number(from: &mut &[u8]) -> u64 {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = from.split_first().expect("a number");
        *from = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    number
}

impl Client {
    /// Connects to the address that a shim has told.
    pub(crate) fn connect(address: &str) -> Self {
        let path = address.strip_prefix("unix://").expect("an address of a socket");
        let socket = UnixStream::connect(path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let mut reader = socket.try_clone().expect("a copy of the socket");
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let told = Arc::clone(&waiting);
        thread::spawn(move || {
            while let Some((stream, answer)) = receive(&mut reader) {
                let mut waiting = told.lock().expect("the calls");
                if let Some(caller) = waiting.as_mut().and_then(|calls| calls.remove(&stream)) {
                    // A caller need not wait for its answer.
                    let _ = caller.send(answer);
                }
            }
            // So those who wait hear of the end.
            told.lock().expect("the calls").take();
        });
        Self { socket, waiting, next: 1 }
    }

    /// Sends a call. The answer comes later.
    pub(crate) fn begin(&mut self, method: &str, request: &Message) -> Receiver<Answer> {
        let (tell, told) = channel();
        let stream = self.next;
        self.next += 2;
        if let Some(calls) = self.waiting.lock().expect("the calls").as_mut() {
            calls.insert(stream, tell);
        }
        let namespace = Message::default().text(1, "containerd-namespace-ttrpc").text(2, "default");
        let call = Message::default().text(1, SERVICE).text(2, method);
        let call = call.bytes(3, &request.0).bytes(5, &namespace.0);
        let mut frame = Vec::new();
        frame.extend(u32::try_from(call.0.len()).expect("a length").to_be_bytes());
        frame.extend(stream.to_be_bytes());
        frame.extend([REQUEST, 0]);
        frame.extend(call.0);
        // A shim that has ended answers nothing.
        let _ = self.socket.write_all(&frame);
        told
    }

    /// Has a call carried out.
    #[track_caller]
    pub(crate) fn call(&mut self, method: &str, request: &Message) -> Answer {
        answer(&self.begin(method, request), method)
    }

    /// Has a call carried out that has to succeed.
    #[track_caller]
    pub(crate) fn ok(&mut self, method: &str, request: &Message) -> Fields {
        self.call(method, request).unwrap_or_else(|error| panic!("{method}: {error:?}"))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The thread that reads has a copy of the socket.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Waits for the answer to a call.
#[track_caller]
pub(crate) fn answer(told: &Receiver<Answer>, method: &str) -> Answer {
    told.recv_timeout(DEADLINE).unwrap_or_else(|e| panic!("{method}: no answer: {e}"))
}

fn receive(socket: &mut UnixStream) -> Option<(u32, Answer)> {
    let mut header = [0; HEADER];
    socket.read_exact(&mut header).ok()?;
    let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("a word"));
    let mut body = vec![0; usize::try_from(word(0)).expect("a length")];
    socket.read_exact(&mut body).ok()?;
    assert_eq!(header[8], RESPONSE);
    let response = Fields::read(&body);
    let answer = match response.message(1) {
        Some(status) if status.number(1) != 0 => {
            Err(Status { code: status.number(1), text: status.text(2) })
        }
        _ => Ok(response.message(2).unwrap_or_default()),
    };
    Some((word(4), answer))
}
