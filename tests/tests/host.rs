//! Hosts that cannot run a sandbox, and the output of `isopod check` there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use isopod_tests::{Scope, microvm_only, runtime};

/// A script for a /dev with the nodes that any program may expect, but without /dev/kvm.
const NO_KVM: &str = "mount -t tmpfs -o mode=755 none /dev
    mkdir /dev/shm /dev/net
    for node in null,3 zero,5 full,7 random,8 urandom,9; do
        mknod -m 666 /dev/${node%,*} c 1 ${node#*,}
    done";

/// The same with a /dev/kvm that its owner may not open.
const FORBIDDEN_KVM: &str = "mknod -m 000 /dev/kvm c 10 232";

/// Runs a program as a root that has to obey the mode of files.
const OBEDIENT: [&str; 2] = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"];

/// A script that hides the processor's hardware virtualisation.
const NO_HARDWARE: &str = "grep -qwE 'svm|vmx' /proc/cpuinfo || exit 0
    table=$(mktemp); sed -E 's/\\b(svm|vmx)\\b//' /proc/cpuinfo > $table
    mount --bind $table /proc/cpuinfo; rm $table";

/// `check` with a script run before it, in a mount namespace of its own.
fn check(scope: &Scope, script: &str, wrapper: &[&str]) -> isopod_tests::Output {
    scope.runtime().args(["check"]).through(wrapper).after_mounting(script).output()
}

/// Checks the same for `run` and `create`: each fails in one line with these words, and leaves
/// nothing.
#[track_caller]
fn run_refused(scope: &Scope, script: &str, wrapper: &[&str], words: &[&str]) {
    for verb in ["run", "create"] {
        let container = scope.container();
        let command = container.command_with_bundle(verb, &[]).through(wrapper);
        command.after_mounting(script).output().one_line_error(words);
        scope.assert_nothing_left();
    }
}

#[test]
fn without_dev_kvm() {
    microvm_only!();
    let scope = Scope::alone();
    run_refused(&scope, NO_KVM, &[], &["no /dev/kvm", "load kvm_amd or kvm_intel"]);
    let out = check(&scope, NO_KVM, &[]);
    assert!(out.status != 0 && out.stdout.contains("/dev/kvm"), "{out}");
    scope.assert_nothing_left();
}

#[test]
fn without_permission_for_dev_kvm() {
    microvm_only!();
    let scope = Scope::alone();
    let script = format!("{NO_KVM}\n{FORBIDDEN_KVM}");
    run_refused(&scope, &script, &OBEDIENT, &["permission", "/dev/kvm", "root"]);
    let out = check(&scope, &script, &OBEDIENT);
    assert!(out.status != 0 && out.stdout.contains("permission"), "{out}");
}

#[test]
fn with_a_software_kvm() {
    microvm_only!();
    let scope = Scope::alone();
    run_refused(&scope, NO_HARDWARE, &[], &["software KVM", "/dev/kvm", "use a host with"]);
    let out = check(&scope, NO_HARDWARE, &[]);
    assert!(out.status != 0 && out.stdout.contains("software"), "{out}");
}

#[test]
fn as_somebody_else_than_root() {
    microvm_only!();
    let scope = Scope::alone();
    let container = scope.container();
    let wrapper = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let out = container.command_with_bundle("run", &[]).through(&wrapper).output();
    out.one_line_error(&["permission", "root"]);
    scope.assert_nothing_left();
}

#[test]
fn check_lists_what_a_sandbox_needs() {
    microvm_only!();
    let scope = Scope::alone();
    let out = scope.runtime().args(["check"]).output().ok();
    for word in [
        "kvm",
        "hardware",
        "vsock",
        "tun",
        "mirred",
        "vhost",
        "cgroups",
        "version 2",
        "descriptors",
        "smt",
        "ksm",
        "mitigations",
        "kernel",
        "image",
        "settings",
        "name service",
        "cls_u32",
    ] {
        assert!(out.stdout.to_lowercase().contains(word), "no {word}: {out}");
    }
    assert!(out.stdout.lines().count() < 25, "not a short table: {out}");
    scope.assert_nothing_left();
}

#[test]
fn check_names_what_is_missing() {
    microvm_only!();
    let scope = Scope::alone();
    for variable in ["ISOPOD_KERNEL", "ISOPOD_INITRAMFS", "ISOPOD_VMM"] {
        let out = scope.runtime().args(["check"]).env(variable, "/no/such/file").output();
        assert!(out.status != 0 && out.stdout.contains("/no/such/file"), "{variable}: {out}");
    }
    let out = scope.runtime().args(["check"]).env("ISOPOD_BOOT_TIMEOUT", "0").output();
    let line = out.stdout.lines().find(|line| line.starts_with("settings ")).unwrap();
    assert!(out.status == 1 && line.contains("MISSING") && line.contains("from 1 to"), "{out}");
}

/// A network needs tun: without it a host cannot run the containers that engines ask for.
#[test]
fn without_tun_and_with_few_descriptors() {
    microvm_only!();
    let scope = Scope::alone();
    let out = check(&scope, "mount -t tmpfs none /dev/net", &[]);
    let line = out.stdout.lines().find(|line| line.starts_with("tun ")).unwrap();
    assert!(out.status == 1 && line.contains("MISSING") && line.contains("/dev/net/tun"), "{out}");
    let out = check(&scope, "ulimit -n 100", &[]);
    let line = out.stdout.lines().find(|line| line.starts_with("descriptors ")).unwrap();
    assert!(out.status == 1 && line.contains("MISSING") && line.contains("100"), "{out}");
    scope.assert_nothing_left();
}

#[test]
fn version_is_one_that_engines_can_read() {
    let scope = Scope::alone();
    let out = scope.program(&[runtime().path.to_str().unwrap(), "--version"]).output().ok();
    let mut lines = out.stdout.lines();
    let name = runtime().path.file_name().unwrap().to_str().unwrap();
    assert!(lines.next().unwrap().starts_with(&format!("{name} version ")), "{out}");
    assert!(lines.any(|line| line.starts_with("spec: 1.")), "{out}");
}
