use serde_json::{Value, json};

use super::filter::*;
use crate::error::Result;

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const X32: u32 = 0x4000_0000;

const ALLOW: u32 = 0x7fff_0000;
const KILL_THREAD: u32 = 0;

fn errno(number: i32) -> u32 {
    0x0005_0000 | number.unsigned_abs()
}

fn compiled(profile: Value) -> Result<Filter> {
    compile(&serde_json::from_value(profile).unwrap())
}

/// The kernel's verdict on a system call. Runs the program as the kernel would.
fn verdict(filter: &Filter, arch: u32, number: u32, args: &[u64]) -> u32 {
    let mut data = [0_u8; 64];
    data[..4].copy_from_slice(&number.to_ne_bytes());
    data[4..8].copy_from_slice(&arch.to_ne_bytes());
    for (index, arg) in args.iter().enumerate() {
        data[16 + index * 8..24 + index * 8].copy_from_slice(&arg.to_ne_bytes());
    }
    let (mut a, mut at) = (0_u32, 0_usize);
    loop {
        let bytes = filter.instructions[at].to_ne_bytes();
        let k = u32::from_ne_bytes(bytes[4..].try_into().unwrap());
        let (yes, no) = (usize::from(bytes[2]), usize::from(bytes[3]));
        at += 1;
        let mut jump = |taken: bool| at += if taken { yes } else { no };
        match u16::from_ne_bytes([bytes[0], bytes[1]]) {
            0x20 => {
                let from = usize::try_from(k).unwrap();
                a = u32::from_ne_bytes(data[from..from + 4].try_into().unwrap());
            }
            0x54 => a &= k,
            0x15 => jump(a == k),
            0x25 => jump(a > k),
            0x35 => jump(a >= k),
            0x45 => jump(a & k != 0),
            0x05 => at += usize::try_from(k).unwrap(),
            0x06 => return k,
            code => panic!("unknown instruction {code:#x}"),
        }
    }
}

const GETPID: u32 = 39;
const MKDIR: u32 = 83;
const PERSONALITY: u32 = 135;

#[test]
fn actions_and_error_numbers_are_as_asked() {
    for (action, result) in [
        ("SCMP_ACT_KILL", KILL_THREAD),
        ("SCMP_ACT_KILL_THREAD", KILL_THREAD),
        ("SCMP_ACT_KILL_PROCESS", 0x8000_0000),
        ("SCMP_ACT_TRAP", 0x0003_0000),
        ("SCMP_ACT_ERRNO", errno(libc::EPERM)),
        ("SCMP_ACT_TRACE", 0x7ff0_0001),
        ("SCMP_ACT_LOG", 0x7ffc_0000),
    ] {
        let rules = json!([{"names": ["mkdir"], "action": action}]);
        let filter = compiled(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}));
        let filter = filter.unwrap();
        assert_eq!(verdict(&filter, X86_64, MKDIR, &[]), result, "{action}");
        assert_eq!(verdict(&filter, X86_64, GETPID, &[]), ALLOW);
        // The filter has no other architecture.
        assert_eq!(verdict(&filter, I386, 20, &[]), KILL_THREAD);
    }
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 5,
        "syscalls": [
            {"names": ["getpid"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 4094},
            // The same action as the default makes no rule.
            {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5},
        ],
    }))
    .unwrap();
    assert_eq!(verdict(&filter, X86_64, GETPID, &[]), ALLOW);
    assert_eq!(verdict(&filter, X86_64, MKDIR, &[]), errno(4094));
    assert_eq!(verdict(&filter, X86_64, 84, &[]), errno(5));
}

#[test]
fn arguments_are_compared_as_asked() {
    let filter = |args: Value| {
        let rules = json!([{"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": args}]);
        compiled(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules})).unwrap()
    };
    let large = 0x1_0000_0007_u64;
    for (op, allowed, refused) in [
        ("SCMP_CMP_EQ", &[large][..], &[7, large + 1, 0][..]),
        ("SCMP_CMP_NE", &[7, 0], &[large]),
        ("SCMP_CMP_LT", &[large - 1, 0], &[large, u64::MAX]),
        ("SCMP_CMP_LE", &[large, 0], &[large + 1]),
        ("SCMP_CMP_GT", &[large + 1], &[large, 0]),
        ("SCMP_CMP_GE", &[large, u64::MAX], &[large - 1]),
    ] {
        let filter = filter(json!([{"index": 2, "value": large, "op": op}]));
        for (values, expected) in [(allowed, ALLOW), (refused, errno(1))] {
            for value in values {
                let seen = verdict(&filter, X86_64, PERSONALITY, &[1, 2, *value]);
                assert_eq!(seen, expected, "{op} {value:#x}");
            }
        }
    }
    let masked = filter(json!([
        {"index": 0, "value": 0xff00, "valueTwo": 0x1200, "op": "SCMP_CMP_MASKED_EQ"},
        {"index": 1, "value": 3, "op": "SCMP_CMP_EQ"},
    ]));
    assert_eq!(verdict(&masked, X86_64, PERSONALITY, &[0x7_12ff, 3]), ALLOW);
    assert_eq!(verdict(&masked, X86_64, PERSONALITY, &[0x7_12ff, 4]), errno(1), "both hold");
    assert_eq!(verdict(&masked, X86_64, PERSONALITY, &[0x7_13ff, 3]), errno(1));
    // One of two conditions on the same argument is enough.
    let either = filter(json!([
        {"index": 0, "value": 0, "op": "SCMP_CMP_EQ"},
        {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"},
    ]));
    for (value, expected) in [(0, ALLOW), (8, ALLOW), (9, errno(1))] {
        assert_eq!(verdict(&either, X86_64, PERSONALITY, &[value]), expected);
    }
}

#[test]
fn listed_architectures_are_filtered_and_those_of_other_machines_left_out() {
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_S390X", "SCMP_ARCH_NATIVE"],
        "syscalls": [{"names": ["getpid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7}],
    }))
    .unwrap();
    for (arch, number) in [(X86_64, GETPID), (X86_64, GETPID | X32), (I386, 20)] {
        assert_eq!(verdict(&filter, arch, number, &[]), errno(7));
        assert_eq!(verdict(&filter, arch, number + 1, &[]), ALLOW);
    }
}

#[test]
fn what_is_newer_than_the_profile_does_not_exist() {
    let profile = |default: &str, architectures: Value| {
        let rules = json!([{"names": ["getpid", "close_range"], "action": "SCMP_ACT_ALLOW"}]);
        let profile = json!({
            "defaultAction": default, "architectures": architectures, "syscalls": rules,
        });
        compiled(profile).unwrap()
    };
    let all = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);
    for default in ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL"] {
        let refused = if default == "SCMP_ACT_KILL" { KILL_THREAD } else { errno(1) };
        let filter = profile(default, all.clone());
        for (arch, bit) in [(X86_64, 0), (X86_64, X32), (I386, 0)] {
            assert_eq!(verdict(&filter, arch, bit | 436, &[]), ALLOW);
            assert_eq!(verdict(&filter, arch, bit | 435, &[]), refused);
            assert_eq!(verdict(&filter, arch, bit | 437, &[]), errno(libc::ENOSYS));
        }
        let native = profile(default, json!(["SCMP_ARCH_X86_64"]));
        assert_eq!(verdict(&native, X86_64, 437, &[]), errno(libc::ENOSYS));
        assert_eq!(verdict(&native, X86_64, X32 | 437, &[]), KILL_THREAD);
        assert_eq!(verdict(&native, I386, 437, &[]), KILL_THREAD);
        // As with runc, only architectures that the profile lists have the instructions.
        assert_eq!(verdict(&profile(default, Value::Null), X86_64, 437, &[]), refused);
    }
    let filter = profile("SCMP_ACT_LOG", all);
    assert_eq!(verdict(&filter, X86_64, 437, &[]), 0x7ffc_0000);
}

#[test]
fn names_that_nobody_knows_are_left_out() {
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": ["no_such_call", "getpid"], "action": "SCMP_ACT_ALLOW"}],
    }));
    assert_eq!(verdict(&filter.unwrap(), X86_64, GETPID, &[]), ALLOW);
}

#[test]
fn flags_are_passed_on() {
    let flags = |flags: Value| compiled(json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": flags}));
    assert_eq!(flags(Value::Null).unwrap().flags, 4, "speculation is allowed by default");
    assert_eq!(flags(json!([])).unwrap().flags, 0);
    let all = json!([
        "SECCOMP_FILTER_FLAG_TSYNC",
        "SECCOMP_FILTER_FLAG_LOG",
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW"
    ]);
    assert_eq!(flags(all).unwrap().flags, 7);
}

#[test]
fn what_cannot_be_honoured_is_named() {
    let rule = |rule: Value| json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
    for (profile, message) in [
        (
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            "linux.seccomp.defaultAction is SCMP_ACT_NOTIFY, which is not supported: system calls \
             in a microVM cannot be handed to a listener on the host",
        ),
        (
            rule(json!({"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"})),
            "linux.seccomp.syscalls[0].action is SCMP_ACT_NOTIFY, which is not supported: system \
             calls in a microVM cannot be handed to a listener on the host",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW",
                "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}),
            "linux.seccomp.flags has SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, which is not \
             supported: it is for SCMP_ACT_NOTIFY only",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_KILL", "defaultErrnoRet": 1}),
            "linux.seccomp.defaultErrnoRet is 1, but SCMP_ACT_KILL returns no error number",
        ),
        (
            rule(json!({"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 4095})),
            "linux.seccomp.syscalls[0].errnoRet is 4095; it has to be from 0 to 4094",
        ),
        (
            rule(json!({"names": ["mkdir"], "action": "SCMP_ACT_ERRNO",
                "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]})),
            "linux.seccomp.syscalls[0].args[0].index is 6; it has to be from 0 to 5",
        ),
        (
            rule(json!({"names": [""], "action": "SCMP_ACT_ERRNO"})),
            "linux.seccomp.syscalls[0].names has an empty name",
        ),
    ] {
        assert_eq!(compiled(profile).unwrap_err().message, message);
    }
}

#[test]
fn a_filter_that_no_kernel_takes_is_refused() {
    let conditions = |n: u64| json!([{"index": 0, "value": n, "op": "SCMP_CMP_EQ"}]);
    let rules: Vec<Value> = (0..5000)
        .map(|n| json!({"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "args": conditions(n)}))
        .collect();
    let error = compiled(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}));
    let message = error.err().unwrap().message;
    assert!(message.starts_with("linux.seccomp makes a filter of "), "{message}");
    assert!(message.ends_with(" instructions; the kernel takes 4096"), "{message}");
}
