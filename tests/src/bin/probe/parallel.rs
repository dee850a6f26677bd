//! A test of two CPUs making progress at the same time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// The number that two threads hand to each other by spinning on it.
static TURN: AtomicU64 = AtomicU64::new(0);

/// The time in which handovers are counted: shorter than a time slice of any host.
const WINDOW: Duration = Duration::from_millis(1);

/// The number of handovers in one window that no time slicing can explain. Neither thread makes a
/// system call or executes `pause`, so the host does not notice a CPU that waits for the other. If
/// the host ran the CPUs in turns, it would change between them at a timer tick: once or twice in a
/// window.
const PARALLEL: u64 = 50;

/// The time for one good window, which proves that both CPUs can run. A busy host may keep one of
/// them from running for a while.
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
                // STOP may come in between. The exchange then fails, so that STOP stays.
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

/// Handovers there and back within one window. The vDSO reads the clock without a system call.
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
