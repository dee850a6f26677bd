//! The mount table of this process's mount namespace (proc_pid_mountinfo(5)).

use std::{
    ffi::OsString,
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, open, openat, statx},
    io::Errno,
};

use crate::error::{Explain, Result};

/// Options of a mount that its bind mounts inherit, as mount(8) spells them.
const INHERITED: [&str; 7] =
    ["ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "nosymfollow"];

/// All mounts. Parents come before their children wherever the kernel lists them so.
#[derive(Debug)]
pub(crate) struct MountTable(Vec<Mount>);

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) id: u64,
    /// Id of the mount that it is mounted on.
    pub(crate) parent: u64,
    /// Mount point, as this process sees it.
    pub(crate) point: PathBuf,
    /// The options that bind mounts of it inherit.
    pub(crate) options: Vec<&'static str>,
    /// True if it receives mounts from another mount.
    pub(crate) slave: bool,
    /// True if it cannot be bind-mounted.
    unbindable: bool,
}

impl MountTable {
    /// Reads the table.
    pub(crate) fn read() -> Result<Self> {
        let path = "/proc/thread-self/mountinfo";
        let text = fs::read(path).explain(|| format!("cannot read {path}"))?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &[u8]) -> Self {
        Self(text.split(|&byte| byte == b'\n').filter_map(Mount::parse).collect())
    }

    /// The mount with the id `id`.
    pub(crate) fn get(&self, id: u64) -> Option<&Mount> {
        self.0.iter().find(|mount| mount.id == id)
    }

    /// The mounts that a recursive bind mount of the directory `source` brings along. `source` lies
    /// on the mount `id`. Each mount comes after its parent.
    pub(crate) fn below(&self, id: u64, source: &Path) -> Vec<&Mount> {
        self.descendants(id, |mount| mount.point.starts_with(source) && mount.point != source)
    }

    /// All mounts on the mount `id`, and on these, in the same order.
    pub(crate) fn inside(&self, id: u64) -> Vec<&Mount> {
        self.descendants(id, |_| true)
    }

    fn descendants(&self, id: u64, first: impl Fn(&Mount) -> bool) -> Vec<&Mount> {
        let mut found: Vec<&Mount> = Vec::new();
        // Last in, first out: the mount that is to come first is put in last.
        let mut todo: Vec<&Mount> = self.children(id).filter(|mount| first(mount)).collect();
        todo.reverse();
        while let Some(mount) = todo.pop() {
            // An unbindable mount stays behind, with all mounts on it.
            if mount.unbindable || found.iter().any(|known| known.id == mount.id) {
                continue;
            }
            found.push(mount);
            let above = todo.len();
            todo.extend(self.children(mount.id));
            todo[above..].reverse();
        }
        found
    }

    fn children(&self, id: u64) -> impl Iterator<Item = &Mount> {
        self.0.iter().filter(move |mount| mount.parent == id && mount.id != id)
    }
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|&byte| byte == b' ');
        let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
        let (id, parent) = (number()?, number()?);
        // Device and the root within the file system come between.
        let point = unescape(fields.nth(2)?);
        let options = std::str::from_utf8(fields.next()?).ok()?;
        let options = INHERITED.into_iter().filter(|own| options.split(',').any(|o| o == *own));
        let tags: Vec<&[u8]> = fields.take_while(|field| *field != b"-").collect();
        Some(Self {
            id,
            parent,
            point,
            options: options.collect(),
            slave: tags.iter().any(|tag| tag.starts_with(b"master:")),
            unbindable: tags.contains(&&b"unbindable"[..]),
        })
    }

    /// Opens the root of the mount. `None` if another mount hides it, if it is gone, or if nobody
    /// may look at it, as with some FUSE mounts of users.
    pub(crate) fn open(&self) -> rustix::io::Result<Option<OwnedFd>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = match open(&self.point, flags, Mode::empty()) {
            Ok(root) => root,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS | Errno::LOOP) => return Ok(None),
            Err(e) => return Err(e),
        };
        Ok((mount_of(&root)? == self.id).then_some(root))
    }
}

/// Id of the mount that a file lies on.
pub(crate) fn mount_of(file: impl AsFd) -> rustix::io::Result<u64> {
    // The request and `stx_mask` have the same bit (STATX_MNT_ID).
    let wanted = StatxFlags::MNT_ID;
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    Ok(statx(file, c"", flags, wanted)?.stx_mnt_id)
}

/// Id of the mount that a path lies on.
pub(crate) fn mount_at(path: &Path) -> rustix::io::Result<u64> {
    mount_of(openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// Decodes a path of the table, which has white space and backslashes in octal.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| first == b'\\');
        let code =
            octal.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 8).ok());
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 21 0:25 / /srv/a/x ro,nosuid,relatime shared:2 - tmpfs none rw
31 30 0:26 / /srv/a/x/deep rw,nodev,noexec master:4 - tmpfs none rw
32 21 0:27 / /srv/ab rw - tmpfs none rw
33 21 0:28 / /srv/a/with\\040space rw - tmpfs none rw
34 21 0:29 / /srv/a/no rw unbindable - tmpfs none rw
35 34 0:30 / /srv/a/no/more rw - tmpfs none rw
36 30 0:31 / /srv/a/x rw,noatime - tmpfs none rw
";

    #[test]
    fn what_is_mounted_below_comes_after_its_parent() {
        let table = MountTable::parse(TABLE.as_bytes());
        let points = |id: u64, source: &str| {
            let below = table.below(id, Path::new(source));
            below.iter().map(|mount| mount.id).collect::<Vec<_>>()
        };
        assert_eq!(points(21, "/srv/a"), [30, 31, 36, 33]);
        assert_eq!(points(21, "/srv/a/x/deep"), [] as [u64; 0]);
        assert_eq!(points(30, "/srv/a/x"), [31]);
        assert_eq!(table.inside(30).iter().map(|mount| mount.id).collect::<Vec<_>>(), [31, 36]);
        assert_eq!(points(21, "/"), [30, 31, 36, 32, 33]);
        assert_eq!(table.get(33).unwrap().point, Path::new("/srv/a/with space"));
    }

    #[test]
    fn bind_mounts_inherit_options() {
        let table = MountTable::parse(TABLE.as_bytes());
        assert_eq!(table.get(30).unwrap().options, ["ro", "nosuid"]);
        assert_eq!(table.get(31).unwrap().options, ["nodev", "noexec"]);
        assert_eq!(table.get(36).unwrap().options, ["noatime"]);
        assert!(table.get(31).unwrap().slave && !table.get(30).unwrap().slave);
    }

    #[test]
    fn a_table_that_is_none_is_empty() {
        for text in ["", "\n\n", "x", "1 2 3", "1 x 8:1 / / rw - ext4 a b"] {
            assert!(MountTable::parse(text.as_bytes()).0.is_empty(), "{text:?}");
        }
        assert_eq!(unescape(b"a\\04"), Path::new("a\\04"));
    }

    #[test]
    fn the_root_is_in_this_process_s_table() {
        let table = MountTable::read().unwrap();
        let id = mount_at(Path::new("/")).unwrap();
        let root = table.get(id).unwrap();
        assert_eq!(mount_of(root.open().unwrap().unwrap()).unwrap(), id);
    }
}
