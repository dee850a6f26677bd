//! Images made here, entry by entry, and the bundles made of them.

mod entries;
mod layouts;
mod specs;
mod whiteouts;

use std::{
    ffi::OsStr,
    fs,
    io::Write,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256, Sha512};
use tempfile::TempDir;

use crate::image::*;

/// Part of a layer: entries with their descriptions.
#[derive(Clone)]
struct Part(Vec<u8>);

/// An entry of this type with any bytes as its path, owned by the user who runs the test.
fn entry(kind: u8, path: impl AsRef<[u8]>) -> EntryBuilder {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_mode(if kind == b'5' { 0o755 } else { 0o644 });
    header.set_uid(rustix::process::geteuid().as_raw().into());
    header.set_gid(rustix::process::getegid().as_raw().into());
    header.set_mtime(1_600_000_000);
    header.set_size(0);
    EntryBuilder {
        header,
        path: path.as_ref().to_vec(),
        link: Vec::new(),
        content: Vec::new(),
        before: Vec::new(),
    }
}

struct EntryBuilder {
    header: tar::Header,
    path: Vec<u8>,
    link: Vec<u8>,
    content: Vec<u8>,
    before: Vec<u8>,
}

impl EntryBuilder {
    fn content(mut self, content: impl AsRef<[u8]>) -> Self {
        self.content = content.as_ref().to_vec();
        self.header.set_size(self.content.len() as u64);
        self
    }

    fn link(mut self, target: impl AsRef<[u8]>) -> Self {
        self.link = target.as_ref().to_vec();
        self
    }

    fn header(mut self, change: impl FnOnce(&mut tar::Header)) -> Self {
        change(&mut self.header);
        self
    }

    fn mode(self, mode: u32) -> Self {
        self.header(|header| header.set_mode(mode))
    }

    /// Puts a part in front of the entry.
    fn after(mut self, part: Part) -> Self {
        self.before.extend(part.0);
        self
    }

    /// Puts PAX records in front of the entry.
    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            // The length counts itself.
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length += 1;
            }
            write!(data, "{length} {key}=").unwrap();
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.after(entry(b'x', "pax").content(data).build())
    }

    fn build(mut self) -> Part {
        // The names are copied as bytes, because the library itself would not write hostile names.
        let old = self.header.as_old_mut();
        for (field, bytes) in [(&mut old.name, &self.path), (&mut old.linkname, &self.link)] {
            let length = bytes.len().min(field.len());
            field[..length].copy_from_slice(&bytes[..length]);
        }
        self.header.set_cksum();
        let mut part = self.before;
        for (kind, bytes) in [(b'L', &self.path), (b'K', &self.link)] {
            if bytes.len() > 100 {
                part.extend(
                    entry(kind, "././@LongLink").content([&bytes[..], b"\0"].concat()).build().0,
                );
            }
        }
        part.extend_from_slice(self.header.as_bytes());
        part.extend_from_slice(&self.content);
        part.resize(part.len().next_multiple_of(512), 0);
        Part(part)
    }
}

fn file(path: &str, content: &str) -> Part {
    entry(b'0', path).content(content).build()
}

fn dir(path: &str) -> Part {
    entry(b'5', path).build()
}

fn symlink(path: &str, target: &str) -> Part {
    entry(b'2', path).link(target).build()
}

fn hard_link(path: &str, target: &str) -> Part {
    entry(b'1', path).link(target).build()
}

/// A whole layer.
fn tar(parts: impl IntoIterator<Item = Part>) -> Vec<u8> {
    let mut bytes: Vec<u8> = parts.into_iter().flat_map(|part| part.0).collect();
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

fn sha256(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn sha512(bytes: &[u8]) -> String {
    let hex: String = Sha512::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha512:{hex}")
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A layout on disk.
struct TestLayout {
    dir: TempDir,
    index: Vec<Value>,
}

impl TestLayout {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("layout")).unwrap();
        Self { dir, index: Vec::new() }
    }

    /// A layout with one image, of these uncompressed layers.
    fn of(layers: &[Vec<u8>]) -> Self {
        let mut layout = Self::new();
        layout.add_image(layers, json!({}), None);
        layout
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("layout")
    }

    /// Adds a blob, and returns its descriptor.
    fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        self.blob_named(media_type, bytes, &sha256(bytes))
    }

    fn blob_named(&self, media_type: &str, bytes: &[u8], digest: &str) -> Value {
        let path = self.path().join("blobs").join(digest.replace(':', "/"));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    /// Adds the blobs of an image, from layers with their media types and uncompressed contents.
    /// Returns the manifest's descriptor.
    fn manifest(&self, layers: &[(&str, Vec<u8>, &[u8])], config: Value) -> Value {
        let diff_ids: Vec<String> = layers.iter().map(|(.., plain)| sha256(plain)).collect();
        let config = json!({
            "os": "linux", "architecture": "amd64", "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let layers = layers.iter().map(|(kind, bytes, _)| self.blob(kind, bytes)).collect();
        self.manifest_of(layers, &config)
    }

    fn manifest_of(&self, layers: Vec<Value>, config: &Value) -> Value {
        let config = self.blob(CONFIG, config.to_string().as_bytes());
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
        self.blob(MANIFEST, manifest.to_string().as_bytes())
    }

    fn add_image(&mut self, layers: &[Vec<u8>], config: Value, tag: Option<&str>) {
        let layers: Vec<_> =
            layers.iter().map(|plain| (LAYER, plain.clone(), plain.as_slice())).collect();
        let mut descriptor = self.manifest(&layers, config);
        if let Some(tag) = tag {
            descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        }
        self.index.push(descriptor);
    }

    fn bundle(&self) -> PathBuf {
        self.dir.path().join("bundle")
    }

    /// Writes the index and unpacks. After an error too, only layout and bundle are left.
    fn unpack(&self, tag: Option<&str>) -> Result<Unpacked> {
        let index = json!({ "schemaVersion": 2, "manifests": self.index });
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
        fs::write(self.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        self.unpack_as_is(tag)
    }

    fn unpack_as_is(&self, tag: Option<&str>) -> Result<Unpacked> {
        let image = ImageReference { dir: self.path(), tag: tag.map(str::to_owned) };
        let unpacked = make_bundle(&image, &self.bundle());
        let mut left: Vec<_> =
            fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        let expected: &[&str] = if unpacked.is_ok() { &["bundle", "layout"] } else { &["layout"] };
        assert_eq!(left, expected, "{unpacked:?}");
        unpacked.map(|()| Unpacked(self.bundle()))
    }

    #[track_caller]
    fn refused(&self, words: &[&str]) {
        let message = self.unpack(None).map(|_| ()).unwrap_err().message;
        assert!(!message.contains('\n'), "one line: {message}");
        for word in words {
            assert!(message.contains(word), "{word:?} not in {message:?}");
        }
    }
}

/// A bundle.
#[derive(Debug)]
struct Unpacked(PathBuf);

impl Unpacked {
    fn root(&self, path: impl AsRef<OsStr>) -> PathBuf {
        self.0.join("rootfs").join(Path::new(&path))
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root(path)).unwrap()
    }

    fn stat(&self, path: impl AsRef<OsStr>) -> fs::Metadata {
        fs::symlink_metadata(self.root(path)).unwrap()
    }

    fn mode(&self, path: &str) -> u32 {
        self.stat(path).mode() & 0o7777
    }

    /// All paths, sorted, with a slash after directories and " -> " before a link's target.
    fn tree(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut todo = vec![self.root("")];
        while let Some(here) = todo.pop() {
            for entry in fs::read_dir(&here).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(self.root("")).unwrap();
                let mut name = String::from_utf8_lossy(name.as_os_str().as_bytes()).into_owned();
                let kind = fs::symlink_metadata(&path).unwrap().file_type();
                if kind.is_dir() {
                    name.push('/');
                    todo.push(path.clone());
                } else if kind.is_symlink() {
                    name.push_str(" -> ");
                    name.push_str(fs::read_link(&path).unwrap().to_str().unwrap());
                }
                found.push(name);
            }
        }
        found.sort();
        found
    }

    fn spec(&self) -> Value {
        serde_json::from_slice(&fs::read(self.0.join("config.json")).unwrap()).unwrap()
    }
}

#[track_caller]
fn unpacked(layers: &[Vec<u8>]) -> (TestLayout, Unpacked) {
    let layout = TestLayout::of(layers);
    let unpacked = layout.unpack(None).unwrap();
    (layout, unpacked)
}

#[track_caller]
fn refused(parts: impl IntoIterator<Item = Part>, words: &[&str]) {
    TestLayout::of(&[tar(parts)]).refused(words);
}
