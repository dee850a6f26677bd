//! Many pods: rounds of them, several at the same time, and what the host keeps of each round.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use isopod_tests::engine::Run;

use crate::cri::{Cri, script};

/// Pods that are made and removed at the same time.
const AT_ONCE: usize = 5;

/// Variable with the number of such groups in a round; 1 if not set. Pods take an emulated machine
/// long.
const GROUPS: &str = "ISOPOD_TEST_POD_GROUPS";

/// Rounds. The first one makes what an engine and a runtime make once.
const ROUNDS: usize = 3;

/// Memory in MiB that the host may have lost after two more rounds: of its own accord, and for each
/// pod. The guest of one pod takes more.
const MEMORY_MIB: (u64, u64) = (48, 1);

/// Prints what the host keeps, a name and a number in each line. A shim ends a moment after its pod.
/// Memory that the kernel may free at any time counts as available. It is not freed here: a lab's
/// emulated processor does not see that another file's code comes into the page, and runs the old code.
const COUNT: &str = "for look in $(seq 100); do
        pgrep 'containerd-shim|isopod-(shim|vmm)' >/dev/null || break
        sleep 0.2
    done
    containerd=$(pgrep -o -x containerd)
    echo descriptors $(ls /proc/$containerd/fd | wc -l)
    echo mounts $(wc -l </proc/self/mountinfo)
    echo sockets $(wc -l </proc/net/unix)
    echo interfaces $(ls /sys/class/net | wc -l)
    echo cgroups $(find /sys/fs/cgroup -type d | wc -l)
    echo processes $(pgrep -c 'containerd-shim|isopod-(shim|vmm)')
    echo available $(sed -n '/MemAvailable/s/[^0-9]//gp' /proc/meminfo)";

/// Rounds of pods of two containers leave nothing, and each round as little as the one before.
pub(crate) fn pod_rounds(run: &Run<'_>) {
    let cri = Cri::new(run);
    let groups = std::env::var(GROUPS).unwrap_or_default();
    let groups = if groups.is_empty() { 1 } else { groups.parse().expect("a number of groups") };
    let kept: Vec<Kept> = (0..ROUNDS).map(|number| round(run, &cri, number, groups)).collect();
    let (first, last) = (&kept[0], &kept[ROUNDS - 1]);
    let pods = u64::try_from(groups * AT_ONCE * (ROUNDS - 1)).expect("a number of pods");
    for (name, count) in &last.counts {
        // containerd opens some descriptors for a moment. One for each pod would be more.
        let slack = if name == "descriptors" { pods / 2 } else { 0 };
        assert!(*count <= first.counts[name] + slack, "{name}: {kept:#?}");
    }
    let grown = first.available_mib.saturating_sub(last.available_mib);
    let most = MEMORY_MIB.0 + MEMORY_MIB.1 * pods;
    assert!(grown <= most, "{grown} MiB more are in use: {kept:#?}");
}

/// Counts of the host's things after a round.
#[derive(Debug)]
struct Kept {
    counts: BTreeMap<String, u64>,
    available_mib: u64,
}

fn round(run: &Run<'_>, cri: &Cri<'_, '_>, number: usize, groups: usize) -> Kept {
    for group in 0..groups {
        let names = (0..AT_ONCE).map(|pod| format!("round{number}-{group}-{pod}"));
        let names: Vec<String> = names.collect();
        let pods = cri.pods(names.iter().map(|name| cri.pod_config(name)).collect());
        for (pod, name) in pods.iter().zip(&names) {
            let one = pod.start(script("one", "sleep 1000"));
            let two = pod.start(script("two", "echo $((6 * 7)); sleep 1000"));
            for id in [&one, &two] {
                assert_eq!(pod.shell(id, "hostname"), *name);
            }
            for id in [one, two] {
                let memory = pod.stats(&id).memory.expect("memory");
                assert!(memory.usage_bytes.is_some_and(|usage| usage.value > 0), "{memory:?}");
            }
            let begun = Instant::now();
            while pod.log("two") != "42" {
                assert!(begun.elapsed() < Duration::from_secs(30), "{}", pod.log("two"));
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        cri.remove(pods);
        // The case takes minutes, and a test that prints nothing is ended.
        eprintln!("{} pods have come and gone", (number * groups + group + 1) * AT_ONCE);
    }
    let output = run.end(run.engine.inside(&["sh", "-c", COUNT])).ok().stdout;
    let mut counts: BTreeMap<String, u64> = output
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, number)| (name.to_owned(), number.trim().parse().expect("a number")))
        .collect();
    assert_eq!(counts.remove("processes"), Some(0), "{output}");
    let available = counts.remove("available").expect("available memory");
    Kept { counts, available_mib: available / 1024 }
}
