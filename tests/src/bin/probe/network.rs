//! Both ends of connections.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};

use isopod_tests::pattern::{Pattern, compare};

/// Accepts one connection at `address` and exchanges `len` bytes each way at the same time.
pub(crate) fn tcp_server(address: &str, len: u64) {
    let listener = TcpListener::bind(address).unwrap_or_else(|e| panic!("{address}: {e}"));
    println!("listening");
    let (stream, peer) = listener.accept().expect("accept");
    exchange(&stream, 1, 2, len);
    println!("exchanged {len} with {}", peer.ip());
}

/// Connects to `address` and exchanges `len` bytes each way with [`tcp_server`].
pub(crate) fn tcp_client(address: &str, len: u64) {
    let stream = TcpStream::connect(address).unwrap_or_else(|e| panic!("{address}: {e}"));
    exchange(&stream, 2, 1, len);
    println!("exchanged {len}");
}

fn exchange(stream: &TcpStream, sent: u64, expected: u64, len: u64) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = stream;
            std::io::copy(&mut Pattern::new(sent, len), &mut stream).expect("send");
            stream.shutdown(Shutdown::Write).expect("shutdown");
        });
        compare(Pattern::new(expected, len), stream).expect("what came");
    });
}

/// Returns every datagram to its sender, up to an empty one.
pub(crate) fn udp_server(address: &str) {
    let socket = UdpSocket::bind(address).unwrap_or_else(|e| panic!("{address}: {e}"));
    println!("listening");
    let mut buffer = vec![0; 65_536];
    loop {
        let (len, peer) = socket.recv_from(&mut buffer).expect("receive");
        socket.send_to(&buffer[..len], peer).expect("send");
        if len == 0 {
            println!("done");
            return;
        }
    }
}

/// Sends `count` datagrams of each length. Each is sent when the one before has come back
/// unchanged.
pub(crate) fn udp_client(address: &str, count: u64, lengths: &[&str]) {
    let any = if address.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(any).expect("bind");
    socket.connect(address).unwrap_or_else(|e| panic!("{address}: {e}"));
    let mut sent = Vec::new();
    let mut back = vec![0; 65_536];
    for (number, len) in lengths.iter().flat_map(|len| (0..count).map(move |n| (n, len))) {
        sent.clear();
        Pattern::new(number, len.parse().expect("a length"))
            .read_to_end(&mut sent)
            .expect("a pattern");
        socket.send(&sent).expect("send");
        let received = socket.recv(&mut back).expect("receive");
        assert!(back[..received] == sent, "datagram {number} came back changed");
    }
    socket.send(&[]).expect("send");
    socket.recv(&mut back).expect("receive");
    println!("exchanged {count}");
    std::io::stdout().flush().expect("standard output");
}
