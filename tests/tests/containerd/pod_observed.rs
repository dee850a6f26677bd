//! A pod, as its operator sees it.

use isopod_tests::engine::Run;
use serde_json::Value;

/// Runs a verb that is Isopod's own, without `--root`.
fn isopod(run: &Run<'_>, args: &[&str]) -> String {
    let program = run.with.path();
    run.end(run.engine.inside(&[&[&*program], args].concat())).ok().stdout
}

/// Looks at a pod that runs, and at one of its containers.
pub(crate) fn observed(run: &Run<'_>, pod: &str, container: &str) {
    let list = isopod(run, &["list", "--all", "--format", "json"]);
    let list: Vec<Value> = serde_json::from_str(&list).expect("a list");
    let entry = |id: &str| list.iter().find(|entry| entry["id"] == id).expect("an entry");
    for id in [pod, container] {
        let entry = entry(id);
        assert_eq!(
            (&entry["frontEnd"], &entry["namespace"]),
            (&"containerd".into(), &"k8s.io".into())
        );
        assert_eq!((&entry["sandbox"], &entry["status"]), (&pod.into(), &"running".into()));
        assert_eq!(entry["root"], "/run/isopod/containerd/k8s.io");
    }
    let chart = isopod(run, &["timeline", pod]);
    for part in ["host", "VMM", "kernel", "agent", "container", "guest: Linux"] {
        assert!(chart.contains(&format!("\n{part}")), "{chart}");
    }
    assert!(isopod(run, &["timeline", "--svg", "-", container]).starts_with("<svg "));
    // The guest's kernel is quiet, and its log is there because containerd's own log is verbose.
    isopod(run, &["logs", "--guest", container]);
    let metrics = isopod(run, &["metrics", container]);
    let labels = format!("sandbox=\"{pod}\",front_end=\"containerd\",namespace=\"k8s.io\"");
    let value = |name: &str, more: &str| -> f64 {
        let line = format!("{name}{{{labels}{more}}} ");
        let found = metrics.lines().find_map(|found| found.strip_prefix(&line));
        found.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{line}: {metrics}"))
    };
    assert!((value("isopod_sandbox_up", "") - 1.0).abs() < f64::EPSILON, "{metrics}");
    assert!(value("isopod_sandbox_containers", "") >= 3.0, "{metrics}");
    assert!(value("isopod_task_call_seconds_count", ",method=\"Create\"") >= 3.0, "{metrics}");
    assert!(value("isopod_agent_call_seconds_count", ",method=\"CreateContainer\"") >= 3.0);
    assert!(value("isopod_vm_exits_total", ",to=\"user\",kind=\"mmio-write\"") > 0.0);
    assert!(value("isopod_fs_requests_total", ",class=\"names\"") > 0.0);
    for more in [",direction=\"to_guest\"", ",direction=\"to_host\""] {
        assert!(value("isopod_vsock_bytes_total", more) > 0.0);
    }
    for process in ["owner", "vmm"] {
        let more = format!(",process=\"{process}\"");
        assert!(value("isopod_process_memory_pss_bytes", &more) > 0.0);
    }
    assert!(isopod(run, &["metrics"]).contains(&labels));
}

/// Checks that a healthy pod has written debug records only, and that these name it.
pub(crate) fn was_quiet(run: &Run<'_>, pod: &str) {
    let log = std::fs::read_to_string(run.engine.path("daemon.log")).expect("containerd's log");
    let field = format!(" sandbox={pod}");
    let of_pod: Vec<&str> = log.lines().filter(|line| line.contains(&field)).collect();
    assert!(!of_pod.is_empty(), "no record names the pod");
    let loud: Vec<&&str> = of_pod.iter().filter(|line| !line.contains(" level=debug ")).collect();
    assert!(loud.is_empty(), "{loud:#?}");
}
