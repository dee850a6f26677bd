//! Files of lower layers that a layer hides.

use crate::image::tests::*;

fn lower() -> Vec<u8> {
    tar([
        dir("d"),
        file("d/a", "lower"),
        file("d/b", "lower"),
        file("d/sub/x", "lower"),
        file("d/sub/y", "lower"),
        file("e", "lower"),
    ])
}

#[track_caller]
fn upper(parts: impl IntoIterator<Item = Part>, expected: &[&str]) -> (TestLayout, Unpacked) {
    let (layout, unpacked) = unpacked(&[lower(), tar(parts)]);
    assert_eq!(unpacked.tree(), expected);
    (layout, unpacked)
}

#[test]
fn a_whiteout_removes_a_file_or_a_tree_and_nothing_else() {
    let (_layout, unpacked) = upper(
        [file("d/.wh.a", ""), file("d/.wh.sub", ""), file(".wh.gone", "")],
        &["d/", "d/b", "e"],
    );
    // The layer has no entry for the directory.
    assert_eq!(unpacked.stat("d").mtime(), 1_600_000_000);
    // Nothing is made on the way to a missing name.
    upper(
        [file("no/such/.wh.x", ""), file("e/.wh.x", "")],
        &["d/", "d/a", "d/b", "d/sub/", "d/sub/x", "d/sub/y", "e"],
    );
}

#[test]
fn a_whiteout_does_not_reach_into_its_own_layer() {
    let all = ["d/", "d/a", "d/sub/", "d/sub/new", "e"];
    let new = || [file("d/a", "upper"), file("d/sub/new", "upper")];
    let whiteouts = || [file("d/.wh.a", ""), file("d/.wh.b", ""), file("d/.wh.sub", "")];
    // In either order.
    let (_layout, unpacked) = upper(new().into_iter().chain(whiteouts()), &all);
    assert_eq!(unpacked.read("d/a"), "upper");
    let (_layout, unpacked) = upper(whiteouts().into_iter().chain(new()), &all);
    assert_eq!(unpacked.read("d/a"), "upper");
}

#[test]
fn an_opaque_directory_keeps_what_its_own_layer_has() {
    let opaque = || file("d/.wh..wh..opq", "");
    upper([opaque()], &["d/", "e"]);
    upper([opaque(), file("d/new", "")], &["d/", "d/new", "e"]);
    upper([file("d/new", ""), opaque()], &["d/", "d/new", "e"]);
    upper([file("d/sub/new", ""), opaque()], &["d/", "d/sub/", "d/sub/new", "e"]);
    upper([dir("d/sub"), file("d/a", ""), opaque()], &["d/", "d/a", "d/sub/", "e"]);
    // An opaque root.
    upper([file("f", ""), file(".wh..wh..opq", "")], &["f"]);
}

#[test]
fn a_name_of_a_lower_file_is_lower_although_the_layer_links_it() {
    let opaque = file("d/.wh..wh..opq", "");
    let (_layout, unpacked) = upper([hard_link("kept", "d/a"), opaque], &["d/", "e", "kept"]);
    assert_eq!(unpacked.read("kept"), "lower");
}

#[test]
fn a_layer_of_its_own_hides_what_the_one_before_has_brought() {
    let (_layout, unpacked) = unpacked(&[
        tar([file("a", "1")]),
        tar([file(".wh.a", ""), file("b", "")]),
        tar([file("a", "3"), file(".wh.b", "")]),
        tar([dir("c"), file("c/x", "")]),
        tar([file(".wh.c", "")]),
    ]);
    assert_eq!(unpacked.tree(), ["a"]);
    assert_eq!(unpacked.read("a"), "3");
}

#[test]
fn a_whiteout_that_names_no_file_is_refused() {
    for name in [".wh.", "d/.wh.", "d/.wh..", "d/.wh...", ".wh.d/a"] {
        refused([file("d/a", ""), file(name, "")], &[&format!("{name:?}"), "whiteout"]);
    }
    refused([entry(b'0', "x").pax(&[("path", b".wh.a\0/b")]).build()], &["NUL"]);
    refused([file("../.wh.x", "")], &["leads out"]);
    // A whiteout can be of any type. Internal files of another file system are skipped.
    let (_layout, unpacked) = upper(
        [
            dir("d/.wh.sub"),
            symlink(".wh.e", "x"),
            dir(".wh..wh.plnk"),
            file(".wh..wh.plnk/1.2", ""),
            file(".wh..wh.aufs", ""),
        ],
        &["d/", "d/a", "d/b"],
    );
    assert_eq!(unpacked.read("d/a"), "lower");
}

#[test]
fn a_link_that_is_hidden_is_not_followed() {
    let (_layout, unpacked) = unpacked(&[
        tar([file("dir/f", ""), symlink("link", "dir"), symlink("out", "/")]),
        tar([file(".wh.link", ""), file(".wh.out", "")]),
    ]);
    assert_eq!(unpacked.tree(), ["dir/", "dir/f"]);
}
