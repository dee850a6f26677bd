//! Limits on the processor time of a whole microVM, from the limits of its container.
//!
//! In the guest they count the container alone, and the container may have taken over the guest's
//! kernel. Here the host's kernel counts all that the microVM uses: vCPUs, device threads, relays.

use std::{fs, path::Path};

use oci_spec::runtime::LinuxResources;

use crate::{
    bundle::DEFAULT_PERIOD_US,
    cgroup::{
        fs::{Cgroup, write},
        systemd,
    },
    error::{Explain, Result},
};

/// Divisor of one processor for the time that a microVM may use beyond its container's quota: a
/// tenth. So the guest's kernel and agent answer even while the container uses all of its quota.
const ALLOWANCE: u64 = 10;

/// Range of cpu.shares (cgroup v1), which config.json has.
const SHARES: std::ops::RangeInclusive<u64> = 2..=262_144;

/// Files of a cgroup to write, with their values. All other files stay as they are, because
/// somebody else may have made and limited the cgroup.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct CpuLimits {
    settings: Vec<(&'static str, String)>,
}

impl CpuLimits {
    /// The limits of a microVM whose container has `resources`.
    pub(crate) fn of(resources: &LinuxResources) -> Self {
        let unified = |file| resources.unified().as_ref().and_then(|files| files.get(file));
        let cpu = resources.cpu().as_ref();
        let period = cpu.and_then(|cpu| cpu.period()).filter(|period| *period > 0);
        let quota = cpu.and_then(|cpu| cpu.quota()).filter(|quota| *quota != 0);
        let max = match (unified("cpu.max"), quota, period) {
            (Some(max), ..) => Some(with_allowance(max)),
            (None, None, None) => None,
            (None, quota, period) => {
                let quota = quota.and_then(|quota| u64::try_from(quota).ok());
                Some(cpu_max(quota, period.unwrap_or(DEFAULT_PERIOD_US)))
            }
        };
        let shares = cpu.and_then(|cpu| cpu.shares()).filter(|shares| *shares != 0);
        let weight = unified("cpu.weight").cloned().or(shares.map(weight));
        let settings = [("cpu.max", max), ("cpu.weight", weight)];
        let settings = settings.into_iter().filter_map(|(file, value)| Some((file, value?)));
        Self { settings: settings.collect() }
    }
}

/// `QUOTA PERIOD` for `cpu.max` of a microVM, with the allowance.
fn cpu_max(quota: Option<u64>, period: u64) -> String {
    match quota {
        Some(quota) => format!("{} {period}", quota.saturating_add(period / ALLOWANCE)),
        None => format!("max {period}"),
    }
}

/// Adds the allowance to a value of `cpu.max`. As for the kernel, the period may be left out. All
/// other values stay as they are, and the kernel takes or refuses them.
fn with_allowance(max: &str) -> String {
    let mut words = max.split_whitespace();
    let (quota, period) = (words.next().unwrap_or_default(), words.next());
    match (quota.parse(), period.map_or(Ok(DEFAULT_PERIOD_US), str::parse)) {
        (Ok(quota), Ok(period)) => cpu_max(Some(quota), period),
        _ => max.to_owned(),
    }
}

/// The weight of cgroup v2 for shares of cgroup v1, by runc's formula.
fn weight(shares: u64) -> String {
    let shares = shares.clamp(*SHARES.start(), *SHARES.end());
    (1 + (shares - 2) * 9999 / 262_142).to_string()
}

impl Cgroup {
    /// Sets limits. If the kernel refuses one value, none is changed. A missing controller is only
    /// a warning, because the limits hold in the guest.
    pub(crate) fn limit(&self, limits: &CpuLimits) -> Result<()> {
        let mut before: Vec<(&str, String)> = Vec::new();
        for (file, value) in &limits.settings {
            let path = self.dir().join(file);
            let Ok(old) = fs::read_to_string(&path) else {
                log::warn!(
                    "the container's processor time is limited in its microVM only: there is no {}",
                    path.display()
                );
                return Ok(());
            };
            if let Err(error) = write(&path, value) {
                for (file, old) in before {
                    let _ = write(&self.dir().join(file), old.trim_end());
                }
                return Err(error)
                    .explain(|| format!("cannot write {value:?} to {}", path.display()));
            }
            before.push((file, old));
        }
        if let Some(unit) = self.unit() {
            // systemd would write its own values again when it reloads.
            systemd::set_properties(unit, &self.properties(limits));
        }
        Ok(())
    }

    /// The same limits as properties of a systemd unit.
    fn properties(&self, limits: &CpuLimits) -> Vec<String> {
        let mut properties = Vec::new();
        for (file, value) in &limits.settings {
            match (*file, value.split_once(' ')) {
                ("cpu.weight", _) => properties.push(format!("CPUWeight={value}")),
                (_, Some((quota, period))) => {
                    let numbers = (quota.parse::<u64>(), period.parse::<u64>());
                    let percent = match numbers {
                        (Ok(quota), Ok(period @ 1..)) => format!("{}%", quota * 100 / period),
                        _ => String::new(),
                    };
                    properties.push(format!("CPUQuota={percent}"));
                    properties.push(format!("CPUQuotaPeriodSec={period}us"));
                }
                _ => {}
            }
        }
        properties
    }

    /// The present values of the files that `changed` writes, to be set again if a change fails
    /// elsewhere.
    pub(crate) fn limits_now(&self, changed: &CpuLimits) -> CpuLimits {
        let read = |file| fs::read_to_string(Path::new(self.dir()).join(file)).ok();
        let files = changed.settings.iter().map(|(file, _)| *file);
        let settings = files.filter_map(|file| Some((file, read(file)?.trim_end().to_owned())));
        CpuLimits { settings: settings.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(resources: &str) -> Vec<(&'static str, String)> {
        CpuLimits::of(&serde_json::from_str(resources).unwrap()).settings
    }

    #[test]
    fn a_microvm_may_use_a_tenth_of_a_processor_more_than_its_container() {
        let settings = |max: &str, weight: &str| {
            let settings = [("cpu.max", max.to_owned()), ("cpu.weight", weight.to_owned())];
            settings.into_iter().filter(|(_, value)| !value.is_empty()).collect::<Vec<_>>()
        };
        for (resources, max, weight) in [
            ("{}", "", ""),
            (r#"{"cpu": {"quota": 0, "period": 0, "shares": 0}}"#, "", ""),
            (r#"{"cpu": {"quota": 50000}}"#, "60000 100000", ""),
            (r#"{"cpu": {"quota": 20000, "period": 10000, "shares": 512}}"#, "21000 10000", "20"),
            (r#"{"cpu": {"quota": -1, "period": 10000}}"#, "max 10000", ""),
            (r#"{"cpu": {"shares": 2}}"#, "", "1"),
            (r#"{"cpu": {"shares": 999999}}"#, "", "10000"),
            (r#"{"unified": {"cpu.max": "max", "cpu.weight": "7"}}"#, "max", "7"),
            (r#"{"cpu": {"quota": 1000}, "unified": {"cpu.max": "5000"}}"#, "15000 100000", ""),
            (r#"{"unified": {"cpu.max": "5000 20000"}}"#, "7000 20000", ""),
        ] {
            assert_eq!(of(resources), settings(max, weight), "{resources}");
        }
    }
}
