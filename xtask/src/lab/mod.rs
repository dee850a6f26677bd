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
pub(crate) mod qemu;
mod wire;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

pub(crate) use client::{Ended, Input, Show};
use machine::Machine;

use crate::apt::{self, Need};
use crate::progress::step;
use crate::repository;

/// How the names of the ports begin that take commands.
const PORT_PREFIX: &str = "isopod.lab.";

/// The file of the running program, even when its name stands for another one by now.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// Ports, and so commands at a time.
const PORTS: usize = 8;

const NEEDS: [Need; 8] = [
    Need { package: "qemu-system-x86", purpose: "the lab's machine" },
    Need { package: "qemu-system-common", purpose: "the lab's machine" },
    Need { package: "busybox-static", purpose: "the lab's initramfs" },
    Need { package: "cpio", purpose: "the lab's initramfs" },
    Need { package: "xz-utils", purpose: "the lab's modules" },
    Need { package: "kmod", purpose: "the lab's modules" },
    Need { package: "iproute2", purpose: "network set-up in the lab" },
    Need { package: "dpkg", purpose: "unpacking the lab's kernel" },
];

const VIRTIOFSD: Need = Need { package: "virtiofsd", purpose: "the lab's file systems" };

/// What the lab needs from Debian, as far as can be told now: a release that has virtiofsd in a
/// package of its own is known as such when apt has its lists.
pub(crate) fn needs() -> impl Iterator<Item = Need> {
    let own = qemu::own_virtiofsd().is_none() && apt::knows(VIRTIOFSD.package);
    NEEDS.into_iter().chain(own.then_some(VIRTIOFSD))
}

/// Installs what the lab needs: what a release may have in a package of its own only when the rest,
/// which may bring it, is there.
fn install() -> Result<()> {
    apt::ensure(NEEDS)?;
    if qemu::has_virtiofsd() { Ok(()) } else { apt::ensure([VIRTIOFSD]) }
}

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
        Self { count: false, cpus: 1, memory_mib: (total_mib() / 2).clamp(2048, MOST_MIB) }
    }
}

impl Options {
    /// How many labs this machine can run at the same time for `jobs` jobs, and what each is like.
    pub(crate) fn side_by_side(jobs: usize) -> (usize, Self) {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let (labs, memory_mib) = share(cpus.min(jobs), total_mib());
        (labs, Self { count: false, cpus: 1, memory_mib })
    }

    /// Room in MiB for the code that QEMU has translated. A microVM adds 50 if it does not share its
    /// kernel, which is then new to QEMU each time. When the room is full, QEMU begins anew with all of it.
    /// At most 2 GiB (QEMU's `MAX_CODE_GEN_BUFFER_SIZE`).
    fn translated_mib(&self) -> u64 {
        (self.memory_mib / 4).clamp(512, 2047)
    }
}

/// Memory in MiB of a lab that runs all tests: those of a guest of 4 GiB need more than that.
const TEST_MIB: u64 = 6 * 1024;

/// Most memory in MiB that a lab can use.
const MOST_MIB: u64 = 8 * 1024;

/// How many labs `cpus` processors and `total_mib` MiB of memory are enough for, and the memory in
/// MiB of each. It is only taken as it is used, so together they may have all there is.
fn share(cpus: usize, total_mib: u64) -> (usize, u64) {
    let room = usize::try_from(total_mib / TEST_MIB).unwrap_or(usize::MAX);
    let labs = cpus.min(room).clamp(1, 4);
    (labs, (total_mib / labs as u64).min(MOST_MIB))
}

/// This machine's memory in MiB.
fn total_mib() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total_kib = info
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<u64>().ok());
    total_kib.map_or(MOST_MIB, |kib| kib / 1024)
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
        let value = json!({ "argv": self.argv, "env": self.env, "cwd": text(&self.cwd)? });
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
        install()?;
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
            // PID 1 is this program, as it is now, though a build may have replaced its file: a copy.
            let init = dir.join("lab-init");
            fs::copy(OWN_PROGRAM, &init)
                .with_context(|| format!("cannot copy {OWN_PROGRAM} to {}", init.display()))?;
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
    ///
    /// # Errors
    ///
    /// If the lab was lost, with what it said last.
    pub(crate) fn run(&self, run: &Run, input: Input, show: &mut Show<'_>) -> Result<Ended> {
        client::run(&self.dir, run, input, show).map_err(|error| {
            if error.is::<client::Lost>() {
                anyhow!("{error:#}{}", self.machine.last_words())
            } else {
                error
            }
        })
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
    install()?;
    kernel::ensure().map(drop)
}

/// Names the kernel that labs boot, its version included.
pub(crate) fn kernel_name() -> Result<String> {
    Ok(kernel::ensure()?.image.display().to_string())
}

/// Those of `paths` that a lab does not show as they are on this machine; see [`initramfs::hidden`].
pub(crate) fn hidden(paths: &[PathBuf]) -> Vec<PathBuf> {
    initramfs::hidden(paths, &repository::target())
}

/// A path as text, which is how the lab is told of it.
pub(crate) fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8, which the lab needs", path.display()))
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

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn labs_have_room_for_a_guest_of_4_gib() {
        assert_eq!(share(2, 24_000), (2, 8192));
        assert_eq!(share(8, 15_900), (2, 7950));
        assert_eq!(share(8, 64_000), (4, 8192));
        assert_eq!(share(4, 7_900), (1, 7900));
        assert_eq!(share(0, 3_900), (1, 3900));
    }
}
