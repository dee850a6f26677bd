//! Tests with scripts in the place of the VMM.

use crate::microvm::vmm::*;
use isopod_vmm::config::{FileRef, VsockConfig};
use std::os::unix::fs::PermissionsExt;

/// Runs a shell script in the place of the VMM.
fn run_as_vmm(script: &str) -> (Timeline, VmmEnd) {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("vmm");
    std::fs::write(&program, format!("#!/bin/bash\n{script}\n")).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let open = || File::open("/dev/null").unwrap();
    let files = [open(), open(), open(), open(), open()];
    let config = VmConfig {
        id: "one".into(),
        vcpus: 1,
        memory_mib: 128,
        kvm_fd: files[0].as_raw_fd(),
        kernel: FileRef { fd: files[1].as_raw_fd(), path: "/dev/null".into() },
        initramfs: FileRef { fd: files[2].as_raw_fd(), path: "/dev/null".into() },
        cmdline: String::new(),
        nested: false,
        share_kernel: false,
        console_fd: None,
        control_fd: -1,
        vsock: VsockConfig {
            guest_cid: 3,
            listen_fd: files[3].as_raw_fd(),
            connect_fd: files[4].as_raw_fd(),
        },
        fs: None,
        block: Vec::new(),
        net: Vec::new(),
        disk_slots: 0,
        jail_root_fd: None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let vmm = Vmm::spawn(&program, config, &Placement::default()).unwrap();
        let end = timeout(Duration::from_secs(30), vmm.ended()).await.unwrap();
        let mut timeline = Timeline::default();
        vmm.fill_timeline(&mut timeline);
        assert!(!vmm.id().is_alive());
        (timeline, end)
    })
}

/// Shell code that finds the descriptor of the control socket in the configuration.
const SEND: &str = r#"
    fd=$(grep -o '"control_fd":[0-9]*' <&"$2" | cut -d: -f2)
    send() { printf %s "$1" >&"$fd"; }
"#;

#[test]
fn events_of_the_vmm_are_understood() {
    let (timeline, end) = run_as_vmm(&format!(
        r#"{SEND}
        send '{{"event":{{"event":"started","exec_us":1,"running_us":3}}}}'
        send '{{"event":{{"event":"ended","reason":{{"kind":"guest-panic"}},"console_tail":["Kernel panic","bye"]}}}}'"#
    ));
    assert_eq!((timeline.vmm_main, timeline.vcpus), (Some(1), Some(3)));
    let error = end.explain();
    assert_eq!(error.message, "the guest kernel panicked");
    assert_eq!(error.details[1..], ["| Kernel panic", "| bye"]);
    assert_eq!(error.kind, ErrorKind::VmLost);
    assert_eq!(end.explain_boot().kind, ErrorKind::Failed);
    assert!(!end.is_shutdown());
}

#[test]
fn a_vmm_that_cannot_start_says_why() {
    let (_, end) = run_as_vmm(&format!(
        r#"{SEND} send '{{"event":{{"event":"failed","message":"no memory"}}}}'; exit 1"#
    ));
    assert_eq!(end.explain().message, "the microVM could not be started: no memory");
}

#[test]
fn a_vmm_that_dies_is_reported_with_what_it_wrote() {
    let (_, end) = run_as_vmm("echo thread panicked >&2; kill -9 $$");
    let error = end.explain();
    assert_eq!(
        error.message,
        "the VMM ended without a reason: killed by signal 9 (was the host, or the cgroup that \
         this runs in, out of memory? the kernel's log says)"
    );
    assert!(error.details.iter().any(|line| line.contains("thread panicked")), "{error}");
}

#[test]
fn nonsense_from_the_vmm_ends_it() {
    let (_, end) = run_as_vmm(&format!("{SEND} send nonsense; exec sleep 600"));
    assert!(end.explain().message.contains("control socket failed"), "{:?}", end);
    assert_eq!(end.exit, "killed by signal 9");
}

#[test]
fn only_named_descriptors_are_inherited() {
    let _other = File::open("/dev/zero").unwrap();
    let (_, end) = run_as_vmm("readlink /proc/$$/fd/* >&2; exit 3");
    assert_eq!(end.exit, "exit status 3");
    assert!(end.stderr.iter().all(|line| line != "/dev/zero"), "{:?}", end.stderr);
    assert!(end.stderr.iter().any(|line| line.contains("isopod-vm-config")), "{end:?}");
}
