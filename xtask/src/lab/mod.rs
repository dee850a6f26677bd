//! The lab: a virtual machine with a real `kvm_amd`, for machines that have no hardware KVM.
//!
//! QEMU emulates an AMD processor with nested paging and boots Debian's cloud kernel. The root file
//! system is this machine's own: shared read-only over virtio-fs, below an overlay whose upper
//! layer is a tmpfs. Cargo's target directory is a second share, writable, at the same path. Other
//! changes on the host during a lab's run may not be seen in the lab.
//!
//! ```text
//! host                                        lab
//! Lab::boot --- qemu (child)                  initramfs.sh -> lab-init (PID 1)
//!           \-- 2 x virtiofsd (children)                        |- lab-port (one a port)
//! Lab::run --- portN.sock --- virtio-serial --- /dev/vportXpN --/     \- the command
//! ```

pub(crate) mod background;
mod boot;
mod cgroup;
mod child;
pub(crate) mod cli;
mod client;
mod command;
mod idle_vm;
pub(crate) mod init;
mod initramfs;
mod kernel;
mod machine;
mod options;
mod port;
pub(crate) mod qemu_install;
mod wire;

pub(crate) use boot::{Lab, hidden, kernel_name, needs, prepare};
pub(crate) use command::{Ended, Input, Run, Show, text};
pub(crate) use options::LabOptions;
