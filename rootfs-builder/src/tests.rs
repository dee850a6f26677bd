use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};

use super::*;

/// An entry of an archive, as read back.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    name: String,
    inode: u32,
    mode: u32,
    links: u32,
    device: (u32, u32),
    content: Vec<u8>,
}

/// Reads a whole archive, trailer included.
fn entries(mut archive: &[u8]) -> Vec<Entry> {
    let mut entries = Vec::new();
    while !archive.is_empty() {
        assert_eq!(&archive[..6], b"070701");
        let field = |index: usize| {
            let digits = std::str::from_utf8(&archive[6 + 8 * index..][..8]).unwrap();
            u32::from_str_radix(digits, 16).unwrap()
        };
        let [uid, gid, mtime, checksum] = [field(2), field(3), field(5), field(12)];
        assert_eq!([uid, gid, mtime, checksum], [0; 4]);
        let name_end = 110 + field(11) as usize;
        assert_eq!(archive[name_end - 1], 0, "a name ends with NUL");
        let name = String::from_utf8(archive[110..name_end - 1].to_vec()).unwrap();
        let content = name_end.next_multiple_of(4);
        let content_end = content + field(6) as usize;
        entries.push(Entry {
            name,
            inode: field(0),
            mode: field(1),
            links: field(4),
            device: (field(9), field(10)),
            content: archive[content..content_end].to_vec(),
        });
        archive = &archive[content_end.next_multiple_of(4)..];
    }
    entries
}

/// The smallest file that the check accepts as a static x86-64 program.
fn program(segment: u32) -> Vec<u8> {
    let mut program = vec![0; 64 + 56];
    program[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    program[16] = 2;
    program[18] = 62;
    program[32] = 64;
    program[54] = 56;
    program[56] = 1;
    program[64..68].copy_from_slice(&segment.to_le_bytes());
    program
}

fn image_of(agent: &[u8]) -> Vec<u8> {
    let mut image = Vec::new();
    let size = write(agent, &mut image).unwrap();
    assert_eq!(size, image.len() as u64);
    image
}

#[test]
fn image_holds_what_the_guest_needs() {
    for agent in [&b""[..], b"a", b"ab", b"abc", b"abcd"] {
        let entries = entries(&image_of(agent));
        let list: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.mode, e.device)).collect();
        assert_eq!(
            list,
            [
                ("dev", 0o040_755, (0, 0)),
                ("etc", 0o040_755, (0, 0)),
                ("proc", 0o040_555, (0, 0)),
                ("run", 0o040_755, (0, 0)),
                ("sys", 0o040_555, (0, 0)),
                ("tmp", 0o041_777, (0, 0)),
                ("dev/null", 0o020_666, (1, 3)),
                ("dev/console", 0o020_600, (5, 1)),
                ("init", 0o100_755, (0, 0)),
                ("TRAILER!!!", 0, (0, 0)),
            ]
        );
        assert_eq!(entries[8].content, agent);
        let inodes: Vec<_> = entries.iter().map(|e| e.inode).collect();
        assert_eq!(inodes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]);
    }
}

#[test]
fn image_is_the_same_every_time() {
    assert_eq!(image_of(b"agent"), image_of(b"agent"));
}

#[test]
fn cpio_reads_the_image() {
    let mut cpio = match Command::new("cpio")
        .args(["--list", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
    {
        Ok(cpio) => cpio,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => panic!("cannot run cpio: {error}"),
    };
    cpio.stdin.take().unwrap().write_all(&image_of(b"agent")).unwrap();
    let output = cpio.wait_with_output().unwrap();
    assert!(output.status.success());
    let list = String::from_utf8(output.stdout).unwrap();
    let names: Vec<_> = list.lines().collect();
    assert_eq!(
        names,
        ["dev", "etc", "proc", "run", "sys", "tmp", "dev/null", "dev/console", "init"]
    );
}

#[test]
fn build_replaces_an_image_in_one_step() {
    let dir = Dir::new("replace");
    let (agent, image) = (dir.0.join("agent"), dir.0.join("image"));
    fs::write(&agent, program(1)).unwrap();
    fs::write(&image, "old").unwrap();
    let old = fs::metadata(&image).unwrap().ino();
    let size = build(&agent, &image).unwrap();
    assert_eq!(fs::metadata(&image).unwrap().len(), size);
    assert_ne!(fs::metadata(&image).unwrap().ino(), old);
    assert_eq!(entries(&fs::read(&image).unwrap())[8].content, program(1));
    assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 2);
}

#[test]
fn what_fails_leaves_the_old_image_and_nothing_else() {
    let dir = Dir::new("fails");
    let (agent, image) = (dir.0.join("agent"), dir.0.join("image"));
    fs::write(&image, "old").unwrap();
    let error = build(&agent, &image).unwrap_err().to_string();
    assert!(error.starts_with("cannot read the agent"), "{error}");
    fs::write(&agent, program(3)).unwrap();
    let error = build(&agent, &image).unwrap_err().to_string();
    assert!(error.contains("linked dynamically"), "{error}");
    assert_eq!(fs::read(&image).unwrap(), b"old");

    fs::write(&agent, program(1)).unwrap();
    let directory = dir.0.join("directory");
    fs::create_dir(&directory).unwrap();
    let error = build(&agent, &directory).unwrap_err().to_string();
    assert!(error.starts_with("cannot write the guest image"), "{error}");
    assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 3);
}

#[test]
fn only_static_programs_for_this_processor_pass() {
    use agent::check;
    assert_eq!(check(&program(1)), Ok(()));
    assert_eq!(check(&program(3)), Err(AgentError::Dynamic));
    assert_eq!(check(b"#!/bin/sh\n"), Err(AgentError::NotElf));
    let mut other = program(1);
    other[18] = 183;
    assert_eq!(check(&other), Err(AgentError::Machine));
    let mut outside = program(1);
    outside[32..40].fill(0xff);
    assert_eq!(check(&outside), Err(AgentError::NotElf));
    for len in 0..program(1).len() - 52 {
        assert_eq!(check(&program(1)[..len]), Err(AgentError::NotElf), "{len} bytes");
    }
}

/// A temporary directory, removed when dropped.
struct Dir(PathBuf);

impl Dir {
    fn new(test: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("isopod-image-{test}-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
