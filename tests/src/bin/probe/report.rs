//! A process and its surroundings.

use std::collections::BTreeMap;
use std::fs;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{getegid, geteuid, getgroups, getpid, getresgid, getresuid};
use serde_json::{Value, json};

/// Every property of this process that a config.json can set.
pub(crate) fn report() -> Value {
    let status = fields(&read("/proc/self/status"));
    let field = |name: &str| status.get(name).cloned().unwrap_or_default();
    let uid = getresuid().expect("getresuid");
    let gid = getresgid().expect("getresgid");
    let groups = getgroups().expect("getgroups");
    let mask = umask(Mode::empty());
    umask(mask);
    let name = nix::sys::utsname::uname().expect("uname");
    json!({
        "pid": getpid().as_raw(),
        "uid": [uid.real.as_raw(), uid.effective.as_raw(), uid.saved.as_raw(), geteuid().as_raw()],
        "gid": [gid.real.as_raw(), gid.effective.as_raw(), gid.saved.as_raw(), getegid().as_raw()],
        "groups": groups.iter().map(|g| g.as_raw()).collect::<Vec<_>>(),
        "capabilities": {
            "inheritable": field("CapInh"),
            "permitted": field("CapPrm"),
            "effective": field("CapEff"),
            "bounding": field("CapBnd"),
            "ambient": field("CapAmb"),
        },
        "no_new_privs": field("NoNewPrivs"),
        "seccomp": field("Seccomp"),
        "schedule": crate::schedule::report(),
        "umask": format!("{:04o}", mask.bits()),
        "rlimits": rlimits(),
        "cwd": std::env::current_dir().expect("getcwd"),
        "env": std::env::vars().collect::<BTreeMap<_, _>>(),
        "args": std::env::args().collect::<Vec<_>>(),
        "oom_score_adj": read("/proc/self/oom_score_adj").trim(),
        "hostname": name.nodename().to_string_lossy(),
        "domainname": name.domainname().to_string_lossy(),
        "kernel": name.release().to_string_lossy(),
        "boot_id": fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim(),
        "cgroup": read("/proc/self/cgroup").trim(),
        "namespaces": namespaces(),
        "interfaces": names("/sys/class/net"),
        "processes": numeric_names("/proc"),
        "descriptors": numeric_names("/proc/self/fd"),
        "terminal": nix::unistd::isatty(std::io::stdin()).unwrap_or(false),
    })
}

/// The mount table: destination to file-system type, options of the mount and of the file system.
pub(crate) fn mounts() -> Value {
    let table = read("/proc/self/mountinfo");
    let mut found = serde_json::Map::new();
    for line in table.lines() {
        // Such as: 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
        let (head, tail) = line.split_once(" - ").expect("mountinfo");
        let head: Vec<&str> = head.split(' ').collect();
        let tail: Vec<&str> = tail.split(' ').collect();
        let entry = json!({
            "type": tail[0],
            "source": tail[1],
            "options": head[5].split(',').collect::<Vec<_>>(),
            "super": tail[2].split(',').collect::<Vec<_>>(),
            "propagation": head[6..],
        });
        // A later mount on the same place hides an earlier one.
        found.insert(head[4].to_owned(), entry);
    }
    found.into()
}

fn rlimits() -> Value {
    let all = [
        ("RLIMIT_CORE", Resource::RLIMIT_CORE),
        ("RLIMIT_DATA", Resource::RLIMIT_DATA),
        ("RLIMIT_FSIZE", Resource::RLIMIT_FSIZE),
        ("RLIMIT_MEMLOCK", Resource::RLIMIT_MEMLOCK),
        ("RLIMIT_NOFILE", Resource::RLIMIT_NOFILE),
        ("RLIMIT_NPROC", Resource::RLIMIT_NPROC),
        ("RLIMIT_STACK", Resource::RLIMIT_STACK),
    ];
    let mut found = serde_json::Map::new();
    for (name, resource) in all {
        let (soft, hard) = getrlimit(resource).expect("getrlimit");
        found.insert(name.to_owned(), json!([soft, hard]));
    }
    found.into()
}

fn namespaces() -> BTreeMap<String, String> {
    let all = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
    let link = |name: &&str| fs::read_link(format!("/proc/self/ns/{name}")).ok();
    all.iter()
        .filter_map(|name| Some(((*name).to_owned(), link(name)?.to_string_lossy().into_owned())))
        .collect()
}

fn names(dir: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut all: Vec<String> =
        entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    all.sort();
    all
}

fn numeric_names(dir: &str) -> Vec<i32> {
    let own_fd = fs::read_dir(dir);
    drop(own_fd);
    let mut all: Vec<i32> = names(dir).iter().filter_map(|n| n.parse().ok()).collect();
    all.sort_unstable();
    all
}

fn fields(text: &str) -> BTreeMap<String, String> {
    let split = |line: &str| line.split_once(':').map(|(k, v)| (k.to_owned(), v.trim().to_owned()));
    text.lines().filter_map(split).collect()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("cannot read {path}: {e}"))
}
