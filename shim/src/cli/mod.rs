//! The OCI command line, with runc's verbs and options: one file a verb.

mod bundle;
mod check;
mod checkpoint;
mod create;
mod creation;
mod delete;
mod events;
mod exec;
mod exposure;
mod features;
mod kill;
mod list;
mod pause;
mod pidfd;
mod ps;
mod resume;
mod run;
mod spec;
mod start;
mod state;
mod update;
mod usage;
mod users;

use std::{
    io::{ErrorKind, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};

use crate::{
    bundle::SPEC_VERSION,
    clock,
    error::{EXIT_EXEC_FAILED, Error, Explain, Result},
    logger,
    sandbox::{self, launch::Descriptors},
    state::DEFAULT_ROOT,
};

/// Runs OCI containers, each inside its own KVM microVM.
#[derive(Debug, Parser)]
#[command(
    name = "isopod",
    disable_version_flag = true,
    arg_required_else_help = true,
    // Callers append an option to override an earlier one, as runc lets them.
    args_override_self = true
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    /// Print the versions of isopod and of the OCI runtime specification.
    #[arg(short = 'v', long)]
    version: bool,
    #[command(subcommand)]
    verb: Option<Verb>,
}

/// Options of every verb, accepted before and after it.
#[derive(Debug, Args)]
struct Global {
    /// Directory that holds the state of containers; should be on a tmpfs.
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_ROOT)]
    root: PathBuf,
    /// Append log records to this file.
    #[arg(long, global = true, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Form of log records.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    log_format: logger::Format,
    /// Log debug records, and keep the guest's console in the state directory.
    #[arg(long, global = true)]
    debug: bool,
    /// linux.cgroupsPath has the form slice:prefix:name, and systemd makes the cgroup if it runs.
    #[arg(long, global = true)]
    systemd_cgroup: bool,
    /// Accepted for callers of runc, and without effect: there are no cgroups of the host to be
    /// denied. Before the verb only: `spec` has one of its own.
    #[arg(long, value_name = "true|false|auto")]
    rootless: Option<String>,
    /// Accepted for callers of runc, and without effect: CRIU is not used.
    #[arg(long, global = true, value_name = "PATH")]
    criu: Option<PathBuf>,
    /// When the command began, for the timeline.
    #[arg(skip = clock::monotonic_us())]
    began_us: u64,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Create a container and run it: isopod run [-b BUNDLE] ID, or isopod run BUNDLE [-- COMMAND...]
    Run(run::Run),
    /// Create a container, up to its process, which `start` lets go.
    Create(create::Create),
    /// Start the process of a created container.
    Start(start::Start),
    /// Print the state of a container as JSON.
    State(state::State),
    /// Send a signal to a container's process.
    Kill(kill::Kill),
    /// Delete what is left of a stopped container.
    Delete(delete::Delete),
    /// Run another process in a running container.
    Exec(exec::Exec),
    /// List the containers below the root directory.
    List(list::List),
    /// Stop the processes of a container where they are.
    Pause(pause::Pause),
    /// Let the processes of a paused container go on.
    Resume(resume::Resume),
    /// Change the limits of a container.
    Update(update::Update),
    /// List the processes of a container.
    Ps(ps::Ps),
    /// Unpack an image into a new bundle: isopod bundle oci:DIR[:TAG] BUNDLE
    Bundle(bundle::Bundle),
    /// Tell what a container uses, and when the kernel kills a process of it for its memory limit.
    Events(events::Events),
    /// Write a config.json to start from.
    Spec(spec::Spec),
    /// Print what of the runtime specification is supported, as JSON.
    Features,
    /// Not supported.
    #[command(hide = true)]
    Checkpoint(checkpoint::Refused),
    /// Not supported.
    #[command(hide = true)]
    Restore(checkpoint::Refused),
    /// Show what this host has and lacks for running microVMs.
    Check,
    /// The process that owns a microVM. Started by create and run.
    #[command(hide = true)]
    Sandbox(Hidden),
    /// The process that owns a detached exec. Started by exec.
    #[command(hide = true)]
    ExecRelay(Hidden),
}

/// Arguments of verbs that only isopod itself uses.
#[derive(Debug, Args)]
struct Hidden {
    #[command(flatten)]
    descriptors: Descriptors,
    /// The container, for those who look at the process table.
    #[arg(value_name = "ID")]
    _id: String,
}

/// Reads the command line and carries it out.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Standard output or error may be closed; there is nowhere to say so.
            let _ = error.print();
            if !error.use_stderr() {
                return ExitCode::SUCCESS;
            }
            usage::log(&error);
            return ExitCode::FAILURE;
        }
    };
    if cli.version {
        let version = env!("CARGO_PKG_VERSION");
        let printed = print(&format!("isopod version {version}\nspec: {SPEC_VERSION}\n"));
        return if printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let Some(verb) = cli.verb else {
        // There is nowhere to say that it cannot be said.
        let _ = std::io::stderr().write_all(b"isopod: a verb is missing; see isopod --help\n");
        return ExitCode::FAILURE;
    };
    // Only these two have the exit status of a process in a container.
    let status_of: fn(&Error) -> u8 = match verb {
        Verb::Run(_) => Error::exit_code,
        Verb::Exec(_) => |_| EXIT_EXEC_FAILED,
        _ => |_| 1,
    };
    match carry_out(verb, cli.global) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            log::error!("{error}");
            ExitCode::from(status_of(&error))
        }
    }
}

fn carry_out(verb: Verb, mut global: Global) -> Result<u8> {
    let (format, debug) = (global.log_format, global.debug);
    match verb {
        // They find their log on their command line, and set it up themselves.
        Verb::Sandbox(hidden) => {
            logger::init(hidden.descriptors.log_file()?, format, debug);
            return sandbox::process::main(hidden.descriptors);
        }
        Verb::ExecRelay(hidden) => {
            logger::init(hidden.descriptors.log_file()?, format, debug);
            return sandbox::exec::main(hidden.descriptors);
        }
        _ => {}
    }
    match global.log.as_deref().map(logger::open).transpose() {
        Ok(file) => logger::init(file, format, debug),
        Err(error) => {
            logger::init(None, format, debug);
            return Err(error);
        }
    }
    global.root = std::path::absolute(&global.root)
        .map_err(|e| Error::new(format!("--root {}: {e}", global.root.display())))?;
    match verb {
        Verb::Run(run) => run.run(&global),
        Verb::Create(create) => create.run(&global),
        Verb::Start(start) => start.run(&global),
        Verb::State(state) => state.run(&global),
        Verb::Kill(kill) => kill.run(&global),
        Verb::Delete(delete) => delete.run(&global),
        Verb::Exec(exec) => exec.run(&global),
        Verb::List(list) => list.run(&global),
        Verb::Pause(pause) => pause.run(&global),
        Verb::Resume(resume) => resume.run(&global),
        Verb::Update(update) => update.run(&global),
        Verb::Ps(ps) => ps.run(&global),
        Verb::Bundle(bundle) => bundle.run(),
        Verb::Events(events) => events.run(&global),
        Verb::Spec(spec) => spec.run(),
        Verb::Features => features::run(),
        Verb::Checkpoint(refused) => refused.run("checkpoint"),
        Verb::Restore(refused) => refused.run("restore"),
        Verb::Check => check::run(),
        Verb::Sandbox(_) | Verb::ExecRelay(_) => Ok(1),
    }
}

/// Prints to standard output. A reader that has gone away is not an error.
fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(e).explain(|| "cannot write to standard output".into())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
