//! `bundle`: images made by skopeo and umoci are unpacked, compared with umoci's result, and run.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::collections::BTreeMap;
use std::fs;
use std::mem::MaybeUninit;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use isopod_tests::terminal::Terminal;
use isopod_tests::{Output, Scope, microvm_only};
use rustix::fs::{XattrFlags, inotify, lgetxattr, llistxattr, lsetxattr};
use serde_json::{Value, json};

/// A value of `security.capability`: CAP_NET_RAW, effective (version 2).
const CAPABILITY: &[u8] = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// An image layout in a scope's directory, with layers that umoci makes of a tree.
struct Image<'a> {
    scope: &'a Scope,
    layout: PathBuf,
}

impl<'a> Image<'a> {
    /// An image with busybox in its first layer, tagged `base`.
    fn new(scope: &'a Scope) -> Self {
        let image = Self { scope, layout: scope.dir().join("layout") };
        image.umoci(&["init", "--layout", image.path("layout").to_str().unwrap()]);
        image.umoci(&["new", "--image", &image.tagged("base")]);
        image.layer("base", |root| {
            for dir in ["bin", "dev", "etc", "gone/below", "opaque", "proc", "sys", "tmp"] {
                fs::create_dir_all(root.join(dir)).unwrap();
            }
            fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
            fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
            for applet in ["sh", "id", "cat", "stat", "touch", "ls", "pwd", "env", "tty"] {
                symlink("busybox", root.join("bin").join(applet)).unwrap();
            }
            let users = "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/home:/bin/sh\n";
            fs::write(root.join("etc/passwd"), users).unwrap();
            fs::write(root.join("etc/group"), "root:x:0:\nalice:x:1000:\nfriends:x:44:alice\n")
                .unwrap();
            for name in ["gone/below/a", "opaque/old", "replaced", "etc/first"] {
                fs::write(root.join(name), name).unwrap();
            }
            fs::hard_link(root.join("etc/first"), root.join("etc/second")).unwrap();
            fs::copy("/bin/busybox", root.join("bin/ping")).unwrap();
            chown(root.join("bin/ping"), Some(7), Some(8)).unwrap();
            let set_id = fs::Permissions::from_mode(0o6755);
            fs::set_permissions(root.join("bin/ping"), set_id).unwrap();
            let set = |name, value: &[u8]| {
                lsetxattr(root.join("bin/ping"), name, value, XattrFlags::empty()).unwrap();
            };
            set("security.capability", CAPABILITY);
            set("trusted.note", b"line\nline");
        });
        image
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scope.dir().join(name)
    }

    fn tagged(&self, tag: &str) -> String {
        format!("{}:{tag}", self.layout.display())
    }

    #[track_caller]
    fn umoci(&self, args: &[&str]) -> Output {
        self.scope.program(&["umoci"]).args(args).output().ok()
    }

    #[track_caller]
    fn skopeo(&self, args: &[&str]) -> Output {
        self.scope.program(&["skopeo", "copy", "--quiet"]).args(args).output().ok()
    }

    /// Adds a layer with the changes that `change` makes to the image's tree.
    fn layer(&self, tag: &str, change: impl FnOnce(&Path)) {
        let work = self.path("work");
        let (tagged, dir) = (self.tagged(tag), work.to_str().unwrap());
        self.umoci(&["unpack", "--image", &tagged, dir]);
        change(&work.join("rootfs"));
        self.umoci(&["repack", "--image", &tagged, dir]);
        fs::remove_dir_all(&work).unwrap();
    }

    /// Adds a layer as GNU tar packs it: with an opaque whiteout, and in another order than
    /// umoci's.
    fn tar_layer(&self, tag: &str) {
        let tree = self.path("tree");
        fs::create_dir_all(tree.join("opaque")).unwrap();
        let long = "long-name".repeat(20);
        for name in ["opaque/.wh..wh..opq", "opaque/new", "etc.new", &long] {
            fs::write(tree.join(name), name).unwrap();
        }
        rustix::fs::mkfifoat(rustix::fs::CWD, tree.join("pipe"), 0o640.into()).unwrap();
        let null = rustix::fs::makedev(1, 3);
        let kind = rustix::fs::FileType::CharacterDevice;
        rustix::fs::mknodat(rustix::fs::CWD, tree.join("null"), kind, 0o666.into(), null).unwrap();
        let layer = self.path("layer.tar");
        let (to, from) = (layer.to_str().unwrap(), tree.to_str().unwrap());
        self.scope.program(&["tar", "--format=pax", "-C", from, "-cf", to, "."]).output().ok();
        self.umoci(&["raw", "add-layer", "--image", &self.tagged(tag), to]);
        fs::remove_dir_all(tree).unwrap();
        fs::remove_file(layer).unwrap();
    }

    fn bundle(&self, image: &str, to: &Path) -> Output {
        let image = format!("oci:{image}");
        self.scope.runtime().args(["bundle", &image, to.to_str().unwrap()]).output()
    }

    /// Unpacks with both programs and compares. Leaves isopod's result.
    #[track_caller]
    fn compare(&self, image: &str, to: &Path) {
        let theirs = self.path("theirs");
        self.umoci(&["unpack", "--image", image, theirs.to_str().unwrap()]);
        self.bundle(image, to).ok();
        assert_eq!(tree(&to.join("rootfs")), tree(&theirs.join("rootfs")));
        fs::remove_dir_all(theirs).unwrap();
    }
}

/// Every attribute of a tree's files, by path.
fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut names: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let stat = fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().to_owned();
        let kind = stat.file_type();
        let mut text = format!(
            "{:o} {}:{} device {} time {}.{} xattrs {:?}",
            stat.mode(),
            stat.uid(),
            stat.gid(),
            stat.rdev(),
            stat.mtime(),
            stat.mtime_nsec(),
            xattrs(&path)
        );
        if kind.is_file() {
            text.push_str(&format!(" {:?}", fs::read(&path).map(|bytes| checksum(&bytes))));
        } else if kind.is_symlink() {
            text.push_str(&format!(" -> {:?}", fs::read_link(&path).unwrap()));
        } else if kind.is_dir() {
            let mut inside: Vec<PathBuf> =
                fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()).collect();
            // Sorted, so that the same name of a hard-linked file comes first in both trees.
            inside.sort_by(|one, other| other.cmp(one));
            todo.extend(inside);
        }
        if !kind.is_dir() {
            let first = names.entry(stat.ino()).or_insert_with(|| name.clone());
            text.push_str(&format!(" same as {first:?}"));
        }
        found.insert(name, text);
    }
    found
}

fn checksum(bytes: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hasher};
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 4096];
    let n = llistxattr(path, &mut names[..]).unwrap();
    let names = names[..n].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 4096];
            let n = lgetxattr(path, name, &mut value[..]).unwrap();
            value.truncate(n);
            (String::from_utf8_lossy(name).into_owned(), value)
        })
        .collect()
}

/// Changes a bundle's config.json.
fn edit(bundle: &Path, change: impl FnOnce(&mut Value)) {
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, config.to_string()).unwrap();
}

fn run(scope: &Scope, bundle: &Path, id: &str) -> Output {
    let id = format!("{}{id}", scope.name());
    scope.runtime().args(["run", "--bundle", bundle.to_str().unwrap(), &id]).output()
}

#[test]
fn a_layered_image_becomes_what_umoci_makes_of_it() {
    microvm_only!();
    let scope = Scope::new();
    let image = Image::new(&scope);
    image.layer("base", |root| {
        fs::remove_dir_all(root.join("gone")).unwrap();
        fs::remove_file(root.join("etc/second")).unwrap();
        fs::remove_file(root.join("replaced")).unwrap();
        fs::create_dir(root.join("replaced")).unwrap();
        fs::write(root.join("replaced/new"), "new").unwrap();
        symlink("/etc", root.join("to-etc")).unwrap();
    });
    image.tar_layer("base");
    let bundle = image.path("bundle");
    image.compare(&image.tagged("base"), &bundle);
    let here = |path: &str| fs::symlink_metadata(bundle.join("rootfs").join(path)).is_ok();
    assert!(!here("gone") && !here("opaque/old") && !here("opaque/.wh..wh..opq"));
    assert!(here("opaque/new") && here("replaced/new") && here("etc/first"));
    let ping = bundle.join("rootfs/bin/ping");
    assert_eq!(fs::metadata(&ping).unwrap().mode() & 0o7777, 0o6755);
    assert_eq!(xattrs(&ping)["security.capability"], CAPABILITY);
    assert_eq!(fs::metadata(&bundle).unwrap().mode() & 0o7777, 0o700);
    fs::remove_dir_all(&bundle).unwrap();

    // The same image with other compressions has the same tree.
    let (zstd, plain) = (image.path("zstd"), image.path("plain"));
    let tag = |layout: &Path| format!("{}:again", layout.display());
    let base = format!("oci:{}", image.tagged("base"));
    let oci = |layout: &Path| format!("oci:{}", tag(layout));
    image.skopeo(&["--dest-compress-format", "zstd", &base, &oci(&zstd)]);
    let dir = format!("dir:{}", image.path("dir").display());
    image.skopeo(&["--dest-decompress", &base, &dir]);
    image.skopeo(&["--dest-oci-accept-uncompressed-layers", &dir, &oci(&plain)]);
    for (layout, word) in [(zstd, "+zstd\""), (plain, "v1.tar\"")] {
        assert!(manifests(&layout).contains(word), "{}", manifests(&layout));
        image.bundle(&tag(&layout), &bundle).ok();
        let expected = image.path("expected");
        image.bundle(&image.tagged("base"), &expected).ok();
        assert_eq!(tree(&bundle.join("rootfs")), tree(&expected.join("rootfs")));
        fs::remove_dir_all(&bundle).unwrap();
        fs::remove_dir_all(&expected).unwrap();
    }
}

/// The JSON blobs of a layout.
fn manifests(layout: &Path) -> String {
    let blobs = fs::read_dir(layout.join("blobs/sha256")).unwrap();
    let texts = blobs.map(|blob| fs::read(blob.unwrap().path()).unwrap());
    let json = texts.filter(|bytes| bytes.starts_with(b"{"));
    json.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).collect()
}

#[test]
fn an_image_runs_as_its_configuration_says() {
    microvm_only!();
    let scope = Scope::new();
    let image = Image::new(&scope);
    let options = [
        ["--config.entrypoint", "/bin/sh"],
        ["--config.entrypoint", "-c"],
        [
            "--config.cmd",
            "id; pwd; env; echo $0; echo seen >/data/x; cat /data/x; ls /data; exit 4",
        ],
        ["--config.cmd", "zero"],
        ["--config.user", "alice"],
        ["--config.env", "COLOUR=blue"],
        ["--config.workingdir", "/srv/made"],
        ["--config.volume", "/data"],
        ["--config.label", "org.example.note=kept"],
        ["--config.exposedports", "80/tcp"],
        ["--config.stopsignal", "SIGQUIT"],
    ];
    image.layer("base", |root| {
        fs::create_dir(root.join("data")).unwrap();
        fs::write(root.join("data/seed"), "").unwrap();
        chown(root.join("data"), Some(1000), Some(1000)).unwrap();
    });
    let mut args = vec!["config", "--image"];
    let tagged = image.tagged("base");
    args.push(&tagged);
    args.extend(options.iter().flatten());
    image.umoci(&args);
    let bundle = image.path("bundle");
    image.bundle(&tagged, &bundle).ok();
    edit(&bundle, |config| {
        let annotations = &config["annotations"];
        assert_eq!(annotations["org.example.note"], "kept");
        assert_eq!(annotations["org.opencontainers.image.exposedPorts"], "80/tcp");
        assert_eq!(annotations["org.opencontainers.image.stopSignal"], "SIGQUIT");
        config["process"]["terminal"] = json!(false);
    });
    let out = run(&scope, &bundle, "a");
    assert_eq!(out.status, 4, "{out}");
    for line in [
        "uid=1000(alice) gid=1000(alice) groups=44(friends)",
        "/srv/made",
        "COLOUR=blue",
        "zero",
        "seen",
        "seed",
    ] {
        assert!(out.stdout.lines().any(|found| found == line), "no {line:?}: {out}");
    }
    // Files written to the volume are not in the root file system.
    assert!(!bundle.join("rootfs/data/x").exists());
}

#[test]
fn an_image_as_it_is_gets_a_shell_on_a_terminal() {
    microvm_only!();
    let scope = Scope::new();
    let image = Image::new(&scope);
    let bundle = image.path("bundle");
    image.bundle(&image.tagged("base"), &bundle).ok();
    let (mut terminal, slave) = Terminal::open(80, 25);
    let id = format!("{}a", scope.name());
    let command = scope.runtime().args(["run", "--bundle", bundle.to_str().unwrap(), &id]);
    let mut job = command.terminal(slave).spawn();
    terminal.keys("tty; touch /written; exit 6\n");
    terminal.screen.line_with("/dev/pts/0");
    assert_eq!(job.wait().status(), 6);
    assert!(bundle.join("rootfs/written").exists(), "its root is for reading only");
}

#[test]
fn a_bundle_that_umoci_has_made_runs() {
    microvm_only!();
    let scope = Scope::new();
    let image = Image::new(&scope);
    let bundle = image.path("bundle");
    image.umoci(&["unpack", "--image", &image.tagged("base"), bundle.to_str().unwrap()]);
    edit(&bundle, |config| {
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["stat", "-c", "%a %u %g", "/bin/ping", "/tmp"]);
    });
    let out = run(&scope, &bundle, "a").ok();
    assert_eq!(out.stdout, "6755 7 8\n1777 0 0\n");
}

#[test]
fn a_tag_is_needed_where_there_are_several() {
    microvm_only!();
    let scope = Scope::new();
    let image = Image::new(&scope);
    image.umoci(&["tag", "--image", &image.tagged("base"), "same"]);
    let bundle = image.path("bundle");
    let layout = image.layout.to_str().unwrap();
    image.bundle(layout, &bundle).ok();
    fs::remove_dir_all(&bundle).unwrap();
    image.layer("same", |root| fs::write(root.join("more"), "").unwrap());
    image.bundle(layout, &bundle).one_line_error(&["oci:DIR:TAG", "\"base\"", "\"same\""]);
    image.bundle(&image.tagged("no"), &bundle).one_line_error(&["\"no\"", "\"base\"", "\"same\""]);
    image.bundle(&image.tagged("same"), &bundle).ok();
    assert!(bundle.join("rootfs/more").exists());
    image.bundle(&image.tagged("base"), &bundle).one_line_error(&["bundle", "is not empty"]);
    let nowhere = image.bundle("/no/such/layout", &image.path("other"));
    nowhere.one_line_error(&["/no/such/layout", "OCI image layout", "no such file"]);
    let other = image.path("other");
    let docker = scope.runtime().args(["bundle", "docker://busybox", other.to_str().unwrap()]);
    let out = docker.output();
    assert!(out.status != 0 && out.stderr.contains("skopeo copy"), "{out}");
}

#[test]
fn a_damaged_layer_leaves_nothing() {
    microvm_only!();
    let scope = Scope::new();
    let image = Image::new(&scope);
    let blobs = image.layout.join("blobs/sha256");
    let largest = fs::read_dir(&blobs).unwrap().map(|blob| blob.unwrap().path());
    let largest = largest.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let mut bytes = fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&largest, bytes).unwrap();
    let digest = largest.file_name().unwrap().to_str().unwrap();
    let bundle = image.path("bundle");
    let out = image.bundle(&image.tagged("base"), &bundle);
    assert_ne!(out.status, 0, "{out}");
    // Damaged data may cause warnings before the damage is known.
    let last = out.stderr.lines().last().unwrap_or_default();
    for word in ["layer 1 of 1", digest, "damaged"] {
        assert!(last.contains(word), "{word}: {out}");
    }
    assert_eq!(names(scope.dir(), "bundle"), [""; 0]);
}

#[test]
fn a_full_file_system_is_said_to_be_full_and_left_empty() {
    microvm_only!();
    let scope = Scope::new();
    let image = Image::new(&scope);
    let (small, tagged) = (image.path("small"), image.tagged("base"));
    fs::create_dir(&small).unwrap();
    let small = small.to_str().unwrap();
    for (size, word) in [("size=1m", "space"), ("nr_inodes=9", "inodes")] {
        let image = format!("oci:{tagged}");
        let script = format!("mount -t tmpfs -o {size} none {small}");
        let bundle = format!("{small}/bundle");
        let runtime = scope.runtime().args(["bundle", &image, &bundle]);
        // Remains are in the mount namespace only, so `ls` runs there.
        let look = ["sh", "-c", "\"$@\"; status=$?; ls -A \"$0\"; exit $status", small];
        let out = runtime.through(&look).after_mounting(&script).output();
        out.one_line_error(&["layer 1 of 1", "no space left on device", "more", word]);
        assert_eq!(out.stdout, "", "{out}");
    }
}

/// A layout whose layer would take hours to read: a sparse file of 4 TiB.
fn endless(scope: &Scope) -> PathBuf {
    let layout = scope.dir().join("endless");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let blob = |kind: &str, json: &Value| {
        let text = json.to_string();
        let sum = scope.program(&["sha256sum"]).stdin(text.as_bytes()).output().ok().stdout;
        let hex = sum.split(' ').next().unwrap();
        fs::write(blobs.join(hex), &text).unwrap();
        let media_type = format!("application/vnd.oci.image.{kind}.v1+json");
        json!({ "mediaType": media_type, "digest": format!("sha256:{hex}"), "size": text.len() })
    };
    let digest = "0".repeat(64);
    let size = 1_u64 << 42;
    fs::File::create(blobs.join(&digest)).unwrap().set_len(size).unwrap();
    let digest = format!("sha256:{digest}");
    let config = json!({
        "os": "linux", "architecture": "amd64",
        "rootfs": { "type": "layers", "diff_ids": [digest] },
    });
    let layer = "application/vnd.oci.image.layer.v1.tar";
    let manifest = json!({
        "schemaVersion": 2,
        "config": blob("config", &config),
        "layers": [{ "mediaType": layer, "digest": digest, "size": size }],
    });
    let index = json!({ "schemaVersion": 2, "manifests": [blob("manifest", &manifest)] });
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    layout
}

#[test]
fn a_signal_ends_it_and_leaves_nothing() {
    microvm_only!();
    let scope = Scope::new();
    let layout = format!("oci:{}", endless(&scope).display());
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let place = scope.dir().join(format!("place{signal}"));
        fs::create_dir(&place).unwrap();
        let changes = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&changes, &place, inotify::WatchFlags::CREATE).unwrap();
        let bundle = place.join("bundle");
        let command = scope.runtime().args(["bundle", &layout, bundle.to_str().unwrap()]);
        let mut job = command.spawn();
        // Blocks until the command has made its directory.
        let mut buffer = [MaybeUninit::uninit(); 512];
        let mut events = inotify::Reader::new(&changes, &mut buffer);
        assert_eq!(events.next().unwrap().file_name(), Some(c".bundle.unpacking"));
        scope.keeper().signal(job.pid, signal).unwrap();
        assert_eq!(job.wait().status(), 128 + signal, "{}", job.stderr.so_far());
        assert_eq!(names(&place, ""), [""; 0]);
    }
}

/// The names in `dir` that contain `part`.
fn names(dir: &Path, part: &str) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    let names = names.map(|name| name.to_string_lossy().into_owned());
    names.filter(|name| name.contains(part)).collect()
}
