//! Checks of `process.scheduler` and `process.ioPriority`.

use oci_spec::runtime::{
    LinuxSchedulerFlag as Flag, LinuxSchedulerPolicy as Policy, Process, Scheduler,
};

use crate::error::{Error, Result};

/// Checks both fields, as far as that is possible without the kernel. The error names the first
/// value that no kernel takes.
pub(super) fn check(process: &Process) -> Result<()> {
    if let Some(scheduler) = process.scheduler() {
        self::scheduler(scheduler)?;
    }
    if let Some(priority) = process.io_priority().filter(|io| !(0..=7).contains(&io.priority())) {
        return Err(Error::new(format!(
            "process.ioPriority.priority is {}; it has to be from 0 to 7",
            priority.priority()
        )));
    }
    Ok(())
}

fn scheduler(scheduler: &Scheduler) -> Result<()> {
    let policy = *scheduler.policy();
    if policy == Policy::SchedIso {
        return Err(Error::new(format!(
            "process.scheduler.policy is {policy}, which is not supported: no kernel has it"
        )));
    }
    if let Some(nice) = scheduler.nice().filter(|nice| !(-20..=19).contains(nice)) {
        return Err(Error::new(format!(
            "process.scheduler.nice is {nice}; it has to be from -20 to 19"
        )));
    }
    let real_time = matches!(policy, Policy::SchedFifo | Policy::SchedRr);
    match scheduler.priority().unwrap_or(0) {
        0 if !real_time => {}
        priority if !real_time => {
            return Err(Error::new(format!(
                "process.scheduler.priority is {priority}, which only SCHED_FIFO and SCHED_RR have"
            )));
        }
        1..=99 => {}
        priority => {
            return Err(Error::new(format!(
                "process.scheduler.priority is {priority}; for {policy} it has to be from 1 to 99"
            )));
        }
    }
    if policy != Policy::SchedDeadline {
        for (name, value) in [
            ("runtime", scheduler.runtime()),
            ("deadline", scheduler.deadline()),
            ("period", scheduler.period()),
        ] {
            if value.is_some_and(|value| value != 0) {
                return Err(Error::new(format!(
                    "process.scheduler.{name} is set, which only SCHED_DEADLINE has"
                )));
            }
        }
    }
    let clamps =
        |flag: &&Flag| matches!(flag, Flag::SchedFlagUtilClampMin | Flag::SchedFlagUtilClampMax);
    match scheduler.flags().iter().flatten().find(clamps) {
        None => Ok(()),
        Some(flag) => Err(Error::new(format!(
            "process.scheduler.flags has {flag}, which is not supported: there is no field for its \
             value"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn failure(field: &str, value: Value) -> Option<String> {
        let mut process = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/"});
        process[field] = value;
        check(&serde_json::from_value(process).unwrap()).err().map(|error| error.message)
    }

    #[test]
    fn what_the_kernel_takes_passes() {
        for scheduler in [
            json!({"policy": "SCHED_OTHER", "nice": -20}),
            json!({"policy": "SCHED_BATCH", "nice": 19, "priority": 0}),
            json!({"policy": "SCHED_FIFO", "priority": 99, "flags": ["SCHED_RESET_ON_FORK"]}),
            json!({"policy": "SCHED_DEADLINE", "runtime": 1, "deadline": 2, "period": 3}),
        ] {
            assert_eq!(failure("scheduler", scheduler), None);
        }
        let priority = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 7});
        assert_eq!(failure("ioPriority", priority), None);
    }

    #[test]
    fn what_it_does_not_take_is_named() {
        for (scheduler, message) in [
            (
                json!({"policy": "SCHED_ISO"}),
                "process.scheduler.policy is SCHED_ISO, which is not supported: no kernel has it",
            ),
            (
                json!({"policy": "SCHED_OTHER", "nice": 20}),
                "process.scheduler.nice is 20; it has to be from -20 to 19",
            ),
            (
                json!({"policy": "SCHED_OTHER", "priority": 1}),
                "process.scheduler.priority is 1, which only SCHED_FIFO and SCHED_RR have",
            ),
            (
                json!({"policy": "SCHED_RR"}),
                "process.scheduler.priority is 0; for SCHED_RR it has to be from 1 to 99",
            ),
            (
                json!({"policy": "SCHED_FIFO", "priority": 1, "period": 5}),
                "process.scheduler.period is set, which only SCHED_DEADLINE has",
            ),
            (
                json!({"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_UTIL_CLAMP_MIN"]}),
                "process.scheduler.flags has SCHED_FLAG_UTIL_CLAMP_MIN, which is not supported: \
                 there is no field for its value",
            ),
        ] {
            assert_eq!(failure("scheduler", scheduler).unwrap(), message);
        }
        let message = failure("ioPriority", json!({"class": "IOPRIO_CLASS_BE", "priority": -1}));
        assert_eq!(message.unwrap(), "process.ioPriority.priority is -1; it has to be from 0 to 7");
    }
}
