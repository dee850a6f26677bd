//! Credentials of a guest's request on the host.

use std::io;

use super::host::done;

const KEEP: u32 = u32::MAX;

/// Effective user and group of the calling thread, until the value is dropped. A new file belongs
/// to them.
pub(super) struct Acting {
    uid: u32,
    gid: u32,
}

impl Acting {
    /// Sets effective user and group, for which `CAP_SETUID` and `CAP_SETGID` are needed. The
    /// functions of the C library would change all threads, so the system calls are made directly.
    pub(super) fn for_user(uid: u32, gid: u32) -> io::Result<Self> {
        let mut acting = Self { uid: 0, gid: 0 };
        if gid != 0 {
            set_effective_group(gid)?;
            acting.gid = gid;
        }
        if uid != 0 {
            set_effective_user(uid)?;
            acting.uid = uid;
        }
        Ok(acting)
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        let back = if self.uid == 0 { Ok(()) } else { set_effective_user(0) };
        let back = back.and(if self.gid == 0 { Ok(()) } else { set_effective_group(0) });
        // A worker with another user would make the next request's files for that user.
        if back.is_err() {
            std::process::abort();
        }
    }
}

fn set_effective_user(uid: u32) -> io::Result<()> {
    // SAFETY: the call takes numbers only.
    done(unsafe { libc::syscall(libc::SYS_setresuid, KEEP, uid, KEEP) } as i32)
}

fn set_effective_group(gid: u32) -> io::Result<()> {
    // SAFETY: the call takes numbers only.
    done(unsafe { libc::syscall(libc::SYS_setresgid, KEEP, gid, KEEP) } as i32)
}

/// Capabilities of a thread in the version with two words for each set (capget(2)).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const CAP_FSETID: u32 = 4;

type CapabilityWords = [CapabilityData; 2];

/// Removes `CAP_FSETID` from the calling thread, until the value is dropped. Files that the thread
/// writes or truncates lose their set-user-ID and set-group-ID bits, as the guest requires.
pub(super) struct WithoutFsetid(Option<CapabilityWords>);

impl WithoutFsetid {
    /// Drops the capability if `wanted`.
    pub(super) fn when(wanted: bool) -> io::Result<Self> {
        if !wanted {
            return Ok(Self(None));
        }
        let own = capabilities()?;
        let mut without = own;
        without[0].effective &= !(1 << CAP_FSETID);
        set_capabilities(&without)?;
        Ok(Self(Some(own)))
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        if let Some(own) = &self.0
            && set_capabilities(own).is_err()
        {
            std::process::abort();
        }
    }
}

fn capabilities() -> io::Result<CapabilityWords> {
    let mut header = [CAPABILITY_VERSION_3, 0];
    let mut words = CapabilityWords::default();
    let (head, room) = (header.as_mut_ptr(), words.as_mut_ptr());
    // SAFETY: header and sets have the layout of this version of the call.
    done(unsafe { libc::syscall(libc::SYS_capget, head, room) } as i32)?;
    Ok(words)
}

fn set_capabilities(words: &CapabilityWords) -> io::Result<()> {
    let mut header = [CAPABILITY_VERSION_3, 0];
    let (head, sets) = (header.as_mut_ptr(), words.as_ptr());
    // SAFETY: header and sets have the layout of this version of the call.
    done(unsafe { libc::syscall(libc::SYS_capset, head, sets) } as i32)
}
