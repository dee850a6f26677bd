//! `process`, namespaces and resources, read back from inside.

use isopod_protocol::agent::UpdateContainerRequest;
use serde_json::{Value, json};
use ttrpc::Code;

use super::driver::{Driver, code, context};

pub(crate) async fn identity_and_limits(d: &Driver) {
    let mut spec = d.spec(
        "id -u; id -g; grep Groups: /proc/self/status; umask; pwd; echo $A $HOME; \
         grep NoNewPrivs /proc/self/status; cat /proc/self/oom_score_adj; ulimit -n; ulimit -H -n; \
         touch /tmp/by-user; stat -c %u:%g:%a /tmp/by-user; echo via-path > /proc/self/fd/1",
    );
    spec["process"]["user"] =
        json!({"uid": 7, "gid": 8, "additionalGids": [9, 10], "umask": 0o027});
    spec["process"]["env"] = json!(["PATH=/bin", "A=b c"]);
    spec["process"]["cwd"] = json!("/made/for/it");
    spec["process"]["oomScoreAdj"] = json!(100);
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 50, "hard": 60}]);
    let tmp = json!({"destination": "/tmp", "type": "tmpfs", "options": ["mode=1777"]});
    spec["mounts"].as_array_mut().unwrap().push(tmp);
    let done = d.run(&spec).await;
    let expected = "7\n8\nGroups:\t9 10 \n0027\n/made/for/it\nb c /home/u\nNoNewPrivs:\t1\n100\n50\n\
                    60\n7:8:640\nvia-path\n";
    assert_eq!(done.out, expected, "{}", done.err);
}

pub(crate) async fn environment(d: &Driver) {
    let env = json!(["TERM=a", "PATH=/nowhere", "HOME=", "TERM=b", "PATH=/bin"]);
    let mut spec = d.spec("");
    spec["process"]["args"] = json!(["cat", "/proc/self/environ"]);
    spec["process"]["env"] = env;
    let expected = "TERM=b\0PATH=/bin\0HOME=/root\0";
    assert_eq!(d.run(&spec).await.out, expected);
    let id = d.sleeping(|_| ()).await;
    assert_eq!(d.exec_process(&id, &spec["process"]).await.out, expected);
    d.end(&id).await;
    // The last PATH is also the one in which programs are looked up.
    spec["process"]["env"] = json!(["PATH=/bin", "PATH=/nowhere"]);
    let e = d.create(&d.name(), &spec, None).await.unwrap_err();
    assert_eq!(e.0, Code::NOT_FOUND, "{e:?}");
}

pub(crate) async fn capabilities(d: &Driver) {
    let script = "grep Cap /proc/self/status";
    let of = |out: &str| -> Vec<u64> {
        out.lines()
            .map(|l| u64::from_str_radix(l.split_whitespace().last().unwrap(), 16).unwrap())
            .collect()
    };
    let default = 1 << 29 | 1 << 5 | 1 << 10;
    assert_eq!(of(&d.sh(script).await.out), [0, default, default, default, 0]);
    let mut spec = d.spec(script);
    spec["process"]["user"] = json!({"uid": 7, "gid": 7});
    let caps = json!(["CAP_KILL", "CAP_CHOWN"]);
    spec["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps,
        "inheritable": caps, "ambient": ["CAP_KILL"]});
    assert_eq!(of(&d.run(&spec).await.out), [0x21, 0x20, 0x20, 0x21, 0x20]);
    // Ambient capabilities that are not inheritable are left out; the template of other runtimes
    // has some.
    spec["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps,
        "ambient": caps});
    assert_eq!(of(&d.run(&spec).await.out), [0, 0, 0, 0x21, 0]);
    // Names that are unknown to this kernel or agent are no error.
    let new = json!(["CAP_KILL", "CAP_FROM_THE_FUTURE"]);
    spec["process"]["capabilities"] = json!({"bounding": new, "effective": new, "permitted": new,
        "inheritable": new, "ambient": new});
    assert_eq!(of(&d.run(&spec).await.out), [0x20, 0x20, 0x20, 0x20, 0x20]);
    spec["process"].as_object_mut().unwrap().remove("capabilities");
    assert_eq!(of(&d.run(&spec).await.out), [0, 0, 0, 0, 0]);
}

pub(crate) async fn namespaces_are_own(d: &Driver) {
    let mut spec = d.spec(
        "echo $$; hostname; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_forward \
         /proc/sys/kernel/shmmni; ip addr show lo | grep -c 127.0.0.1; cat /proc/self/cgroup; \
         for n in cgroup ipc mnt net pid uts; do readlink /proc/self/ns/$n; done",
    );
    spec["domainname"] = json!("example");
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel.shmmni": "77"});
    let done = d.run(&spec).await;
    let lines: Vec<&str> = done.out.lines().collect();
    assert_eq!(lines[..6], ["1", "pod", "example", "1", "77", "1"], "{done:?}");
    for (i, name) in ["cgroup", "ipc", "mnt", "net", "pid", "uts"].iter().enumerate() {
        let here = std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        let there = lines[lines.len() - 6 + i];
        assert!(there.starts_with(name) && here.to_str() != Some(there), "{there}");
    }
}

/// A container with a user namespace.
fn mapped(d: &Driver) -> Value {
    let mut spec = d.spec("sleep 1000");
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    spec
}

pub(crate) async fn user_namespace(d: &Driver) {
    let (id, mut spec) = (d.name(), mapped(d));
    // /dev is a tmpfs of the container's own; the test's root belongs to nobody in there.
    d.create(&id, &spec, None).await.unwrap();
    d.start_container(&id).await.unwrap();
    let script = "id -u; cat /proc/self/uid_map; echo x > /dev/null; head -c 1 /dev/zero | wc -c";
    let done = d.exec_sh(&id, script).await;
    let words: Vec<&str> = done.out.split_whitespace().collect();
    assert_eq!(words, ["0", "0", "100000", "1000", "1"], "{done:?}");
    d.end(&id).await;
    // The kernel refuses overlapping mappings, and the process that waits for them ends.
    let one = json!({"containerID": 0, "hostID": 100_000, "size": 1000});
    spec["linux"]["uidMappings"] = json!([one, one]);
    let e = d.create(&d.name(), &spec, None).await.unwrap_err();
    assert!(e.1.starts_with("apply linux.uidMappings: "), "{e:?}");
}

/// The network of a pod belongs to its user namespace, and so do the namespaces of each container.
pub(crate) async fn a_user_namespace_is_shared(d: &Driver) {
    let (owner, mut spec) = (d.name(), mapped(d));
    d.create(&owner, &spec, None).await.unwrap();
    d.start_container(&owner).await.unwrap();

    let joined = |kind: &str| json!({"type": kind, "path": format!("container:{owner}")});
    spec["linux"]["namespaces"] = json!([
        {"type": "mount"}, {"type": "pid"}, joined("user"), joined("network"), joined("ipc")
    ]);
    spec.as_object_mut().unwrap().remove("hostname");
    for kind in ["permitted", "effective", "bounding"] {
        spec["process"]["capabilities"][kind] = json!(["CAP_NET_ADMIN"]);
    }
    let script = "echo $$; id -u; readlink /proc/self/ns/user; ip link set lo down; \
                  ip link set lo up; cat /proc/self/uid_map; exit 7";
    spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
    let done = d.run(&spec).await;
    assert_eq!(done.exit.status, 7, "{done:?}");
    let namespace = d.exec_sh(&owner, "readlink /proc/self/ns/user").await.out;
    let words: Vec<&str> = done.out.split_whitespace().collect();
    assert_eq!(words, ["1", "0", namespace.trim(), "0", "100000", "1000"], "{done:?}");

    spec["linux"]["uidMappings"][0]["size"] = json!(999);
    let e = d.create(&d.name(), &spec, None).await.unwrap_err();
    assert!(e.1.starts_with("linux.uidMappings: not that of container"), "{e:?}");
    d.end(&owner).await;
}

pub(crate) async fn devices_outside_the_rules(d: &Driver) {
    let script = "mknod /tmp/mem c 1 1 && mknod /tmp/kmsg c 1 11; \
                  head -c 0 /tmp/mem 2>&1; head -c 0 /tmp/kmsg 2>&1 && echo kmsg-ok; \
                  head -c 1 /dev/zero | wc -c";
    let mut spec = d.spec(script);
    let caps = json!(["CAP_MKNOD", "CAP_SYS_RAWIO", "CAP_SYSLOG", "CAP_SYS_ADMIN"]);
    spec["process"]["capabilities"] =
        json!({"bounding": caps, "effective": caps, "permitted": caps});
    spec["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "r"}]);
    let tmp = json!({"destination": "/tmp", "type": "tmpfs"});
    spec["mounts"].as_array_mut().unwrap().push(tmp);
    let done = d.run(&spec).await;
    assert!(done.out.contains("/tmp/mem: Operation not permitted"), "{done:?}");
    assert!(done.out.contains("kmsg-ok"), "{done:?}");
    assert!(done.out.ends_with("1\n"), "{done:?}");
}

pub(crate) async fn refused_by_name(d: &Driver) {
    let refusals = [
        ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW"}), "linux.seccomp"),
        ("/linux/namespaces/0/path", json!("/proc/1/ns/pid"), "linux.namespaces[pid].path"),
        ("/linux/sysctl", json!({"kernel.panic": "1"}), "kernel.panic"),
        ("/process/scheduler", json!({"policy": "SCHED_ISO"}), "process.scheduler.policy"),
        ("/process/env", json!(["A=b", "PLAIN"]), "process.env[1]"),
        ("/mounts/0/options", json!(["idmap"]), "mounts[0].options"),
    ];
    for (at, value, name) in refusals {
        let mut spec = d.spec("true");
        let (parent, key) = at.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[key] = value;
        let e = d.create(&d.name(), &spec, None).await.unwrap_err();
        assert_eq!(e.0, Code::INVALID_ARGUMENT, "{e:?}");
        assert!(e.1.contains(name), "{e:?}");
    }
}

pub(crate) async fn limits_are_not_the_containers_to_change(d: &Driver) {
    let mut spec = d.spec(
        "cd /sys/fs/cgroup; echo 5 > cgroup.max.depth && echo lifted; mkdir below && \
         echo 5 > below/cgroup.max.depth && cat below/cgroup.max.depth",
    );
    spec["mounts"][6]["options"] = json!(["rw"]);
    let done = d.run(&spec).await;
    assert_eq!(done.out, "5\n", "{done:?}");
    assert!(done.err.contains("Operation not permitted"), "{done:?}");
}

/// Needs a machine whose cgroup v2 tree has the controllers.
pub(crate) async fn memory_and_pids_limits(d: &Driver) {
    let controllers =
        std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if !controllers.contains("memory") || !controllers.contains("pids") {
        println!("       (no controllers in this machine's cgroup v2 tree: not tested here)");
        return;
    }
    let mut spec = d.spec("head -c 200m /dev/zero | { read -r -d '' x; echo alive; }");
    spec["process"]["args"] = json!(["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 32 << 20, "swap": 32 << 20});
    let done = d.run(&spec).await;
    assert!(done.exit.oom_killed, "{done:?}");
    assert_eq!(done.exit.status, 137);
    let mut spec = d.spec("for i in 1 2 3 4 5 6 7 8; do sleep 5 & done; wait");
    spec["linux"]["resources"]["pids"] = json!({"limit": 4});
    let done = d.run(&spec).await;
    assert!(done.err.contains("can't fork"), "{done:?}");
    let mut spec = d.spec("cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu.weight");
    spec["linux"]["resources"]["cpu"] = json!({"quota": 50_000, "period": 100_000, "shares": 1024});
    assert_eq!(d.run(&spec).await.out, "50000 100000\n39\n");
}

/// Needs a machine whose cgroup v2 tree has the controller of huge pages.
pub(crate) async fn a_failed_update_changes_nothing(d: &Driver) {
    let id = d.sleeping(|_| ()).await;
    let limit = || async { d.exec_sh(&id, "cat /sys/fs/cgroup/hugetlb.2MB.max").await.out };
    let update = async |resources: Value| {
        let request = UpdateContainerRequest {
            container_id: id.clone(),
            resources_json: resources.to_string().into_bytes(),
            ..Default::default()
        };
        d.client.update_container(context(), &request).await.map(drop).map_err(code)
    };
    let pages = |bytes: i64| json!([{"pageSize": "2MB", "limit": bytes}]);
    if limit().await.is_empty() {
        println!("       (no limits of huge pages on this machine: not tested here)");
    } else {
        update(json!({"hugepageLimits": pages(4 << 20)})).await.unwrap();
        let before = limit().await;
        let missing = json!({"hugepageLimits": pages(8 << 20), "unified": {"none.max": "1"}});
        let e = update(missing).await.unwrap_err();
        assert_eq!(e.0, Code::INVALID_ARGUMENT, "{e:?}");
        assert_eq!((before.as_str(), limit().await.as_str()), ("4194304\n", "4194304\n"));
    }
    d.end(&id).await;
}
