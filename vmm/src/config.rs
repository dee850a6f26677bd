//! The configuration of a microVM: the one document that `isopod-vmm` reads, and its validation.
//!
//! The sandbox process opens every file, device and socket, and passes the descriptors on. The
//! configuration names them by number. Its paths are for messages only.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

/// Most vCPUs of a microVM.
pub const MAX_VCPUS: u8 = 32;

/// Least guest memory in MiB. The guest kernel and the agent are known to boot with it.
pub const MIN_MEMORY_MIB: u64 = 64;

/// Most guest memory in MiB (1 TiB).
pub const MAX_MEMORY_MIB: u64 = 1 << 20;

/// Most disk slots of a microVM.
pub const MAX_DISK_SLOTS: u8 = 7;

/// Most block and network devices of a microVM, disk slots included: the interrupt lines that other
/// devices leave.
pub const MAX_BLOCK_AND_NET_DEVICES: usize = 15;

/// Most network devices of a microVM.
pub const MAX_NET_DEVICES: u8 = 8;

/// Most queue pairs of a network device. A guest can use one for each vCPU.
pub const MAX_QUEUE_PAIRS: usize = MAX_VCPUS as usize;

/// Longest kernel command line of x86 Linux in bytes (`COMMAND_LINE_SIZE`, with its NUL).
pub const MAX_CMDLINE_LEN: usize = 2048;

/// Configuration of one microVM: JSON on the descriptor of `--config-fd`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Name of the sandbox. Only a reader of the document uses it.
    pub id: String,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest memory in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub memory_mib: u64,
    /// `/dev/kvm`, open for reading and writing.
    pub kvm_fd: i32,
    /// The guest kernel: an uncompressed x86-64 ELF `vmlinux`.
    pub kernel: FileRef,
    /// The guest image: a newc cpio archive with the agent as `/init`.
    pub initramfs: FileRef,
    /// Text behind the VMM's own kernel command line. May be empty.
    #[serde(default)]
    pub cmdline: String,
    /// True if the guest's processors have the host's virtualisation extensions, for microVMs
    /// inside the guest.
    #[serde(default)]
    pub nested: bool,
    /// True if the kernel's code and constants are mapped from its file, which all microVMs share,
    /// and not copied.
    #[serde(default)]
    pub share_kernel: bool,
    /// Descriptor for the kernel's console output, open for writing. The last lines are kept in
    /// memory for error reports with or without it.
    #[serde(default)]
    pub console_fd: Option<i32>,
    /// A connected `SOCK_SEQPACKET` socket for [`crate::control`].
    pub control_fd: i32,
    /// The vsock device.
    pub vsock: VsockConfig,
    /// The virtio-fs device, if the guest gets a shared directory.
    #[serde(default)]
    pub fs: Option<FsConfig>,
    /// The virtio-blk devices, `/dev/vda` onwards in the guest.
    #[serde(default)]
    pub block: Vec<BlockConfig>,
    /// The virtio-net devices, in the order in which the guest finds them.
    #[serde(default)]
    pub net: Vec<NetConfig>,
    /// Number of places for disks that come while the guest runs
    /// ([`crate::control::VmmAction::AttachDisk`]).
    #[serde(default)]
    pub disk_slots: u8,
    /// Descriptor of the directory that becomes the VMM's root before the guest runs. Its mount
    /// must be shared, so that later mounts below it arrive in the VMM. Without a descriptor the
    /// VMM keeps the caller's root, which is for experiments only.
    #[serde(default)]
    pub jail_root_fd: Option<i32>,
}

/// An open file, and its name for messages.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRef {
    /// Descriptor, open for reading.
    pub fd: i32,
    /// Path by which the file was opened.
    pub path: String,
}

/// The virtio-vsock device, and its two sockets on the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 to `u32::MAX - 1`.
    pub guest_cid: u32,
    /// A listening `SOCK_STREAM` unix socket. A client writes `CONNECT <port>\n`. When the guest
    /// accepts, the client reads `OK <host port>\n` and then has a stream to that guest port. A
    /// refused connection is closed without an answer.
    pub listen_fd: i32,
    /// A connected `SOCK_SEQPACKET` unix socket. The VMM sends one message for each connection from
    /// the guest to the host (cid 2). The message is the port as 4 bytes, little endian, with one
    /// end of a new stream socket pair (`SCM_RIGHTS`). Closing that end resets the connection.
    pub connect_fd: i32,
}

/// The virtio-fs device. It serves the VMM's root directory once the VMM is in the jail.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// Mount tag, 1 to 36 bytes (virtio 1.2, 5.11.4).
    pub tag: String,
    /// Number of worker threads, 1 to 16.
    pub workers: u8,
    /// Caching policy of a root file system.
    pub cache: FsCache,
    /// True if the guest may make block and character devices.
    #[serde(default)]
    pub devices: bool,
}

/// Caching policy of a container's root file system, which is mounted at `<id>/rootfs` of the
/// share.
///
/// The host may change all other files at any time. Names and attributes of those are never cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FsCache {
    /// Names and attributes are not cached either.
    Never,
    /// Names and attributes are cached for a second, data until the file changes.
    Auto,
    /// Names and attributes are cached for a day. For a root file system that only the guest
    /// writes.
    Always,
}

/// A raw image file or block device for the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// The open file or device, and its name for messages.
    pub file: FileRef,
    /// Serial number of the device in the guest, at most 20 bytes.
    pub serial: String,
    /// True if the guest may not write.
    pub read_only: bool,
}

/// A network interface of the guest, connected to a tap.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The queues of one tap, one for each queue pair, 1 to [`MAX_QUEUE_PAIRS`]. They were opened
    /// with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and with `IFF_MULTI_QUEUE` if there are several.
    /// All are attached. The VMM sets the header's length and the offloads.
    pub tap_fds: Vec<i32>,
    /// Descriptors of `/dev/vhost-net`, opened once for each queue pair: the host's kernel serves
    /// the queues. If empty, the VMM serves them.
    #[serde(default)]
    pub vhost_fds: Vec<i32>,
    /// A datagram socket in place of `vhost_fds`. Each message on it may carry one descriptor of
    /// `/dev/vhost-net`. The VMM reads it at the driver's first kick, and serves the queue pairs
    /// without a descriptor itself.
    #[serde(default)]
    pub vhost_socket_fd: Option<i32>,
    /// Hardware address of one interface, not of a group.
    pub mac: [u8; 6],
    /// Largest payload of a frame in bytes, 68 to 65535. Without it the guest gets no MTU.
    #[serde(default)]
    pub mtu: Option<u16>,
}

/// Reasons why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The document is not the JSON of a [`VmConfig`].
    #[error("the VM configuration is not valid: {0}")]
    Json(#[from] serde_json::Error),
    /// A number is outside its range.
    #[error("{field} is {value}; it has to be from {min} to {max}")]
    Range {
        /// Name of the field.
        field: &'static str,
        /// The refused value.
        value: u64,
        /// Least allowed value.
        min: u64,
        /// Greatest allowed value.
        max: u64,
    },
    /// A text is empty, too long, or has bytes that are not allowed.
    #[error("{field} is {value:?}; it has to be {rule}")]
    Text {
        /// Name of the field.
        field: &'static str,
        /// The refused text.
        value: String,
        /// The rule that the text breaks.
        rule: &'static str,
    },
    /// A network device has `/dev/vhost-net` for only some of its queue pairs, or in both ways.
    #[error(
        "net.vhost_fds has {vhost} descriptors for {taps} of net.tap_fds; \
         it has to have none, or as many and no net.vhost_socket_fd"
    )]
    Vhost {
        /// Number of descriptors of `/dev/vhost-net`.
        vhost: usize,
        /// Number of queue pairs.
        taps: usize,
    },
    /// Two fields name the same descriptor, or a field names a standard stream.
    #[error("descriptor {0} is given twice or is a standard stream")]
    Descriptor(i32),
    /// A descriptor of the configuration is not open, or was taken before.
    #[error("descriptor {0} is not open, or is in use already")]
    Closed(i32),
}

impl VmConfig {
    /// Reads and validates a configuration.
    ///
    /// # Errors
    ///
    /// The first [`ConfigError`] found. No descriptor has been touched then.
    pub fn from_json(json: &[u8]) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_slice(json)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every field against its range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        in_range("vcpus", self.vcpus.into(), 1, MAX_VCPUS.into())?;
        in_range("memory_mib", self.memory_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB)?;
        in_range("vsock.guest_cid", self.vsock.guest_cid.into(), 3, u64::from(u32::MAX) - 1)?;
        in_range("number of network devices", self.net.len() as u64, 0, MAX_NET_DEVICES.into())?;
        in_range("disk_slots", self.disk_slots.into(), 0, MAX_DISK_SLOTS.into())?;
        let slots = usize::from(self.disk_slots);
        let block_and_net = (self.block.len() + self.net.len() + slots) as u64;
        let max = MAX_BLOCK_AND_NET_DEVICES as u64;
        in_range("number of block and network devices", block_and_net, 0, max)?;
        text("id", &self.id, "1 to 1024 printable ASCII characters", |s| {
            (1..=1024).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_graphic())
        })?;
        // The other half is left for the VMM's own parameters.
        text("cmdline", &self.cmdline, "at most 1024 printable ASCII characters", |s| {
            s.len() <= MAX_CMDLINE_LEN / 2 && s.bytes().all(|b| (b' '..=b'~').contains(&b))
        })?;
        if let Some(fs) = &self.fs {
            in_range("fs.workers", fs.workers.into(), 1, 16)?;
            text("fs.tag", &fs.tag, "1 to 36 bytes without NUL", |s| {
                (1..=36).contains(&s.len()) && !s.contains('\0')
            })?;
        }
        for block in &self.block {
            text("block.serial", &block.serial, "at most 20 ASCII characters", |s| {
                s.len() <= 20 && s.is_ascii()
            })?;
        }
        self.net.iter().try_for_each(NetConfig::validate)?;
        let mut seen = HashSet::new();
        for fd in self.descriptors() {
            if fd <= 2 || !seen.insert(fd) {
                return Err(ConfigError::Descriptor(fd));
            }
        }
        Ok(())
    }

    /// Returns every descriptor of the configuration.
    pub fn descriptors(&self) -> Vec<i32> {
        let mut fds = vec![
            self.kvm_fd,
            self.kernel.fd,
            self.initramfs.fd,
            self.control_fd,
            self.vsock.listen_fd,
            self.vsock.connect_fd,
        ];
        fds.extend(self.console_fd);
        fds.extend(self.jail_root_fd);
        fds.extend(self.block.iter().map(|b| b.file.fd));
        for net in &self.net {
            fds.extend(net.tap_fds.iter().chain(&net.vhost_fds).chain(&net.vhost_socket_fd));
        }
        fds
    }
}

impl NetConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let (taps, vhost) = (self.tap_fds.len(), self.vhost_fds.len());
        in_range("number of net.tap_fds", taps as u64, 1, MAX_QUEUE_PAIRS as u64)?;
        if vhost != 0 && (vhost != taps || self.vhost_socket_fd.is_some()) {
            return Err(ConfigError::Vhost { vhost, taps });
        }
        // Linux's driver refuses both addresses. The specification forbids an MTU below 68 (virtio
        // 1.2, 5.1.4.1).
        if self.mac == [0; 6] || self.mac[0] & 1 != 0 {
            let value = self.mac.map(|byte| format!("{byte:02x}")).join(":");
            let rule = "the address of one interface, neither zero nor a group's";
            return Err(ConfigError::Text { field: "net.mac", value, rule });
        }
        self.mtu.map_or(Ok(()), |mtu| in_range("net.mtu", mtu.into(), 68, u16::MAX.into()))
    }
}

fn in_range(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(ConfigError::Range { field, value, min, max })
}

fn text(
    field: &'static str,
    value: &str,
    rule: &'static str,
    holds: impl Fn(&str) -> bool,
) -> Result<(), ConfigError> {
    if holds(value) {
        return Ok(());
    }
    Err(ConfigError::Text { field, value: value.to_owned(), rule })
}
