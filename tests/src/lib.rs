//! The harness of the end-to-end tests.
//!
//! Every test drives the built binaries as a user or a container engine would. A test makes a
//! [`Scope`], gets containers from it, and asserts on what the commands print and return:
//!
//! ```no_run
//! let scope = isopod_tests::Scope::new();
//! let out = scope.container().args(["sh", "-c", "exit 7"]).run();
//! assert_eq!(out.status, 7, "{out}");
//! ```
//!
//! When the scope ends it deletes what is left and then takes a [`Census`]: a process, mount, socket,
//! cgroup, directory or descriptor that was not there before fails the test. So each test is a leak
//! test as well.
//!
//! `ISOPOD_BIN_DIR` names the directory with `isopod` and `isopod-probe`; `cargo xtask test` sets it.
//! `ISOPOD_TEST_RUNTIME` names another OCI runtime to run the same tests against (to prove the tests
//! with runc), and `ISOPOD_PROBE` another place of the probe.
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
pub mod engine;
pub mod keeper;
mod netns;
pub mod pattern;
mod pod;
mod reader;
mod runtime;
mod scope;
pub mod terminal;
mod turn;

pub use bundle::{Bundle, PROBE_PATH};
pub use census::Census;
pub use command::{Command, DEADLINE, Job, Output};
pub use container::{Container, Created};
pub use netns::Netns;
pub use reader::Reader;
pub use runtime::{Runtime, host_memory_mib, meminfo_kib, runtime};
pub use scope::Scope;

/// Whether something comes to hold within [`DEADLINE`]: asked again and again, for what nothing tells of, such as
/// the moment at which a guest has let go of a file.
pub fn bounded(mut holds: impl FnMut() -> bool) -> bool {
    let until = std::time::Instant::now() + DEADLINE;
    while std::time::Instant::now() < until {
        if holds() {
            return true;
        }
    }
    false
}

/// Says on standard error itself that a test was skipped: the test runner keeps back what a test that
/// passes has printed. For what this machine cannot have, or a runtime that the tests are proved with
/// cannot do; what Isopod lacks is a failure.
pub fn say_skipped(test: &str, why: &str) {
    let line = format!("skipped: {test}: {why}\n");
    let mut rest = line.as_bytes();
    while let Ok(written @ 1..) = nix::unistd::write(std::io::stderr(), rest) {
        rest = &rest[written..];
    }
}

/// Ends the test that it stands in, saying which one and why: see [`say_skipped`].
#[macro_export]
macro_rules! skip {
    ($($why:tt)+) => {{
        fn here() {}
        let name = std::any::type_name_of_val(&here);
        $crate::say_skipped(name.trim_end_matches("::here"), &format!($($why)+));
        return;
    }};
}

/// Ends a test that only a microVM can pass when another runtime is under test, saying so.
#[macro_export]
macro_rules! microvm_only {
    () => {
        if !$crate::runtime().is_isopod() {
            $crate::skip!("only for microVMs, and this is {}", $crate::runtime().path.display());
        }
    };
}
