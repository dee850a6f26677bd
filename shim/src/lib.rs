//! The host side of Isopod.
//!
//! Modules import only from modules below them:
//!
//! ```text
//!  cli         one verb a file
//!  engine      a sandbox process and its container, from creation to exit status
//!  microvm     VMM process, boot, agent client, share, mount view
//!  control     control socket of a sandbox process: messages, versions, spawning, waiting
//!  state, network, cgroup, image
//!  bundle      config.json: checks, refusals, the guest's config.json
//!  the rest    errors, clocks, descriptors, settings: they know no module above
//! ```

pub mod bundle;
pub mod cgroup;
pub mod cli;
pub mod clock;
mod console_socket;
pub mod container_id;
pub mod control;
mod cpu_list;
mod descriptor;
pub mod engine;
pub mod error;
mod event_loop;
mod exit_text;
pub mod host;
pub mod image;
mod limits;
pub mod logger;
mod microvm;
mod mount;
pub mod network;
mod oom_score;
pub mod preserved;
pub mod process_id;
mod random;
pub mod settings;
pub mod signal_names;
pub mod signals;
pub mod state;
pub mod stats;
pub mod terminal;
mod text;
pub mod timeline;
