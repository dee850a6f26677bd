//! Trees: mounts that a container shares with its guest. They have all their attributes before they
//! are attached anywhere.

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
use serde::{Deserialize, Serialize};

use crate::{
    bundle::{
        Bind, Bundle, Inner, InnerOf, Projected, Propagation, shared_hook, shared_inner,
        shared_name,
    },
    error::{Error, Explain, Result},
    microvm::{
        share::{
            clone::{Depth, cannot_share, clone, clone_bind, clone_of},
            covers::{Covers, Follower},
            id_mapped,
            mount_table::{Mount, MountTable, mount_at, mount_of},
        },
        volumes::OpenVolume,
    },
    mount::change_attributes,
};

/// All trees of a container.
#[derive(Debug)]
pub(crate) struct Trees {
    trees: Vec<Tree>,
    inner: Vec<Inner>,
    /// Volumes that the guest has copies of. They are not in the share.
    volumes: Vec<OpenVolume>,
}

#[derive(Debug)]
struct Tree {
    mount: OwnedFd,
    plan: TreePlan,
}

/// Trees without their mounts, for another process that gets these as descriptors.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct TreesPlan {
    trees: Vec<TreePlan>,
    volumes: Vec<Projected>,
}

#[derive(Debug, Serialize, Deserialize)]
struct TreePlan {
    directory: bool,
    source: PathBuf,
    /// Place in the share, relative to the container's folder.
    place: PathBuf,
    /// Set if the host's mounts and unmounts arrive in the tree: true for a read-only tree.
    follows: Option<bool>,
}

impl TreesPlan {
    /// The trees of this plan, with their mounts in the same order. Fails if a mount is missing.
    pub(crate) fn with(self, mounts: &mut impl Iterator<Item = OwnedFd>) -> Result<Trees> {
        let mut next = |source: &Path| {
            let missing = || Error::new(format!("{}: it was not passed", cannot_share(source)));
            mounts.next().ok_or_else(missing)
        };
        let mut all = Trees { trees: Vec::new(), inner: Vec::new(), volumes: Vec::new() };
        for plan in self.trees {
            all.trees.push(Tree { mount: next(&plan.source)?, plan });
        }
        for volume in self.volumes {
            let tree = next(&volume.path)?;
            all.volumes.push(OpenVolume::new(volume, tree));
        }
        Ok(all)
    }
}

/// A tree that is shared mount by mount. The mounts in it are not below it in the share.
///
/// Below it the guest could mount them only at the first use, and overlayfs takes no lower layer
/// from such a place (EREMOTE).
struct Split<'a> {
    of: InnerOf,
    source: &'a Path,
    read_only: bool,
    propagation: Propagation,
    /// The bind mount, if the tree comes from a bind mount.
    bind: Option<&'a Bind>,
}

impl Trees {
    /// Opens all trees of a container, from their sources as this process sees them.
    pub(crate) fn open(bundle: &Bundle) -> Result<Self> {
        let table = MountTable::read()?;
        let mut all = Self { trees: Vec::new(), inner: Vec::new(), volumes: Vec::new() };
        for bind in &bundle.binds {
            if let Some(volume) = &bind.projected
                && all.volumes.iter().all(|open| open.volume.key != volume.key)
            {
                let tree = clone_bind(bind, Depth::Top)?;
                all.volumes.push(OpenVolume::new(volume.clone(), tree));
            }
        }
        // Writable even if the container's root is read-only. As with runc, missing mount points
        // are made in it first. Then the agent makes its own mount of it read-only.
        let root = Split {
            of: InnerOf::Root,
            source: &bundle.rootfs,
            read_only: false,
            propagation: Propagation::of_root(&bundle.spec),
            bind: None,
        };
        all.trees.push(Tree {
            mount: clone(&bundle.rootfs, Depth::Top, root.read_only, root.propagation)?,
            plan: TreePlan {
                directory: true,
                source: bundle.rootfs.clone(),
                place: "rootfs".into(),
                // Nobody mounts anything in there by its path on the host.
                follows: None,
            },
        });
        all.add_inner(&table, &root)?;
        for bind in bundle.binds.iter().filter(|bind| !bind.is_of_the_guest()) {
            let what = || cannot_share(&bind.source);
            let of = mount_at(&bind.source).explain(what)?;
            let of = table.get(of);
            // A tree that follows the host stays whole: the host's mounts and unmounts have their
            // places in it.
            let split = bind.recursive && bind.propagation != Propagation::Slave;
            let depth = if bind.recursive && !split { Depth::Whole } else { Depth::Top };
            all.trees.push(Tree {
                mount: clone_bind(bind, depth)?,
                plan: TreePlan {
                    directory: bind.directory,
                    source: bind.source.clone(),
                    place: shared_name(bind),
                    follows: follows(of, bind.propagation, bind.read_only),
                },
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
        for (index, program) in bundle.hooks.iter().enumerate() {
            all.trees.push(Tree {
                mount: clone(program, Depth::Top, true, Propagation::Private)?,
                plan: TreePlan {
                    directory: false,
                    source: program.clone(),
                    place: shared_hook(index),
                    follows: None,
                },
            });
        }
        Ok(all)
    }

    /// Opens the mounts in a tree, each as a tree of its own.
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
                id_mapped::apply(tree.as_fd(), map, &mount.point)?;
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
            let plan = TreePlan { directory, source, place, follows };
            self.trees.push(Tree { mount: tree, plan });
        }
        Ok(())
    }

    /// Mounts of the host with a tree of their own. Each comes after the mount that it lies on.
    pub(crate) fn inner(&self) -> &[Inner] {
        &self.inner
    }

    /// Takes the trees apart, to be passed to another process.
    ///
    /// # Errors
    ///
    /// If there are too many open descriptors.
    pub(crate) fn into_parts(self) -> Result<(TreesPlan, Vec<OwnedFd>)> {
        let (trees, mut mounts): (_, Vec<_>) =
            self.trees.into_iter().map(|tree| (tree.plan, tree.mount)).unzip();
        let mut volumes = Vec::new();
        for open in self.volumes {
            let (volume, tree) = open.into_parts()?;
            volumes.push(volume);
            mounts.push(tree);
        }
        Ok((TreesPlan { trees, volumes }, mounts))
    }

    /// The volumes that the guest has copies of.
    pub(crate) fn volumes(&self) -> Vec<OpenVolume> {
        self.volumes.clone()
    }

    /// Makes the covers for the host's mounts in the trees. The trees have to be attached.
    pub(crate) fn covers(&self) -> Result<Covers> {
        let followers = self.trees.iter().filter_map(|tree| Some((tree, tree.plan.follows?)));
        let followers = followers.map(|(tree, read_only)| {
            let mount = mount_of(&tree.mount).explain(|| cannot_share(&tree.plan.source))?;
            Ok(Follower { mount, read_only })
        });
        followers.collect::<Result<_>>().map(Covers::new)
    }

    /// Makes the container's folder and the mount points of the trees.
    pub(crate) fn make_places(&self, container: &Path) -> Result<()> {
        make_dir(container)?;
        for folder in ["mounts", "hooks"] {
            if self.trees.iter().any(|tree| tree.plan.place.starts_with(folder)) {
                make_dir(&container.join(folder))?;
            }
        }
        for tree in &self.trees {
            let place = container.join(&tree.plan.place);
            if tree.plan.directory {
                make_dir(&place)?;
                continue;
            }
            if let Some(directory) = tree.plan.own_directory() {
                make_dir(&container.join(directory))?;
            }
            make_file(&place)?;
        }
        Ok(())
    }

    /// Attaches the trees in the container's folder. If one of them fails, the trees before it stay
    /// attached.
    pub(crate) fn attach(&self, container: &Path) -> Result<()> {
        for tree in &self.trees {
            let what = || cannot_share(&tree.plan.source);
            if let Some(directory) = tree.plan.own_directory() {
                let directory = container.join(directory);
                attach(&itself(&directory).explain(what)?, &directory).explain(what)?;
            }
            attach(&tree.mount, &container.join(&tree.plan.place)).explain(what)?;
        }
        Ok(())
    }
}

impl TreePlan {
    /// The directory of a bound file, which is a mount of its own.
    ///
    /// The guest makes a file system of each directory that is a mount. Only so can it tell two
    /// files of equal inode numbers apart.
    fn own_directory(&self) -> Option<&Path> {
        let bound_file = !self.directory && self.place.starts_with("mounts");
        self.place.parent().filter(|_| bound_file)
    }
}

fn attach(tree: &OwnedFd, place: &Path) -> rustix::io::Result<()> {
    move_mount(tree.as_fd(), "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Makes a read-only mount of a directory of the share, without the mounts in it.
fn itself(directory: &Path) -> std::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, directory, flags)?;
    // Private: as a peer of the share it would have each mount twice.
    change_attributes(tree.as_fd(), libc::MOUNT_ATTR_RDONLY, 0, libc::MS_PRIVATE)?;
    Ok(tree)
}

/// Like [`clone`], of one of the mounts in a tree. Returns true with it if it is a directory.
/// `None` if nobody sees the mount.
fn clone_inner(mount: &Mount, split: &Split<'_>) -> std::io::Result<Option<(OwnedFd, bool)>> {
    let Some(root) = mount.open()? else { return Ok(None) };
    let directory = FileType::from_raw_mode(fstat(&root)?.st_mode) == FileType::Directory;
    Ok(Some((clone_of(&root, split.read_only, split.propagation)?, directory)))
}

/// Set if a tree of the mount follows the host: true for a read-only tree.
fn follows(mount: Option<&Mount>, propagation: Propagation, read_only: bool) -> Option<bool> {
    let receives = mount.is_some_and(|mount| mount.slave) && propagation == Propagation::Slave;
    receives.then_some(read_only)
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
