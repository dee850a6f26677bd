//! Signal dispositions of a container's process before and at `execve`.

/// Highest signal number of Linux on x86-64 and arm64.
pub(crate) const MAX_SIGNAL: i32 = 64;

/// Signals whose default action does not end a process, and the two that cannot be handled. SIGPIPE
/// is ignored instead.
const NOT_ENDING: [i32; 10] = [
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGURG,
    libc::SIGWINCH,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGPIPE,
    libc::SIGKILL,
    libc::SIGSTOP,
];

extern "C" fn end(signal: libc::c_int) {
    // SAFETY: `_exit` may be called in a signal handler.
    unsafe { libc::_exit(128 + signal) }
}

/// Installs handlers with which signals end this process.
///
/// The kernel spares the first process of a pid namespace from default actions. But a container
/// between its creation and its start has to be killable.
pub(crate) fn end_on_signals() {
    let handler = end as extern "C" fn(libc::c_int);
    for signal in (1..=MAX_SIGNAL).filter(|signal| !NOT_ENDING.contains(signal)) {
        set(signal, handler as *const () as libc::sighandler_t);
    }
    // A write to a closed channel is to fail instead of ending the process.
    set(libc::SIGPIPE, libc::SIG_IGN);
    unblock_all();
}

/// Has the kernel reap children of this process (wait(2), "SIGCHLD").
pub(crate) fn ignore_children() {
    set(libc::SIGCHLD, libc::SIG_IGN);
}

/// Takes [`ignore_children`] back. Hooks are children whose exit statuses count.
pub(crate) fn heed_children() {
    default(libc::SIGCHLD);
}

/// Resets the dispositions and the mask to those that programs expect: nothing handled, ignored or
/// blocked.
pub(crate) fn reset() {
    for signal in 1..=MAX_SIGNAL {
        default(signal);
    }
    unblock_all();
}

/// Sets the default action with the system call itself. The C library refuses the two signals that
/// it reserves, which must not stay ignored either.
fn default(signal: i32) {
    /// Bytes of the kernel's `sigset_t`.
    const SET_SIZE: usize = 8;
    let action = [0_u64; 4];
    let old: *mut u64 = std::ptr::null_mut();
    // SAFETY: zeros are the kernel's `struct sigaction` for the default action. The array has its
    // size on x86-64 and arm64, and lives across the call. SIGKILL and SIGSTOP are refused.
    unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, &action, old, SET_SIZE) };
}

fn set(signal: i32, disposition: libc::sighandler_t) {
    // SAFETY: the only handler that is ever set calls `_exit` and nothing else. The C library
    // refuses the signals that it reserves, and the two that cannot be handled.
    unsafe { libc::signal(signal, disposition) };
}

fn unblock_all() {
    // SAFETY: `sigset_t` is plain data, and `sigemptyset` makes it valid whatever it held.
    let mut none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is ours and lives across the call.
    unsafe { libc::sigemptyset(&mut none) };
    // SAFETY: as above; no old set is asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Forks a process that runs `body`, and returns its exit status. The new process is a copy of one
    /// thread: `body` calls nothing but system calls.
    fn in_child(body: fn() -> i32) -> Option<i32> {
        // SAFETY: the child runs `body` and `_exit` only.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let status = body();
            // SAFETY: ends this process and runs nothing else of it.
            unsafe { libc::_exit(status) };
        }
        let mut status = 0;
        // SAFETY: `status` lives across the call.
        let waited = unsafe { libc::waitpid(pid, &mut status, 0) };
        (waited == pid).then(|| libc::WEXITSTATUS(status))
    }

    #[test]
    fn the_kernel_reaps_children_that_are_ignored() {
        let of_child = || in_child(|| 7).unwrap_or(1);
        assert_eq!(in_child(of_child), Some(7));
        let ignored = || {
            ignore_children();
            in_child(|| 7).unwrap_or(1)
        };
        assert_eq!(in_child(ignored), Some(1));
        let heeded = || {
            ignore_children();
            heed_children();
            in_child(|| 7).unwrap_or(1)
        };
        assert_eq!(in_child(heeded), Some(7));
    }
}
