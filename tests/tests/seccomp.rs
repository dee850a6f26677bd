//! `linux.seccomp`: the effect of the filter, read back from inside by the probe.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use isopod_tests::{Container, Scope, microvm_only, runtime};
use serde_json::{Value, json};

// Numbers of arch/x86/entry/syscalls/syscall_{64,32}.tbl.
const GETPID: &str = "39";
const GETPID_32: &str = "20";
const ACCT: &str = "163,0";
const MOUNT: &str = "165";
const KEYCTL: &str = "250";
const UNSHARE_USER: &str = "272,268435456";
const CLONE3: &str = "435,0,0";
const MSEAL: &str = "462";
const PERSONALITY: &str = "135";

/// A container whose probe makes these calls under a profile.
fn calls<'a>(scope: &'a Scope, profile: Value, abi: &str, calls: &[&str]) -> Container<'a> {
    let container = scope.container().probe(&[&["call", abi], calls].concat());
    container.edit(|c| c["linux"]["seccomp"] = profile)
}

/// A profile that allows everything but these rules.
fn all_but(rules: Value) -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    })
}

fn refuse_getpid() -> Value {
    all_but(json!([{ "names": ["getpid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 }]))
}

#[test]
fn without_a_profile_all_is_allowed() {
    let scope = Scope::in_pod();
    assert_eq!(scope.container().probe(&["report"]).run_json()["seccomp"], json!("0"));
    let seen = scope.container().probe(&["call", "64", GETPID]).run_json();
    assert_eq!(seen[GETPID], json!(1));
}

#[test]
fn a_denied_call_fails_with_its_error_number() {
    let scope = Scope::in_pod();
    let rules = json!([
        { "names": ["getpid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 },
        { "names": ["keyctl", "nobody_knows_this_one"], "action": "SCMP_ACT_ERRNO" },
    ]);
    let seen = calls(&scope, all_but(rules), "64", &[GETPID, KEYCTL]).run_json();
    assert_eq!(seen, json!({ GETPID: "EOPNOTSUPP", KEYCTL: "EPERM" }));
    let report = scope.container().probe(&["report"]).edit(|c| {
        c["linux"]["seccomp"] = refuse_getpid();
    });
    assert_eq!(report.run_json()["seccomp"], json!("2"));
}

#[test]
fn what_kills_ends_with_sigsys() {
    let scope = Scope::in_pod();
    for action in
        ["SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"]
    {
        // A call that no runtime makes itself.
        let rules = json!([{ "names": ["acct"], "action": action }]);
        let out = calls(&scope, all_but(rules), "64", &[ACCT]).run();
        assert_eq!(out.status, 128 + libc::SIGSYS, "{action}: {out}");
    }
}

#[test]
fn without_a_tracer_a_traced_call_does_not_exist_and_a_logged_one_is_made() {
    let scope = Scope::in_pod();
    let rules = json!([
        { "names": ["getpid"], "action": "SCMP_ACT_LOG" },
        { "names": ["keyctl"], "action": "SCMP_ACT_TRACE", "errnoRet": 3 },
    ]);
    let mut profile = all_but(rules);
    // runc 1.1 does not know flags yet.
    if runtime().is_isopod() {
        profile["flags"] = json!([
            "SECCOMP_FILTER_FLAG_LOG",
            "SECCOMP_FILTER_FLAG_TSYNC",
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
        ]);
    }
    let seen = calls(&scope, profile, "64", &[GETPID, KEYCTL]).run_json();
    assert_eq!(seen, json!({ GETPID: 1, KEYCTL: "ENOSYS" }));
}

#[test]
fn arguments_decide() {
    let scope = Scope::in_pod();
    let rules = json!([
        { "names": ["personality"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
          "args": [{ "index": 0, "value": 8, "op": "SCMP_CMP_EQ" }] },
        { "names": ["personality"], "action": "SCMP_ACT_ERRNO", "errnoRet": 2,
          "args": [{ "index": 0, "value": 0xf0000, "valueTwo": 0x20000,
                     "op": "SCMP_CMP_MASKED_EQ" }] },
        // Of two conditions on one argument, either will do.
        { "names": ["keyctl"], "action": "SCMP_ACT_ERRNO", "errnoRet": 3,
          "args": [{ "index": 0, "value": 100, "op": "SCMP_CMP_EQ" },
                   { "index": 0, "value": 200, "op": "SCMP_CMP_GE" }] },
    ]);
    let asked = [8, 0x20004, 0].map(|n| format!("{PERSONALITY},{n}"));
    let keys = [100, 200, 150].map(|n| format!("{KEYCTL},{n}"));
    let all: Vec<&str> = asked.iter().chain(&keys).map(String::as_str).collect();
    let seen = calls(&scope, all_but(rules), "64", &all).run_json();
    let of = |calls: &[String]| calls.iter().map(|call| seen[call].clone()).collect::<Vec<_>>();
    assert_eq!(of(&asked), [json!("EPERM"), json!("ENOENT"), json!(0)]);
    assert_eq!(of(&keys[..2]), ["ESRCH", "ESRCH"]);
    assert_ne!(seen[&keys[2]], json!("ESRCH"));
}

#[test]
fn calls_of_32_bit_programs_are_filtered_as_those_of_others() {
    let scope = Scope::in_pod();
    let seen = calls(&scope, refuse_getpid(), "32", &[GETPID_32, "64"]).run_json();
    assert_eq!(seen, json!({ GETPID_32: "EOPNOTSUPP", "64": 0 }));
    // An architecture that the profile does not list may not be used at all.
    let mut profile = refuse_getpid();
    profile["architectures"] = json!(["SCMP_ARCH_X86_64"]);
    let out = calls(&scope, profile, "32", &["64"]).run();
    assert_eq!(out.status, 128 + libc::SIGSYS, "{out}");
}

#[test]
fn exec_has_the_containers_filter() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let container = container.edit(|c| c["linux"]["seccomp"] = refuse_getpid());
    let _created = container.start_new();
    let seen = container.exec_json(&[], &["call", "64", GETPID]);
    assert_eq!(seen[GETPID], json!("EOPNOTSUPP"));
    assert_eq!(container.exec_json(&["--user", "1000"], &["report"])["seccomp"], json!("2"));
}

/// Loading a filter takes CAP_SYS_ADMIN or noNewPrivileges. With either, the process has exactly
/// the capabilities that were asked for.
#[test]
fn a_filter_changes_no_capabilities() {
    let scope = Scope::in_pod();
    for (no_new_privs, uid) in [(false, 0), (false, 1000), (true, 0), (true, 1000)] {
        let report = |filter: Value| {
            let seen = scope.container().probe(&["report"]).edit(|c| {
                c["linux"]["seccomp"] = filter;
                c["process"]["noNewPrivileges"] = json!(no_new_privs);
                c["process"]["user"] = json!({ "uid": uid, "gid": uid });
                let names = json!(["CAP_KILL", "CAP_CHOWN"]);
                c["process"]["capabilities"] = json!({
                    "bounding": names, "permitted": names, "effective": names,
                    "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"],
                });
            });
            seen.run_json()
        };
        let (with, without) = (report(refuse_getpid()), report(Value::Null));
        assert_eq!((&with["seccomp"], &without["seccomp"]), (&json!("2"), &json!("0")));
        assert_eq!(with["capabilities"], without["capabilities"], "{no_new_privs} {uid}");
        assert_eq!(with["no_new_privs"], json!(if no_new_privs { "1" } else { "0" }));
    }
}

/// A profile that allows the program's own calls, and none of those that start it.
#[test]
fn the_filter_is_loaded_last() {
    microvm_only!();
    let scope = Scope::in_pod();
    let denied = [
        "capset",
        "setgroups",
        "setresuid",
        "chdir",
        "umask",
        "sendmsg",
        "recvmsg",
        "close_range",
        "faccessat2",
        "seccomp",
    ];
    let rules = json!([{ "names": denied, "action": "SCMP_ACT_KILL" }]);
    for no_new_privs in [true, false] {
        let container = scope.container().args(["/bin/busybox", "true"]).edit(|c| {
            c["linux"]["seccomp"] = all_but(rules.clone());
            c["process"]["noNewPrivileges"] = json!(no_new_privs);
            c["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
        });
        container.run().ok();
    }
}

#[test]
fn a_program_that_may_not_be_executed_is_an_error() {
    let scope = Scope::in_pod();
    let rules = json!([{ "names": ["execve"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1 }]);
    let out = scope.container().edit(|c| c["linux"]["seccomp"] = all_but(rules)).run();
    assert_ne!(out.status, 0, "{out}");
    assert!(out.stderr.contains("operation not permitted"), "{out}");
}

/// A profile like the engines' default: a list of allowed calls, and an error for all others.
fn allow_list() -> Value {
    let same = |value: u64| json!([{ "index": 0, "value": value, "op": "SCMP_CMP_EQ" }]);
    let mut rules = vec![json!({ "names": ALLOWED, "action": "SCMP_ACT_ALLOW" })];
    for value in [0_u64, 8, 0x20000, 0x20008, 0xffff_ffff] {
        rules.push(json!({
            "names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": same(value),
        }));
    }
    // No new namespaces.
    rules.push(json!({
        "names": ["clone"], "action": "SCMP_ACT_ALLOW",
        "args": [{ "index": 0, "value": 0x7e02_0000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }],
    }));
    // Its arguments are in memory, where no filter can see them: programs shall use clone.
    rules.push(json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 }));
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    })
}

#[test]
fn an_allow_list_lets_programs_work_and_refuses_the_rest() {
    let scope = Scope::in_pod();
    let under = |container: Container<'_>| {
        container.edit(|c| c["linux"]["seccomp"] = allow_list()).run().ok().stdout
    };
    let script = "mkdir -p /tmp/d && echo text > /tmp/d/f && mv /tmp/d/f /tmp/d/g && \
        cat /tmp/d/g | tr a-z A-Z && (sleep 0; exit 3) || echo $? && ls /tmp/d && id -u";
    assert_eq!(under(scope.container().shell(script)), "TEXT\n3\ng\n0\n");
    // Starts threads, which C libraries now make by clone3.
    under(scope.container().probe(&["parallel"]));
    let personalities = [8, 1].map(|n| format!("{PERSONALITY},{n}"));
    let asked =
        [GETPID, MOUNT, KEYCTL, UNSHARE_USER, CLONE3, MSEAL, &personalities[0], &personalities[1]];
    let seen: Value =
        serde_json::from_str(&under(calls(&scope, Value::Null, "64", &asked))).unwrap();
    assert_eq!(
        seen,
        json!({
            GETPID: 1, MOUNT: "EPERM", KEYCTL: "EPERM", UNSHARE_USER: "EPERM", CLONE3: "ENOSYS",
            // Newer than the list: programs shall fall back to an older call.
            MSEAL: "ENOSYS",
            &personalities[0]: 0, &personalities[1]: "EPERM",
        })
    );
    let seen: Value =
        serde_json::from_str(&under(calls(&scope, Value::Null, "32", &[GETPID_32, "21", "460"])))
            .unwrap();
    assert_eq!(seen, json!({ GETPID_32: 1, "21": "EPERM", "460": "ENOSYS" }));
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    microvm_only!();
    let scope = Scope::alone();
    let notify = json!([{ "names": ["mkdir"], "action": "SCMP_ACT_NOTIFY" }]);
    let mut listener = all_but(Value::Null);
    listener["listenerPath"] = json!("/run/listener.sock");
    for (profile, field) in [
        (all_but(notify), "linux.seccomp.syscalls[0].action is SCMP_ACT_NOTIFY"),
        (listener, "linux.seccomp.listenerPath"),
        (json!({ "defaultAction": "SCMP_ACT_NOTIFY" }), "linux.seccomp.defaultAction"),
    ] {
        let container = scope.container().edit(|c| c["linux"]["seccomp"] = profile);
        container.run().one_line_error(&[field, "not supported", "listener"]);
        scope.assert_nothing_left();
    }
}

/// The calls that ordinary programs need.
const ALLOWED: &[&str] = &[
    "accept",
    "accept4",
    "access",
    "alarm",
    "arch_prctl",
    "bind",
    "brk",
    "capget",
    "capset",
    "chdir",
    "chmod",
    "chown",
    "clock_getres",
    "clock_gettime",
    "clock_gettime64",
    "clock_nanosleep",
    "clock_nanosleep_time64",
    "close",
    "close_range",
    "connect",
    "copy_file_range",
    "creat",
    "dup",
    "dup2",
    "dup3",
    "epoll_create",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_wait",
    "eventfd",
    "eventfd2",
    "execve",
    "execveat",
    "exit",
    "exit_group",
    "faccessat",
    "faccessat2",
    "fadvise64",
    "fallocate",
    "fchdir",
    "fchmod",
    "fchmodat",
    "fchown",
    "fchownat",
    "fcntl",
    "fcntl64",
    "fdatasync",
    "fgetxattr",
    "flistxattr",
    "flock",
    "fork",
    "fsetxattr",
    "fstat",
    "fstat64",
    "fstatat64",
    "fstatfs",
    "fsync",
    "ftruncate",
    "futex",
    "futex_time64",
    "getcwd",
    "getdents",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getgroups",
    "getitimer",
    "getpeername",
    "getpgid",
    "getpgrp",
    "getpid",
    "getppid",
    "getpriority",
    "getrandom",
    "getresgid",
    "getresuid",
    "getrlimit",
    "getrusage",
    "getsid",
    "getsockname",
    "getsockopt",
    "gettid",
    "gettimeofday",
    "getuid",
    "getxattr",
    "inotify_add_watch",
    "inotify_init1",
    "inotify_rm_watch",
    "ioctl",
    "kill",
    "lchown",
    "lgetxattr",
    "link",
    "linkat",
    "listen",
    "listxattr",
    "lseek",
    "_llseek",
    "lstat",
    "madvise",
    "membarrier",
    "memfd_create",
    "mincore",
    "mkdir",
    "mkdirat",
    "mknod",
    "mknodat",
    "mlock",
    "mmap",
    "mmap2",
    "mprotect",
    "mremap",
    "msync",
    "munlock",
    "munmap",
    "nanosleep",
    "newfstatat",
    "open",
    "openat",
    "openat2",
    "pause",
    "pidfd_open",
    "pidfd_send_signal",
    "pipe",
    "pipe2",
    "poll",
    "ppoll",
    "prctl",
    "pread64",
    "preadv",
    "prlimit64",
    "pselect6",
    "pwrite64",
    "pwritev",
    "read",
    "readahead",
    "readlink",
    "readlinkat",
    "readv",
    "recv",
    "recvfrom",
    "recvmmsg",
    "recvmsg",
    "rename",
    "renameat",
    "renameat2",
    "restart_syscall",
    "rmdir",
    "rseq",
    "rt_sigaction",
    "rt_sigpending",
    "rt_sigprocmask",
    "rt_sigqueueinfo",
    "rt_sigreturn",
    "rt_sigsuspend",
    "rt_sigtimedwait",
    "sched_getaffinity",
    "sched_getparam",
    "sched_getscheduler",
    "sched_setaffinity",
    "sched_yield",
    "select",
    "sendfile",
    "sendmmsg",
    "sendmsg",
    "sendto",
    "set_robust_list",
    "set_tid_address",
    "setgid",
    "setgroups",
    "setitimer",
    "setpgid",
    "setpriority",
    "setregid",
    "setresgid",
    "setresuid",
    "setreuid",
    "setrlimit",
    "setsid",
    "setsockopt",
    "setuid",
    "setxattr",
    "shutdown",
    "sigaltstack",
    "socket",
    "socketpair",
    "splice",
    "stat",
    "stat64",
    "statfs",
    "statx",
    "symlink",
    "symlinkat",
    "sync",
    "sysinfo",
    "tgkill",
    "time",
    "timer_create",
    "timer_delete",
    "timer_settime",
    "timerfd_create",
    "timerfd_settime",
    "tkill",
    "truncate",
    "ugetrlimit",
    "umask",
    "uname",
    "unlink",
    "unlinkat",
    "utime",
    "utimensat",
    "vfork",
    "wait4",
    "waitid",
    "waitpid",
    "write",
    "writev",
];
