use std::{collections::BTreeMap, time::Duration};

use serde_json::Value;

use crate::{
    engine::record::*,
    state::versions::{self, CONTROL_VERSION, STATE_VERSION},
};

fn record(id: &ContainerId, sandbox: ProcessId) -> Record {
    Record {
        version: STATE_VERSION,
        control_version: CONTROL_VERSION,
        id: id.clone(),
        oci_version: "1.0.2".into(),
        bundle: "/b".into(),
        rootfs: "/b/rootfs".into(),
        sandbox,
        pid: sandbox.pid,
        vmm: None,
        vm: crate::bundle::VmSize { vcpus: 1, memory_mib: 64 },
        pod: None,
        holder: false,
        resources: oci_spec::runtime::LinuxResources::default(),
        status: Status::Running,
        created: "2026-01-01T00:00:00Z".into(),
        owner_uid: 0,
        annotations: BTreeMap::from([("a".into(), "b".into())]),
        cgroup: None,
        hooks: None,
        exit: None,
        error: None,
        lost: false,
        network: None,
        timeline: Timeline { command: Some(1), ..Timeline::default() },
    }
}

#[test]
fn the_record_survives_and_knows_whether_its_owner_does() {
    let root = tempfile::tempdir().unwrap();
    let id = ContainerId::parse("one").unwrap();
    let dir = StateDir::create(root.path(), &id).unwrap();
    assert_eq!(Record::read(&dir).unwrap(), None);
    let own = ProcessId::own().unwrap();
    let mut written = record(&id, own);
    written.write(&dir).unwrap();
    assert_eq!(Record::read(&dir).unwrap(), Some(written.clone()));

    let state = serde_json::to_value(written.to_oci()).unwrap();
    assert_eq!(state["status"], "running");
    assert_eq!(state["pid"], own.pid);
    assert_eq!(state["annotations"], json!({"a": "b"}));
    assert!(!written.is_lost());

    written.sandbox.start_time += 1;
    let state = serde_json::to_value(written.to_oci()).unwrap();
    assert_eq!(state["status"], "stopped");
    assert_eq!(state["pid"], 0);
    let error = state["annotations"]["dev.isopod.error"].as_str().unwrap();
    assert!(error.contains("unknown"), "{error}");
    assert!(written.is_lost());
    written.error = Some("no such program".into());
    assert!(!written.is_lost(), "what was never started");
    written.error = None;

    written.exit = Some(Exit { status: 137, oom_killed: true });
    let state = serde_json::to_value(written.to_oci()).unwrap();
    assert_eq!(state["annotations"]["dev.isopod.exit_status"], "137");
    assert_eq!(state["annotations"]["dev.isopod.oom_killed"], "true");
    assert_eq!(state["annotations"]["dev.isopod.error"], Value::Null);
    assert!(own.wait(Duration::ZERO) || own.is_alive());
}

#[test]
fn other_versions_are_named() {
    let root = tempfile::tempdir().unwrap();
    let id = ContainerId::parse("one").unwrap();
    let dir = StateDir::create(root.path(), &id).unwrap();
    versions::check(&dir).unwrap();
    let own = ProcessId::own().unwrap();
    record(&id, own).write(&dir).unwrap();
    versions::check(&dir).unwrap();

    let control_version = CONTROL_VERSION - 1;
    (Record { control_version, ..record(&id, own) }).write(&dir).unwrap();
    assert!(Record::read(&dir).unwrap().is_some(), "the state can be read");
    let error = versions::check(&dir).unwrap_err().message;
    let version = format!("control socket has version {control_version}");
    assert!(error.contains(&version) && error.contains("isopod delete --force one"), "{error}");

    let version = STATE_VERSION + 1;
    (Record { version, ..record(&id, own) }).write(&dir).unwrap();
    for error in [Record::read(&dir).unwrap_err(), versions::check(&dir).unwrap_err()] {
        assert!(error.message.contains(&format!("version {version}")), "{error}");
    }
    assert_eq!(Remains::read(&dir).sandbox, Some(own));
    assert!(!Remains::read(&dir).member);
    let at = dir.path().to_owned();
    let pod = Some(Pod { sandbox: id.clone(), dir: at, process: own, holder: false });
    (Record { version, pod, ..record(&id, own) }).write(&dir).unwrap();
    assert!(Remains::read(&dir).member);
    dir.write("state.json", br#"{"sandbox": 7, "vmm": null}"#).unwrap();
    assert!(Record::read(&dir).unwrap_err().message.contains("version 0"));
    assert!(Remains::read(&dir).sandbox.is_none());
}
