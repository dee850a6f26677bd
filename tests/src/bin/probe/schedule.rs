//! The kernel's scheduling of this process.

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// The first version of `struct sched_attr` (sched_getattr(2)).
#[derive(Default)]
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

/// Policy and its parameters, I/O priority, processors, personality, by the kernel's numbers.
pub(crate) fn report() -> Value {
    const WHO_PROCESS: libc::c_int = 1;
    const ASK: libc::c_ulong = 0xffff_ffff;
    let mut seen = Attributes::default();
    let size = size_of::<Attributes>();
    // SAFETY: the kernel writes at most `size` bytes into the structure, which lives across the
    // call.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut seen, size, 0) };
    assert_eq!(result, 0, "sched_getattr: {}", std::io::Error::last_os_error());
    // SAFETY: only numbers are passed.
    let io = unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, 0) };
    // SAFETY: 0xffffffff asks for the personality and changes nothing.
    let personality = unsafe { libc::personality(ASK) };
    let cpus = sched_getaffinity(Pid::from_raw(0)).expect("sched_getaffinity");
    let cpus: Vec<usize> =
        (0..CpuSet::count()).filter(|cpu| cpus.is_set(*cpu).unwrap_or(false)).collect();
    json!({
        "policy": seen.policy,
        "flags": seen.flags,
        "nice": seen.nice,
        "priority": seen.priority,
        "deadline": [seen.runtime, seen.deadline, seen.period],
        "io": [io >> 13, io & 0x1fff],
        "cpus": cpus,
        "personality": personality,
    })
}
