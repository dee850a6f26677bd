//! Pods, as a kubelet makes them.

use isopod_tests::engine::Run;

use crate::cri::{Cri, script};
use crate::pod_observed;

/// A pod from its creation to its removal: two containers, one after the other and at once.
pub(crate) fn pod(run: &Run<'_>) {
    let cri = Cri::new(run);
    let pod = cri.pod(cri.pod_config("web"));
    let init = pod.start(script("init", "echo prepared; exit 0"));
    let status = pod.exited(&init);
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"), "{status:?}");
    assert_eq!(pod.log("init"), "prepared");
    let one = pod.start(script("one", "echo one >/dev/stderr; sleep 1000"));
    let two = pod.start(script("two", "sleep 1000"));
    assert_eq!(pod.shell(&one, "hostname"), "web");
    // The network is the pod's, processes and files are each container's own.
    assert_eq!(
        pod.shell(&one, "readlink /proc/self/ns/net"),
        pod.shell(&two, "readlink /proc/self/ns/net")
    );
    assert_ne!(
        pod.shell(&one, "readlink /proc/self/ns/pid"),
        pod.shell(&two, "readlink /proc/self/ns/pid")
    );
    let address = pod.pod_status().network.expect("a network").ip;
    assert!(pod.shell(&two, "ip addr show eth0").contains(&address));
    if run.isopod() {
        pod_observed::observed(run, &pod.id, &one);
    }
    pod.shell(&one, "echo mine >/tmp/file");
    assert_eq!(pod.exec(&two, "cat /tmp/file").status, 1);
    assert!(pod.shell(&one, "cat /etc/resolv.conf").contains("10.88.7.1"));
    let outcome = pod.exec(&one, "echo out; echo err >&2; exit 7");
    assert_eq!((outcome.status, &*outcome.stdout, &*outcome.stderr), (7, "out\n", "err\n"));
    pod.stop(&two, 0);
    assert_eq!(pod.status(&two).exit_code, 137);
    pod.remove_container(&two);
    // A container is made anew while its pod runs.
    let again = pod.start(script("two", "echo again; exit 3"));
    let status = pod.exited(&again);
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"), "{status:?}");
    assert_eq!(pod.log("one"), "one");
    let id = pod.id.clone();
    pod.remove();
    if run.isopod() {
        pod_observed::was_quiet(run, &id);
    }
}
