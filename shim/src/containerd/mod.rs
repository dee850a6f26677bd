//! `containerd-shim-isopod-v2`: containerd's shim, the second front end of the engine.
//!
//! ```text
//!  containerd ── executes ──► start (bootstrap) ── executes ──► serve: one for each pod
//!      │                                                          │ main thread: ttrpc, events
//!      └───────────── ttrpc: Task v2 and v3, Sandbox ────────────►│ pod thread: Sandbox, VMM
//!      ◄───────────── ttrpc: events ──────────────────────────────┘ a parked thread a process
//! ```
//!
//! The same program is `isopod`. The name under which it is executed decides.
//!
//! - [`start`]: the first action of containerd for a task. It starts the shim, or finds the shim of
//!   the task's pod.
//! - [`serve`]: the shim itself. [`service`] has its calls, [`calls`] what they do, [`tasks`] the tasks, [`process`] what
//!   containerd knows of a process, [`pod_thread`] the thread that owns the microVM.
//! - [`sandbox_service`]: containerd's other calls, about the pod as a whole, if it leaves the pod's
//!   first container to the shim (`sandboxer = "shim"`). [`sandbox_calls`] carries them out, and
//!   [`pod_sandbox`] has the state.
//! - [`delete`]: containerd's last action for a task. It removes what a shim that was killed has
//!   left.

mod calls;
mod cri;
mod delete;
mod events;
mod exec;
mod flags;
mod info;
mod mapped_layers;
mod messages;
mod metrics;
mod parked;
mod pod;
mod pod_sandbox;
mod pod_spec;
mod pod_thread;
mod process;
mod rootfs;
mod sandbox_calls;
mod sandbox_figures;
mod sandbox_service;
mod serve;
mod service;
mod start;
mod status;
mod stdio;
mod tasks;

use std::{ffi::OsStr, io::Write, path::Path, process::ExitCode};

use self::flags::{Action, Flags};
use crate::{error::Result, logger};

/// Name of the program as containerd derives it from the runtime `io.containerd.isopod.v2`.
const PROGRAM: &str = "containerd-shim-isopod-v2";

/// Variable with containerd's address for events. CRI-O takes none.
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// Tells whether this program was executed as the shim.
pub fn is_asked_for(program: Option<&OsStr>) -> bool {
    program.map(Path::new).and_then(Path::file_name).is_some_and(|name| name == PROGRAM)
}

/// Reads containerd's command line and carries it out.
pub fn main() -> ExitCode {
    let flags = match Flags::parse(std::env::args_os()) {
        Ok(flags) => flags,
        Err(error) => {
            // If standard error is closed, there is no place to report the failure.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match carry_out(flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = std::io::stderr().write_all(format!("{PROGRAM}: {error}\n").as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn carry_out(flags: Flags) -> Result<()> {
    if flags.version {
        return info::print_version();
    }
    if flags.info {
        return info::print_info();
    }
    match flags.action {
        Some(Action::Start) => start::start(&flags),
        Some(Action::Delete) => {
            logger::init(None, logger::Format::Text, flags.debug);
            delete::delete(&flags)
        }
        Some(Action::Serve) => serve::serve(flags),
        Some(Action::Features) => info::print_features(),
        None => Err(crate::error::Error::new(
            "it is started by containerd, and needs an action: start or delete (see docs/containerd.md)",
        )),
    }
}
