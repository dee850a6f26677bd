//! Times of the steps between the command and the exit status.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// Times of the steps that were reached: `CLOCK_MONOTONIC` of the host in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// `main` of the command line began.
    pub command: Option<u64>,
    /// `main` of the sandbox process began. The bundle was checked by then.
    pub sandbox: Option<u64>,
    /// The share was built, and the VMM was about to be executed.
    pub shared: Option<u64>,
    /// `main` of the VMM began.
    pub vmm_main: Option<u64>,
    /// The VMM had loaded kernel and image and built the devices, and let the vCPUs go.
    pub vcpus: Option<u64>,
    /// The agent said that it is ready.
    pub ready: Option<u64>,
    /// The agent had built the container.
    pub created: Option<u64>,
    /// The agent had started the container's process.
    pub started: Option<u64>,
    /// The exit of the container's process was known.
    pub exited: Option<u64>,
    /// The VMM had ended.
    pub ended: Option<u64>,
    /// The guest's report on its own boot.
    pub guest: Option<GuestBoot>,
}

/// The guest's own clock and memory, as its agent reported them when it was ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestBoot {
    /// The guest's kernel release.
    pub kernel: String,
    /// Microseconds of guest time from the kernel's start to the agent's.
    pub init_us: u64,
    /// Microseconds of guest time from the kernel's start to readiness.
    pub ready_us: u64,
    /// Guest memory in use, in KiB.
    pub memory_used_kib: u64,
}

impl Timeline {
    /// A table for a person: milliseconds since the command began, and since the step before.
    pub fn table(&self) -> String {
        let steps = [
            ("command", self.command),
            ("sandbox process", self.sandbox),
            ("shared directory built", self.shared),
            ("VMM running", self.vmm_main),
            ("guest running", self.vcpus),
            ("agent ready", self.ready),
            ("container created", self.created),
            ("process started", self.started),
            ("process ended", self.exited),
            ("microVM ended", self.ended),
        ];
        let reached: Vec<_> =
            steps.iter().filter_map(|(name, at)| at.map(|at| (*name, at))).collect();
        let Some(&(_, first)) = reached.first() else { return String::new() };
        let mut table = format!("{:<26}{:>10}{:>10}\n", "step", "at ms", "took ms");
        let mut before = first;
        for (name, at) in reached {
            let (since, took) = (milliseconds(at, first), milliseconds(at, before));
            // Writing to a String cannot fail.
            let _ = writeln!(table, "{name:<26}{since:>10}{took:>10}");
            before = at;
        }
        if let Some(guest) = &self.guest {
            let _ = writeln!(
                table,
                "guest: Linux {}, agent began {} ms and was ready {} ms into the guest's time, {} \
                 KiB in use",
                guest.kernel,
                milliseconds(guest.init_us, 0),
                milliseconds(guest.ready_us, 0),
                guest.memory_used_kib
            );
        }
        table
    }
}

fn milliseconds(at: u64, since: u64) -> String {
    let us = at.saturating_sub(since);
    format!("{}.{}", us / 1000, us % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_the_steps_that_were_reached() {
        let timeline = Timeline {
            command: Some(1_000_000),
            sandbox: Some(1_002_500),
            ready: Some(1_102_400),
            ..Timeline::default()
        };
        let table = timeline.table();
        let lines: Vec<Vec<&str>> =
            table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[2], ["sandbox", "process", "2.5", "2.5"]);
        assert_eq!(lines[3], ["agent", "ready", "102.4", "99.9"]);
        assert_eq!(Timeline::default().table(), "");
    }
}
