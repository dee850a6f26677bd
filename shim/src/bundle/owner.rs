//! Ids of users and groups.

use oci_spec::runtime::User;

use crate::error::{Error, Result};

/// The largest id that runc takes.
const LARGEST: u32 = i32::MAX as u32;

/// Checks the ids of `process.user`.
pub(crate) fn user(user: &User) -> Result<()> {
    let more = user.additional_gids().iter().flatten().map(|gid| ("additionalGids", *gid));
    for (field, number) in [("uid", user.uid()), ("gid", user.gid())].into_iter().chain(more) {
        id(&format!("process.user.{field}"), number)?;
    }
    Ok(())
}

/// Checks the id of a user or a group. The kernel reads the largest `u32` as "unchanged", and the
/// unchanged id would be root's. The words are runc's.
pub(super) fn id(field: &str, number: u32) -> Result<()> {
    if number <= LARGEST {
        return Ok(());
    }
    Err(Error::new(format!("{field} is {number}: uids and gids must be in range 0-{LARGEST}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_number_leaves_root_as_it_was() {
        let with = |uid, gid, more: &[u32]| {
            let mut asked = User::default();
            asked.set_uid(uid).set_gid(gid).set_additional_gids(Some(more.to_vec()));
            user(&asked)
        };
        with(0, LARGEST, &[LARGEST]).unwrap();
        for wrong in [
            with(u32::MAX, 0, &[]),
            with(0, u32::MAX, &[]),
            with(0, 0, &[1, u32::MAX]),
            with(LARGEST + 1, 0, &[]),
        ] {
            let error = wrong.unwrap_err().to_string();
            assert!(error.contains("uids and gids must be in range 0-2147483647"), "{error}");
        }
    }
}
