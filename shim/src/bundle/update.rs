//! Updates of the limits of a running container.

use oci_spec::runtime::{Linux, LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};
use serde_json::{Map, Value};

use crate::{
    bundle::{
        oci_spec_quirks, refused_fields, resources, unknown_fields,
        vm_size::{
            DEFAULT_PERIOD_US, MEMORY_ANNOTATION, VmSize, memory_limit, unified, with_overhead,
        },
    },
    cpu_list::cpu_list_len,
    error::{Error, Explain, Result},
};

/// Reads the OCI `linux.resources` object of an update. Errors call it `name`, and name the field
/// that is malformed or not supported.
pub fn parse_resources(name: &str, json: &[u8]) -> Result<LinuxResources> {
    // Parsed as an object first, because the types would accept a list as an object without fields.
    let raw: Map<String, Value> = serde_json::from_slice(json).explain(|| name.to_owned())?;
    let mut raw = Value::Object(raw);
    oci_spec_quirks::correct_resources(&mut raw);
    let resources: LinuxResources =
        serde_json::from_value(raw.clone()).explain(|| name.to_owned())?;
    refused_fields::refuse_resources(name, &raw)?;
    let kept = serde_json::to_value(&resources).explain(|| name.to_owned())?;
    unknown_fields::warn(name, &raw, &kept);
    Ok(resources)
}

/// The limits that hold after an update of `before`. A limit that the update leaves out, or gives
/// as 0 or empty, stays. Rules for devices stay too, as with runc.
///
/// Limits that make no sense together, or that the microVM cannot hold, are an error.
pub fn update_resources(
    before: &LinuxResources,
    update: &LinuxResources,
    vm: VmSize,
) -> Result<LinuxResources> {
    let mut after = before.clone();
    if let Some(memory) = update.memory() {
        after.set_memory(Some(merge_memory(before.memory().unwrap_or_default(), memory)));
    }
    if let Some(cpu) = update.cpu() {
        after.set_cpu(Some(merge_cpu(before.cpu().clone().unwrap_or_default(), cpu)));
    }
    if let Some(pids) = update.pids().filter(|pids| pids.limit() != 0) {
        after.set_pids(Some(pids));
    }
    // All other fields of blockIO are about devices of the host.
    if let Some(weight) = update.block_io().as_ref().and_then(LinuxBlockIo::weight)
        && weight != 0
    {
        after.block_io_mut().get_or_insert_default().set_weight(Some(weight));
    }
    if let Some(pages) = update.hugepage_limits().as_ref().filter(|pages| !pages.is_empty()) {
        let new = |size: &str| pages.iter().any(|page| page.page_size() == size);
        let mut all = before.hugepage_limits().clone().unwrap_or_default();
        all.retain(|page| !new(page.page_size()));
        all.extend(pages.iter().cloned());
        after.set_hugepage_limits(Some(all));
    }
    if let Some(unified) = update.unified().as_ref().filter(|unified| !unified.is_empty()) {
        after.unified_mut().get_or_insert_default().extend(unified.clone());
    }
    // A limit of before may be larger: the microVM was made for an annotation then.
    if memory_limit(&after) != memory_limit(before) {
        check_fits(&after, vm)?;
    }
    let mut linux = Linux::default();
    linux.set_sysctl(None).set_resources(Some(after.clone()));
    resources::check(&linux)?;
    Ok(after)
}

/// Limits that the microVM cannot give, each in a sentence: it has fewer processors than the
/// container may use.
pub fn beyond_vm(resources: &LinuxResources, vm: VmSize) -> Vec<String> {
    let vcpus = u64::from(vm.vcpus);
    let mut found = Vec::new();
    let cpu = resources.cpu().as_ref();
    // A file of `unified` is written last. "max" is no quota.
    let (quota, period) = match unified(resources, "cpu.max") {
        Some(max) => {
            let mut words = max.split_whitespace().map(|word| word.parse().ok());
            (words.next().flatten(), words.next().flatten())
        }
        None => {
            let quota = cpu.and_then(|cpu| cpu.quota());
            (quota.and_then(|quota| u64::try_from(quota).ok()), cpu.and_then(|cpu| cpu.period()))
        }
    };
    let quota = quota.unwrap_or(0);
    let period = period.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD_US);
    if quota > period.saturating_mul(vcpus) {
        found.push(format!(
            "a CPU quota of {quota} in {period} us is more than the {vcpus} processors that the \
             microVM has"
        ));
    }
    let cpus = cpu.and_then(|cpu| cpu.cpus().as_deref());
    if let Some(list) = unified(resources, "cpuset.cpus").or(cpus).filter(|list| !list.is_empty())
        && cpu_list_len(list).is_some_and(|length| length > vcpus)
    {
        found.push(format!(
            "the list {list:?} names more processors than the {vcpus} that the microVM has"
        ));
    }
    found
}

/// Checks that a microVM of this size has the memory that the container may use. The microVM cannot
/// grow, so the error says what to do.
pub fn check_fits(resources: &LinuxResources, vm: VmSize) -> Result<()> {
    let limit_mib = memory_limit(resources).unwrap_or(0).div_ceil(1 << 20);
    let largest_mib = vm.largest_limit_mib();
    if limit_mib <= largest_mib {
        return Ok(());
    }
    Err(Error::new(format!(
        "a memory limit of {limit_mib} MiB is more than the container's microVM can hold: it has {} \
         MiB, enough for a limit of {largest_mib} MiB, and cannot grow; create the container (the \
         first one of a pod) with the annotation {} set to {} or more",
        vm.memory_mib,
        MEMORY_ANNOTATION,
        with_overhead(limit_mib),
    )))
}

fn merge_memory(before: LinuxMemory, update: &LinuxMemory) -> LinuxMemory {
    let given = |value: Option<i64>| value.filter(|value| *value != 0);
    let mut after = before;
    if let Some(limit) = given(update.limit()) {
        after.set_limit(Some(limit));
        // A memory limit of -1 lifts the swap limit too, unless the update has one.
        if limit == -1 && given(update.swap()).is_none() {
            after.set_swap(Some(-1));
        }
    }
    if let Some(swap) = given(update.swap()) {
        after.set_swap(Some(swap));
    }
    if let Some(reservation) = given(update.reservation()) {
        after.set_reservation(Some(reservation));
    }
    // This field holds for one update.
    after.set_check_before_update(update.check_before_update());
    after
}

fn merge_cpu(before: LinuxCpu, update: &LinuxCpu) -> LinuxCpu {
    let mut after = before;
    if let Some(shares) = update.shares().filter(|shares| *shares != 0) {
        after.set_shares(Some(shares));
    }
    if let Some(quota) = update.quota().filter(|quota| *quota != 0) {
        after.set_quota(Some(quota));
        // Without a quota there is nothing for a burst to exceed.
        if quota < 0 && after.burst().is_some() {
            after.set_burst(Some(0));
        }
    }
    if let Some(period) = update.period().filter(|period| *period != 0) {
        after.set_period(Some(period));
    }
    if let Some(burst) = update.burst() {
        after.set_burst(Some(burst));
    }
    if let Some(idle) = update.idle() {
        after.set_idle(Some(idle));
        // An idle cgroup gets only the time that is left over, so it has no shares.
        if idle == 1 && update.shares().is_none_or(|shares| shares == 0) {
            after.set_shares(None);
        }
    }
    if let Some(cpus) = update.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
        after.set_cpus(Some(cpus.clone()));
    }
    after
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmSize = VmSize { vcpus: 2, memory_mib: 256 };

    fn resources(json: &str) -> LinuxResources {
        parse_resources("resources", json.as_bytes()).unwrap()
    }

    fn updated(before: &str, update: &str) -> Result<LinuxResources> {
        update_resources(&resources(before), &resources(update), VM)
    }

    #[test]
    fn what_is_not_given_stays() {
        let before = r#"{"memory": {"limit": 100, "swap": 300}, "pids": {"limit": 7},
            "cpu": {"quota": 5, "period": 10, "cpus": "0-1"}}"#;
        for neutral in [
            "{}",
            r#"{"memory": {"limit": 0}, "cpu": {"shares": 0, "cpus": ""}, "pids": {"limit": 0},
                "blockIO": {"weight": 0}, "devices": [{"allow": true, "access": "rwm"}]}"#,
        ] {
            assert_eq!(updated(before, neutral).unwrap(), resources(before), "{neutral}");
        }
        let update = r#"{"memory": {"limit": 200}, "cpu": {"quota": -1}, "pids": {"limit": -1}}"#;
        let after = updated(before, update).unwrap();
        let expected = r#"{"memory": {"limit": 200, "swap": 300}, "pids": {"limit": -1},
            "cpu": {"quota": -1, "period": 10, "cpus": "0-1"}}"#;
        assert_eq!(after, resources(expected));
    }

    #[test]
    fn unlimited_memory_is_unlimited_swap() {
        let swap = |update: &str| {
            let after = updated(r#"{"memory": {"limit": 100, "swap": 300}}"#, update).unwrap();
            after.memory().unwrap().swap()
        };
        assert_eq!(swap(r#"{"memory": {"limit": -1}}"#), Some(-1));
        let error =
            updated(r#"{"memory": {"limit": 9, "swap": 9}}"#, r#"{"memory": {"limit": 10}}"#);
        assert!(error.unwrap_err().message.contains("memory.swap"));
    }

    #[test]
    fn memory_has_to_fit_into_the_microvm() {
        let largest = VM.largest_limit_mib();
        let limit = |mib: u64| format!(r#"{{"memory": {{"limit": {}}}}}"#, mib << 20);
        assert!(updated("{}", &limit(largest)).is_ok());
        let error = updated("{}", &limit(largest + 1)).unwrap_err().message;
        for part in
            [format!("{} MiB", largest + 1), "256 MiB".into(), "dev.isopod.memory_mib".into()]
        {
            assert!(error.contains(&part), "{error}");
        }
        assert!(updated(&limit(4096), &limit(4096)).is_ok(), "as it was");
        let file = |mib: u64| format!(r#"{{"unified": {{"memory.max": "{}"}}}}"#, mib << 20);
        assert!(updated(&limit(64), &file(largest)).is_ok());
        assert_eq!(updated("{}", &file(largest + 1)).unwrap_err().message, error);
    }

    #[test]
    fn more_processors_than_there_are_is_said() {
        let said = |json: &str| beyond_vm(&resources(json), VM).len();
        assert_eq!(said(r#"{"cpu": {"quota": 200000}}"#), 0);
        assert_eq!(said(r#"{"cpu": {"quota": 200001}}"#), 1);
        assert_eq!(said(r#"{"cpu": {"quota": -1, "cpus": "0-1"}}"#), 0);
        assert_eq!(said(r#"{"cpu": {"quota": 30, "period": 10, "cpus": "0-2"}}"#), 2);
        let files = |cpu: &str, cpus: &str| {
            said(&format!(r#"{{"unified": {{"cpu.max": "{cpu}", "cpuset.cpus": "{cpus}"}}}}"#))
        };
        assert_eq!(files("max 100000", "0-1"), 0);
        assert_eq!(files("30 10", "0-2"), 2);
        assert_eq!(files("200001", "0"), 1);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (json, name) in [
            (r#"{"cpu": {"realtimeRuntime": 5}}"#, "cpu.realtimeRuntime"),
            (r#"{"cpu": {"mems": "1"}}"#, "cpu.mems"),
            (r#"{"rdma": {"mlx5_0": {"hcaHandles": 1}}}"#, "rdma"),
            ("[]", "the file"),
            (r#"{"memory": {"limit": "1g"}}"#, "the file"),
        ] {
            let error = parse_resources("the file", json.as_bytes()).unwrap_err().message;
            assert!(error.contains(name), "{json}: {error}");
        }
    }
}
