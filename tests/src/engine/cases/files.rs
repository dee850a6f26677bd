//! Files in a container: their visibility, and the container's rights on them.

use std::fs;

use serde_json::{Value, json};

use crate::engine::Run;

fn directory(run: &Run<'_>, name: &str) -> String {
    let path = run.engine.dir().join(run.name(name));
    fs::create_dir(&path).expect("a directory");
    path.to_string_lossy().into_owned()
}

/// Directories and single files of the host, to read and to write, and named volumes.
pub fn volumes(run: &Run<'_>) {
    let dir = directory(run, "shared");
    fs::write(format!("{dir}/from-host"), "host\n").expect("a file");
    fs::write(format!("{dir}/single"), "one\n").expect("a file");
    let volume = run.name("volume");
    run.ok(&["volume", "create", &volume]);
    let options = [
        &format!("--volume={dir}:/rw") as &str,
        &format!("--volume={dir}:/ro:ro"),
        &format!("--volume={dir}/single:/etc/single:ro"),
        &format!("--volume={dir}/single:/etc/writable"),
        &format!("--volume={volume}:/volume"),
    ];
    let script = "cat /rw/from-host /etc/single; echo container >/rw/from-container; \
                  echo two >>/etc/writable; echo kept >/volume/file; sync; \
                  touch /ro/no 2>&1; echo no 2>&1 >>/etc/single";
    let output = run.run(&options, &["sh", "-c", script]);
    let said = format!("{}{}", output.stdout, output.stderr);
    assert!(said.starts_with("host\none\n"), "{output}");
    assert_eq!(said.matches("Read-only file system").count(), 2, "{output}");
    let read = |name: &str| fs::read_to_string(format!("{dir}/{name}")).unwrap_or_default();
    assert_eq!((&*read("from-container"), &*read("single")), ("container\n", "one\ntwo\n"));
    let kept = run.stdout(&[&format!("--volume={volume}:/again")], &["cat", "/again/file"]);
    assert_eq!(kept, "kept");
    run.ok(&["volume", "rm", &volume]);
}

/// `--tmpfs`, `--shm-size`, `--read-only`.
pub fn memory_file_systems(run: &Run<'_>) {
    let options = ["--read-only", "--tmpfs=/scratch:size=3m,mode=1777,noexec", "--shm-size=5m"];
    let script = "probe mounts; touch /no 2>&1; echo yes >/scratch/yes; cat /scratch/yes; \
                  stat -f -c '%b of %S' /dev/shm";
    let said = run.shell(&options, script);
    let (mounts, said) = said.split_once('\n').expect("lines");
    let seen: Value = serde_json::from_str(mounts).expect("mounts");
    assert_eq!(seen["/scratch"]["type"], json!("tmpfs"));
    assert!(has(&seen["/scratch"]["super"], "size=3072k"), "{seen}");
    assert!(has(&seen["/scratch"]["options"], "noexec"), "{seen}");
    assert!(has(&seen["/"]["options"], "ro"), "{seen}");
    assert!(said.contains("Read-only file system") && said.contains("\nyes\n"), "{said}");
    // Podman mounts /dev/shm on the host and binds it.
    assert!(said.ends_with("\n1280 of 4096"), "{said}");
}

fn has(options: &Value, one: &str) -> bool {
    options.as_array().is_some_and(|all| all.contains(&json!(one)))
}

/// `cp` both ways, with a running container and a stopped one.
pub fn copy(run: &Run<'_>) {
    let dir = directory(run, "copies");
    fs::create_dir(format!("{dir}/tree")).expect("a directory");
    fs::write(format!("{dir}/tree/file"), "sent\n").expect("a file");
    let container = run.start(&[&format!("--volume={dir}:/volume")], &["sleep", "1000"]);
    run.ok(&["cp", &format!("{dir}/tree"), &format!("{}:/tree", container.name)]);
    run.ok(&["cp", &format!("{dir}/tree/file"), &format!("{}:/volume/file", container.name)]);
    assert_eq!(container.shell("cat /tree/file /volume/file"), "sent\nsent");
    container.shell("echo answer >/answer");
    run.ok(&["cp", &format!("{}:/answer", container.name), &format!("{dir}/answer")]);
    assert_eq!(fs::read_to_string(format!("{dir}/answer")).unwrap_or_default(), "answer\n");
    container.ok(&["stop", "--time", "0"]);
    run.ok(&["cp", &format!("{}:/tree/file", container.name), &format!("{dir}/again")]);
    assert_eq!(fs::read_to_string(format!("{dir}/again")).unwrap_or_default(), "sent\n");
    container.remove();
}

/// Changes of a container's own root show in `diff` and stay for its next start.
pub fn own_root(run: &Run<'_>) {
    let container = run.make("run", &[], &["sh", "-c", "echo new >/new; rm /etc/group"]);
    let diff = container.ok(&["diff"]);
    assert!(diff.contains("A /new") && diff.contains("D /etc/group"), "{diff}");
    container.remove();
}
