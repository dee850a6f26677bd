//! The network of pods: addresses, published ports, forwarded ports.

use isopod_tests::Output;
use isopod_tests::engine::Run;
use k8s_cri::v1::{PortMapping, Protocol};

use crate::cri::{Cri, Pod, script};

/// A request to a web server, from the pod's network namespace on the host.
fn ask(pod: &Pod<'_, '_, '_>, url: &str) -> Output {
    let run = pod.cri.run;
    let tasks = run.ok(&["--namespace", "k8s.io", "task", "ls"]);
    let line = tasks.lines().find(|line| line.starts_with(&pod.id)).expect("the pod's task");
    let pid = line.split_whitespace().nth(1).expect("a pid");
    let wget = ["wget", "-q", "-O", "-", url];
    let enter = ["nsenter", "--target", pid, "--net", "busybox"];
    run.end(run.engine.on_network(&[&enter[..], &wget].concat()))
}

/// A connection to localhost in the pod's network namespace, as `kubectl port-forward` makes it.
pub(crate) fn pod_port_forward(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("forward"));
    let serve = "mkdir /www && echo four >/www/file && httpd -p 127.0.0.1:8080 -h /www; sleep 1000";
    let id = pod.start(script("one", serve));
    assert_eq!(ask(&pod, "http://127.0.0.1:8080/file").ok().stdout, "four\n");
    // A server of later, at IPv6.
    pod.shell(&id, "mkdir /www6 && echo six >/www6/file && httpd -p [::1]:8086 -h /www6");
    assert_eq!(ask(&pod, "http://[::1]:8086/file").ok().stdout, "six\n");
    // A port that nobody serves.
    assert_ne!(ask(&pod, "http://127.0.0.1:8087/file").status, 0);
    // 8 MiB, and then another request.
    pod.shell(&id, "head -c 8388608 /dev/zero >/www/large");
    assert_eq!(ask(&pod, "http://127.0.0.1:8080/large").ok().stdout.len(), 8 << 20);
    assert_eq!(ask(&pod, "http://127.0.0.1:8080/file").ok().stdout, "four\n");
    pod.remove();
}

/// A port of the host is one of the pod, over IPv4, and the pod answers at its addresses.
pub(crate) fn pod_host_port(run: &Run<'_>) {
    let cri = Cri::new(run);
    let mut config = cri.pod_config("port");
    config.port_mappings = vec![PortMapping {
        protocol: Protocol::Tcp.into(),
        container_port: 80,
        host_port: 18080,
        host_ip: String::new(),
    }];
    let pod = cri.pod(config);
    let serve = "mkdir /www && echo served >/www/file && httpd -p [::]:80 -h /www; sleep 1000";
    let id = pod.start(script("one", serve));
    let network = pod.pod_status().network.expect("a network");
    let six = network.additional_ips.first().expect("an IPv6 address").ip.clone();
    assert!(pod.shell(&id, "ip -6 addr show eth0").contains(&six));
    let hosts = [format!("{}:80", network.ip), format!("[{six}]:80"), "10.88.7.1:18080".to_owned()];
    for host in hosts {
        let url = format!("http://{host}/file");
        let wget = ["busybox", "wget", "-q", "-O", "-", &url];
        let out = run.end(run.engine.on_network(&wget)).ok();
        assert_eq!(out.stdout, "served\n", "{url}");
    }
    pod.remove();
}
