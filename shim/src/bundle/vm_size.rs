//! The size of a microVM for the limits and annotations of config.json.

use oci_spec::runtime::{LinuxResources, Spec};
use serde::{Deserialize, Serialize};

use isopod_vmm::config::{MAX_MEMORY_MIB, MAX_NET_DEVICES, MAX_VCPUS, MIN_MEMORY_MIB};

use crate::{
    cpu_list::cpu_list_len,
    error::{Error, Result},
    host,
};

/// Annotation that sets the number of vCPUs.
pub(super) const VCPUS_ANNOTATION: &str = "dev.isopod.vcpus";

/// Annotation that sets the guest's memory in MiB.
pub(super) const MEMORY_ANNOTATION: &str = "dev.isopod.memory_mib";

/// Annotation that gives the guest's processors virtualisation extensions.
pub(super) const NESTED_ANNOTATION: &str = "dev.isopod.nested";

/// Annotation that sets the number of interfaces that a namespace may get between create and start.
pub const NICS_ANNOTATION: &str = "dev.isopod.nics";

/// Prefix of containerd's annotations with the limits of a pod, each a number.
pub(crate) const CONTAINERD_LIMITS: &str = "io.kubernetes.cri.sandbox-";

/// CRI-O's annotation with the limits of a pod: the `LinuxContainerResources` of CRI as JSON.
const CRIO_LIMITS: &str = "io.kubernetes.cri-o.PodLinuxResources";

/// Memory beyond the container's limit, in MiB. The guest's kernel and agent use it, and the kernel
/// keeps some of it back for itself.
const OVERHEAD_MIB: u64 = 64;

/// Divisor of the limit for a further part beyond it. The kernel describes each page of 4096 bytes
/// in 64 bytes: one part in 64 of all memory. It divides the rest into zones, and keeps some of
/// them back.
const OVERHEAD_DIVISOR: u64 = 48;

/// The kernel's default period of a CPU quota, in microseconds.
pub(crate) const DEFAULT_PERIOD_US: u64 = 100_000;

/// Guest memory without a limit, in MiB. The host allocates memory when the guest touches it.
const DEFAULT_MEMORY_MIB: u64 = 2048;

/// Largest number of vCPUs without a limit.
const DEFAULT_VCPUS: u64 = 4;

/// vCPUs and memory of a microVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    /// Number of vCPUs, from 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Memory in MiB, from [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub memory_mib: u64,
}

impl VmSize {
    /// The largest limit in MiB that a container can use up in a microVM of this size.
    pub(super) fn largest_limit_mib(self) -> u64 {
        // A close estimate from below. The loop adds the last step or two.
        let rest = self.memory_mib.saturating_sub(OVERHEAD_MIB);
        let mut limit = rest - rest.div_ceil(OVERHEAD_DIVISOR);
        while with_overhead(limit + 1) <= self.memory_mib {
            limit += 1;
        }
        limit
    }

    /// The size of a microVM for this and other containers: at least that without a limit.
    pub(super) fn for_a_pod(self) -> Self {
        let vcpus = host::online_cpus().min(DEFAULT_VCPUS);
        Self {
            vcpus: self.vcpus.max(u8::try_from(vcpus).unwrap_or(1)),
            memory_mib: self.memory_mib.max(host::memory_mib().min(DEFAULT_MEMORY_MIB)),
        }
    }

    /// The size by the limits and annotations of config.json and by the size of this host. The
    /// error names a limit or annotation that cannot be read or is out of range.
    pub(super) fn of(spec: &Spec) -> Result<Self> {
        Self::on_host(spec, host::online_cpus(), host::memory_mib())
    }

    fn on_host(spec: &Spec, host_cpus: u64, host_memory_mib: u64) -> Result<Self> {
        let vcpus = match annotation(spec, VCPUS_ANNOTATION, 1, MAX_VCPUS.into())? {
            Some(vcpus) => vcpus,
            None => {
                let limits = pod_limits(spec)?.map(|limits| limits.vcpus(host_cpus));
                limits.map_or_else(|| vcpus(spec, host_cpus), Ok)?.clamp(1, MAX_VCPUS.into())
            }
        };
        let memory_mib = match annotation(spec, MEMORY_ANNOTATION, MIN_MEMORY_MIB, MAX_MEMORY_MIB)?
        {
            Some(memory_mib) if memory_mib > host_memory_mib => {
                return Err(Error::new(format!(
                    "annotation {MEMORY_ANNOTATION} asks for {memory_mib} MiB of memory; this \
                     host has {host_memory_mib} MiB, so ask for less"
                )));
            }
            Some(memory_mib) => memory_mib,
            None => {
                let limits = pod_limits(spec)?.map(|limits| limits.memory_mib());
                let wanted = limits.unwrap_or_else(|| memory_mib(spec));
                wanted.min(host_memory_mib).clamp(MIN_MEMORY_MIB, MAX_MEMORY_MIB)
            }
        };
        Ok(Self { vcpus: u8::try_from(vcpus).unwrap_or(MAX_VCPUS), memory_mib })
    }
}

/// The limits of a whole pod, which a kubelet sums up over its containers. 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct PodLimits {
    cpu_period: i64,
    cpu_quota: i64,
    #[serde(rename = "memory_limit_in_bytes")]
    memory: i64,
}

impl PodLimits {
    fn vcpus(self, host_cpus: u64) -> u64 {
        let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
        match positive(self.cpu_quota) {
            Some(quota) => quota.div_ceil(positive(self.cpu_period).unwrap_or(DEFAULT_PERIOD_US)),
            None => host_cpus.min(DEFAULT_VCPUS),
        }
    }

    fn memory_mib(self) -> u64 {
        match u64::try_from(self.memory) {
            Ok(limit) if limit > 0 => with_overhead(limit.div_ceil(1 << 20)),
            _ => DEFAULT_MEMORY_MIB,
        }
    }
}

/// The limits of the pod whose first container this is, by the annotations of containerd or CRI-O.
fn pod_limits(spec: &Spec) -> Result<Option<PodLimits>> {
    let malformed = |key: &str, value: &str| {
        Error::new(format!("annotation {key} is {value:?}, which are no limits of a pod"))
    };
    if let Some(json) = text(spec, CRIO_LIMITS) {
        return serde_json::from_str(json).map(Some).map_err(|_| malformed(CRIO_LIMITS, json));
    }
    let number = |name: &str| {
        let key = format!("{CONTAINERD_LIMITS}{name}");
        let value = text(spec, &key).map(|value| value.trim().to_owned());
        value.map(|value| value.parse().map_err(|_| malformed(&key, &value))).transpose()
    };
    let limits = [number("cpu-period")?, number("cpu-quota")?, number("memory")?];
    if limits.iter().all(Option::is_none) {
        return Ok(None);
    }
    let [cpu_period, cpu_quota, memory] = limits.map(Option::unwrap_or_default);
    Ok(Some(PodLimits { cpu_period, cpu_quota, memory }))
}

fn vcpus(spec: &Spec, host_cpus: u64) -> Result<u64> {
    let default = host_cpus.min(DEFAULT_VCPUS);
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let Some(resources) = resources else { return Ok(default) };
    if let Some(list) = unified(resources, "cpuset.cpus").and_then(cpu_list_len) {
        return Ok(list);
    }
    let Some(cpu) = resources.cpu() else { return Ok(default) };
    if let Some(quota) = cpu.quota().and_then(|quota| u64::try_from(quota).ok()).filter(|q| *q > 0)
    {
        let period = cpu.period().filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD_US);
        return Ok(quota.div_ceil(period));
    }
    match cpu.cpus().as_deref().map(str::trim).filter(|cpus| !cpus.is_empty()) {
        Some(list) => cpu_list_len(list).ok_or_else(|| {
            Error::new(format!("linux.resources.cpu.cpus is {list:?}, which is not a list of CPUs"))
        }),
        None => Ok(default),
    }
}

/// The value of an interface file in `linux.resources.unified`. It has precedence, because it is
/// written last.
pub(super) fn unified<'a>(resources: &'a LinuxResources, file: &str) -> Option<&'a str> {
    resources.unified().as_ref()?.get(file).map(|value| value.trim())
}

fn memory_mib(spec: &Spec) -> u64 {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    resources
        .and_then(memory_limit)
        .map_or(DEFAULT_MEMORY_MIB, |limit| with_overhead(limit.div_ceil(1 << 20)))
}

/// The container's memory limit in bytes, if it has one.
pub(super) fn memory_limit(resources: &LinuxResources) -> Option<u64> {
    let limit = resources.memory().as_ref().and_then(|memory| memory.limit());
    let limit = limit.and_then(|limit| u64::try_from(limit).ok());
    unified(resources, "memory.max")
        .map_or(limit, |text| text.parse().ok())
        .filter(|limit| *limit > 0)
}

/// Guest memory in MiB with which a container can use `limit_mib`.
pub(super) fn with_overhead(limit_mib: u64) -> u64 {
    limit_mib.saturating_add(OVERHEAD_MIB).saturating_add(limit_mib.div_ceil(OVERHEAD_DIVISOR))
}

/// Number of network interfaces that the container may get after create, if an annotation sets it.
pub(super) fn nics(spec: &Spec) -> Result<Option<u8>> {
    let nics = annotation(spec, NICS_ANNOTATION, 0, MAX_NET_DEVICES.into())?;
    Ok(nics.and_then(|nics| u8::try_from(nics).ok()))
}

/// Tells whether the guest's processors get virtualisation extensions.
pub(super) fn nested(spec: &Spec) -> Result<bool> {
    match text(spec, NESTED_ANNOTATION) {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(text) => Err(Error::new(format!(
            "annotation {NESTED_ANNOTATION} is {text:?}; it has to be true or false"
        ))),
    }
}

fn text<'a>(spec: &'a Spec, key: &str) -> Option<&'a str> {
    spec.annotations().as_ref()?.get(key).map(String::as_str)
}

fn annotation(spec: &Spec, key: &str, min: u64, max: u64) -> Result<Option<u64>> {
    let Some(text) = text(spec, key) else { return Ok(None) };
    match text.parse::<u64>() {
        Ok(value) if (min..=max).contains(&value) => Ok(Some(value)),
        _ => Err(Error::new(format!(
            "annotation {key} is {text:?}; it has to be a whole number from {min} to {max}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(json: &str) -> Result<VmSize> {
        let spec: Spec = serde_json::from_str(json).unwrap();
        VmSize::on_host(&spec, 8, 16_000)
    }

    fn limits(cpu: &str, memory: &str) -> VmSize {
        size(&format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"resources":{{"cpu":{cpu},"memory":{memory}}}}}}}"#
        ))
        .unwrap()
    }

    #[test]
    fn limits_decide_the_size() {
        let none = limits("{}", "{}");
        assert_eq!(none, VmSize { vcpus: 4, memory_mib: 2048 });
        assert_eq!(limits(r#"{"quota":150000,"period":100000}"#, "{}").vcpus, 2);
        assert_eq!(limits(r#"{"quota":50000}"#, "{}").vcpus, 1);
        assert_eq!(limits(r#"{"quota":-1,"cpus":"0-2,5"}"#, "{}").vcpus, 4);
        assert_eq!(limits(r#"{"quota":999999999}"#, "{}").vcpus, MAX_VCPUS);
        assert_eq!(limits(r#"{"cpus":"3"}"#, "{}").vcpus, 1);
        assert_eq!(limits("{}", r#"{"limit":104857600}"#).memory_mib, 167);
        assert_eq!(limits("{}", r#"{"limit":104857601}"#).memory_mib, 168);
        assert_eq!(limits("{}", r#"{"limit":-1}"#).memory_mib, 2048);
        assert_eq!(limits("{}", r#"{"limit":9223372036854775807}"#).memory_mib, 16_000);
    }

    #[test]
    fn unified_limits_decide_too() {
        let unified = |files: &str| {
            size(&format!(
                r#"{{"ociVersion":"1.0.2","linux":{{"resources":{{
                    "memory":{{"limit":104857600}},"unified":{files}}}}}}}"#
            ))
            .unwrap()
        };
        assert_eq!(unified(r#"{"memory.max":"209715200"}"#).memory_mib, 269);
        assert_eq!(unified(r#"{"memory.max":"max"}"#).memory_mib, 2048);
        assert_eq!(unified(r#"{"memory.high":"1","cpuset.cpus":"3,4,9"}"#).vcpus, 3);
    }

    #[test]
    fn the_limits_of_a_pod_decide() {
        let pod = |annotations: &str| {
            size(&format!(
                r#"{{"ociVersion":"1.0.2","annotations":{{{annotations}}},
                    "linux":{{"resources":{{"memory":{{"limit":1048576}},"cpu":{{"quota":1}}}}}}}}"#
            ))
        };
        let of = |quota: &str, memory: &str| {
            let prefix = CONTAINERD_LIMITS;
            pod(&format!(
                r#""{prefix}cpu-period":"100000","{prefix}cpu-quota":"{quota}","{prefix}memory":"{memory}""#
            ))
        };
        let limited = VmSize { vcpus: 3, memory_mib: 167 };
        assert_eq!(of("250000", "104857600").unwrap(), limited);
        assert_eq!(of("0", "0").unwrap(), VmSize { vcpus: 4, memory_mib: 2048 });
        assert_eq!(of("-1", "0").unwrap().vcpus, 4);
        assert!(of("x", "0").unwrap_err().message.contains("sandbox-cpu-quota"));
        let crio = r#"{\"cpu_period\":100000,\"cpu_quota\":250000,\"memory_limit_in_bytes\":104857600,\"cpu_shares\":2}"#;
        assert_eq!(pod(&format!(r#""{CRIO_LIMITS}":"{crio}""#)).unwrap(), limited);
        assert!(pod(&format!(r#""{CRIO_LIMITS}":"[1""#)).is_err());
        // An annotation of ours has precedence.
        let ours =
            pod(&format!(r#""{CONTAINERD_LIMITS}memory":"0","dev.isopod.memory_mib":"300""#));
        assert_eq!(ours.unwrap().memory_mib, 300);
    }

    #[test]
    fn a_limit_can_be_reached() {
        for limit in [1, 100, 750, 1024, 4096, 65_536, MAX_MEMORY_MIB] {
            let memory = with_overhead(limit);
            let pages = memory.div_ceil(64);
            assert!(memory - pages >= limit + 56, "{limit} of {memory}");
        }
    }

    #[test]
    fn annotations_win_and_are_checked() {
        let annotated = |vcpus: &str, memory: &str| {
            size(&format!(
                r#"{{"ociVersion":"1.0.2","annotations":
                    {{"dev.isopod.vcpus":"{vcpus}","dev.isopod.memory_mib":"{memory}"}}}}"#
            ))
        };
        assert_eq!(annotated("3", "512").unwrap(), VmSize { vcpus: 3, memory_mib: 512 });
        for (vcpus, memory) in [("0", "512"), ("33", "512"), ("x", "512"), ("1", "63")] {
            let error = annotated(vcpus, memory).unwrap_err();
            assert!(error.message.starts_with("annotation dev.isopod."), "{error}");
        }
    }

    #[test]
    fn virtualisation_is_asked_for_in_so_many_words() {
        let with = |annotations: &str| {
            let json = format!(r#"{{"ociVersion":"1.0.2","annotations":{{{annotations}}}}}"#);
            nested(&serde_json::from_str(&json).unwrap())
        };
        assert!(!with("").unwrap());
        assert!(!with(r#""dev.isopod.nested":"false""#).unwrap());
        assert!(with(r#""dev.isopod.nested":"true""#).unwrap());
        for wrong in ["", "1", "True", "yes"] {
            let error = with(&format!(r#""dev.isopod.nested":"{wrong}""#)).unwrap_err();
            assert!(error.message.contains("has to be true or false"), "{error}");
        }
    }
}
