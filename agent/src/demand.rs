//! Detects a process that waits for its standard input.
//!
//! The host leaves its caller's input unread until then. Input that was read and not consumed would
//! be lost to other readers, for example a shell's loop whose input a command inherits.
//!
//! A pipe does not report its readers. So the agent looks at the system calls that processes are
//! blocked in.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

/// Pauses between two looks: the first, and the last after doubling.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LAST_PAUSE: Duration = Duration::from_millis(200);

/// Divisor that bounds the time spent on looking: one part in so many.
const SHARE: u32 = 20;

/// System calls whose first argument is the descriptor that they read.
const READS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_preadv2,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_vmsplice,
    // read and readv of 32-bit programs. The 64-bit calls with these numbers do not block.
    #[cfg(target_arch = "x86_64")]
    3,
    #[cfg(target_arch = "x86_64")]
    145,
];

/// System calls that wait for several descriptors. The descriptors are in the process's memory, so
/// standard input is taken to be among them.
const POLLS: &[libc::c_long] = &[
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_select,
    libc::SYS_pselect6,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_io_uring_enter,
    // select, poll, pselect6 and ppoll of 32-bit programs.
    #[cfg(target_arch = "x86_64")]
    142,
    #[cfg(target_arch = "x86_64")]
    168,
    #[cfg(target_arch = "x86_64")]
    308,
    #[cfg(target_arch = "x86_64")]
    309,
];

/// Waits until a process waits for data from a pipe.
pub(crate) async fn comes(pipe_inode: u64) {
    let mut pause = FIRST_PAUSE;
    loop {
        let look = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            (is_waited_for(pipe_inode), began.elapsed())
        });
        // A failed look must not keep the input back for ever.
        let Ok((false, took)) = look.await else { return };
        tokio::time::sleep(pause.max(took * SHARE)).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

fn is_waited_for(pipe_inode: u64) -> bool {
    let link = format!("pipe:[{pipe_inode}]");
    // Without /proc there is no way to tell, and the input must not be kept back.
    let Ok(entries) = fs::read_dir("/proc") else { return true };
    let pids =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.into_iter().any(|pid| waits(pid, &link) && !is_agent(pid))
}

fn waits(pid: u32, link: &str) -> bool {
    let is_pipe = |fd: u64| {
        fs::read_link(format!("/proc/{pid}/fd/{fd}")).is_ok_and(|to| to.as_os_str() == link)
    };
    let stdin = is_pipe(0);
    if stdin && does_not_block(pid) {
        return true;
    }
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    tasks.flatten().any(|task| {
        let text = fs::read_to_string(task.path().join("syscall")).unwrap_or_default();
        match blocked_in(&text) {
            Some((number, _)) if POLLS.contains(&number) => stdin,
            Some((number, fd)) if READS.contains(&number) => is_pipe(fd),
            _ => false,
        }
    })
}

/// Number and first argument of the system call in a line of /proc/PID/task/TID/syscall.
fn blocked_in(text: &str) -> Option<(libc::c_long, u64)> {
    let mut words = text.split_ascii_whitespace();
    let number = words.next()?.parse().ok()?;
    let argument = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
    Some((number, argument))
}

/// Returns true for a process whose standard input does not block: it is never seen to wait.
fn does_not_block(pid: u32) -> bool {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/0")).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & (libc::O_NONBLOCK | libc::O_ASYNC) != 0)
}

/// Returns true for a process that still runs the agent's program, before its own `execve`.
fn is_agent(pid: u32) -> bool {
    let program = |pid: &str| {
        fs::metadata(format!("/proc/{pid}/exe")).map(|file| (file.dev(), file.ino())).ok()
    };
    program(&pid.to_string()) == program("self")
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, pipe};
    use std::process::{Command, Stdio};

    use rustix::fs::fstat;

    use super::*;

    #[test]
    fn a_line_of_the_kernels_is_understood() {
        let line = "0 0x3 0x7ffc 0x1000 0x0 0x0 0x0 0x7ffd 0x7f1c\n";
        assert_eq!(blocked_in(line), Some((0, 3)));
        for other in ["running\n", "-1 0x7ffd 0x7f1c\n", ""] {
            assert!(blocked_in(other).is_none_or(|(number, _)| number < 0), "{other}");
        }
    }

    #[test]
    fn only_who_reads_is_seen_to_wait() {
        let inode_of = |script: &str| {
            let (read, write) = pipe().unwrap();
            let inode = fstat(&write).unwrap().st_ino;
            let mut command = Command::new("sh");
            command.args(["-c", script]).stdin(read).stdout(Stdio::piped());
            let mut child = command.spawn().unwrap();
            drop(command);
            let mut first = [0; 3];
            child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
            (child, write, inode)
        };
        let (mut sleeper, _pipe, inode) = inode_of("echo up; exec sleep 1000");
        assert!(!is_waited_for(inode));
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        for script in
            ["echo up; read x", "echo up; exec cat", "exec 5<&0 0</dev/null; echo up; cat <&5"]
        {
            let (mut reader, pipe, inode) = inode_of(script);
            while !is_waited_for(inode) {
                std::thread::yield_now();
            }
            drop(pipe);
            reader.wait().unwrap();
        }
    }
}
