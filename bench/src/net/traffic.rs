//! The traffic of the network benchmark: one connection between the benchmark and a peer in the
//! container.
//!
//! The peer connects and then carries out orders. An order is a byte, and a count of 8 bytes,
//! little endian.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use anyhow::{Context as _, Result, bail};

use crate::clock;

/// Bytes of one read or write.
const CHUNK: usize = 128 << 10;

/// Order to receive bytes, and then to send one byte.
const TAKE: u8 = b't';

/// Order to send bytes.
const GIVE: u8 = b'g';

/// Order to send back single bytes.
const ECHO: u8 = b'e';

/// The benchmark's end of a connection.
pub(super) struct Client(TcpStream);

impl Client {
    /// The benchmark's end of a connection from a peer.
    pub(super) fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true).context("TCP_NODELAY")?;
        Ok(Self(stream))
    }

    /// Units until `bytes` bytes have arrived in the container.
    pub(super) fn give(&mut self, bytes: u64) -> Result<f64> {
        let start = clock::now()?;
        self.order(TAKE, bytes)?;
        send(&mut self.0, bytes)?;
        self.0.read_exact(&mut [0])?;
        Ok(clock::now()? - start)
    }

    /// Units until `bytes` bytes have arrived from the container.
    pub(super) fn take(&mut self, bytes: u64) -> Result<f64> {
        let start = clock::now()?;
        self.order(GIVE, bytes)?;
        receive(&mut self.0, bytes)?;
        Ok(clock::now()? - start)
    }

    /// Units of `count` round trips of one byte, one after the other.
    pub(super) fn echo(&mut self, count: u64) -> Result<f64> {
        let start = clock::now()?;
        self.order(ECHO, count)?;
        for _ in 0..count {
            self.0.write_all(&[0])?;
            self.0.read_exact(&mut [0])?;
        }
        Ok(clock::now()? - start)
    }

    fn order(&mut self, what: u8, count: u64) -> Result<()> {
        let mut order = [what; 9];
        order[1..].copy_from_slice(&count.to_le_bytes());
        Ok(self.0.write_all(&order)?)
    }
}

/// The peer in the container: connects to `address` and carries out orders until the connection
/// ends.
pub(crate) fn peer(address: &str) -> Result<()> {
    let mut stream = TcpStream::connect(address).with_context(|| address.to_owned())?;
    stream.set_nodelay(true).context("TCP_NODELAY")?;
    let mut order = [0; 9];
    loop {
        match stream.read_exact(&mut order) {
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            result => result?,
        }
        let mut count = [0; 8];
        count.copy_from_slice(&order[1..]);
        let count = u64::from_le_bytes(count);
        match order[0] {
            TAKE => {
                receive(&mut stream, count)?;
                stream.write_all(&[0])?;
            }
            GIVE => send(&mut stream, count)?,
            ECHO => {
                for _ in 0..count {
                    let mut byte = [0];
                    stream.read_exact(&mut byte)?;
                    stream.write_all(&byte)?;
                }
            }
            other => bail!("unknown order {other:#x}"),
        }
    }
}

fn send(stream: &mut TcpStream, bytes: u64) -> Result<()> {
    let chunk = vec![0x55; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let len = left.min(CHUNK as u64);
        stream.write_all(&chunk[..len as usize])?;
        left -= len;
    }
    Ok(())
}

fn receive(stream: &mut TcpStream, bytes: u64) -> Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let len = left.min(CHUNK as u64);
        match stream.read(&mut chunk[..len as usize])? {
            0 => bail!("the connection ended {left} bytes early"),
            n => left -= n as u64,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_peer_gives_takes_echoes_and_goes() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let peer = std::thread::spawn(move || peer(&address));
        let mut client = Client::new(listener.accept().unwrap().0).unwrap();
        client.give(300_001).unwrap();
        client.take(300_001).unwrap();
        client.echo(3).unwrap();
        drop(client);
        peer.join().unwrap().unwrap();
    }
}
