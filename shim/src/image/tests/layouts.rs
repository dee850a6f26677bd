//! The search for an image, and blobs that differ from their descriptors.

use std::io::Read;

use crate::image::tests::*;

fn tagged(mut descriptor: Value, tag: &str) -> Value {
    descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
    descriptor
}

fn for_platform(mut descriptor: Value, os: &str, architecture: &str) -> Value {
    descriptor["platform"] = json!({ "os": os, "architecture": architecture });
    descriptor
}

fn image(layout: &TestLayout, name: &str) -> Value {
    let plain = tar([file(name, "")]);
    layout.manifest(&[(LAYER, plain.clone(), &plain)], json!({}))
}

fn index(layout: &TestLayout, manifests: Value) -> Value {
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
    layout.blob(INDEX, index.to_string().as_bytes())
}

#[test]
fn an_image_is_found_by_its_tag_or_by_being_the_only_one() {
    let mut layout = TestLayout::new();
    layout.index = vec![tagged(image(&layout, "one"), "a")];
    assert_eq!(layout.unpack(None).unwrap().tree(), ["one"]);
    fs::remove_dir_all(layout.bundle()).unwrap();
    let two = image(&layout, "two");
    layout.index.push(tagged(two, "b:1"));
    assert_eq!(layout.unpack(Some("b:1")).unwrap().tree(), ["two"]);
    fs::remove_dir_all(layout.bundle()).unwrap();
    layout.refused(&["2 images", "oci:DIR:TAG", "\"a\", \"b:1\""]);
    let message = layout.unpack(Some("c")).unwrap_err().message;
    assert!(message.contains("\"c\"") && message.contains("\"a\", \"b:1\""), "{message}");
    // The same image under two names is one image.
    layout.index[1] = tagged(layout.index[0].clone(), "b");
    assert_eq!(layout.unpack(None).unwrap().tree(), ["one"]);
}

#[test]
fn of_an_index_the_image_for_this_machine_is_taken() {
    let mut layout = TestLayout::new();
    let arm = for_platform(image(&layout, "arm"), "linux", "arm64");
    let amd = for_platform(image(&layout, "amd"), "linux", "amd64");
    let mut newer = for_platform(image(&layout, "newer"), "linux", "amd64");
    newer["platform"]["variant"] = json!("v3");
    let attestation = for_platform(image(&layout, "attestation"), "unknown", "unknown");
    let nested = index(&layout, json!([arm, newer, attestation, amd]));
    layout.index = vec![tagged(index(&layout, json!([nested])), "latest")];
    assert_eq!(layout.unpack(Some("latest")).unwrap().tree(), ["amd"]);
    fs::remove_dir_all(layout.bundle()).unwrap();
    layout.index = vec![index(&layout, json!([arm]))];
    layout.refused(&["no image for linux/amd64", "linux/arm64"]);
    let other = for_platform(image(&layout, "other"), "linux", "amd64");
    layout.index = vec![index(&layout, json!([amd, other]))];
    layout.refused(&["2 images", "no tags"]);
}

#[test]
fn indexes_without_end_are_refused() {
    let mut layout = TestLayout::new();
    let mut nested = image(&layout, "x");
    for _ in 0..20 {
        nested = index(&layout, json!([nested]));
    }
    layout.index = vec![nested];
    layout.refused(&["too many indexes"]);
}

#[test]
fn what_is_no_layout_is_said_to_be_none() {
    let layout = TestLayout::new();
    let message = layout.unpack_as_is(None).unwrap_err().message;
    assert!(message.contains("is not an OCI image layout"), "{message}");
    layout.refused(&["holds no image"]);
    fs::write(layout.path().join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
    let message = layout.unpack_as_is(None).unwrap_err().message;
    assert!(message.contains("\"2.0.0\""), "{message}");
    fs::write(layout.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    for (text, word) in [
        ("", "index.json: EOF"),
        ("[]", "index.json"),
        (r#"{"schemaVersion":1,"manifests":[]}"#, "schemaVersion"),
        (r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#, "has layers"),
        (
            r#"{"schemaVersion":2,"manifests":[{"mediaType":"a","size":1,"digest":"sha256:../../etc"}]}"#,
            "index.json",
        ),
    ] {
        fs::write(layout.path().join("index.json"), text).unwrap();
        let message = layout.unpack_as_is(None).unwrap_err().message;
        assert!(message.contains(word), "{text}: {message}");
    }
    fs::remove_file(layout.path().join("index.json")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, layout.path().join("index.json"), 0o600.into()).unwrap();
    let message = layout.unpack_as_is(None).unwrap_err().message;
    assert!(message.contains("not a regular file"), "{message}");
}

/// A layout with a changed manifest.
fn with_manifest(change: impl FnOnce(&TestLayout, &mut Value)) -> TestLayout {
    let plain = tar([file("f", "content")]);
    with(&plain, |layout, manifest, _| change(layout, manifest))
}

fn with(plain: &[u8], change: impl FnOnce(&TestLayout, &mut Value, &mut Value)) -> TestLayout {
    let mut layout = TestLayout::new();
    let mut config = json!({
        "os": "linux", "architecture": "amd64", "config": {},
        "rootfs": { "type": "layers", "diff_ids": [sha256(plain)] },
    });
    let mut manifest = json!({ "schemaVersion": 2, "layers": [layout.blob(LAYER, plain)] });
    change(&layout, &mut manifest, &mut config);
    if manifest["config"].is_null() {
        manifest["config"] = layout.blob(CONFIG, config.to_string().as_bytes());
    }
    layout.index = vec![layout.blob(MANIFEST, manifest.to_string().as_bytes())];
    layout
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(plain).unwrap();
    encoder.finish().unwrap()
}

fn zstd(plain: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(plain, ruzstd::encoding::CompressionLevel::Fastest)
}

#[test]
fn layers_of_all_known_types_are_read() {
    let big = "0123456789abcdef".repeat(40_000);
    let plain = tar([file("f", "content"), file("big", &big)]);
    let (one, two) = plain.split_at(1000);
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    let frames = [zstd(one), skippable, zstd(two)].concat();
    let members = [gzip(one), gzip(two)].concat();
    let oci = "application/vnd.oci.image.layer";
    let docker = "application/vnd.docker.image.rootfs";
    for (kind, bytes) in [
        (format!("{oci}.v1.tar"), &plain),
        (format!("{oci}.v1.tar+gzip"), &gzip(&plain)),
        (format!("{oci}.v1.tar+gzip"), &members),
        (format!("{oci}.v1.tar+zstd"), &zstd(&plain)),
        (format!("{oci}.v1.tar+zstd"), &frames),
        (format!("{oci}.nondistributable.v1.tar"), &plain),
        (format!("{oci}.nondistributable.v1.tar+gzip"), &gzip(&plain)),
        (format!("{oci}.nondistributable.v1.tar+zstd"), &zstd(&plain)),
        (format!("{docker}.diff.tar"), &plain),
        (format!("{docker}.diff.tar.gzip"), &gzip(&plain)),
        (format!("{docker}.diff.tar.zstd"), &zstd(&plain)),
        (format!("{docker}.foreign.diff.tar.gzip"), &gzip(&plain)),
    ] {
        let mut layout = TestLayout::new();
        layout.index = vec![layout.manifest(&[(&kind, bytes.clone(), &plain)], json!({}))];
        let unpacked = layout.unpack(None).unwrap();
        assert_eq!(
            (unpacked.read("f"), unpacked.read("big").len()),
            ("content".into(), big.len()),
            "{kind}"
        );
    }
    with_manifest(|_, m| m["layers"][0]["mediaType"] = json!("application/x-tar+xz"))
        .refused(&["\"application/x-tar+xz\"", "not supported"]);
    for kind in ["gzip", "zstd"] {
        let name = format!("{oci}.v1.tar+{kind}");
        with_manifest(|_, m| m["layers"][0]["mediaType"] = json!(name))
            .refused(&["layer 1 of 1", "cannot be read"]);
    }
}

#[test]
fn docker_types_of_documents_are_known() {
    let plain = tar([file("f", "")]);
    let mut layout = with(&plain, |layout, manifest, config| {
        let config = config.to_string();
        let kind = "application/vnd.docker.container.image.v1+json";
        manifest["config"] = layout.blob(kind, config.as_bytes());
        manifest["mediaType"] = json!("application/vnd.docker.distribution.manifest.v2+json");
    });
    layout.index[0]["mediaType"] = json!("application/vnd.docker.distribution.manifest.v2+json");
    let list = "application/vnd.docker.distribution.manifest.list.v2+json";
    let text = json!({ "schemaVersion": 2, "mediaType": list, "manifests": layout.index });
    layout.index = vec![layout.blob(list, text.to_string().as_bytes())];
    assert_eq!(layout.unpack(None).unwrap().tree(), ["f"]);
    fs::remove_dir_all(layout.bundle()).unwrap();
    layout.index[0]["mediaType"] = json!("application/vnd.docker.distribution.manifest.v1+json");
    layout.refused(&["no image for linux/amd64", "manifest.v1+json"]);
}

#[test]
fn documents_that_tell_two_stories_are_refused() {
    with_manifest(|_, m| m["mediaType"] = json!(INDEX)).refused(&["manifest", "says that it is"]);
    with_manifest(|_, m| m["manifests"] = json!([])).refused(&["\"manifests\""]);
    with_manifest(|_, m| m["schemaVersion"] = json!(1)).refused(&["schemaVersion 1"]);
    with_manifest(|_, m| m["layers"] = json!([])).refused(&["0 layers", "names 1"]);
    with_manifest(|layout, m| {
        m["config"] = layout.blob("application/vnd.cncf.helm.config.v1+json", b"{}")
    })
    .refused(&["no container image", "helm"]);
    let plain = tar([]);
    with(&plain, |_, _, config| config["architecture"] = json!("arm64")).refused(&["linux/arm64"]);
    with(&plain, |_, _, config| config["os"] = json!("windows")).refused(&["windows/amd64"]);
    with(&plain, |_, _, config| config["rootfs"]["type"] = json!("blocks"))
        .refused(&["\"blocks\""]);
    with(&plain, |_, _, config| config["rootfs"]["diff_ids"][0] = json!("x")).refused(&["\"x\""]);
}

#[test]
fn blobs_are_held_to_their_digest_and_size() {
    let plain = tar([file("f", "content")]);
    let other = tar([file("f", "CONTENT")]);
    let rename = |m: &mut Value, to: &[u8]| m["layers"][0]["digest"] = json!(sha256(to));
    // Another content of the same size, then a blob that is too short, then one that is too long.
    with_manifest(|layout, m| {
        layout.blob_named(LAYER, &other, &sha256(&plain));
        rename(m, &plain);
    })
    .refused(&["layer 1 of 1", &sha256(&plain), "damaged", &sha256(&other)[7..]]);
    with_manifest(|layout, _| {
        layout.blob_named(LAYER, &plain[..1024], &sha256(&plain));
    })
    .refused(&["it has 1024 bytes and should have"]);
    with_manifest(|layout, _| {
        layout.blob_named(LAYER, &[&plain[..], &[0; 512]].concat(), &sha256(&plain));
    })
    .refused(&["larger than"]);
    with_manifest(|layout, _| {
        fs::remove_file(layout.path().join("blobs").join(sha256(&plain).replace(':', "/")))
            .unwrap();
    })
    .refused(&["cannot open", "no such file"]);
    with_manifest(|layout, m| {
        fs::remove_file(layout.path().join("blobs").join(sha256(&plain).replace(':', "/")))
            .unwrap();
        m["layers"][0]["urls"] = json!(["https://layers.example/x"]);
    })
    .refused(&["no such file", "https://layers.example/x"]);
    // Manifest and configuration are checked too.
    let mut layout = with_manifest(|_, _| {});
    layout.index[0]["size"] = json!(3);
    layout.refused(&["larger than the 3 bytes"]);
    layout.index[0]["size"] = json!(1_u64 << 40);
    layout.refused(&["more than is sensible"]);
    with(&plain, |layout, m, config| {
        m["config"] = layout.blob_named(CONFIG, config.to_string().as_bytes(), &sha256(b"x"));
    })
    .refused(&["damaged"]);
    // The uncompressed content is checked too.
    with(&plain, |_, _, config| config["rootfs"]["diff_ids"][0] = json!(sha256(b"x")))
        .refused(&["uncompressed", "damaged"]);
    // A damaged blob is reported as damaged, whatever it does to the decompressor.
    with_manifest(|layout, m| {
        let mut bytes = gzip(&plain);
        let descriptor = layout.blob(LAYER, &bytes);
        bytes[30] ^= 0xff;
        layout.blob_named(LAYER, &bytes, descriptor["digest"].as_str().unwrap());
        m["layers"][0] = descriptor;
        m["layers"][0]["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar+gzip");
    })
    .refused(&["damaged"]);
    // The same holds whatever it asks of the tree: here a name that no file system takes.
    let unfit = tar([file(&"n".repeat(300), "content")]);
    with_manifest(|layout, m| {
        m["layers"][0] = layout.blob(LAYER, &unfit);
    })
    .refused(&["entry", "too long"]);
    with_manifest(|layout, m| {
        m["layers"][0] = layout.blob_named(LAYER, &unfit, &sha256(b"x"));
    })
    .refused(&["damaged"]);
}

#[test]
fn sha512_is_known_and_others_are_refused() {
    let plain = tar([file("f", "")]);
    let layout = with(&plain, |layout, m, config| {
        m["layers"][0] = layout.blob_named(LAYER, &plain, &sha512(&plain));
        config["rootfs"]["diff_ids"][0] = json!(sha512(&plain));
    });
    assert_eq!(layout.unpack(None).unwrap().tree(), ["f"]);
    let layout = with(&plain, |_, m, _| {
        m["layers"][0]["digest"] = json!(format!("sha384:{}", "0".repeat(96)));
    });
    layout.refused(&["sha384", "not supported"]);
    with(&plain, |_, m, _| m["layers"][0]["digest"] = json!("md5:00")).refused(&["md5"]);
}

#[test]
fn what_follows_the_archives_end_is_read_for_its_digest_only() {
    let mut plain = tar([file("f", "")]);
    plain.resize(plain.len() + (4 << 20), 0);
    let mut layout = TestLayout::new();
    let kind = "application/vnd.oci.image.layer.v1.tar+gzip";
    layout.index = vec![layout.manifest(&[(kind, gzip(&plain), &plain)], json!({}))];
    assert_eq!(layout.unpack(None).unwrap().tree(), ["f"]);
}

#[test]
fn a_zstd_stream_that_breaks_off_is_an_error() {
    let whole = zstd(b"content");
    let read = |bytes: &[u8]| {
        let mut out = Vec::new();
        crate::image::zstd::Zstd::new(bytes).read_to_end(&mut out).map(|_| out)
    };
    assert_eq!(read(&whole).unwrap(), b"content");
    assert_eq!(read(&[]).unwrap(), b"");
    for length in 1..whole.len() {
        assert!(read(&whole[..length]).is_err(), "{length}");
    }
    assert!(read(&[0x50, 0x2a, 0x4d, 0x18, 9, 0, 0, 0, 1]).is_err());
    // A window that is larger than the library takes.
    assert!(read(&[0x28, 0xb5, 0x2f, 0xfd, 0, 0xff, 0, 0, 0]).is_err());
}
