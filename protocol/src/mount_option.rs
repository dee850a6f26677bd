//! Mount options of config.json that apply to every file system, as fstab(5) and the runtime
//! specification spell them. With these lists the host refuses options that the agent cannot
//! honour.

/// Attributes of a mount. A leading `r` extends them to all mounts below it.
pub const ATTRIBUTES: &[&str] = &[
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

/// Propagation types, with or without a leading `r`.
pub const PROPAGATION: &[&str] = &["private", "shared", "slave", "unbindable"];

/// Options that ask for the default. The kernel has dropped two of them.
pub const NEUTRAL: &[&str] = &["", "defaults", "async", "nolazytime", "nomand", "silent", "loud"];

/// Options that the guest cannot honour.
pub const REFUSED: &[&str] = &["remount", "mand", "idmap", "ridmap"];
