//! Guests that do not come up: each is reported, in bounded time, and leaves nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::path::{Path, PathBuf};

use isopod_tests::{Output, Scope, microvm_only, runtime};

/// An ELF kernel with only this code, entered in 64-bit mode (Documentation/arch/x86/boot.rst).
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

/// The boot timeout of a guest that will never be ready, in seconds.
const SHORT: &str = "10";

/// The line above the guest's last lines in a report.
const CONSOLE: &str = "last lines of the guest's console:";

/// Runs a good bundle with these environment variables. It has to fail with these words in the
/// first line, and to leave nothing.
#[track_caller]
fn reported(scope: &Scope, variables: &[(&str, &str)], words: &[&str]) -> Output {
    let container = scope.container();
    let command = container.command_with_bundle("run", &[]);
    let command = variables.iter().fold(command, |c, (name, value)| c.env(name, value));
    let out = command.output();
    assert_ne!(out.status, 0, "{out}");
    let first = out.stderr.lines().next().unwrap_or_default().to_lowercase();
    for word in words {
        assert!(first.contains(word), "the first line does not name {word:?}: {out}");
    }
    scope.assert_nothing_left();
    out
}

/// The guest's lines in a report, oldest first.
#[track_caller]
fn console(out: &Output) -> Vec<&str> {
    let lines = out.stderr.lines().skip_while(|line| line.trim() != CONSOLE).skip(1);
    let lines: Vec<&str> = lines.map_while(|line| line.trim().strip_prefix("| ")).collect();
    assert!(!lines.is_empty(), "no lines of the guest's console: {out}");
    lines
}

/// Code that writes this text to the first serial port.
fn say(text: &str) -> Vec<u8> {
    // mov dx, 0x3f8; and for each byte: mov al, byte; out dx, al
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    code.extend(text.bytes().flat_map(|byte| [0xb0, byte, 0xee]));
    code
}

/// Runs a kernel that prints two lines and then executes `code`. The report has both lines, below a
/// line with these words.
#[track_caller]
fn with_kernel(code: &[u8], variables: &[(&str, &str)], words: &[&str]) {
    let scope = Scope::alone();
    let path = scope.dir().join("kernel");
    fs::write(&path, kernel(&[&say("one line\nanother line\n"), code].concat())).unwrap();
    let kernel = [("ISOPOD_KERNEL", path.to_str().unwrap())];
    let out = reported(&scope, &[&kernel, variables].concat(), words);
    assert_eq!(console(&out), ["one line", "another line"], "{out}");
}

#[test]
fn a_triple_fault() {
    microvm_only!();
    // ud2, without a handler
    with_kernel(&[0x0f, 0x0b], &[], &["triple fault"]);
}

#[test]
fn a_guest_that_spins() {
    microvm_only!();
    // jmp to itself
    with_kernel(&[0xeb, 0xfe], &[("ISOPOD_BOOT_TIMEOUT", SHORT)], &["10 seconds"]);
}

#[test]
fn a_guest_that_sleeps_forever() {
    microvm_only!();
    // cli; hlt; jmp to hlt
    let code = [0xfa, 0xf4, 0xeb, 0xfd];
    with_kernel(&code, &[("ISOPOD_BOOT_TIMEOUT", SHORT)], &["10 seconds"]);
}

#[test]
fn a_guest_that_resets_at_once() {
    microvm_only!();
    // mov al, 0xfe; out 0x64, al; hlt
    with_kernel(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4], &[], &["shut down"]);
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

/// Checks the report of a guest kernel's panic. These words are in a line of its console.
#[track_caller]
fn panics(scope: &Scope, image: &Path, words: &str) {
    let image = [("ISOPOD_INITRAMFS", image.to_str().unwrap())];
    let out = reported(scope, &image, &["panic"]);
    let lines = console(&out);
    let is_panic = |line: &&str| line.contains("Kernel panic - not syncing");
    assert!(lines.iter().any(is_panic), "no panic among the last lines: {out}");
    assert!(lines.iter().any(|line| line.contains(words)), "no {words:?}: {out}");
}

#[test]
fn a_kernel_panic_is_shown_with_its_last_lines() {
    microvm_only!();
    let scope = Scope::alone();
    panics(&scope, &image(&scope, None), "init");
}

#[test]
fn an_init_that_ends_is_a_panic() {
    microvm_only!();
    let scope = Scope::alone();
    let init = runtime().probe.to_str().unwrap();
    panics(&scope, &image(&scope, Some(init)), "Attempted to kill init");
}

/// The guest's console is empty, because a kernel without a fault is quiet.
#[test]
fn an_init_that_never_reports() {
    microvm_only!();
    let scope = Scope::alone();
    let image = image(&scope, Some("/bin/busybox"));
    let variables = [("ISOPOD_INITRAMFS", image.to_str().unwrap()), ("ISOPOD_BOOT_TIMEOUT", SHORT)];
    reported(&scope, &variables, &["10 seconds"]);
}
