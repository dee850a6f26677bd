//! The host side of Isopod.
//!
//! Modules import only from modules below them:
//!
//! ```text
//!  cli              one verb a file
//!  containerd       the shim that containerd starts
//!  sandbox_process  what stands for a container on the host, from its creation to its exit status
//!  control          control socket of a sandbox process: messages, server, clients, spawning
//!  engine           sandboxes, their containers, and the processes in these
//!  microvm          VMM process, boot, agent client, share, mount view
//!  state, network, cgroup, image, install
//!  bundle           config.json: checks, refusals, the guest's config.json
//!  the rest         errors, clocks, descriptors, settings: they know no module above
//! ```

pub mod bundle;
mod call_times;
pub mod cgroup;
mod chart;
pub mod cli;
pub mod clock;
mod console_socket;
pub mod container_id;
pub mod containerd;
mod control;
mod cpu_list;
mod descriptor;
mod engine;
pub mod error;
mod event_loop;
mod exit_text;
mod exposition;
mod figures;
mod guest_figures;
pub mod host;
pub mod image;
pub mod install;
mod limits;
pub mod logger;
mod microvm;
mod mount;
pub mod network;
mod oom_score;
pub mod preserved;
pub mod process_id;
mod random;
mod sandbox_process;
pub mod settings;
pub mod signal_names;
pub mod signals;
pub mod state;
pub mod stats;
pub mod terminal;
mod text;
pub mod timeline;
mod toml_text;
