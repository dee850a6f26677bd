//! Entries of all kinds, honest and hostile.

use std::os::unix::{
    fs::{FileTypeExt, PermissionsExt},
    net::UnixListener,
};

use rustix::{
    fs::{XattrFlags, getxattr, lgetxattr, setxattr},
    io::Errno,
};

use crate::image::tests::*;

#[test]
fn files_have_content_mode_and_time() {
    let (_layout, unpacked) = unpacked(&[tar([
        entry(b'5', "./").mode(0o711).build(),
        entry(b'5', "bin/").mode(0o1777).build(),
        entry(b'0', "bin/su").mode(0o4755).content("program").build(),
        entry(b'7', "old").content("contiguous").build(),
        entry(b'0', "older/").header(|header| header.as_old_mut().linkflag = [0]).build(),
        entry(b'0', "newer/").content("a file").build(),
        file("implied/parents/file", "x"),
        entry(b'0', "pax").pax(&[("mtime", b"1234567890.123456789")]).build(),
    ])]);
    assert_eq!(unpacked.mode(""), 0o711);
    assert_eq!((unpacked.mode("bin"), unpacked.mode("bin/su")), (0o1777, 0o4755));
    assert_eq!(unpacked.read("bin/su"), "program");
    assert_eq!(unpacked.read("old"), "contiguous");
    assert!(unpacked.stat("older").is_dir());
    assert_eq!(unpacked.read("newer"), "a file");
    assert_eq!(unpacked.mode("implied/parents"), 0o755);
    // The directory keeps its own time, not that of the last file in it.
    assert_eq!(unpacked.stat("bin").mtime(), 1_600_000_000);
    assert_eq!(unpacked.stat("").mtime(), 1_600_000_000);
    let pax = unpacked.stat("pax");
    assert_eq!((pax.mtime(), pax.mtime_nsec()), (1_234_567_890, 123_456_789));
    assert_eq!(fs::metadata(&unpacked.0).unwrap().mode() & 0o7777, 0o700);
}

#[test]
fn long_names_of_both_kinds_arrive_whole() {
    let long = format!("{}/{}", "d".repeat(150), "f".repeat(200));
    let (_layout, unpacked) = unpacked(&[tar([
        file(&long, "gnu"),
        symlink("gnu-link", &format!("/{}", "t".repeat(300))),
        entry(b'0', "short").pax(&[("path", format!("p/{long}").as_bytes())]).build(),
        entry(b'2', "pax-link").link("x").pax(&[("linkpath", "u".repeat(300).as_bytes())]).build(),
        entry(b'0', b"bytes-\xff\xfe").build(),
    ])]);
    assert_eq!(unpacked.read(&long), "gnu");
    assert!(unpacked.stat(format!("p/{long}")).is_file());
    assert_eq!(fs::read_link(unpacked.root("gnu-link")).unwrap().as_os_str().len(), 301);
    assert_eq!(fs::read_link(unpacked.root("pax-link")).unwrap().as_os_str().len(), 300);
    assert!(unpacked.stat(OsStr::from_bytes(b"bytes-\xff\xfe")).is_file());
}

#[test]
fn a_ustar_prefix_is_part_of_the_path() {
    let ustar = entry(b'0', "name").header(|header| {
        let mut new = tar::Header::new_ustar();
        new.set_mode(0o600);
        new.set_uid(header.uid().unwrap());
        new.set_gid(header.gid().unwrap());
        new.set_size(0);
        new.set_entry_type(tar::EntryType::Regular);
        new.as_ustar_mut().unwrap().prefix[..3].copy_from_slice(b"a/b");
        *header = new;
    });
    let (_layout, unpacked) = unpacked(&[tar([ustar.build()])]);
    assert_eq!(unpacked.mode("a/b/name"), 0o600);
}

#[test]
fn attributes_are_set_and_those_of_a_host_are_not() {
    let value = b"line\n=\0end";
    let (_layout, unpacked) = unpacked(&[
        tar([entry(b'5', "d").pax(&[("SCHILY.xattr.user.old", b"1")]).build()]),
        tar([
            entry(b'0', "f")
                .pax(&[
                    ("SCHILY.xattr.user.binary", value),
                    ("SCHILY.xattr.user.empty", b""),
                    ("SCHILY.xattr.security.selinux", b"system_u:object_r:etc_t:s0"),
                    ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ])
                .build(),
            entry(b'5', "d").pax(&[("SCHILY.xattr.user.new", b"2")]).build(),
        ]),
    ]);
    let get = |path: &str, name: &str| {
        let mut buffer = [0; 100];
        let n = getxattr(unpacked.root(path), name, &mut buffer)?;
        Ok::<_, Errno>(buffer[..n].to_vec())
    };
    // On a file system without such attributes there is nothing to see.
    if setxattr(unpacked.root(""), "user.probe", b"", XattrFlags::empty()) != Err(Errno::NOTSUP) {
        assert_eq!(get("f", "user.binary").unwrap(), value);
        assert_eq!(get("f", "user.empty").unwrap(), b"");
        assert_eq!(get("d", "user.new").unwrap(), b"2");
        assert_eq!(get("d", "user.old"), Err(Errno::NODATA));
    }
    assert!(get("f", "security.selinux").is_err());
    assert!(get("f", "trusted.overlay.opaque").is_err());
}

#[test]
fn links_and_pipes_are_made_and_never_followed() {
    let (_layout, unpacked) = unpacked(&[tar([
        file("a", "one"),
        hard_link("b", "/a"),
        entry(b'1', "c").link("./b").header(|header| header.set_size(512)).build(),
        symlink("s", "../../outside"),
        hard_link("t", "s"),
        entry(b'6', "pipe").mode(0o620).build(),
    ])]);
    assert_eq!(unpacked.stat("a").nlink(), 3);
    assert_eq!(unpacked.read("c"), "one");
    assert!(unpacked.stat("t").is_symlink());
    assert_eq!(unpacked.stat("s").mtime(), 1_600_000_000);
    assert!(unpacked.stat("pipe").file_type().is_fifo());
    assert_eq!(unpacked.mode("pipe"), 0o620);
}

#[test]
fn devices_owners_and_capabilities_need_root() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let owned = |kind, path| {
        entry(kind, path).header(|h| {
            h.set_uid(1000);
            h.set_gid(3_000_000);
        })
    };
    let null = |path| {
        owned(b'3', path).header(|h| {
            h.set_device_major(1).unwrap();
            h.set_device_minor(3).unwrap();
        })
    };
    let layout = TestLayout::of(&[tar([
        owned(b'0', "su").mode(0o6755).build(),
        owned(b'2', "link").link("su").build(),
        null("null").mode(0o666).build(),
        owned(b'0', "ping").pax(&[("SCHILY.xattr.security.capability", capability)]).build(),
    ])]);
    let unpacked = match layout.unpack(None) {
        // Root of a user namespace, or of a container without CAP_MKNOD.
        Err(error) if error.message.contains("cannot create the device") => return,
        unpacked => unpacked.unwrap(),
    };
    for path in ["su", "link", "null", "ping"] {
        let stat = unpacked.stat(path);
        assert_eq!((stat.uid(), stat.gid()), (1000, 3_000_000), "{path}");
    }
    assert_eq!(unpacked.mode("su"), 0o6755);
    let stat = unpacked.stat("null");
    assert!(stat.file_type().is_char_device());
    assert_eq!(stat.rdev(), rustix::fs::makedev(1, 3));
    let mut buffer = [0; 64];
    let n = lgetxattr(unpacked.root("ping"), "security.capability", &mut buffer).unwrap();
    assert_eq!(&buffer[..n], capability);
}

#[test]
fn nothing_is_made_outside_whatever_the_links() {
    let outside = tempfile::tempdir().unwrap();
    let there = outside.path().to_str().unwrap();
    let up = "../".repeat(40);
    let up = format!("{up}{}", &there[1..]);
    for link in [there, &up] {
        let (_layout, unpacked) = unpacked(&[
            tar([
                symlink("link", link),
                file("link/a", "inside"),
                symlink("dir/deep", "../link"),
                file("dir/deep/b", "inside"),
                hard_link("c", "link/a"),
            ]),
            tar([
                file("link/.wh.a", ""),
                file("link/d", "inside"),
                file("dir/deep/.wh..wh..opq", ""),
            ]),
        ]);
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        assert_eq!(unpacked.read(&format!("{}/d", &there[1..])), "inside");
        assert_eq!(unpacked.read("c"), "inside");
        assert!(!unpacked.root(format!("{}/b", &there[1..])).exists());
    }
    // An existing file is neither written through a link nor linked to.
    fs::write(outside.path().join("host"), "host").unwrap();
    let host = format!("{there}/host");
    let (_layout, unpacked) = unpacked(&[tar([symlink("x", &host), file("x", "replaced")])]);
    assert_eq!(unpacked.read("x"), "replaced");
    assert_eq!(fs::read_to_string(&host).unwrap(), "host");
    refused([symlink("x", there), hard_link("y", "x/host")], &["\"y\"", "not there"]);
    refused([hard_link("y", &host)], &["\"y\"", "not there"]);
    let climbing = format!("{up}/host");
    refused([hard_link("y", &climbing)], &["\"y\"", "leads out"]);
    refused([file(&climbing, "")], &["leads out"]);
    refused([dir("a"), file("a/../../b", "")], &["leads out"]);
    refused([entry(b'0', "a").pax(&[("path", b"../b")]).build()], &["leads out"]);
}

#[test]
fn kinds_are_replaced_and_the_last_entry_holds() {
    let (_layout, unpacked) = unpacked(&[
        tar([
            file("f", "1"),
            file("f", "2"),
            dir("dir"),
            file("dir/in", ""),
            file("file", ""),
            file("kept/below", ""),
            symlink("to-kept", "kept"),
            file("first", "lower"),
            hard_link("second", "first"),
        ]),
        tar([
            file("dir", "a file now"),
            dir("file"),
            file("file/in", ""),
            entry(b'5', "kept").mode(0o700).build(),
            dir("to-kept"),
            file("second", "upper"),
        ]),
    ]);
    let expected =
        ["dir", "f", "file/", "file/in", "first", "kept/", "kept/below", "second", "to-kept/"];
    assert_eq!(unpacked.tree(), expected);
    assert_eq!(unpacked.read("f"), "2");
    assert_eq!(unpacked.mode("kept"), 0o700);
    // Another name of a replaced file keeps the old content.
    assert_eq!((unpacked.read("first"), unpacked.read("second")), ("lower".into(), "upper".into()));
}

#[test]
fn a_hard_link_to_itself_or_to_another_name_of_it_changes_nothing() {
    let (_layout, unpacked) = unpacked(&[tar([
        file("a", "x"),
        hard_link("a", "a"),
        hard_link("b", "a"),
        hard_link("a", "b"),
    ])]);
    assert_eq!((unpacked.read("a"), unpacked.stat("b").nlink()), ("x".into(), 2));
}

#[test]
fn what_no_layer_should_say_is_refused_by_name() {
    let huge = |kind| {
        entry(kind, "h").header(|header| {
            header.as_old_mut().size.copy_from_slice(b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xf0");
        })
    };
    refused([entry(b'0', "/").content("x").build()], &["\"/\"", "root has to be a directory"]);
    refused([entry(b'2', "").link("x").build()], &["root has to be a directory"]);
    refused([file("f", ""), file("f/in", "")], &["\"f/in\"", "not a directory"]);
    refused([symlink("s", "")], &["\"s\"", "to nothing"]);
    refused([symlink("s", "s"), file("s/f", "")], &["\"s/f\"", "too many"]);
    refused([hard_link("h", "gone")], &["\"h\"", "\"gone\"", "not there"]);
    refused([dir("d"), hard_link("h", "d")], &["\"h\"", "is a directory"]);
    refused([hard_link("h", "")], &["\"h\"", "not there"]);
    refused([entry(b'V', "volume").build()], &["\"volume\"", "type \"V\""]);
    refused([entry(b'S', "sparse").build()], &["\"sparse\"", "sparse"]);
    refused([entry(b'0', "s").pax(&[("GNU.sparse.major", b"1")]).build()], &["sparse"]);
    refused([entry(b'0', "f").pax(&[("uid", b"4294967295")]).build()], &["out of range"]);
    refused([entry(b'0', "f").pax(&[("uid", b"x")]).build()], &["\"uid\"", "\"x\""]);
    refused([entry(b'0', "f").pax(&[("path", b"a\0b")]).build()], &["NUL"]);
    refused([entry(b'0', "f").pax(&[("path", &[b'a'; 300])]).build()], &["too long"]);
    refused([entry(b'0', "f").pax(&[("path", &[b'/'; 5000])]).build()], &["longer than"]);
    refused([huge(b'0').build()], &["out of range"]);
    for kind in [b'L', b'x', b'g'] {
        refused([huge(kind).build(), file("f", "")], &["out of range"]);
    }
    let large = vec![b'a'; (1 << 20) + 1];
    refused([entry(b'L', "x").content(&large).build(), file("f", "")], &["larger than 1 MiB"]);
    let twice = entry(b'0', "f").pax(&[("mtime", b"1")]).pax(&[("mtime", b"2")]);
    refused([twice.build()], &["described twice"]);
    refused([entry(b'x', "x").content("11 path=ab\n").build()], &["an entry should follow"]);
    refused([Part(vec![0; 512]), file("f", "")], &["empty header"]);
    let mut broken = file("f", "");
    broken.0[0] ^= 1;
    refused([broken], &["checksum"]);
}

#[test]
fn an_archive_that_breaks_off_is_refused_and_one_without_an_end_is_not() {
    let whole = file("f", "content").0;
    let (_layout, unpacked) = unpacked(std::slice::from_ref(&whole));
    assert_eq!(unpacked.read("f"), "content");
    for length in [100, 513, 600] {
        TestLayout::of(&[whole[..length].to_vec()]).refused(&["layer 1 of 1"]);
    }
}

#[test]
fn a_tree_as_deep_as_no_path_is_removed_again() {
    // Each entry may be as long as a path. The next one goes on where a link to it leads.
    let deep = "d/".repeat(1900);
    let mut parts = vec![dir(&deep)];
    for n in 0..2 {
        let link = format!("l{n}");
        parts.push(symlink(
            &link,
            if n == 0 { deep.clone() } else { format!("l{}/{deep}", n - 1) }.as_str(),
        ));
        parts.push(dir(&format!("{link}/{deep}")));
    }
    let lower = tar(parts.clone());
    parts.push(hard_link("fails", "gone"));
    refused(parts, &["\"gone\""]);
    let (_layout, unpacked) = unpacked(&[lower, tar([file(".wh.d", ""), file(".wh.l0", "")])]);
    assert_eq!(unpacked.tree(), [format!("l1 -> l0/{deep}")]);
}

#[test]
fn a_bundle_that_is_in_use_is_left_alone() {
    let layout = TestLayout::of(&[tar([file("f", "")])]);
    let bundle = layout.bundle();
    let image = ImageReference { dir: layout.path(), tag: None };
    layout.unpack(None).unwrap();
    let message = make_bundle(&image, &bundle).unwrap_err().message;
    assert!(message.contains("is not empty"), "{message}");
    fs::remove_dir_all(&bundle).unwrap();
    fs::create_dir(&bundle).unwrap();
    fs::set_permissions(&bundle, fs::Permissions::from_mode(0o755)).unwrap();
    layout.unpack(None).unwrap();
    fs::remove_dir_all(&bundle).unwrap();
    fs::write(&bundle, "").unwrap();
    let message = make_bundle(&image, &bundle).unwrap_err().message;
    assert!(message.contains("not a directory"), "{message}");
    fs::remove_file(&bundle).unwrap();
    std::os::unix::fs::symlink("nowhere", &bundle).unwrap();
    let message = make_bundle(&image, &bundle).unwrap_err().message;
    assert!(message.contains("symbolic link to nothing"), "{message}");
    fs::remove_file(&bundle).unwrap();
    let here = std::env::current_dir().unwrap();
    let message = crate::image::staging::place_of_empty(&here).unwrap_err().message;
    assert!(message.contains("working directory"), "{message}");
    let message = make_bundle(&image, &layout.dir.path().join("no/dir")).unwrap_err().message;
    assert!(message.contains("cannot open") && message.contains("/no"), "{message}");
}

#[test]
fn what_a_killed_process_has_left_is_removed_and_what_others_have_is_not() {
    let layout = TestLayout::of(&[tar([file("f", "")])]);
    let staging = layout.dir.path().join(".bundle.unpacking");
    let image = ImageReference { dir: layout.path(), tag: None };
    layout.unpack(None).unwrap();
    fs::remove_dir_all(layout.bundle()).unwrap();

    fs::create_dir_all(staging.join("rootfs/old")).unwrap();
    let message = make_bundle(&image, &layout.bundle()).unwrap_err().message;
    assert!(message.contains("is in the way") && staging.join("rootfs/old").exists(), "{message}");
    fs::set_permissions(&staging, fs::Permissions::from_mode(0o700)).unwrap();
    let lock =
        rustix::fs::open(&staging, rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let message = make_bundle(&image, &layout.bundle()).unwrap_err().message;
    assert!(
        message.contains("another process") && staging.join("rootfs/old").exists(),
        "{message}"
    );
    drop(lock);
    make_bundle(&image, &layout.bundle()).unwrap();
    assert!(!staging.exists() && !layout.bundle().join("rootfs/old").exists());
    fs::remove_dir_all(layout.bundle()).unwrap();

    let _socket = UnixListener::bind(&staging).unwrap();
    let message = make_bundle(&image, &layout.bundle()).unwrap_err().message;
    assert!(message.contains("is in the way"), "{message}");
}
