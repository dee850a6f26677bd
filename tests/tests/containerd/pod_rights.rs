//! Rights of pods: privileged ones, users and groups, and what a microVM cannot give.

use isopod_tests::engine::Run;
use k8s_cri::v1::{
    Capability, IdMapping, Int64Value, LinuxContainerSecurityContext, NamespaceMode,
    NamespaceOption, UserNamespace,
};

use crate::cri::{Cri, namespaces, script};

/// A privileged container: every capability, and devices.
pub(crate) fn pod_privileged(run: &Run<'_>) {
    let cri = Cri::new(run);
    let mut config = cri.pod_config("privileged");
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    security.expect("a security context").privileged = true;
    let pod = cri.pod(config);
    let mut config = script("one", "sleep 1000");
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    security.expect("a security context").privileged = true;
    let id = pod.start(config);
    let capabilities = pod.shell(&id, "grep CapEff /proc/self/status");
    let own = std::fs::read_to_string("/proc/self/status").expect("a status");
    let own = own.lines().find(|line| line.starts_with("CapEff")).expect("capabilities");
    assert_eq!(capabilities, own);
    pod.shell(&id, "mkdir /tmp/m && mount -t tmpfs none /tmp/m && umount /tmp/m");
    assert_eq!(pod.shell(&id, "echo x >/dev/null; head -c 4 /dev/zero | wc -c"), "4");
    pod.remove();
}

/// User, group, supplemental groups and sysctls.
pub(crate) fn pod_users(run: &Run<'_>) {
    let cri = Cri::new(run);
    let mut config = cri.pod_config("users");
    let linux = config.linux.get_or_insert_default();
    linux.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "200".into());
    linux.sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
    let pod = cri.pod(config);
    let mut config = script("one", "sleep 1000");
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    *security.expect("a security context") = LinuxContainerSecurityContext {
        run_as_user: Some(Int64Value { value: 1000 }),
        run_as_group: Some(Int64Value { value: 2000 }),
        supplemental_groups: vec![3000, 4000],
        no_new_privs: true,
        namespace_options: Some(namespaces(NamespaceMode::Container)),
        ..LinuxContainerSecurityContext::default()
    };
    let id = pod.start(config);
    assert_eq!(pod.shell(&id, "id -u; id -g; id -G"), "1000\n2000\n2000 3000 4000");
    assert!(pod.shell(&id, "grep NoNewPrivs /proc/self/status").ends_with('1'));
    let sysctls =
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced";
    assert_eq!(pod.shell(&id, sysctls), "200\n1");
    pod.remove();
}

/// A pod with a user namespace (KEP-127): its containers share it, and its root has the network.
pub(crate) fn pod_user_namespace(run: &Run<'_>) {
    let cri = Cri::new(run);
    let map = IdMapping { host_id: 300_000, container_id: 0, length: 65536 };
    let user = UserNamespace { mode: NamespaceMode::Pod.into(), uids: vec![map], gids: vec![map] };
    let options = |pid| NamespaceOption { userns_options: Some(user.clone()), ..namespaces(pid) };
    let mut config = cri.pod_config("mapped");
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    security.expect("a security context").namespace_options =
        Some(options(NamespaceMode::Container));
    let pod = cri.pod(config);

    let configure = |name: &str, pid| {
        let mut config = script(name, "sleep 1000");
        let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        let security = security.expect("a security context");
        security.namespace_options = Some(options(pid));
        security.capabilities = Some(Capability {
            add_capabilities: vec!["NET_ADMIN".into()],
            ..Capability::default()
        });
        config
    };
    let one = pod.start(configure("one", NamespaceMode::Container));
    let other = pod.start(configure("other", NamespaceMode::Container));
    for id in [&one, &other] {
        let map = pod.shell(id, "cat /proc/self/uid_map /proc/self/gid_map");
        let fields: Vec<&str> = map.split_whitespace().collect();
        assert_eq!(fields, ["0", "300000", "65536", "0", "300000", "65536"]);
        assert_eq!(pod.shell(id, "id -u; stat -c '%u %g' / /bin/busybox"), "0\n0 0\n0 0");
    }
    let namespace = "readlink /proc/self/ns/user; readlink /proc/1/ns/user";
    assert_eq!(pod.shell(&one, namespace), pod.shell(&other, namespace));
    // The right over the pod's network comes from the user namespace.
    pod.shell(
        &other,
        "ip link set lo down && ip link set lo up && ip address add 10.1.2.3/32 dev lo",
    );
    assert!(pod.shell(&one, "ip address show dev lo").contains("10.1.2.3"));
    assert_eq!(pod.shell(&one, "mount -t tmpfs none /mnt 2>/dev/null || echo refused"), "refused");
    pod.remove();
}

/// Namespaces of the host are refused by name: a microVM has a kernel of its own.
pub(crate) fn pod_of_the_host(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod_mode = NamespaceMode::Pod.into();
    let node = NamespaceMode::Node.into();
    let options = |network: i32, pid: i32, ipc: i32| NamespaceOption {
        network,
        pid,
        ipc,
        ..NamespaceOption::default()
    };
    for (name, wanted, word) in [
        ("network", options(node, pod_mode, pod_mode), "host's network"),
        ("pid", options(pod_mode, node, pod_mode), "host's processes"),
        ("ipc", options(pod_mode, pod_mode, node), "host's ipc"),
    ] {
        let mut config = cri.pod_config(name);
        let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        security.expect("a security context").namespace_options = Some(wanted);
        let error = cri.try_pod(config).map(|pod| pod.remove()).expect_err(name);
        assert!(error.contains(word), "{name}: {error}");
    }
}
