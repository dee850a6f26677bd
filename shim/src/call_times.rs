//! Times that calls take in this process: those to the agent, and those of containerd.
//!
//! A process owns one sandbox, so the table is the process's. A call whose caller gives it up is not
//! counted.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// Upper bounds of the buckets in microseconds. One more bucket has the calls beyond the last bound.
pub(crate) const BOUNDS_US: [u64; 11] =
    [100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000];

/// The service whose calls are timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Service {
    /// The agent in the guest, called by this process.
    Agent,
    /// containerd's shim, with its tasks and its sandbox, called by containerd.
    Task,
}

/// Number of calls by the time that they took.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Histogram {
    /// Calls of each bucket, without those of the buckets before.
    pub(crate) counts: [u64; BOUNDS_US.len() + 1],
    /// Sum of the times in microseconds.
    pub(crate) sum_us: u64,
}

impl Histogram {
    fn count(&mut self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_US.partition_point(|bound| *bound < us);
        self.counts[bucket] += 1;
        self.sum_us = self.sum_us.saturating_add(us);
    }
}

/// The times of the calls of one method.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CallTimes {
    pub(crate) service: Service,
    pub(crate) method: String,
    pub(crate) times: Histogram,
}

static TIMES: Mutex<BTreeMap<(Service, &'static str), Histogram>> = Mutex::new(BTreeMap::new());

/// Makes a call and counts the time that it takes, whether it fails or not.
pub(crate) async fn timed<T>(
    service: Service,
    method: &'static str,
    call: impl Future<Output = T>,
) -> T {
    let began = Instant::now();
    let answer = call.await;
    // A panic leaves the table whole: each change is one addition.
    let mut times = TIMES.lock().unwrap_or_else(PoisonError::into_inner);
    times.entry((service, method)).or_default().count(began.elapsed());
    answer
}

/// The times so far.
pub(crate) fn call_times() -> Vec<CallTimes> {
    let times = TIMES.lock().unwrap_or_else(PoisonError::into_inner);
    let of = |(key, times): (&(Service, &str), &Histogram)| CallTimes {
        service: key.0,
        method: key.1.to_owned(),
        times: times.clone(),
    };
    times.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_in_the_bucket_of_its_time() {
        let mut histogram = Histogram::default();
        for us in [0, 100, 101, 10_000_000, 10_000_001] {
            histogram.count(Duration::from_micros(us));
        }
        assert_eq!(histogram.counts, [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
        assert_eq!(histogram.sum_us, 20_000_202);
        assert!(BOUNDS_US.is_sorted());
    }

    #[test]
    fn failed_calls_count_and_abandoned_calls_do_not() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let count = |method| {
            let of = call_times().into_iter().find(|times| times.method == method);
            of.map(|of| of.times.counts.iter().sum::<u64>())
        };
        runtime.block_on(async {
            let failed: Result<(), ()> = timed(Service::Task, "fails", async { Err(()) }).await;
            assert_eq!((failed, count("fails")), (Err(()), Some(1)));
            tokio::select! {
                biased;
                () = timed(Service::Task, "waits", std::future::pending()) => {}
                () = std::future::ready(()) => {}
            }
            assert_eq!(count("waits"), None);
        });
    }
}
