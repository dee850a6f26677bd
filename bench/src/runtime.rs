//! Calls of an OCI runtime's command line: the cycle of a container, and `exec`.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::clock;

/// Id of every container. There is one container at a time.
const ID: &str = "bench";

/// A runtime, with a directory for its state.
pub(crate) struct Runtime {
    /// Name in figures.
    pub(crate) name: &'static str,
    program: PathBuf,
    dir: TempDir,
    /// Parameters of the guest kernel. A runtime without guests ignores them.
    kernel_params: &'static str,
}

impl Runtime {
    /// The runtime `program`, called `name` in figures.
    pub(crate) fn new(name: &'static str, program: impl Into<PathBuf>) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a directory")?;
        Ok(Self { name, program: program.into(), dir, kernel_params: "" })
    }

    /// The same runtime with parameters for the guest kernel.
    pub(crate) fn kernel_params(self, kernel_params: &'static str) -> Self {
        Self { kernel_params, ..self }
    }

    /// Units of `create`, `start`, the wait for the end of the container, and `delete`.
    pub(crate) fn cycle(&self, bundle: &Path) -> Result<f64> {
        let start = clock::now()?;
        self.start(bundle)?.wait()?;
        Ok(clock::now()? - start)
    }

    /// Starts a container of `bundle`, with its configuration changed by `change`.
    pub(crate) fn start_changed(
        &self,
        bundle: &Path,
        change: impl FnOnce(&mut Value),
    ) -> Result<Running<'_>> {
        self.start(&self.changed(bundle, change)?)
    }

    /// Creates and starts a container.
    fn start(&self, bundle: &Path) -> Result<Running<'_>> {
        let pid = self.create(bundle)?;
        self.call(["start", ID])?;
        Ok(Running { runtime: self, pid })
    }

    /// Units of `exec` of /bin/true in a container that does nothing: one value for each of `runs`.
    pub(crate) fn execs(&self, bundle: &Path, runs: usize) -> Result<Vec<f64>> {
        let sleep = json!(["/bin/sleep", "1000000"]);
        let running = self.start_changed(bundle, |config| config["process"]["args"] = sleep)?;
        let mut took = Vec::new();
        for _ in 0..=runs {
            let start = clock::now()?;
            self.call(["exec", ID, "/bin/true"])?;
            took.push(clock::now()? - start);
        }
        running.kill()?;
        // The first run warms the page cache and does not count.
        Ok(took.split_off(1))
    }

    /// Writes a bundle with the root file system of `bundle` and a changed config.json.
    fn changed(&self, bundle: &Path, change: impl FnOnce(&mut Value)) -> Result<PathBuf> {
        let bundle = std::path::absolute(bundle)?;
        let path = bundle.join("config.json");
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        let mut config: Value = serde_json::from_slice(&text).context("config.json")?;
        config["root"]["path"] = json!(bundle.join("rootfs"));
        change(&mut config);
        let dir = self.dir.path().join("bundle");
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        fs::write(dir.join("config.json"), config.to_string()).context("config.json")?;
        Ok(dir)
    }

    /// Creates the container. Returns the process of its pid file.
    ///
    /// The process is a child of this process, a subreaper, as soon as `create` has ended.
    fn create(&self, bundle: &Path) -> Result<Pid> {
        let file = self.dir.path().join("pid");
        self.call([
            OsStr::new("create"),
            OsStr::new("--bundle"),
            bundle.as_os_str(),
            OsStr::new("--pid-file"),
            file.as_os_str(),
            OsStr::new(ID),
        ])?;
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        Ok(Pid::from_raw(text.trim().parse().context("the pid file")?))
    }

    /// Calls the runtime and waits for its end.
    fn call<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<()> {
        // A file, not a pipe: the container inherits it and outlives the call.
        let errors = self.dir.path().join("stderr");
        let file = fs::File::create(&errors).with_context(|| errors.display().to_string())?;
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(self.dir.path().join("state")).args(args);
        let status = command
            // A limit of an hour, because the clock may jump during file reads (see `clock`).
            .env("ISOPOD_BOOT_TIMEOUT", "3600")
            .env("ISOPOD_KERNEL_PARAMS", self.kernel_params)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .status()
            .with_context(|| self.program.display().to_string())?;
        if !status.success() {
            let said = fs::read_to_string(&errors).unwrap_or_default();
            bail!("{command:?}: {status}: {}", said.trim());
        }
        Ok(())
    }
}

/// A running container.
pub(crate) struct Running<'a> {
    runtime: &'a Runtime,
    pid: Pid,
}

impl Running<'_> {
    /// Waits for the end of the container and deletes it. An exit status other than 0 is an error.
    pub(crate) fn wait(self) -> Result<()> {
        match self.delete()? {
            WaitStatus::Exited(_, 0) => Ok(()),
            other => bail!("{}: the container ended with {other:?}", self.runtime.name),
        }
    }

    /// Kills the container and deletes it.
    fn kill(self) -> Result<()> {
        self.runtime.call(["kill", ID, "KILL"])?;
        self.delete().map(drop)
    }

    /// Waits for the end of the container and deletes it.
    fn delete(&self) -> Result<WaitStatus> {
        let ended = waitpid(self.pid, None).context("cannot wait for the container")?;
        self.runtime.call(["delete", ID])?;
        Ok(ended)
    }
}
