//! Id-mapped mounts: files of the host that have other owners in the container.

use std::{fs::Metadata, os::unix::fs::MetadataExt};

use oci_spec::runtime::{LinuxIdMapping, Mount, Spec};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Options that ask for an id mapping: of the mount alone, and of all mounts below it too.
pub(super) const OPTIONS: [&str; 2] = ["idmap", "ridmap"];

/// The id in place of one without a mapping (`/proc/sys/kernel/overflowuid`, its default).
const OVERFLOW_ID: u32 = 65534;

/// The id mapping of a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// Mappings of user ids, as in `/proc/PID/uid_map` (user_namespaces(7)). A line has the first
    /// id in the file system, the first id on the host, and the number of ids.
    pub uids: String,
    /// Mappings of group ids, as `uids`.
    pub gids: String,
    /// Mounts below the source are mapped too.
    pub recursive: bool,
}

impl IdMap {
    /// The id mapping that the mount `name` asks for, if any. A mount without mappings of its own
    /// has those of the container's user namespace. An id-mapped mount has to be a bind mount and
    /// to have mappings.
    pub(super) fn of(name: &str, mount: &Mount, bind: bool, spec: &Spec) -> Result<Option<Self>> {
        let options = mount.options().iter().flatten();
        let option = options.map(String::as_str).rfind(|option| OPTIONS.contains(option));
        let own = [mount.uid_mappings(), mount.gid_mappings()]
            .map(|mappings| mappings.as_deref().unwrap_or_default());
        if option.is_none() && own.iter().all(|mappings| mappings.is_empty()) {
            return Ok(None);
        }
        let refusal = |why: &str| Err(Error::new(format!("{name} is to be id-mapped, {why}")));
        if !bind {
            return refusal("which only a bind mount can be");
        }
        let linux = spec.linux().as_ref();
        let [uids, gids] = match own {
            [[], []] => [
                linux.and_then(|linux| linux.uid_mappings().as_deref()).unwrap_or_default(),
                linux.and_then(|linux| linux.gid_mappings().as_deref()).unwrap_or_default(),
            ],
            own => own,
        };
        if uids.is_empty() || gids.is_empty() {
            return refusal(
                "but has not both uidMappings and gidMappings, nor a user namespace to take them from",
            );
        }
        if uids.iter().chain(gids).any(|mapping| mapping.size() == 0) {
            return refusal("but has a mapping of size 0, which maps nothing");
        }
        let recursive = option == Some("ridmap");
        Ok(Some(Self { uids: text(uids), gids: text(gids), recursive }))
    }
}

/// User and group of a file with the metadata `found`, as a mapping gives them to the file. An id
/// without a mapping becomes [`OVERFLOW_ID`].
pub(super) fn owner(map: Option<&IdMap>, found: &Metadata) -> (u32, u32) {
    let Some(map) = map else { return (found.uid(), found.gid()) };
    let uid = mapped(&map.uids, found.uid());
    let gid = mapped(&map.gids, found.gid());
    (uid.unwrap_or(OVERFLOW_ID), gid.unwrap_or(OVERFLOW_ID))
}

fn mapped(mappings: &str, id: u32) -> Option<u32> {
    mappings.lines().find_map(|line| {
        let mut fields = line.split(' ').map(|field| field.parse::<u32>().ok());
        let (first, host, size) = (fields.next()??, fields.next()??, fields.next()??);
        let offset = id.checked_sub(first).filter(|offset| *offset < size)?;
        host.checked_add(offset)
    })
}

/// Removes the id mapping from a mount, because the host has applied it.
pub(super) fn forget(mount: &mut Mount) {
    mount.set_uid_mappings(None).set_gid_mappings(None);
    if let Some(options) = mount.options_mut() {
        options.retain(|option| !OPTIONS.contains(&option.as_str()));
    }
}

fn text(mappings: &[LinuxIdMapping]) -> String {
    let line =
        |map: &LinuxIdMapping| format!("{} {} {}\n", map.container_id(), map.host_id(), map.size());
    mappings.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn an_id_has_one_place_on_the_host_or_none() {
        let mappings = "0 100000 10\n20 7 1\n";
        let found = [0, 9, 10, 20, 21].map(|id| mapped(mappings, id));
        assert_eq!(found, [Some(100_000), Some(100_009), None, Some(7), None]);
    }

    fn of(mount: Value, user: bool) -> Result<Option<IdMap>> {
        let mut spec = json!({"ociVersion": "1.2.0", "linux": {}});
        if user {
            spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 1000, "size": 2}]);
            spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100, "size": 1}]);
        }
        let mut object = json!({"destination": "/d", "options": ["bind"]});
        object.as_object_mut().unwrap().extend(mount.as_object().unwrap().clone());
        let mount: Mount = serde_json::from_value(object).unwrap();
        let bind = mount.options().iter().flatten().any(|option| option == "bind");
        IdMap::of("mounts[0] (/d)", &mount, bind, &serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn mappings_are_the_mounts_or_the_containers() {
        assert_eq!(of(json!({}), true).unwrap(), None);
        let map = of(json!({"options": ["bind", "idmap", "ridmap"]}), true).unwrap().unwrap();
        assert_eq!((&*map.uids, &*map.gids, map.recursive), ("0 1000 2\n", "0 100 1\n", true));
        let two = json!([{"containerID": 5, "hostID": 6, "size": 1},
                         {"containerID": 7, "hostID": 8, "size": 9}]);
        let own = json!({"uidMappings": two, "gidMappings": two});
        let map = of(own, true).unwrap().unwrap();
        assert_eq!((&*map.uids, map.recursive), ("5 6 1\n7 8 9\n", false));
        assert_eq!(map.gids, map.uids);
    }

    #[test]
    fn what_cannot_be_mapped_is_refused() {
        let one = json!([{"containerID": 0, "hostID": 1, "size": 1}]);
        let none = json!([{"containerID": 0, "hostID": 1, "size": 0}]);
        for (mount, why) in [
            (json!({"options": ["bind", "idmap"]}), "nor a user namespace"),
            (json!({"uidMappings": one}), "not both"),
            (json!({"uidMappings": one, "gidMappings": none}), "size 0"),
            (json!({"options": ["idmap"]}), "only a bind mount"),
        ] {
            let error = of(mount, false).unwrap_err().message;
            assert!(error.contains("mounts[0] (/d)") && error.contains(why), "{error}");
        }
    }
}
