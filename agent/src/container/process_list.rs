//! Processes of a container as /proc describes them.

use std::fs;

use isopod_protocol::agent::ProcessInfo;
use rustix::time::{ClockId, Timespec, clock_gettime};

/// Unit of times in /proc/PID/stat, in milliseconds: `USER_HZ` is 100 on x86-64 and arm64.
const TICK_MS: u64 = 10;

/// Bytes of arguments read at most, of one process and of all together. A container chooses its
/// arguments freely, but an answer has to fit into one message.
const MAX_ARGS: usize = 4096;
const MAX_ALL_ARGS: usize = 1 << 20;

/// Describes processes by their pids in the agent's pid namespace. `level` is the number of pid
/// namespaces between the agent's and the container's. Leaves out processes that have ended
/// meanwhile.
pub(crate) fn describe(pids: &[u32], level: usize) -> Vec<ProcessInfo> {
    let (now_ms, up_ms) = (millis(ClockId::Realtime), millis(ClockId::Boottime));
    let mut left = MAX_ALL_ARGS;
    let mut found: Vec<(u32, ProcessInfo)> = pids
        .iter()
        .filter_map(|&pid| {
            let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).ok();
            let status = String::from_utf8_lossy(&read("status")?).into_owned();
            let stat = String::from_utf8_lossy(&read("stat")?).into_owned();
            let (parent, mut info) = parse(&stat, &status, level)?;
            info.pid = pid;
            let map = String::from_utf8_lossy(&read("uid_map")?).into_owned();
            info.container_uid = inside(&map, info.uid).unwrap_or(info.uid);
            info.age_ms = up_ms.saturating_sub(info.start_time_ms);
            info.start_time_ms = now_ms.saturating_sub(info.age_ms);
            let mut line = read("cmdline").unwrap_or_default();
            line.truncate(MAX_ARGS.min(left));
            left -= line.len();
            info.args = args(&line);
            Some((parent, info))
        })
        .collect();
    let ids: std::collections::HashMap<u32, u32> =
        found.iter().map(|(_, info)| (info.pid, info.container_pid)).collect();
    for (parent, info) in &mut found {
        info.container_parent_pid = ids.get(parent).copied().unwrap_or(0);
    }
    found.into_iter().map(|(_, info)| info).collect()
}

/// Returns the parent's pid in the agent's pid namespace, and the process. `start_time_ms` counts
/// from the boot.
fn parse(stat: &str, status: &str, level: usize) -> Option<(u32, ProcessInfo)> {
    let (head, tail) = stat.rsplit_once(')')?;
    // proc_pid_stat(5): the first of these is field 3.
    let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let of_status = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.split_ascii_whitespace().filter_map(|n| n.parse::<u32>().ok()))
    };
    let info = ProcessInfo {
        container_pid: of_status("NSpid:")?.nth(level)?,
        uid: of_status("Uid:")?.nth(1)?,
        terminal: u32::try_from(number(7)?).unwrap_or(0),
        start_time_ms: number(22)? * TICK_MS,
        cpu_time_ms: (number(14)? + number(15)?) * TICK_MS,
        name: head.split_once('(')?.1.to_owned(),
        ..Default::default()
    };
    Some((u32::try_from(number(4)?).ok()?, info))
}

/// Maps the user id `outside` into a user namespace by its /proc/PID/uid_map.
fn inside(map: &str, outside: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_ascii_whitespace().map(str::parse::<u32>);
        let mut next = || numbers.next()?.ok();
        let (first_inside, first_outside, count) = (next()?, next()?, next()?);
        let index = outside.checked_sub(first_outside).filter(|index| *index < count)?;
        first_inside.checked_add(index)
    })
}

/// Splits a command line at its NUL characters. Programs may have overwritten it.
fn args(line: &[u8]) -> Vec<String> {
    let line = line.strip_suffix(b"\0").unwrap_or(line);
    if line.is_empty() {
        return Vec::new();
    }
    line.split(|&b| b == 0).map(|arg| String::from_utf8_lossy(arg).into_owned()).collect()
}

fn millis(clock: ClockId) -> u64 {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(clock);
    u64::try_from(tv_sec * 1000 + tv_nsec / 1_000_000).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let stat = "7 (a) b (c) S 5 7 7 34816 7 4194560 1 0 0 0 12 3 0 0 20 0 1 0 500 1 1";
        let status = "Name:\ta) b (c\nUid:\t1\t1000\t3\t4\nNSpid:\t7\t2\n";
        let (parent, info) = parse(stat, status, 1).unwrap();
        assert_eq!((parent, info.container_pid, info.uid), (5, 2, 1000));
        assert_eq!((info.terminal, info.start_time_ms, info.cpu_time_ms), (34816, 5000, 150));
        assert_eq!(info.name, "a) b (c");
        assert!(parse(stat, status, 2).is_none(), "not of the container");
    }

    #[test]
    fn users_have_the_ids_of_their_namespace() {
        let map = "         0     100000      1000\n      2000     200000         1\n";
        assert_eq!(inside(map, 100_999), Some(999));
        assert_eq!(inside(map, 200_000), Some(2000));
        assert_eq!(inside(map, 101_000), None);
        assert_eq!(inside("0 0 4294967295\n", 7), Some(7));
    }

    #[test]
    fn arguments_are_told_apart() {
        assert_eq!(args(b"sh\0-c\0\0"), ["sh", "-c", ""]);
        assert_eq!(args(b"title"), ["title"]);
        assert_eq!(args(b""), Vec::<String>::new());
    }

    #[test]
    fn this_process_is_described() {
        let pid = std::process::id();
        let all = describe(&[pid, u32::MAX], 0);
        let [info] = &all[..] else { panic!("{all:?}") };
        assert_eq!(info.container_pid, pid);
        assert_eq!(info.args, std::env::args().collect::<Vec<_>>());
        assert!(info.age_ms < millis(ClockId::Boottime) && info.start_time_ms > 0);
    }
}
