//! Tests of files that the host changes while the guest knows of them.

use super::*;

const SETATTR: u32 = 4;
const LINK: u32 = 13;

const MODE: u32 = 1;
const SIZE: u32 = 8;

impl FsGuest {
    fn set(&mut self, node: u64, valid: u32) -> i32 {
        let mut body = [0; 88];
        body[..4].copy_from_slice(&valid.to_le_bytes());
        body[68..72].copy_from_slice(&0o600u32.to_le_bytes());
        self.ask(SETATTR, node, &body).0
    }
}

#[test]
fn a_file_that_is_gone_is_looked_up_again() {
    let mut guest = FsGuest::new();
    fs::write(guest.path("known"), "known").unwrap();
    fs::write(guest.path("open"), "open").unwrap();
    let known = guest.lookup(ROOT, "known").unwrap();
    let open = guest.lookup(ROOT, "open").unwrap();
    // Gives the node a descriptor, and closes the handle.
    let handle = guest.open(OPEN, known, libc::O_RDONLY).unwrap();
    assert_eq!(guest.close(RELEASE, known, handle), 0);
    let handle = guest.open(OPEN, open, libc::O_RDWR).unwrap();
    for name in ["known", "open", "file"] {
        fs::remove_file(guest.path(name)).unwrap();
    }
    for flags in [libc::O_RDONLY, libc::O_WRONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(OPEN, known, flags), Err(libc::ESTALE));
    }
    for valid in [MODE, SIZE] {
        assert_eq!(guest.set(known, valid), libc::ESTALE);
        assert_eq!(guest.set(open, valid), 0);
    }
    let again = guest.open(OPEN, open, libc::O_RDONLY).unwrap();
    assert_eq!(guest.close(RELEASE, open, handle), 0);
    assert_eq!(guest.close(RELEASE, open, again), 0);
    assert_eq!(guest.open(OPEN, open, libc::O_RDONLY), Err(libc::ESTALE));
}

#[test]
fn a_file_that_was_replaced_is_another_node() {
    let mut guest = FsGuest::new();
    let old = guest.lookup(ROOT, "file").unwrap();
    for round in 0..50 {
        fs::remove_file(guest.path("file")).unwrap();
        fs::write(guest.path("file"), format!("new {round}")).unwrap();
        assert_eq!(guest.open(OPEN, old, libc::O_RDONLY), Err(libc::ESTALE), "{round}");
        let new = guest.lookup(ROOT, "file").unwrap();
        assert_ne!(new, old);
        let handle = guest.open(OPEN, new, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(new, handle), (0, format!("new {round}").into()));
        assert_eq!(guest.close(RELEASE, new, handle), 0);
    }
}

#[test]
fn names_in_a_directory_that_is_gone_are_looked_up_from_above() {
    let mut guest = FsGuest::new();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    assert_eq!(guest.lookup(dir, "x"), Err(libc::ENOENT));
    fs::remove_dir(guest.path("dir")).unwrap();
    fs::create_dir(guest.path("dir")).unwrap();
    fs::write(guest.path("dir/x"), "").unwrap();
    assert_eq!(guest.lookup(dir, "x"), Err(libc::ESTALE));
    assert_eq!(guest.ask_name(MKDIR, dir, 8, "new"), libc::ESTALE);
    assert_eq!(guest.ask_name(CREATE, dir, 16, "new"), libc::ESTALE);
    let dir = guest.lookup(ROOT, "dir").unwrap();
    assert!(guest.lookup(dir, "x").is_ok());
}

#[test]
fn a_file_that_the_guest_removes_or_renames_is_still_its_own() {
    let mut guest = FsGuest::new();
    fs::create_dir(guest.path("dir/below")).unwrap();
    fs::write(guest.path("dir/below/file"), "below").unwrap();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    let below = guest.lookup(dir, "below").unwrap();
    let file = guest.lookup(below, "file").unwrap();
    // Neither node has a descriptor yet. Both are found by the new name.
    let to = [&ROOT.to_le_bytes()[..], b"dir\0moved\0"].concat();
    assert_eq!(guest.ask(RENAME, ROOT, &to).0, 0);
    let handle = guest.open(OPEN, file, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(file, handle), (0, b"below".to_vec()));
    assert_eq!(guest.close(RELEASE, file, handle), 0);
    let unopened = guest.lookup(ROOT, "file").unwrap();
    assert_eq!(guest.ask_name(UNLINK, ROOT, 0, "file"), 0);
    let (error, attributes) = guest.ask(GETATTR, unopened, &[0; 16]);
    assert_eq!(error, 0);
    assert_eq!(attributes[16 + 64..16 + 68], [0; 4], "links");
    // A file without a name gets none.
    let link = [&unopened.to_le_bytes()[..], b"again\0"].concat();
    assert_eq!(guest.ask(LINK, ROOT, &link).0, libc::ESTALE);
    let link = [&file.to_le_bytes()[..], b"file\0"].concat();
    assert_eq!(guest.ask(LINK, ROOT, &link).0, 0);
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"below");
}

#[test]
fn a_file_without_a_name_can_be_given_one() {
    const TMPFILE: u32 = 51;
    let mut guest = FsGuest::new();
    let flags = (libc::O_TMPFILE | libc::O_RDWR) as u32;
    let head = [flags, libc::S_IFREG | 0o640, 0, 0].map(u32::to_le_bytes).concat();
    let (error, made) = guest.ask(TMPFILE, ROOT, &[&head[..], b"#1\0"].concat());
    if error == libc::EOPNOTSUPP {
        return eprintln!("left out: the file system has no such files");
    }
    assert_eq!(error, 0);
    let word = |at: usize| u64::from_le_bytes(made[at..at + 8].try_into().unwrap());
    let (node, handle) = (word(0), word(128));
    assert_eq!(fs::read_dir(guest.path("")).unwrap().count(), 2);
    assert_eq!(guest.set(node, MODE), 0);
    let link = [&node.to_le_bytes()[..], b"named\0"].concat();
    assert_eq!(guest.ask(LINK, ROOT, &link).0, 0);
    assert_eq!(guest.lookup(ROOT, "named"), Ok(node));
    assert_eq!(guest.close(RELEASE, node, handle), 0);
    assert!(guest.open(OPEN, node, libc::O_RDONLY).is_ok());
    // Only directories have such files, which need write access.
    let file = guest.lookup(ROOT, "file").unwrap();
    assert_eq!(guest.ask(TMPFILE, file, &[&head[..], b"#2\0"].concat()).0, libc::ENOTDIR);
    let read_only = [(libc::O_TMPFILE as u32), 0o640, 0, 0].map(u32::to_le_bytes).concat();
    assert_eq!(guest.ask(TMPFILE, ROOT, &[&read_only[..], b"#3\0"].concat()).0, libc::EINVAL);
}

#[test]
fn a_file_is_there_while_any_handle_of_it_is_open() {
    let mut guest = FsGuest::new();
    let head = [libc::O_RDWR as u32, libc::S_IFREG | 0o640, 0, 0].map(u32::to_le_bytes).concat();
    let (error, made) = guest.ask(CREATE, ROOT, &[&head[..], b"new\0"].concat());
    assert_eq!(error, 0);
    let word = |at: usize| u64::from_le_bytes(made[at..at + 8].try_into().unwrap());
    let (node, first) = (word(0), word(128));
    let second = guest.open(OPEN, node, libc::O_RDONLY).unwrap();
    fs::remove_file(guest.path("new")).unwrap();
    assert_eq!(guest.close(RELEASE, node, first), 0);
    assert_eq!(guest.set(node, MODE), 0);
    assert_eq!(guest.ask(GETATTR, node, &[0; 16]).0, 0);
    assert_eq!(guest.close(RELEASE, node, second), 0);
    assert_eq!(guest.set(node, MODE), libc::ESTALE);
}
