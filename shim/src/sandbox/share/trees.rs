//! Mounts that a container shares with its guest: complete, with their attributes, before they are
//! attached anywhere.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, FileType, fstat},
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use super::{
    cannot_share, change_attributes,
    covers::{Covers, Follower},
    table::{Mount, MountTable, mount_at, mount_of},
};
use crate::{
    bundle::{Bind, Inner, InnerOf, Propagation, shared_hook, shared_inner, shared_name},
    error::{Explain, Result},
    sandbox::{id_map, launch::Launch},
};

/// All that a container shares.
#[derive(Debug)]
pub(in crate::sandbox) struct Trees {
    trees: Vec<Tree>,
    inner: Vec<Inner>,
}

#[derive(Debug)]
struct Tree {
    mount: OwnedFd,
    directory: bool,
    source: PathBuf,
    /// Where it goes, relative to the container's folder.
    place: PathBuf,
    /// The host's mounts and unmounts arrive in it, and whether it is read-only.
    follows: Option<bool>,
}

/// A tree that is shared mount by mount: what is mounted in it is not below it in the share, where the
/// guest could only mount it at the first use, which overlayfs takes no lower layer from (EREMOTE).
struct Split<'a> {
    of: InnerOf,
    source: &'a Path,
    read_only: bool,
    propagation: Propagation,
    /// The bind mount, if it is one.
    bind: Option<&'a Bind>,
}

impl Trees {
    /// Opens all that a container shares, as it is mounted for this process.
    ///
    /// # Errors
    ///
    /// If a source is gone or cannot be bound.
    pub(in crate::sandbox) fn open(launch: &Launch) -> Result<Self> {
        let table = MountTable::read()?;
        let mut all = Self { trees: Vec::new(), inner: Vec::new() };
        // Writable even if the container's root is read-only: the agent makes missing mount points
        // in it, as runc does, before it makes its own mount of it read-only.
        let root = Split {
            of: InnerOf::Root,
            source: &launch.rootfs,
            read_only: false,
            propagation: Propagation::of_root(&launch.spec),
            bind: None,
        };
        all.trees.push(Tree {
            mount: clone(&launch.rootfs, false, false, root.propagation)?,
            directory: true,
            source: launch.rootfs.clone(),
            place: "rootfs".into(),
            // Nobody mounts anything in there by the host's path of it.
            follows: None,
        });
        all.add_inner(&table, &root)?;
        for bind in launch.binds.iter().filter(|bind| bind.shm.is_none()) {
            let what = || cannot_share(&bind.source);
            let of = mount_at(&bind.source).explain(what)?;
            let of = table.get(of);
            // A tree that follows the host stays whole: what the host mounts and unmounts in it has its
            // place there.
            let split = bind.recursive && bind.propagation != Propagation::Slave;
            all.trees.push(Tree {
                mount: clone_bind(bind, bind.recursive && !split)?,
                directory: bind.directory,
                source: bind.source.clone(),
                place: shared_name(bind),
                follows: follows(of, bind.propagation, bind.read_only),
            });
            if let Some(mount) = of.filter(|mount| !mount.options.is_empty()) {
                let (of, options) = (InnerOf::Mount(bind.mount), mount.options.clone());
                all.inner.push(Inner { of, path: "".into(), place: "".into(), options });
            }
            if split && bind.directory {
                all.add_inner(
                    &table,
                    &Split {
                        of: InnerOf::Mount(bind.mount),
                        source: &bind.source,
                        read_only: bind.read_only,
                        propagation: match bind.propagation {
                            Propagation::PrivateTop => Propagation::Slave,
                            whole => whole,
                        },
                        bind: Some(bind),
                    },
                )?;
            }
        }
        for (index, program) in launch.hooks.iter().enumerate() {
            all.trees.push(Tree {
                mount: clone(program, false, true, Propagation::Private)?,
                directory: false,
                source: program.clone(),
                place: shared_hook(index),
                follows: None,
            });
        }
        Ok(all)
    }

    /// Opens what is mounted in a tree.
    fn add_inner(&mut self, table: &MountTable, split: &Split<'_>) -> Result<()> {
        let what = || cannot_share(split.source);
        let id = mount_at(split.source).explain(what)?;
        for (index, mount) in table.below(id, split.source).into_iter().enumerate() {
            let what = || cannot_share(&mount.point);
            let Some((tree, directory)) = clone_inner(mount, split).explain(what)? else {
                log::debug!("{}: it is hidden or gone", what());
                continue;
            };
            if let Some(map) = split.bind.and_then(|bind| bind.id_map.as_ref())
                && map.recursive
            {
                id_map::apply(tree.as_fd(), map, &mount.point)?;
            }
            let Ok(path) = mount.point.strip_prefix(split.source) else { continue };
            let mut options = mount.options.clone();
            if split.read_only {
                options.push("ro");
            }
            let place = shared_inner(split.of, index, directory);
            self.inner.push(Inner {
                of: split.of,
                path: path.to_owned(),
                place: place.clone(),
                options,
            });
            let follows =
                split.bind.and_then(|_| follows(Some(mount), split.propagation, split.read_only));
            let source = mount.point.clone();
            self.trees.push(Tree { mount: tree, directory, source, place, follows });
        }
        Ok(())
    }

    /// The mounts that are in no tree but a tree of their own, each after what it is mounted on.
    pub(in crate::sandbox) fn take_inner(&mut self) -> Vec<Inner> {
        std::mem::take(&mut self.inner)
    }

    /// The covers for what the host mounts in the trees, which have to be attached.
    ///
    /// # Errors
    ///
    /// If the kernel tells nothing of a mount.
    pub(in crate::sandbox) fn covers(&self) -> Result<Covers> {
        let followers = self.trees.iter().filter_map(|tree| Some((tree, tree.follows?)));
        let followers = followers.map(|(tree, read_only)| {
            let mount = mount_of(&tree.mount).explain(|| cannot_share(&tree.source))?;
            Ok(Follower { mount, read_only })
        });
        followers.collect::<Result<_>>().map(Covers::new)
    }

    /// Makes the container's folder and what the mounts are to be attached to.
    ///
    /// # Errors
    ///
    /// If one of these cannot be made.
    pub(in crate::sandbox) fn make_places(&self, container: &Path) -> Result<()> {
        make_dir(container)?;
        for folder in ["mounts", "hooks"] {
            if self.trees.iter().any(|tree| tree.place.starts_with(folder)) {
                make_dir(&container.join(folder))?;
            }
        }
        for tree in &self.trees {
            let place = container.join(&tree.place);
            if tree.directory {
                make_dir(&place)?;
                continue;
            }
            if let Some(directory) = tree.own_directory() {
                make_dir(&container.join(directory))?;
            }
            make_file(&place)?;
        }
        Ok(())
    }

    /// Attaches the mounts in the container's folder.
    ///
    /// # Errors
    ///
    /// If one cannot be attached. Those before it are.
    pub(in crate::sandbox) fn attach(&self, container: &Path) -> Result<()> {
        for tree in &self.trees {
            let what = || cannot_share(&tree.source);
            if let Some(directory) = tree.own_directory() {
                let directory = container.join(directory);
                attach(&itself(&directory).explain(what)?, &directory).explain(what)?;
            }
            attach(&tree.mount, &container.join(&tree.place)).explain(what)?;
        }
        Ok(())
    }
}

impl Tree {
    /// The directory of a bound file, which is a mount of its own. The guest makes a file system of each
    /// directory that is one, and only so can tell two files of equal inode numbers apart.
    fn own_directory(&self) -> Option<&Path> {
        let bound_file = !self.directory && self.place.starts_with("mounts");
        self.place.parent().filter(|_| bound_file)
    }
}

fn attach(tree: &OwnedFd, place: &Path) -> rustix::io::Result<()> {
    move_mount(tree.as_fd(), "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// A read-only mount of a directory of the share, without what is mounted in it.
fn itself(directory: &Path) -> std::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, directory, flags)?;
    // Private: as a peer of the share it would have each mount twice.
    change_attributes(tree.as_fd(), libc::MOUNT_ATTR_RDONLY, 0, libc::MS_PRIVATE)?;
    Ok(tree)
}

/// A mount of `source` that is attached nowhere.
///
/// Device nodes cannot be opened through it: a guest that makes one gets no device of the host. Its
/// own devices work, since its kernel opens those itself.
pub(in crate::sandbox) fn clone(
    source: &Path,
    recursive: bool,
    read_only: bool,
    propagation: Propagation,
) -> Result<OwnedFd> {
    let what = || cannot_share(source);
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, source, flags).explain(what)?;
    set_up(&tree, read_only, propagation).explain(what)?;
    Ok(tree)
}

/// A mount of what a bind mount shows, attached nowhere, with the owners that it is to show.
pub(in crate::sandbox) fn clone_bind(bind: &Bind, recursive: bool) -> Result<OwnedFd> {
    let tree = clone(&bind.source, recursive, bind.read_only, bind.propagation)?;
    if let Some(map) = &bind.id_map {
        id_map::apply(tree.as_fd(), map, &bind.source)?;
    }
    Ok(tree)
}

/// As [`clone`], of one of the mounts in a tree, and whether it is a directory. None if nobody sees it.
fn clone_inner(mount: &Mount, split: &Split<'_>) -> std::io::Result<Option<(OwnedFd, bool)>> {
    let Some(root) = mount.open()? else { return Ok(None) };
    let directory = FileType::from_raw_mode(fstat(&root)?.st_mode) == FileType::Directory;
    Ok(Some((clone_of(&root, split.read_only, split.propagation)?, directory)))
}

/// As [`clone`], of an open directory or file, without what is mounted in it.
pub(super) fn clone_of(
    root: &OwnedFd,
    read_only: bool,
    propagation: Propagation,
) -> std::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(root, "", flags)?;
    set_up(&tree, read_only, propagation)?;
    Ok(tree)
}

/// Whether a tree of that mount follows the host, and is read-only.
fn follows(mount: Option<&Mount>, propagation: Propagation, read_only: bool) -> Option<bool> {
    let receives = mount.is_some_and(|mount| mount.slave) && propagation == Propagation::Slave;
    receives.then_some(read_only)
}

/// Gives a detached tree the attributes of what is shared.
fn set_up(tree: &OwnedFd, read_only: bool, propagation: Propagation) -> std::io::Result<()> {
    let mut set = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
    if read_only {
        set |= libc::MOUNT_ATTR_RDONLY;
    }
    // Either way what happens to these mounts in the share never reaches those of the host. A private
    // mount is none that the host finds when it unmounts below the source, so it keeps nothing busy.
    let (all, top) = match propagation {
        Propagation::Private => (libc::MS_PRIVATE, None),
        Propagation::PrivateTop => (libc::MS_SLAVE, Some(libc::MS_PRIVATE)),
        Propagation::Slave => (libc::MS_SLAVE, None),
    };
    change_attributes(tree.as_fd(), set, 0, all)?;
    if let Some(propagation) = top {
        let attr = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation, userns_fd: 0 };
        super::mount_setattr(tree.as_fd(), false, &attr)?;
    }
    Ok(())
}

fn make_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .mode(0o755)
        .create(path)
        .explain(|| format!("cannot make {}", path.display()))
}

fn make_file(path: &Path) -> Result<()> {
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)
        .map(drop)
        .explain(|| format!("cannot make {}", path.display()))
}
