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

/// A step of the start, from one time to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The part of the sandbox that was at work.
    pub part: &'static str,
    /// Name of the step.
    pub step: &'static str,
    /// Begin of the step: `CLOCK_MONOTONIC` of the host in microseconds.
    pub begin_us: u64,
    /// End of the step, in the same clock. Never before the begin.
    pub end_us: u64,
}

impl Timeline {
    /// The steps up to the start of the container's process, one after the other. Steps that were
    /// not reached are left out, and so are those of the microVM if it was there before.
    pub fn spans(&self) -> Vec<Span> {
        let steps = [
            ("host", "command", self.sandbox),
            ("host", "share, network", self.shared),
            ("host", "start of the VMM", self.vmm_main),
            ("VMM", "memory, devices", self.vcpus),
            ("kernel", "boot", self.agent_began()),
            ("agent", "start", self.ready),
            ("container", "creation", self.created),
            ("container", "until started", self.started),
        ];
        let Some(mut begin_us) = self.command else { return Vec::new() };
        let reached = steps.iter().filter_map(|(part, step, at)| at.map(|at| (part, step, at)));
        reached
            .map(|(part, step, at)| {
                let span = Span { part, step, begin_us, end_us: at.max(begin_us) };
                begin_us = span.end_us;
                span
            })
            .collect()
    }

    /// The agent's start by the host's clock. The guest reports the time that its agent has taken,
    /// and may report anything: so it is kept between the start of the vCPUs and the hello.
    fn agent_began(&self) -> Option<u64> {
        let (guest, ready, vcpus) = (self.guest.as_ref()?, self.ready?, self.vcpus?);
        let took = guest.ready_us.saturating_sub(guest.init_us);
        Some(ready.saturating_sub(took).clamp(vcpus.min(ready), ready))
    }

    /// The guest's report in words for a person.
    pub fn guest_line(&self) -> Option<String> {
        self.guest.as_ref().map(|guest| {
            format!(
                "guest: Linux {}, agent began {} ms and was ready {} ms into the guest's time, {} \
                 KiB in use",
                guest.kernel,
                milliseconds(guest.init_us, 0),
                milliseconds(guest.ready_us, 0),
                guest.memory_used_kib
            )
        })
    }

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
        if let Some(guest) = self.guest_line() {
            let _ = writeln!(table, "{guest}");
        }
        table
    }
}

/// The time from `since` to `at` in milliseconds, with one decimal place.
pub(crate) fn milliseconds(at: u64, since: u64) -> String {
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

    #[test]
    fn the_guests_clock_moves_no_step_of_the_host() {
        let guest = |init_us, ready_us| {
            Some(GuestBoot { kernel: "6".into(), init_us, ready_us, memory_used_kib: 1 })
        };
        let timeline = Timeline {
            command: Some(100),
            shared: Some(200),
            vmm_main: Some(300),
            vcpus: Some(400),
            ready: Some(900),
            guest: guest(1_000, 1_200),
            ..Timeline::default()
        };
        let ends = |timeline: &Timeline| -> Vec<(&str, u64)> {
            timeline.spans().iter().map(|span| (span.part, span.end_us)).collect()
        };
        let host = [("host", 200), ("host", 300), ("VMM", 400)];
        assert_eq!(ends(&timeline), [&host[..], &[("kernel", 700), ("agent", 900)]].concat());
        for (told, began) in [((0, u64::MAX), 400), ((u64::MAX, 0), 900)] {
            let timeline = Timeline { guest: guest(told.0, told.1), ..timeline.clone() };
            assert_eq!(ends(&timeline)[3], ("kernel", began));
        }
        // A container of a pod that has its microVM already.
        let member = Timeline { vmm_main: None, vcpus: None, ready: None, guest: None, ..timeline };
        assert_eq!(ends(&Timeline { created: Some(950), ..member })[1], ("container", 950));
        assert_eq!(Timeline::default().spans(), []);
    }
}
