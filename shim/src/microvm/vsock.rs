//! Connections to the guest through the VMM's unix socket.
//!
//! The client writes `CONNECT <port>\n` and gets `OK <number>\n` when something in the guest has
//! accepted. After that the stream is the guest's. A refused connection is closed without an
//! answer.

use std::io::ErrorKind;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::{
    error::{Error, ErrorKind as Kind, Explain, Result},
    state::{StateDir, VSOCK_SOCKET},
};

/// Longest answer of the VMM: `OK `, a 32-bit number, a newline, and room to spare.
const MAX_ANSWER_LEN: usize = 32;

/// Connects to `port` in the guest of the sandbox whose state directory is `dir`.
///
/// # Errors
///
/// Of the kind [`Kind::VmLost`] if there is no VMM. Of another kind if nothing in the guest
/// accepts, or the answer is malformed.
pub(crate) async fn connect(dir: &StateDir, port: u32) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(dir.short_path(VSOCK_SOCKET)).await.map_err(|e| {
        let kind = match e.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => Kind::VmLost,
            _ => Kind::Failed,
        };
        let mut error = Error::because(
            format!("cannot connect to the microVM at {}", dir.path().join(VSOCK_SOCKET).display()),
            e,
        );
        error.kind = kind;
        error
    })?;
    let refused = || format!("cannot connect to port {port} in the microVM");
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.explain(refused)?;
    let answer = read_answer(&mut stream).await.explain(refused)?;
    let number = answer.strip_prefix("OK ").and_then(|number| number.parse::<u32>().ok());
    match number {
        Some(_) => Ok(stream),
        None => Err(Error::new(format!("{}: unexpected answer {answer:?}", refused()))),
    }
}

/// Reads up to the newline and not a byte more: the bytes behind it belong to the guest.
async fn read_answer(stream: &mut UnixStream) -> std::io::Result<String> {
    let mut answer = Vec::with_capacity(MAX_ANSWER_LEN);
    loop {
        let mut byte = [0];
        if stream.read(&mut byte).await? == 0 {
            return Err(std::io::Error::other("the connection was refused"));
        }
        if byte == *b"\n" {
            return Ok(String::from_utf8_lossy(&answer).into_owned());
        }
        if answer.len() == MAX_ANSWER_LEN {
            return Err(std::io::Error::other("the answer is too long"));
        }
        answer.extend(byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container_id::ContainerId;
    use std::{
        io::{Read, Write},
        os::unix::net::UnixListener,
        path::Path,
    };

    /// Connects to a peer that reads the request and then writes `answer`.
    fn connect_to(answer: &'static [u8]) -> (Result<Vec<u8>>, String) {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::create(root.path(), &ContainerId::parse("one").unwrap()).unwrap();
        let path = dir.path().join(VSOCK_SOCKET);
        let peer = std::thread::spawn(serve(&path, answer));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let result = runtime.block_on(async {
            let mut stream = connect(&dir, 1025).await?;
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
            Ok(rest)
        });
        (result, peer.join().unwrap())
    }

    fn serve(path: &Path, answer: &'static [u8]) -> impl FnOnce() -> String + use<> {
        let listener = UnixListener::bind(path).unwrap();
        move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 64];
            let length = stream.read(&mut request).unwrap();
            // The client may have gone, which some cases want.
            let _ = stream.write_all(answer);
            String::from_utf8(request[..length].to_vec()).unwrap()
        }
    }

    #[test]
    fn bytes_right_behind_the_answer_belong_to_the_stream() {
        let (result, request) = connect_to(b"OK 1073741824\nfirst bytes");
        assert_eq!(request, "CONNECT 1025\n");
        assert_eq!(result.unwrap(), b"first bytes");
    }

    #[test]
    fn anything_but_ok_is_an_error() {
        for answer in [&b""[..], b"NO\n", b"OK\n", b"OK x\n", b"OK 1", &[b'O'; 100]] {
            let (result, _) = connect_to(answer);
            let error = result.unwrap_err();
            assert!(error.message.starts_with("cannot connect to port 1025"), "{error}");
        }
    }

    #[test]
    fn no_vmm_is_a_lost_microvm() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::create(root.path(), &ContainerId::parse("one").unwrap()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(connect(&dir, 1)).unwrap_err();
        assert_eq!(error.kind, Kind::VmLost);
    }
}
