//! Guests that do not come up: each is reported, in bounded time, and leaves nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::path::{Path, PathBuf};

use isopod_tests::{Output, Scope, microvm_only, runtime};

/// An ELF kernel of nothing but this code, entered in 64-bit mode (Documentation/arch/x86/boot.rst).
fn kernel(code: &[u8]) -> Vec<u8> {
    const ADDRESS: u64 = 0x0100_0000;
    const HEADERS: u64 = 0x1000;
    let mut elf = Vec::new();
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // ET_EXEC, EM_X86_64, version 1; entry; program headers at 64, no sections.
    elf.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [ADDRESS, 64, 0] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    for half in [0_u16, 0, 64, 56, 1, 64, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    // One PT_LOAD, readable and executable.
    elf.extend_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [HEADERS, ADDRESS, ADDRESS, 0x1000, 0x1000, 0x1000] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.resize(usize::try_from(HEADERS).unwrap(), 0);
    elf.extend_from_slice(code);
    elf.resize(elf.len() + 0x1000 - code.len(), 0x90);
    elf
}

/// Runs a good bundle with one environment variable changed, which has to fail with these words in the
/// first line, and leave nothing.
#[track_caller]
fn reported(scope: &Scope, variable: &str, path: &Path, words: &[&str]) -> Output {
    let container = scope.container();
    let command = container.command_with_bundle("run", &[]).env(variable, path.to_str().unwrap());
    let out = command.env("ISOPOD_BOOT_TIMEOUT", "10").output();
    assert_ne!(out.status, 0, "{out}");
    let first = out.stderr.lines().next().unwrap_or_default().to_lowercase();
    for word in words {
        assert!(first.contains(word), "the first line does not name {word:?}: {out}");
    }
    scope.assert_nothing_left();
    out
}

fn with_kernel(code: &[u8], words: &[&str]) {
    let scope = Scope::alone();
    let path = scope.dir().join("kernel");
    fs::write(&path, kernel(code)).unwrap();
    reported(&scope, "ISOPOD_KERNEL", &path, words);
}

#[test]
fn a_triple_fault() {
    microvm_only!();
    // ud2, without anything to handle it
    with_kernel(&[0x0f, 0x0b], &["triple fault"]);
}

#[test]
fn a_guest_that_spins() {
    microvm_only!();
    // jmp to itself
    with_kernel(&[0xeb, 0xfe], &["10 seconds"]);
}

#[test]
fn a_guest_that_sleeps_forever() {
    microvm_only!();
    // cli; hlt; jmp to hlt
    with_kernel(&[0xfa, 0xf4, 0xeb, 0xfd], &["10 seconds"]);
}

#[test]
fn a_guest_that_resets_at_once() {
    microvm_only!();
    // mov al, 0xfe; out 0x64, al; hlt
    with_kernel(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4], &["shut down"]);
}

/// An image with this program as /init, or with none.
fn image(scope: &Scope, init: Option<&str>) -> PathBuf {
    let root = scope.dir().join("image");
    fs::create_dir_all(root.join("dev")).unwrap();
    if let Some(program) = init {
        fs::copy(program, root.join("init")).unwrap();
    }
    let script = "cd \"$1\" && find . | busybox cpio -o -H newc > ../initramfs";
    scope.program(&["sh", "-c", script, "sh", root.to_str().unwrap()]).output().ok();
    scope.dir().join("initramfs")
}

#[test]
fn a_kernel_panic_is_shown_with_its_last_lines() {
    microvm_only!();
    let scope = Scope::alone();
    let out = reported(&scope, "ISOPOD_INITRAMFS", &image(&scope, None), &["panic"]);
    assert!(out.stderr.contains("init"), "no line of the console: {out}");
}

#[test]
fn an_init_that_ends_is_a_panic() {
    microvm_only!();
    let scope = Scope::alone();
    let init = runtime().probe.to_str().unwrap();
    let out = reported(&scope, "ISOPOD_INITRAMFS", &image(&scope, Some(init)), &["panic"]);
    assert!(out.stderr.contains("Attempted to kill init"), "{out}");
}

#[test]
fn an_init_that_never_reports() {
    microvm_only!();
    let scope = Scope::alone();
    reported(&scope, "ISOPOD_INITRAMFS", &image(&scope, Some("/bin/busybox")), &["10 seconds"]);
}
