//! The test program around a table of cases: each with runc, then each with Isopod, in one engine.
//!
//! `cargo xtask test` keeps the proofs by runc. It names the proven cases in a variable. This
//! program reports those as passed without running them again, marked as `[remembered]`. It prints
//! the cases that runc has proven in this run when the engine has ended and left nothing.

use std::collections::{BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use libtest_mimic::{Arguments, Failed, Trial};

use super::remains::Remains;
use super::{Case, Engine, Run, With};

/// The variable with the cases that runc has proven earlier, separated by blanks.
const REMEMBERED: &str = "ISOPOD_TEST_PROVEN";

/// Starts the engine.
type Start = fn() -> Engine;

struct Suite {
    start: Start,
    state: State,
    /// The items of an idle engine, for each runtime: counted after its first container.
    idle: HashMap<With, Remains>,
    /// The output of each case with runc.
    said: HashMap<&'static str, String>,
    /// The cases that passed with runc.
    proven: BTreeSet<&'static str>,
}

enum State {
    Idle,
    Up(Box<Engine>),
    Failed(String),
}

/// A case to run, and the channel for its outcome.
type Job = (Case, With, Sender<Result<(), Failed>>);

/// Runs the cases that the command line chooses, by the arguments of any Rust test program. The
/// engine is started for the first case and ended after the last. Remains of the engine then fail
/// the program.
pub fn main(start: Start, cases: &[Case]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // The cases share an engine, and their remains are counted one by one.
    arguments.test_threads = Some(1);
    let (jobs, queue) = channel::<Job>();
    // The engine belongs to one thread for as long as it lives.
    let worker = std::thread::spawn(move || Suite::new(start).serve(&queue));
    let remembered = std::env::var(REMEMBERED).unwrap_or_default();
    let remembered: Vec<&str> = remembered.split_whitespace().collect();
    let mut trials = Vec::new();
    for with in [With::Runc, With::Isopod] {
        for &case in cases.iter().filter(|case| case.with.contains(&with)) {
            if with == With::Runc && remembered.contains(&case.name) {
                let name = format!("{}::{}", with.name(), case.name);
                trials.push(Trial::test(name, || Ok(())).with_kind("remembered"));
                continue;
            }
            let jobs = jobs.clone();
            trials.push(Trial::test(format!("{}::{}", with.name(), case.name), move || {
                let (outcome, answer) = channel();
                let sent = jobs.send((case, with, outcome)).is_ok();
                sent.then(|| answer.recv().ok()).flatten().unwrap_or(Err("no suite".into()))
            }));
        }
    }
    drop(jobs);
    let conclusion = libtest_mimic::run(&arguments, trials);
    match worker.join() {
        Ok(proven) => {
            if !proven.is_empty() {
                println!("proven with runc: {}", Vec::from_iter(proven).join(" "));
            }
            conclusion.exit_code()
        }
        Err(panic) => {
            eprintln!("the engine's end: {}", words(&*panic));
            ExitCode::from(101)
        }
    }
}

impl Suite {
    fn new(start: Start) -> Self {
        Self {
            start,
            state: State::Idle,
            idle: HashMap::new(),
            said: HashMap::new(),
            proven: BTreeSet::new(),
        }
    }

    /// Runs the jobs of the queue until no sender is left. Returns the cases that runc has proven.
    fn serve(mut self, queue: &Receiver<Job>) -> BTreeSet<&'static str> {
        while let Ok((case, with, outcome)) = queue.recv() {
            // The receiver waits for the outcome.
            let _ = outcome.send(self.test(&case, with));
        }
        if let State::Up(engine) = self.state {
            engine.end();
        }
        self.proven
    }

    fn test(&mut self, case: &Case, with: With) -> Result<(), Failed> {
        self.start()?;
        let State::Up(engine) = &self.state else { return Err("no engine".into()) };
        let idle = self.idle.entry(with).or_insert_with(|| {
            // Items that a runtime and an engine make once are no remains of a case.
            let first = Run::new(engine, with, "first");
            first.first_container();
            let _ = catch_unwind(AssertUnwindSafe(|| first.remove_containers()));
            Remains::of(engine)
        });
        let run = Run::new(engine, with, case.name);
        let mut outcome =
            catch_unwind(AssertUnwindSafe(|| (case.run)(&run))).map_err(|panic| words(&*panic));
        let tidied = catch_unwind(AssertUnwindSafe(|| run.remove_containers()));
        let left = Remains::left_since(engine, idle);
        if !left.is_empty() {
            // Reported once, not for each later case.
            *idle = Remains::of(engine);
            let left = format!("left behind:\n{}", left.join("\n"));
            outcome = Err(outcome.err().map_or(left.clone(), |why| format!("{why}\n{left}")));
        }
        if let Err(panic) = tidied {
            outcome = outcome.and(Err(words(&*panic)));
        }
        if let Err(why) = &outcome {
            // The report at the program's end does not show the events around the failure.
            let log = engine.daemon_log();
            let lines: Vec<&str> = log.lines().collect();
            let last = lines[lines.len().saturating_sub(15)..].join("\n");
            eprintln!("{why}\n=== the daemon's last lines\n{last}");
        }
        let said = run.said();
        if with == With::Runc && outcome.is_ok() {
            self.proven.insert(case.name);
        }
        let result = outcome.map_err(|why| self.explain(case, with, &why, &said).into());
        if with == With::Runc {
            self.said.insert(case.name, said);
        }
        result
    }

    fn start(&mut self) -> Result<(), Failed> {
        if let State::Idle = self.state {
            let began = Instant::now();
            let started = catch_unwind(self.start);
            eprintln!("the engine's start took {:.1} s", began.elapsed().as_secs_f64());
            self.state = match started {
                Ok(engine) => State::Up(Box::new(engine)),
                Err(panic) => State::Failed(words(&*panic)),
            };
        }
        match &self.state {
            State::Failed(why) => Err(format!("no engine: {why}").into()),
            _ => Ok(()),
        }
    }

    /// The text of a failure: the case's output, and beside it the output with runc.
    fn explain(&self, case: &Case, with: With, why: &str, said: &str) -> String {
        let mut text = format!("{why}\n=== with {}\n{said}", with.name());
        if with == With::Isopod {
            text.push_str("=== with runc\n");
            let earlier = "(not in this run; `cargo xtask test --proofs` runs it too)";
            text.push_str(self.said.get(case.name).map_or(earlier, String::as_str));
        }
        text
    }
}

/// The message of a panic.
fn words(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}
