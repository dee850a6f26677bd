//! When a process first waits for its input.
//!
//! The host leaves its caller's input alone until then: what it has read and no process takes is lost for
//! others that share it, such as a shell's loop whose input a command inherits. A pipe does not tell of
//! its readers, so the system calls that processes are blocked in are looked at.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

/// Time between looks: it begins with the first, and doubles up to the other.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LAST_PAUSE: Duration = Duration::from_millis(200);

/// Of the time, at most one part in so many goes into looking.
const SHARE: u32 = 20;

/// System calls whose first argument is what is read.
const READS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_preadv2,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_vmsplice,
    // read and readv of 32-bit programs, whose numbers are of calls that do not block.
    #[cfg(target_arch = "x86_64")]
    3,
    #[cfg(target_arch = "x86_64")]
    145,
];

/// System calls that wait for several things. Which ones is in the process's memory: input is taken to be
/// one of them.
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

/// Waits until a process waits for something to read from a pipe.
pub(crate) async fn comes(pipe_inode: u64) {
    let mut pause = FIRST_PAUSE;
    loop {
        let look = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            (is_waited_for(pipe_inode), began.elapsed())
        });
        // A look that is not made must not keep input back for ever.
        let Ok((false, took)) = look.await else { return };
        tokio::time::sleep(pause.max(took * SHARE)).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

fn is_waited_for(pipe_inode: u64) -> bool {
    let link = format!("pipe:[{pipe_inode}]");
    // Where /proc cannot be read, the input is not kept back.
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

/// The number and first argument of the system call that /proc/PID/task/TID/syscall tells of.
fn blocked_in(text: &str) -> Option<(libc::c_long, u64)> {
    let mut words = text.split_ascii_whitespace();
    let number = words.next()?.parse().ok()?;
    let argument = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
    Some((number, argument))
}

/// A process that reads without blocking is never seen to wait.
fn does_not_block(pid: u32) -> bool {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/0")).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & (libc::O_NONBLOCK | libc::O_ASYNC) != 0)
}

/// The process is still the agent's program, before it becomes the container's.
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
