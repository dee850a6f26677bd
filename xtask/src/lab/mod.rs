//! The lab: a virtual machine with a real `kvm_amd`, for machines that have no hardware KVM.
//!
//! QEMU emulates an AMD processor with nested paging and boots Debian's cloud kernel on this
//! machine's own root file system: shared read-only over virtio-fs, with a tmpfs on top that takes
//! all writes. Cargo's target directory is shared a second time, writable, at the same path. What the host
//! changes elsewhere while a lab runs may not be seen in it.
//!
//! ```text
//! host                                        lab
//! Lab::boot --- qemu (child)                  initramfs.sh -> lab-init (PID 1)
//!           \-- 2 x virtiofsd (children)                        |- lab-port (one a port)
//! Lab::run --- portN.sock --- virtio-serial --- /dev/vportXpN --/     \- the command
//! ```

pub(crate) mod background;
mod child;
mod client;
pub(crate) mod command;
mod idle_vm;
pub(crate) mod init;
mod initramfs;
mod kernel;
mod machine;
mod port;
mod wire;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

pub(crate) use client::{Ended, Input, Show};
use machine::Machine;

use crate::apt::{self, Need};
use crate::progress::step;
use crate::repository;

/// How the names of the ports begin that take commands.
const PORT_PREFIX: &str = "isopod.lab.";

/// Ports, and so commands at a time.
const PORTS: usize = 8;

/// What the lab needs from Debian.
pub(crate) const NEEDS: [Need; 8] = [
    Need { package: "qemu-system-x86", purpose: "the lab's machine" },
    Need { package: "qemu-system-common", purpose: "virtiofsd, the lab's file systems" },
    Need { package: "busybox-static", purpose: "the lab's initramfs" },
    Need { package: "cpio", purpose: "the lab's initramfs" },
    Need { package: "xz-utils", purpose: "the lab's modules" },
    Need { package: "kmod", purpose: "the lab's modules" },
    Need { package: "iproute2", purpose: "network set-up in the lab" },
    Need { package: "dpkg", purpose: "unpacking the lab's kernel" },
];

/// What kind of lab to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// Guest time advances with instructions executed, a million a millisecond, on one processor.
    pub(crate) count: bool,
    /// Number of processors; one when counting. QEMU is not exact when it emulates several, which
    /// shows once in some hundred microVMs: with more than one, be ready for that.
    pub(crate) cpus: usize,
    /// Memory in MiB.
    pub(crate) memory_mib: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self::for_one_of(1)
    }
}

impl Options {
    /// For each of `labs` labs that run at the same time.
    pub(crate) fn for_one_of(labs: usize) -> Self {
        Self { count: false, cpus: 1, memory_mib: memory_mib(labs as u64) }
    }
}

/// 8 GiB, or the share of a lab in half of what the machine has.
fn memory_mib(labs: u64) -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total_kib = info
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<u64>().ok());
    // The lab's memory is only taken as it is used.
    total_kib.map_or(4096, |kib| (kib / 1024 / 2 / labs).clamp(2048, 8192))
}

/// A command to run in a lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    /// Program and arguments.
    pub(crate) argv: Vec<String>,
    /// Its whole environment.
    pub(crate) env: Vec<(String, String)>,
    /// Its working directory.
    pub(crate) cwd: PathBuf,
    /// In a lab, how long it may print nothing before it is ended.
    pub(crate) quiet_limit: Option<Duration>,
}

impl Run {
    /// `argv` with this process's environment and working directory.
    pub(crate) fn here(argv: Vec<String>) -> Result<Self> {
        // What is not UTF-8 cannot be passed on.
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        let env = std::env::vars_os().filter_map(text).collect();
        let cwd = std::env::current_dir().context("cannot tell the working directory")?;
        Ok(Self { argv, env, cwd, quiet_limit: None })
    }

    /// Sets one variable.
    pub(crate) fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.retain(|(have, _)| have != name);
        self.env.push((name.to_owned(), value.into()));
        self
    }

    fn to_json(&self) -> Result<Vec<u8>> {
        let cwd = self.cwd.to_str().context("the working directory is not UTF-8")?;
        let value = json!({ "argv": self.argv, "env": self.env, "cwd": cwd });
        Ok(value.to_string().into_bytes())
    }

    fn from_json(json: &[u8]) -> Result<Self> {
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

/// A running lab, which ends with this value or with this process.
#[derive(Debug)]
pub(crate) struct Lab {
    machine: Machine,
    dir: PathBuf,
    /// Held for as long as the lab runs.
    _lock: Flock<File>,
}

impl Lab {
    /// Boots a lab under `name`, which no other running lab of this checkout has.
    ///
    /// # Errors
    ///
    /// A package cannot be installed, the name is in use, or the lab does not boot, with the end of
    /// its console. Nothing is left running.
    pub(crate) fn boot(name: &str, options: &Options) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the lab shares this machine's files and so has to be booted by root");
        }
        apt::ensure(NEEDS)?;
        let kernel = kernel::ensure()?;
        let dir = directory(name);
        let lock = {
            // Between a lock's file and its lock, another thread would sweep it away.
            static CLAIM: Mutex<()> = Mutex::new(());
            let _one = CLAIM.lock().unwrap_or_else(PoisonError::into_inner);
            sweep();
            fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
            claim(&dir)?
        };
        let what = if options.count { "boot the lab (counting)" } else { "boot the lab" };
        step(what, || {
            // PID 1 is this program, as it is now: a copy that no build replaces.
            let init = dir.join("lab-init");
            let own = std::env::current_exe().context("cannot tell where this program is")?;
            fs::copy(&own, &init)
                .with_context(|| format!("cannot copy {} to {}", own.display(), init.display()))?;
            initramfs::write(&dir, &kernel, &init, &repository::target())?;
            let mut machine = Machine::start(&dir, &kernel.image, &repository::target(), options)?;
            client::await_boot(&dir, &mut machine)?;
            Ok(Self { machine, dir: dir.clone(), _lock: lock })
        })
    }

    /// Boots a lab that nobody else knows of.
    pub(crate) fn private(options: &Options) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self::boot(&format!("private-{}-{number}", std::process::id()), options)
    }

    /// Runs a command with its standard error on this process's own, and returns how it ended.
    pub(crate) fn run(&self, run: &Run, input: Input, show: &mut Show<'_>) -> Result<Ended> {
        client::run(&self.dir, run, input, show)
    }

    /// Waits until the lab ends by itself.
    fn wait(&mut self) -> Result<()> {
        self.machine.wait()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.machine.stop();
        // Nothing of it is needed again; the next boot sweeps up what cannot be removed now.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Fetches and unpacks what labs boot, for those that are about to boot side by side.
pub(crate) fn prepare() -> Result<()> {
    apt::ensure(NEEDS)?;
    kernel::ensure().map(drop)
}

/// Where the files of the lab called `name` are while it runs.
fn directory(name: &str) -> PathBuf {
    shelf().join(name)
}

fn shelf() -> PathBuf {
    repository::target().join("lab")
}

/// Takes the lock of a lab's directory, which says that the lab is alive.
fn claim(dir: &Path) -> Result<Flock<File>> {
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| error)
        .with_context(|| format!("another lab uses {}", dir.display()))
}

/// Removes the directories of labs whose process was killed.
fn sweep() {
    let Ok(entries) = fs::read_dir(shelf()) else { return };
    for entry in entries.filter_map(Result::ok) {
        let dead = File::open(entry.path().join("lock"))
            .map(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock));
        if let Ok(Ok(_lock)) = dead {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
