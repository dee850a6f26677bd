//! What to run: the one document that `isopod-vmm` reads, and its validation.
//!
//! The sandbox process opens every file, device and socket and passes the descriptors; the
//! configuration names them by number. Paths in it are for messages only.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

/// Most vCPUs that a microVM may have.
pub const MAX_VCPUS: u8 = 32;

/// Least guest memory in MiB that the guest kernel and the agent are known to boot with.
pub const MIN_MEMORY_MIB: u64 = 64;

/// Most guest memory in MiB (1 TiB).
pub const MAX_MEMORY_MIB: u64 = 1 << 20;

/// Most block and network devices of a microVM: interrupt lines without those of the others.
pub const MAX_BLOCK_AND_NET_DEVICES: usize = 15;

/// Most network devices among them.
pub const MAX_NET_DEVICES: usize = 8;

/// Most queue pairs of a network device: one for each vCPU is what a guest can use.
pub const MAX_QUEUE_PAIRS: usize = MAX_VCPUS as usize;

/// Longest kernel command line in bytes that x86 Linux takes (`COMMAND_LINE_SIZE`, with its NUL).
pub const MAX_CMDLINE_LEN: usize = 2048;

/// The whole configuration of one microVM, as JSON on the descriptor given by `--config-fd`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Name of the sandbox. It tells whoever finds this document whose it is; nothing else uses it.
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
    /// Appended to the kernel command line that the VMM composes. May be empty.
    #[serde(default)]
    pub cmdline: String,
    /// The guest's processors have the virtualisation extensions of the host's, so that it can run
    /// microVMs of its own.
    #[serde(default)]
    pub nested: bool,
    /// The kernel's code and constants are pages of its file, which all microVMs share, and not copies.
    #[serde(default)]
    pub share_kernel: bool,
    /// Receives the kernel's console output, if given: any descriptor open for writing.
    /// The last lines are kept in memory for error reports in either case.
    #[serde(default)]
    pub console_fd: Option<i32>,
    /// A connected `SOCK_SEQPACKET` socket for [`crate::control`].
    pub control_fd: i32,
    /// The vsock device.
    pub vsock: VsockConfig,
    /// The virtio-fs device, if the guest shares a directory.
    #[serde(default)]
    pub fs: Option<FsConfig>,
    /// virtio-blk devices, `/dev/vda` onwards in the guest.
    #[serde(default)]
    pub block: Vec<BlockConfig>,
    /// virtio-net devices, in the order in which the guest finds them.
    #[serde(default)]
    pub net: Vec<NetConfig>,
    /// Descriptor of the directory that becomes the VMM's root before the guest runs. Its mount
    /// must be shared, so that mounts made under it later arrive in the VMM. Without it the VMM
    /// keeps the caller's root; only for trying things out.
    #[serde(default)]
    pub jail_root_fd: Option<i32>,
}

/// An open file and the name to give it in messages.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRef {
    /// Descriptor, open for reading.
    pub fd: i32,
    /// Where the file was opened.
    pub path: String,
}

/// The virtio-vsock device and its two host sides.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 to `u32::MAX - 1`.
    pub guest_cid: u32,
    /// A listening `SOCK_STREAM` unix socket. A client writes `CONNECT <port>\n`, gets
    /// `OK <host port>\n` back when the guest accepts, and then has a stream to that guest port.
    /// A refused connection is closed without an answer.
    pub listen_fd: i32,
    /// A connected `SOCK_SEQPACKET` unix socket. For each connection that the guest makes to the
    /// host (cid 2), the VMM sends one message: the port as 4 bytes, little endian, with one end of
    /// a new stream socket pair attached (`SCM_RIGHTS`). Closing that end resets the connection.
    pub connect_fd: i32,
}

/// The virtio-fs device, which serves the VMM's root directory after the jail is entered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// Mount tag, 1 to 36 bytes (virtio 1.2, 5.11.4).
    pub tag: String,
    /// Worker threads, 1 to 16.
    pub workers: u8,
    /// How long the guest may trust what it cached of a root file system.
    pub cache: FsCache,
    /// The guest may make block and character devices.
    #[serde(default)]
    pub devices: bool,
}

/// Caching policy of a container's root file system, which is mounted at `<id>/rootfs` of the share. Of
/// all other files, which the host may change at any time, names and attributes are never cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FsCache {
    /// Names and attributes are never cached either.
    Never,
    /// Attributes and entries for a second, data until its file changes.
    Auto,
    /// For root file systems that nobody else writes.
    Always,
}

/// A raw image or block device for the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// The open file or device, and its name for messages.
    pub file: FileRef,
    /// Serial that the guest reads from the device, at most 20 bytes.
    pub serial: String,
    /// The guest may not write.
    pub read_only: bool,
}

/// A network interface of the guest, behind a tap.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The queues of one tap, one for each queue pair, 1 to [`MAX_QUEUE_PAIRS`]. They were opened
    /// with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and `IFF_MULTI_QUEUE` if there are several, and
    /// are attached. Length of the header and offloads are set by the VMM.
    pub tap_fds: Vec<i32>,
    /// `/dev/vhost-net`, opened once for each queue pair, to have the host's kernel serve the
    /// queues. Empty: the VMM serves them.
    #[serde(default)]
    pub vhost_fds: Vec<i32>,
    /// In place of `vhost_fds`: a datagram socket by which they may come later, one with each message.
    /// It is read at the driver's first kick; the VMM serves the queue pairs for which none has come
    /// by then.
    #[serde(default)]
    pub vhost_socket_fd: Option<i32>,
    /// Hardware address: one interface's own, not a group's.
    pub mac: [u8; 6],
    /// Largest payload of a frame in bytes, if the guest is to be told: 68 to 65535.
    #[serde(default)]
    pub mtu: Option<u16>,
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The document is not the JSON of a [`VmConfig`].
    #[error("the VM configuration is not valid: {0}")]
    Json(#[from] serde_json::Error),
    /// A number is outside its range.
    #[error("{field} is {value}; it has to be from {min} to {max}")]
    Range {
        /// Which number.
        field: &'static str,
        /// What it was.
        value: u64,
        /// Least value.
        min: u64,
        /// Greatest value.
        max: u64,
    },
    /// A text is empty, too long, or has bytes that its consumer cannot take.
    #[error("{field} is {value:?}; it has to be {rule}")]
    Text {
        /// Which text.
        field: &'static str,
        /// What it was.
        value: String,
        /// What it has to be.
        rule: &'static str,
    },
    /// A network device has `/dev/vhost-net` for some of its queue pairs only, or in two ways.
    #[error(
        "net.vhost_fds has {vhost} descriptors for {taps} of net.tap_fds; it has to have none, or as many \
         and no net.vhost_socket_fd"
    )]
    Vhost {
        /// Descriptors of `/dev/vhost-net`.
        vhost: usize,
        /// Queue pairs.
        taps: usize,
    },
    /// Two fields name the same descriptor, or one names a standard stream.
    #[error("descriptor {0} is given twice or is a standard stream")]
    Descriptor(i32),
    /// A descriptor that the configuration names is not there.
    #[error("descriptor {0} is not open, or is in use already")]
    Closed(i32),
}

impl VmConfig {
    /// Reads and validates a configuration.
    ///
    /// # Errors
    ///
    /// The first [`ConfigError`] found; nothing has been touched.
    pub fn from_json(json: &[u8]) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_slice(json)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every field against its range.
    ///
    /// # Errors
    ///
    /// The first [`ConfigError`] found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        in_range("vcpus", self.vcpus.into(), 1, MAX_VCPUS.into())?;
        in_range("memory_mib", self.memory_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB)?;
        in_range("vsock.guest_cid", self.vsock.guest_cid.into(), 3, u64::from(u32::MAX) - 1)?;
        in_range("number of network devices", self.net.len() as u64, 0, MAX_NET_DEVICES as u64)?;
        let block_and_net = (self.block.len() + self.net.len()) as u64;
        let max = MAX_BLOCK_AND_NET_DEVICES as u64;
        in_range("number of block and network devices", block_and_net, 0, max)?;
        text("id", &self.id, "1 to 1024 printable ASCII characters", |s| {
            (1..=1024).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_graphic())
        })?;
        // Half of it is left for what the VMM itself has to say.
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

    /// Every descriptor that the configuration names.
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
        // Linux's driver takes neither, and less than 68 is refused (virtio 1.2, 5.1.4.1).
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
