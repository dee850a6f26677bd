//! `metrics`: prints figures of running sandboxes in Prometheus's text format.

use std::{fs, path::Path};

use clap::Args;

use crate::{
    call_times::{BOUNDS_US, Service},
    cli::{
        Global,
        all_roots::{self, Found},
        print,
    },
    control::client,
    error::{Error, Result},
    exposition::{Kind, Label, Metric, seconds},
    figures::{Figures, VmmFigures},
    process_id::ProcessId,
    state::Status,
};

#[derive(Debug, Args)]
pub(super) struct Metrics {
    /// Id of a container: print the figures of its sandbox only.
    id: Option<String>,
}

impl Metrics {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let all = all_roots::everywhere(&global.root)?;
        let only = self.id.as_deref().map(|id| all_roots::find(global, id)).transpose()?;
        let mut metrics = Set::new();
        let mut known = false;
        for first in all.iter().filter(|found| found.record.pod.is_none()) {
            let is_asked_for = only.as_ref().is_none_or(|only| {
                only.record.sandbox == first.record.sandbox || only.is_in(first)
            });
            if is_asked_for && first.record.current_status() != Status::Stopped {
                let members = all.iter().filter(|found| found.is_in(first)).count();
                metrics.add(first, members);
                known = true;
            }
        }
        if let (Some(only), false) = (only, known) {
            return Err(Error::new(format!(
                "the sandbox of container {} does not run",
                only.record.id
            )));
        }
        print(&metrics.text())?;
        Ok(0)
    }
}

/// All metrics.
struct Set {
    up: Metric,
    containers: Metric,
    start: Metric,
    vcpus: Metric,
    memory: Metric,
    resident: Metric,
    used_at_boot: Metric,
    process: Metric,
    overhead: Metric,
    exits: Metric,
    requests: Metric,
    bytes: Metric,
    agent_calls: Metric,
    task_calls: Metric,
}

impl Set {
    fn new() -> Self {
        use Kind::{Counter, Gauge, Histogram};
        let metric = Metric::new;
        Self {
            up: metric("isopod_sandbox_up", Gauge, "1 if the sandbox's process and VMM answer."),
            containers: metric(
                "isopod_sandbox_containers",
                Gauge,
                "Containers of the sandbox that have a state directory.",
            ),
            start: metric(
                "isopod_sandbox_start_seconds",
                Gauge,
                "Time that a step of the start took. The first container's own start is one.",
            ),
            vcpus: metric("isopod_guest_vcpus", Gauge, "Processors of the microVM."),
            memory: metric("isopod_guest_memory_bytes", Gauge, "Memory of the microVM."),
            resident: metric(
                "isopod_guest_memory_resident_bytes",
                Gauge,
                "Memory of the microVM that takes memory of the host.",
            ),
            used_at_boot: metric(
                "isopod_guest_memory_used_at_boot_bytes",
                Gauge,
                "Memory that the guest itself reported in use when its agent was ready.",
            ),
            process: metric(
                "isopod_process_memory_pss_bytes",
                Gauge,
                "Proportional share of a process in the host's memory. The VMM's has the guest's.",
            ),
            overhead: metric(
                "isopod_vmm_memory_overhead_bytes",
                Gauge,
                "Resident memory of the VMM without guest memory.",
            ),
            exits: metric(
                "isopod_vm_exits_total",
                Counter,
                "VM exits: user are those to the VMM, kvm those that KVM has counted.",
            ),
            requests: metric(
                "isopod_fs_requests_total",
                Counter,
                "Requests of the guest to shared directories.",
            ),
            bytes: metric(
                "isopod_vsock_bytes_total",
                Counter,
                "Bytes of data in streams between host and guest.",
            ),
            agent_calls: metric(
                "isopod_agent_call_seconds",
                Histogram,
                "Times of calls to the agent in the guest.",
            ),
            task_calls: metric(
                "isopod_task_call_seconds",
                Histogram,
                "Times of containerd's calls to the shim.",
            ),
        }
    }

    /// Adds the figures of the sandbox of this first container.
    fn add(&mut self, first: &Found, members: usize) {
        let record = &first.record;
        let (front_end, namespace) = first.front_end();
        let labels = [
            ("sandbox", record.id.as_str()),
            ("front_end", front_end),
            ("namespace", namespace.unwrap_or_default()),
        ];
        let figures = client::figures(&first.dir).unwrap_or_else(|error| {
            log::warn!("{error}");
            None
        });
        let answers = figures.as_ref().is_some_and(|figures| figures.vmm.is_some());
        self.up.add(&labels, u8::from(answers));
        self.containers.add(&labels, members + 1);
        for span in record.timeline.spans() {
            let labels = with(&labels, &[("part", span.part), ("step", span.step)]);
            self.start.add(&labels, seconds(span.end_us - span.begin_us));
        }
        self.vcpus.add(&labels, record.vm.vcpus);
        self.memory.add(&labels, record.vm.memory_mib << 20);
        if let Some(guest) = &record.timeline.guest {
            self.used_at_boot.add(&labels, guest.memory_used_kib.saturating_mul(1024));
        }
        for (name, process) in [("owner", Some(record.sandbox)), ("vmm", record.vmm)] {
            if let Some(kib) = process.and_then(pss_kib) {
                self.process.add(&with(&labels, &[("process", name)]), kib.saturating_mul(1024));
            }
        }
        let Some(figures) = figures else { return };
        let Figures { calls, vmm } = *figures;
        for call in calls {
            let metric = match call.service {
                Service::Agent => &mut self.agent_calls,
                Service::Task => &mut self.task_calls,
            };
            let labels = with(&labels, &[("method", &call.method)]);
            metric.add_times(&labels, &BOUNDS_US, &call.times.counts, call.times.sum_us);
        }
        if let Some(vmm) = vmm {
            self.add_vmm(&labels, &vmm);
        }
    }

    fn add_vmm(&mut self, labels: &[Label<'_>], vmm: &VmmFigures) {
        self.resident.add(labels, vmm.guest_resident_kib.saturating_mul(1024));
        self.overhead.add(labels, vmm.overhead_kib.saturating_mul(1024));
        for (name, count) in &vmm.exits {
            let (to, kind) = name.split_once(':').unwrap_or(("", name));
            self.exits.add(&with(labels, &[("to", to), ("kind", kind)]), count);
        }
        for (class, count) in &vmm.fs_requests {
            self.requests.add(&with(labels, &[("class", class)]), count);
        }
        for (direction, bytes) in
            [("to_guest", vmm.stream_bytes_to_guest), ("to_host", vmm.stream_bytes_to_host)]
        {
            self.bytes.add(&with(labels, &[("direction", direction)]), bytes);
        }
    }

    fn text(&self) -> String {
        let all = [
            &self.up,
            &self.containers,
            &self.start,
            &self.vcpus,
            &self.memory,
            &self.resident,
            &self.used_at_boot,
            &self.process,
            &self.overhead,
            &self.exits,
            &self.requests,
            &self.bytes,
            &self.agent_calls,
            &self.task_calls,
        ];
        all.iter().map(|metric| metric.text()).collect()
    }
}

fn with<'a>(labels: &[Label<'a>], more: &[Label<'a>]) -> Vec<Label<'a>> {
    [labels, more].concat()
}

/// Proportional share of a process in the host's memory, in KiB. `None` if it has ended.
fn pss_kib(process: ProcessId) -> Option<u64> {
    let path = Path::new("/proc").join(process.pid.to_string()).join("smaps_rollup");
    let text = fs::read_to_string(path).ok()?;
    // After the read, so that the figure is not another process's.
    process.is_alive().then(|| pss_of(&text))?
}

/// The line `Pss:` of smaps_rollup (proc_pid_smaps(5)).
fn pss_of(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.trim().strip_suffix(" kB")?.trim_end().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proportional_share_is_found() {
        let text =
            "00400000-7fff 0 [rollup]\nRss:  900 kB\nPss:          123 kB\nPss_Dirty: 4 kB\n";
        assert_eq!(pss_of(text), Some(123));
        assert_eq!(pss_of("Rss: 1 kB\n"), None);
        let own = ProcessId::own().unwrap();
        assert!(pss_kib(own).unwrap() > 0);
        assert_eq!(pss_kib(ProcessId { start_time: own.start_time + 1, ..own }), None);
    }
}
