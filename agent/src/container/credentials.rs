//! Credentials of a process: user, groups and capabilities.

use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

use isopod_protocol::capability::NAMES;

use crate::error::{Code, Context as _, Error, Result};
use crate::log::log_warn;
use crate::oci::{Capabilities, ProcessSpec};

/// Replaces the agent's credentials with those of the specification.
///
/// The order matters: the bounding set needs CAP_SETPCAP, and the other sets have to survive the
/// change of user.
///
/// With `filtered`, a process without no_new_privs keeps CAP_SYS_ADMIN until execve, because
/// seccomp(2) demands one of the two. Its capabilities after execve follow from the other sets.
pub(crate) fn apply(process: &ProcessSpec, filtered: bool) -> Result<()> {
    // A missing object means no capabilities at all.
    let wanted = process.capabilities.clone().unwrap_or_default();
    drop_bounding(bits(&wanted.bounding))?;
    rustix::thread::set_keep_capabilities(true).context(|| "keep capabilities")?;
    change_user(process)?;
    rustix::thread::set_keep_capabilities(false).context(|| "stop keeping capabilities")?;
    let to_filter = if filtered && process.no_new_privileges != Some(true) {
        CapabilitySet::SYS_ADMIN
    } else {
        CapabilitySet::empty()
    };
    let sets = CapabilitySets {
        effective: CapabilitySet::from_bits_retain(bits(&wanted.effective)) | to_filter,
        permitted: CapabilitySet::from_bits_retain(bits(&wanted.permitted)) | to_filter,
        inheritable: CapabilitySet::from_bits_retain(bits(&wanted.inheritable)),
    };
    rustix::thread::set_capabilities(None, sets).context(|| "set process.capabilities")?;
    raise_ambient(bits(&wanted.ambient))
}

fn change_user(process: &ProcessSpec) -> Result<()> {
    let user = &process.user;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    // To the kernel this number means "unchanged".
    if [user.uid, user.gid].contains(&u32::MAX) {
        return Err(Error::new(
            Code::InvalidArgument,
            format!("process.user: {} is not a valid id", u32::MAX),
        ));
    }
    let groups: Vec<Gid> = user.additional_gids.iter().copied().map(Gid::from_raw).collect();
    rustix::thread::set_thread_groups(&groups)
        .context(|| format!("set process.user.additionalGids {groups:?}"))?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .context(|| format!("set process.user.gid {}", user.gid))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .context(|| format!("set process.user.uid {}", user.uid))
}

fn drop_bounding(keep: u64) -> Result<()> {
    for number in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << number);
        // The kernel refuses numbers beyond its last capability.
        let Ok(present) = rustix::thread::capability_is_in_bounding_set(one) else { break };
        if present && keep & (1 << number) == 0 {
            rustix::thread::remove_capability_from_bounding_set(one)
                .context(|| format!("drop capability {number} from the bounding set"))?;
        }
    }
    Ok(())
}

/// Raises the ambient capabilities that the kernel accepts.
///
/// The kernel refuses a capability that is unknown, or not both permitted and inheritable. [`warn`]
/// has logged these.
fn raise_ambient(wanted: u64) -> Result<()> {
    rustix::thread::clear_ambient_capability_set().context(|| "clear the ambient capabilities")?;
    for number in (0..64).filter(|number| wanted & (1 << number) != 0) {
        let one = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::configure_capability_in_ambient_set(one, true) {
            Ok(()) | Err(Errno::PERM | Errno::INVAL) => {}
            Err(e) => return Err(e).context(|| format!("raise ambient capability {number}")),
        }
    }
    Ok(())
}

/// The set as a mask of the kernel's capability numbers.
fn bits(names: &[String]) -> u64 {
    names.iter().filter_map(|name| number(name)).fold(0, |bits, number| bits | 1 << number)
}

/// Logs the requested capabilities that the process will not get.
///
/// Common specifications name ambient capabilities that are not permitted and inheritable. Newer
/// ones may have names that are unknown here.
pub(crate) fn warn(capabilities: &Capabilities) {
    let unknown = unknown(capabilities);
    if !unknown.is_empty() {
        log_warn!("process.capabilities: {} unknown and left out", unknown.join(" "));
    }
    let beyond = beyond_ambient(capabilities);
    if !beyond.is_empty() {
        let names = beyond.join(" ");
        log_warn!("process.capabilities.ambient: {names} not permitted and inheritable, left out");
    }
}

fn unknown(capabilities: &Capabilities) -> Vec<&str> {
    let Capabilities { bounding, effective, inheritable, permitted, ambient } = capabilities;
    let all = [bounding, effective, inheritable, permitted, ambient].into_iter().flatten();
    let mut unknown: Vec<&str> =
        all.map(String::as_str).filter(|name| number(name).is_none()).collect();
    unknown.sort_unstable();
    unknown.dedup();
    unknown
}

/// Ambient capabilities that are not both permitted and inheritable.
fn beyond_ambient(capabilities: &Capabilities) -> Vec<&str> {
    let possible = bits(&capabilities.permitted) & bits(&capabilities.inheritable);
    let known = |name: &&str| number(name).is_some_and(|number| possible & (1 << number) == 0);
    capabilities.ambient.iter().map(String::as_str).filter(known).collect()
}

fn number(name: &str) -> Option<usize> {
    let name = name.strip_prefix("CAP_")?;
    NAMES.iter().position(|known| *known == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        let set = ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"];
        assert_eq!(bits(&set.map(String::from)), 1 | 1 << 5 | 1 << 21 | 1 << 40);
        assert_eq!(bits(&["CAP_FLY".into(), "CAP_CHOWN".into()]), 1);
    }

    #[test]
    fn what_is_left_out_is_known() {
        let of = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let asked = Capabilities {
            ambient: of(&["CAP_KILL", "CAP_CHOWN", "CAP_FLY"]),
            permitted: of(&["CAP_KILL", "CAP_CHOWN", "CAP_DIVE", "CAP_FLY"]),
            inheritable: of(&["CAP_KILL"]),
            ..Capabilities::default()
        };
        assert_eq!(unknown(&asked), ["CAP_DIVE", "CAP_FLY"]);
        assert_eq!(beyond_ambient(&asked), ["CAP_CHOWN"]);
    }
}
