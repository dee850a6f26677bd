//! Rights with which a request of the guest's acts on the host.

use std::io;

use super::host::done;

const KEEP: u32 = u32::MAX;

/// The calling thread acts for another user until this is dropped. A file that it makes then belongs
/// to that user.
pub(super) struct Acting {
    uid: u32,
    gid: u32,
}

impl Acting {
    /// Takes the effective user and group on. The system calls are those of the kernel: the C
    /// library's change all threads.
    ///
    /// # Errors
    ///
    /// Without `CAP_SETUID` and `CAP_SETGID`.
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
        // A worker that stays somebody else would make the next request's files for the wrong user.
        if back.is_err() {
            std::process::abort();
        }
    }
}

fn set_effective_user(uid: u32) -> io::Result<()> {
    // SAFETY: it takes numbers only.
    done(unsafe { libc::syscall(libc::SYS_setresuid, KEEP, uid, KEEP) } as i32)
}

fn set_effective_group(gid: u32) -> io::Result<()> {
    // SAFETY: it takes numbers only.
    done(unsafe { libc::syscall(libc::SYS_setresgid, KEEP, gid, KEEP) } as i32)
}

/// Capabilities of the calling thread (capget(2)), in the version with two words for each set.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilitySets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const CAP_FSETID: u32 = 4;

type CapabilityWords = [CapabilitySets; 2];

/// The calling thread lacks `CAP_FSETID` until this is dropped: what it writes or truncates loses its
/// set-user-ID and set-group-ID bits, as the guest asked for.
pub(super) struct WithoutFsetid(Option<CapabilityWords>);

impl WithoutFsetid {
    /// Drops the capability if `wanted`.
    ///
    /// # Errors
    ///
    /// What the kernel says.
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
    // SAFETY: header and sets are laid out as this version of the call wants them.
    done(unsafe { libc::syscall(libc::SYS_capget, head, room) } as i32)?;
    Ok(words)
}

fn set_capabilities(words: &CapabilityWords) -> io::Result<()> {
    let mut header = [CAPABILITY_VERSION_3, 0];
    let (head, sets) = (header.as_mut_ptr(), words.as_ptr());
    // SAFETY: header and sets are laid out as this version of the call wants them.
    done(unsafe { libc::syscall(libc::SYS_capset, head, sets) } as i32)
}
