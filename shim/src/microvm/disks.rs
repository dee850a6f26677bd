//! Block devices of the host in the microVM. Each takes a slot of the VMM, and becomes a virtio disk
//! while the guest runs.
//!
//! Containers of a pod that have the same device share one disk: two disks would be two caches.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use isopod_vmm::{
    config::MAX_DISK_SLOTS,
    control::{VmmAction, VmmReply},
};
use rustix::{
    fs::{FileType, Mode, OFlags, makedev, mknodat, openat},
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout, timeout_at},
};

use crate::{
    bundle::{Bundle, Disk, GuestDisk, is_first_of_pod},
    error::{Error, ErrorKind, Explain, Result},
    microvm::{agent::Agent, vmm::Vmm},
    settings,
    text::{printable, seconds},
};

/// Longest time for the guest to take a disk, and to give up the disks of a container. It waits for
/// their data.
const GUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// A block device of the host that is open.
#[derive(Debug)]
pub(crate) struct OpenDisk {
    /// The container's wish.
    pub disk: Disk,
    file: OwnedFd,
    read_only: bool,
}

impl OpenDisk {
    /// Opens the disks of a container.
    ///
    /// # Errors
    ///
    /// If the host's kernel does not open a device.
    pub(crate) fn open_all(disks: &[Disk]) -> Result<Vec<Self>> {
        disks.iter().map(Self::open).collect()
    }

    fn open(disk: &Disk) -> Result<Self> {
        let what = || cannot_use(disk);
        let flags = OFlags::CLOEXEC | if disk.read_only() { OFlags::RDONLY } else { OFlags::RDWR };
        let node = node(disk).explain(what)?;
        let (file, read_only) = match openat(&node, NODE, flags, Mode::empty()) {
            // A device that nobody may write, as a loop device of `losetup --read-only`.
            Err(Errno::ROFS | Errno::ACCESS) if !disk.read_only() => {
                let flags = OFlags::CLOEXEC | OFlags::RDONLY;
                (openat(&node, NODE, flags, Mode::empty()).explain(what)?, true)
            }
            opened => (opened.explain(what)?, disk.read_only()),
        };
        Ok(Self { disk: disk.clone(), file, read_only: read_only || is_read_only(disk) })
    }

    /// Takes disks apart, to be passed to another process.
    pub(crate) fn into_parts(disks: Vec<Self>) -> (Vec<bool>, Vec<OwnedFd>) {
        disks.into_iter().map(|open| (open.read_only, open.file)).unzip()
    }

    /// The disks of these parts, with their descriptors in the same order. Fails if one is missing.
    pub(crate) fn with(
        disks: &[Disk],
        read_only: &[bool],
        files: &mut impl Iterator<Item = OwnedFd>,
    ) -> Result<Vec<Self>> {
        let one = |(disk, read_only): (&Disk, &bool)| {
            let missing = || Error::new(format!("{}: it was not passed", cannot_use(disk)));
            let file = files.next().ok_or_else(missing)?;
            Ok(Self { disk: disk.clone(), file, read_only: *read_only })
        };
        disks.iter().zip(read_only).map(one).collect()
    }
}

/// Name of the node in the file system of [`node`].
const NODE: &str = "disk";

/// Makes a node for a device, in a file system of its own that nobody else sees. So the device is
/// the one of these numbers, whatever `/dev` has.
fn node(disk: &Disk) -> rustix::io::Result<OwnedFd> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(fs.as_fd())?;
    let root = fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let device = makedev(disk.major, disk.minor);
    mknodat(&root, NODE, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, device)?;
    Ok(root)
}

/// Tells whether the host's kernel writes to the device at all. A node can be opened for writing
/// anyway.
fn is_read_only(disk: &Disk) -> bool {
    let path = format!("/sys/dev/block/{}:{}/ro", disk.major, disk.minor);
    std::fs::read_to_string(path).is_ok_and(|ro| ro.trim() == "1")
}

/// The error text for a disk that cannot be given to the microVM.
fn cannot_use(disk: &Disk) -> String {
    format!(
        "cannot give block device {}:{} ({}) to the microVM",
        disk.major,
        disk.minor,
        disk.path.display()
    )
}

/// Number of places for disks of containers that come after this one. Only a pod has such containers.
///
/// # Errors
///
/// If the operator's setting cannot be read.
pub(crate) fn spare_disks(bundle: &Bundle) -> Result<u8> {
    let annotations = bundle.spec.annotations().iter().flatten();
    let annotations = annotations.map(|(key, value)| (key.clone(), value.clone())).collect();
    if is_first_of_pod(&annotations) { settings::disks() } else { Ok(0) }
}

/// Number of places for disks: those of the first container, and as many spare ones as there is room
/// for.
///
/// # Errors
///
/// If the first container has more disks than a microVM may have.
pub(crate) fn slots(own: usize, spare: u8) -> Result<u8> {
    match u8::try_from(own) {
        Ok(own @ 0..=MAX_DISK_SLOTS) => Ok(own.saturating_add(spare).min(MAX_DISK_SLOTS)),
        _ => Err(Error::new(format!(
            "config.json asks for {own} block devices, and a microVM has {MAX_DISK_SLOTS} at most"
        ))),
    }
}

/// The slots of a microVM.
#[derive(Debug)]
pub(crate) struct DiskSlots(Mutex<Vec<Slot>>);

#[derive(Debug)]
enum Slot {
    Free,
    InUse {
        /// Number of the device on the host, and true for a disk that the guest may only read.
        device: (u32, u32, bool),
        /// Number of the virtio-mmio device in the guest.
        number: u32,
        guest: GuestDisk,
        /// Number of uses by containers. 0 if the guest could not give the disk up.
        users: usize,
    },
    /// A step with the device of this number on the host has not come to its end. The guest may
    /// have its data in a cache.
    Unknown {
        device: (u32, u32),
    },
}

/// Slots that a container uses.
#[derive(Debug, Default)]
pub(crate) struct AttachedDisks {
    slots: Vec<usize>,
    /// The disks in the guest, in the order of the container's wishes.
    pub(crate) guest: Vec<GuestDisk>,
}

impl DiskSlots {
    /// The slots of a microVM that has `count` of them.
    pub(crate) fn new(count: u8) -> Self {
        Self(Mutex::new((0..count).map(|_| Slot::Free).collect()))
    }

    /// Gives disks to the guest.
    ///
    /// # Errors
    ///
    /// If too few slots are free, or VMM or guest do not take a disk. The disks before it are taken
    /// back then.
    pub(crate) async fn attach(
        &self,
        vmm: &Vmm,
        agent: &Agent,
        disks: Vec<OpenDisk>,
    ) -> Result<AttachedDisks> {
        let mut attached = AttachedDisks::default();
        for disk in disks {
            match self.attach_one(vmm, agent, &disk).await {
                Ok((slot, guest)) => {
                    attached.slots.push(slot);
                    attached.guest.push(guest);
                }
                Err(error) => {
                    self.detach(vmm, agent, attached).await;
                    return Err(error);
                }
            }
        }
        Ok(attached)
    }

    async fn attach_one(
        &self,
        vmm: &Vmm,
        agent: &Agent,
        open: &OpenDisk,
    ) -> Result<(usize, GuestDisk)> {
        let Disk { major, minor, .. } = open.disk;
        let wanted = (major, minor, open.read_only);
        let what = || cannot_use(&open.disk);
        let mut slots = self.0.lock().await;
        for (index, slot) in slots.iter_mut().enumerate() {
            match slot {
                Slot::InUse { device, guest, users, .. } if *device == wanted => {
                    *users += 1;
                    return Ok((index, guest.clone()));
                }
                // A second disk would be a second cache of the same device.
                Slot::Unknown { device } if *device == (major, minor) => {
                    return Err(Error::new(format!(
                        "{}: the guest has not given it up after an earlier container: end the pod",
                        what()
                    )));
                }
                _ => {}
            }
        }
        let free = slots.iter().position(|slot| matches!(slot, Slot::Free)).ok_or_else(|| {
            Error::new(format!(
                "{}: its {} places for disks are taken: set `disks` in /etc/isopod/config.toml to \
                 the number of disks of a pod",
                what(),
                slots.len()
            ))
        })?;
        slots[free] = Slot::Unknown { device: (major, minor) };
        // There are no more slots than a byte can number.
        let slot = u8::try_from(free).unwrap_or(u8::MAX);
        let path = open.disk.path.display().to_string();
        let action = VmmAction::AttachDisk { slot, path, read_only: open.read_only };
        let number = match vmm.request(&action, Some(open.file.as_fd())).await? {
            VmmReply::Attached { number } => number,
            reply => {
                slots[free] = Slot::Free;
                return Err(refused(what(), reply));
            }
        };
        let taken = timeout(GUEST_TIMEOUT, agent.attach_disk(number)).await;
        let answered = taken.is_ok();
        match taken.unwrap_or_else(|_| Err(late("take"))) {
            Ok(guest) => {
                let named = guest.clone();
                slots[free] = Slot::InUse { device: wanted, number, guest, users: 1 };
                Ok((free, named))
            }
            Err(error) => {
                // A guest that is late may take whatever is in the slot next.
                if give_back(vmm, slot).await && answered {
                    slots[free] = Slot::Free;
                }
                Err(Error { message: format!("{}: {}", what(), error.message), ..error })
            }
        }
    }

    /// Takes back the disks of a container that has ended. A disk that the guest does not give up
    /// stays until the microVM ends.
    pub(crate) async fn detach(&self, vmm: &Vmm, agent: &Agent, attached: AttachedDisks) {
        let mut slots = self.0.lock().await;
        let deadline = Instant::now() + GUEST_TIMEOUT;
        for index in attached.slots {
            let Some(Slot::InUse { device, number, users, guest }) = slots.get_mut(index) else {
                continue;
            };
            *users -= 1;
            if *users > 0 {
                continue;
            }
            let (device, number, name) = ((device.0, device.1), *number, guest.name.clone());
            let given_up = match timeout_at(deadline, agent.detach_disk(number)).await {
                Ok(Ok(())) => Ok(()),
                // The guest uses the disk as before, and so does the next container.
                Ok(Err(error)) => {
                    warn_unless_lost(&name, &error);
                    continue;
                }
                Err(_) => Err(late("give up")),
            };
            slots[index] = Slot::Unknown { device };
            match (given_up, u8::try_from(index)) {
                (Ok(()), Ok(slot)) if give_back(vmm, slot).await => slots[index] = Slot::Free,
                (Err(error), _) => warn_unless_lost(&name, &error),
                _ => {}
            }
        }
    }
}

/// Has the VMM take a disk out of its slot. Returns true if it has.
async fn give_back(vmm: &Vmm, slot: u8) -> bool {
    match vmm.request(&VmmAction::DetachDisk { slot }, None).await {
        Ok(VmmReply::Done) => true,
        Ok(reply) => {
            log::warn!("{}", refused("a disk stays in the microVM until that ends".into(), reply));
            false
        }
        // The microVM is ending.
        Err(error) => {
            log::debug!("{error}");
            false
        }
    }
}

fn warn_unless_lost(name: &str, error: &Error) {
    match error.kind {
        ErrorKind::VmLost => log::debug!("{error}"),
        _ => log::warn!("disk {name} stays in the microVM until that ends: {error}"),
    }
}

fn late(what: &str) -> Error {
    Error::new(format!("the guest does not {what} the disk within {}", seconds(GUEST_TIMEOUT)))
}

fn refused(what: String, reply: VmmReply) -> Error {
    match reply {
        VmmReply::Failed { message } => Error::new(format!("{what}: {}", printable(&message))),
        _ => Error::new(format!("{what}: the VMM gave an answer to another request")),
    }
}
