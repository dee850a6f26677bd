//! The agent as PID 1 of its own namespaces, driven as the host drives it, over unix sockets.
//!
//! This program has three roles: the driver, the agent (with the argument `agent`), and a
//! container's process, which the agent starts from `/proc/self/exe`. It needs root, and busybox
//! for the containers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod deletion;
mod driver;
mod io;
mod lifecycle;
mod rootfs;
mod settings;
mod streams;

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

use driver::{Driver, INIT_NAME};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if args[0].as_bytes() == INIT_NAME.to_bytes() {
        isopod_agent::run_init();
    }
    if args.get(1).is_some_and(|arg| arg == "agent") {
        driver::run_agent(&args[2]);
    }
    if std::env::var_os("NEXTEST").is_some() || args.iter().any(|arg| arg == "--list") {
        return ExitCode::SUCCESS;
    }
    if rustix::process::getuid().as_raw() != 0 {
        println!("skipped: the agent can only run as root");
        return result(&Counts::default());
    }
    let filter = args.iter().skip(1).find(|arg| !arg.starts_with('-')).cloned();
    run_all(&filter.unwrap_or_default())
}

/// Runs every test whose name contains the filter, one after the other against one agent.
fn run_all(filter: &str) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut counts = Counts::default();
    runtime.block_on(async {
        let driver = Driver::start().await;
        let before = driver.resources().await;
        macro_rules! run {
            ($($module:ident :: $test:ident),+ $(,)?) => { $(
                let name = concat!(stringify!($module), "::", stringify!($test));
                if name.contains(filter) {
                    counts.add(passes(name, $module::$test(&driver)).await);
                } else {
                    counts.filtered_out += 1;
                }
            )+ };
        }
        run!(
            lifecycle::statuses,
            lifecycle::programs_that_cannot_run,
            lifecycle::wrong_order_changes_nothing,
            lifecycle::created_containers_can_be_killed,
            lifecycle::a_slow_call_holds_up_no_other,
            lifecycle::signals_to_all,
            lifecycle::without_a_pid_namespace_all_end_with_the_first,
            lifecycle::exec_joins_the_container,
            lifecycle::statistics_of_a_removed_cgroup_are_an_ended_containers,
            lifecycle::signals_are_as_new,
            lifecycle::files_that_do_not_end_hold_nothing_up,
            deletion::a_running_process_is_killed_alone,
            deletion::a_process_whose_streams_are_missing_never_runs,
            deletion::a_process_that_is_being_set_up_never_runs,
            deletion::a_process_that_is_deleted_at_once_never_runs,
            deletion::an_ended_process_is_forgotten,
            deletion::missing_processes_are_no_error,
            deletion::a_thousand_processes_leave_nothing,
            settings::identity_and_limits,
            settings::environment,
            settings::capabilities,
            settings::namespaces_are_own,
            settings::user_namespace,
            settings::a_user_namespace_is_shared,
            settings::devices_outside_the_rules,
            settings::refused_by_name,
            settings::limits_are_not_the_containers_to_change,
            settings::memory_and_pids_limits,
            settings::a_failed_update_changes_nothing,
            rootfs::mount_options,
            rootfs::bind_mounts,
            rootfs::hidden_and_read_only_paths,
            rootfs::links_do_not_lead_out,
            rootfs::default_devices,
            rootfs::tmpfs_copies_up,
            rootfs::tmpfs_takes_over_the_mode,
            rootfs::files_of_the_guest_are_sealed,
            streams::both_ways_at_once,
            streams::last_line_is_never_lost,
            streams::background_processes_go_on_to_write,
            streams::ends_of_streams,
            streams::terminals,
        );
        // A failed test leaves its container behind, and without any test there is nothing to
        // compare.
        if counts.failed == 0 && counts.passed > 0 {
            counts.add(passes("nothing_is_left_over", driver.settle(&before)).await);
        }
        driver.stop().await;
    });
    result(&counts)
}

#[derive(Debug, Default)]
struct Counts {
    passed: u32,
    failed: u32,
    filtered_out: u32,
}

impl Counts {
    fn add(&mut self, passed: bool) {
        if passed {
            self.passed += 1;
        } else {
            self.failed += 1;
        }
    }
}

/// Prints the result in the format of Rust's own runner, which other tools parse.
fn result(counts: &Counts) -> ExitCode {
    let Counts { passed, failed, filtered_out } = counts;
    let verdict = if *failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; \
         {filtered_out} filtered out"
    );
    if *failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn passes(name: &str, test: impl Future<Output = ()>) -> bool {
    use futures_catch::CatchUnwind as _;
    let began = std::time::Instant::now();
    let ok =
        tokio::time::timeout(std::time::Duration::from_secs(900), AssertUnwindSafe(test).caught())
            .await
            .unwrap_or(false);
    let verdict = if ok { "ok" } else { "FAILED" };
    println!("test {name} ... {verdict} ({} ms)", began.elapsed().as_millis());
    ok
}

/// The only part of the futures crate that is needed here.
mod futures_catch {
    use std::future::Future;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::pin::pin;
    use std::task::Poll;

    pub(crate) trait CatchUnwind: Future<Output = ()> + Sized {
        /// Returns false if the future panicked.
        async fn caught(self) -> bool {
            let mut future = pin!(self);
            std::future::poll_fn(|cx| {
                let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx)));
                match polled {
                    Ok(Poll::Pending) => Poll::Pending,
                    Ok(Poll::Ready(())) => Poll::Ready(true),
                    Err(_) => Poll::Ready(false),
                }
            })
            .await
        }
    }

    impl<F: Future<Output = ()>> CatchUnwind for F {}
}
