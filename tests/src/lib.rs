//! The harness of the end-to-end tests.
//!
//! Every test drives the built binaries as a user or a container engine would. A test makes a
//! [`Scope`], gets containers from the scope, and asserts on the output and exit status of
//! commands:
//!
//! ```no_run
//! let scope = isopod_tests::Scope::new();
//! let out = scope.container().args(["sh", "-c", "exit 7"]).run();
//! assert_eq!(out.status, 7, "{out}");
//! ```
//!
//! When the scope ends, it deletes the containers that are left and takes a [`Census`]. A new
//! process, mount, socket, cgroup, directory or descriptor fails the test, so each test is a leak
//! test as well.
//!
//! `ISOPOD_BIN_DIR` names the directory with `isopod` and `isopod-probe`; `cargo xtask test` sets
//! it. `ISOPOD_TEST_RUNTIME` names another OCI runtime for the same tests: runc proves them.
//! `ISOPOD_PROBE` names another place of the probe.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a harness fails its test by a panic"
)]

mod bundle;
mod census;
mod command;
mod container;
mod deadline;
pub mod engine;
mod netns;
pub mod pattern;
mod pod;
mod reader;
mod runtime;
mod scope;
pub mod subreaper;
pub mod terminal;
mod turn;

pub use bundle::{Bundle, PROBE_PATH};
pub use census::Census;
pub use command::{Command, Output, RunningCommand};
pub use container::{Container, Created};
pub use deadline::{DEADLINE, bounded};
pub use netns::Netns;
pub use reader::Reader;
pub use runtime::{Runtime, host_memory_mib, meminfo_kib, runtime};
pub use scope::Scope;

/// Reports a skipped test on standard error, by write(2): the test runner captures the output of
/// passed tests. A skip is for features that this machine or the proving runtime lacks. A feature
/// missing in Isopod is a failure.
pub fn say_skipped(test: &str, why: &str) {
    let line = format!("skipped: {test}: {why}\n");
    let mut rest = line.as_bytes();
    while let Ok(written @ 1..) = nix::unistd::write(std::io::stderr(), rest) {
        rest = &rest[written..];
    }
}

/// Ends the enclosing test as skipped, with a reason: see [`say_skipped`].
#[macro_export]
macro_rules! skip {
    ($($why:tt)+) => {{
        fn here() {}
        let name = std::any::type_name_of_val(&here);
        $crate::say_skipped(name.trim_end_matches("::here"), &format!($($why)+));
        return;
    }};
}

/// Skips a test that only a microVM can pass when another runtime is under test.
#[macro_export]
macro_rules! microvm_only {
    () => {
        if !$crate::runtime().is_isopod() {
            $crate::skip!("only for microVMs, and this is {}", $crate::runtime().path.display());
        }
    };
}
