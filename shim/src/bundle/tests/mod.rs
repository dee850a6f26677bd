pub(super) mod fields;
mod support;

use std::{fs, os::unix::net::UnixListener, path::PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bundle::*;

/// A bundle directory with a valid config.json, changed by `change`.
fn bundle(change: impl FnOnce(&mut Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("rootfs")).unwrap();
    let mut config: Value =
        serde_json::from_str(include_str!("../testdata/runc-spec.json")).unwrap();
    change(&mut config);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn failure(change: impl FnOnce(&mut Value)) -> String {
    let dir = bundle(change);
    let message = Bundle::load(dir.path(), None).unwrap_err().message;
    assert!(!message.contains('\n'), "one line: {message}");
    message
}

#[test]
fn what_runc_spec_writes_loads() {
    let dir = bundle(|_| {});
    let bundle = Bundle::load(dir.path(), None).unwrap();
    assert_eq!(bundle.rootfs, fs::canonicalize(dir.path().join("rootfs")).unwrap());
    assert!(bundle.binds.is_empty());
    let bundle = Bundle::load(dir.path(), Some(vec!["id".into(), "-u".into()])).unwrap();
    let args = bundle.spec.process().as_ref().unwrap().args().clone().unwrap();
    assert_eq!(args, ["id", "-u"]);
}

#[test]
fn missing_and_broken_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let gone = Bundle::load(&dir.path().join("none"), None).unwrap_err().message;
    assert!(gone.starts_with("the bundle ") && gone.contains("no such file or directory"));
    let empty = Bundle::load(dir.path(), None).unwrap_err().message;
    assert!(empty.contains("it has no config.json"), "{empty}");
    fs::write(dir.path().join("config.json"), "{\n  \"ociVersion\": \"1.0.2\",\n  nope\n}")
        .unwrap();
    let broken = Bundle::load(dir.path(), None).unwrap_err().message;
    assert!(broken.contains("config.json: ") && broken.contains("line 3 column"), "{broken}");
}

#[test]
fn each_mistake_is_named() {
    for (message, expected) in [
        (failure(|c| c["root"]["path"] = json!("nowhere")), "/nowhere: no such file or directory"),
        (failure(|c| c["root"] = Value::Null), "config.json has no root"),
        (failure(|c| c["process"] = Value::Null), "config.json has no process"),
        (
            failure(|c| c["process"]["args"] = json!([])),
            "process.args is empty: there is no program to run",
        ),
        (
            failure(|c| c["process"]["args"] = json!([""])),
            "process.args is empty: there is no program to run",
        ),
        (
            failure(|c| c["process"]["user"]["umask"] = json!(0o1000)),
            "process.user.umask is 0o1000; it has to be from 0 to 0o777 (511)",
        ),
        (
            failure(|c| c["linux"]["sysctl"] = json!({"vm.swappiness": "1"})),
            "linux.sysctl has \"vm.swappiness\", which is not a setting of a namespace",
        ),
        (
            failure(|c| c["linux"]["resources"]["memory"] = json!({"limit": 2, "swap": 1})),
            "linux.resources.memory.swap is 1, which is memory and swap together and cannot be \
             less than linux.resources.memory.limit, 2",
        ),
        (
            failure(|c| c["mounts"][0]["options"] = json!(["remount"])),
            "mounts[0] (/proc) has the option \"remount\", which is not supported",
        ),
        (
            failure(|c| c["process"]["cwd"] = json!("tmp")),
            "process.cwd is \"tmp\", which is not an absolute path",
        ),
        (
            failure(|c| c["ociVersion"] = json!("2.0")),
            "config.json has ociVersion \"2.0\"; this runtime supports 1.x",
        ),
        (
            failure(|c| c["linux"]["namespaces"][0]["type"] = json!("pidd")),
            "unknown variant `pidd`, expected one of `mount`, `cgroup`, `uts`, `ipc`, `user`, \
             `pid`, `network`, `time` at line 1 column",
        ),
        (
            failure(|c| c["linux"]["namespaces"] = json!([{"type": "mount"}])),
            "linux.namespaces \
             has no pid namespace: sharing the host's is not possible from a microVM",
        ),
        (
            failure(|c| c["linux"]["namespaces"][1]["path"] = json!("/run/netns/a")),
            "linux.namespaces: the network namespace /run/netns/a: no such file or directory",
        ),
        (
            failure(|c| {
                let first = c["linux"]["namespaces"][0].clone();
                c["linux"]["namespaces"].as_array_mut().unwrap().push(first);
            }),
            "linux.namespaces has pid twice",
        ),
        (
            failure(|c| c["mounts"][0]["type"] = json!("nfs")),
            "mounts[0] (/proc) has type \
             \"nfs\", which is not supported: bind, proc, sysfs, tmpfs, devpts, mqueue, cgroup, \
             cgroup2, and ext4, ext3, ext2 on a block device are",
        ),
        (
            failure(|c| c["mounts"][0]["destination"] = json!("proc")),
            "mounts[0].destination is \"proc\", which is not an absolute path",
        ),
        (
            failure(|c| c["process"]["oomScoreAdj"] = json!(2000)),
            "process.oomScoreAdj is 2000; it has to be from -1000 to 1000",
        ),
        (
            failure(|c| c["hooks"] = json!({"createContainer": [{"path": "/no/such"}]})),
            "hooks.createContainer[0]: cannot find its program /no/such: no such file or directory",
        ),
        (
            failure(|c| c["hooks"] = json!({"poststop": [{"path": "x"}]})),
            "hooks.poststop[0].path is \"x\", which is not an absolute path",
        ),
        (
            failure(|c| c["hooks"] = json!({"poststop": [{"path": "/x", "timeout": 0}]})),
            "hooks.poststop[0].timeout is 0; it has to be more than 0 seconds",
        ),
        (
            failure(|c| c["process"]["rlimits"][0]["soft"] = json!(9999)),
            "process.rlimits: the soft limit of RLIMIT_NOFILE is above its hard limit",
        ),
        (
            failure(|c| c["linux"]["rootfsPropagation"] = json!("sideways")),
            "linux.rootfsPropagation is \"sideways\"; it has to be shared, slave, private or \
             unbindable, with or without a leading r",
        ),
    ] {
        // Two messages begin with the bundle's own path, and one ends with a position in the text.
        if expected.starts_with('/') || expected.starts_with("unknown variant") {
            assert!(message.contains(expected), "{expected:?} not in {message:?}");
        } else {
            assert_eq!(message, expected);
        }
    }
}

/// A bundle with one more bind mount, of `source` with `options`.
fn with_bind(source: &std::path::Path, options: &[&str]) -> TempDir {
    bundle(|c| {
        c["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/data", "type": "bind", "source": source, "options": options
        }));
    })
}

#[test]
fn bind_mounts_are_found_and_checked() {
    let volume = tempfile::tempdir().unwrap();
    let file = volume.path().join("file");
    fs::write(&file, "x").unwrap();
    let link = volume.path().join("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();

    let dir = with_bind(volume.path(), &["rbind", "ro"]);
    let bind = Bundle::load(dir.path(), None).unwrap().binds.remove(0);
    assert!(bind.directory && bind.recursive && bind.read_only);

    let dir = with_bind(&link, &["bind", "ro", "rw"]);
    let bind = Bundle::load(dir.path(), None).unwrap().binds.remove(0);
    assert_eq!(bind.source, fs::canonicalize(&file).unwrap());
    assert!(!bind.directory && !bind.recursive && !bind.read_only);

    let socket = volume.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    for (source, options, expected) in [
        (volume.path().join("gone"), &["bind"][..], "cannot find its source"),
        (PathBuf::from("/dev/null"), &["bind"], "is a device"),
        (socket, &["bind"], "is a socket"),
        (PathBuf::new(), &["bind"], "without a source"),
        (volume.path().to_owned(), &["rbind", "rshared"], "shared propagation"),
    ] {
        let dir = with_bind(&source, options);
        let message = Bundle::load(dir.path(), None).unwrap_err().message;
        assert!(message.contains(expected), "{expected:?} not in {message:?}");
    }
}

#[test]
fn a_filter_takes_the_place_of_the_profile() {
    let dir = bundle(|c| c["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ERRNO"}));
    let with = Bundle::load(dir.path(), None).unwrap();
    assert!(with.spec.linux().as_ref().unwrap().seccomp().is_none());
    assert!(with.seccomp.is_some());
    assert!(Bundle::load(bundle(|_| {}).path(), None).unwrap().seccomp.is_none());
}
