//! Whether two CPUs make progress at the same time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Two threads hand a number to each other by spinning on it.
static TURN: AtomicU64 = AtomicU64::new(0);

/// Handovers are counted in windows of this length: shorter than a time slice of any host.
const WINDOW: Duration = Duration::from_millis(1);

/// Handovers in one window that no time slicing can explain. Neither thread makes a system call or
/// executes `pause`, so a CPU that waits for the other is not seen to wait; if it had to be put off
/// the host's CPU for the other to run, that happens at a timer tick, once or twice in a window.
const PARALLEL: u64 = 50;

/// A busy host may keep one of the two CPUs from running for a while. One good window proves that both can.
const PATIENCE: Duration = Duration::from_secs(60);

/// The number of CPUs, the CPUs that the threads ran on, and the most handovers in one window.
pub(crate) fn report() -> Value {
    let table = std::fs::read_to_string("/proc/cpuinfo").expect("/proc/cpuinfo");
    let cpus = table.lines().filter(|l| l.starts_with("processor")).count();
    let (best, ran_on) = if cpus < 2 { (0, vec![0]) } else { play() };
    json!({ "cpus": cpus, "ran_on": ran_on, "best_window": best, "parallel": best >= PARALLEL })
}

fn play() -> (u64, Vec<usize>) {
    const STOP: u64 = u64::MAX;
    let other = std::thread::spawn(|| {
        let cpu = pin(1);
        loop {
            let turn = TURN.load(Ordering::Acquire);
            if turn == STOP {
                return cpu;
            }
            if turn % 2 == 1 {
                // Lost if STOP has come in between, and then STOP has to stay.
                let _ = TURN.compare_exchange(turn, turn + 1, Ordering::AcqRel, Ordering::Acquire);
            }
        }
    });
    let cpu = pin(0);
    let start = Instant::now();
    let mut best = 0;
    while best < PARALLEL && start.elapsed() < PATIENCE {
        best = best.max(handovers());
    }
    TURN.store(STOP, Ordering::Release);
    (best, vec![cpu, other.join().expect("the other thread")])
}

/// Handovers there and back within one window. The clock is read by the vDSO, without a system call.
fn handovers() -> u64 {
    let start = Instant::now();
    let mut count = 0;
    let mut turn = TURN.load(Ordering::Acquire);
    loop {
        while turn % 2 == 1 {
            if start.elapsed() >= WINDOW {
                return count;
            }
            turn = TURN.load(Ordering::Acquire);
        }
        if start.elapsed() >= WINDOW {
            return count;
        }
        count += 1;
        TURN.store(turn + 1, Ordering::Release);
        turn += 1;
    }
}

fn pin(cpu: usize) -> usize {
    let mut set = CpuSet::new();
    set.set(cpu).expect("a CPU number");
    sched_setaffinity(Pid::from_raw(0), &set).expect("sched_setaffinity");
    sched_getcpu().expect("getcpu")
}
