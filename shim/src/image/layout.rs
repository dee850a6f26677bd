//! The image layout: `oci-layout`, `index.json`, and the blobs of an image.
//!
//! Clauses are those of the OCI image specification 1.1: image-layout.md, image-index.md,
//! manifest.md, config.md.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    str::FromStr,
};

use oci_spec::image::{
    ANNOTATION_REF_NAME, Arch, Descriptor, Digest, ImageConfiguration, ImageIndex, ImageManifest,
    OciLayout, Os,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    error::{Error, Explain, Result},
    image::blob,
    text::quoted,
};

/// Largest depth of nested indexes.
const MAX_DEPTH: u32 = 8;

/// Largest number of indexes to read for one image.
const MAX_INDEXES: u32 = 256;

const MANIFESTS: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

const INDEXES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// A directory with images.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) dir: PathBuf,
    index: ImageIndex,
}

/// An image of a layout: its configuration, and its layers from the lowest on.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) config: ImageConfiguration,
    pub(super) layers: Vec<Layer>,
}

/// A layer as the manifest has it, with the digest of its uncompressed content.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) descriptor: Descriptor,
    pub(super) diff_id: Digest,
}

impl Layout {
    /// Reads `oci-layout` and `index.json`.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("oci-layout");
        let text = blob::read_file(&path).map_err(|e| {
            Error::because(format!("{} is not an OCI image layout", dir.display()), e)
        })?;
        let layout: OciLayout = parse(&path.display().to_string(), &text)?;
        let version = layout.image_layout_version();
        if !version.starts_with("1.") {
            return Err(Error::new(format!(
                "{} has version {}; version 1 is supported",
                path.display(),
                quoted(version.as_bytes())
            )));
        }
        let path = dir.join("index.json");
        let index = parse_index(&path.display().to_string(), &blob::read_file(&path)?, None)?;
        Ok(Self { dir: dir.to_owned(), index })
    }

    /// Finds the image with this tag, or the only image, for this machine. No image and several
    /// images are an error.
    pub(super) fn find(&self, tag: Option<&str>) -> Result<Image> {
        let manifest = self.select(tag)?;
        let what = format!("manifest {}", manifest.digest());
        let text = blob::read(&self.dir, &manifest)?;
        let raw: Value = parse(&what, &text)?;
        check_kind(&what, &raw, Some(&manifest))?;
        // One reader could take a document that is both for a manifest, and another reader for an
        // index.
        if raw.get("manifests").is_some() {
            return Err(Error::new(format!("{what} has \"manifests\", as only an index may")));
        }
        let manifest: ImageManifest = parse(&what, &text)?;
        if !CONFIGS.contains(&manifest.config().media_type().as_ref()) {
            return Err(Error::new(format!(
                "{what} is of no container image: its configuration has the type {}",
                quoted(manifest.config().media_type().as_ref().as_bytes())
            )));
        }
        let config = self.config(manifest.config())?;
        let diff_ids = config.rootfs().diff_ids();
        if diff_ids.len() != manifest.layers().len() {
            return Err(Error::new(format!(
                "{what} has {} layers, and its configuration names {}",
                manifest.layers().len(),
                diff_ids.len()
            )));
        }
        let mut layers = Vec::new();
        for (descriptor, diff_id) in manifest.layers().iter().zip(diff_ids) {
            let digest = Digest::from_str(diff_id).map_err(|e| {
                Error::new(format!("{what} has the diff_id {}: {e}", quoted(diff_id.as_bytes())))
            })?;
            layers.push(Layer { descriptor: descriptor.clone(), diff_id: digest });
        }
        Ok(Image { config, layers })
    }

    fn config(&self, descriptor: &Descriptor) -> Result<ImageConfiguration> {
        let what = format!("configuration {}", descriptor.digest());
        let config: ImageConfiguration = parse(&what, &blob::read(&self.dir, descriptor)?)?;
        if !is_this_machine(config.os(), config.architecture()) {
            return Err(Error::new(format!(
                "the image is for {}/{}; this machine is linux/amd64",
                config.os(),
                config.architecture()
            )));
        }
        if config.rootfs().typ() != "layers" {
            return Err(Error::new(format!(
                "{what} has a root file system of the type {}; \"layers\" is the only one known",
                quoted(config.rootfs().typ().as_bytes())
            )));
        }
        Ok(config)
    }

    fn select(&self, tag: Option<&str>) -> Result<Descriptor> {
        let manifests = self.index.manifests();
        let chosen = manifests.iter().filter(|d| tag.is_none_or(|tag| tag_of(d) == Some(tag)));
        let mut search = Search::new(&self.dir);
        let mut any = false;
        for descriptor in chosen {
            any = true;
            search.look_at(descriptor, 0)?;
        }
        let dir = self.dir.display();
        if !any {
            return Err(Error::new(match tag {
                Some(tag) => format!("{dir} has no image with the tag {tag:?}; {}", self.tags()),
                None => format!("{dir} holds no image"),
            }));
        }
        let Some(best) = search.found.iter().map(variant).min() else {
            let seen: Vec<&str> = search.others.iter().map(String::as_str).collect();
            return Err(Error::new(format!(
                "{dir} has no image for linux/amd64, only {}",
                seen.join(", ")
            )));
        };
        search.found.retain(|descriptor| variant(descriptor) == best);
        match &search.found[..] {
            [one] => Ok(one.clone()),
            several if tag.is_none() => Err(Error::new(format!(
                "{dir} holds {} images: name one of them by its tag, as oci:DIR:TAG; {}",
                several.len(),
                self.tags()
            ))),
            several => Err(Error::new(format!(
                "{dir} has {} images for linux/amd64 with that tag; {}",
                several.len(),
                self.tags()
            ))),
        }
    }

    /// The tags of the layout, for a message.
    fn tags(&self) -> String {
        let tags: BTreeSet<&str> = self.index.manifests().iter().filter_map(tag_of).collect();
        if tags.is_empty() {
            return "it has no tags".to_owned();
        }
        let tags: Vec<String> = tags.into_iter().map(|tag| quoted(tag.as_bytes())).collect();
        format!("it has the tags {}", tags.join(", "))
    }
}

/// A search through indexes for the manifests for this machine.
#[derive(Debug)]
struct Search<'a> {
    layout: &'a Path,
    /// Manifests for this machine, each once.
    found: Vec<Descriptor>,
    /// Descriptions of everything else, for a message.
    others: BTreeSet<String>,
    indexes: u32,
}

impl<'a> Search<'a> {
    fn new(layout: &'a Path) -> Self {
        Self { layout, found: Vec::new(), others: BTreeSet::new(), indexes: 0 }
    }

    fn look_at(&mut self, descriptor: &Descriptor, depth: u32) -> Result<()> {
        let kind = descriptor.media_type().as_ref();
        if MANIFESTS.contains(&kind) {
            match descriptor.platform() {
                Some(platform) if !is_this_machine(platform.os(), platform.architecture()) => {
                    let other = format!("{}/{}", platform.os(), platform.architecture());
                    self.others.insert(quoted(other.as_bytes()));
                }
                _ if self.found.iter().any(|found| found.digest() == descriptor.digest()) => {}
                _ => self.found.push(descriptor.clone()),
            }
            return Ok(());
        }
        if !INDEXES.contains(&kind) {
            self.others.insert(format!("something of the type {}", quoted(kind.as_bytes())));
            return Ok(());
        }
        self.indexes += 1;
        if depth == MAX_DEPTH || self.indexes > MAX_INDEXES {
            return Err(Error::new(format!(
                "{} has too many indexes in one another",
                self.layout.display()
            )));
        }
        let what = format!("index {}", descriptor.digest());
        let index = parse_index(&what, &blob::read(self.layout, descriptor)?, Some(descriptor))?;
        for descriptor in index.manifests() {
            self.look_at(descriptor, depth + 1)?;
        }
        Ok(())
    }
}

fn parse_index(what: &str, text: &[u8], descriptor: Option<&Descriptor>) -> Result<ImageIndex> {
    let raw: Value = parse(what, text)?;
    check_kind(what, &raw, descriptor)?;
    if raw.get("layers").is_some() || raw.get("config").is_some() {
        return Err(Error::new(format!("{what} has layers, as only a manifest may")));
    }
    parse(what, text)
}

/// Checks version and media type. A document need not have a media type ("reserved for use, to
/// maintain compatibility"). If it has one, the descriptor has to have the same.
fn check_kind(what: &str, raw: &Value, descriptor: Option<&Descriptor>) -> Result<()> {
    if let Some(version) = raw.get("schemaVersion").filter(|version| **version != 2) {
        return Err(Error::new(format!("{what} has schemaVersion {version}; 2 is supported")));
    }
    let Some(expected) = descriptor.map(|descriptor| descriptor.media_type().as_ref()) else {
        return Ok(());
    };
    match raw.get("mediaType") {
        Some(own) if own != expected => {
            Err(Error::new(format!("{what} says that it is {own}, and not {expected:?}")))
        }
        _ => Ok(()),
    }
}

fn parse<T: DeserializeOwned>(what: &str, text: &[u8]) -> Result<T> {
    serde_json::from_slice(text).explain(|| what.to_owned())
}

fn tag_of(descriptor: &Descriptor) -> Option<&str> {
    let annotations = descriptor.annotations().as_ref()?;
    annotations.get(ANNOTATION_REF_NAME).map(String::as_str)
}

fn is_this_machine(os: &Os, architecture: &Arch) -> bool {
    (os, architecture) == (&Os::Linux, &Arch::Amd64)
}

/// The variant of a manifest's platform. The least variant asks least of the processor: not every
/// x86-64 processor has `v2` and above.
fn variant(descriptor: &Descriptor) -> String {
    let platform = descriptor.platform().as_ref();
    let variant = platform.and_then(|platform| platform.variant().clone()).unwrap_or_default();
    if variant == "v1" { String::new() } else { variant }
}
