//! Directories, names and inodes.

use std::fs::{self, File, Permissions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::stat::Mode;

use super::{OrSay, Outcome, fails, same};

fn write(path: &Path, text: &str) -> Outcome {
    fs::write(path, text).or_say("write")
}

fn text(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).or_say("read")
}

pub(super) fn rename_over(dir: &Path) -> Outcome {
    let (new, old) = (dir.join("new"), dir.join("old"));
    write(&new, "new")?;
    write(&old, "old")?;
    let mut open = File::open(&old).or_say("open")?;
    fs::rename(&new, &old).or_say("rename")?;
    same("text under the name", text(&old)?, "new".to_owned())?;
    same("source still there", new.exists(), false)?;
    let mut held = String::new();
    open.read_to_string(&mut held).or_say("read of the replaced file")?;
    same("text of the replaced file", held.as_str(), "old")
}

pub(super) fn rename_no_replace(dir: &Path) -> Outcome {
    let (a, b) = (dir.join("a"), dir.join("b"));
    write(&a, "a")?;
    write(&b, "b")?;
    let rename = |flags| renameat2(AT_FDCWD, &a, AT_FDCWD, &b, flags).map_err(Into::into);
    fails("RENAME_NOREPLACE", rename(RenameFlags::RENAME_NOREPLACE), libc::EEXIST)?;
    same("text after it", text(&b)?, "b".to_owned())?;
    rename(RenameFlags::RENAME_EXCHANGE).map_err(|e: std::io::Error| format!("exchange: {e}"))?;
    same("exchanged text", (text(&a)?, text(&b)?), ("b".to_owned(), "a".to_owned()))
}

pub(super) fn rename_directory(dir: &Path) -> Outcome {
    fs::create_dir_all(dir.join("a/inner")).or_say("mkdir")?;
    write(&dir.join("a/inner/file"), "deep")?;
    fails("rename into itself", fs::rename(dir.join("a"), dir.join("a/inner/a")), libc::EINVAL)?;
    fs::create_dir(dir.join("full")).or_say("mkdir")?;
    write(&dir.join("full/file"), "")?;
    fails("rename over a full one", fs::rename(dir.join("a"), dir.join("full")), libc::ENOTEMPTY)?;
    fs::rename(dir.join("a"), dir.join("b")).or_say("rename")?;
    same("text in the moved directory", text(&dir.join("b/inner/file"))?, "deep".to_owned())?;
    fails("rmdir of a full one", fs::remove_dir(dir.join("b")), libc::ENOTEMPTY)
}

pub(super) fn unlink_while_open(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let mut options = File::options();
    let mut file = options.create_new(true).read(true).write(true).open(&path).or_say("create")?;
    file.write_all(b"before").or_say("write")?;
    fs::remove_file(&path).or_say("unlink")?;
    fails("open by name", File::open(&path), libc::ENOENT)?;
    file.write_all(b" after").or_say("write to the unlinked file")?;
    same("links", file.metadata().or_say("fstat of the unlinked file")?.nlink(), 0)?;
    file.rewind().or_say("lseek")?;
    let mut held = String::new();
    file.read_to_string(&mut held).or_say("read of the unlinked file")?;
    same("text", held.as_str(), "before after")?;
    write(&path, "another")?;
    file.rewind().or_say("lseek")?;
    held.clear();
    file.read_to_string(&mut held).or_say("read of the unlinked file")?;
    same("text beside a new file of that name", held.as_str(), "before after")
}

pub(super) fn hard_links(dir: &Path) -> Outcome {
    let (first, second) = (dir.join("first"), dir.join("second"));
    write(&first, "one")?;
    fs::hard_link(&first, &second).or_say("link")?;
    let stat = |path| fs::metadata(path).or_say("stat");
    same("inode", stat(&second)?.ino(), stat(&first)?.ino())?;
    same("links", stat(&first)?.nlink(), 2)?;
    write(&second, "two")?;
    same("text by the other name", text(&first)?, "two".to_owned())?;
    fails("link over a name", fs::hard_link(&first, &second), libc::EEXIST)?;
    fs::remove_file(&first).or_say("unlink")?;
    same("links after unlink", stat(&second)?.nlink(), 1)
}

pub(super) fn symbolic_links(dir: &Path) -> Outcome {
    write(&dir.join("file"), "target")?;
    symlink("file", dir.join("link")).or_say("symlink")?;
    same("text through the link", text(&dir.join("link"))?, "target".to_owned())?;
    let target = fs::read_link(dir.join("link")).or_say("readlink")?;
    same("target", target.as_path(), Path::new("file"))?;
    symlink("nothing", dir.join("dangling")).or_say("symlink")?;
    fails("open of a dangling link", File::open(dir.join("dangling")), libc::ENOENT)?;
    symlink("loop", dir.join("loop")).or_say("symlink")?;
    fails("open of a loop", File::open(dir.join("loop")), libc::ELOOP)?;
    let nofollow = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(dir.join("link"));
    fails("O_NOFOLLOW", nofollow, libc::ELOOP)?;
    let long = "x".repeat(4000);
    symlink(&long, dir.join("long")).or_say("symlink to a long target")?;
    let target = fs::read_link(dir.join("long")).or_say("readlink")?;
    same("long target", target.as_path(), Path::new(&long))
}

pub(super) fn dot_dot(dir: &Path) -> Outcome {
    let stat = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).or_say("stat");
    same(".. of a directory", stat(&dir.join("..")), stat(dir.parent().unwrap_or(dir)))?;
    same("/..", stat(Path::new("/..")), stat(Path::new("/")))?;
    same("many ..", stat(Path::new("/../../../../../../..")), stat(Path::new("/")))?;
    symlink("../../../../../../../../..", dir.join("up")).or_say("symlink")?;
    same("a link of many ..", stat(&dir.join("up")), stat(Path::new("/")))
}

pub(super) fn long_names(dir: &Path) -> Outcome {
    let longest = "n".repeat(255);
    write(&dir.join(&longest), "long")?;
    same("text", text(&dir.join(&longest))?, "long".to_owned())?;
    let entry = fs::read_dir(dir).or_say("readdir")?.next();
    let listed = entry.and_then(Result::ok).map(|e| e.file_name());
    same("listed name", listed, Some(longest.into()))?;
    let too_long = dir.join("n".repeat(256));
    fails("256 bytes", File::create(&too_long), libc::ENAMETOOLONG)?;
    fails("mkdir with 256 bytes", fs::create_dir(&too_long), libc::ENAMETOOLONG)?;
    write(&dir.join("ünï \n\u{1}\"\\*"), "odd")?;
    same("text by an odd name", text(&dir.join("ünï \n\u{1}\"\\*"))?, "odd".to_owned())
}

pub(super) fn many_names(dir: &Path) -> Outcome {
    let mut made: Vec<String> = (0..600).map(|n| format!("a-name-of-some-length-{n}")).collect();
    for name in &made {
        write(&dir.join(name), "")?;
    }
    let list = || -> Result<Vec<String>, String> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir).or_say("readdir")? {
            names.push(entry.or_say("readdir")?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    };
    made.sort();
    let listed = list()?;
    same("number of names listed", listed.len(), made.len())?;
    same("every name listed once", listed == made, true)?;
    for name in made.drain(..300) {
        fs::remove_file(dir.join(name)).or_say("unlink")?;
    }
    same("every name left listed once", list()? == made, true)
}

pub(super) fn exclusive_create(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let create = || File::options().write(true).create_new(true).mode(0o600).open(&path);
    create().or_say("O_EXCL")?;
    fails("O_EXCL again", create(), libc::EEXIST)?;
    fails("mkdir over a file", fs::create_dir(&path), libc::EEXIST)?;
    fails("open below a file", File::open(path.join("x")), libc::ENOTDIR)?;
    fails("unlink of a directory", fs::remove_file(dir), libc::EISDIR)?;
    fails("write to a directory", File::options().write(true).open(dir), libc::EISDIR)
}

pub(super) fn mode_and_owner(dir: &Path) -> Outcome {
    let path = dir.join("file");
    write(&path, "x")?;
    let stat = || fs::metadata(&path).map(|m| (m.mode() & 0o7777, m.uid(), m.gid())).or_say("stat");
    fs::set_permissions(&path, Permissions::from_mode(0o4750)).or_say("chmod")?;
    same("mode and owner", stat()?, (0o4750, 0, 0))?;
    chown(&path, Some(1000), Some(1001)).or_say("chown")?;
    // chown(2) clears the set-user-ID bit (inode(7)).
    same("mode and owner after chown", stat()?, (0o750, 1000, 1001))?;
    let sub = dir.join("sub");
    fs::create_dir(&sub).or_say("mkdir")?;
    chown(&sub, None, Some(1001)).or_say("chown")?;
    fs::set_permissions(&sub, Permissions::from_mode(0o2775)).or_say("chmod")?;
    write(&sub.join("child"), "")?;
    let group = fs::metadata(sub.join("child")).or_say("stat")?.gid();
    same("group of a file in a set-group-id directory", group, 1001)
}

pub(super) fn times(dir: &Path) -> Outcome {
    let path = dir.join("file");
    write(&path, "x")?;
    let at = UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789);
    let times = fs::FileTimes::new().set_accessed(at).set_modified(at);
    let file = File::options().write(true).open(&path).or_say("open")?;
    file.set_times(times).or_say("utimens")?;
    let found = fs::metadata(&path).or_say("stat")?;
    same("modification time", (found.mtime(), found.mtime_nsec()), (1_234_567_890, 123_456_789))?;
    write(&path, "y")?;
    let later = fs::metadata(&path).or_say("stat")?.mtime();
    same("a write sets a later time", later > 1_234_567_890, true)
}

pub(super) fn special_files(dir: &Path) -> Outcome {
    let fifo = dir.join("fifo");
    nix::unistd::mkfifo(&fifo, Mode::from_bits_truncate(0o600)).or_say("mkfifo")?;
    same("type of a fifo", fs::metadata(&fifo).or_say("stat")?.file_type().is_fifo(), true)?;
    let writer = std::thread::spawn({
        let fifo = fifo.clone();
        move || fs::write(fifo, "through")
    });
    same("text through the fifo", text(&fifo)?, "through".to_owned())?;
    writer.join().map_err(|_| "the writer".to_owned())?.or_say("write to the fifo")?;
    let listener = UnixListener::bind(dir.join("socket")).or_say("bind a socket")?;
    let mut client = UnixStream::connect(dir.join("socket")).or_say("connect")?;
    let (mut server, _) = listener.accept().or_say("accept")?;
    client.write_all(b"hello").or_say("send")?;
    let mut heard = [0; 5];
    server.read_exact(&mut heard).or_say("receive")?;
    same("text through the socket", &heard, b"hello")
}
