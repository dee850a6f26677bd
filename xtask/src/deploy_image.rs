//! `cargo xtask deploy-image`: the image of `deploy/daemonset.yaml`, as an archive of an OCI image
//! layout. No registry and no builder is needed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value as Json, json};
use sha2::{Digest as _, Sha256};

use crate::apt::{self, Need};
use crate::process::{capture, command};
use crate::progress::step;
use crate::{build, install, repository};

/// Help text of the command.
pub(crate) const HELP: &str = "\
Usage: cargo xtask deploy-image

Builds the product, and from it the image of deploy/daemonset.yaml: an archive of an OCI image
layout, which `ctr --namespace k8s.io image import` reads, and skopeo as `oci-archive:`. Prints its
path.";

/// The image's name in deploy/daemonset.yaml.
const NAME: &str = "localhost/isopod-installer:latest";

/// The shell and the programs of the manifest's commands.
const BUSYBOX: &str = "/bin/busybox";
const NEEDS: [Need; 1] = [Need { package: "busybox-static", purpose: "shell of an image" }];

/// Names of busybox that the manifest's commands use.
const APPLETS: [&str; 6] = ["cp", "find", "mkdir", "mv", "sh", "tail"];

/// Builds the product and the image. Returns the archive.
pub(crate) fn build() -> Result<PathBuf> {
    apt::ensure(NEEDS)?;
    let product = build::build()?;
    let target = repository::target();
    let archive = target.join("isopod-installer.tar");
    let work = target.join("deploy-image");
    step("make the image", || pack(&product, &work, &archive))?;
    Ok(archive)
}

/// Makes the archive of the image from the folder of the product. `work` is for its parts.
fn pack(product: &Path, work: &Path, archive: &Path) -> Result<()> {
    empty(work)?;
    let (root, layout) = (work.join("root"), work.join("layout"));
    fill(product, &root)?;
    let layer = work.join("layer.tar");
    tar(&root, &layer)?;
    let content = fs::read(&layer).with_context(|| format!("cannot read {}", layer.display()))?;
    write_layout(&content, &layout)?;
    tar(&layout, archive)?;
    fs::remove_dir_all(work).with_context(|| format!("cannot remove {}", work.display()))
}

/// Makes an empty folder.
fn empty(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))
}

/// Fills the image's root directory: the product in the folders of an installation, and busybox.
fn fill(product: &Path, root: &Path) -> Result<()> {
    let prefix = root.join("usr/local");
    for (name, folder) in install::FILES {
        let folder = prefix.join(folder);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        build::place(&product.join(name), &folder.join(name))?;
    }
    let bin = root.join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("cannot create {}", bin.display()))?;
    build::place(Path::new(BUSYBOX), &bin.join("busybox"))?;
    for applet in APPLETS {
        symlink("busybox", bin.join(applet))
            .with_context(|| format!("cannot make the link {applet}"))?;
    }
    Ok(())
}

/// Archives the content of a folder, with the same result for the same content.
fn tar(dir: &Path, archive: &Path) -> Result<()> {
    let mut tar = command("tar");
    tar.args(["--create", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"]);
    tar.args(["--mtime=@0", "--file"]).arg(archive).arg("--directory").arg(dir);
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut names: Vec<_> = entries.filter_map(Result::ok).map(|e| e.file_name()).collect();
    names.sort();
    capture(tar.args(names)).map(drop)
}

/// Writes an OCI image layout with one image of one layer.
fn write_layout(layer: &[u8], layout: &Path) -> Result<()> {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).with_context(|| format!("cannot create {}", blobs.display()))?;
    let layer = blob(&blobs, "layer.v1.tar", layer)?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Cmd": ["/bin/sh"], "Env": ["PATH=/usr/local/bin:/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = blob(&blobs, "config.v1+json", config.to_string().as_bytes())?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media_type("manifest.v1+json"),
        "config": config,
        "layers": [layer],
    });
    let mut entry = blob(&blobs, "manifest.v1+json", manifest.to_string().as_bytes())?;
    // containerd's name of the image, and skopeo's.
    entry["annotations"] = json!({
        "io.containerd.image.name": NAME,
        "org.opencontainers.image.ref.name": "latest",
    });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    let marker = json!({ "imageLayoutVersion": "1.0.0" });
    for (name, content) in [("index.json", index), ("oci-layout", marker)] {
        let path = layout.join(name);
        fs::write(&path, content.to_string())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Writes a blob under its digest. Returns its descriptor.
fn blob(blobs: &Path, kind: &str, content: &[u8]) -> Result<Json> {
    let hash = Sha256::digest(content);
    let digest: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = blobs.join(&digest);
    fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    let digest = format!("sha256:{digest}");
    Ok(json!({ "mediaType": media_type(kind), "digest": digest, "size": content.len() }))
}

fn media_type(kind: &str) -> String {
    format!("application/vnd.oci.image.{kind}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_blob_is_found_from_the_index() {
        let dir = tempfile::tempdir().unwrap();
        write_layout(b"layer", dir.path()).unwrap();
        let read =
            |path: &Path| -> Json { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
        let blob = |descriptor: &Json| {
            let digest = descriptor["digest"].as_str().unwrap().replace(':', "/");
            let path = dir.path().join("blobs").join(digest);
            assert_eq!(fs::metadata(&path).unwrap().len(), descriptor["size"].as_u64().unwrap());
            path
        };
        let index = read(&dir.path().join("index.json"));
        let manifest = read(&blob(&index["manifests"][0]));
        assert_eq!(fs::read(blob(&manifest["layers"][0])).unwrap(), b"layer");
        let config = read(&blob(&manifest["config"]));
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
    }

    #[test]
    fn the_manifest_has_this_image() {
        let path = repository::root().join("deploy/daemonset.yaml");
        assert!(fs::read_to_string(path).unwrap().contains(&format!("image: {NAME}\n")));
    }
}
