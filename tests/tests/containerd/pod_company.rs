//! Containers that work together in a pod: a sidecar, rules of an init container, plugins for
//! networks.

use std::time::{Duration, Instant};

use isopod_tests::Output;
use isopod_tests::engine::Run;
use k8s_cri::v1::{Capability, ContainerConfig, Mount};
use serde_json::json;

use crate::cri::{Cri, mount, script};
use crate::pod_volumes::directory;

/// Asks a server for a file, from the engine's network namespace.
fn ask(run: &Run<'_>, url: &str) -> Output {
    let wget = ["busybox", "wget", "-q", "-O", "-", url];
    run.end(run.engine.on_network(&wget))
}

/// Fetches a file from a server, from the engine's network namespace.
fn fetch(run: &Run<'_>, url: &str) -> String {
    ask(run, url).ok().stdout
}

/// A web server writes its log to an emptyDir. A sidecar reads the log, is made anew, and reads on.
pub(crate) fn pod_sidecar(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("sidecar"));
    let volume = directory(run, "logs");
    let with_logs = |config: ContainerConfig| ContainerConfig {
        mounts: vec![mount(&volume, "/logs")],
        ..config
    };
    let serve = "mkdir /www; echo served >/www/file; touch /logs/access; \
                 exec httpd -f -vv -p [::]:80 -h /www 2>>/logs/access";
    let sidecar = || with_logs(script("sidecar", "exec tail -n +1 -F /logs/access"));
    pod.start(with_logs(script("server", serve)));
    let first = pod.start(sidecar());
    let url = format!("http://{}/file", pod.pod_status().network.expect("a network").ip);
    let begun = Instant::now();
    let reads = |requests: usize| {
        // The server's log has a line for the answer to each request.
        while pod.log("sidecar").matches("response:200").count() < requests {
            assert!(begun.elapsed() < Duration::from_secs(60), "{}", pod.log("sidecar"));
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    // The server listens a moment after its start.
    while ask(run, &url).status != 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "no server");
        std::thread::sleep(Duration::from_millis(100));
    }
    reads(1);
    pod.stop(&first, 0);
    pod.remove_container(&first);
    std::fs::remove_file(format!("{}/sidecar.log", pod.config.log_directory)).expect("a log");
    let mut again = sidecar();
    again.metadata.as_mut().expect("a name").attempt = 1;
    pod.start(again);
    assert_eq!(fetch(run, &url), "served\n");
    reads(2);
    pod.remove();
    std::fs::remove_dir_all(volume).expect("the volume");
}

/// Rules that an init container sets hold for the pod: a port leads to another one.
pub(crate) fn pod_rules(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("rules"));
    let of_the_tree = |host: &str, container: &str| Mount {
        readonly: true,
        ..mount(std::path::Path::new(host), container)
    };
    let rule = "iptables -t nat -A PREROUTING -p tcp --dport 8081 -j REDIRECT --to-ports 8080";
    let mut init = script("init", &format!("PATH=$PATH:/usr/sbin {rule}"));
    init.mounts = vec![
        of_the_tree("/usr", "/usr"),
        of_the_tree("/usr/lib", "/lib"),
        of_the_tree("/usr/lib64", "/lib64"),
        of_the_tree("/etc/alternatives", "/etc/alternatives"),
    ];
    let security = init.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    security.expect("a security context").capabilities = Some(Capability {
        add_capabilities: vec!["NET_ADMIN".into(), "NET_RAW".into()],
        ..Capability::default()
    });
    let init = pod.start(init);
    let status = pod.exited(&init);
    assert_eq!(status.exit_code, 0, "{}", pod.log("init"));
    pod.remove_container(&init);
    let serve = "mkdir /www && echo served >/www/file && httpd -p 8080 -h /www; sleep 1000";
    let id = pod.start(script("one", serve));
    // The server listens when its first process has gone to the background.
    pod.shell(&id, "until wget -q -O - http://127.0.0.1:8080/file; do sleep 0.1; done");
    let ip = pod.pod_status().network.expect("a network").ip;
    assert_eq!(fetch(run, &format!("http://{ip}:8081/file")), "served\n");
    pod.remove();
}

/// Other plugins for networks: a link to the host for each pod, and interfaces beside each other.
pub(crate) fn pod_plugins(run: &Run<'_>) {
    let file = run.engine.dir().join("cni/05-plugins.conflist");
    let ipam = |subnet: &str| {
        json!({
            "type": "host-local", "dataDir": run.engine.path("cni-addresses"),
            "ranges": [[{ "subnet": subnet }]], "routes": [{ "dst": "0.0.0.0/0" }],
        })
    };
    let cri = Cri::new(run);
    let network = |name: &str, plugin: serde_json::Value| {
        let list = json!({ "cniVersion": "0.4.0", "name": name, "plugins": [plugin] });
        std::fs::write(&file, list.to_string()).expect("a network");
        cri.await_network(name);
    };
    let serve = "mkdir /www && echo served >/www/file && httpd -p 80 -h /www; sleep 1000";
    let local = "until wget -q -O - http://127.0.0.1/file; do sleep 0.1; done";

    network("isopod-ptp", json!({ "type": "ptp", "ipam": ipam("10.88.8.0/24") }));
    let pod = cri.pod(cri.pod_config("ptp"));
    let id = pod.start(script("one", serve));
    pod.shell(&id, local);
    let ip = pod.pod_status().network.expect("a network").ip;
    assert!(ip.starts_with("10.88.8."), "{ip}");
    assert_eq!(fetch(run, &format!("http://{ip}/file")), "served\n");
    pod.remove();

    run.end(run.engine.on_network(&["ip", "link", "add", "isopodmaster", "type", "dummy"])).ok();
    run.end(run.engine.on_network(&["ip", "link", "set", "isopodmaster", "up"])).ok();
    let macvlan = json!({
        "type": "macvlan", "master": "isopodmaster", "mode": "bridge", "ipam": ipam("10.88.9.0/24"),
    });
    network("isopod-macvlan", macvlan);
    let pods = ["server", "client"].map(|name| cri.pod(cri.pod_config(name)));
    let [server, client] = &pods;
    let id = server.start(script("one", serve));
    server.shell(&id, local);
    let ip = server.pod_status().network.expect("a network").ip;
    let id = client.start(script("one", "sleep 1000"));
    let url = format!("http://{ip}/file");
    assert_eq!(client.shell(&id, &format!("wget -q -O - {url}")), "served");
    for pod in pods {
        pod.remove();
    }
    run.end(run.engine.on_network(&["ip", "link", "delete", "isopodmaster"])).ok();
    std::fs::remove_file(&file).expect("the network");
    cri.await_network("isopod-pods");
}
