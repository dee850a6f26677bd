use crate::state::*;

#[test]
fn an_id_can_be_taken_once() {
    let root = tempfile::tempdir().unwrap();
    let id = ContainerId::parse("one").unwrap();
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
    let id = ContainerId::parse("one").unwrap();
    let dir = StateDir::create(&root, &id).unwrap();
    dir.write(CONSOLE_LOG, b"x").unwrap();
    fs::create_dir(dir.path().join(SHARED)).unwrap();
    dir.remove().unwrap();
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 0);
    // A root directory that was there before stays.
    fs::create_dir_all(&root).unwrap();
    StateDir::create(&root, &id).unwrap().remove().unwrap();
    assert!(root.is_dir());
}

#[test]
fn a_new_container_of_the_same_name_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let id = ContainerId::parse("one").unwrap();
    let first = StateDir::create(root.path(), &id).unwrap();
    let late = StateDir::open(root.path(), &id).unwrap();
    first.remove().unwrap();
    drop(first);
    let second = StateDir::create(root.path(), &id).unwrap();
    second.write(RECORD_FILE, b"{}").unwrap();

    assert!(late.try_lock().unwrap(), "what it has open is nobody's any more");
    assert_eq!(late.read(RECORD_FILE).unwrap(), None);
    late.remove().unwrap();
    assert!(second.is_linked());
    let there = StateDir::open(root.path(), &id).unwrap();
    assert!(there.read(RECORD_FILE).unwrap().is_some());
}

#[test]
fn containers_come_and_go_below_a_root_that_comes_and_goes() {
    let outer = tempfile::tempdir().unwrap();
    let root = outer.path().join("a");
    std::thread::scope(|scope| {
        for name in ["one", "two"] {
            let root = &root;
            scope.spawn(move || {
                let id = ContainerId::parse(name).unwrap();
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
    let id = ContainerId::parse("one").unwrap();
    let dir = StateDir::create(root.path(), &id).unwrap();
    let precious = dir.path().join(SHARED).join("precious");
    fs::create_dir_all(&precious).unwrap();
    assert!(dir.remove().is_err());
    assert!(precious.is_dir());
}

#[test]
fn ids_lists_what_can_be_a_container() {
    let root = tempfile::tempdir().unwrap();
    assert!(ids(&root.path().join("none")).unwrap().is_empty());
    fs::create_dir(root.path().join("b")).unwrap();
    fs::create_dir(root.path().join("a")).unwrap();
    fs::create_dir(root.path().join("not an id")).unwrap();
    fs::write(root.path().join("file"), "").unwrap();
    let names: Vec<_> = ids(root.path()).unwrap().iter().map(ContainerId::to_string).collect();
    assert_eq!(names, ["a", "b"]);
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
