//! `run`: creates and starts a container, and waits for its end.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitStatus,
};

use clap::Args;

use crate::{
    cli::{
        Global,
        create_options::{Caller, CreateOptions},
        new_container::{NewContainer, Next},
    },
    container_id::ContainerId,
    control::{
        Call, Message, Verb, client::connect_to_sandbox, connection::Connection, remains::remove,
    },
    engine::{Ended, Record, Request, stdio},
    error::{Error, ErrorKind, Result},
    event_loop::event_loop,
    exit_text::exit_text,
    signals::WINCH,
    terminal::{self, RawMode, Terminal},
};

#[derive(Debug, Args)]
// The derived usage shows neither that the two forms differ nor, in the man page, the `--`.
#[command(override_usage = "\
isopod run [OPTIONS] ID
       isopod run [OPTIONS] BUNDLE [-- COMMAND...]")]
pub(super) struct Run {
    #[command(flatten)]
    options: CreateOptions,
    /// Return once the container's process has started.
    #[arg(short, long)]
    detach: bool,
    /// Leave the stopped container for `state` and `delete`.
    #[arg(long)]
    keep: bool,
    /// Accepted for callers of runc, and without effect: processes of a container are reaped inside
    /// its microVM.
    #[arg(long)]
    no_subreaper: bool,
    /// Print a timeline to standard error at the end.
    #[arg(long, conflicts_with = "detach")]
    timeline: bool,
    /// Id of the container. Or the directory of a bundle (`.` or with a slash): the container then
    /// gets a random id.
    #[arg(value_name = "ID|BUNDLE")]
    target: String,
    /// Command to run in place of process.args of the bundle given as BUNDLE.
    #[arg(last = true)]
    command: Vec<String>,
}

/// A container to run: its id, its bundle and its command.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    id: ContainerId,
    bundle: PathBuf,
    command: Option<Vec<String>>,
}

impl Run {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let target = self.target()?;
        event_loop()?.block_on(self.run_container(global, target))
    }

    /// Tells runc's `run [-b BUNDLE] ID` and Isopod's `run BUNDLE [-- COMMAND...]` apart.
    fn target(&self) -> Result<Target> {
        let target = &self.target;
        let is_path = target.contains('/') || target == ".";
        let is_bundle = is_path && Path::new(target).join("config.json").is_file();
        if is_bundle && self.options.bundle.is_some() {
            return Err(Error::new(format!(
                "{target} is a bundle, and so is what --bundle names; with --bundle, give a \
                 container id"
            )));
        }
        if is_bundle {
            let command = Some(self.command.clone()).filter(|command| !command.is_empty());
            return Ok(Target { id: ContainerId::random()?, bundle: target.into(), command });
        }
        if is_path && self.options.bundle.is_none() {
            return Err(Error::new(format!(
                "{target:?} is neither a bundle (a directory with a config.json) nor a container id \
                 (no slash)"
            )));
        }
        if self.options.bundle.is_none()
            && let Some(error) = bundle_without_slash(Path::new("."), target, &self.command)
        {
            return Err(error);
        }
        let id = ContainerId::parse(target)?;
        if !self.command.is_empty() {
            return Err(Error::new(
                "a command can only follow a bundle's directory: isopod run BUNDLE -- COMMAND",
            ));
        }
        let bundle = self.options.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
        Ok(Target { id, bundle, command: None })
    }

    async fn run_container(&self, global: &Global, target: Target) -> Result<u8> {
        let Target { id, bundle, command } = target;
        let caller = if self.detach { Caller::RunDetached } else { Caller::Run };
        let container = self.options.create(global, id.clone(), &bundle, command, caller).await?;
        if self.detach { detach(container, &id).await } else { self.attend(container, &id).await }
    }

    /// Starts the container and stays until its end.
    async fn attend(&self, mut container: NewContainer, id: &ContainerId) -> Result<u8> {
        let (heard, status) = match follow_to_end(&mut container, id).await {
            Ok(end) => end,
            Err(error) => {
                container.abandon().await;
                return Err(error);
            }
        };
        if !self.keep {
            let removed = match Record::read(&container.dir) {
                Ok(record) => remove(&container.dir, record.as_ref()).await,
                Err(error) => Err(error),
            };
            // The caller waits for the container's exit status, so a failed removal is only a
            // warning.
            if let Err(left) = removed {
                log::warn!("container {id} has ended, and something of it is left: {left}");
            }
        }
        if let (true, Some(ended)) = (self.timeline, &heard) {
            // If standard error is closed, there is no place to report the failure.
            let _ = std::io::stderr().write_all(ended.timeline.table().as_bytes());
        }
        if let Some(Ended { exit, error, .. }) = heard {
            match (error, exit) {
                (Some(error), _) => return Err(error),
                // The exit status is known, whatever becomes of the sandbox process.
                (None, Some(exit)) => return Ok(exit.status),
                (None, None) => {}
            }
        }
        match status.code() {
            Some(code) => Ok(u8::try_from(code).unwrap_or(u8::MAX)),
            None => Err(Error::with_kind(
                ErrorKind::VmLost,
                format!(
                    "the sandbox process of container {id} was {}, so the exit status of the \
                     container is unknown",
                    exit_text(status)
                ),
            )),
        }
    }
}

/// The error for a bundle below `here` that is named without a slash. Such a name is an id. None if
/// the name can be meant as an id, because `here` is a bundle itself.
fn bundle_without_slash(here: &Path, name: &str, command: &[String]) -> Option<Error> {
    let is_bundle = |dir: &Path| dir.join("config.json").is_file();
    let is_id = is_bundle(here) && command.is_empty();
    (!is_id && is_bundle(&here.join(name))).then(|| {
        Error::new(format!(
            "{name:?} without a slash is a container id: for the bundle in {name}, write `isopod run \
             ./{name}`, or `isopod run --bundle {name} ID`"
        ))
    })
}

/// Starts the container and returns.
async fn detach(mut container: NewContainer, id: &ContainerId) -> Result<u8> {
    let error = match start(&mut container, id).await {
        Ok(()) => return Ok(0),
        Err(error) => error,
    };
    // After a failed start nothing of the container is to be left.
    container.abandon().await;
    Err(error)
}

/// Starts the container and waits for the answer.
async fn start(container: &mut NewContainer, id: &ContainerId) -> Result<()> {
    let mut asking = Asking::start(container, id).await?;
    loop {
        let message = tokio::select! {
            // A short container may have ended by now, and is started all the same.
            biased;
            message = asking.message() => message?,
            next = container.next() => match next? {
                Next::Message(Some(Message::Ended(ended))) => {
                    return ended.error.map_or(Ok(()), Err);
                }
                Next::Message(_) => None,
                Next::Signal(number) => {
                    pass_on(container, number);
                    continue;
                }
            },
        };
        match message {
            Some(Message::Done) => return Ok(()),
            Some(Message::Failed(error)) => return Err(error),
            _ => {
                return Err(Error::new(format!(
                    "the sandbox process of container {id} ended while the container was started: \
                     {}",
                    exit_text(container.wait()?)
                )));
            }
        }
    }
}

/// Starts the container and waits until the sandbox process has ended. Returns the container's end,
/// if the sandbox process has reported it, and the exit status of the sandbox process.
async fn follow_to_end(
    container: &mut NewContainer,
    id: &ContainerId,
) -> Result<(Option<Ended>, ExitStatus)> {
    let raw = match container.terminal {
        Some(Terminal::Inherited { .. }) => {
            terminal::of_this_process().map(RawMode::enter).transpose()?
        }
        _ => {
            // A reader of the container's output then sees the end of the container, not that of
            // this process.
            stdio::release(stdio::Release::InputAndOutput)?;
            None
        }
    };
    let heard = follow(container, id).await?;
    let status = container.wait()?;
    drop(raw);
    Ok((heard, status))
}

/// Starts the container and passes signals and window sizes on. Returns the container's end as the
/// sandbox process reports it, or `None` if that process is gone.
async fn follow(container: &mut NewContainer, id: &ContainerId) -> Result<Option<Ended>> {
    let mut asking = Asking::start(container, id).await?;
    loop {
        tokio::select! {
            message = asking.message() => match message? {
                // A container that could not be started ends, and its end has the same error.
                Some(Message::Failed(error)) => log::debug!("{error}"),
                Some(_) => {}
                // The container is ending.
                None => asking.connection = None,
            },
            next = container.next() => match next? {
                Next::Message(None) => return Ok(None),
                Next::Message(Some(Message::Ended(ended))) => return Ok(Some(*ended)),
                Next::Message(Some(_)) => {}
                Next::Signal(WINCH) => {
                    if let Some(size) = terminal::of_this_process().and_then(terminal::size) {
                        asking.ask(Request::Resize { size }).await;
                    }
                }
                Next::Signal(number) => pass_on(container, number),
            },
        }
    }
}

/// Sends a signal to the sandbox process, which passes the signal on to the container's process.
fn pass_on(container: &NewContainer, number: u32) {
    if let (Ok(pid), Ok(signal)) = (i32::try_from(container.pid()), i32::try_from(number)) {
        // SAFETY: plain numbers are passed. The pid is that of a child that nobody has waited for,
        // so it is still the child's own. A signal to a child that has ended does nothing.
        unsafe { libc::kill(pid, signal) };
    }
}

/// A connection for requests about the container.
struct Asking {
    id: ContainerId,
    /// `None` once the container is ending.
    connection: Option<Connection>,
}

impl Asking {
    /// Connects, and asks for the start of the container.
    async fn start(container: &NewContainer, id: &ContainerId) -> Result<Self> {
        let connection = Some(connect_to_sandbox(&container.dir).await?);
        let mut asking = Self { id: id.clone(), connection };
        asking.ask(Request::Start).await;
        Ok(asking)
    }

    /// Sends a request. A failure is ignored: the reader notices when the container has ended.
    async fn ask(&mut self, request: Request) {
        if let Some(connection) = &self.connection {
            let call = Call { container: self.id.clone(), verb: Verb::Ask(request) };
            let _ = connection.send(&call).await;
        }
    }

    /// The next answer. `None` if the container is ending. Never returns once that was told.
    async fn message(&mut self) -> Result<Option<Message>> {
        match &mut self.connection {
            Some(connection) => connection.message().await,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        run: Run,
    }

    fn target(arguments: &[&str]) -> Result<Target> {
        Command::try_parse_from([&["run"], arguments].concat()).unwrap().run.target()
    }

    #[test]
    fn an_id_and_a_bundle_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().to_str().unwrap();
        let error = target(&[bundle]).unwrap_err();
        assert!(error.message.contains("neither a bundle"), "{error}");
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();

        let ours = target(&[bundle, "--", "ls", "-l"]).unwrap();
        assert_eq!(ours.bundle, dir.path());
        assert_eq!(ours.command, Some(vec!["ls".into(), "-l".into()]));
        assert_ne!(ours.id, target(&[bundle]).unwrap().id);

        let runcs = target(&["-b", bundle, "web"]).unwrap();
        assert_eq!((runcs.id.as_str(), runcs.bundle.as_path()), ("web", dir.path()));
        assert_eq!(target(&["web"]).unwrap().bundle, Path::new("."));
        assert_eq!(target(&["web", "--bundle", bundle]).unwrap(), runcs);

        for (arguments, expected) in [
            (&["-b", bundle, bundle][..], "so is what --bundle names"),
            (&["-b", bundle, "a/b"], "invalid container id"),
            (&["web", "--", "ls"], "can only follow a bundle"),
        ] {
            let error = target(arguments).unwrap_err();
            assert!(error.message.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_bundle_without_a_slash_is_advised_one() {
        let dir = tempfile::tempdir().unwrap();
        let here = dir.path();
        std::fs::create_dir(here.join("web")).unwrap();
        let hint = |command: &[String]| bundle_without_slash(here, "web", command);
        assert!(hint(&[]).is_none());
        std::fs::write(here.join("web/config.json"), "{}").unwrap();
        assert!(hint(&[]).unwrap().message.contains("isopod run ./web"));
        // In a bundle a name is an id, unless a command follows.
        std::fs::write(here.join("config.json"), "{}").unwrap();
        assert!(hint(&[]).is_none());
        assert!(hint(&["ls".into()]).is_some());
    }
}
