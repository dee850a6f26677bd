//! The protocol on the lab's virtio-serial ports.
//!
//! A port carries one command at a time, as frames in both directions. A caller may vanish in the
//! middle of a frame, and the next caller gets the same port. So a conversation begins with a
//! greeting that synchronises both ends:
//!
//! 1. The caller sends more zeros than the longest frame to the lab has bytes. Five zeros are an
//!    empty [`Kind::Pad`].
//! 2. The caller sends [`MAGIC`] and a random number.
//! 3. The lab reads the magic as a broken frame. It kills the command of the earlier caller, if
//!    any, and answers with [`MAGIC`] and the same number.
//! 4. The caller skips all bytes before that answer.

use std::io::{self, Read, Write};

/// Prefix of the names of the ports that take commands.
pub(super) const PORT_PREFIX: &str = "isopod.lab.";

/// Number of ports, and so of commands at the same time.
pub(super) const PORTS: usize = 8;

/// Begins a conversation in either direction. A number of [`NONCE_LEN`] bytes follows.
pub(crate) const MAGIC: &[u8; 16] = b"\xffisopod lab port";

/// Length in bytes of the number after [`MAGIC`].
pub(crate) const NONCE_LEN: usize = 16;

/// Length in bytes of a frame header.
///
/// The header is the kind (1 byte) and the length of the payload (4 bytes, little endian).
pub(crate) const HEADER_LEN: usize = 5;

/// Longest payload in bytes of a frame to the lab, except [`Kind::Start`].
pub(crate) const MAX_INPUT: usize = 4096;

/// Longest payload in bytes of a frame.
pub(crate) const MAX_PAYLOAD: usize = 64 * 1024;

/// Kind of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Padding, without a payload. To the lab.
    Pad = 0,
    /// Start of a command: a [`super::command::Run`] as JSON. To the lab, once.
    Start = 1,
    /// Bytes for standard input. An empty payload is the end of the input. To the lab.
    Stdin = 2,
    /// Bytes of standard output. From the lab.
    Stdout = 3,
    /// Bytes of standard error. From the lab.
    Stderr = 4,
    /// End of the command: its exit status as 4 bytes, little endian. From the lab, last.
    Exit = 5,
    /// The command was not started: the reason as text. From the lab, last.
    Refused = 6,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Pad, Self::Start, Self::Stdin, Self::Stdout, Self::Stderr, Self::Exit, Self::Refused]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// Parses a header. Returns kind and length of the payload, or `None` for an invalid header.
pub(crate) fn parse_header(header: [u8; HEADER_LEN]) -> Option<(Kind, usize)> {
    let [kind, length @ ..] = header;
    let kind = Kind::from_byte(kind)?;
    let length = u32::from_le_bytes(length) as usize;
    let most = match kind {
        Kind::Pad => 0,
        Kind::Stdin => MAX_INPUT,
        _ => MAX_PAYLOAD,
    };
    (length <= most).then_some((kind, length))
}

/// Appends a frame to `output`.
pub(crate) fn push_frame(output: &mut Vec<u8>, kind: Kind, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    output.push(kind as u8);
    output.extend_from_slice(&length.to_le_bytes());
    output.extend_from_slice(payload);
}

/// The caller's greeting with the number `nonce`.
pub(crate) fn greeting(nonce: &[u8; NONCE_LEN]) -> Vec<u8> {
    let mut bytes = vec![0; MAX_PAYLOAD + HEADER_LEN];
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(nonce);
    bytes
}

/// Skips input up to and including the lab's answer to a greeting with `nonce`.
pub(crate) fn await_answer(input: &mut impl Read, nonce: &[u8; NONCE_LEN]) -> io::Result<()> {
    let mut wanted = MAGIC.to_vec();
    wanted.extend_from_slice(nonce);
    let mut window = vec![0; wanted.len()];
    input.read_exact(&mut window)?;
    while window != wanted {
        let mut byte = [0];
        input.read_exact(&mut byte)?;
        window.remove(0);
        window.push(byte[0]);
    }
    Ok(())
}

/// Writes one frame.
pub(crate) fn write_frame(output: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let mut frame = Vec::with_capacity(HEADER_LEN + payload.len());
    push_frame(&mut frame, kind, payload);
    output.write_all(&frame)
}

/// Reads one frame.
pub(crate) fn read_frame(input: &mut impl Read) -> io::Result<(Kind, Vec<u8>)> {
    let mut header = [0; HEADER_LEN];
    input.read_exact(&mut header)?;
    let (kind, length) = parse_header(header)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the lab sent a broken frame"))?;
    let mut payload = vec![0; length];
    input.read_exact(&mut payload)?;
    Ok((kind, payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greeting_is_found_wherever_the_last_caller_stopped() {
        let nonce = [7; NONCE_LEN];
        for cut in (0..HEADER_LEN + MAX_INPUT).step_by(61).chain(0..2 * HEADER_LEN) {
            let mut stream = Vec::new();
            push_frame(&mut stream, Kind::Stdin, &[b'x'; MAX_INPUT]);
            stream.truncate(cut);
            stream.extend_from_slice(&greeting(&nonce));
            // Like the lab: reads frames until one is broken.
            let mut at = 0;
            while let Some(header) = stream[at..].first_chunk() {
                let Some((_, length)) = parse_header(*header) else { break };
                at += HEADER_LEN + length;
            }
            let rest = &stream[at..];
            assert!(rest.windows(MAGIC.len()).any(|window| window == MAGIC), "cut at {cut}");
        }
    }

    #[test]
    fn answer_is_found_after_leftovers() {
        let nonce = [9; NONCE_LEN];
        let mut stream = b"left over \xffisopod \xff".to_vec();
        stream.extend_from_slice(MAGIC);
        stream.extend_from_slice(&[1; NONCE_LEN]);
        stream.extend_from_slice(MAGIC);
        stream.extend_from_slice(&nonce);
        push_frame(&mut stream, Kind::Stdout, b"hello");
        let mut input = stream.as_slice();
        await_answer(&mut input, &nonce).unwrap();
        assert_eq!(read_frame(&mut input).unwrap(), (Kind::Stdout, b"hello".to_vec()));
    }
}
