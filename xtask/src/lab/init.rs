//! PID 1 of the lab: sets up the machine, runs a server for each virtio-serial port, and reaps
//! orphans. Runs inside the lab only.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, bail};
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{getpid, sethostname};

use super::cgroup::CGROUP;
use super::idle_vm::IdleVm;
use super::machine::COUNTING;
use super::port;
use super::wire::PORT_PREFIX;

/// Modules of the lab's kernel for sandboxes and their tests.
const MODULES: [&str; 4] = ["kvm_amd", "tun", "vhost_vsock", "vhost_net"];

/// Soft and hard limit of open files, as on a machine with systemd.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// Slack of timers in nanoseconds: the longest delay of a wakeup.
///
/// Timers that expire together cost one task switch. Without slack Go's runtime would wake every
/// 20 µs, too often for an emulated processor.
const TIMER_SLACK_NS: u64 = 5_000_000;

/// The real-time clock.
const CLOCK: &str = "/dev/rtc0";

/// Turns on the update interrupts of a real-time clock (include/uapi/linux/rtc.h).
const RTC_UIE_ON: libc::c_ulong = 0x7003;

/// Runs as PID 1. Returns only with an error: the kernel then panics and the lab ends.
pub(crate) fn main() -> Result<()> {
    if getpid().as_raw() != 1 {
        bail!("lab-init runs only as PID 1 of the lab");
    }
    // Errors go to the console: the host reports its last lines if the lab does not boot.
    set_up().inspect_err(|error| eprintln!("lab: {error:#}"))?;
    let _corrections = correct_processors().inspect_err(|error| eprintln!("lab: {error:#}"))?;
    let ports = ports().inspect_err(|error| eprintln!("lab: {error:#}"))?;
    let mut servers = HashMap::new();
    for device in ports {
        servers.insert(start_server(&device)?, device);
    }
    loop {
        let ended = match wait().context("cannot wait for a process")? {
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _) => pid.as_raw(),
            _ => continue,
        };
        if let Some(device) = servers.remove(&ended) {
            eprintln!("lab: the server of {} ended; starting another", device.display());
            servers.insert(start_server(&device)?, device);
        }
    }
}

/// Serves one port. PID 1 starts this program once for each port.
pub(crate) fn serve_port(device: &Path) -> Result<()> {
    port::serve(device).inspect_err(|error| eprintln!("lab: {}: {error:#}", device.display()))
}

/// Mounts the kernel's file systems, loads modules, and sets what an init system would set.
fn set_up() -> Result<()> {
    let none = MsFlags::empty();
    for (kind, target, data) in [
        ("devpts", "/dev/pts", "mode=0620,gid=5,ptmxmode=0666"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("mqueue", "/dev/mqueue", ""),
        ("cgroup2", CGROUP, ""),
        ("securityfs", "/sys/kernel/security", ""),
        ("bpf", "/sys/fs/bpf", "mode=0700"),
        ("debugfs", "/sys/kernel/debug", ""),
        ("tracefs", "/sys/kernel/tracing", ""),
    ] {
        if !target.starts_with("/sys") {
            fs::create_dir_all(target).with_context(|| format!("cannot create {target}"))?;
        }
        mount(Some(kind), target, Some(kind), none, Some(data))
            .with_context(|| format!("cannot mount {kind} on {target}"))?;
    }
    delegate_cgroups()?;
    for module in MODULES {
        run("modprobe", &[module])?;
    }
    run("ip", &["link", "set", "lo", "up"])?;
    write("/proc/sys/net/ipv4/ip_forward", "1")?;
    write("/proc/sys/kernel/printk", "4")?;
    sethostname("isopod-lab").context("cannot set the host name")?;
    let (soft, hard) = OPEN_FILES;
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).context("cannot set the limit of open files")?;
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, Path::new("/dev").join(link))
            .with_context(|| format!("cannot link /dev/{link}"))?;
    }
    Ok(())
}

/// Corrections of QEMU's emulated processors. They hold until the value is dropped.
struct Corrections {
    _idle_vm: Option<IdleVm>,
    _clock: File,
}

/// Corrects faults of QEMU's emulated processors, and makes up for their slowness.
///
/// Real processors need none of this. A lab that counts instructions does none of it, so that its
/// figures are those of the defaults.
///
/// Lost wakeups: QEMU (up to version 10 at least) does not load the interrupt shadow at VMRUN. A
/// guest that is interrupted between STI and HLT then handles its next interrupt before the HLT. It
/// sleeps although that interrupt gave it work, sometimes until another interrupt comes. In a guest
/// the clocksource watchdog interrupts twice a second. A lab itself has slept for minutes, so its
/// real-time clock interrupts it. With several processors more wakeups are lost, so guests keep
/// their tick (`nohz=off`); see [`IdleVm`] for another fault.
///
/// Speed: addresses are not randomised in guests and lab (`norandmaps`; see `SAME_ADDRESSES` in
/// machine.rs). All processes of the lab inherit the timer slack. Guests on one processor share
/// their kernel, so QEMU translates its shared pages once.
fn correct_processors() -> Result<Option<Corrections>> {
    let cmdline = fs::read_to_string("/proc/cmdline").context("cannot read /proc/cmdline")?;
    if cmdline.split_whitespace().any(|word| word == COUNTING) {
        return Ok(None);
    }
    prctl::set_timerslack(TIMER_SLACK_NS).context("cannot set the slack of timers")?;
    let processors = thread::available_parallelism().context("cannot count the processors")?;
    let several = processors.get() > 1;
    let config = if several {
        "kernel_params = \"nohz=off norandmaps\"\n"
    } else {
        "kernel_params = \"norandmaps\"\nshare_kernel = true\n"
    };
    fs::create_dir_all("/etc/isopod").context("cannot create /etc/isopod")?;
    write("/etc/isopod/config.toml", config)?;
    let clock = ticking_clock().with_context(|| format!("cannot have {CLOCK} tick"))?;
    let idle_vm = several.then(IdleVm::new).transpose()?;
    Ok(Some(Corrections { _idle_vm: idle_vm, _clock: clock }))
}

/// Opens the real-time clock with update interrupts on: one a second, or 64 a second with an HPET.
///
/// The interrupts end when the file is closed.
fn ticking_clock() -> io::Result<File> {
    let clock = File::open(CLOCK)?;
    // SAFETY: the request takes no argument and touches no memory of this process.
    let done = unsafe { libc::ioctl(clock.as_raw_fd(), RTC_UIE_ON) };
    if done == 0 { Ok(clock) } else { Err(io::Error::last_os_error()) }
}

/// Moves this process out of the root cgroup and enables all controllers below the root.
///
/// Commands can then create their own cgroups with controllers.
fn delegate_cgroups() -> Result<()> {
    let own = format!("{CGROUP}/init");
    fs::create_dir(&own).with_context(|| format!("cannot create {own}"))?;
    write(&format!("{own}/cgroup.procs"), "1")?;
    let controllers = format!("{CGROUP}/cgroup.controllers");
    let controllers =
        fs::read_to_string(&controllers).with_context(|| format!("cannot read {controllers}"))?;
    let all: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    write(&format!("{CGROUP}/cgroup.subtree_control"), &all.join(" "))
}

/// Links `/dev/virtio-ports/NAME` to each port, as udev does. Returns the ports for commands.
fn ports() -> Result<Vec<PathBuf>> {
    let class = Path::new("/sys/class/virtio-ports");
    fs::create_dir_all("/dev/virtio-ports").context("cannot create /dev/virtio-ports")?;
    let mut ports = Vec::new();
    for entry in fs::read_dir(class).with_context(|| format!("cannot list {}", class.display()))? {
        let entry = entry.with_context(|| format!("cannot list {}", class.display()))?;
        // The file is missing for a port without a name.
        let Ok(name) = fs::read_to_string(entry.path().join("name")) else { continue };
        let name = name.trim();
        let device = Path::new("/dev").join(entry.file_name());
        symlink(&device, Path::new("/dev/virtio-ports").join(name))
            .with_context(|| format!("cannot link /dev/virtio-ports/{name}"))?;
        if name.starts_with(PORT_PREFIX) {
            ports.push(device);
        }
    }
    Ok(ports)
}

/// Starts the server of a port. Returns its process id.
fn start_server(device: &Path) -> Result<i32> {
    let server = Command::new("/proc/self/exe")
        .arg("lab-port")
        .arg(device)
        .spawn()
        .with_context(|| format!("cannot start the server of {}", device.display()))?;
    i32::try_from(server.id()).context("a process id is out of range")
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let status = Command::new(program)
        .args(args)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    if !status.success() {
        bail!("{program} {} failed ({status})", args.join(" "));
    }
    Ok(())
}

fn write(path: &str, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {text:?} to {path}"))
}
