//! Resource use of a task, as containerd's metrics of cgroup v2. The figures are files of the
//! guest's kernel, and come from the guest: at worst they are wrong.

use containerd_shim_protos::{
    cgroups_v2::metrics::{
        CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PSIData,
        PSIStats, PidsStat,
    },
    protobuf::MessageField,
};
use isopod_protocol::agent::ContainerStats;

use crate::guest_figures::{Device, Files, Interface, UNLIMITED, devices, interfaces};

/// The metrics of what the agent has read. CPU, memory and pids are always there.
pub(super) fn metrics(read: &ContainerStats) -> Metrics {
    let files = Files::of(read);
    Metrics {
        pids: Some(PidsStat {
            current: files.number("pids.current"),
            // Without a limit this field is 0, as from runc's shim.
            limit: Some(files.number("pids.max")).filter(|n| *n != UNLIMITED).unwrap_or(0),
            ..PidsStat::default()
        })
        .into(),
        cpu: Some(cpu(&files)).into(),
        memory: Some(memory(&files)).into(),
        io: Some(IOStat {
            usage: devices(files.text("io.stat")).into_iter().map(Into::into).collect(),
            psi: pressure(files.text("io.pressure")),
            ..IOStat::default()
        })
        .into(),
        memory_events: Some(memory_events(&files)).into(),
        network: interfaces(&read.network_devices).into_iter().map(Into::into).collect(),
        ..Metrics::default()
    }
}

fn cpu(files: &Files<'_>) -> CPUStat {
    let fields = files.fields("cpu.stat");
    let count = |name: &str| fields.get(name).copied().unwrap_or(0);
    CPUStat {
        usage_usec: count("usage_usec"),
        user_usec: count("user_usec"),
        system_usec: count("system_usec"),
        nr_periods: count("nr_periods"),
        nr_throttled: count("nr_throttled"),
        throttled_usec: count("throttled_usec"),
        nr_bursts: count("nr_bursts"),
        burst_usec: count("burst_usec"),
        psi: pressure(files.text("cpu.pressure")),
        ..CPUStat::default()
    }
}

fn memory(files: &Files<'_>) -> MemoryStat {
    let fields = files.fields("memory.stat");
    let count = |name: &str| fields.get(name).copied().unwrap_or(0);
    MemoryStat {
        anon: count("anon"),
        file: count("file"),
        kernel_stack: count("kernel_stack"),
        slab: count("slab"),
        sock: count("sock"),
        shmem: count("shmem"),
        file_mapped: count("file_mapped"),
        file_dirty: count("file_dirty"),
        file_writeback: count("file_writeback"),
        anon_thp: count("anon_thp"),
        inactive_anon: count("inactive_anon"),
        active_anon: count("active_anon"),
        inactive_file: count("inactive_file"),
        active_file: count("active_file"),
        unevictable: count("unevictable"),
        slab_reclaimable: count("slab_reclaimable"),
        slab_unreclaimable: count("slab_unreclaimable"),
        pgfault: count("pgfault"),
        pgmajfault: count("pgmajfault"),
        // Split since Linux 5.9.
        workingset_refault: count("workingset_refault_anon")
            .saturating_add(count("workingset_refault_file")),
        workingset_activate: count("workingset_activate_anon")
            .saturating_add(count("workingset_activate_file")),
        workingset_nodereclaim: count("workingset_nodereclaim"),
        pgrefill: count("pgrefill"),
        pgscan: count("pgscan"),
        pgsteal: count("pgsteal"),
        pgactivate: count("pgactivate"),
        pgdeactivate: count("pgdeactivate"),
        pglazyfree: count("pglazyfree"),
        pglazyfreed: count("pglazyfreed"),
        thp_fault_alloc: count("thp_fault_alloc"),
        thp_collapse_alloc: count("thp_collapse_alloc"),
        usage: files.number("memory.current"),
        usage_limit: files.number("memory.max"),
        swap_usage: files.number("memory.swap.current"),
        swap_limit: files.number("memory.swap.max"),
        max_usage: files.number("memory.peak"),
        swap_max_usage: files.number("memory.swap.peak"),
        psi: pressure(files.text("memory.pressure")),
        ..MemoryStat::default()
    }
}

fn memory_events(files: &Files<'_>) -> MemoryEvents {
    let fields = files.fields("memory.events");
    let count = |name: &str| fields.get(name).copied().unwrap_or(0);
    MemoryEvents {
        low: count("low"),
        high: count("high"),
        max: count("max"),
        oom: count("oom"),
        oom_kill: count("oom_kill"),
        oom_group_kill: count("oom_group_kill"),
        ..MemoryEvents::default()
    }
}

impl From<Device> for IOEntry {
    fn from(device: Device) -> Self {
        let Device { major, minor, rbytes, wbytes, rios, wios } = device;
        Self { major, minor, rbytes, wbytes, rios, wios, ..Self::default() }
    }
}

/// Parses lines such as `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` (accounting/psi.rst).
fn pressure(text: &str) -> MessageField<PSIStats> {
    let data = |kind: &str| {
        let line = text.lines().find(|line| line.split(' ').next() == Some(kind))?;
        let mut data = PSIData::default();
        for (key, value) in line.split_ascii_whitespace().filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                "total" => data.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        Some(data)
    };
    let (some, full) = (data("some"), data("full"));
    let known = some.is_some() || full.is_some();
    let stats = PSIStats { some: some.into(), full: full.into(), ..PSIStats::default() };
    known.then_some(stats).into()
}

impl From<Interface> for NetworkStat {
    fn from(interface: Interface) -> Self {
        let [rx_bytes, rx_packets, rx_errors, rx_dropped] = interface.received;
        let [tx_bytes, tx_packets, tx_errors, tx_dropped] = interface.sent;
        Self {
            name: interface.name,
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_memory_and_pids_are_always_there() {
        let none = metrics(&ContainerStats::default());
        assert!(none.cpu.is_some() && none.memory.is_some() && none.pids.is_some());
        let file = |name: &str, text: &str| (name.to_owned(), text.to_owned());
        let files = [
            file("memory.current", "4096"),
            file("memory.max", "max"),
            file("pids.max", "max"),
            file("cpu.stat", "usage_usec 30\nuser_usec x"),
            file("cpu.pressure", "some avg10=1.50 avg60=0.00 avg300=0.00 total=7\nfull\n"),
        ];
        let read = ContainerStats { cgroup_files: files.into(), ..Default::default() };
        let metrics = metrics(&read);
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (4096, UNLIMITED));
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.user_usec), (30, 0));
        assert_eq!((metrics.cpu.psi.some.avg10, metrics.cpu.psi.some.total), (1.5, 7));
        assert_eq!(metrics.pids.limit, 0);
        assert!(metrics.memory.psi.is_none());
    }
}
