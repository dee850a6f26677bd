//! An OCI runtime's command line: a container's cycle, and a process in a running container.

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

/// The id of every container: there is one at a time.
const ID: &str = "bench";

/// A runtime and room for its state.
pub(crate) struct Runtime {
    /// What it is called in figures.
    pub(crate) name: &'static str,
    program: PathBuf,
    dir: TempDir,
    /// Of its guests' kernel. A runtime without any does not look at them.
    kernel_params: &'static str,
}

impl Runtime {
    /// The runtime `program`.
    ///
    /// # Errors
    ///
    /// If no directory can be made for its state.
    pub(crate) fn new(name: &'static str, program: impl Into<PathBuf>) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a directory")?;
        Ok(Self { name, program: program.into(), dir, kernel_params: "" })
    }

    /// The same with parameters for its guests' kernel.
    pub(crate) fn kernel_params(self, kernel_params: &'static str) -> Self {
        Self { kernel_params, ..self }
    }

    /// Units of `create`, `start`, the wait for the end of the container, and `delete`.
    ///
    /// # Errors
    ///
    /// If any of them fails, or the container's process does.
    pub(crate) fn cycle(&self, bundle: &Path) -> Result<f64> {
        let start = clock::now()?;
        self.start(bundle)?.wait()?;
        Ok(clock::now()? - start)
    }

    /// A container as `bundle` says, but for `change`.
    ///
    /// # Errors
    ///
    /// If a call fails.
    pub(crate) fn start_changed(
        &self,
        bundle: &Path,
        change: impl FnOnce(&mut Value),
    ) -> Result<Running<'_>> {
        self.start(&self.changed(bundle, change)?)
    }

    fn start(&self, bundle: &Path) -> Result<Running<'_>> {
        let pid = self.create(bundle)?;
        self.call(["start", ID])?;
        Ok(Running { runtime: self, pid })
    }

    /// Units of `exec` of /bin/true, each of `runs` times, in a container that does nothing.
    ///
    /// # Errors
    ///
    /// If a call fails.
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
        // The first warms the page cache.
        Ok(took.split_off(1))
    }

    /// A bundle with the root file system of `bundle` and a changed config.json.
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

    /// Creates the container and returns the process that ends with it: a child of this one by
    /// then, which is a subreaper.
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

    fn call<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<()> {
        // A file, not a pipe: the container has it as well, and outlives the call.
        let errors = self.dir.path().join("stderr");
        let file = fs::File::create(&errors).with_context(|| errors.display().to_string())?;
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(self.dir.path().join("state")).args(args);
        let status = command
            // As far away as can be: the clock may jump while files are read (see `clock`).
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

/// A container that runs.
pub(crate) struct Running<'a> {
    runtime: &'a Runtime,
    pid: Pid,
}

impl Running<'_> {
    /// Waits for its end and deletes it.
    ///
    /// # Errors
    ///
    /// If its process did not succeed, or it cannot be deleted.
    pub(crate) fn wait(self) -> Result<()> {
        match self.delete()? {
            WaitStatus::Exited(_, 0) => Ok(()),
            other => bail!("{}: the container ended with {other:?}", self.runtime.name),
        }
    }

    fn kill(self) -> Result<()> {
        self.runtime.call(["kill", ID, "KILL"])?;
        self.delete().map(drop)
    }

    fn delete(&self) -> Result<WaitStatus> {
        let ended = waitpid(self.pid, None).context("cannot wait for the container")?;
        self.runtime.call(["delete", ID])?;
        Ok(ended)
    }
}
