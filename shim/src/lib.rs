//! The host side of Isopod under the OCI command line.
//!
//! [`cli`] turns what the user typed into calls; [`bundle`] reads and checks a whole bundle before
//! anything is touched, and [`image`] makes one from an image; [`state`] is what a sandbox leaves on disk; [`sandbox`] is the process that
//! owns one microVM and its container from creation to exit status.

pub mod bundle;
pub mod cgroup;
pub mod cli;
pub mod clock;
mod descriptor;
pub mod error;
pub mod host;
pub mod image;
pub mod logger;
pub mod network;
pub mod sandbox;
pub mod settings;
pub mod signal;
pub mod state;
pub mod stats;
pub mod terminal;
