//! Boot and end of a lab.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::fcntl::{Flock, FlockArg};

use super::command::{Ended, Input, Run, Show};
use super::machine::Machine;
use super::options::LabOptions;
use super::{client, initramfs, kernel, qemu_install};
use crate::apt::{self, Need};
use crate::cache;
use crate::progress::step;
use crate::repository;

/// The file of the running program, even if a build has replaced it under its name.
pub(super) const OWN_PROGRAM: &str = "/proc/self/exe";

/// Debian packages of every lab.
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

/// Debian package of virtiofsd, in releases whose QEMU package comes without it.
const VIRTIOFSD: Need = Need { package: "virtiofsd", purpose: "the lab's file systems" };

/// Debian packages of the lab, as far as they can be told now.
///
/// The separate package of virtiofsd is among them if apt's present lists have it.
pub(crate) fn needs() -> impl Iterator<Item = Need> {
    let own = qemu_install::own_virtiofsd().is_none() && apt::knows(VIRTIOFSD.package);
    NEEDS.into_iter().chain(own.then_some(VIRTIOFSD))
}

/// Installs the packages of the lab.
///
/// The separate package of virtiofsd comes last, and only if QEMU's packages brought no virtiofsd.
fn install() -> Result<()> {
    apt::ensure(NEEDS)?;
    if qemu_install::has_virtiofsd() { Ok(()) } else { apt::ensure([VIRTIOFSD]) }
}

/// A running lab. It ends when this value is dropped, and when this process ends.
#[derive(Debug)]
pub(crate) struct Lab {
    pub(super) machine: Machine,
    pub(super) dir: PathBuf,
    /// Lock of `dir`, held for as long as the lab runs.
    _lock: Flock<File>,
}

impl Lab {
    /// Boots a lab under `name`. No other running lab of this checkout may have that name.
    ///
    /// After an error nothing is left running. If the lab does not boot, the error has the last
    /// lines of its console.
    pub(crate) fn boot(name: &str, options: &LabOptions) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the lab shares all files of this machine, so it must be booted by root");
        }
        install()?;
        let kernel = kernel::ensure()?;
        let dir = directory(name);
        let lock = {
            // One thread at a time: `sweep` removes a directory whose lock file is not locked yet.
            static CLAIM: Mutex<()> = Mutex::new(());
            let _one = CLAIM.lock().unwrap_or_else(PoisonError::into_inner);
            sweep();
            fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
            claim(&dir)?
        };
        let what = if options.count { "boot the lab (counting)" } else { "boot the lab" };
        step(what, || {
            // A copy of this program becomes PID 1. Its file may be replaced by a build meanwhile.
            let init = dir.join("lab-init");
            fs::copy(OWN_PROGRAM, &init)
                .with_context(|| format!("cannot copy {OWN_PROGRAM} to {}", init.display()))?;
            initramfs::write(&dir, &kernel, &init, &repository::target())?;
            let mut machine = Machine::start(&dir, &kernel.image, &repository::target(), options)?;
            client::await_boot(&dir, &mut machine)?;
            Ok(Self { machine, dir: dir.clone(), _lock: lock })
        })
    }

    /// Boots a lab under a name that only this process uses.
    pub(crate) fn private(options: &LabOptions) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self::boot(&format!("private-{}-{number}", std::process::id()), options)
    }

    /// Runs a command, with its standard error on this process's own.
    ///
    /// If the lab was lost, the error has the last lines of its logs.
    pub(crate) fn run(&self, run: &Run, input: Input, show: &mut Show<'_>) -> Result<Ended> {
        let lost = || {
            let share = self.machine.lost_share().map(client::Lost::Share);
            share.or_else(|| client::hangs(&self.dir).then_some(client::Lost::Hung))
        };
        client::run(&self.dir, run, input, show, &lost).map_err(|error| {
            if error.is::<client::Lost>() {
                anyhow!("{error:#}{}{}", self.machine.waits(), self.machine.last_lines())
            } else {
                error
            }
        })
    }

    /// Waits until the lab ends by itself.
    pub(super) fn wait(&mut self) -> Result<()> {
        self.machine.wait()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.machine.stop();
        // `sweep` in the next boot removes a directory that cannot be removed now.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Installs the packages and fetches the kernel of labs, before several labs boot at the same time.
pub(crate) fn prepare() -> Result<()> {
    install()?;
    kernel::ensure().map(drop)
}

/// Name of the labs' kernel: its path in the cache, which contains the kernel's version.
pub(crate) fn kernel_name() -> Result<String> {
    let image = kernel::ensure()?.image;
    Ok(image.strip_prefix(cache::root()?).unwrap_or(&image).display().to_string())
}

/// The `paths` that are hidden or writable in a lab; see [`initramfs::hidden`].
pub(crate) fn hidden(paths: &[PathBuf]) -> Vec<PathBuf> {
    initramfs::hidden(paths, &repository::target())
}

/// Directory of the files of the lab `name` while it runs.
pub(super) fn directory(name: &str) -> PathBuf {
    shelf().join(name)
}

/// Directory of the directories of all labs.
pub(super) fn shelf() -> PathBuf {
    repository::target().join("lab")
}

/// Locks a lab's directory. The lock is held for as long as the lab is alive.
fn claim(dir: &Path) -> Result<Flock<File>> {
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| error)
        .with_context(|| format!("another lab uses {}", dir.display()))
}

/// Removes the directories of labs whose process was killed: their locks are free.
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
