//! Networks. All traffic stays in the engine's world.

use crate::engine::{Container, Run};
use crate::runtime::runtime;

/// A web server that says `text` on port 80.
fn server<'r, 'e>(run: &'r Run<'e>, options: &[&str], text: &str) -> Container<'r, 'e> {
    let script =
        format!("mkdir /www; echo {text} >/www/index.html; echo up; exec httpd -f -p 80 -h /www");
    let server = run.start_shell(options, &script);
    server.await_log("up");
    // The server listens when the connection is made.
    server.shell("until wget -q -O /dev/null http://127.0.0.1/; do sleep 0.1; done");
    server
}

/// The default network: a container has an address and a route, and answers the engine's world and
/// another container.
pub fn bridge(run: &Run<'_>) {
    let server = server(run, &["--network=bridge"], "over-the-bridge");
    let address = server.inspect(".NetworkSettings.IPAddress");
    let inside = server.shell("ip -4 -o addr show dev eth0; ip route; cat /sys/class/net/eth0/mtu");
    assert!(inside.contains(&address) && inside.contains("default via"), "{inside}");
    assert!(inside.ends_with("1500"), "{inside}");
    let url = format!("http://{address}/");
    let fetched = run.end(run.engine.on_network(&["busybox", "wget", "-q", "-O-", &url])).ok();
    assert_eq!(fetched.stdout, "over-the-bridge\n");
    let from_other = run.stdout(&["--network=bridge"], &["wget", "-q", "-O-", &url]);
    assert_eq!(from_other, "over-the-bridge");
    server.remove();
}

/// `--publish`, on the host's loopback and its other addresses, for streams and datagrams, and no
/// longer once the container is gone.
pub fn publish(run: &Run<'_>) {
    let ports = ["--publish=127.0.0.1:18080:80", "--publish=18081:80", "--publish=18082:5353/udp"];
    let server = server(run, &ports, "published");
    let other = server.inspect(".NetworkSettings.Gateway");
    let fetch = |address: &str| {
        let url = format!("http://{address}/");
        run.end(run.engine.on_network(&["busybox", "wget", "-q", "-O-", &url]))
    };
    for address in ["127.0.0.1:18080", "127.0.0.1:18081", &format!("{other}:18081")] {
        assert_eq!(fetch(address).ok().stdout, "published\n");
    }
    assert!(server.ok(&["port"]).contains("127.0.0.1:18080"));
    let mut echo = server.command(&["exec"], &["probe", "udp-server", "0.0.0.0:5353"]).spawn();
    echo.stdout.line_with("listening");
    let probe = runtime().probe.to_string_lossy();
    // Not the loopback: Docker's own proxy serves it, and drops empty datagrams.
    let address = format!("{other}:18082");
    let exchange = [&*probe, "udp-client", &address, "10", "1", "1400"];
    run.end(run.engine.on_network(&exchange)).ok();
    assert_eq!(echo.wait().status(), 0);
    server.ok(&["restart", "--time", "0"]);
    server.shell("until wget -q -O /dev/null http://127.0.0.1/; do sleep 0.1; done");
    assert_eq!(fetch("127.0.0.1:18080").ok().stdout, "published\n");
    server.remove();
    assert_ne!(fetch("127.0.0.1:18080").status, 0);
}

/// Two containers of a network find each other by name.
pub fn names_on_a_network(run: &Run<'_>) {
    let network = run.name("net");
    run.ok(&["network", "create", &network]);
    let on = format!("--network={network}");
    let server = server(run, &[&on, "--hostname=srv", "--network-alias=web"], "by-name");
    for name in [&*server.name, "web"] {
        let fetched = run.stdout(&[&on], &["wget", "-q", "-O-", &format!("http://{name}/")]);
        assert_eq!(fetched, "by-name");
    }
    server.remove();
    run.ok(&["network", "rm", &network]);
}

/// `--network none`: loopback and nothing else.
pub fn none(run: &Run<'_>) {
    let script = "ls /sys/class/net; ip -o addr show dev lo | grep -c 127.0.0.1";
    assert_eq!(run.shell(&["--network=none"], script), "lo\n1");
}

/// `--network host`: a microVM has no part in the host's network, and the error says so.
pub fn host(run: &Run<'_>) {
    let output = run.run(&["--network=host"], &["ls", "/sys/class/net"]);
    if run.isopod() {
        refused(&output, "network");
    } else {
        let world = run.end(run.engine.inside(&["ls", "/sys/class/net"])).ok();
        assert_eq!(output.ok().stdout, world.stdout);
    }
}

/// `--network container:`: a microVM cannot join another microVM's network, and the error says so.
pub fn of_another_container(run: &Run<'_>) {
    let first = run.start(&["--network=bridge"], &["sleep", "1000"]);
    let joined = format!("--network=container:{}", first.name);
    let output = run.run(&[&joined], &["ip", "-o", "-4", "addr", "show", "dev", "eth0"]);
    if run.isopod() {
        refused(&output, "namespace");
    } else {
        assert!(output.ok().stdout.contains("inet "));
    }
    first.remove();
}

/// Several networks, one of them connected before the start.
pub fn connect(run: &Run<'_>) {
    let networks = ["one", "two"].map(|name| run.name(name));
    for network in &networks {
        run.ok(&["network", "create", network]);
    }
    let server = run.make("create", &[&format!("--network={}", networks[0])], &["sleep", "1000"]);
    run.ok(&["network", "connect", &networks[1], &server.name]);
    server.ok(&["start"]);
    let interfaces = server.shell("ls /sys/class/net; ip -4 -o addr | wc -l");
    assert_eq!(interfaces, "eth0\neth1\nlo\n3");
    server.remove();
    for network in &networks {
        run.ok(&["network", "rm", network]);
    }
}

#[track_caller]
fn refused(output: &crate::Output, word: &str) {
    assert_ne!(output.status, 0, "{output}");
    assert!(output.stderr.contains("isopod") || output.stderr.contains("microVM"), "{output}");
    assert!(output.stderr.contains(word), "{output}");
}
