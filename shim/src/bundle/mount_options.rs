//! Checks of mount options, as far as they can be told without the file system that takes them.

use oci_spec::runtime::Mount;

use crate::error::{Error, Result};

/// Attributes of a mount. With a leading `r`, of all mounts below it too.
const ATTRIBUTES: &[&str] = &[
    "ro",
    "rw",
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "noexec",
    "exec",
    "nodiratime",
    "diratime",
    "nosymfollow",
    "symfollow",
    "noatime",
    "atime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
];

/// Propagation, with or without a leading `r`.
const PROPAGATION: &[&str] = &["private", "shared", "slave", "unbindable"];

/// Options that ask for what is anyway.
const NEUTRAL: &[&str] =
    &["", "defaults", "async", "nolazytime", "nomand", "silent", "loud", "bind", "rbind"];

/// Options that the guest cannot honour.
const REFUSED: &[&str] = &["remount", "mand", "idmap", "ridmap"];

/// Checks the options of a mount, which is called `name`.
///
/// # Errors
///
/// The first that cannot be honoured.
pub(super) fn check(name: &str, mount: &Mount, bind: bool) -> Result<()> {
    for option in mount.options().iter().flatten().map(String::as_str) {
        let refusal =
            |why: &str| Err(Error::new(format!("{name} has the option {option:?}, which {why}")));
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

fn is_of_a_bind(option: &str) -> bool {
    let known = |option| ATTRIBUTES.contains(&option) || PROPAGATION.contains(&option);
    NEUTRAL.contains(&option) || known(option) || option.strip_prefix('r').is_some_and(known)
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
        ] {
            assert_eq!(failure(kind, options), None);
        }
        for (kind, option) in
            [("bind", "mode=755"), ("bind", "idmap"), ("proc", "tmpcopyup"), ("tmpfs", "remount")]
        {
            let error = failure(kind, &[option]).unwrap();
            assert!(error.contains(&format!("{option:?}")), "{error}");
        }
    }
}
