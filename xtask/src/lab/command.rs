//! A command for a lab or this machine: its program, its streams and its exit status.

use std::io::{self, IsTerminal as _, Write as _, stdin, stdout};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::timed::Timed;

/// A command for a lab or this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    /// Program and arguments.
    pub(crate) argv: Vec<String>,
    /// The whole environment.
    pub(crate) env: Vec<(String, String)>,
    /// Working directory.
    pub(crate) cwd: PathBuf,
    /// Longest time without output, in a lab only. The command is killed after it.
    pub(crate) quiet_limit: Option<Duration>,
}

impl Run {
    /// The command `argv` with this process's environment and working directory.
    pub(crate) fn here(argv: Vec<String>) -> Result<Self> {
        // Variables that are not UTF-8 are left out: the command travels as JSON.
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        let env = std::env::vars_os().filter_map(text).collect();
        let cwd = std::env::current_dir().context("cannot tell the working directory")?;
        Ok(Self { argv, env, cwd, quiet_limit: None })
    }

    /// Sets an environment variable.
    pub(crate) fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.retain(|(have, _)| have != name);
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// The command as JSON, for the lab. `quiet_limit` stays on the host.
    pub(super) fn to_json(&self) -> Result<Vec<u8>> {
        let value = json!({ "argv": self.argv, "env": self.env, "cwd": text(&self.cwd)? });
        Ok(value.to_string().into_bytes())
    }

    /// Reads a command from JSON.
    pub(super) fn from_json(json: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(json).context("the command is not JSON")?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let list = |name: &str| value[name].as_array().context("the command is incomplete");
        let pair = |pair: &Value| Some((text(&pair[0])?, text(&pair[1])?));
        Ok(Self {
            argv: list("argv")?.iter().filter_map(text).collect(),
            env: list("env")?.iter().filter_map(pair).collect(),
            cwd: text(&value["cwd"]).context("the command has no working directory")?.into(),
            quiet_limit: None,
        })
    }
}

/// A path as text, for command lines and JSON.
pub(crate) fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8, which the lab needs", path.display()))
}

/// Source of a command's standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    /// None: the input is at its end.
    Nothing,
    /// This process's standard input.
    Own,
}

impl Input {
    /// This process's standard input, or none if it is a terminal: a lab has no terminals.
    pub(crate) fn for_lab() -> Self {
        if stdin().is_terminal() { Self::Nothing } else { Self::Own }
    }
}

/// Destination of a command's standard output.
#[derive(Debug)]
pub(crate) enum Show<'a> {
    /// This process's standard output.
    Through,
    /// This process's standard output, and the vector.
    Also(&'a mut Vec<u8>),
    /// The vector only.
    Only(&'a mut Vec<u8>),
    /// A [`Timed`], which shows complete lines on this process's standard output.
    Timed(&'a mut Timed),
}

impl Show<'_> {
    /// Takes a piece of standard output.
    pub(crate) fn stdout(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Through => {}
            Self::Also(kept) => kept.extend_from_slice(bytes),
            Self::Only(kept) => {
                kept.extend_from_slice(bytes);
                return Ok(());
            }
            Self::Timed(lines) => return lines.push(bytes),
        }
        stdout().write_all(bytes)?;
        stdout().flush()
    }
}

/// The end of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Exit status as a shell gives it: 128 and the signal number for a killed process.
    Status(i32),
    /// The command was not started, or was killed after its quiet limit: the reason.
    Refused(String),
}

impl Ended {
    /// Exit status as a shell gives it: 127 for a command that was not run to its end.
    pub(crate) fn status(&self) -> i32 {
        match self {
            Self::Status(status) => *status,
            Self::Refused(_) => 127,
        }
    }
}
