//! Checks of mount options, as far as these do not depend on the file system.

use isopod_protocol::mount_option::{ATTRIBUTES, NEUTRAL, PROPAGATION, REFUSED};
use oci_spec::runtime::Mount;

use crate::{
    bundle::id_map,
    error::{Error, Result},
};

/// Checks the options of the mount `name`. The error names the first option that cannot be
/// honoured.
pub(super) fn check(name: &str, mount: &Mount, bind: bool) -> Result<()> {
    for option in mount.options().iter().flatten().map(String::as_str) {
        let refusal =
            |why: &str| Err(Error::new(format!("{name} has the option {option:?}, which {why}")));
        if id_map::OPTIONS.contains(&option) {
            continue;
        }
        if REFUSED.contains(&option) {
            return refusal("is not supported");
        }
        if option == "tmpcopyup" && mount.typ().as_deref() != Some("tmpfs") {
            return refusal("is for tmpfs only");
        }
        if bind && !is_of_a_bind(option) {
            return refusal("has no meaning for a bind mount");
        }
    }
    Ok(())
}

/// The options of a bind mount that hold for the mounts below it too.
pub(super) fn recursive(mount: &Mount) -> impl Iterator<Item = &str> {
    let options = mount.options().iter().flatten().map(String::as_str);
    options.filter(|option| {
        let plain = option.strip_prefix('r');
        plain.is_some_and(|option| ATTRIBUTES.contains(&option) || PROPAGATION.contains(&option))
    })
}

fn is_of_a_bind(option: &str) -> bool {
    let known = |option| ATTRIBUTES.contains(&option) || PROPAGATION.contains(&option);
    matches!(option, "bind" | "rbind")
        || NEUTRAL.contains(&option)
        || known(option)
        || option.strip_prefix('r').is_some_and(known)
}

/// All options that are not a file system's own, sorted.
pub(super) fn known() -> Vec<String> {
    let recursive =
        [ATTRIBUTES, PROPAGATION].concat().into_iter().map(|option| format!("r{option}"));
    let plain = [ATTRIBUTES, PROPAGATION, NEUTRAL, &["bind", "rbind", "tmpcopyup"]].concat();
    let plain = [&plain[..], &id_map::OPTIONS].concat();
    let plain = plain.into_iter().filter(|option| !option.is_empty()).map(str::to_owned);
    let mut all: Vec<String> = plain.chain(recursive).collect();
    all.sort_unstable();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(kind: &str, options: &[&str]) -> Option<String> {
        let json = serde_json::json!({"destination": "/d", "type": kind, "options": options});
        let mount: Mount = serde_json::from_value(json).unwrap();
        check("mounts[0] (/d)", &mount, kind == "bind").err().map(|error| error.message)
    }

    #[test]
    fn options_without_effect_are_refused() {
        for (kind, options) in [
            ("bind", &["rbind", "rprivate", "ro", "rro", "nosuid", "rnoexec", "relatime"][..]),
            ("tmpfs", &["mode=1777", "size=64k", "tmpcopyup", "nodev", "strictatime"]),
            ("proc", &["hidepid=2"]),
            ("bind", &["bind", "ridmap"]),
        ] {
            assert_eq!(failure(kind, options), None);
        }
        for (kind, option) in [("bind", "mode=755"), ("proc", "tmpcopyup"), ("tmpfs", "remount")] {
            let error = failure(kind, &[option]).unwrap();
            assert!(error.contains(&format!("{option:?}")), "{error}");
        }
    }
}
