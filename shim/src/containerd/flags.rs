//! The command line, as containerd and CRI-O write it: Go's flags, with one dash, and an action.

use std::{ffi::OsString, os::fd::RawFd, path::PathBuf};

use clap::{Parser, ValueEnum};

/// The command line of the shim.
#[derive(Debug, Parser)]
#[command(
    name = "containerd-shim-isopod-v2",
    about = "Runs containerd's tasks inside KVM microVMs",
    disable_version_flag = true,
    args_override_self = true
)]
pub(super) struct Flags {
    /// Namespace of containerd that the task is in.
    #[arg(long, default_value = "default")]
    pub(super) namespace: String,
    /// Address of containerd.
    #[arg(long, default_value = "")]
    pub(super) address: String,
    /// Accepted, and without effect: events go to containerd's ttrpc address.
    #[arg(long)]
    publish_binary: Option<PathBuf>,
    /// Id of the task.
    #[arg(long, default_value = "")]
    pub(super) id: String,
    /// Directory of the task's bundle, for the action `delete`.
    #[arg(long)]
    pub(super) bundle: Option<PathBuf>,
    /// Accepted, and without effect: the action `start` makes the socket.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// Log debug records.
    #[arg(long)]
    pub(super) debug: bool,
    /// Print the versions.
    #[arg(short, long)]
    pub(super) version: bool,
    /// Print what the runtime can do, as containerd's RuntimeInfo.
    #[arg(long)]
    pub(super) info: bool,
    /// The socket of the shim, already open.
    #[arg(long, hide = true)]
    pub(super) socket_fd: Option<RawFd>,
    /// Path of the socket, which the shim removes.
    #[arg(long, hide = true)]
    pub(super) socket_path: Option<PathBuf>,
    /// The action.
    #[arg(value_enum)]
    pub(super) action: Option<Action>,
}

/// Action of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Action {
    /// Start the shim of a task, or find it. Prints the shim's address.
    Start,
    /// Remove the remains of a task.
    Delete,
    /// Print the supported parts of the runtime specification, as JSON.
    Features,
    /// Be the shim.
    #[value(hide = true)]
    Serve,
}

impl Flags {
    /// Reads the command line.
    ///
    /// # Errors
    ///
    /// If it is malformed. Help is an error too.
    pub(super) fn parse(args: impl Iterator<Item = OsString>) -> Result<Self, clap::Error> {
        Self::try_parse_from(args.map(with_two_dashes))
    }
}

/// Turns one dash in front of a word into two. Go's flags have either.
fn with_two_dashes(arg: OsString) -> OsString {
    match arg.to_str() {
        Some(text) if text.len() > 2 && text.starts_with('-') && !text.starts_with("--") => {
            format!("-{text}").into()
        }
        _ => arg,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Flags {
        let words = std::iter::once("containerd-shim-isopod-v2").chain(line.split(' '));
        Flags::parse(words.map(OsString::from)).unwrap()
    }

    #[test]
    fn one_dash_and_two_are_the_same() {
        let flags = parse("-namespace k8s.io -address /run/c.sock -publish-binary /c -id a start");
        assert_eq!((flags.namespace.as_str(), flags.id.as_str()), ("k8s.io", "a"));
        assert_eq!(flags.action, Some(Action::Start));
        let flags = parse("--namespace=x -id b -bundle /b -debug delete");
        assert_eq!((flags.namespace.as_str(), flags.debug), ("x", true));
        assert_eq!(flags.action, Some(Action::Delete));
        assert!(parse("-v").version && parse("-info").info && parse("--version").version);
    }

    #[test]
    fn an_empty_value_is_a_value() {
        let args = ["shim", "-namespace", "", "-id", "x", "start"].map(OsString::from);
        assert_eq!(Flags::parse(args.into_iter()).unwrap().namespace, "");
    }
}
