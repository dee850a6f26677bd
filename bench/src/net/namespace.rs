//! A network namespace with a veth interface to the host, as container engines make it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// Address of the host on the link, without prefix length.
pub(super) const HOST: &str = "10.177.0.1";

/// Address of the container on the link, with prefix length.
pub(super) const CONTAINER: &str = "10.177.0.2/24";

/// Interface in the namespace.
pub(super) const INTERFACE: &str = "eth0";

const NAME: &str = "isopod-bench";
const HOST_INTERFACE: &str = "isopod-bench";

/// The namespace and the link. Both are removed when the value is dropped.
pub(super) struct Namespace(());

impl Namespace {
    /// Makes namespace and link.
    pub(super) fn new() -> Result<Self> {
        ip(&["netns", "add", NAME])?;
        let namespace = Self(());
        let peer = ["peer", "name", INTERFACE, "netns", NAME];
        ip(&[&["link", "add", HOST_INTERFACE, "type", "veth"][..], &peer].concat())?;
        ip(&["address", "add", &format!("{HOST}/24"), "dev", HOST_INTERFACE])?;
        ip(&["link", "set", HOST_INTERFACE, "up"])?;
        for args in [
            &["address", "add", CONTAINER, "dev", INTERFACE][..],
            &["link", "set", INTERFACE, "up"],
            &["link", "set", "lo", "up"],
        ] {
            namespace.run("ip", args)?;
        }
        Ok(namespace)
    }

    /// File of the namespace.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(NAME)
    }

    /// A command that runs `program` in the namespace.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", NAME, program]);
        command
    }

    /// Runs a program in the namespace to its end. Returns its standard output.
    pub(super) fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        finish(self.command(program).args(args))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The kernel removes both ends of the link with the namespace.
        if let Err(error) = ip(&["netns", "delete", NAME]) {
            eprintln!("isopod-bench: {error:#}");
        }
    }
}

fn ip(args: &[&str]) -> Result<String> {
    finish(Command::new("ip").args(args))
}

fn finish(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
