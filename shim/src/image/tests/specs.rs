//! The config.json made of an image's configuration.

use crate::bundle::Bundle;
use crate::image::tests::*;

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\ndaemon:x:1:1::/:/bin/sh\n\
                      alice:x:1000:100::/home/alice:/bin/sh\n";
const GROUP: &str = "root:x:0:root\nusers:x:100:\naudio:x:29:bob,alice\nvideo:x:44:alice\n\
                     bin:x:7:root,alicex\n+::x\n";

fn unpack(config: Value) -> Result<(TestLayout, Unpacked)> {
    let plain = tar([file("etc/passwd", PASSWD), file("etc/group", GROUP), file("data/seed", "")]);
    let mut layout = TestLayout::new();
    layout.add_image(&[plain], config, None);
    let unpacked = layout.unpack(None)?;
    Ok((layout, unpacked))
}

fn spec(config: Value) -> Value {
    let (_layout, unpacked) = unpack(config).unwrap();
    Bundle::load(&unpacked.0, None).unwrap();
    unpacked.spec()
}

#[test]
fn program_environment_and_directory_are_the_images() {
    let spec = spec(json!({
        "Entrypoint": ["/entry", "-x"], "Cmd": ["a", "b"], "Env": ["PATH=/opt", "A=1"],
        "WorkingDir": "/srv/app/",
    }));
    assert_eq!(spec["process"]["args"], json!(["/entry", "-x", "a", "b"]));
    assert_eq!(spec["process"]["env"], json!(["PATH=/opt", "A=1", "TERM=xterm"]));
    assert_eq!(spec["process"]["cwd"], "/srv/app");
    assert_eq!(spec["process"]["terminal"], true);
    assert_eq!(spec["root"], json!({ "path": "rootfs", "readonly": false }));
    let sets = &spec["process"]["capabilities"];
    assert_eq!(sets["bounding"].as_array().unwrap().len(), CAPABILITIES);
    assert_eq!(sets["bounding"], sets["effective"]);
    assert_eq!(spec["process"]["noNewPrivileges"], false);
}

/// Number of capabilities that engines give.
const CAPABILITIES: usize = 14;

#[test]
fn an_image_that_says_nothing_is_a_shell() {
    for config in [
        json!({}),
        json!(null),
        json!({ "Env": null, "Cmd": null, "Volumes": null, "Labels": null }),
    ] {
        let spec = spec(config);
        assert_eq!(spec["process"]["args"], json!(["sh"]));
        assert_eq!(spec["process"]["cwd"], "/");
        assert!(spec["process"]["env"][0].as_str().unwrap().starts_with("PATH="));
        assert_eq!(
            spec["process"]["user"],
            json!({ "uid": 0, "gid": 0, "additionalGids": [0, 7] })
        );
    }
}

#[test]
fn the_working_directory_is_made() {
    let (_layout, unpacked) = unpack(json!({ "WorkingDir": "srv/app" })).unwrap();
    assert!(unpacked.stat("srv/app").is_dir());
    assert_eq!(unpacked.spec()["process"]["cwd"], "/srv/app");
    for (path, words) in
        [("../x", "leads out"), ("/data/seed", "not a directory"), ("/a\0b", "NUL")]
    {
        let message = unpack(json!({ "WorkingDir": path })).map(|_| ()).unwrap_err().message;
        assert!(message.contains("working directory") && message.contains(words), "{message}");
    }
}

#[test]
fn users_are_found_as_engines_find_them() {
    for (user, expected) in [
        ("", json!({ "uid": 0, "gid": 0, "additionalGids": [0, 7] })),
        ("root", json!({ "uid": 0, "gid": 0, "additionalGids": [0, 7] })),
        ("daemon", json!({ "uid": 1, "gid": 1 })),
        ("alice", json!({ "uid": 1000, "gid": 100, "additionalGids": [29, 44] })),
        ("1000", json!({ "uid": 1000, "gid": 100, "additionalGids": [29, 44] })),
        ("alice:audio", json!({ "uid": 1000, "gid": 29 })),
        ("alice:7", json!({ "uid": 1000, "gid": 7 })),
        ("4711", json!({ "uid": 4711, "gid": 0 })),
        ("4711:4712", json!({ "uid": 4711, "gid": 4712 })),
        (":video", json!({ "uid": 0, "gid": 44 })),
    ] {
        assert_eq!(spec(json!({ "User": user }))["process"]["user"], expected, "{user:?}");
    }
    for (user, words) in [
        ("bob", "/etc/passwd has no \"bob\""),
        ("alice:nobody", "/etc/group has no \"nobody\""),
        ("2147483648", "must be in range"),
        ("4294967295", "must be in range"),
        ("99999999999", "out of range"),
        ("a\nb", "\"a\\nb\""),
    ] {
        let message = unpack(json!({ "User": user })).map(|_| ()).unwrap_err().message;
        assert!(message.contains(words) && !message.contains('\n'), "{user:?}: {message}");
    }
}

#[test]
fn the_files_of_users_are_read_in_the_tree_only() {
    let secret = tempfile::NamedTempFile::new().unwrap();
    fs::write(secret.path(), "eve:x:6:6::/:/bin/sh\n").unwrap();
    let user = |parts: Vec<Part>| {
        let mut layout = TestLayout::new();
        layout.add_image(&[tar(parts)], json!({ "User": "eve" }), None);
        layout.unpack(None).map(|unpacked| unpacked.spec()["process"]["user"]["uid"].clone())
    };
    let there = secret.path().to_str().unwrap();
    for parts in [
        vec![],
        vec![symlink("etc/passwd", there)],
        vec![symlink("etc/passwd", &format!("../../../../../../..{there}"))],
        vec![symlink("etc", secret.path().parent().unwrap().to_str().unwrap())],
        vec![symlink("etc/passwd", "passwd")],
        vec![entry(b'6', "etc/passwd").build()],
        vec![dir("etc/passwd")],
        vec![symlink("etc/passwd", "/dev/zero")],
    ] {
        let message = user(parts).unwrap_err().message;
        assert!(message.contains("eve") || message.contains("too many"), "{message}");
    }
    let line = "eve:x:5:5::/:/bin/sh";
    assert_eq!(
        user(vec![file("usr/etc/p", line), symlink("etc", "/usr/etc"), symlink("etc/passwd", "p")])
            .unwrap(),
        5
    );
    assert_eq!(user(vec![file("p", line), symlink("etc/passwd", "../../p")]).unwrap(), 5);
    let message = user(vec![file("etc/passwd", &"x".repeat(5 << 20))]).unwrap_err().message;
    assert!(message.contains("larger than"), "{message}");
}

#[test]
fn properties_and_labels_become_annotations() {
    let layout = TestLayout::new();
    let plain = tar([]);
    let config = json!({
        "os": "linux", "architecture": "amd64", "variant": "v1", "author": "Jane",
        "created": "2020-01-01T00:00:00Z", "os.version": "1", "os.features": ["a", "b"],
        "rootfs": { "type": "layers", "diff_ids": [sha256(&plain)] },
        "config": {
            "ExposedPorts": { "80/tcp": {}, "443": {} }, "StopSignal": "SIGQUIT",
            "Labels": {
                "org.opencontainers.image.author": "somebody else", "own": "1",
                "dev.isopod.memory_mib": "1000000",
            },
        },
    });
    let manifest = layout.manifest_of(vec![layout.blob(LAYER, &plain)], &config);
    let layout = TestLayout { index: vec![manifest], ..layout };
    let annotations = layout.unpack(None).unwrap().spec()["annotations"].clone();
    let name = |key: &str| format!("org.opencontainers.image.{key}");
    assert_eq!(
        annotations,
        json!({
            name("os"): "linux", name("architecture"): "amd64", name("variant"): "v1",
            name("author"): "somebody else", name("created"): "2020-01-01T00:00:00Z",
            name("os.version"): "1", name("os.features"): "a,b",
            name("exposedPorts"): "443,80/tcp", name("stopSignal"): "SIGQUIT", "own": "1",
        })
    );
}

#[test]
fn volumes_are_kept_out_of_the_root_file_system() {
    let spec = spec(json!({ "Volumes": { "/data": {}, "/var/lib/x/": {}, "/dev/shm": {} } }));
    let mounts = spec["mounts"].as_array().unwrap();
    let of =
        |path: &str| mounts.iter().filter(|mount| mount["destination"] == path).collect::<Vec<_>>();
    let expected = |path: &str| {
        json!({
            "destination": path, "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "nodev", "tmpcopyup"],
        })
    };
    assert_eq!(of("/data"), [&expected("/data")]);
    assert_eq!(of("/var/lib/x"), [&expected("/var/lib/x")]);
    assert_eq!(of("/dev/shm").len(), 1);
    for path in ["/", "../x"] {
        let message = unpack(json!({ "Volumes": { path: {} } })).map(|_| ()).unwrap_err().message;
        assert!(message.contains("volume"), "{message}");
    }
}

#[test]
fn missing_volumes_are_made_as_directories() {
    let plain = tar([
        entry(b'5', "data").mode(0o700).build(),
        file("seed", ""),
        dir("real"),
        symlink("link", "real"),
    ]);
    let of = |volumes: Value| {
        let mut layout = TestLayout::new();
        layout.add_image(std::slice::from_ref(&plain), json!({ "Volumes": volumes }), None);
        layout.unpack(None).map(|unpacked| (layout, unpacked))
    };
    let volumes = json!({ "/data": {}, "/new/deep": {}, "/link/there": {}, "/dev/shm": {} });
    let (_layout, unpacked) = of(volumes).unwrap();
    assert_eq!(unpacked.mode("data"), 0o700);
    for path in ["new", "new/deep", "real/there"] {
        assert!(unpacked.stat(path).is_dir(), "{path}");
        assert_eq!(unpacked.mode(path), 0o755, "{path}");
        assert_eq!(unpacked.stat(path).uid(), rustix::process::geteuid().as_raw(), "{path}");
    }
    // The default config.json has a mount there already.
    assert!(!unpacked.root("dev").exists());
    let message = of(json!({ "/seed": {} })).map(|_| ()).unwrap_err().message;
    assert!(
        message.contains("volume \"/seed\"") && message.contains("not a directory"),
        "{message}"
    );
}

#[test]
fn the_same_image_makes_the_same_text() {
    let text = || {
        let labels: Value = (0..20)
            .map(|n| (format!("label{n}"), json!("x")))
            .collect::<serde_json::Map<_, _>>()
            .into();
        let (_layout, unpacked) =
            unpack(json!({ "Labels": labels, "Volumes": { "/a": {}, "/b": {}, "/c": {} } }))
                .unwrap();
        fs::read_to_string(unpacked.0.join("config.json")).unwrap()
    };
    assert_eq!(text(), text());
}
