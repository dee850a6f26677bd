//! The lab's machine: QEMU, and two virtiofsd for its file systems.

use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use super::command::text;
use super::options::LabOptions;
use super::qemu_install::{self, VIRTIOFSD_RUST};
use super::wire::{PORT_PREFIX, PORTS};
use crate::process::{bound_to_us, inheriting, tail};

/// Kernel command line: a quick boot, and a serial console for errors.
const CMDLINE: &str = "console=ttyS0 panic=-1 mitigations=off tsc=reliable no_timer_check \
                       apparmor=0 random.trust_cpu=on quiet";

/// Part of the kernel command line of a lab with one processor: no randomised addresses.
///
/// QEMU finds translated code by its virtual address too. With randomised addresses it translates a
/// program anew each time the program runs, which takes half of a test's time.
///
/// Not with several processors. QEMU is less exact then (see [`LabOptions`]), and with equal
/// addresses a processor executes an old translation of changed code more often. The lab's own
/// kernel has crashed from it.
const SAME_ADDRESSES: &str = "norandmaps";

/// Part of the kernel command line of a lab that does not count instructions.
///
/// By default Debian's kernel clears a page when it is taken from the free memory, and once more
/// for its new owner. In QEMU it is expensive to clear pages that had code, and every microVM
/// leaves such pages. SELinux has no policy here, so it is off too.
const LESS_WORK: &str = "init_on_alloc=0 selinux=0";

/// Part of the kernel command line of a lab that counts instructions. The lab's PID 1 looks for it.
pub(super) const COUNTING: &str = "lab.counting";

/// Number of lines of each log in an error message: enough for a kernel panic.
const LAST_LINES: usize = 40;

/// Part of QEMU's harmless warnings: no guest here needs these processor features.
const HARMLESS: &str = "TCG doesn't support requested feature";

/// The shares of this machine's files, and their tags and file names in the lab.
const SHARES: [&str; 2] = ["root", "work"];

/// Cache policy of the guest for a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cache {
    /// `always`: the host changes nothing.
    Always,
    /// `auto`: the host changes files. Names and attributes are cached for a second.
    Auto,
}

/// QEMU and its virtiofsd processes, all of them children of this process.
#[derive(Debug)]
pub(super) struct Machine {
    qemu: Child,
    virtiofsd: Vec<Child>,
    dir: PathBuf,
}

impl Machine {
    /// Starts the processes. Their sockets and logs are in `dir`; `work` is the writable share.
    pub(super) fn start(
        dir: &Path,
        kernel: &Path,
        work: &Path,
        options: &LabOptions,
    ) -> Result<Self> {
        let mut virtiofsd = Children(Vec::new());
        let [root, own] = SHARES;
        virtiofsd.0.push(share(dir, root, Path::new("/"), Cache::Always)?);
        virtiofsd.0.push(share(dir, own, work, Cache::Auto)?);
        let log = dir.join("qemu.log");
        let log = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        // Listening before QEMU starts: callers can connect at once.
        let ports = (0..PORTS).map(|number| listen(dir, &format!("port{number}.sock")));
        let ports: Vec<OwnedFd> = ports.collect::<Result<_>>()?;
        let mut qemu = bound_to_us(Command::new("qemu-system-x86_64"), Signal::SIGKILL);
        // Relative socket paths: sun_path has room for 107 bytes.
        qemu.envs(qemu_install::environment());
        qemu.current_dir(dir).args(arguments(kernel, &ports, options));
        let mut qemu = inheriting(qemu, ports);
        let qemu = qemu
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot duplicate a descriptor")?)
            .stderr(log)
            .spawn()
            .context("cannot run qemu-system-x86_64")?;
        let virtiofsd = std::mem::take(&mut virtiofsd.0);
        Ok(Self { qemu, virtiofsd, dir: dir.to_owned() })
    }

    /// QEMU's process id.
    pub(super) fn pid(&self) -> Pid {
        // Process ids are at most 2^22, so the cast is exact.
        Pid::from_raw(self.qemu.id().cast_signed())
    }

    /// The last lines of all logs, for an error message.
    pub(super) fn last_lines(&self) -> String {
        let mut words = String::new();
        for name in ["console.log", "qemu.log", "virtiofsd-root.log", "virtiofsd-work.log"] {
            let said = tail(&self.dir.join(name), LAST_LINES);
            let said: Vec<&str> = said.lines().filter(|line| !line.contains(HARMLESS)).collect();
            let said = said.join("\n");
            if !said.trim().is_empty() {
                words.push_str(&format!("\n--- {name}\n{said}"));
            }
        }
        words
    }

    /// The share whose virtiofsd has ended, if one has.
    pub(super) fn lost_share(&self) -> Option<&'static str> {
        let ended = |child: &Child| {
            let pid = Id::Pid(Pid::from_raw(child.id().cast_signed()));
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
            !matches!(waitid(pid, flags), Ok(WaitStatus::StillAlive))
        };
        SHARES
            .into_iter()
            .zip(&self.virtiofsd)
            .find(|(_, child)| ended(child))
            .map(|(name, _)| name)
    }

    /// Lists the system calls that the lab's threads wait in, for an error message.
    pub(super) fn waits(&self) -> String {
        let mut words = String::new();
        for child in [&self.qemu].into_iter().chain(&self.virtiofsd) {
            for task in tasks(child.id()) {
                let read = |name| fs::read_to_string(task.join(name)).unwrap_or_default();
                let status = read("status");
                let state =
                    status.lines().find(|line| line.starts_with("State:")).unwrap_or("gone");
                let (name, waits, call) = (read("comm"), read("wchan"), read("syscall"));
                let call = call.split(' ').next().unwrap_or_default();
                let name = name.trim();
                words.push_str(&format!("\n{name}: {state}, waits in {waits}, system call {call}"));
            }
        }
        words
    }

    /// QEMU's exit status, if QEMU has ended.
    pub(super) fn ended(&mut self) -> Result<Option<std::process::ExitStatus>> {
        self.qemu.try_wait().context("cannot wait for QEMU")
    }

    /// Waits until QEMU has ended.
    pub(super) fn wait(&mut self) -> Result<()> {
        self.qemu.wait().map(drop).context("cannot wait for QEMU")
    }

    /// Kills QEMU, and with it all processes of the lab, and then the virtiofsd processes.
    pub(super) fn stop(&mut self) {
        end(&mut self.qemu);
        for child in &mut self.virtiofsd {
            end(child);
        }
    }
}

/// Children that are killed when this value is dropped, unless they are taken out of it.
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        self.0.iter_mut().for_each(end);
    }
}

/// The directories in /proc of a process's threads.
fn tasks(pid: u32) -> Vec<PathBuf> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.map(|task| task.path()).collect()
}

/// Kills a child and waits for it.
fn end(child: &mut Child) {
    // Both fail only when the child has been waited for already.
    let _ = child.kill();
    let _ = child.wait();
}

/// Starts a virtiofsd that shares `source` on the socket `<name>.sock`.
fn share(dir: &Path, name: &str, source: &Path, cache: Cache) -> Result<Child> {
    let listener = listen(dir, &format!("{name}.sock"))?;
    let fd = listener.as_raw_fd();
    let log = dir.join(format!("virtiofsd-{name}.log"));
    let log = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let source = text(source)?;

    let mut command = if let Some(program) = qemu_install::own_virtiofsd() {
        let mut command = Command::new(program);
        let cache = if cache == Cache::Always { "always" } else { "auto" };
        command.args(["-o", &format!("source={source}"), "-o", &format!("cache={cache}")]);
        command.args(["-o", "xattr", "-o", "sandbox=chroot", "-o", "log_level=warn"]);
        command
    } else if Path::new(VIRTIOFSD_RUST).exists() {
        let mut command = Command::new(VIRTIOFSD_RUST);
        command.args(["--shared-dir", source, "--xattr", "--sandbox", "chroot"]);
        command.args(["--cache", if cache == Cache::Always { "always" } else { "auto" }]);
        command.args(["--inode-file-handles", "prefer"]);
        command
    } else {
        bail!(
            "there is no virtiofsd in /usr/lib/qemu/virtiofsd or {VIRTIOFSD_RUST}; install one of the \
             Debian packages qemu-system-common (12) and virtiofsd (13)"
        );
    };
    command.args([&format!("--fd={fd}"), "--thread-pool-size=0", "--rlimit-nofile=0"]);
    inheriting(bound_to_us(command, Signal::SIGKILL), vec![listener])
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("cannot duplicate a descriptor")?)
        .stderr(log)
        .spawn()
        .context("cannot run virtiofsd")
}

/// A socket that listens on `name` in `dir`.
fn listen(dir: &Path, name: &str) -> Result<OwnedFd> {
    let at = File::open(dir).with_context(|| format!("cannot open {}", dir.display()))?;
    let path = format!("/proc/self/fd/{}/{name}", at.as_raw_fd());
    UnixListener::bind(path)
        .map(OwnedFd::from)
        .with_context(|| format!("cannot listen on {}/{name}", dir.display()))
}

/// QEMU's command line.
fn arguments(kernel: &Path, ports: &[OwnedFd], options: &LabOptions) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut add = |words: &str| args.extend(words.split_whitespace().map(str::to_owned));
    add("-nodefaults -no-user-config -no-reboot -display none -machine q35");
    // -cx16: after an exit of the microVM, QEMU may execute cmpxchg16b with old flags. The guest's
    // slab allocator then branches wrongly, or keeps the trap flag set. Kernels do without the
    // instruction. A lab that counts instructions keeps it, because hardware has it.
    let allocator = if options.count { "" } else { ",-cx16" };
    add(&format!("-cpu EPYC-Rome,+svm,+npt{allocator}"));
    if options.count {
        add("-accel tcg,thread=single -icount shift=0,sleep=off -smp 1");
    } else {
        let code = options.translated_mib();
        add(&format!("-accel tcg,thread=multi,tb-size={code} -smp {}", options.cpus));
    }
    let memory = options.memory_mib;
    add(&format!("-m {memory} -object memory-backend-memfd,id=memory,size={memory}M,share=on"));
    add("-numa node,memdev=memory");
    for name in SHARES {
        add(&format!("-chardev socket,id={name},path={name}.sock"));
        add(&format!("-device vhost-user-fs-pci,chardev={name},tag=lab-{name},queue-size=1024"));
    }
    add(&format!("-device virtio-serial-pci,max_ports={}", PORTS + 1));
    for (number, port) in ports.iter().enumerate() {
        let fd = port.as_raw_fd();
        add(&format!("-chardev socket,id=port{number},fd={fd},server=on,wait=off"));
        add(&format!("-device virtserialport,chardev=port{number},name={PORT_PREFIX}{number}"));
    }
    add("-device virtio-rng-pci -serial file:console.log -initrd initramfs.cpio");
    let addresses = if options.cpus == 1 { SAME_ADDRESSES } else { "" };
    let kind = if options.count { COUNTING } else { LESS_WORK };
    args.extend(["-append".to_owned(), format!("{CMDLINE} {addresses} {kind}")]);
    args.extend(["-kernel".to_owned(), kernel.display().to_string()]);
    args
}
