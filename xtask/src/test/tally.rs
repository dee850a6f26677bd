//! Results of test programs, and their sum.

use std::fmt;

use crate::lab::Ended;

/// Prefix of the line of a case that an earlier run has proven; see `tests/src/engine/suite.rs`.
const REMEMBERED: &str = "test [remembered] ";

/// Numbers of test results, under the names of Rust's test runner.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
    filtered_out: u64,
    /// Number of passed tests that an earlier run has proven.
    remembered: u64,
    /// Programs that ran again because their lab was lost, each with the reason.
    pub(super) losses: Vec<String>,
    /// Failed programs, each with the reason.
    failures: Vec<String>,
    /// Messages of failed tests, one text for each program.
    details: Vec<String>,
}

impl Tally {
    /// Reads the results of the program `name` from its `output`.
    ///
    /// A program without a result line has failed, whatever its exit status.
    pub(super) fn of(name: &str, output: &[u8], ended: &Ended) -> Self {
        let mut tally = Self::default();
        let mut reported = false;
        for line in String::from_utf8_lossy(output).lines() {
            if line.starts_with(REMEMBERED) && line.ends_with(" ok") {
                tally.remembered += 1;
            }
            // Such as `test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; ...`.
            let Some(counts) = line.strip_prefix("test result: ") else { continue };
            reported = true;
            for part in counts.split(['.', ';']) {
                let Some((number, what)) = part.trim().split_once(' ') else { continue };
                let Ok(number) = number.parse::<u64>() else { continue };
                match what {
                    "passed" => tally.passed += number,
                    "failed" => tally.failed += number,
                    "ignored" => tally.ignored += number,
                    "filtered out" => tally.filtered_out += number,
                    _ => {}
                }
            }
        }
        if !matches!(ended, Ended::Status(0)) {
            tally.details.extend(detail(name, &String::from_utf8_lossy(output)));
        }
        match ended {
            Ended::Status(0) if reported => {}
            Ended::Status(0) => tally.failures.push(format!("{name} (it ended without a result)")),
            Ended::Status(status) => tally.failures.push(format!("{name} (exit status {status})")),
            Ended::Refused(why) => tally.failures.push(format!("{name} ({why})")),
        }
        tally
    }

    /// The tally of a program that failed before it reported a result.
    pub(super) fn failure(what: impl Into<String>) -> Self {
        Self { failures: vec![what.into()], ..Self::default() }
    }

    /// Adds a message to show with the failed tests.
    pub(super) fn with_detail(mut self, detail: String) -> Self {
        self.details.push(detail);
        self
    }

    /// Adds the results of another tally.
    pub(super) fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.filtered_out += other.filtered_out;
        self.remembered += other.remembered;
        self.losses.extend_from_slice(&other.losses);
        self.failures.extend_from_slice(&other.failures);
        self.details.extend_from_slice(&other.details);
    }

    /// Messages of failed tests, one text for each program.
    pub(super) fn details(&self) -> &[String] {
        &self.details
    }

    /// Numbers of passed tests, of proven ones among these, and of failed tests.
    pub(super) fn counts(&self) -> (u64, u64, u64) {
        (self.passed, self.remembered, self.failed)
    }

    /// Tells if no test and no program failed.
    pub(super) fn passed_all(&self) -> bool {
        self.failed == 0 && self.failures.is_empty()
    }

    /// Tells if no test was chosen (ignored tests count as chosen) and nothing failed.
    pub(super) fn is_empty(&self) -> bool {
        self.passed_all() && self.passed + self.ignored == 0
    }
}

/// The messages of failed tests, which the runner prints below the list of results.
fn detail(name: &str, output: &str) -> Option<String> {
    let (_, failures) = output.split_once("\nfailures:\n")?;
    let end = failures.rfind("\ntest result: ").unwrap_or(failures.len());
    Some(format!("what failed in {name}:\n{}", failures[..end].trim_end()))
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for failure in &self.failures {
            writeln!(f, "failed: {failure}")?;
        }
        for loss in &self.losses {
            writeln!(f, "ran again in a new lab: {loss}")?;
        }
        if self.remembered > 0 {
            writeln!(
                f,
                "{} of those that passed are cases with runc that an earlier run has proven; \
                 `cargo xtask test --proofs` runs them too",
                self.remembered
            )?;
        }
        let verdict = if self.passed_all() { "ok" } else { "FAILED" };
        let Self { passed, failed, ignored, filtered_out, .. } = self;
        write!(
            f,
            "test result: {verdict}. {passed} passed; {failed} failed; {ignored} ignored; \
             0 measured; {filtered_out} filtered out"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &[u8] = b"running 4 tests\n\
        test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.5s\n\
        test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s\n";

    #[test]
    fn results_of_several_programs_add_up() {
        let tally = Tally::of("x", OUTPUT, &Ended::Status(101));
        assert_eq!((tally.passed, tally.failed, tally.ignored, tally.filtered_out), (4, 2, 1, 2));
        assert_eq!(tally.failures, ["x (exit status 101)"]);
        assert!(tally.to_string().ends_with(
            "test result: FAILED. 4 passed; 2 failed; 1 ignored; 0 measured; 2 filtered out"
        ));
    }

    #[test]
    fn what_a_program_said_of_failed_tests_is_kept() {
        let output =
            b"test a ... FAILED\n\nfailures:\n\n---- a ----\nleft: 1\n\nfailures:\n    a\n\n\
            test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let tally = Tally::of("x", output, &Ended::Status(101));
        let want = "what failed in x:\n\n---- a ----\nleft: 1\n\nfailures:\n    a";
        assert_eq!(tally.details(), [want]);
        assert!(Tally::of("x", OUTPUT, &Ended::Status(0)).details().is_empty());
    }

    #[test]
    fn what_is_remembered_is_among_what_passed() {
        let output = b"test [remembered] runc::exec ... ok\ntest isopod::exec ... ok\n\
            test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let tally = Tally::of("x", output, &Ended::Status(0));
        assert_eq!(tally.counts(), (2, 1, 0));
        let text = tally.to_string();
        assert!(text.starts_with("1 of those that passed"), "{text}");
        assert!(text.ends_with("2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out"));
    }

    #[test]
    fn a_program_without_a_result_fails() {
        assert!(!Tally::of("x", b"", &Ended::Status(139)).passed_all());
        assert!(!Tally::of("x", b"running 3 tests\n", &Ended::Status(0)).passed_all());
        let none = b"test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out\n";
        let none = Tally::of("x", none, &Ended::Status(0));
        assert!(none.passed_all() && none.is_empty());
        assert!(!Tally::failure("x").is_empty());
    }
}
