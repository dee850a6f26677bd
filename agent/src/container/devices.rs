//! The device cgroup: `linux.resources.devices` as an eBPF program.
//!
//! cgroup v2 has no device files. The kernel calls a program of type `BPF_PROG_TYPE_CGROUP_DEVICE`
//! for each open and mknod (`struct bpf_cgroup_dev_ctx` in linux/bpf.h). The answer 1 allows the
//! access.
//!
//! For each access bit (read, write, mknod) the last rule that names it decides. The program
//! therefore walks the rules from last to first and clears the bits that a rule allows. It denies
//! the access at a rule that denies a remaining bit, and allows the access when no bit remains.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use crate::error::{Context as _, Error, Result};
use crate::oci::{DeviceKind, DeviceRule};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

const ACCESS_MKNOD: u32 = 1;
const ACCESS_READ: u32 = 2;
const ACCESS_WRITE: u32 = 4;

const TYPE_BLOCK: u32 = 1;
const TYPE_CHAR: u32 = 2;

/// One instruction as the kernel encodes it (`struct bpf_insn`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
struct Insn {
    code: u8,
    /// Destination in the low and source in the high half.
    registers: u8,
    offset: i16,
    immediate: u32,
}

/// A rule with its wildcards resolved. `None` matches everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

/// Rules that every container has, whatever its own rules say: mknod for any device, and all access
/// to the default devices and pseudo-terminals. The runtime specification demands these devices.
const DEFAULT_RULES: [Rule; 11] = [
    default(TYPE_CHAR, None, None, ACCESS_MKNOD),
    default(TYPE_BLOCK, None, None, ACCESS_MKNOD),
    usable(1, Some(3)), // null
    usable(1, Some(5)), // zero
    usable(1, Some(7)), // full
    usable(1, Some(8)), // random
    usable(1, Some(9)), // urandom
    usable(5, Some(0)), // tty
    usable(5, Some(1)), // console
    usable(5, Some(2)), // ptmx
    usable(136, None),  // pts
];

const fn usable(major: u32, minor: Option<u32>) -> Rule {
    default(TYPE_CHAR, Some(major), minor, ACCESS_MKNOD | ACCESS_READ | ACCESS_WRITE)
}

const fn default(kind: u32, major: Option<u32>, minor: Option<u32>, access: u32) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

/// Refuses rules with unknown letters, types or numbers, by their index.
pub(crate) fn check(rules: &[DeviceRule]) -> Result<()> {
    parse(rules).map(|_| ())
}

/// Limits a group to the devices that the rules and the defaults allow. Fails on a kernel without
/// `BPF_PROG_TYPE_CGROUP_DEVICE`.
pub(crate) fn attach(cgroup: &OwnedFd, rules: &[DeviceRule]) -> Result<()> {
    let mut rules = parse(rules)?;
    rules.extend(DEFAULT_RULES);
    let program = load(&program(&rules)).context(|| "load the device filter of the container")?;
    attach_program(cgroup, &program).context(|| "attach the device filter of the container")
}

/// Returns true if the rules allow every access to every device, as for privileged containers.
pub(crate) fn allow_everything(rules: &[DeviceRule]) -> bool {
    let all = |rule: &&DeviceRule| rule.kind.unwrap_or(DeviceKind::All) == DeviceKind::All;
    let last = rules.iter().rposition(|rule| all(&rule));
    last.is_some_and(|last| rules[last..].iter().all(|rule| rule.allow))
}

fn parse(rules: &[DeviceRule]) -> Result<Vec<Rule>> {
    let rule = |(i, rule)| {
        parse_rule(rule).map_err(|why| Error::invalid(format!("linux.resources.devices[{i}]"), why))
    };
    rules.iter().enumerate().map(rule).collect()
}

fn parse_rule(rule: &DeviceRule) -> std::result::Result<Rule, String> {
    let number = |name: &str, value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(n) => u32::try_from(n).map(Some).map_err(|_| format!("{name} {n} is out of range")),
    };
    let mut access = 0;
    for letter in rule.access.as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => ACCESS_READ,
            'w' => ACCESS_WRITE,
            'm' => ACCESS_MKNOD,
            _ => return Err(format!("access has {letter:?}, which is none of r, w and m")),
        };
    }
    let kind = match rule.kind.unwrap_or(DeviceKind::All) {
        // Type "a" replaces all rules before it, whatever else the rule says.
        DeviceKind::All => {
            let access = ACCESS_MKNOD | ACCESS_READ | ACCESS_WRITE;
            return Ok(Rule { allow: rule.allow, kind: None, major: None, minor: None, access });
        }
        DeviceKind::Block => TYPE_BLOCK,
        DeviceKind::Char | DeviceKind::Unbuffered => TYPE_CHAR,
        DeviceKind::Fifo => return Err("type p is not a device".into()),
    };
    let major = number("major", rule.major)?;
    let minor = number("minor", rule.minor)?;
    Ok(Rule { allow: rule.allow, kind: Some(kind), major, minor, access })
}

// Registers: r0 is the answer, r1 the context, r2 the kind, r3 the access bits still undecided, r4
// and r5 the device's numbers, r6 scratch.
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const AND_K: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const RSH_K: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const MOV_K: u8 = 0xb4; // BPF_ALU | BPF_MOV | BPF_K
const MOV_X: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const JEQ_K: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JNE_K: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

const fn insn(code: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> Insn {
    Insn { code, registers: source << 4 | destination, offset, immediate }
}

fn program(rules: &[Rule]) -> Vec<Insn> {
    let mut program = vec![
        insn(LOAD_WORD, 2, 1, 0, 0),
        insn(MOV_X, 3, 2, 0, 0),
        insn(AND_K, 2, 0, 0, 0xffff),
        insn(RSH_K, 3, 0, 0, 16),
        insn(LOAD_WORD, 4, 1, 4, 0),
        insn(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let body = rule_body(rule);
        let conditions = [(2, rule.kind), (4, rule.major), (5, rule.minor)];
        let conditions: Vec<_> = conditions
            .iter()
            .filter_map(|(register, value)| Some((*register, (*value)?)))
            .collect();
        for (i, (register, value)) in conditions.iter().enumerate() {
            // The jump skips the other conditions and the body, at most seven instructions.
            let skip = (conditions.len() - 1 - i + body.len()) as i16;
            program.push(insn(JNE_K, *register, 0, skip, *value));
        }
        program.extend(body);
    }
    program.extend(answer(0));
    program
}

fn rule_body(rule: &Rule) -> Vec<Insn> {
    let mut body = Vec::with_capacity(5);
    if rule.allow {
        body.push(insn(AND_K, 3, 0, 0, !rule.access & 7));
        body.push(insn(JNE_K, 3, 0, 2, 0));
        body.extend(answer(1));
    } else {
        body.push(insn(MOV_X, 6, 3, 0, 0));
        body.push(insn(AND_K, 6, 0, 0, rule.access));
        body.push(insn(JEQ_K, 6, 0, 2, 0));
        body.extend(answer(0));
    }
    body
}

const fn answer(value: u32) -> [Insn; 2] {
    [insn(MOV_K, 0, 0, 0, value), insn(EXIT, 0, 0, 0, 0)]
}

/// The start of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// The start of `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

fn load(program: &[Insn]) -> io::Result<OwnedFd> {
    let attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(program.len()).map_err(io::Error::other)?,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: `attr` and the instructions that it points to live across the call, and its size is
    // given. The kernel takes zeros for the rest of the union.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &attr, size_of::<LoadAttr>()) };
    crate::syscall::owned(fd)
}

fn attach_program(cgroup: &OwnedFd, program: &OwnedFd) -> io::Result<()> {
    let attr = AttachAttr {
        target_fd: cgroup.as_raw_fd().unsigned_abs(),
        attach_bpf_fd: program.as_raw_fd().unsigned_abs(),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    let size = size_of::<AttachAttr>();
    // SAFETY: `attr` lives across the call and its size is given; both descriptors are open.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &attr, size) };
    crate::syscall::checked(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program the way the kernel would.
    fn run(program: &[Insn], kind: u32, access: u32, major: u32, minor: u32) -> u32 {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_u32; 11];
        let mut at = 0_usize;
        loop {
            let insn = program[at];
            let destination = usize::from(insn.registers & 15);
            let source = usize::from(insn.registers >> 4);
            at += 1;
            let mut jump = |taken: bool| {
                if taken {
                    at += usize::try_from(insn.offset).unwrap();
                }
            };
            match insn.code {
                LOAD_WORD => {
                    assert_eq!(source, 1);
                    registers[destination] = context[usize::try_from(insn.offset).unwrap() / 4];
                }
                AND_K => registers[destination] &= insn.immediate,
                RSH_K => registers[destination] >>= insn.immediate,
                MOV_K => registers[destination] = insn.immediate,
                MOV_X => registers[destination] = registers[source],
                JEQ_K => jump(registers[destination] == insn.immediate),
                JNE_K => jump(registers[destination] != insn.immediate),
                EXIT => return registers[0],
                code => panic!("unknown instruction {code:#x}"),
            }
        }
    }

    fn compiled(json: &str) -> Vec<Insn> {
        let rules: Vec<DeviceRule> = serde_json::from_str(json).unwrap();
        let mut rules = parse(&rules).unwrap();
        rules.extend(DEFAULT_RULES);
        program(&rules)
    }

    const RW: u32 = ACCESS_READ | ACCESS_WRITE;

    #[test]
    fn instructions_are_eight_bytes_with_the_registers_in_the_second() {
        assert_eq!(size_of::<Insn>(), 8);
        assert_eq!(insn(LOAD_WORD, 4, 1, 4, 0).registers, 0x14);
        assert_eq!(size_of::<LoadAttr>(), 48);
    }

    #[test]
    fn only_default_devices_without_rules() {
        let program = compiled("[]");
        assert_eq!(run(&program, TYPE_CHAR, RW, 1, 3), 1);
        assert_eq!(run(&program, TYPE_CHAR, RW, 136, 7), 1);
        assert_eq!(run(&program, TYPE_BLOCK, RW, 1, 3), 0);
        assert_eq!(run(&program, TYPE_CHAR, ACCESS_READ, 1, 1), 0);
        assert_eq!(run(&program, TYPE_BLOCK, ACCESS_MKNOD, 8, 0), 1);
        assert_eq!(run(&program, TYPE_BLOCK, ACCESS_READ, 8, 0), 0);
    }

    #[test]
    fn the_last_rule_for_an_access_decides() {
        let program = compiled(
            r#"[{"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
                {"allow": false, "type": "c", "major": 10, "access": "w"}]"#,
        );
        assert_eq!(run(&program, TYPE_CHAR, ACCESS_READ, 10, 229), 1);
        assert_eq!(run(&program, TYPE_CHAR, ACCESS_WRITE, 10, 229), 0);
        assert_eq!(run(&program, TYPE_CHAR, RW, 10, 229), 0);
        assert_eq!(run(&program, TYPE_CHAR, ACCESS_READ, 10, 228), 0);
    }

    #[test]
    fn privileged_rules_are_known() {
        let all = |json: &str| allow_everything(&serde_json::from_str::<Vec<_>>(json).unwrap());
        assert!(all(r#"[{"allow": false}, {"allow": true, "access": "rwm"}]"#));
        assert!(all(r#"[{"allow": true}, {"allow": true, "type": "c", "major": 1}]"#));
        assert!(!all(r#"[{"allow": true}, {"allow": false, "type": "c", "major": 1}]"#));
        assert!(!all(r#"[{"allow": false}, {"allow": true, "type": "c"}]"#));
        assert!(!all("[]"));
    }

    #[test]
    fn allow_all_allows_all() {
        let program = compiled(r#"[{"allow": true, "type": "a"}]"#);
        assert_eq!(run(&program, TYPE_BLOCK, RW, 8, 0), 1);
        assert_eq!(run(&program, TYPE_CHAR, RW | ACCESS_MKNOD, 255, 255), 1);
    }

    #[test]
    fn bad_rules_are_refused_by_index() {
        let rules = r#"[{"allow": true}, {"allow": true, "type": "c", "access": "rx"}]"#;
        let rules: Vec<DeviceRule> = serde_json::from_str(rules).unwrap();
        let e = check(&rules).unwrap_err();
        assert!(e.message.starts_with("linux.resources.devices[1]"), "{e}");
    }
}
