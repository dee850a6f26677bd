//! The user of an image's process: `user`, `uid`, `user:group` and so on (image-spec config.md,
//! `User`). As in engines, names are resolved in the tree's own `/etc/passwd` and `/etc/group`.

use std::{fs::File, io::Read};

use oci_spec::runtime::User;

use crate::{
    bundle::check_user,
    error::{Error, Explain, Result},
    image::{name::parts, tree::Tree},
    text::quoted,
};

/// Largest file of users or groups that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;

/// Largest number of groups that a process can be in (`NGROUPS_MAX` in linux/limits.h).
const MAX_GROUPS: usize = 65536;

/// Finds the ids for `user`. An empty `user` is root.
///
/// Numbers need no entry in the files. A named group is the only group. Without one, the user's
/// entry says the group, and the groups that list the user are added.
pub(super) fn resolve(user: &str, tree: &mut Tree) -> Result<User> {
    let (name, group) = user.split_once(':').unwrap_or((user, ""));
    let name = if name.is_empty() { "0" } else { name };
    let unknown = |file: &str, name: &str| {
        let (user, name) = (quoted(user.as_bytes()), quoted(name.as_bytes()));
        Error::new(format!("the image's process runs as {user}, but its {file} has no {name}"))
    };
    let wanted = number(name)?;
    let accounts = table(tree, "/etc/passwd")?;
    let account = accounts.iter().find_map(|fields| {
        // name:password:uid:gid:...
        let [name_there, _, uid, gid, ..] = &fields[..] else { return None };
        let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
        let same = wanted.map_or(name_there == name, |wanted| wanted == uid);
        same.then_some((name_there, uid, gid))
    });
    let (uid, own_gid) = match (account, wanted) {
        (Some((_, uid, gid)), _) => (uid, gid),
        (None, Some(uid)) => (uid, 0),
        (None, None) => return Err(unknown("/etc/passwd", name)),
    };
    let groups = table(tree, "/etc/group")?;
    // name:password:gid:members
    let groups = groups.iter().filter_map(|fields| match &fields[..] {
        [name, _, gid, rest @ ..] => {
            let members = rest.first().map(String::as_str).unwrap_or_default();
            Some((name, gid.parse::<u32>().ok()?, members))
        }
        _ => None,
    });
    let mut found = User::default();
    found.set_uid(uid);
    found.set_gid(own_gid);
    if !group.is_empty() {
        let gid = match number(group)? {
            Some(gid) => Some(gid),
            None => groups.into_iter().find(|(name, ..)| *name == group).map(|(_, gid, _)| gid),
        };
        found.set_gid(gid.ok_or_else(|| unknown("/etc/group", group))?);
    } else if let Some((name, ..)) = account {
        let mut gids: Vec<u32> = groups
            .filter(|(.., members)| members.split(',').any(|member| member == name))
            .map(|(_, gid, _)| gid)
            .take(MAX_GROUPS)
            .collect();
        gids.sort_unstable();
        gids.dedup();
        found.set_additional_gids(Some(gids).filter(|gids| !gids.is_empty()));
    }
    check_user(&found).map_err(|e| Error::new(format!("the image's process: {}", e.message)))?;
    Ok(found)
}

/// Parses the number of a user or a group. None if the text is a name.
fn number(text: &str) -> Result<Option<u32>> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    text.parse().ok().map(Some).ok_or_else(|| {
        Error::new(format!("the image's process runs as {text}, which is out of range for an id"))
    })
}

/// The lines of a file like passwd(5), as fields. A tree without the file has no lines.
fn table(tree: &mut Tree, path: &str) -> Result<Vec<Vec<String>>> {
    let what = || format!("the image's {path}");
    let Some(file) = tree.open_file(&parts(path.as_bytes())?).explain(what)? else {
        return Ok(Vec::new());
    };
    let mut bytes = Vec::new();
    File::from(file).take(MAX_FILE + 1).read_to_end(&mut bytes).explain(what)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::new(format!("{} is larger than {MAX_FILE} bytes", what())));
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    Ok(lines.map(|line| line.split(':').map(str::to_owned).collect()).collect())
}
