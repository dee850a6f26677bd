//! `linux.resources` as cgroup v2 interface files.
//!
//! The specification still describes cgroup v1. Shares become weights, and memory plus swap becomes
//! swap alone, by the formulas common to runtimes. A field without a counterpart is refused by
//! name.

use super::cgroup::Cgroup;
use super::devices;
use crate::error::{Error, Result};
use crate::log::log_warn;
use crate::oci::{BlockIo, Cpu, HugepageLimit, Memory, Resources, ThrottleDevice};

/// An interface file and the value to write.
pub(super) type Setting = (String, String);

/// Refuses limits that cgroup v2 cannot express, by their field.
pub(crate) fn check(resources: &Resources) -> Result<()> {
    settings(resources)?;
    devices::check(&resources.devices)?;
    for name in resources.unified.keys() {
        let plain = name.contains('.') && !name.starts_with("cgroup.");
        if !plain || name.contains('/') || name.contains('\0') {
            let field = format!("linux.resources.unified[{name:?}]");
            return Err(Error::invalid(field, "not the interface file of a controller"));
        }
    }
    let network = &resources.network;
    if network.class_id.is_some_and(|id| id != 0) || !network.priorities.is_empty() {
        return Err(Error::invalid("linux.resources.network", "cgroup v2 cannot limit networks"));
    }
    if !resources.rdma.is_empty() {
        return Err(Error::invalid("linux.resources.rdma", "a sandbox has no RDMA devices"));
    }
    Ok(())
}

/// Applies all limits but the device rules to a group without processes.
pub(crate) fn apply(cgroup: &Cgroup, resources: &Resources) -> Result<()> {
    for (file, value) in all_settings(cgroup, resources)? {
        write(cgroup, &file, &value)?;
    }
    Ok(())
}

/// All settings of a group, in the order of writing.
pub(super) fn all_settings(cgroup: &Cgroup, resources: &Resources) -> Result<Vec<Setting>> {
    let mut all = settings(resources)?;
    // A guest kernel without swap has no swap limit, and needs none.
    all.retain(|(file, _)| file != "memory.swap.max" || cgroup.has(file));
    all.extend(resources.block_io.weight.and_then(|weight| io_weight(cgroup, weight)));
    all.extend(resources.unified.clone());
    Ok(all)
}

/// Writes a limit. A file that the kernel lacks is an error of the specification.
pub(super) fn write(cgroup: &Cgroup, file: &str, value: &str) -> Result<()> {
    if !cgroup.has(file) {
        return Err(Error::invalid(
            "linux.resources",
            format!("this guest kernel has no {file}, which is needed for the value {value:?}"),
        ));
    }
    cgroup.write(file, value)
}

/// The setting of a block I/O weight. The range is 1 to 1000 for BFQ, and 1 to 10000 for io.cost.
fn io_weight(cgroup: &Cgroup, weight: u16) -> Option<Setting> {
    if weight == 0 {
        return None;
    }
    if cgroup.has("io.bfq.weight") {
        return Some(("io.bfq.weight".into(), weight.to_string()));
    }
    let weight = 1 + (u64::from(weight).max(10) - 10) * 9999 / 990;
    Some(("io.weight".into(), weight.to_string()))
}

fn settings(resources: &Resources) -> Result<Vec<Setting>> {
    let mut settings = Vec::new();
    cpu_settings(&resources.cpu, &mut settings)?;
    memory_settings(&resources.memory, &mut settings)?;
    if let Some(pids) = resources.pids.as_ref().filter(|pids| pids.limit != 0) {
        settings.push(("pids.max".into(), limit(pids.limit)));
    }
    for page in &resources.hugepage_limits {
        hugepage_settings(page, &mut settings)?;
    }
    io_settings(&resources.block_io, &mut settings)?;
    Ok(settings)
}

fn cpu_settings(cpu: &Cpu, settings: &mut Vec<Setting>) -> Result<()> {
    if cpu.realtime_runtime.is_some_and(|n| n != 0) || cpu.realtime_period.is_some_and(|n| n != 0) {
        let field = "linux.resources.cpu.realtimeRuntime";
        return Err(Error::invalid(field, "cgroup v2 has no real-time limits"));
    }
    if let Some(idle) = cpu.idle {
        settings.push(("cpu.idle".into(), idle.to_string()));
    }
    if let Some(shares) = cpu.shares
        && shares != 0
    {
        settings.push(("cpu.weight".into(), cpu_weight(shares).to_string()));
    }
    let quota = cpu.quota.filter(|quota| *quota != 0);
    let period = cpu.period.filter(|period| *period != 0);
    // The kernel refuses a quota below the current burst.
    let burst = |us: u64| ("cpu.max.burst".into(), us.to_string());
    settings.extend(cpu.burst.map(|_| burst(0)));
    if quota.is_some() || period.is_some() {
        let quota = quota.map_or_else(|| "max".into(), limit);
        // 100 ms is the kernel's default period.
        settings.push(("cpu.max".into(), format!("{quota} {}", period.unwrap_or(100_000))));
    }
    settings.extend(cpu.burst.filter(|us| *us != 0).map(burst));
    for (file, set) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
        if !set.is_empty() {
            settings.push((file.into(), set.clone()));
        }
    }
    Ok(())
}

/// Converts shares, 2 to 262144, to a weight, 1 to 10000.
fn cpu_weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn memory_settings(memory: &Memory, settings: &mut Vec<Setting>) -> Result<()> {
    if memory.disable_oom_killer {
        let field = "linux.resources.memory.disableOOMKiller";
        return Err(Error::invalid(field, "cgroup v2 cannot disable the OOM killer"));
    }
    for (field, value) in [("kernel", memory.kernel), ("kernelTCP", memory.kernel_tcp)] {
        if value.is_some_and(|n| n > 0) {
            log_warn!("linux.resources.memory.{field} has no effect: it is part of limit");
        }
    }
    if let Some(swap) = swap_limit(memory.limit.unwrap_or(0), memory.swap.unwrap_or(0))? {
        settings.push(("memory.swap.max".into(), swap));
    }
    for (file, value) in [("memory.max", memory.limit), ("memory.low", memory.reservation)] {
        if let Some(value) = value.filter(|value| *value != 0) {
            settings.push((file.into(), limit(value)));
        }
    }
    Ok(())
}

/// Converts the specification's limit on memory plus swap to cgroup v2's limit on swap alone.
fn swap_limit(memory: i64, memory_and_swap: i64) -> Result<Option<String>> {
    match (memory, memory_and_swap) {
        // Unlimited memory without a value for the sum means an unlimited sum.
        (-1, 0) => Ok(Some("max".into())),
        (_, 0) => Ok(None),
        (_, -1) => Ok(Some("max".into())),
        (memory, _) if memory <= 0 => Err(Error::invalid(
            "linux.resources.memory.swap",
            "a limit on memory plus swap needs linux.resources.memory.limit",
        )),
        (memory, sum) if sum < memory => Err(Error::invalid(
            "linux.resources.memory.swap",
            format!("{sum} is memory plus swap and cannot be less than the limit {memory}"),
        )),
        (memory, sum) => Ok(Some((sum - memory).to_string())),
    }
}

fn hugepage_settings(page: &HugepageLimit, settings: &mut Vec<Setting>) -> Result<()> {
    let size = &page.page_size;
    if size.is_empty() || !size.bytes().all(|b| b.is_ascii_alphanumeric()) {
        let field = "linux.resources.hugepageLimits.pageSize";
        return Err(Error::invalid(field, format!("{size:?} is not a page size such as 2MB")));
    }
    settings.push((format!("hugetlb.{size}.max"), limit(page.limit)));
    // Without this limit a mapping could reserve more pages than it may ever use.
    settings.push((format!("hugetlb.{size}.rsvd.max"), limit(page.limit)));
    Ok(())
}

fn io_settings(io: &BlockIo, settings: &mut Vec<Setting>) -> Result<()> {
    if io.leaf_weight.is_some_and(|weight| weight != 0) {
        return Err(Error::invalid("linux.resources.blockIO.leafWeight", "not in cgroup v2"));
    }
    for device in &io.weight_device {
        let name = format!("{}:{}", device.major, device.minor);
        if device.leaf_weight.is_some_and(|weight| weight != 0) {
            let field = format!("linux.resources.blockIO.weightDevice[{name}].leafWeight");
            return Err(Error::invalid(field, "not in cgroup v2"));
        }
        if let Some(weight) = device.weight.filter(|weight| *weight != 0) {
            settings.push(("io.bfq.weight".into(), format!("{name} {weight}")));
        }
    }
    let throttles: [(&str, &Vec<ThrottleDevice>); 4] = [
        ("rbps", &io.throttle_read_bps_device),
        ("wbps", &io.throttle_write_bps_device),
        ("riops", &io.throttle_read_iops_device),
        ("wiops", &io.throttle_write_iops_device),
    ];
    for (key, devices) in throttles {
        for device in devices {
            let (major, minor, rate) = (device.major, device.minor, device.rate);
            settings.push(("io.max".into(), format!("{major}:{minor} {key}={rate}")));
        }
    }
    Ok(())
}

/// The value of a limit file. Negative numbers mean no limit.
fn limit(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Vec<Setting>> {
        let resources: Resources = serde_json::from_str(json).unwrap();
        check(&resources)?;
        settings(&resources)
    }

    fn pairs(settings: &[Setting]) -> Vec<(&str, &str)> {
        settings.iter().map(|(file, value)| (file.as_str(), value.as_str())).collect()
    }

    #[test]
    fn shares_become_weights() {
        assert_eq!(cpu_weight(2), 1);
        assert_eq!(cpu_weight(1024), 39);
        assert_eq!(cpu_weight(262_144), 10_000);
        assert_eq!(cpu_weight(u64::MAX), 10_000);
    }

    #[test]
    fn swap_is_the_difference() {
        assert_eq!(swap_limit(100, 150).unwrap().as_deref(), Some("50"));
        assert_eq!(swap_limit(100, 100).unwrap().as_deref(), Some("0"));
        assert_eq!(swap_limit(100, -1).unwrap().as_deref(), Some("max"));
        assert_eq!(swap_limit(-1, 0).unwrap().as_deref(), Some("max"));
        assert_eq!(swap_limit(100, 0).unwrap(), None);
        assert!(swap_limit(100, 99).unwrap_err().message.contains("memory.swap"));
        assert!(swap_limit(0, 99).is_err());
    }

    #[test]
    fn limits_become_files() {
        let settings = of(r#"{"cpu": {"quota": 50000, "shares": 1024, "cpus": "0-1"},
            "memory": {"limit": 1048576, "reservation": -1}, "pids": {"limit": 10},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 5}]}"#);
        assert_eq!(
            pairs(&settings.unwrap()),
            [
                ("cpu.weight", "39"),
                ("cpu.max", "50000 100000"),
                ("cpuset.cpus", "0-1"),
                ("memory.max", "1048576"),
                ("memory.low", "max"),
                ("pids.max", "10"),
                ("hugetlb.2MB.max", "5"),
                ("hugetlb.2MB.rsvd.max", "5"),
            ]
        );
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        for (json, name) in [
            (r#"{"cpu": {"realtimeRuntime": 1}}"#, "cpu.realtimeRuntime"),
            (r#"{"memory": {"disableOOMKiller": true}}"#, "memory.disableOOMKiller"),
            (r#"{"network": {"classID": 1}}"#, "resources.network"),
            (r#"{"rdma": {"mlx5_0": {"hcaHandles": 1}}}"#, "resources.rdma"),
            (r#"{"unified": {"../memory.max": "1"}}"#, "unified"),
            (r#"{"unified": {"cgroup.procs": "1"}}"#, "unified"),
            (r#"{"blockIO": {"leafWeight": 1}}"#, "blockIO.leafWeight"),
            (r#"{"hugepageLimits": [{"pageSize": "../x", "limit": 1}]}"#, "hugepageLimits"),
        ] {
            let e = of(json).unwrap_err();
            assert!(e.message.contains(name), "{json}: {e}");
            assert_eq!(e.code, crate::error::Code::InvalidArgument);
        }
    }
}
