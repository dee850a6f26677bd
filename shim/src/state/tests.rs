use std::{collections::BTreeMap, time::Duration};

use super::*;

fn record(id: &Id, sandbox: ProcessId) -> Record {
    Record {
        version: STATE_VERSION,
        protocols: Protocols::OWN,
        id: id.clone(),
        oci_version: "1.0.2".into(),
        bundle: "/b".into(),
        rootfs: "/b/rootfs".into(),
        sandbox,
        vmm: None,
        vm: crate::bundle::VmSize { vcpus: 1, memory_mib: 64 },
        pod: None,
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
    }
}

#[test]
fn ids_follow_runcs_rules() {
    for good in ["a", "A-b_c+d.e", "...", "0", &"x".repeat(255)] {
        assert_eq!(Id::parse(good).unwrap().as_str(), good);
    }
    for bad in ["", ".", "..", "a/b", "/", "a b", "ä", "a\n", "a:b", &"x".repeat(256)] {
        let error = Id::parse(bad).unwrap_err();
        assert!(error.message.contains("invalid container id"), "{error}");
    }
}

#[test]
fn an_id_can_be_taken_once() {
    let root = tempfile::tempdir().unwrap();
    let id = Id::parse("one").unwrap();
    let winners: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..8).map(|_| scope.spawn(|| StateDir::create(root.path(), &id).ok())).collect();
        threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(winners.len(), 1);
    let error = StateDir::create(root.path(), &id).unwrap_err();
    assert!(error.message.contains("exists already"), "{error}");
    assert!(!StateDir::open(root.path(), &id).unwrap().try_lock().unwrap(), "its owner has it");
    winners[0].remove().unwrap();
    assert!(StateDir::open(root.path(), &id).unwrap_err().message.contains("does not exist"));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

#[test]
fn what_had_to_be_made_is_removed_again() {
    let outer = tempfile::tempdir().unwrap();
    let root = outer.path().join("a/b");
    let id = Id::parse("one").unwrap();
    let dir = StateDir::create(&root, &id).unwrap();
    dir.write(CONSOLE_LOG, b"x").unwrap();
    fs::create_dir(dir.path().join(SHARED)).unwrap();
    dir.remove().unwrap();
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 0);
    // A root that was there stays.
    fs::create_dir_all(&root).unwrap();
    StateDir::create(&root, &id).unwrap().remove().unwrap();
    assert!(root.is_dir());
}

#[test]
fn a_new_container_of_the_same_name_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let id = Id::parse("one").unwrap();
    let first = StateDir::create(root.path(), &id).unwrap();
    let late = StateDir::open(root.path(), &id).unwrap();
    first.remove().unwrap();
    drop(first);
    let second = StateDir::create(root.path(), &id).unwrap();
    second.write_record(&record(&id, ProcessId::own().unwrap())).unwrap();

    assert!(late.try_lock().unwrap(), "what it has open is nobody's any more");
    assert_eq!(late.record().unwrap(), None);
    late.remove().unwrap();
    assert!(second.is_linked());
    assert!(StateDir::open(root.path(), &id).unwrap().record().unwrap().is_some());
}

#[test]
fn containers_come_and_go_below_a_root_that_comes_and_goes() {
    let outer = tempfile::tempdir().unwrap();
    let root = outer.path().join("a");
    std::thread::scope(|scope| {
        for name in ["one", "two"] {
            let root = &root;
            scope.spawn(move || {
                let id = Id::parse(name).unwrap();
                for _ in 0..100 {
                    StateDir::create(root, &id).unwrap().remove().unwrap();
                }
            });
        }
    });
}

#[test]
fn only_empty_directories_are_removed() {
    let root = tempfile::tempdir().unwrap();
    let id = Id::parse("one").unwrap();
    let dir = StateDir::create(root.path(), &id).unwrap();
    let precious = dir.path().join(SHARED).join("precious");
    fs::create_dir_all(&precious).unwrap();
    assert!(dir.remove().is_err());
    assert!(precious.is_dir());
}

#[test]
fn the_record_survives_and_knows_whether_its_owner_does() {
    let root = tempfile::tempdir().unwrap();
    let id = Id::parse("one").unwrap();
    let dir = StateDir::create(root.path(), &id).unwrap();
    assert_eq!(dir.record().unwrap(), None);
    let own = ProcessId::own().unwrap();
    let mut written = record(&id, own);
    dir.write_record(&written).unwrap();
    assert_eq!(dir.record().unwrap(), Some(written.clone()));

    let state = serde_json::to_value(written.to_oci()).unwrap();
    assert_eq!(state["status"], "running");
    assert_eq!(state["pid"], own.pid);
    assert_eq!(state["annotations"], serde_json::json!({"a": "b"}));
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
    use serde_json::Value;
}

#[test]
fn ids_lists_what_can_be_a_container() {
    let root = tempfile::tempdir().unwrap();
    assert!(ids(&root.path().join("none")).unwrap().is_empty());
    fs::create_dir(root.path().join("b")).unwrap();
    fs::create_dir(root.path().join("a")).unwrap();
    fs::create_dir(root.path().join("not an id")).unwrap();
    fs::write(root.path().join("file"), "").unwrap();
    let names: Vec<_> = ids(root.path()).unwrap().iter().map(Id::to_string).collect();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn other_versions_are_named() {
    let root = tempfile::tempdir().unwrap();
    let id = Id::parse("one").unwrap();
    let dir = StateDir::create(root.path(), &id).unwrap();
    dir.check_protocols().unwrap();
    let own = ProcessId::own().unwrap();
    dir.write_record(&record(&id, own)).unwrap();
    dir.check_protocols().unwrap();

    let protocols = Protocols { agent: Protocols::OWN.agent - 1, ..Protocols::OWN };
    dir.write_record(&Record { protocols, ..record(&id, own) }).unwrap();
    assert!(dir.record().unwrap().is_some(), "the state can be read");
    let error = dir.check_protocols().unwrap_err().message;
    let version = format!("version {} (agent)", protocols.agent);
    assert!(error.contains(&version) && error.contains("isopod delete --force one"), "{error}");

    let version = STATE_VERSION + 1;
    dir.write_record(&Record { version, ..record(&id, own) }).unwrap();
    for error in [dir.record().unwrap_err(), dir.check_protocols().unwrap_err()] {
        assert!(error.message.contains(&format!("version {version}")), "{error}");
    }
    assert_eq!(dir.remains().sandbox, Some(own));
    dir.write("state.json", br#"{"sandbox": 7, "vmm": null}"#).unwrap();
    assert!(dir.record().unwrap_err().message.contains("version 0"));
    assert!(dir.remains().sandbox.is_none());
}

#[test]
fn a_planted_link_leads_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let (path, victim) = (dir.path().join("pid"), dir.path().join("victim"));
    fs::write(&victim, "untouched").unwrap();
    std::os::unix::fs::symlink(&victim, &path).unwrap();
    let link = dir.path().join(format!(".pid.{}", std::process::id()));
    std::os::unix::fs::symlink(&victim, &link).unwrap();
    write_whole(&path, b"7").unwrap();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
    assert!(fs::symlink_metadata(&path).unwrap().is_file());
    assert_eq!(fs::read_to_string(&path).unwrap(), "7");
}
