//! Mount options of config.json that are no file system's own, as fstab(5) and the runtime
//! specification spell them. The host refuses with these lists what the agent could not honour.

/// Attributes of a mount. With a leading `r`, of all mounts below it too.
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

/// Propagation, with or without a leading `r`.
pub const PROPAGATION: &[&str] = &["private", "shared", "slave", "unbindable"];

/// Options that ask for what is anyway, two of which the kernel has dropped.
pub const NEUTRAL: &[&str] = &["", "defaults", "async", "nolazytime", "nomand", "silent", "loud"];

/// Options that the guest cannot honour.
pub const REFUSED: &[&str] = &["remount", "mand", "idmap", "ridmap"];
