//! Registration of the runtime with the engines of a host, and its removal.
//!
//! Each engine has a file that plans: it reads the engine's configuration, and returns the changes
//! of files. Nothing is changed if the configuration is not understood. Then the error has the
//! lines for the administrator.

mod block;
mod change;
mod containerd;
mod crio;
mod docker;
mod drop_in;
mod host;
mod json_members;
mod link;
mod podman;
mod registration;
mod running;

use std::path::PathBuf;

use clap::ValueEnum;

use self::{
    change::Change,
    host::{Host, PROGRAM_FOLDERS},
    registration::Registration,
};
use crate::error::{Error, Result};

/// An engine that Isopod can be registered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// containerd, with its plugin for Kubernetes.
    Containerd,
    /// Docker.
    Docker,
    /// Podman.
    Podman,
    /// CRI-O.
    #[value(name = "cri-o", alias = "crio")]
    CriO,
}

/// A host, and the part of it that is meant.
#[derive(Debug, Clone)]
pub struct Options {
    /// The host's root directory, as this process sees it.
    pub root: PathBuf,
    /// Directory of `isopod` on the host. Absolute.
    pub binary_dir: PathBuf,
    /// Name of the runtime for the engines.
    pub handler: String,
    /// The engines. Empty for all: those that are installed, or those that know of Isopod.
    pub engines: Vec<Engine>,
    /// Show the changes, and make none.
    pub dry_run: bool,
}

/// The outcome for all engines.
#[derive(Debug, Default)]
pub struct Report {
    /// Text for standard output: changes, hints and warnings, each line ended.
    pub text: String,
    /// Engines whose configuration was left alone, with the reason.
    pub failures: Vec<Error>,
}

/// The changes for one engine.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    changes: Vec<Change>,
    /// A reason to change nothing, for a person.
    note: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Install,
    Uninstall,
}

impl Plan {
    /// A plan of one change, or of none.
    fn of(change: Option<Change>) -> Self {
        Self { changes: change.into_iter().collect(), note: None }
    }
}

impl Engine {
    const ALL: [Self; 4] = [Self::Containerd, Self::Docker, Self::Podman, Self::CriO];

    fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Docker => "docker",
            Self::Podman => "podman",
            Self::CriO => "cri-o",
        }
    }

    /// The engine's program on a host.
    fn program(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Docker => "dockerd",
            Self::Podman => "podman",
            Self::CriO => "crio",
        }
    }

    /// Tells whether the engine finds containerd's shim by its name or path.
    fn uses_shim(self) -> bool {
        matches!(self, Self::Containerd | Self::CriO)
    }

    /// The step after a change.
    fn next(self) -> &'static str {
        match self {
            Self::Containerd => "next: systemctl restart containerd",
            Self::Docker => "next: systemctl reload docker",
            Self::Podman => "in effect from the next podman command on",
            Self::CriO => "next: systemctl restart crio",
        }
    }

    fn plan(self, host: &Host, registration: &Registration, action: Action) -> Result<Plan> {
        let plan = match self {
            Self::Containerd => containerd::plan(host, registration, action),
            Self::Docker => docker::plan(host, registration, action),
            Self::Podman => podman::plan(host, registration, action),
            Self::CriO => crio::plan(host, registration, action),
        };
        plan.map_err(|error| self.left_alone(&error, host, registration, action))
    }

    /// The error for a configuration that is not understood, with the lines to add by hand.
    fn left_alone(
        self,
        error: &Error,
        host: &Host,
        registration: &Registration,
        action: Action,
    ) -> Error {
        let name = self.name();
        if action == Action::Uninstall {
            return Error::new(format!("{name} is left as it is: {}", error.message));
        }
        let (file, lines) = match self {
            Self::Containerd => containerd::by_hand(host, registration),
            Self::Docker => docker::by_hand(registration),
            Self::Podman => podman::by_hand(registration),
            Self::CriO => crio::by_hand(registration),
        };
        let what = format!("{name} is left as it is: {}; {file} needs these lines:", error.message);
        Error::new(what).details(lines.lines().map(str::to_owned).collect())
    }
}

/// Registers the runtime. The report has the engines whose configuration was left alone.
///
/// # Errors
///
/// No engine was found, the options are no use, or the program is not on the host.
pub fn install(options: &Options) -> Result<Report> {
    let host = Host::open(&options.root)?;
    let registration = Registration::new(&options.handler, &options.binary_dir)?;
    registration.check_program(&host)?;
    let mut engines = options.engines.clone();
    if engines.is_empty() {
        engines.extend(Engine::ALL.iter().filter(|engine| host.has_program(engine.program())));
    }
    if engines.is_empty() {
        return Err(Error::new(format!(
            "no engine is installed in {}: name one of containerd, docker, podman, cri-o",
            PROGRAM_FOLDERS.join(", ")
        )));
    }
    let plan = |engine: Engine| (engine, engine.plan(&host, &registration, Action::Install));
    let plans: Vec<_> = engines.into_iter().map(plan).collect();
    let mut report = Report::default();
    // No link for an engine whose configuration is left alone.
    if plans.iter().any(|(engine, plan)| engine.uses_shim() && plan.is_ok()) {
        let changes = link::install(&host, &registration)?;
        report.make(&host, "the shim", &changes, options.dry_run)?;
    }
    for (engine, plan) in plans {
        report.carry_out(engine, plan, &host, Action::Install, options.dry_run);
    }
    Ok(report)
}

/// Removes the registration. Warns of containers that still run.
///
/// # Errors
///
/// The options are no use.
pub fn uninstall(options: &Options) -> Result<Report> {
    let host = Host::open(&options.root)?;
    let registration = Registration::new(&options.handler, &options.binary_dir)?;
    let engines =
        if options.engines.is_empty() { Engine::ALL.to_vec() } else { options.engines.clone() };
    let mut report = Report::default();
    for engine in &engines {
        let plan = engine.plan(&host, &registration, Action::Uninstall);
        report.carry_out(*engine, plan, &host, Action::Uninstall, options.dry_run);
    }
    // The link stays while an engine of another call needs it.
    let needed = Engine::ALL.iter().filter(|engine| engine.uses_shim()).any(|engine| {
        let plan = engine.plan(&host, &registration, Action::Uninstall);
        let planned_here = options.dry_run && engines.contains(engine);
        plan.map_or(true, |plan| !plan.changes.is_empty() && !planned_here)
    });
    if !needed {
        let changes = link::uninstall(&host, &registration)?;
        report.make(&host, "the shim", &changes, options.dry_run)?;
    }
    if report.text.is_empty() && report.failures.is_empty() {
        report.text.push_str("nothing to remove\n");
    }
    let running = running::containers(&host)?;
    if !running.is_empty() {
        report.text.push_str(&format!(
            "warning: containers still run under isopod: {}; remove them with their engine before \
             it restarts, or it cannot manage them\n",
            running.join(", ")
        ));
    }
    Ok(report)
}

impl Report {
    fn carry_out(
        &mut self,
        engine: Engine,
        plan: Result<Plan>,
        host: &Host,
        action: Action,
        dry_run: bool,
    ) {
        let name = engine.name();
        let done = plan.and_then(|plan| {
            self.make(host, name, &plan.changes, dry_run)?;
            Ok(plan)
        });
        match (done, action) {
            (Err(error), _) => self.failures.push(error),
            (Ok(Plan { note: Some(note), .. }), Action::Install) => {
                self.text.push_str(&format!("{name}: {note}\n"));
            }
            (Ok(plan), Action::Install) if plan.changes.is_empty() => {
                self.text.push_str(&format!("{name}: nothing to change\n"));
            }
            (Ok(plan), _) if !plan.changes.is_empty() && !dry_run => {
                self.text.push_str(&format!("{name}: {}\n", engine.next()));
            }
            _ => {}
        }
    }

    /// Makes changes, or shows them.
    fn make(&mut self, host: &Host, name: &str, changes: &[Change], dry_run: bool) -> Result<()> {
        for change in changes {
            if dry_run {
                self.text.push_str(&change.diff());
            } else {
                change.apply(host)?;
                self.text.push_str(&format!("{name}: {}\n", change.text()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
