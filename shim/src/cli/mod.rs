//! The OCI command line, with runc's verbs and options. Each verb has a file.

mod all_roots;
mod bundle;
mod check;
mod checkpoint;
mod completions;
mod config;
mod create;
mod create_options;
mod delete;
mod events;
mod exec;
mod exec_relay;
mod exposure;
mod features;
mod install;
mod kill;
mod list;
mod logs;
mod man;
mod metrics;
mod new_container;
mod pause;
mod pidfd;
mod pod_microvm;
mod ps;
mod resume;
mod run;
mod spec;
mod start;
mod state;
mod timeline;
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
    control::spawn::Descriptors,
    error::{EXIT_EXEC_FAILED, Error, Explain, Result},
    logger, sandbox_process,
    state::DEFAULT_ROOT,
};

/// Runs OCI containers, each inside its own KVM microVM.
#[derive(Debug, Parser)]
#[command(
    name = "isopod",
    disable_version_flag = true,
    arg_required_else_help = true,
    // As with runc, a later option overrides an earlier one: callers append options.
    args_override_self = true
)]
struct Cli {
    // Before the global options, because their heading holds for everything after them.
    /// Print the versions of isopod and of the OCI runtime specification.
    #[arg(short = 'v', long)]
    version: bool,
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Option<Verb>,
}

/// Options of every verb, accepted before and after it.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
struct Global {
    /// Directory for the state of containers; should be on a tmpfs.
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_ROOT)]
    root: PathBuf,
    /// Append log records to this file.
    #[arg(long, global = true, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Format of log records.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    log_format: logger::Format,
    /// Log debug records, and keep the guest's console in the state directory.
    #[arg(long, global = true)]
    debug: bool,
    /// Read linux.cgroupsPath as slice:prefix:name, and have systemd make the cgroup if it runs.
    #[arg(long, global = true)]
    systemd_cgroup: bool,
    /// Accepted for callers of runc, and without effect: isopod has to run as root. Before the verb
    /// only: `spec` has an option of this name.
    #[arg(long, value_name = "true|false|auto", help_heading = None)]
    rootless: Option<String>,
    /// Accepted for callers of runc, and without effect: CRIU is not used.
    #[arg(long, global = true, value_name = "PATH")]
    criu: Option<PathBuf>,
    /// Start of the command for the timeline: [`clock::monotonic_us`].
    #[arg(skip = clock::monotonic_us())]
    began_us: u64,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Create a container and run it: isopod run [-b BUNDLE] ID, or isopod run BUNDLE [--
    /// COMMAND...]
    Run(run::Run),
    /// Create a container: its process waits for `start`.
    Create(create::Create),
    /// Start the process of a created container.
    Start(start::Start),
    /// Print the state of a container as JSON.
    State(state::State),
    /// Send a signal to a container's process.
    Kill(kill::Kill),
    /// Delete the remains of a stopped container.
    Delete(delete::Delete),
    /// Run another process in a running container.
    Exec(exec::Exec),
    /// List the containers below the root directory, or those of all front ends.
    List(list::List),
    /// Print the log of a container's guest.
    Logs(logs::Logs),
    /// Draw the start of a container: the time that each part took.
    Timeline(timeline::Timeline),
    /// Print figures of running sandboxes, in Prometheus's text format.
    Metrics(metrics::Metrics),
    /// Pause the processes of a container.
    Pause(pause::Pause),
    /// Resume the processes of a paused container.
    Resume(resume::Resume),
    /// Change the limits of a container.
    Update(update::Update),
    /// List the processes of a container.
    Ps(ps::Ps),
    /// Unpack an image into a new bundle: isopod bundle oci:DIR[:TAG] BUNDLE
    Bundle(bundle::Bundle),
    /// Print a container's resource use, and each time the kernel kills a process at the memory
    /// limit.
    Events(events::Events),
    /// Write a config.json to start from.
    Spec(spec::Spec),
    /// Print the supported parts of the runtime specification, as JSON.
    Features,
    /// Not supported.
    #[command(hide = true)]
    Checkpoint(checkpoint::Refused),
    /// Not supported.
    #[command(hide = true)]
    Restore(checkpoint::Refused),
    /// Show what this host has and lacks for running microVMs.
    Check,
    /// Print the settings file with its defaults, or check one.
    Config(config::Config),
    /// Register isopod with containerd, Docker, Podman and CRI-O.
    Install(install::Install),
    /// Remove what `install` has registered.
    Uninstall(install::Install),
    /// Print the completions of a shell.
    Completions(completions::Completions),
    /// Write the man pages into a directory.
    Man(man::Man),
    /// The sandbox process of a container. Started by create and run.
    #[command(hide = true)]
    Sandbox(Hidden),
    /// The exec relay of a detached exec. Started by exec.
    #[command(hide = true)]
    ExecRelay(Hidden),
}

/// Arguments of verbs that only isopod itself uses.
#[derive(Debug, Args)]
struct Hidden {
    #[command(flatten)]
    descriptors: Descriptors,
    /// Id of the container, for readers of the process table.
    #[arg(value_name = "ID")]
    _id: String,
}

/// Reads the command line and carries it out.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Standard output or error may be closed. Then there is no place to report the failure.
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
        // If standard error is closed, there is no place to report the failure.
        let _ = std::io::stderr().write_all(b"isopod: a verb is missing; see isopod --help\n");
        return ExitCode::FAILURE;
    };
    // Only `run` and `exec` have the exit status of a process in a container.
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
        // The log of these two is a descriptor on their command line, so they set it up themselves.
        Verb::Sandbox(hidden) => {
            logger::init(hidden.descriptors.log_file()?, format, debug);
            return sandbox_process::main(hidden.descriptors);
        }
        Verb::ExecRelay(hidden) => {
            logger::init(hidden.descriptors.log_file()?, format, debug);
            return exec_relay::main(hidden.descriptors);
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
        Verb::Logs(logs) => logs.run(&global),
        Verb::Timeline(timeline) => timeline.run(&global),
        Verb::Metrics(metrics) => metrics.run(&global),
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
        Verb::Config(config) => config.run(),
        Verb::Install(install) => install.install(),
        Verb::Uninstall(uninstall) => uninstall.uninstall(),
        Verb::Completions(completions) => completions.run(),
        Verb::Man(man) => man.run(),
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
