//! Resource use of a container, as runc's `events` shows it: the names and units of its
//! `types.Stats`, with cgroup v2 read as runc reads it.
//!
//! The figures are files of the guest's kernel, and come from the guest. A figure that cannot be
//! read is left out or 0. At worst a figure is wrong.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use isopod_protocol::agent::ContainerStats;

use crate::guest_figures::{Device, Files, Interface, MAX_SHOWN, UNLIMITED, devices, interfaces};

/// A line of `events`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Event {
    /// Resource use of a container.
    Stats {
        /// Id of the container.
        id: String,
        /// The figures.
        data: Box<Stats>,
    },
    /// The kernel has killed a process of the container for its memory limit.
    Oom {
        /// Id of the container.
        id: String,
    },
}

/// Resource use of a container, and its limits.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    cpu: Cpu,
    cpuset: Cpuset,
    memory: Memory,
    pids: Pids,
    blkio: Blkio,
    hugetlb: BTreeMap<String, Hugetlb>,
    intel_rdt: IntelRdt,
    /// Interfaces of the container without loopback. `None` if it has no other.
    network_interfaces: Option<Vec<NetworkInterface>>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Cpu {
    usage: CpuUsage,
    throttling: Throttling,
}

/// Processor time in nanoseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct CpuUsage {
    #[serde(skip_serializing_if = "is_zero")]
    total: u64,
    kernel: u64,
    user: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[serde(rename_all = "camelCase")]
struct Throttling {
    #[serde(skip_serializing_if = "is_zero")]
    periods: u64,
    #[serde(skip_serializing_if = "is_zero")]
    throttled_periods: u64,
    /// Time in nanoseconds.
    #[serde(skip_serializing_if = "is_zero")]
    throttled_time: u64,
}

/// Cpusets. Fields that cgroup v2 does not have are 0, as with runc.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Cpuset {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cpus: Vec<u16>,
    cpu_exclusive: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mems: Vec<u16>,
    mem_hardwall: u64,
    mem_exclusive: u64,
    memory_migrate: u64,
    memory_spread_page: u64,
    memory_spread_slab: u64,
    memory_pressure: u64,
    sched_load_balance: u64,
    sched_relax_domain_level: i64,
}

/// Memory in bytes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Memory {
    #[serde(skip_serializing_if = "is_zero")]
    cache: u64,
    usage: MemoryEntry,
    /// Memory and swap together.
    swap: MemoryEntry,
    kernel: MemoryEntry,
    #[serde(rename = "kernelTCP")]
    kernel_tcp: MemoryEntry,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    raw: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct MemoryEntry {
    limit: u64,
    #[serde(skip_serializing_if = "is_zero")]
    usage: u64,
    #[serde(skip_serializing_if = "is_zero")]
    max: u64,
    failcnt: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Pids {
    #[serde(skip_serializing_if = "is_zero")]
    current: u64,
    #[serde(skip_serializing_if = "is_zero")]
    limit: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[serde(rename_all = "camelCase")]
struct Blkio {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_service_bytes_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_serviced_recursive: Vec<BlkioEntry>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct BlkioEntry {
    #[serde(skip_serializing_if = "is_zero")]
    major: u64,
    #[serde(skip_serializing_if = "is_zero")]
    minor: u64,
    op: String,
    #[serde(skip_serializing_if = "is_zero")]
    value: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Hugetlb {
    #[serde(skip_serializing_if = "is_zero")]
    usage: u64,
    #[serde(skip_serializing_if = "is_zero")]
    max: u64,
    failcnt: u64,
}

/// Intel RDT, which does not reach into a microVM.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct IntelRdt {}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[serde(rename_all = "PascalCase")]
struct NetworkInterface {
    name: String,
    rx_bytes: u64,
    rx_packets: u64,
    rx_errors: u64,
    rx_dropped: u64,
    tx_bytes: u64,
    tx_packets: u64,
    tx_errors: u64,
    tx_dropped: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Stats {
    /// The figures that the agent has read, in runc's form.
    pub fn of(read: &ContainerStats) -> Self {
        let files = Files::of(read);
        Self {
            cpu: cpu(&files),
            cpuset: Cpuset {
                cpus: list(files.text("cpuset.cpus.effective")),
                mems: list(files.text("cpuset.mems.effective")),
                ..Cpuset::default()
            },
            memory: memory(&files),
            pids: Pids {
                current: files.number("pids.current"),
                // Without a limit this field is 0.
                limit: Some(files.number("pids.max")).filter(|n| *n != UNLIMITED).unwrap_or(0),
            },
            blkio: blkio(files.text("io.stat")),
            hugetlb: hugetlb(&files),
            intel_rdt: IntelRdt::default(),
            network_interfaces: Some(
                interfaces(&read.network_devices).into_iter().map(Into::into).collect(),
            )
            .filter(|interfaces: &Vec<_>| !interfaces.is_empty()),
        }
    }
}

fn cpu(files: &Files<'_>) -> Cpu {
    let fields = files.fields("cpu.stat");
    let count = |name: &str| fields.get(name).copied().unwrap_or(0);
    let nanoseconds = |name: &str| count(name).saturating_mul(1000);
    Cpu {
        usage: CpuUsage {
            total: nanoseconds("usage_usec"),
            kernel: nanoseconds("system_usec"),
            user: nanoseconds("user_usec"),
        },
        throttling: Throttling {
            periods: count("nr_periods"),
            throttled_periods: count("nr_throttled"),
            throttled_time: nanoseconds("throttled_usec"),
        },
    }
}

fn memory(files: &Files<'_>) -> Memory {
    let raw = files.fields("memory.stat");
    let raw: BTreeMap<String, u64> = raw.into_iter().map(|(k, n)| (k.to_owned(), n)).collect();
    let events = files.fields("memory.events");
    let usage = MemoryEntry {
        limit: files.number("memory.max"),
        usage: files.number("memory.current"),
        max: files.number("memory.peak"),
        failcnt: events.get("max").copied().unwrap_or(0),
    };
    let swap = files.number("memory.swap.max");
    let swap = MemoryEntry {
        limit: if swap == UNLIMITED { swap } else { swap.saturating_add(usage.limit) },
        usage: files.number("memory.swap.current").saturating_add(usage.usage),
        ..MemoryEntry::default()
    };
    let cache = raw.get("file").copied().unwrap_or(0);
    Memory { cache, usage, swap, raw, ..Memory::default() }
}

fn blkio(text: &str) -> Blkio {
    let mut found = Blkio::default();
    for Device { major, minor, rbytes, wbytes, rios, wios } in devices(text) {
        let entry = |op: &str, value| BlkioEntry { major, minor, op: op.to_owned(), value };
        found.io_service_bytes_recursive.extend([entry("Read", rbytes), entry("Write", wbytes)]);
        found.io_serviced_recursive.extend([entry("Read", rios), entry("Write", wios)]);
    }
    found
}

fn hugetlb(files: &Files<'_>) -> BTreeMap<String, Hugetlb> {
    let sizes = files.names().filter_map(|name| {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
        size.bytes().all(|b| b.is_ascii_alphanumeric()).then_some(size)
    });
    sizes
        .take(MAX_SHOWN)
        .map(|size| {
            let events = files.fields(&format!("hugetlb.{size}.events"));
            let usage = files.number(&format!("hugetlb.{size}.current"));
            let failcnt = events.get("max").copied().unwrap_or(0);
            (size.to_owned(), Hugetlb { usage, max: 0, failcnt })
        })
        .collect()
}

impl From<Interface> for NetworkInterface {
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
        }
    }
}

/// Numbers in a list such as `0-3,8`.
fn list(text: &str) -> Vec<u16> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<u16>().ok()?..=last.trim().parse::<u16>().ok()?)
    };
    text.split(',').filter_map(range).flatten().take(MAX_SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn stats(files: &[(&str, &str)], network: &str) -> Value {
        let read = ContainerStats {
            cgroup_files: files.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            network_devices: network.to_owned(),
            ..Default::default()
        };
        serde_json::to_value(Stats::of(&read)).unwrap()
    }

    #[test]
    fn files_become_runcs_figures() {
        let network = "Inter-|   Receive   |  Transmit\n face |bytes    packets errs\n    lo: 1 2 3 4 5 \
                       6 7 8 9 10 11 12 13 14 15 16\n  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n";
        let seen = stats(
            &[
                ("cpu.stat", "usage_usec 30\nuser_usec 10\nsystem_usec 20\nnr_periods 4"),
                ("cpuset.cpus.effective", "0-1,3\n"),
                ("memory.current", "4096"),
                ("memory.max", "8192"),
                ("memory.swap.max", "100"),
                ("memory.swap.current", "1"),
                ("memory.stat", "anon 5\nfile 6"),
                ("memory.events", "low 0\nmax 7\noom 1"),
                ("pids.current", "3"),
                ("pids.max", "max"),
                ("io.stat", "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6"),
                ("hugetlb.2MB.current", "9"),
                ("hugetlb.2MB.events", "max 2"),
            ],
            network,
        );
        assert_eq!(seen["cpu"]["usage"], json!({"total": 30000, "kernel": 20000, "user": 10000}));
        assert_eq!(seen["cpu"]["throttling"], json!({"periods": 4}));
        assert_eq!(seen["cpuset"]["cpus"], json!([0, 1, 3]));
        let usage = json!({"limit": 8192, "usage": 4096, "failcnt": 7});
        assert_eq!(seen["memory"]["usage"], usage);
        assert_eq!(seen["memory"]["swap"], json!({"limit": 8292, "usage": 4097, "failcnt": 0}));
        assert_eq!(
            (&seen["memory"]["cache"], &seen["memory"]["raw"]["anon"]),
            (&json!(6), &json!(5))
        );
        assert_eq!(seen["pids"], json!({"current": 3}));
        assert_eq!(
            seen["blkio"]["ioServicedRecursive"],
            json!([{"major": 254, "op": "Read", "value": 3}, {"major": 254, "op": "Write", "value": 4}])
        );
        assert_eq!(seen["hugetlb"], json!({"2MB": {"usage": 9, "failcnt": 2}}));
        let interfaces = seen["network_interfaces"].as_array().unwrap();
        assert_eq!(interfaces.len(), 1);
        assert_eq!(
            (&interfaces[0]["Name"], &interfaces[0]["TxPackets"]),
            (&json!("eth0"), &json!(10))
        );
    }

    #[test]
    fn a_hostile_guest_gets_nothing_but_wrong_figures() {
        let seen = stats(
            &[
                ("cpu.stat", "usage_usec 18446744073709551615\nuser_usec -1\n\nx"),
                ("cpuset.cpus.effective", "0-65535,0-65535,5-1,-,x"),
                ("memory.max", "max"),
                ("memory.swap.max", "18446744073709551614"),
                ("memory.current", "18446744073709551615"),
                ("io.stat", "::: a=b\n1:2\n1:2 rbytes=x =\n"),
                ("hugetlb.../x.current", "1"),
                ("hugetlb.current", "1"),
            ],
            ":\n:::\neth0:1 2\n\u{1b}[2J: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
        );
        assert_eq!(seen["cpu"]["usage"]["total"], json!(u64::MAX));
        assert_eq!(seen["cpuset"]["cpus"].as_array().unwrap().len(), MAX_SHOWN);
        assert_eq!(seen["memory"]["swap"]["limit"], json!(u64::MAX));
        assert_eq!(seen["hugetlb"], json!({}));
        assert_eq!(stats(&[], "")["network_interfaces"], Value::Null);
    }

    #[test]
    fn events_are_lines_of_json() {
        let oom = Event::Oom { id: "c".into() };
        assert_eq!(serde_json::to_value(oom).unwrap(), json!({"type": "oom", "id": "c"}));
        let event = Event::Stats { id: "c".into(), data: Box::default() };
        let event = serde_json::to_value(event).unwrap();
        assert_eq!((&event["type"], &event["id"]), (&json!("stats"), &json!("c")));
        assert!(event["data"]["memory"].is_object());
    }
}
