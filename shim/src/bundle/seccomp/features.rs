//! Supported parts of seccomp for `features`: those parts of the specification that the compiler of
//! profiles takes.

use oci_spec::runtime::{
    Arch, LinuxSeccompAction as Action, LinuxSeccompFilterFlag as Flag, Seccomp,
};

use super::filter::{abi, action, flags};

const ACTIONS: [Action; 9] = [
    Action::ScmpActAllow,
    Action::ScmpActErrno,
    Action::ScmpActKill,
    Action::ScmpActKillProcess,
    Action::ScmpActKillThread,
    Action::ScmpActLog,
    Action::ScmpActNotify,
    Action::ScmpActTrace,
    Action::ScmpActTrap,
];

/// The operators, which all compile.
const OPERATORS: [&str; 7] = [
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
];

/// Architectures to ask the compiler about. A profile can name others, but they have no effect on a
/// guest.
const ARCHS: [Arch; 4] =
    [Arch::ScmpArchX86, Arch::ScmpArchX86_64, Arch::ScmpArchX32, Arch::ScmpArchAarch64];

const FLAGS: [Flag; 4] = [
    Flag::SeccompFilterFlagLog,
    Flag::SeccompFilterFlagSpecAllow,
    Flag::SeccompFilterFlagTsync,
    Flag::SeccompFilterFlagWaitKillableRecv,
];

/// The part of the features structure about seccomp.
pub(in crate::bundle) fn features() -> Seccomp {
    let text = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
    let supported = |flag: &&Flag| flags(Some(&[**flag])).is_ok();
    let actions = ACTIONS.into_iter().filter(|known| action("", *known, None).is_ok());
    let mut seccomp = Seccomp::default();
    seccomp
        .set_enabled(Some(true))
        .set_actions(Some(actions.collect()))
        .set_operators(Some(text(&OPERATORS)))
        .set_archs(Some(ARCHS.into_iter().filter(|arch| abi(arch).is_some()).collect()))
        .set_known_flags(Some(FLAGS.iter().map(Flag::to_string).collect()))
        .set_supported_flags(Some(FLAGS.iter().filter(supported).map(Flag::to_string).collect()));
    seccomp
}

/// The version of libseccomp, as in `2.5.4`.
pub(in crate::bundle) fn library_version() -> String {
    libseccomp::ScmpVersion::current().map_or_else(|_| "unknown".into(), |v| v.to_string())
}
