//! A container's rights, by default and with options.

use std::fs;

use serde_json::{Value, json};

use crate::engine::Run;

/// Returns whether a set of the probe's report has a capability (numbers of `capabilities(7)`).
fn has(report: &Value, set: &str, number: u32) -> bool {
    let mask = report["capabilities"][set].as_str().unwrap_or_default();
    u64::from_str_radix(mask, 16).unwrap_or_else(|_| panic!("{report}")) >> number & 1 == 1
}

const CHOWN: u32 = 0;
const NET_RAW: u32 = 13;
const SYS_ADMIN: u32 = 21;
const SYS_TIME: u32 = 25;

/// `--cap-add`, `--cap-drop`, and the engine's own set.
pub fn capabilities(run: &Run<'_>) {
    let seen = run.probe(&["--cap-add=SYS_TIME", "--cap-drop=CHOWN"], &["report"]);
    for set in ["effective", "bounding", "permitted"] {
        assert!(has(&seen, set, SYS_TIME), "{seen}");
        assert!(!has(&seen, set, CHOWN) && !has(&seen, set, SYS_ADMIN), "{seen}");
    }
    let seen = run.probe(&["--cap-drop=ALL"], &["report"]);
    assert_eq!(seen["capabilities"]["effective"], json!("0000000000000000"));
    assert!(!has(&seen, "bounding", NET_RAW), "{seen}");
}

/// `--security-opt no-new-privileges`.
pub fn no_new_privileges(run: &Run<'_>) {
    let seen = run.probe(&["--security-opt=no-new-privileges"], &["report"]);
    assert_eq!(seen["no_new_privs"], json!("1"));
    assert_eq!(run.probe(&[], &["report"])["no_new_privs"], json!("0"));
}

/// The engine's seccomp profile holds. A given profile replaces it, and `unconfined` removes it.
pub fn seccomp(run: &Run<'_>) {
    let profile = run.engine.path(&run.name("seccomp.json"));
    let json = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 }],
    });
    fs::write(&profile, json.to_string()).expect("a profile");
    let script = "grep ^Seccomp: /proc/self/status; mkdir /made 2>&1; keyctl 2>&1; true";
    let own = run.shell(&[&format!("--security-opt=seccomp={profile}")], script);
    assert!(own.contains("Seccomp:\t2") && own.contains("not supported"), "{own}");
    let default = run.shell(&[], "grep ^Seccomp: /proc/self/status; unshare -U true 2>&1; true");
    assert!(default.contains("Seccomp:\t2"), "{default}");
    // Podman's own profile allows user namespaces.
    assert!(run.podman() || default.contains("Operation not permitted"), "{default}");
    let none = run.shell(&["--security-opt=seccomp=unconfined"], script);
    assert!(none.contains("Seccomp:\t0"), "{none}");
}

/// `--device`: the node exists and opens; other nodes cannot be made.
pub fn device(run: &Run<'_>) {
    let script = "ls -l /dev/fuse /dev/renamed; probe open rw /dev/renamed; \
                  probe mknod /tmp/kmsg 1 11";
    let options = ["--device=/dev/fuse", "--device=/dev/fuse:/dev/renamed:rwm"];
    let said = run.shell(&options, script);
    assert_eq!(said.matches("10, 229").count(), 2, "{said}");
    assert!(said.contains(r#""/dev/renamed":"ok""#), "{said}");
    assert!(said.contains("EPERM"), "{said}");
}

/// `--privileged`: every capability, and a file system can be mounted.
pub fn privileged(run: &Run<'_>) {
    let script = "probe report; mount -t tmpfs none /mnt && grep -c ' /mnt tmpfs' /proc/mounts; \
                  grep ^Seccomp: /proc/self/status; mount | grep ' /sys ' | head -n 1";
    let said = run.shell(&["--privileged", "--tmpfs=/mnt"], script);
    let (report, said) = said.split_once('\n').expect("lines");
    let seen: Value = serde_json::from_str(report).expect("a report");
    assert!(has(&seen, "effective", SYS_ADMIN), "{seen}");
    assert!(said.starts_with("2\nSeccomp:\t0"), "{said}");
    assert!(said.contains("rw"), "{said}");
}
