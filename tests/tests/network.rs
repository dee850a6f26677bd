//! The network of a container: that of its namespace on the host, and nothing more.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use isopod_tests::{Container, Netns, PROBE_PATH, Scope, microvm_only, runtime};
use serde_json::json;

/// Commands that show a container's network. On the host only, an interface has a peer and the
/// machine's queueing discipline.
const LOOK: &str =
    "ip -4 address; ip -6 address; ip route; ip -6 route; ip rule; ip -6 rule; ip neigh";

/// The output of [`LOOK`] without the machine's own details: a device's queue and peer, the origin
/// of an address, and the order of routes.
fn looks(text: &str) -> Vec<String> {
    let line = |line: &str| {
        let line = line.split(" qdisc").next().unwrap_or_default();
        let line = line.split(" qlen").next().unwrap_or_default();
        let line = line.split(" flags").next().unwrap_or_default();
        let words =
            line.split_whitespace().filter(|word| !matches!(*word, "noprefixroute" | "tentative"));
        // `eth0@if3:` becomes `eth0:`.
        let words = words.map(|word| match word.split_once('@') {
            Some((name, _)) => format!("{name}:"),
            None => word.to_owned(),
        });
        words.collect::<Vec<_>>().join(" ")
    };
    let mut lines: Vec<String> = text.lines().map(line).collect();
    lines.sort();
    lines
}

fn look(container: Container<'_>) -> Container<'_> {
    container.shell(LOOK)
}

/// The view of the namespace from the host.
fn look_from_host(netns: &Netns<'_>) -> Vec<String> {
    let script = LOOK.replace("ip ", "busybox ip ");
    looks(&netns.program(&["sh", "-c", &script]).output().ok().stdout)
}

#[test]
fn a_container_sees_what_its_namespace_has() {
    let scope = Scope::alone();
    let (inner, _outer) = Netns::pair(&scope, 1500);
    inner.address("eth0", "10.77.1.9/32");
    inner.ip("route add 10.99.0.0/16 via 10.77.0.3 src 10.77.1.9 metric 7 mtu 1400 advmss 1200");
    inner.ip("route add 10.98.0.0/16 via 192.0.2.1 dev eth0 onlink");
    inner.ip("route add 169.254.1.1 dev eth0 scope link");
    inner.ip("route add 10.97.0.0/16 via 169.254.1.1 dev eth0");
    inner.ip("route add blackhole 10.96.0.0/16");
    inner.ip("route add unreachable fd99::/64");
    inner.ip("route add default via 10.77.0.4 table 100");
    inner.ip("rule add from 10.77.1.9 lookup 100 priority 1000");
    inner.ip("-6 rule add from fd77::2 lookup 100 priority 1001");
    inner.ip("neigh add 10.77.0.50 lladdr 02:00:00:00:00:50 dev eth0 nud permanent");
    inner.ip("neigh add fd77::50 lladdr 02:00:00:00:00:51 dev eth0 nud permanent");
    let expected = look_from_host(&inner);
    let out = look(scope.container().join(&inner)).run().ok();
    assert_eq!(looks(&out.stdout), expected, "{out}");
    assert!(expected.iter().any(|line| line.contains("mtu 1500")), "{expected:?}");
    inner.assert_untouched();
}

#[test]
fn the_interface_keeps_its_mac_address_and_mtu() {
    let scope = Scope::new();
    let (inner, _outer) = Netns::pair(&scope, 1400);
    inner.ip("link set eth0 address 02:42:0a:4d:00:02");
    let container = scope.container().join(&inner);
    let out =
        container.shell("cd /sys/class/net; ls; cat eth0/address eth0/mtu eth0/ifindex").run();
    let out = out.ok();
    let index = inner.ip("-oneline link show eth0").stdout;
    let index = index.split(':').next().unwrap().to_owned();
    assert_eq!(out.stdout, format!("eth0\nlo\n02:42:0a:4d:00:02\n1400\n{index}\n"));
}

#[test]
fn an_empty_namespace_has_loopback_only() {
    let scope = Scope::new();
    let script = "ls /sys/class/net; ping -c 1 127.0.0.1; ping -6 -c 1 ::1; ip route";
    let container = scope.container().capabilities(&["CAP_NET_RAW"]).shell(script);
    let out = container.run().ok();
    assert!(out.stdout.starts_with("lo\n"), "{out}");
    assert!(!out.stdout.contains(" dev "), "{out}");
}

/// Serves in the container and connects from outside, then the other way round.
#[track_caller]
fn exchange(scope: &Scope, inner: &Netns<'_>, outer: &Netns<'_>, len: u64, vcpus: &str) {
    let probe = runtime().probe.to_string_lossy().into_owned();
    let len = len.to_string();
    let container = || scope.container().join(inner).annotation("dev.isopod.vcpus", vcpus);
    for (inside, outside) in [("10.77.0.2:7", "10.77.0.1:7"), ("[fd77::2]:7", "[fd77::1]:7")] {
        let served = container().probe(&["tcp-server", inside, &len]);
        let mut created = served.start_new();
        created.stdout.line_with("listening");
        outer.program(&[&probe, "tcp-client", inside, &len]).output().ok();
        created.stdout.line_with("exchanged");
        created.wait();

        let mut server = outer.program(&[&probe, "tcp-server", outside, &len]).spawn();
        server.stdout.line_with("listening");
        container().probe(&["tcp-client", outside, &len]).run().ok();
        let from = server.output().ok();
        let address = inside.trim_end_matches(":7").trim_matches(['[', ']']);
        assert!(from.stdout.contains(address), "{from}");
    }
}

#[test]
fn streams_arrive_as_they_were_sent() {
    let scope = Scope::alone();
    let (inner, outer) = Netns::pair(&scope, 1500);
    exchange(&scope, &inner, &outer, 3_000_001, "1");
}

#[test]
fn streams_arrive_in_frames_of_9000_bytes() {
    let scope = Scope::alone();
    let (inner, outer) = Netns::pair(&scope, 9000);
    exchange(&scope, &inner, &outer, 1_000_001, "1");
}

#[test]
fn streams_arrive_in_small_frames() {
    let scope = Scope::alone();
    let (inner, outer) = Netns::pair(&scope, 1400);
    exchange(&scope, &inner, &outer, 500_001, "1");
}

#[test]
fn datagrams_come_back_as_they_were_sent() {
    let scope = Scope::new();
    let (inner, outer) = Netns::pair(&scope, 1500);
    let probe = runtime().probe.to_string_lossy().into_owned();
    for (inside, outside) in [("10.77.0.2:7", "10.77.0.1:8"), ("[fd77::2]:7", "[fd77::1]:8")] {
        // In one piece, and in fragments.
        let script = format!(
            "{PROBE_PATH} udp-server {inside} && {PROBE_PATH} udp-client {outside} 50 1400 20000"
        );
        let mut created = scope.container().join(&inner).shell(&script).start_new();
        created.stdout.line_with("listening");
        let mut server = outer.program(&[&probe, "udp-server", outside]).spawn();
        server.stdout.line_with("listening");
        outer.program(&[&probe, "udp-client", inside, "50", "1400", "20000"]).output().ok();
        created.stdout.line_with("done");
        created.stdout.line_with("exchanged");
        server.output().ok();
        created.wait();
    }
}

#[test]
fn pings_are_answered_both_ways() {
    let scope = Scope::new();
    let (inner, outer) = Netns::pair(&scope, 1500);
    let script = "ping -c 2 10.77.0.1 && ping -6 -c 2 fd77::1 && echo waiting && read x";
    let container = scope.container().join(&inner).capabilities(&["CAP_NET_RAW"]).shell(script);
    let mut job = container.command_with_bundle("run", &[]).stdin_piped().spawn();
    let mut stdin = job.take_stdin();
    job.stdout.line_with("waiting");
    outer.program(&["busybox", "ping", "-c", "2", "10.77.0.2"]).output().ok();
    outer.program(&["busybox", "ping", "-6", "-c", "2", "fd77::2"]).output().ok();
    std::io::Write::write_all(&mut stdin, b"\n").unwrap();
    drop(stdin);
    job.output().ok();
}

#[test]
fn each_interface_is_connected_with_its_own() {
    let scope = Scope::alone();
    let (inner, outer) = Netns::pair(&scope, 1500);
    inner.cable(&outer, "net1", "net1", 1280);
    inner.address("net1", "10.78.0.2/24");
    outer.address("net1", "10.78.0.1/24");
    let expected = look_from_host(&inner);
    let script = format!("{LOOK}; ping -c 1 10.77.0.1 && ping -c 1 10.78.0.1 && echo both");
    let container = scope.container().join(&inner).capabilities(&["CAP_NET_RAW"]).shell(&script);
    let out = container.run().ok();
    assert!(out.stdout.contains("both"), "{out}");
    let seen = looks(&out.stdout);
    assert!(expected.iter().all(|line| seen.contains(line)), "{expected:?} in {out}");
}

#[test]
fn a_namespace_without_ipv6_gives_none() {
    let scope = Scope::new();
    let (inner, _outer) = Netns::pair(&scope, 1500);
    inner.program(&["sysctl", "-q", "-w", "net.ipv6.conf.all.disable_ipv6=1"]).output().ok();
    let out = scope.container().join(&inner).shell("ip -6 address; ip -4 address").run().ok();
    assert!(!out.stdout.contains("inet6") && out.stdout.contains("inet 10.77.0.2"), "{out}");
}

#[test]
fn settings_of_an_interface_find_it() {
    let scope = Scope::new();
    let (inner, _outer) = Netns::pair(&scope, 1500);
    let key = "net.ipv4.conf.eth0.proxy_arp";
    let container =
        scope.container().join(&inner).edit(|c| c["linux"]["sysctl"] = json!({ key: "1" }));
    let out = container.args(["cat", "/proc/sys/net/ipv4/conf/eth0/proxy_arp"]).run().ok();
    assert_eq!(out.stdout, "1\n");
}

/// Moves one end of a new veth pair into the namespace of a created container and sets it up.
/// Docker does so from version 26 on.
fn attach(scope: &Scope, outer: &Netns<'_>, pid: i32, name: &str, net: u32) {
    let target = format!("--target={pid}");
    let script = format!(
        "ip link set {name} up && ip address add 10.{net}.0.2/24 dev {name} && \
         ip address add fd{net}::2/64 dev {name} nodad"
    );
    outer.ip(&format!("link add {name} type veth peer name {name} netns {pid}"));
    outer.ip(&format!("link set {name} up"));
    outer.address(name, &format!("10.{net}.0.1/24"));
    scope.program(&["nsenter", &target, "--net", "sh", "-c", &script]).output().ok();
}

#[test]
fn a_network_that_comes_between_create_and_start() {
    let scope = Scope::alone();
    let outer = Netns::new(&scope, "out");
    let script = "ip address; ping -c 1 10.77.0.1 && ping -c 1 10.78.0.1 && echo both";
    let container = scope.container().capabilities(&["CAP_NET_RAW"]).shell(script);
    let mut created = container.create();
    attach(&scope, &outer, created.pid, "eth0", 77);
    attach(&scope, &outer, created.pid, "eth1", 78);
    container.start().ok();
    created.wait();
    let said = created.stdout.rest();
    assert!(said.contains("both") && said.contains("inet6 fd77::2/64"), "{said}");
    container.delete().ok();
    scope.assert_nothing_left_but(&["network namespace"]);
}

/// The number of host threads that move packets for a process. From Linux 6.4 on these are threads
/// of the process, before that kernel threads. Each is named after the thread that asked for it.
fn vhost_threads(pid: i32) -> usize {
    let paths = |dir: &str| {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
    };
    let threads = paths(&format!("/proc/{pid}/task"));
    let name = |thread: &Path| format!("vhost-{}\n", thread.file_name().unwrap().display());
    let names: Vec<String> = threads.iter().map(|thread| name(thread)).collect();
    let is_one = |path: &PathBuf| {
        fs::read_to_string(path.join("comm")).is_ok_and(|comm| names.contains(&comm))
    };
    paths("/proc").iter().chain(&threads).filter(|path| is_one(path)).count()
}

#[test]
fn a_spare_device_costs_no_kernel_thread_until_it_is_used() {
    microvm_only!();
    if !Path::new("/dev/vhost-net").exists() {
        return eprintln!("left out: needs /dev/vhost-net");
    }
    let scope = Scope::alone();
    let outer = Netns::new(&scope, "out");
    let container = scope.container().capabilities(&["CAP_NET_RAW"]);
    let container = container.annotation("dev.isopod.vcpus", "1");
    let container = container.shell("ping -c 1 10.77.0.1 && echo up && exec sleep 1000");
    let mut created = container.create();
    let vmm = scope.child(created.pid, "isopod-vmm");
    assert_eq!(vhost_threads(vmm), 0, "with two spare devices");
    attach(&scope, &outer, created.pid, "eth0", 77);
    container.start().ok();
    created.stdout.line_with("up");
    assert_eq!(vhost_threads(vmm), 1, "with one of them used");
    container.kill("KILL").ok();
    created.wait();
    container.delete().ok();
    scope.assert_nothing_left_but(&["network namespace"]);
}

#[test]
fn more_interfaces_than_devices_are_refused_at_start() {
    microvm_only!();
    let scope = Scope::alone();
    let outer = Netns::new(&scope, "out");
    let container = scope.container().annotation("dev.isopod.nics", "1");
    let created = container.create();
    attach(&scope, &outer, created.pid, "eth0", 77);
    attach(&scope, &outer, created.pid, "eth1", 78);
    container.start().one_line_error(&["dev.isopod.nics", "2 interfaces", "1 spare"]);
    created.wait();
}

#[test]
fn what_a_microvm_cannot_share_is_refused() {
    microvm_only!();
    let scope = Scope::alone();
    let (inner, _outer) = Netns::pair(&scope, 1500);
    let holder = scope.container().join(&inner).args(["sleep", "1000"]);
    let created = holder.start_new();
    let pid = created.pid.to_string();
    let other = scope.container().join(&inner);
    other.run().one_line_error(&["eth0", "another microVM", &inner.path()]);
    let path = format!("/proc/{pid}/ns/net");
    let other = scope.container().network(&path);
    other.run().one_line_error(&[&path, "--network container:", "cannot share"]);
    // The interface is still the holder's.
    assert_eq!(holder.status(), "running");
    holder.exec(["ping", "-c", "1", "10.77.0.1"]);
    holder.delete_force().ok();
    inner.assert_untouched();
}

#[test]
fn the_hosts_network_is_refused() {
    microvm_only!();
    let scope = Scope::alone();
    let hosts = scope.container().network("/proc/self/ns/net");
    hosts.run().one_line_error(&["--network host", "microVM"]);
    let none = scope.container().edit(|c| {
        let all = c["linux"]["namespaces"].as_array_mut().unwrap();
        all.retain(|n| n["type"] != "network");
    });
    let words = none.mount("/etc/resolv.conf", "bind", "/etc/resolv.conf", &["rbind", "ro"]);
    words.run().one_line_error(&["--network host", "/etc/resolv.conf"]);
    for (path, why) in
        [("/etc/passwd", "not a network namespace"), ("/run/netns/x", "no such file")]
    {
        scope.container().network(path).run().one_line_error(&[path, why]);
    }
    scope.assert_nothing_left();
}

#[test]
fn without_a_network_namespace_there_is_no_device() {
    microvm_only!();
    let scope = Scope::new();
    let container = scope.container().shell("ls /sys/class/net; ip link").edit(|c| {
        let all = c["linux"]["namespaces"].as_array_mut().unwrap();
        all.retain(|n| n["type"] != "network");
    });
    let out = container.run().ok();
    assert!(out.stdout.starts_with("lo\n") && !out.stdout.contains("eth"), "{out}");
}

#[test]
fn somebody_elses_traffic_control_is_left_alone() {
    microvm_only!();
    let scope = Scope::alone();
    let (inner, _outer) = Netns::pair(&scope, 1500);
    let tc = |args: &str| inner.program(&["tc"]).args(args.split(' ')).output().ok();
    for kind in ["ingress", "clsact"] {
        tc(&format!("qdisc add dev eth0 {kind}"));
        tc("filter add dev eth0 ingress matchall action drop");
        let error = scope.container().join(&inner).run();
        error.one_line_error(&["eth0", kind, "tc qdisc del"]);
        assert!(tc("filter show dev eth0 ingress").stdout.contains("drop"));
        tc(&format!("qdisc del dev eth0 {kind}"));
    }
}

/// The remains of a sandbox process that was killed between the two halves of a redirect.
#[test]
fn half_a_redirect_of_a_killed_sandbox_is_no_obstacle() {
    microvm_only!();
    let scope = Scope::alone();
    let (inner, _outer) = Netns::pair(&scope, 1500);
    let tc = |args: &str| inner.program(&["tc"]).args(args.split(' ')).output().ok();
    tc("qdisc add dev eth0 ingress");
    scope.container().join(&inner).shell("cat /sys/class/net/eth0/address").run().ok();
    inner.assert_untouched();
    let container = scope.container().join(&inner).args(["sleep", "1000"]);
    let created = container.start_new();
    scope.program(&["kill", "-9", &created.pid.to_string()]).output().ok();
    created.wait();
    scope.wait_for_processes();
    tc("filter del dev eth0 ingress");
    assert!(tc("qdisc show dev eth0").stdout.contains("ingress"));
    container.delete_force().ok();
    inner.assert_untouched();
}

#[test]
fn a_create_that_fails_gives_the_interfaces_back() {
    let scope = Scope::alone();
    let (inner, _outer) = Netns::pair(&scope, 1500);
    let container = scope.container().join(&inner).args(["/no/such/program"]);
    assert_ne!(container.run().status, 0);
    inner.assert_untouched();
}

#[test]
fn a_killed_sandbox_gives_the_interfaces_back() {
    microvm_only!();
    let scope = Scope::alone();
    let (inner, outer) = Netns::pair(&scope, 1500);
    let kill = |container: &Container<'_>| {
        let created = container.start_new();
        scope.program(&["kill", "-9", &created.pid.to_string()]).output().ok();
        created.wait();
        scope.wait_for_processes();
    };
    let container = scope.container().join(&inner).args(["sleep", "1000"]);
    kill(&container);
    let left = inner.program(&["tc", "qdisc", "show", "dev", "eth0"]).output().ok();
    assert!(left.stdout.contains("ingress"), "{left}");
    container.delete_force().ok();
    inner.assert_untouched();
    // Remains that nobody has cleaned up are no obstacle. The first container's `delete` then
    // leaves the second one's redirects alone.
    let first = scope.container().join(&inner).args(["sleep", "1000"]);
    kill(&first);
    let second = scope.container().join(&inner).args(["sleep", "1000"]);
    let _created = second.start_new();
    first.delete_force().ok();
    outer.program(&["busybox", "ping", "-c", "1", "10.77.0.2"]).output().ok();
    second.delete_force().ok();
}

/// Docker rewrites resolv.conf when the container's network is there. It writes in place, because
/// the mount is of a file.
#[test]
fn resolv_conf_follows_the_host() {
    let scope = Scope::new();
    let file = scope.dir().join("resolv.conf");
    std::fs::write(&file, "nameserver 192.0.2.1\n").unwrap();
    let container = scope.container().args(["cat", "/etc/resolv.conf"]);
    let source = file.to_str().unwrap();
    let container = container.mount("/etc/resolv.conf", "bind", source, &["rbind", "rprivate"]);
    let mut created = container.create();
    std::fs::write(&file, "nameserver 192.0.2.2\noptions ndots:0\n").unwrap();
    container.start().ok();
    created.wait();
    assert_eq!(created.stdout.rest(), "nameserver 192.0.2.2\noptions ndots:0\n");
}

/// Docker serves names at this address of the namespace's loopback, and asks others from there.
#[test]
fn the_engines_name_server_is_reached_and_reaches_others() {
    const SERVER: &str = "127.0.0.11:53";
    let scope = Scope::alone();
    let (inner, outer) = Netns::pair(&scope, 1500);
    let probe = runtime().probe.to_string_lossy().into_owned();
    let file = scope.dir().join("resolv.conf");
    std::fs::write(&file, "nameserver 192.0.2.1\n").unwrap();
    let script = format!(
        "{PROBE_PATH} udp-client {SERVER} 20 17 1200 && {PROBE_PATH} tcp-client {SERVER} 100001 && \
         ping -c 1 10.77.0.1"
    );
    let container = scope.container().join(&inner).capabilities(&["CAP_NET_RAW"]).shell(&script);
    let source = file.to_str().unwrap();
    let container = container.mount("/etc/resolv.conf", "bind", source, &["rbind"]);
    let mut created = container.create();
    std::fs::write(&file, "nameserver 127.0.0.11\noptions ndots:0\n").unwrap();
    let mut datagrams = inner.program(&[&probe, "udp-server", SERVER]).spawn();
    let mut streams = inner.program(&[&probe, "tcp-server", SERVER, "100001"]).spawn();
    datagrams.stdout.line_with("listening");
    streams.stdout.line_with("listening");
    container.start().ok();
    // A question of the name server itself, from the namespace on the host.
    let mut others = outer.program(&[&probe, "udp-server", "10.77.0.1:53"]).spawn();
    others.stdout.line_with("listening");
    inner.program(&[&probe, "udp-client", "10.77.0.1:53", "20", "500"]).output().ok();
    others.output().ok();
    for exchanged in ["exchanged 20", "exchanged 100001", "1 packets received"] {
        created.stdout.line_with(exchanged);
    }
    created.wait();
    datagrams.output().ok();
    streams.output().ok();
}
