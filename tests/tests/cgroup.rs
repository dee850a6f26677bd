//! The cgroup of a sandbox on the host: its path, its accounting and its removal.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use isopod_tests::subreaper::End;
use isopod_tests::{Container, DEADLINE, Netns, Scope, microvm_only, runtime, skip};
use serde_json::json;

const ROOT: &str = "/sys/fs/cgroup";

fn unified() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

macro_rules! needs_cgroups_v2 {
    () => {
        if !unified() {
            skip!("this host has no cgroups v2");
        }
    };
}

fn at<'a>(container: Container<'a>, path: &str) -> Container<'a> {
    container.edit(|c| c["linux"]["cgroupsPath"] = json!(path))
}

fn sleeper<'a>(scope: &'a Scope) -> Container<'a> {
    scope.container().args(["sleep", "1000"])
}

/// The cgroup of a process.
#[track_caller]
fn cgroup_of(pid: i32) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    Path::new(ROOT).join(path)
}

/// The cgroup of the scope's commands, the same as this process's.
fn callers() -> PathBuf {
    cgroup_of(std::process::id().try_into().unwrap())
}

fn read(dir: &Path, file: &str) -> String {
    let path = dir.join(file);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Checks the accounting files that engines show of a container's cgroup.
#[track_caller]
fn assert_accounted(dir: &Path) {
    let number = |file: &str| read(dir, file).trim().parse::<u64>().unwrap();
    assert!(number("memory.current") > 0);
    assert!(number("pids.current") > 0);
    let cpu = read(dir, "cpu.stat");
    let usage = cpu.lines().find_map(|line| line.strip_prefix("usage_usec ")).unwrap();
    assert!(usage.parse::<u64>().unwrap() > 0, "{cpu}");
    read(dir, "io.stat");
}

#[test]
fn a_sandbox_has_a_cgroup_beside_its_callers() {
    needs_cgroups_v2!();
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let created = container.start_new();
    let dir = cgroup_of(created.pid);
    assert_eq!(dir, callers().parent().unwrap().join(&container.id));
    assert_accounted(&dir);
    container.kill("KILL").ok();
    created.wait();
    container.delete().ok();
    scope.assert_nothing_left();
}

/// Everything that a microVM uses is charged to the sandbox's cgroup.
#[test]
fn the_vmm_is_in_it_and_its_memory_is_charged_there() {
    microvm_only!();
    needs_cgroups_v2!();
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let created = container.start_new();
    let dir = cgroup_of(created.pid);
    assert_eq!(cgroup_of(scope.child(created.pid, "isopod-vmm")), dir);
    let charged: u64 = read(&dir, "memory.current").trim().parse().unwrap();
    // A guest needs more than this to boot, so less would mean a charge elsewhere.
    assert!(charged > 8 << 20, "{charged}");
    // No limit of the container: its limits hold in the guest.
    assert_eq!(read(&dir, "memory.max").trim(), "max");
    assert_eq!(read(&dir, "pids.max").trim(), "max");
}

#[test]
fn cgroups_path_names_it_and_goes_with_its_parents() {
    needs_cgroups_v2!();
    let scope = Scope::alone();
    let name = scope.name();
    let beside = callers().parent().unwrap().to_owned();
    for (path, expected) in [
        (format!("/{name}"), Path::new(ROOT).join(name)),
        (format!("{name}/relative"), beside.join(name).join("relative")),
        (format!("/{name}/./a//b/../c"), Path::new(ROOT).join(name).join("a/c")),
        (format!("/../../{name}"), Path::new(ROOT).join(name)),
    ] {
        let container = at(sleeper(&scope), &path);
        let created = container.start_new();
        let dir = cgroup_of(created.pid);
        assert_eq!(dir, expected, "{path}");
        assert_accounted(&dir);
        container.delete_force().ok();
        assert!(!dir.exists(), "{path}");
        // runc leaves the parents.
        if !runtime().is_isopod() {
            let _ = fs::remove_dir(Path::new(ROOT).join(name).join("a"));
            let _ = fs::remove_dir(Path::new(ROOT).join(name));
            let _ = fs::remove_dir(beside.join(name));
        }
        scope.assert_nothing_left();
    }
}

#[test]
fn a_parent_that_was_there_stays() {
    needs_cgroups_v2!();
    let scope = Scope::alone();
    let parent = Path::new(ROOT).join(scope.name());
    fs::create_dir(&parent).unwrap();
    let path = format!("/{}/one", scope.name());
    at(scope.container(), &path).run().ok();
    assert!(parent.exists() && !parent.join("one").exists());
    // So does the parent of a neighbour, even when the first container has made it.
    let two = at(sleeper(&scope), &format!("/{}/x/two", scope.name()));
    let three = at(sleeper(&scope), &format!("/{}/x/three", scope.name()));
    let _two = two.start_new();
    let neighbour = three.start_new();
    two.delete_force().ok();
    assert_eq!(cgroup_of(neighbour.pid), parent.join("x/three"));
    three.delete_force().ok();
    let _ = fs::remove_dir(parent.join("x"));
    fs::remove_dir(&parent).unwrap();
    scope.assert_nothing_left();
}

#[test]
fn it_stays_until_delete_and_goes_after_kill_9_too() {
    needs_cgroups_v2!();
    let scope = Scope::alone();
    let path = format!("/{}", scope.name());
    let dir = Path::new(ROOT).join(scope.name());
    let container = at(sleeper(&scope), &path);
    let created = container.start_new();
    scope.program(&["kill", "-9", &created.pid.to_string()]).output().ok();
    created.wait();
    assert!(dir.exists());
    container.delete_force().ok();
    scope.assert_nothing_left();

    microvm_only!();
    let container = at(sleeper(&scope), &path);
    let created = container.create();
    scope.program(&["kill", "-9", &scope.child(created.pid, "isopod-vmm").to_string()]).output();
    assert_eq!(created.wait(), End::Exited(255));
    container.delete().ok();
    scope.assert_nothing_left();
}

#[test]
fn a_creation_that_fails_leaves_none() {
    microvm_only!();
    let scope = Scope::alone();
    let path = format!("/{}/a/b", scope.name());
    for verb in ["create", "run"] {
        let missing = at(scope.container().args(["/no/such/program"]), &path);
        let out = missing.command_with_bundle(verb, &[]).output();
        out.one_line_error(&["/no/such/program"]);
        scope.assert_nothing_left();
        let failing = json!({ "createRuntime": [{ "path": "/bin/false" }] });
        let hooked = at(scope.container(), &path).edit(|c| c["hooks"] = failing);
        hooked.command_with_bundle(verb, &[]).output().one_line_error(&["hooks.createRuntime[0]"]);
        scope.assert_nothing_left();
    }
}

#[test]
fn a_cgroup_that_is_in_use_is_refused_and_left_alone() {
    microvm_only!();
    needs_cgroups_v2!();
    let scope = Scope::alone();
    let path = format!("/{}", scope.name());
    let first = at(sleeper(&scope), &path);
    let created = first.start_new();
    let before = scope.census();
    for verb in ["create", "run"] {
        let out = at(scope.container(), &path).command_with_bundle(verb, &[]).output();
        out.one_line_error(&[&path, "in use by process", "linux.cgroupsPath"]);
        assert_eq!(scope.census().since(&before), [""; 0], "{verb}");
    }
    assert_eq!(cgroup_of(created.pid), Path::new(ROOT).join(scope.name()));
    first.delete_force().ok();
    // An empty cgroup that existed may be used. It is removed, as with runc.
    fs::create_dir(Path::new(ROOT).join(scope.name())).unwrap();
    at(scope.container(), &path).run().ok();
    scope.assert_nothing_left();
}

/// Of several concurrent creations that find no cgroup, one makes it.
#[test]
fn of_several_at_the_same_time_one_has_it() {
    microvm_only!();
    needs_cgroups_v2!();
    let scope = Scope::alone();
    let path = format!("/{}/new", scope.name());
    for _ in 0..3 {
        let containers: Vec<_> = (0..4).map(|_| at(sleeper(&scope), &path)).collect();
        let creating = containers.iter().map(|c| c.command_with_bundle("create", &[]).spawn());
        let mut creating: Vec<_> = creating.collect();
        let ends: Vec<End> = creating.iter_mut().map(|create| create.wait()).collect();
        let made = ends.iter().filter(|end| **end == End::Exited(0)).count();
        assert_eq!(made, 1, "{ends:?}");
        for (create, _) in creating.iter_mut().zip(ends).filter(|(_, end)| *end != End::Exited(0)) {
            let said = create.stderr.so_far();
            assert!(said.contains(&path) && said.contains("linux.cgroupsPath"), "{said}");
        }
        // cgroup.procs lists the kernel threads of the VMM too.
        let inside = read(&Path::new(ROOT).join(scope.name()).join("new"), "cgroup.procs");
        let is_sandbox = |pid: &&str| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command.split(|byte| *byte == 0).any(|word| word == b"sandbox")
        };
        assert_eq!(inside.lines().filter(is_sandbox).count(), 1, "{inside}");
        containers.iter().for_each(|container| drop(container.delete_force().ok()));
        drop(creating);
        scope.assert_nothing_left();
    }
}

/// The container that made the parent may go before one that found it.
#[test]
fn a_parent_goes_with_the_last_of_those_below() {
    microvm_only!();
    needs_cgroups_v2!();
    let scope = Scope::alone();
    let parent = Path::new(ROOT).join(scope.name());
    let [first, last] =
        ["a", "b"].map(|name| at(sleeper(&scope), &format!("/{}/c/{name}", scope.name())));
    let made = [first.create(), last.create()];
    first.delete_force().ok();
    assert!(parent.join("c/b").exists());
    last.delete_force().ok();
    drop(made);
    assert!(!parent.exists());
    scope.assert_nothing_left();
    // A parent made by others stays.
    fs::create_dir(&parent).unwrap();
    at(scope.container(), &format!("/{}/c/d", scope.name())).run().ok();
    assert!(parent.exists() && !parent.join("c").exists());
    fs::remove_dir(&parent).unwrap();
}

/// The end of a systemd scope signals every process in it. The container ends by itself, and no
/// process of the sandbox ends before it.
#[test]
fn a_signal_to_all_of_it_is_the_containers() {
    needs_cgroups_v2!();
    let scope = Scope::alone();
    for signal in ["TERM", "INT", "HUP", "QUIT", "USR1"] {
        let script =
            format!("trap 'echo heard; exit 21' {signal}; echo up; while :; do sleep 1; done");
        let container = scope.container().shell(&script);
        let mut created = container.start_new();
        created.stdout.line_with("up");
        let inside = read(&cgroup_of(created.pid), "cgroup.procs");
        // The kernel threads of the VMM cannot be signalled.
        for pid in inside.lines() {
            scope.program(&["kill", &format!("-{signal}"), pid]).output();
        }
        created.stdout.line_with("heard");
        assert_eq!(created.wait().status(), 21, "{signal}");
        assert_eq!(container.status(), "stopped");
        container.delete().ok();
        scope.assert_nothing_left();
    }
}

/// A namespace that cannot be cleaned does not keep the rest, and can be cleaned later.
#[test]
fn a_delete_that_fails_in_part_removes_the_rest() {
    microvm_only!();
    needs_cgroups_v2!();
    let scope = Scope::alone();
    let (inner, outer) = Netns::pair(&scope, 1500);
    let container = at(sleeper(&scope).join(&inner), &format!("/{}", scope.name()));
    let created = container.start_new();
    let dir = cgroup_of(created.pid);
    scope.program(&["kill", "-9", &created.pid.to_string()]).output().ok();
    created.wait();
    scope.wait_for_processes();
    // Without CAP_SYS_ADMIN `delete` may not enter the network namespace.
    let delete = container.command("delete", &["--force"]);
    let out = delete.through(&["setpriv", "--bounding-set=-sys_admin"]).output();
    out.one_line_error(&[&inner.path(), "no permission"]);
    assert!(!dir.exists());
    assert_eq!(container.status(), "stopped");
    container.delete().ok();
    inner.assert_untouched();
    drop((inner, outer));
    scope.assert_nothing_left();
}

#[test]
fn the_form_of_systemd_names_a_scope_in_a_slice() {
    microvm_only!();
    needs_cgroups_v2!();
    if Path::new("/run/systemd/system").exists() {
        skip!("systemd runs here, and has slices of its own");
    }
    let scope = Scope::alone();
    // Without the trailing `_`, which does not belong at the end of a slice's name.
    let name = scope.name().trim_end_matches('_');
    let container = at(sleeper(&scope), &format!("{name}-a_.slice:libpod:{}", scope.name()));
    let created = container.detach("create", &["--systemd-cgroup"]);
    let expected = format!("{ROOT}/{name}.slice/{name}-a_.slice/libpod-{}.scope", scope.name());
    assert_eq!(cgroup_of(created.pid), Path::new(&expected));
    assert_accounted(Path::new(&expected));
    container.delete().ok();
    scope.assert_nothing_left();
}

#[test]
fn what_cannot_be_a_cgroup_is_refused() {
    microvm_only!();
    let scope = Scope::alone();
    let refused = |path: &str, options: &[&str], words: &[&str]| {
        let out = at(scope.container(), path).command_with_bundle("run", options).output();
        out.one_line_error(&[&["linux.cgroupsPath"], words].concat());
        scope.assert_nothing_left();
    };
    let systemd = &["--systemd-cgroup"];
    refused("/docker/web", systemd, &["/docker/web", "slice:prefix:name"]);
    refused("system:x:y", systemd, &["not the name of a slice"]);
    refused("a--b.slice:x:y", systemd, &["not the name of a slice"]);
    if unified() {
        refused("/", &[], &["root of all cgroups"]);
        refused("/a/../..", &[], &["root of all cgroups"]);
    }
}

/// The host limits the microVM's processor time to the container's, because the guest's kernel is
/// not trusted.
#[test]
fn processor_time_is_limited_on_the_host() {
    needs_cgroups_v2!();
    let scope = Scope::alone();
    let container = sleeper(&scope).edit(|c| {
        c["linux"]["resources"]["cpu"] =
            json!({ "quota": 50000, "period": 100_000, "shares": 512 });
    });
    let created = container.start_new();
    let dir = cgroup_of(created.pid);
    // A microVM may use a tenth of a processor more, for its kernel and its devices.
    let allowed = |quota: u64| quota + if runtime().is_isopod() { 10_000 } else { 0 };
    assert_eq!(read(&dir, "cpu.max").trim(), format!("{} 100000", allowed(50_000)));
    assert_eq!(read(&dir, "cpu.weight").trim(), "20");
    let update = |options: &[&str]| container.command("update", options).output();
    update(&["--cpu-quota", "20000", "--cpu-share", "1024"]).ok();
    assert_eq!(read(&dir, "cpu.max").trim(), format!("{} 100000", allowed(20_000)));
    assert_eq!(read(&dir, "cpu.weight").trim(), "39");
    if runtime().is_isopod() {
        // A value that the guest refuses leaves the host's limit unchanged.
        let failed = update(&["--cpu-quota", "500"]);
        assert_ne!(failed.status, 0, "{failed}");
        assert_eq!(read(&dir, "cpu.max").trim(), format!("{} 100000", allowed(20_000)));
    }
    update(&["--cpu-quota", "-1"]).ok();
    assert_eq!(read(&dir, "cpu.max").trim(), "max 100000");
}

/// A container that has taken over the guest's kernel: its limit is gone inside, and holds outside.
#[test]
fn a_guest_that_lifts_its_own_limit_is_held_by_the_hosts() {
    microvm_only!();
    needs_cgroups_v2!();
    let scope = Scope::alone();
    let script =
        "echo max > /sys/fs/cgroup/cpu.max && cat /sys/fs/cgroup/cpu.max; while :; do :; done";
    let container = scope.container().shell(script).edit(|c| {
        c["linux"]["resources"]["cpu"] = json!({ "quota": 20_000, "period": 100_000 });
        let mounts = c["mounts"].as_array_mut().unwrap();
        let cgroup = mounts.iter_mut().find(|m| m["destination"] == "/sys/fs/cgroup").unwrap();
        cgroup["options"].as_array_mut().unwrap().retain(|option| option != "ro");
        // In a cgroup namespace of its own, the guest's kernel would refuse the write to the limit.
        c["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != "cgroup");
    });
    let mut created = container.start_new();
    created.stdout.line_with("max 100000");
    let throttled = || {
        let stat = read(&cgroup_of(created.pid), "cpu.stat");
        let count = stat.lines().find_map(|line| line.strip_prefix("nr_throttled ")).unwrap();
        count.parse::<u64>().unwrap()
    };
    let (before, until) = (throttled(), Instant::now() + DEADLINE);
    while throttled() < before + 5 {
        assert!(Instant::now() < until, "the host does not hold it");
        std::thread::yield_now();
    }
}
