//! The report of a run, with a row for each program, and the times that order the next run.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::tally::Tally;
use crate::cache;
use crate::progress::{human, say};

/// Result of a program, or of all unit tests.
#[derive(Debug, Clone)]
pub(super) struct Row {
    /// Name of the program, or `unit tests`.
    pub(super) name: String,
    /// The machine or lab on which it ran.
    pub(super) place: String,
    /// Run time.
    pub(super) took: Duration,
    /// Results.
    pub(super) tally: Tally,
}

impl Row {
    /// Row of a program that was not run to its end.
    pub(super) fn failure(name: &str, why: &str) -> Self {
        Self {
            name: name.to_owned(),
            place: "-".to_owned(),
            took: Duration::ZERO,
            tally: Tally::failure(format!("{name} ({why})")),
        }
    }
}

/// Rows of a run.
#[derive(Debug, Default)]
pub(super) struct Report(pub(super) Vec<Row>);

impl Report {
    /// Sum of all results.
    pub(super) fn total(&self) -> Tally {
        let mut total = Tally::default();
        self.0.iter().for_each(|row| total.add(&row.tally));
        total
    }
}

/// A table of the programs, the longest run time first.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows: Vec<&Row> = self.0.iter().collect();
        rows.sort_by_key(|row| std::cmp::Reverse(row.took));
        let line = |cells: [&str; 6]| {
            let [program, place, time, passed, proven, failed] = cells;
            format!("{program:<18} {place:<12} {time:>12} {passed:>7} {proven:>8} {failed:>7}")
        };
        writeln!(f, "{}", line(["program", "place", "time", "passed", "(proven)", "failed"]))?;
        for row in rows {
            let (passed, proven, failed) = row.tally.counts();
            let [passed, proven, failed] = [passed, proven, failed].map(|n| n.to_string());
            let verdict = if row.tally.passed_all() { "" } else { "  FAILED" };
            let time = human(row.took);
            let cells = [&row.name as &str, &row.place, &time, &passed, &proven, &failed];
            writeln!(f, "{}{verdict}", line(cells))?;
        }
        Ok(())
    }
}

/// Expected run times in seconds, in a lab, for programs without a known time.
///
/// They are programs that drive engines, and programs that boot many microVMs.
const EXPECTED: [(&str, u64); 13] = [
    ("podman", 1200),
    ("docker", 900),
    ("docker_newer", 600),
    ("containerd", 600),
    ("containerd_older", 300),
    ("containerd_newer", 300),
    ("workloads", 500),
    ("network", 200),
    ("churn", 160),
    ("stdio", 140),
    ("virtiofs", 110),
    ("volumes", 110),
    ("cgroup", 100),
];
/// Expected run time in seconds of all other programs.
const USUAL: u64 = 60;

/// Run times of programs in earlier runs, in seconds.
#[derive(Debug, Default)]
pub(super) struct Times(BTreeMap<String, u64>);

impl Times {
    /// Reads the times in the cache. An unreadable file counts as empty: only the order suffers.
    pub(super) fn load() -> Self {
        let text = file().and_then(|file| Ok(fs::read(file)?)).unwrap_or_default();
        Self(serde_json::from_slice(&text).unwrap_or_default())
    }

    /// Expected run time of a program in seconds.
    pub(super) fn expected(&self, program: &str) -> u64 {
        let expected = || EXPECTED.iter().find(|(name, _)| *name == program).map(|(_, s)| *s);
        self.0.get(program).copied().or_else(expected).unwrap_or(USUAL)
    }

    /// Keeps the times of those rows that passed. `whole` must be of programs without a filter.
    pub(super) fn keep<'a>(mut self, whole: impl IntoIterator<Item = &'a Row>) {
        let passed = whole.into_iter().filter(|row| row.tally.passed_all());
        self.0.extend(passed.map(|row| (row.name.clone(), row.took.as_secs())));
        if let Err(error) = self.save() {
            say(format!("the next run does not know the times of this one: {error:#}"));
        }
    }

    fn save(&self) -> Result<()> {
        let file = file()?;
        cache::write(&file, &serde_json::to_vec_pretty(&self.0)?)
    }
}

/// File of the times in the cache.
fn file() -> Result<PathBuf> {
    Ok(cache::root().context("no cache")?.join("test-times.json"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Ended;

    #[test]
    fn the_longest_program_is_first_and_failures_show() {
        let row = |name: &str, seconds, status| Row {
            name: name.to_owned(),
            place: "lab 1".to_owned(),
            took: Duration::from_secs(seconds),
            tally: Tally::of(
                name,
                b"test result: ok. 3 passed; 0 failed\n",
                &Ended::Status(status),
            ),
        };
        let report = Report(vec![row("stdio", 61, 0), row("docker", 125, 101)]);
        let text = report.to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].starts_with("docker ") && lines[1].ends_with("FAILED"), "{text}");
        assert!(lines[2].starts_with("stdio ") && lines[2].contains("1 min 1 s"), "{text}");
        assert!(!report.total().passed_all());
    }

    #[test]
    fn a_known_time_counts_more_than_an_expected_one() {
        let times = Times(BTreeMap::from([("docker".to_owned(), 7)]));
        assert_eq!(times.expected("docker"), 7);
        assert!(times.expected("podman") > times.expected("new"));
    }
}
