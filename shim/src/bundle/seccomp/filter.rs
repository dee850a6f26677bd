//! Compiles a profile with libseccomp.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{Read, Seek},
    sync::Once,
};

use libseccomp::{
    ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall, error::SeccompError,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator as Operator, LinuxSyscall,
};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::{abi::Abi, enosys};
use crate::error::{Error, Explain, Result};

/// The largest number of instructions that a kernel takes (`BPF_MAXINSNS` in linux/bpf_common.h).
const MAX_INSTRUCTIONS: usize = 4096;

/// The largest error number that libseccomp takes. It is one below the largest that a system call
/// can return (`MAX_ERRNO` in linux/err.h).
const MAX_ERRNO: u32 = 4094;

/// The largest number that a tracer can be told (`SECCOMP_RET_DATA` in linux/seccomp.h).
const MAX_MESSAGE: u32 = 0xffff;

/// Number of arguments of a system call.
const ARGS: usize = 6;

/// Number of system calls from which on the filter is a binary tree. libseccomp before 2.5.5 makes
/// a wrong tree if there are none. A short list is as quick without a tree.
const TREE_FROM: usize = 33;

/// API level of libseccomp: everything that the guest's kernel has, whatever the host's has
/// (seccomp_api_get(3)).
const API_LEVEL: u32 = 5;

/// A compiled filter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// `SECCOMP_FILTER_FLAG_*` for the load.
    pub flags: u32,
    /// Instructions, each the eight bytes of a `struct sock_filter`.
    pub(super) instructions: Vec<u64>,
}

impl Filter {
    /// The program as seccomp(2) takes it.
    pub fn bytes(&self) -> Vec<u8> {
        self.instructions.iter().flat_map(|instruction| instruction.to_ne_bytes()).collect()
    }
}

/// Compiles a profile. The error names the part that cannot be honoured.
pub(in crate::bundle) fn compile(profile: &LinuxSeccomp) -> Result<Filter> {
    let flags = flags(profile.flags().as_deref())?;
    let what = "linux.seccomp.defaultAction";
    let default = action(what, profile.default_action(), profile.default_errno_ret())?;
    let program = Program { default, known: architectures(profile) };
    let mut instructions = match default {
        // These actions let new system calls through to the kernel anyway.
        ScmpAction::Allow | ScmpAction::Log | ScmpAction::Trace(_) => Vec::new(),
        _ => enosys::stub(&program.last_syscalls(profile)),
    };
    instructions.extend(program.compile(profile)?);
    if instructions.len() > MAX_INSTRUCTIONS {
        return Err(Error::new(format!(
            "linux.seccomp makes a filter of {} instructions; the kernel takes {MAX_INSTRUCTIONS}",
            instructions.len()
        )));
    }
    Ok(Filter { flags, instructions })
}

/// The flags of a profile as seccomp(2) takes them. Without the field, the mitigation of
/// speculative store bypass is left to the process (`SECCOMP_FILTER_FLAG_SPEC_ALLOW`). This is the
/// kernel's own default too.
pub(super) fn flags(flags: Option<&[LinuxSeccompFilterFlag]>) -> Result<u32> {
    use LinuxSeccompFilterFlag as Flag;
    let bits = |flag: &Flag| match flag {
        Flag::SeccompFilterFlagTsync => Ok(libc::SECCOMP_FILTER_FLAG_TSYNC),
        Flag::SeccompFilterFlagLog => Ok(libc::SECCOMP_FILTER_FLAG_LOG),
        Flag::SeccompFilterFlagSpecAllow => Ok(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW),
        Flag::SeccompFilterFlagWaitKillableRecv => Err(Error::new(format!(
            "linux.seccomp.flags has {flag}, which is not supported: it is for SCMP_ACT_NOTIFY only"
        ))),
    };
    let Some(flags) = flags else { return Ok(word(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW)) };
    flags.iter().map(bits).try_fold(0, |all, one| Ok(all | word(one?)))
}

/// A flag as seccomp(2) takes it. The kernel's flags are far below 2^32.
fn word(flag: libc::c_ulong) -> u32 {
    u32::try_from(flag).unwrap_or(0)
}

/// The action of a rule, or the default action. `what` is the name of its field.
pub(super) fn action(what: &str, action: Action, errno: Option<u32>) -> Result<ScmpAction> {
    if let Some(errno) = errno {
        let field = if what.ends_with("defaultAction") {
            "linux.seccomp.defaultErrnoRet".to_owned()
        } else {
            what.replace(".action", ".errnoRet")
        };
        let max = match action {
            Action::ScmpActErrno => MAX_ERRNO,
            Action::ScmpActTrace => MAX_MESSAGE,
            _ => {
                return Err(Error::new(format!(
                    "{field} is {errno}, but {action} returns no error number"
                )));
            }
        };
        if errno > max {
            return Err(Error::new(format!("{field} is {errno}; it has to be from 0 to {max}")));
        }
    }
    let number = u16::try_from(errno.unwrap_or(libc::EPERM.unsigned_abs())).unwrap_or(u16::MAX);
    Ok(match action {
        Action::ScmpActKill | Action::ScmpActKillThread => ScmpAction::KillThread,
        Action::ScmpActKillProcess => ScmpAction::KillProcess,
        Action::ScmpActTrap => ScmpAction::Trap,
        Action::ScmpActErrno => ScmpAction::Errno(number.into()),
        Action::ScmpActTrace => ScmpAction::Trace(number),
        Action::ScmpActLog => ScmpAction::Log,
        Action::ScmpActAllow => ScmpAction::Allow,
        Action::ScmpActNotify => {
            return Err(Error::new(format!(
                "{what} is {action}, which is not supported: system calls in a microVM cannot be \
                 handed to a listener on the host"
            )));
        }
    })
}

/// Architectures of the profile that the guest can run. Programs of all others never run in it.
fn architectures(profile: &LinuxSeccomp) -> BTreeSet<Abi> {
    let listed = profile.architectures().iter().flatten();
    listed
        .filter_map(|arch| {
            let abi = abi(arch);
            if abi.is_none() {
                log::debug!("linux.seccomp.architectures: {arch} cannot run in the guest");
            }
            abi
        })
        .collect()
}

pub(super) fn abi(arch: &Arch) -> Option<Abi> {
    match arch {
        Arch::ScmpArchNative | Arch::ScmpArchX86_64 => Some(Abi::X8664),
        Arch::ScmpArchX86 => Some(Abi::X86),
        Arch::ScmpArchX32 => Some(Abi::X32),
        _ => None,
    }
}

/// The parts of a profile that hold for all its rules.
struct Program {
    default: ScmpAction,
    /// ABIs that the profile lists. The 64-bit ABI is in a filter even if it is not listed.
    known: BTreeSet<Abi>,
}

impl Program {
    fn compile(&self, profile: &LinuxSeccomp) -> Result<Vec<u64>> {
        static API: Once = Once::new();
        API.call_once(|| {
            if let Err(e) = libseccomp::set_api(API_LEVEL) {
                log::debug!("libseccomp does not know API level {API_LEVEL}: {e}");
            }
        });
        let mut filter = ScmpFilterContext::new(self.default).map_err(failed)?;
        for abi in self.known.iter().filter(|abi| **abi != Abi::X8664) {
            filter.add_arch(abi.token()).map_err(failed)?;
        }
        let rules = profile.syscalls().as_deref().unwrap_or_default();
        if rules.iter().map(|rule| rule.names().len()).sum::<usize>() >= TREE_FROM {
            filter.set_ctl_optimize(2).map_err(failed)?;
        }
        let mut unknown = BTreeSet::new();
        for (index, rule) in rules.iter().enumerate() {
            let name = format!("linux.seccomp.syscalls[{index}]");
            self.add(&mut filter, &name, rule, &mut unknown)?;
        }
        if !unknown.is_empty() {
            let names: Vec<&str> = unknown.into_iter().collect();
            log::debug!("linux.seccomp: unknown system calls, left out: {}", names.join(", "));
        }
        export(&filter)
    }

    fn add<'a>(
        &self,
        filter: &mut ScmpFilterContext,
        name: &str,
        rule: &'a LinuxSyscall,
        unknown: &mut BTreeSet<&'a str>,
    ) -> Result<()> {
        let action = action(&format!("{name}.action"), rule.action(), rule.errno_ret())?;
        let args = rule.args().as_deref().unwrap_or_default();
        let mut conditions = Vec::with_capacity(args.len());
        for (index, arg) in args.iter().enumerate() {
            conditions.push(condition(&format!("{name}.args[{index}]"), arg)?);
        }
        if rule.names().iter().any(String::is_empty) {
            return Err(Error::new(format!("{name}.names has an empty name")));
        }
        // libseccomp refuses rules that change nothing.
        if action == self.default {
            return Ok(());
        }
        // Two conditions on one argument make all conditions alternatives, as in other runtimes.
        let mut seen = BTreeSet::new();
        let alternatives = !args.iter().all(|arg| seen.insert(arg.index()));
        for syscall in rule.names() {
            let Ok(number) = ScmpSyscall::from_name(syscall) else {
                unknown.insert(syscall);
                continue;
            };
            let added = if alternatives {
                conditions.iter().try_for_each(|condition| {
                    filter.add_rule_conditional(action, number, &[*condition]).map(drop)
                })
            } else {
                filter.add_rule_conditional(action, number, &conditions).map(drop)
            };
            added.map_err(|e| {
                Error::new(format!("{name}: libseccomp refuses the rule for {syscall}: {e}"))
            })?;
        }
        Ok(())
    }

    /// The largest number of a system call that any rule names, for each listed ABI.
    fn last_syscalls(&self, profile: &LinuxSeccomp) -> Vec<(Abi, u32)> {
        let rules = || profile.syscalls().iter().flatten().flat_map(LinuxSyscall::names);
        let last = |abi: Abi| {
            let number = |name: &String| {
                let syscall = ScmpSyscall::from_name_by_arch(name, abi.token()).ok()?;
                // System calls that the ABI does not have are negative.
                u32::try_from(syscall.as_raw_syscall()).ok()
            };
            rules().filter_map(number).max()
        };
        self.known.iter().filter_map(|abi| Some((*abi, last(*abi)?))).collect()
    }
}

fn condition(name: &str, arg: &LinuxSeccompArg) -> Result<ScmpArgCompare> {
    let index =
        u32::try_from(arg.index()).ok().filter(|_| arg.index() < ARGS).ok_or_else(|| {
            Error::new(format!(
                "{name}.index is {}; it has to be from 0 to {}",
                arg.index(),
                ARGS - 1
            ))
        })?;
    let (operator, value) = match arg.op() {
        Operator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        Operator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        Operator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        Operator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        Operator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        Operator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // The value is the mask. The second value is compared with the masked argument.
        Operator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(arg.value()), arg.value_two().unwrap_or(0))
        }
    };
    Ok(ScmpArgCompare::new(index, operator, value))
}

/// Takes the instructions from libseccomp. Before version 2.6 it writes to file descriptors only.
fn export(filter: &ScmpFilterContext) -> Result<Vec<u64>> {
    let what = || "cannot take the filter of linux.seccomp from libseccomp".to_owned();
    let mut file: File =
        memfd_create("seccomp", MemfdFlags::CLOEXEC).map(File::from).explain(what)?;
    filter.export_bpf(&file).map_err(failed)?;
    let mut program = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut program)).explain(what)?;
    let (instructions, rest) = program.as_chunks();
    if instructions.is_empty() || !rest.is_empty() {
        return Err(Error::new(format!("{}: it is cut off", what())));
    }
    Ok(instructions.iter().copied().map(u64::from_ne_bytes).collect())
}

fn failed(e: SeccompError) -> Error {
    Error::new(format!("cannot compile linux.seccomp: {e}"))
}
