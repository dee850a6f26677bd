//! Names in layers: the path of an entry from the root of the tree.

use crate::{
    error::{Error, Result},
    text::quoted,
};

/// Longest path in bytes: the most that Linux takes at once (`PATH_MAX` in linux/limits.h).
const MAX_LEN: usize = 4096;

/// The parts of a path from the root on. None of them is empty, `.` or `..`. The root has no parts.
pub(super) type Parts<'a> = Vec<&'a [u8]>;

/// Splits a path of a layer. It is relative to the root of the tree, even with a leading slash. As
/// in engines, `..` takes back the part before it, whatever that part is.
///
/// A path that leads out of the tree, has a NUL byte or is too long, is an error.
pub(super) fn parts(path: &[u8]) -> Result<Parts<'_>> {
    if path.contains(&0) {
        return Err(Error::new("its path has a NUL byte"));
    }
    if path.len() > MAX_LEN {
        return Err(Error::new(format!("its path is longer than {MAX_LEN} bytes")));
    }
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                if parts.pop().is_none() {
                    return Err(Error::new("its path leads out of the root file system"));
                }
            }
            name => parts.push(name),
        }
    }
    Ok(parts)
}

/// The meaning of an entry's name.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Name<'a> {
    /// The root of the tree.
    Root,
    /// A file of any kind, as its directory and its name.
    File(&'a [&'a [u8]], &'a [u8]),
    /// A name of lower layers that the directory no longer has.
    Whiteout(&'a [&'a [u8]], &'a [u8]),
    /// A directory that no longer has anything of lower layers.
    Opaque(&'a [&'a [u8]]),
    /// An internal file of a file system, left in the layer.
    Foreign,
}

/// Finds the meaning of an entry's path (image-spec layer.md, "Whiteouts"). A whiteout that names
/// no file, or a file below a whiteout, is an error.
pub(super) fn name<'a>(parts: &'a [&'a [u8]]) -> Result<Name<'a>> {
    let Some((last, parents)) = parts.split_last() else { return Ok(Name::Root) };
    // Whiteouts come from AUFS, and old layers have its `.wh..wh.plnk` and the like.
    if parents.iter().any(|part| part.starts_with(b".wh..wh.")) {
        return Ok(Name::Foreign);
    }
    if let Some(part) = parents.iter().find(|part| part.starts_with(b".wh.")) {
        return Err(Error::new(format!("{} is a whiteout, and cannot hold files", quoted(part))));
    }
    match last.strip_prefix(b".wh.") {
        None => Ok(Name::File(parents, last)),
        Some(b".wh..opq") => Ok(Name::Opaque(parents)),
        Some(b"" | b"." | b"..") => Err(Error::new("it is a whiteout without a file name")),
        Some(rest) if rest.starts_with(b".wh.") => Ok(Name::Foreign),
        Some(hidden) => Ok(Name::Whiteout(parents, hidden)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(path: &[u8]) -> Result<Vec<u8>> {
        parts(path).map(|parts| parts.join(&b'/'))
    }

    #[test]
    fn paths_are_relative_to_the_root_and_stay_in_it() {
        for (path, expected) in [
            ("a/b", "a/b"),
            ("/a//b/", "a/b"),
            ("./a/./b", "a/b"),
            ("a/../b", "b"),
            ("./", ""),
            ("/", ""),
            ("a/..", ""),
            ("...", "..."),
        ] {
            assert_eq!(joined(path.as_bytes()).unwrap(), expected.as_bytes(), "{path}");
        }
        for path in ["..", "../a", "a/../../b", "/../etc/passwd", "./.."] {
            let message = joined(path.as_bytes()).unwrap_err().message;
            assert!(message.contains("leads out"), "{path}: {message}");
        }
        assert!(joined(b"a\0b").is_err());
        assert!(joined(&[b'a'; 4097]).is_err());
    }

    #[test]
    fn whiteouts_are_told_from_files() {
        let of = |path: &'static str| {
            let parts: &'static [&'static [u8]] = parts(path.as_bytes()).unwrap().leak();
            name(parts)
        };
        let (a, b): (&[u8], &[u8]) = (b"a", b"b");
        assert_eq!(of("/").unwrap(), Name::Root);
        assert_eq!(of("a/b").unwrap(), Name::File(&[a], b));
        assert_eq!(of("a/.wh.b").unwrap(), Name::Whiteout(&[a], b));
        assert_eq!(of("a/.wh..wh..opq").unwrap(), Name::Opaque(&[a]));
        assert_eq!(of("a/.wh..wh..opq/").unwrap(), Name::Opaque(&[a]));
        assert_eq!(of(".wh..hidden").unwrap(), Name::Whiteout(&[], b".hidden"));
        assert_eq!(of(".wh..wh.plnk/1.2").unwrap(), Name::Foreign);
        assert_eq!(of(".wh..wh.aufs").unwrap(), Name::Foreign);
        for path in [".wh.", "a/.wh..", "a/.wh...", ".wh.a/b", "a/.wh.b/.wh.c"] {
            assert!(of(path).is_err(), "{path}");
        }
        // The `..` takes the whiteout back, so this is a file.
        assert_eq!(of(".wh.a/../b").unwrap(), Name::File(&[], b));
    }
}
