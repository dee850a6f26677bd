//! The process of a config.json, read back from inside by the probe.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::os::unix::fs::PermissionsExt;

use isopod_tests::{Container, PROBE_PATH, Scope, runtime, skip};
use serde_json::{Value, json};

/// The probe's report after a change of config.json.
fn report(scope: &Scope, change: impl FnOnce(&mut Value)) -> Value {
    scope.container().probe(&["report"]).edit(change).run_json()
}

/// Capabilities as /proc/PID/status shows them (capability numbers of `capabilities(7)`).
fn mask(numbers: &[u32]) -> Value {
    json!(format!("{:016x}", numbers.iter().fold(0_u64, |mask, n| mask | 1 << n)))
}

const CHOWN: u32 = 0;
const KILL: u32 = 5;
const NET_BIND_SERVICE: u32 = 10;
const SYS_CHROOT: u32 = 18;
const AUDIT_WRITE: u32 = 29;

#[test]
fn defaults_are_as_runc_spec_writes_them() {
    let scope = Scope::in_pod();
    let seen = report(&scope, |_| {});
    let default = mask(&[AUDIT_WRITE, KILL, NET_BIND_SERVICE]);
    for set in ["permitted", "effective", "bounding"] {
        assert_eq!(seen["capabilities"][set], default, "{set}");
    }
    assert_eq!(seen["uid"], json!([0, 0, 0, 0]));
    assert_eq!(seen["rlimits"]["RLIMIT_NOFILE"], json!([1024, 1024]));
    assert_eq!(seen["no_new_privs"], json!("1"));
    assert_eq!(seen["hostname"], json!("isopod"));
    assert_eq!(seen["cwd"], json!("/"));
    assert_eq!(seen["pid"], json!(1));
    assert_eq!(seen["processes"], json!([1]), "others can be seen");
}

#[test]
fn every_capability_set_is_as_asked() {
    let scope = Scope::in_pod();
    let seen = report(&scope, |c| {
        c["process"]["capabilities"] = json!({
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_CHROOT", "CAP_NET_BIND_SERVICE"],
            "permitted": ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_CHROOT"],
            "inheritable": ["CAP_CHOWN", "CAP_KILL"],
            "effective": ["CAP_CHOWN", "CAP_SYS_CHROOT"],
            "ambient": ["CAP_CHOWN"],
        });
        // As another user, because execve(2) gives root the whole bounding set.
        c["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    });
    let sets = &seen["capabilities"];
    assert_eq!(sets["bounding"], mask(&[CHOWN, KILL, SYS_CHROOT, NET_BIND_SERVICE]));
    assert_eq!(sets["inheritable"], mask(&[CHOWN, KILL]));
    // Of these sets execve(2) keeps the ambient capabilities (capabilities(7)).
    for set in ["permitted", "effective", "ambient"] {
        assert_eq!(sets[set], mask(&[CHOWN]), "{set}");
    }
}

#[test]
fn no_capabilities_means_none() {
    let scope = Scope::in_pod();
    let seen = report(&scope, |c| c["process"]["capabilities"] = json!({}));
    for set in ["permitted", "effective", "bounding", "inheritable", "ambient"] {
        assert_eq!(seen["capabilities"][set], mask(&[]), "{set}");
    }
}

#[test]
fn user_groups_and_umask_are_as_asked() {
    let scope = Scope::in_pod();
    let seen = report(&scope, |c| {
        c["process"]["user"] =
            json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 1002, 70000], "umask": 0o027 });
    });
    assert_eq!(seen["uid"], json!([1000, 1000, 1000, 1000]));
    assert_eq!(seen["gid"], json!([1001, 1001, 1001, 1001]));
    let mut groups: Vec<u64> = serde_json::from_value(seen["groups"].clone()).unwrap();
    groups.retain(|&g| g != 1001);
    groups.sort_unstable();
    assert_eq!(groups, [5, 1002, 70000]);
    assert_eq!(seen["umask"], json!("0027"));
    // A user other than root has the default bounding set.
    let default = mask(&[AUDIT_WRITE, KILL, NET_BIND_SERVICE]);
    assert_eq!(seen["capabilities"]["bounding"], default);
}

/// To the kernel the id 4294967295 means "unchanged", and unchanged is root.
#[test]
fn nobody_is_root_by_a_number_out_of_range() {
    const WORDS: &str = "uids and gids must be in range 0-2147483647";
    let scope = Scope::in_pod();
    for user in [
        json!({ "uid": 4_294_967_295_u32, "gid": 1000 }),
        json!({ "uid": 1000, "gid": 4_294_967_295_u32 }),
        json!({ "uid": 1000, "gid": 1000, "additionalGids": [4_294_967_295_u32] }),
    ] {
        let out = scope.container().edit(|c| c["process"]["user"] = user.clone()).run();
        assert!(out.status != 0 && out.stderr.contains(WORDS), "{out}");
    }
    let container = sleeper(&scope);
    let _created = container.start_new();
    for user in ["4294967295", "1000:4294967295", "2147483648"] {
        let out = container.command("exec", &["--user", user]).args(["id"]).output();
        assert!(out.status != 0 && out.stderr.contains(WORDS), "{out}");
    }
}

#[test]
fn rlimits_are_as_asked() {
    let scope = Scope::in_pod();
    let seen = report(&scope, |c| {
        c["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 4096 },
            { "type": "RLIMIT_STACK", "soft": 4_194_304, "hard": 8_388_608 },
            { "type": "RLIMIT_NPROC", "soft": 50, "hard": 60 },
        ]);
    });
    assert_eq!(seen["rlimits"]["RLIMIT_NOFILE"], json!([100, 200]));
    assert_eq!(seen["rlimits"]["RLIMIT_CORE"], json!([0, 4096]));
    assert_eq!(seen["rlimits"]["RLIMIT_STACK"], json!([4_194_304, 8_388_608]));
    assert_eq!(seen["rlimits"]["RLIMIT_NPROC"], json!([50, 60]));
}

#[test]
fn an_rlimit_can_be_raised() {
    let scope = Scope::in_pod();
    let out = scope.program(&["sh", "-c", "ulimit -Hn 2000000 && ulimit -Hn"]).output();
    if !runtime().is_isopod() && out.status != 0 {
        skip!("this machine lets nobody raise a limit");
    }
    let limit = json!([{ "type": "RLIMIT_NOFILE", "soft": 1_000_000, "hard": 1_000_000 }]);
    let seen = report(&scope, |c| c["process"]["rlimits"] = limit);
    assert_eq!(seen["rlimits"]["RLIMIT_NOFILE"], json!([1_000_000, 1_000_000]));
}

#[test]
fn no_new_privs_is_as_asked_and_a_set_user_id_program_gains_nothing() {
    let scope = Scope::in_pod();
    for (asked, euid) in [(false, 0), (true, 1000)] {
        let container = scope.container().args(["/bin/set-user-id", "report"]).edit(|c| {
            c["process"]["noNewPrivileges"] = json!(asked);
            c["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
        });
        let program = container.bundle.rootfs("/bin/set-user-id");
        fs::copy(container.bundle.rootfs(PROBE_PATH), &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
        let seen = container.run_json();
        assert_eq!(seen["no_new_privs"], json!(if asked { "1" } else { "0" }));
        assert_eq!((&seen["uid"][0], &seen["uid"][1]), (&json!(1000), &json!(euid)));
    }
}

#[test]
fn cwd_is_as_asked_and_made_when_missing() {
    let scope = Scope::in_pod();
    for cwd in ["/tmp", "/made/for/it"] {
        let seen = report(&scope, |c| c["process"]["cwd"] = json!(cwd));
        assert_eq!(seen["cwd"], json!(cwd));
    }
}

#[test]
fn environment_is_exactly_as_asked() {
    let scope = Scope::in_pod();
    let asked = json!(["PATH=/bin", "EMPTY=", "EQUALS=a=b", "TEXT=two words\nünï", "HOME=/home"]);
    let seen = report(&scope, |c| c["process"]["env"] = asked);
    let should_be = json!({
        "PATH": "/bin", "EMPTY": "", "EQUALS": "a=b", "TEXT": "two words\nünï", "HOME": "/home",
    });
    assert_eq!(seen["env"], should_be);
}

#[test]
fn the_program_is_searched_in_its_own_path() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["probe", "report"]);
    let container = container.edit(|c| c["process"]["env"] = json!(["PATH=/nowhere:/bin"]));
    assert_eq!(container.run_json()["args"], json!(["probe", "report"]));
    let container = scope.container().args(["./probe", "report"]);
    let container = container.edit(|c| c["process"]["cwd"] = json!("/bin"));
    assert_eq!(container.run_json()["args"], json!(["./probe", "report"]));
}

#[test]
fn oom_score_adj_is_as_asked() {
    let scope = Scope::in_pod();
    let seen = report(&scope, |c| c["process"]["oomScoreAdj"] = json!(321));
    assert_eq!(seen["oom_score_adj"], json!("321"));
}

#[test]
fn hostname_and_domainname_are_as_asked() {
    let scope = Scope::in_pod();
    let seen = report(&scope, |c| {
        c["hostname"] = json!("a-host");
        c["domainname"] = json!("example.org");
    });
    assert_eq!(seen["hostname"], json!("a-host"));
    // runc 1.1 does not know domainname yet.
    if runtime().is_isopod() {
        assert_eq!(seen["domainname"], json!("example.org"));
    }
}

#[test]
fn no_descriptor_is_inherited_but_the_three_streams() {
    let scope = Scope::in_pod();
    // The fourth is the probe's own, of /proc/self/fd.
    assert_eq!(report(&scope, |_| {})["descriptors"], json!([0, 1, 2, 3]));
}

fn sleeper(scope: &Scope) -> Container<'_> {
    scope.container().args(["sleep", "1000"])
}

#[test]
fn exec_has_the_containers_settings() {
    let scope = Scope::in_pod();
    let container = sleeper(&scope).edit(|c| {
        c["process"]["user"] = json!({ "uid": 1000, "gid": 1000, "additionalGids": [5] });
        c["process"]["env"] = json!(["PATH=/bin", "ONE=1"]);
        c["process"]["cwd"] = json!("/tmp");
    });
    let _created = container.start_new();
    let seen = container.exec_json(&[], &["report"]);
    assert_eq!(seen["uid"], json!([1000, 1000, 1000, 1000]));
    assert_eq!(seen["env"]["ONE"], json!("1"));
    assert_eq!(seen["cwd"], json!("/tmp"));
    assert_eq!(seen["hostname"], json!("isopod"));
    assert_eq!(seen["no_new_privs"], json!("1"));
    assert_eq!(seen["rlimits"]["RLIMIT_NOFILE"], json!([1024, 1024]));
    assert_eq!(seen["capabilities"]["bounding"], mask(&[AUDIT_WRITE, KILL, NET_BIND_SERVICE]));
    assert!(seen["processes"].as_array().unwrap().contains(&json!(1)), "not in the container");
}

#[test]
fn exec_takes_user_env_and_cwd() {
    let scope = Scope::in_pod();
    let container = sleeper(&scope);
    let _created = container.start_new();
    let options = ["--user", "1001:1002", "--env", "A=b", "--env", "C=d e", "--cwd", "/home"];
    let seen = container.exec_json(&options, &["report"]);
    assert_eq!(seen["uid"], json!([1001, 1001, 1001, 1001]));
    assert_eq!(seen["gid"], json!([1002, 1002, 1002, 1002]));
    assert_eq!((&seen["env"]["A"], &seen["env"]["C"]), (&json!("b"), &json!("d e")));
    assert_eq!(seen["cwd"], json!("/home"));
}

#[test]
fn exec_takes_a_whole_process() {
    let scope = Scope::in_pod();
    let container = sleeper(&scope);
    let _created = container.start_new();
    let file = scope.dir().join("process.json");
    let process = json!({
        "args": ["/bin/probe", "report"],
        "env": ["PATH=/bin", "FROM=process"],
        "cwd": "/etc",
        "user": { "uid": 7, "gid": 8, "additionalGids": [9] },
        "capabilities": { "bounding": ["CAP_CHOWN"] },
        "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 64, "hard": 64 }],
    });
    fs::write(&file, process.to_string()).unwrap();
    let out = container.command("exec", &["--process", file.to_str().unwrap()]).output().ok();
    let seen: Value = serde_json::from_str(&out.stdout).unwrap();
    assert_eq!((&seen["uid"][0], &seen["gid"][0]), (&json!(7), &json!(8)));
    assert_eq!((&seen["cwd"], &seen["env"]["FROM"]), (&json!("/etc"), &json!("process")));
    assert_eq!(seen["capabilities"]["bounding"], mask(&[CHOWN]));
    assert_eq!(seen["rlimits"]["RLIMIT_NOFILE"], json!([64, 64]));
    // The container's own process has it, but a field missing in the file is false.
    assert_eq!(seen["no_new_privs"], json!("0"));
}

#[test]
fn exec_adds_groups_and_capabilities_and_takes_privileges() {
    let scope = Scope::in_pod();
    let container = sleeper(&scope).capabilities(&["CAP_KILL"]).edit(|c| {
        c["process"]["user"] = json!({ "uid": 0, "gid": 0, "additionalGids": [5] });
        c["process"]["noNewPrivileges"] = json!(false);
    });
    let _created = container.start_new();
    let options = ["--additional-gids=77", "-g", "78", "--cap=CAP_CHOWN", "--no-new-privs"];
    let more = ["--apparmor=unconfined", "--process-label=label"];
    let seen = container.exec_json(
        &[&options[..], if runtime().is_isopod() { &more } else { &[] }].concat(),
        &["report"],
    );
    assert_eq!(seen["groups"], json!([5, 77, 78]));
    for set in ["bounding", "effective", "permitted"] {
        assert_eq!(seen["capabilities"][set], mask(&[CHOWN, KILL]), "{set}");
    }
    assert_eq!(seen["no_new_privs"], json!("1"));
    assert_eq!(container.exec_json(&[], &["report"])["no_new_privs"], json!("0"));
}

#[test]
fn exec_detached_leaves_a_pid_that_ends_with_the_programs_status() {
    let scope = Scope::in_pod();
    let container = sleeper(&scope);
    let _created = container.start_new();
    let pid_file = scope.dir().join("exec.pid");
    let options = ["--detach", "--pid-file", pid_file.to_str().unwrap()];
    let script = "trap 'exit 12' TERM; echo $$; sleep 1000 & wait";
    let mut job = container.command("exec", &options).args(["sh", "-c", script]).spawn();
    assert_eq!(job.wait().status(), 0, "{}", job.stderr.so_far());
    let pid: i32 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    let inside = job.stdout.line().unwrap();
    assert_eq!(scope.keeper().ended(pid), None);
    // From inside, because the verb `kill` signals the container's first process.
    container.exec(["kill", "-TERM", &inside]).ok();
    let end = scope.keeper().wait(pid, isopod_tests::DEADLINE).expect("it has not ended");
    assert_eq!(end.status(), 12);
    assert_eq!(container.status(), "running");
}

/// The host's kernel chooses by this score too, when the host's memory runs out.
#[test]
fn oom_score_adj_holds_on_the_host() {
    let scope = Scope::new();
    let of = |pid: i32| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    let container = scope.container().args(["sleep", "1000"]);
    let container = container.edit(|c| c["process"]["oomScoreAdj"] = json!(321));
    let created = container.start_new();
    assert_eq!(of(created.pid), "321\n");
    if !runtime().is_isopod() {
        return;
    }
    assert_eq!(of(scope.child(created.pid, "isopod-vmm")), "321\n");
    // An engine protects itself, but not its containers.
    let protected = ["sh", "-c", "echo -500 > /proc/self/oom_score_adj; exec \"$@\"", "sh"];
    let pid_file = scope.dir().join("exec.pid");
    let options = ["--detach", "--pid-file", pid_file.to_str().unwrap()];
    let exec = container.command("exec", &options).args(["sleep", "1000"]).through(&protected);
    assert_eq!(exec.spawn().wait().status(), 0);
    assert_eq!(of(fs::read_to_string(pid_file).unwrap().parse().unwrap()), "321\n");
    let other = scope.container().args(["sleep", "1000"]);
    let pid_file = other.pid_file();
    let options = ["--detach", "--pid-file", pid_file.to_str().unwrap()];
    let run = other.command_with_bundle("run", &options).through(&protected);
    assert_eq!(run.spawn().wait().status(), 0);
    let pid = fs::read_to_string(pid_file).unwrap().parse().unwrap();
    assert_eq!((of(pid), of(scope.child(pid, "isopod-vmm"))), ("0\n".into(), "0\n".into()));
    other.delete_force().ok();
}
