//! Scheduler, I/O priority, CPU affinity and personality of a process.

use rustix::thread::CpuSet;

use crate::error::{Context as _, Error, Result};
use crate::oci::{IoPriority, Personality, ProcessSpec, Scheduler};
use crate::syscall::checked;

/// Policies of `process.scheduler` and their numbers (linux/sched.h).
const POLICIES: [(&str, u32); 6] = [
    ("SCHED_OTHER", 0),
    ("SCHED_FIFO", 1),
    ("SCHED_RR", 2),
    ("SCHED_BATCH", 3),
    ("SCHED_IDLE", 5),
    ("SCHED_DEADLINE", 6),
];

/// Flags and their bits. The second spelling of two flags is that of the host's types.
const FLAGS: [(&str, u64); 7] = [
    ("SCHED_FLAG_RESET_ON_FORK", 1),
    ("SCHED_RESET_ON_FORK", 1),
    ("SCHED_FLAG_RECLAIM", 2),
    ("SCHED_FLAG_DL_OVERRUN", 4),
    ("SCHED_FLAG_D_L_OVERRUN", 4),
    ("SCHED_FLAG_KEEP_POLICY", 8),
    ("SCHED_FLAG_KEEP_PARAMS", 16),
];

/// Classes of `process.ioPriority` (linux/ioprio.h).
const IO_CLASSES: [(&str, u32); 3] =
    [("IOPRIO_CLASS_RT", 1), ("IOPRIO_CLASS_BE", 2), ("IOPRIO_CLASS_IDLE", 3)];

/// Personalities (personality(2)).
const DOMAINS: [(&str, u32); 2] = [("LINUX", 0), ("LINUX32", 8)];

/// Refuses names that the kernel has no number for, by their field.
pub(crate) fn check(process: &ProcessSpec) -> Result<()> {
    if let Some(scheduler) = &process.scheduler {
        attributes(scheduler)?;
    }
    if let Some(priority) = &process.io_priority {
        io_priority(priority)?;
    }
    cpus(&process.exec_cpu_affinity.last).map(drop)
}

/// Applies `process.scheduler` and `process.ioPriority` to the calling process, and
/// `process.execCPUAffinity` unless it is the container's first. Has to run before the change of
/// credentials.
pub(crate) fn apply(process: &ProcessSpec, further: bool) -> Result<()> {
    if let Some(set) = further.then(|| cpus(&process.exec_cpu_affinity.last)).transpose()?.flatten()
    {
        let field =
            || format!("set process.execCPUAffinity.final {:?}", process.exec_cpu_affinity.last);
        rustix::thread::sched_setaffinity(None, &set).context(field)?;
    }
    if let Some(scheduler) = &process.scheduler {
        let attributes = attributes(scheduler)?;
        // SAFETY: the structure contains its own size and lives across the call, which only reads
        // it.
        let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
        checked(result).context(|| format!("set process.scheduler {}", scheduler.policy))?;
    }
    if let Some(priority) = &process.io_priority {
        const WHO_PROCESS: libc::c_int = 1;
        let value = io_priority(priority)?;
        // SAFETY: plain numbers are passed.
        let result = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, value) };
        checked(result).context(|| format!("set process.ioPriority {}", priority.class))?;
    }
    Ok(())
}

/// The number of a `linux.personality`.
pub(crate) fn personality(personality: &Personality) -> Result<u32> {
    if !personality.flags.is_empty() {
        return Err(Error::invalid("linux.personality.flags", "the specification defines none"));
    }
    number(&DOMAINS, &personality.domain, "linux.personality.domain")
}

/// Sets the personality, which all children inherit.
pub(crate) fn set_personality(personality: u32) -> Result<()> {
    // SAFETY: a plain number is passed.
    let result = unsafe { libc::personality(personality.into()) };
    checked(result.into()).context(|| "set linux.personality")
}

/// The first version of `struct sched_attr` (sched_setattr(2)).
#[repr(C)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

fn attributes(scheduler: &Scheduler) -> Result<Attributes> {
    let mut flags = 0;
    for flag in &scheduler.flags {
        flags |= number(&FLAGS, flag, "process.scheduler.flags")?;
    }
    let priority = u32::try_from(scheduler.priority).map_err(|_| {
        Error::invalid("process.scheduler.priority", format!("{} is negative", scheduler.priority))
    })?;
    Ok(Attributes {
        size: size_of::<Attributes>() as u32,
        policy: number(&POLICIES, &scheduler.policy, "process.scheduler.policy")?,
        flags,
        nice: scheduler.nice,
        priority,
        runtime: scheduler.runtime,
        deadline: scheduler.deadline,
        period: scheduler.period,
    })
}

/// Class and priority in the encoding of ioprio_set(2).
fn io_priority(priority: &IoPriority) -> Result<u32> {
    const CLASS_SHIFT: u32 = 13;
    let class = number(&IO_CLASSES, &priority.class, "process.ioPriority.class")?;
    match u32::try_from(priority.priority) {
        Ok(level @ 0..=7) => Ok(class << CLASS_SHIFT | level),
        _ => {
            let why = format!("{} is not from 0 to 7", priority.priority);
            Err(Error::invalid("process.ioPriority.priority", why))
        }
    }
}

/// Parses a list of processors such as `0-3,7`. The empty list gives `None`.
fn cpus(list: &str) -> Result<Option<CpuSet>> {
    if list.is_empty() {
        return Ok(None);
    }
    let bad = || {
        let why = format!("{list:?} is not a list of processors");
        Error::invalid("process.execCPUAffinity.final", why)
    };
    let mut set = CpuSet::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| text.trim().parse::<usize>().map_err(|_| bad());
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last >= CpuSet::MAX_CPU {
            return Err(bad());
        }
        (first..=last).for_each(|cpu| set.set(cpu));
    }
    Ok(Some(set))
}

fn number<T: Copy>(names: &[(&str, T)], name: &str, field: &str) -> Result<T> {
    let found = names.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    found.ok_or_else(|| Error::invalid(field, format!("{name:?} is unknown")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(process: &str) -> String {
        check(&serde_json::from_str(process).unwrap()).unwrap_err().message
    }

    #[test]
    fn names_without_a_number_are_refused() {
        for (process, message) in [
            (
                r#"{"scheduler": {"policy": "SCHED_ISO"}}"#,
                r#"process.scheduler.policy: "SCHED_ISO" is unknown"#,
            ),
            (
                r#"{"scheduler": {"policy": "SCHED_RR", "flags": ["X"]}}"#,
                r#"process.scheduler.flags: "X" is unknown"#,
            ),
            (
                r#"{"ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 8}}"#,
                "process.ioPriority.priority: 8 is not from 0 to 7",
            ),
            (
                r#"{"execCPUAffinity": {"final": "3-1"}}"#,
                r#"process.execCPUAffinity.final: "3-1" is not a list of processors"#,
            ),
        ] {
            assert_eq!(refused(process), message);
        }
    }

    #[test]
    fn structures_are_the_kernels() {
        assert_eq!(size_of::<Attributes>(), 48);
        let priority = IoPriority { class: "IOPRIO_CLASS_IDLE".into(), priority: 2 };
        assert_eq!(io_priority(&priority).unwrap(), 3 << 13 | 2);
        let set = cpus("0-2,5").unwrap().unwrap();
        assert_eq!((0..8).filter(|cpu| set.is_set(*cpu)).collect::<Vec<_>>(), [0, 1, 2, 5]);
        let dead: Scheduler = serde_json::from_str(
            r#"{"policy": "SCHED_DEADLINE", "flags": ["SCHED_FLAG_RECLAIM"],
                "runtime": 1, "deadline": 2, "period": 3}"#,
        )
        .unwrap();
        let dead = attributes(&dead).unwrap();
        assert_eq!((dead.policy, dead.flags, dead.runtime, dead.period), (6, 2, 1, 3));
    }
}
