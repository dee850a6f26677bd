//! The text that `isopod config` prints: each key of the settings file with its default, commented
//! out.
//!
//! Tests compare the keys with those of the parser, and the defaults with the parser's.

/// A key of the settings file.
struct Key {
    name: &'static str,
    /// The default as TOML.
    default: &'static str,
    /// Lines for the operator.
    doc: &'static [&'static str],
}

/// Lines before the first key.
const HEAD: &str = "\
# Settings of isopod for this host. Its place is /etc/isopod/config.toml.
#
# Each key is shown with its default; remove the # before a key to change it. Containers keep the
# settings that they were made with. `isopod config --check` tells whether the file is right.
";

/// All keys, in the order of the text.
const KEYS: [Key; 9] = [
    Key {
        name: "vmm",
        default: "\"\"",
        doc: &[
            "Path of the virtual machine monitor. If empty, it is beside isopod, or in",
            "libexec/isopod next to the directory of isopod. ISOPOD_VMM goes first.",
        ],
    },
    Key {
        name: "kernel",
        default: "\"\"",
        doc: &[
            "Path of the guest kernel. If empty, it is `vmlinux` beside isopod, or in",
            "share/isopod next to the directory of isopod. ISOPOD_KERNEL goes first.",
        ],
    },
    Key {
        name: "initramfs",
        default: "\"\"",
        doc: &[
            "Path of the guest image. If empty, it is `isopod.initramfs` beside isopod, or in",
            "share/isopod next to the directory of isopod. ISOPOD_INITRAMFS goes first.",
        ],
    },
    Key {
        name: "kernel_params",
        default: "\"\"",
        doc: &[
            "Parameters for the end of the guest kernel's command line, as \"loglevel=7\".",
            "ISOPOD_KERNEL_PARAMS takes their place.",
        ],
    },
    Key {
        name: "share_kernel",
        default: "false",
        doc: &[
            "With true, all microVMs share the pages of the guest kernel that it does not change.",
            "That saves 10 MiB for each microVM. A guest may then measure which kernel code other",
            "guests use. Replace the kernel's file by a rename only.",
        ],
    },
    Key {
        name: "nics",
        default: "2",
        doc: &[
            "Network devices of a microVM whose network namespace is empty at create, from 0 to 8.",
            "They are for networks that an engine attaches before the start.",
        ],
    },
    Key {
        name: "disks",
        default: "4",
        doc: &[
            "Places for block devices of the host in the microVM of a pod, from 0 to 7. Containers",
            "of the pod that have the same device share a place.",
        ],
    },
    Key {
        name: "host_sockets",
        default: "[]",
        doc: &[
            "Absolute paths of unix sockets of the host that containers may mount. /run/app/* means",
            "every socket of that directory. All containers of this host may use them.",
        ],
    },
    Key {
        name: "allowed_annotations",
        default: "[]",
        doc: &[
            "Annotations that pods and other containers of containerd and CRI-O may have, of:",
            "dev.isopod.memory_mib, dev.isopod.vcpus, dev.isopod.nics, dev.isopod.nested.",
            "All others of isopod are refused there. A size that an annotation sets is not bounded",
            "by the limits of the pod. The command line, which Docker and Podman call, takes all.",
        ],
    },
];

/// A settings file with all keys commented out.
pub fn default_text() -> String {
    let mut text = HEAD.to_owned();
    for Key { name, default, doc } in KEYS {
        text.push('\n');
        for line in doc {
            text.push_str(&format!("# {line}\n"));
        }
        text.push_str(&format!("#{name} = {default}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use super::*;
    use crate::{
        settings::{CONFIG_FILE, ConfigFile},
        toml_text::parse,
    };

    #[test]
    fn every_key_is_documented() {
        let parsed = serde_json::to_value(ConfigFile::default()).unwrap();
        let of_the_parser: BTreeSet<&str> =
            parsed.as_object().unwrap().keys().map(String::as_str).collect();
        let documented: BTreeSet<&str> = KEYS.iter().map(|key| key.name).collect();
        assert_eq!(documented, of_the_parser);
        assert!(KEYS.len() < 20 && KEYS.iter().all(|key| !key.doc.is_empty()));
    }

    #[test]
    fn the_text_has_the_defaults_with_and_without_its_marks() {
        let path = Path::new(CONFIG_FILE);
        let text = default_text();
        assert_eq!(parse::<ConfigFile>(&text, path).unwrap(), ConfigFile::default());
        // A key is right behind its mark, a comment is not.
        let marked =
            |line: &str| line.strip_prefix('#').is_some_and(|l| !l.starts_with([' ', '#']));
        let keys: Vec<&str> = text.lines().filter(|l| marked(l) && l.len() > 1).collect();
        assert_eq!(keys.len(), KEYS.len(), "{text}");
        let open: String = text
            .lines()
            .map(|l| if marked(l) { &l[1..] } else { l })
            .map(|l| format!("{l}\n"))
            .collect();
        assert_eq!(parse::<ConfigFile>(&open, path).unwrap(), ConfigFile::default(), "{open}");
        assert!(text.lines().all(|line| line.len() <= 100), "{text}");
    }

    #[test]
    fn the_text_names_the_place_of_the_file() {
        assert!(HEAD.contains(CONFIG_FILE));
        let annotations = KEYS.iter().find(|key| key.name == "allowed_annotations").unwrap();
        let text = annotations.doc.concat();
        for annotation in crate::bundle::ANNOTATIONS {
            assert!(text.contains(annotation), "{annotation}");
        }
    }
}
