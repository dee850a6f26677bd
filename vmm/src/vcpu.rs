//! vCPU threads. They run guest code, and handle its accesses to buses.
//!
//! ```text
//!             resume                 pause
//!   Paused ------------> Running ------------> Paused
//!      \                    |
//!       `------ stop ------>+------ stop ----> Stopped (the thread ends)
//! ```

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::control::EndReason;
use crate::end::EndSignal;
use crate::sync::lock;

/// Mode of all vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Paused,
    Running,
    Stopped,
}

/// Exits to this process, by kind.
#[derive(Debug, Default)]
pub struct ExitCounts {
    port_in: AtomicU64,
    port_out: AtomicU64,
    mmio_read: AtomicU64,
    mmio_write: AtomicU64,
    other: AtomicU64,
}

impl ExitCounts {
    fn add_to(&self, sums: &mut BTreeMap<String, u64>) {
        for (name, count) in [
            ("user:port-in", &self.port_in),
            ("user:port-out", &self.port_out),
            ("user:mmio-read", &self.mmio_read),
            ("user:mmio-write", &self.mmio_write),
            ("user:other", &self.other),
        ] {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                *sums.entry(name.to_owned()).or_default() += count;
            }
        }
    }
}

/// Data shared by the vCPU threads and [`Vcpus`].
struct Shared {
    mode: Mutex<Mode>,
    changed: Condvar,
    parked: Condvar,
    parked_count: Mutex<usize>,
    exits: ExitCounts,
    end: Arc<EndSignal>,
    mmio: Bus,
    ports: Bus,
}

/// All vCPUs of the machine. Dropping the value stops and joins their threads.
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each vCPU. All threads wait for [`Vcpus::resume`].
    pub fn spawn(
        vcpus: Vec<VcpuFd>,
        mmio: Bus,
        ports: Bus,
        end: Arc<EndSignal>,
    ) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), on_kick)
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        let shared = Arc::new(Shared {
            mode: Mutex::new(Mode::Paused),
            changed: Condvar::new(),
            parked: Condvar::new(),
            parked_count: Mutex::new(0),
            exits: ExitCounts::default(),
            end,
            mmio,
            ports,
        });
        let mut all = Self { shared: Arc::clone(&shared), threads: Vec::new() };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let shared = Arc::clone(&shared);
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(256 * 1024)
                .spawn(move || shared.run(vcpu))?;
            all.threads.push(thread);
        }
        Ok(all)
    }

    /// Runs all vCPUs.
    pub fn resume(&self) {
        self.shared.set_mode(Mode::Running);
    }

    /// Pauses all vCPUs before their next instruction, and waits for them. False if one takes
    /// longer than `limit`: all vCPUs continue then.
    pub fn pause(&self, limit: Duration) -> bool {
        let before = self.shared.mode();
        self.shared.set_mode(Mode::Paused);
        self.kick();
        let count = lock(&self.shared.parked_count);
        let (count, waited) = self
            .shared
            .parked
            .wait_timeout_while(count, limit, |count| *count < self.threads.len())
            .unwrap_or_else(PoisonError::into_inner);
        drop(count);
        if waited.timed_out() {
            self.shared.set_mode(before);
        }
        !waited.timed_out()
    }

    /// Returns true if the vCPUs do not run.
    pub fn is_paused(&self) -> bool {
        self.shared.mode() != Mode::Running
    }

    /// Adds the exits to this process since the start to `sums`.
    pub fn add_exits(&self, sums: &mut BTreeMap<String, u64>) {
        self.shared.exits.add_to(sums);
    }

    fn kick(&self) {
        for thread in &self.threads {
            // SAFETY: the handle has not been joined, so the thread id is valid even if the thread
            // has ended. The signal's handler only writes to the thread's own `kvm_run`.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.shared.set_mode(Mode::Stopped);
        self.kick();
        for thread in self.threads.drain(..) {
            // A vCPU thread that panicked has ended, as required here.
            let _ = thread.join();
        }
    }
}

thread_local! {
    /// The `kvm_run` page of this thread's vCPU.
    static CURRENT_RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// Makes the current or the next `KVM_RUN` of this thread return (KVM API, `immediate_exit`).
extern "C" fn on_kick(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    let run = CURRENT_RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer is to the mapping of the vCPU that this thread owns. It is null
        // before the vCPU is made and after it is gone. A byte store cannot tear.
        unsafe { (*run).immediate_exit = 1 };
    }
}

impl Shared {
    fn mode(&self) -> Mode {
        *lock(&self.mode)
    }

    fn set_mode(&self, mode: Mode) {
        let mut current = lock(&self.mode);
        if *current != Mode::Stopped {
            *current = mode;
        }
        self.changed.notify_all();
    }

    /// Waits while paused. False on the stop.
    fn may_run(&self, vcpu: &VcpuFd) -> bool {
        let mut mode = lock(&self.mode);
        if *mode == Mode::Paused {
            // Prevents the guest's watchdogs from taking the pause for a hung processor. KVM
            // refuses the call for a guest without KVM's clock, which does not need it.
            let _ = vcpu.kvmclock_ctrl();
            self.count_parked(1);
            while *mode == Mode::Paused {
                mode = self.changed.wait(mode).unwrap_or_else(PoisonError::into_inner);
            }
            self.count_parked(-1);
        }
        *mode == Mode::Running
    }

    fn count_parked(&self, by: isize) {
        let mut count = lock(&self.parked_count);
        *count = count.saturating_add_signed(by);
        self.parked.notify_all();
    }

    fn run(&self, mut vcpu: VcpuFd) {
        CURRENT_RUN.set(vcpu.get_kvm_run());
        while self.may_run(&vcpu) {
            if let Err(reason) = self.run_until_interrupted(&mut vcpu) {
                self.end.give(reason);
                break;
            }
        }
        CURRENT_RUN.set(ptr::null_mut());
        // A pause need not wait for this thread any more.
        self.count_parked(1);
    }

    /// Runs guest code until a kick.
    fn run_until_interrupted(&self, vcpu: &mut VcpuFd) -> Result<(), EndReason> {
        loop {
            match vcpu.run() {
                Ok(exit) => self.handle(exit)?,
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                    vcpu.set_kvm_immediate_exit(0);
                    return Ok(());
                }
                Err(e) => return Err(failed(format!("KVM_RUN: {e}"))),
            }
            if matches!(vcpu.get_kvm_run().exit_reason, kvm_bindings::KVM_EXIT_INTERNAL_ERROR) {
                return Err(failed(internal_error(vcpu.get_kvm_run())));
            }
        }
    }

    fn handle(&self, exit: VcpuExit<'_>) -> Result<(), EndReason> {
        let counter = match exit {
            VcpuExit::IoIn(port, data) => {
                data.chunks_mut(port_access_len()).for_each(|x| self.ports.read(port.into(), x));
                &self.exits.port_in
            }
            VcpuExit::IoOut(port, data) => {
                data.chunks(port_access_len()).for_each(|x| self.ports.write(port.into(), x));
                &self.exits.port_out
            }
            VcpuExit::MmioRead(address, data) => {
                self.mmio.read(address, data);
                &self.exits.mmio_read
            }
            VcpuExit::MmioWrite(address, data) => {
                self.mmio.write(address, data);
                &self.exits.mmio_write
            }
            // No device waits for the end of an interrupt. The guest may still ask for the exit.
            VcpuExit::IoapicEoi(_) | VcpuExit::Intr | VcpuExit::InternalError => &self.exits.other,
            VcpuExit::Shutdown => return Err(EndReason::TripleFault),
            VcpuExit::SystemEvent(kind, _) => {
                return Err(match kind {
                    kvm_bindings::KVM_SYSTEM_EVENT_CRASH => EndReason::GuestPanic,
                    _ => EndReason::GuestShutdown,
                });
            }
            VcpuExit::FailEntry(reason, cpu) => {
                return Err(failed(format!(
                    "KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x}, on processor {cpu}"
                )));
            }
            other => return Err(failed(format!("unexpected exit {other:?}"))),
        };
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Returns the length in bytes of one access to a port. An exit for `rep outs` or `rep ins` has
/// several accesses.
fn port_access_len() -> usize {
    // SAFETY: the pointer is to the mapping of the vCPU that this thread runs. The access's data,
    // which is borrowed meanwhile, lies in another page of the mapping (KVM API, `data_offset`).
    let run = unsafe { &*CURRENT_RUN.get() };
    // SAFETY: the last exit was for a port, which makes this member of the union the valid one.
    let size = unsafe { run.__bindgen_anon_1.io.size };
    usize::from(size).max(1)
}

fn failed(message: String) -> EndReason {
    EndReason::VcpuFailed { message }
}

fn internal_error(run: &kvm_run) -> String {
    // SAFETY: the exit reason makes this member of the union the valid one, and all bit patterns
    // are values.
    let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
    let hint = match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => {
            " (KVM could not emulate an instruction: is this a software KVM? see `isopod check`)"
        }
        _ => "",
    };
    format!("KVM_EXIT_INTERNAL_ERROR, suberror {suberror}{hint}")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use kvm_bindings::CpuId;
    use kvm_ioctls::Kvm;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::arch::x86_64::{cpuid, regs};
    use crate::bus::BusDevice;
    use crate::memory::GuestRam;
    use crate::vm::Vm;

    /// Reports each write, and blocks it until it may go on.
    struct Slow(Sender<()>, Receiver<()>);

    impl BusDevice for Slow {
        fn read(&mut self, _: u64, _: &mut [u8]) {}

        fn write(&mut self, _: u64, _: &[u8]) {
            let _ = self.0.send(());
            let _ = self.1.recv();
        }
    }

    /// A machine whose vCPU is about to run `code`, with `device` at port 0x10. `None` without KVM.
    fn machine(code: &[u8], device: impl BusDevice + 'static) -> Option<(Vm, Vcpus)> {
        let kvm = Kvm::new().ok()?;
        let mut vm = Vm::new(&kvm, GuestRam::new(64).unwrap()).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let entries = cpuid::for_vcpu(vm.supported_cpuid(), 0, 1, false);
        vcpu.set_cpuid2(&CpuId::from_entries(&entries).unwrap()).unwrap();
        regs::write_tables(vm.ram()).unwrap();
        vm.ram().memory().write_slice(code, GuestAddress(0x10_0000)).unwrap();
        regs::VcpuRegs::at_boot(&vcpu, 0, 0x10_0000).unwrap().apply(&vcpu).unwrap();
        vm.ports.insert(0x10, 1, Arc::new(Mutex::new(device)));
        let end = Arc::clone(vm.end());
        let vcpus = Vcpus::spawn(vec![vcpu], vm.mmio.clone(), vm.ports.clone(), end).unwrap();
        assert!(vcpus.is_paused());
        Some((vm, vcpus))
    }

    /// Reports the data of each write.
    struct Written(Sender<Vec<u8>>);

    impl BusDevice for Written {
        fn read(&mut self, _: u64, _: &mut [u8]) {}

        fn write(&mut self, _: u64, data: &[u8]) {
            let _ = self.0.send(data.to_vec());
        }
    }

    #[test]
    fn a_string_that_is_written_to_a_port_arrives_byte_by_byte() {
        let (written, has_written) = channel();
        // mov dx, 0x10; mov ecx, 4; mov esi, 0x100100; rep outsb; jmp to itself
        let code = b"\x66\xba\x10\0\xb9\x04\0\0\0\xbe\0\x01\x10\0\xf3\x6e\xeb\xfe";
        let Some((vm, vcpus)) = machine(code, Written(written)) else {
            return eprintln!("left out: needs /dev/kvm");
        };
        vm.ram().memory().write_slice(b"four", GuestAddress(0x10_0100)).unwrap();
        vcpus.resume();
        for byte in b"four" {
            assert_eq!(has_written.recv().unwrap(), [*byte]);
        }
    }

    #[test]
    fn a_guest_is_told_that_it_was_paused() {
        let (written, has_written) = channel();
        // mov ecx, MSR_KVM_SYSTEM_TIME_NEW; mov eax, 0x100200 | 1; xor edx, edx; wrmsr;
        // out 0x10, al; jmp to the out
        let code = b"\xb9\x01\x4d\x56\x4b\xb8\x01\x02\x10\0\x31\xd2\x0f\x30\xe6\x10\xeb\xfc";
        let Some((vm, vcpus)) = machine(code, Written(written)) else {
            return eprintln!("left out: needs /dev/kvm");
        };
        // struct pvclock_vcpu_time_info: flags, PVCLOCK_GUEST_STOPPED.
        let told = || vm.ram().memory().read_obj::<u8>(GuestAddress(0x10_021d)).unwrap() & 2 != 0;
        vcpus.resume();
        has_written.recv().unwrap();
        assert!(vcpus.pause(Duration::from_secs(60)) && !told());
        while has_written.try_recv().is_ok() {}
        vcpus.resume();
        has_written.recv().unwrap();
        assert!(vcpus.pause(Duration::from_secs(60)) && told());
    }

    #[test]
    fn a_vcpu_that_is_held_up_is_not_waited_for_without_end() {
        let (begun, has_begun) = channel();
        let (go_on, may_go_on) = channel();
        // out 0x10, al; jmp to it
        let code = [0xe6, 0x10, 0xeb, 0xfc];
        let Some((vm, vcpus)) = machine(&code, Slow(begun, may_go_on)) else {
            return eprintln!("left out: needs /dev/kvm");
        };
        vcpus.resume();
        has_begun.recv().unwrap();
        assert!(!vcpus.pause(Duration::from_millis(50)));
        assert!(!vcpus.is_paused());
        go_on.send(()).unwrap();
        has_begun.recv().unwrap();
        // Later writes do not block.
        drop(go_on);
        assert!(vcpus.pause(Duration::from_secs(60)));
        assert!(vcpus.is_paused() && vm.end().reason().is_none());
    }
}
