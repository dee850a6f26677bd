//! Disks that come while the guest runs.
//!
//! The VMM keeps a few virtio-mmio devices empty. The driver has looked at each of them at the boot,
//! and has left it alone. When an empty one has become a disk, the driver is told to look again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Context as _, Error, Result};

/// Devices of the platform bus.
const DEVICES: &str = "/sys/bus/platform/devices";

/// The driver's files that take the name of a device.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// Longest wait for the kernel to let go of a file system. A container that has ended takes its
/// mounts along, and the kernel unmounts them a little later.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(20);

/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// A disk as the kernel names it.
pub(crate) struct Disk {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    /// Name of its node in `/dev`.
    pub(crate) name: String,
}

/// Has the driver look at a device, which has become a disk. Blocks. After an error the driver has
/// not got the device.
pub(crate) fn attach(number: u32) -> Result<Disk> {
    let what = || format!("attach disk virtio-mmio.{number}");
    fs::write(format!("{DRIVER}/bind"), format!("virtio-mmio.{number}")).context(what)?;
    let found = find(number).context(what).and_then(|disk| {
        disk.ok_or_else(|| {
            Error::internal(format!("{}: the kernel has made no disk of it", what()))
        })
    });
    if found.is_err() {
        unbind(number)?;
    }
    found
}

/// Writes back a disk, and takes it from its driver. Blocks. After an error it is in use as before.
pub(crate) fn detach(number: u32) -> Result<()> {
    let what = || format!("detach disk virtio-mmio.{number}");
    if let Some(disk) = find(number).context(what)? {
        let file = open_exclusive(&disk.name)?;
        file.sync_all().context(what)?;
    }
    unbind(number)
}

fn unbind(number: u32) -> Result<()> {
    let what = || format!("detach disk virtio-mmio.{number}");
    fs::write(format!("{DRIVER}/unbind"), format!("virtio-mmio.{number}")).context(what)
}

/// Opens a disk that no file system is mounted from.
fn open_exclusive(name: &str) -> Result<File> {
    let path = Path::new("/dev").join(name);
    let deadline = Instant::now() + UNMOUNT_LIMIT;
    loop {
        // For a block device, O_EXCL fails while the kernel itself uses it.
        match File::options().read(true).custom_flags(libc::O_EXCL).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {
                if Instant::now() > deadline {
                    let path = path.display();
                    return Err(Error::state(format!("a file system on {path} is still mounted")));
                }
                // The kernel tells nobody of an unmount in another mount namespace.
                std::thread::sleep(PAUSE);
            }
            opened => return opened.context(|| format!("open {}", path.display())),
        }
    }
}

/// The disk that a device is. `None` if it is none.
fn find(number: u32) -> io::Result<Option<Disk>> {
    let device = Path::new(DEVICES).join(format!("virtio-mmio.{number}"));
    for virtio in fs::read_dir(device)? {
        let virtio = virtio?;
        if !virtio.file_name().as_encoded_bytes().starts_with(b"virtio") {
            continue;
        }
        let Ok(disks) = fs::read_dir(virtio.path().join("block")) else { continue };
        for disk in disks {
            let disk = disk?;
            let numbers = fs::read_to_string(disk.path().join("dev"))?;
            let numbers = numbers.trim().split_once(':');
            let numbers = numbers.and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
            let Some((major, minor)) = numbers else { continue };
            let name = disk.file_name().to_string_lossy().into_owned();
            return Ok(Some(Disk { major, minor, name }));
        }
    }
    Ok(None)
}
