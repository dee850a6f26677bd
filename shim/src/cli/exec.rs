//! `exec`: runs another process in a running container.

use std::path::PathBuf;

use clap::Args;
use oci_spec::runtime::{Capability, LinuxCapabilities, Process, User};

use crate::{
    bundle,
    cli::{
        Global,
        create_options::{find_terminal, write_pid},
        exec_relay::{self, ExecRelay},
        pidfd,
    },
    container_id::ContainerId,
    control::spawn::{self, Launched},
    engine::{ExecSpec, Record},
    error::{Error, Explain, Result},
    preserved,
    state::{PROCESS_FILE, StateDir, Status},
    terminal::{self, RawMode},
};

#[derive(Debug, Args)]
pub(super) struct Exec {
    /// Unix socket that receives the master of the process's terminal.
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Working directory in the container.
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Add a variable to the environment of the container's process.
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Give the process a terminal.
    #[arg(short, long)]
    tty: bool,
    /// User and group, as numbers.
    #[arg(short, long, value_name = "UID[:GID]")]
    user: Option<String>,
    /// Further groups, as numbers.
    #[arg(short = 'g', long, value_name = "GID", value_delimiter = ',')]
    additional_gids: Vec<u32>,
    /// File with the OCI process object, in place of the other options.
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Return once the process has started.
    #[arg(short, long)]
    detach: bool,
    /// File that gets the pid of the relaying process, which exits with the status of the program.
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Unix socket that receives a pidfd of the same process.
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// Accepted for callers of runc, and without effect: the microVM takes the place of SELinux.
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// Accepted for callers of runc, and without effect: the microVM takes the place of AppArmor.
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// Keep the process from gaining privileges.
    #[arg(long)]
    no_new_privs: bool,
    /// Add a capability to those of the container's process.
    #[arg(short, long, value_name = "CAPABILITY")]
    cap: Vec<String>,
    /// Relay the N descriptors from 3 on too: pipes, connected stream sockets, terminals.
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: usize,
    /// Allow a paused container. The process starts when the container is resumed, within a minute.
    #[arg(long)]
    ignore_paused: bool,
    /// Start the process in this cgroup, which the container has made below its own.
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<String>,
    /// Id of the container.
    id: String,
    /// The program and its arguments.
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Exec {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = ContainerId::parse(&self.id)?;
        let preserved = preserved::find(self.preserve_fds)?;
        let cgroup = sub_cgroup(&self.cgroup)?;
        let dir = StateDir::open(&global.root, &id)?;
        let record = Record::read(&dir)?;
        let status = record.as_ref().map_or(Status::Creating, Record::current_status);
        if status == Status::Paused && !self.ignore_paused {
            return Err(Error::new(format!(
                "cannot exec in a paused container: {id} is paused (resume it first, or use \
                 --ignore-paused)"
            )));
        }
        if !matches!(status, Status::Created | Status::Running | Status::Paused) {
            return Err(Error::new(format!(
                "cannot exec in container {id}: container not running (it is {status})"
            )));
        }
        let process = self.process(&dir)?;
        bundle::check_process(&process)?;
        let wanted = process.terminal().unwrap_or(false);
        let terminal = find_terminal(wanted, self.detach, self.console_socket.as_deref())?;
        let exec = ExecRelay {
            id,
            state_dir: dir.path().to_owned(),
            spec: ExecSpec { process, cgroup, detached: self.detach },
            terminal,
            preserved,
        };
        if self.detach { self.detach(&dir, &exec) } else { self.attend(&exec) }
    }

    /// Leaves an exec relay behind for the streams.
    fn detach(&self, dir: &StateDir, exec: &ExecRelay) -> Result<u8> {
        let Launched { mut child, mut socket } =
            spawn::spawn("exec-relay", &exec.id, dir, None, &exec.preserved, exec)?;
        let started = exec_relay::wait_started(&socket)
            .and_then(|()| self.tell_pid(child.id()))
            .and_then(|()| exec_relay::let_go(&mut socket));
        if let Err(error) = started {
            // The relay has failed too, or ends the process when the connection closes: nobody will
            // wait for that process.
            drop(socket);
            child.wait().explain(|| "cannot wait for the exec relay".into())?;
            return Err(error);
        }
        Ok(0)
    }

    /// Stays in the foreground until the end of the process.
    fn attend(&self, exec: &ExecRelay) -> Result<u8> {
        let mut raw = None;
        let exit = exec.run(|| {
            if exec.terminal.is_some() {
                raw = terminal::of_this_process().map(RawMode::enter).transpose()?;
            }
            self.tell_pid(std::process::id())
        });
        drop(raw);
        Ok(exit?.status)
    }

    fn tell_pid(&self, pid: u32) -> Result<()> {
        if let Some(socket) = &self.pidfd_socket {
            pidfd::send(socket, pid, pidfd::Of::Exec)?;
        }
        match &self.pid_file {
            Some(path) => write_pid(path, pid),
            None => Ok(()),
        }
    }

    /// The process to run: that of `--process`, or the container's own with the changes of the
    /// options.
    fn process(&self, dir: &StateDir) -> Result<Process> {
        if let Some(path) = &self.process {
            let mut process = bundle::load_process(path)?;
            // A missing field means false, and not the value of the container's process.
            process.set_no_new_privileges(Some(process.no_new_privileges().unwrap_or(false)));
            return Ok(process);
        }
        if self.command.is_empty() {
            return Err(Error::new("give the program to run, or --process with a file"));
        }
        let path = dir.path().join(PROCESS_FILE);
        let what = || path.display().to_string();
        let json = std::fs::read(&path).explain(what)?;
        let mut process: Process = serde_json::from_slice(&json).explain(what)?;
        process.set_args(Some(self.command.clone()));
        process.set_terminal(Some(self.tty));
        process.set_console_size(None);
        if let Some(cwd) = &self.cwd {
            process.set_cwd(cwd.clone());
        }
        if !self.env.is_empty() {
            process.env_mut().get_or_insert_default().extend(self.env.iter().cloned());
        }
        if let Some(user) = &self.user {
            process.set_user(parse_user(user, process.user())?);
        }
        if !self.additional_gids.is_empty() {
            let mut user = process.user().clone();
            let mut groups = user.additional_gids().clone().unwrap_or_default();
            groups.extend(&self.additional_gids);
            user.set_additional_gids(Some(groups));
            process.set_user(user);
        }
        if self.no_new_privs {
            process.set_no_new_privileges(Some(true));
        }
        if !self.cap.is_empty() {
            let capabilities = process.capabilities().clone().unwrap_or_else(no_capabilities);
            process.set_capabilities(Some(add_capabilities(capabilities, &self.cap)?));
        }
        if self.apparmor.is_some() || self.process_label.is_some() {
            log::debug!("--apparmor and --process-label have no effect");
        }
        Ok(process)
    }
}

/// Checks `--cgroup`. runc takes several of them where there are cgroups v1; the guest has v2.
fn sub_cgroup(paths: &[String]) -> Result<Option<String>> {
    match paths {
        [] => Ok(None),
        // To runc an empty path is the container's own cgroup, too.
        [path] if path.is_empty() => Ok(Some("/".to_owned())),
        [path] if !path.contains(':') => Ok(Some(path.clone())),
        paths => Err(Error::new(format!(
            "--cgroup {} names controllers, or more than one cgroup: the guest has cgroup v2, where \
             a process is in one for all controllers; give one path",
            paths.join(" --cgroup ")
        ))),
    }
}

/// Parses `UID[:GID]`. The other fields stay as in `before`.
fn parse_user(text: &str, before: &User) -> Result<User> {
    let (uid, gid) = text.split_once(':').map_or((text, None), |(uid, gid)| (uid, Some(gid)));
    let number = |text: &str| {
        text.parse::<u32>().map_err(|_| {
            Error::new(format!("--user takes numbers, as in 1000 or 1000:1000, not {text:?}"))
        })
    };
    let mut user = before.clone();
    user.set_uid(number(uid)?);
    if let Some(gid) = gid {
        user.set_gid(number(gid)?);
    }
    Ok(user)
}

/// Empty capability sets. The default of the type is not empty.
fn no_capabilities() -> LinuxCapabilities {
    let mut capabilities = LinuxCapabilities::default();
    capabilities
        .set_bounding(None)
        .set_effective(None)
        .set_permitted(None)
        .set_inheritable(None)
        .set_ambient(None);
    capabilities
}

/// Adds capabilities to the bounding, effective and permitted sets, as runc does.
///
/// The inheritable set stays unchanged, so that no file can add capabilities to the process. The
/// ambient set follows the inheritable set, as the kernel demands.
fn add_capabilities(
    mut capabilities: LinuxCapabilities,
    names: &[String],
) -> Result<LinuxCapabilities> {
    for name in names {
        let quoted = serde_json::Value::String(name.to_ascii_uppercase());
        let capability: Capability = serde_json::from_value(quoted)
            .map_err(|_| Error::new(format!("unknown capability {name:?}")))?;
        let add = |set: &Option<oci_spec::runtime::Capabilities>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(capability);
            Some(set)
        };
        let bounding = add(capabilities.bounding());
        let effective = add(capabilities.effective());
        let permitted = add(capabilities.permitted());
        capabilities.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
        if capabilities.inheritable().as_ref().is_some_and(|set| set.contains(&capability)) {
            let ambient = add(capabilities.ambient());
            capabilities.set_ambient(ambient);
        }
    }
    Ok(capabilities)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers() {
        let mut before = User::default();
        before.set_gid(5).set_umask(Some(0o27));
        let user = parse_user("1000", &before).unwrap();
        assert_eq!((user.uid(), user.gid(), user.umask()), (1000, 5, Some(0o27)));
        let user = parse_user("1000:7", &before).unwrap();
        assert_eq!((user.uid(), user.gid()), (1000, 7));
        for bad in ["root", "1000:", ":1", "-1", "4294967296"] {
            assert!(parse_user(bad, &before).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_process_has_one_cgroup() {
        let of =
            |paths: &[&str]| sub_cgroup(&paths.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&[]).unwrap(), None);
        assert_eq!(of(&["a/b"]).unwrap().as_deref(), Some("a/b"));
        assert_eq!(of(&[""]).unwrap().as_deref(), Some("/"));
        for bad in [&["cpu,memory:a"][..], &["a", "b"], &["cpu:a", "memory:b"]] {
            let error = of(bad).unwrap_err().message;
            assert!(error.contains(bad[0]) && error.contains("cgroup v2"), "{error}");
        }
    }

    #[test]
    fn capabilities_are_added_and_no_others() {
        let names = ["cap_sys_ptrace".to_owned()];
        let only: oci_spec::runtime::Capabilities = [Capability::SysPtrace].into();
        let added = add_capabilities(no_capabilities(), &names).unwrap();
        for set in [added.bounding(), added.effective(), added.permitted()] {
            assert_eq!(set.as_ref(), Some(&only));
        }
        assert_eq!((added.inheritable(), added.ambient()), (&None, &None));

        let mut inheriting = no_capabilities();
        inheriting.set_inheritable(Some(only.clone()));
        let added = add_capabilities(inheriting, &names).unwrap();
        assert_eq!(added.ambient().as_ref(), Some(&only));
        assert!(add_capabilities(no_capabilities(), &["CAP_NOPE".into()]).is_err());
    }
}
