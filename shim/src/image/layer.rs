//! Applies one layer, from its blob to the tree.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

use crate::{
    error::{Error, Explain, Result},
    image::{
        archive::Archive,
        blob::{self, Hash, Verified},
        extract,
        layout::{Layer, Layout},
        tree::Tree,
        watch::Watch,
        zstd::Zstd,
    },
    text::quoted,
};

/// Bytes to read from a blob at once.
const CHUNK: usize = 128 << 10;

/// Compression of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

/// Media types of layers. Layers "with restrictions on distribution" differ only in name, and are
/// often left out.
const MEDIA_TYPES: [(&str, Compression); 11] = [
    ("application/vnd.oci.image.layer.v1.tar", Compression::None),
    ("application/vnd.oci.image.layer.v1.tar+gzip", Compression::Gzip),
    ("application/vnd.oci.image.layer.v1.tar+zstd", Compression::Zstd),
    ("application/vnd.oci.image.layer.nondistributable.v1.tar", Compression::None),
    ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", Compression::Gzip),
    ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", Compression::Zstd),
    ("application/vnd.docker.image.rootfs.diff.tar", Compression::None),
    ("application/vnd.docker.image.rootfs.diff.tar.gzip", Compression::Gzip),
    ("application/vnd.docker.image.rootfs.diff.tar.zstd", Compression::Zstd),
    ("application/vnd.docker.image.rootfs.foreign.diff.tar", Compression::None),
    ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Compression::Gzip),
];

/// Applies `layer` to `tree`.
pub(super) fn apply(layout: &Layout, layer: &Layer, tree: &mut Tree, watch: &Watch) -> Result<()> {
    let compression = compression(layer.descriptor.media_type().as_ref())?;
    let mut blob = blob::open(&layout.dir, &layer.descriptor)?;
    let applied = {
        let compressed = BufReader::with_capacity(CHUNK, watch.counted(&mut blob));
        let hash = Hash::of(&layer.diff_id)?;
        let plain = decompressor(compressed, compression);
        let mut plain = Verified::new(plain, hash, layer.diff_id.digest(), None);
        extract::apply(&mut Archive::new(&mut plain), tree, watch).and_then(|()| {
            plain.finish().explain(|| format!("its uncompressed content, {}", layer.diff_id))
        })
    };
    // A blob that differs from its descriptor is the reason for any failure, so its check comes
    // first.
    let rest = io::copy(&mut watch.counted(&mut blob), &mut io::sink());
    // A signal ends the read early, and then the layer seems to be at fault.
    watch.check()?;
    rest.and_then(|_| blob.finish()).explain(|| "it cannot be read".into())?;
    applied
}

fn compression(media_type: &str) -> Result<Compression> {
    let known = MEDIA_TYPES.iter().find(|(name, _)| *name == media_type);
    known.map(|(_, compression)| *compression).ok_or_else(|| {
        let name = quoted(media_type.as_bytes());
        Error::new(format!(
            "layers of the type {name} are not supported: tar, tar+gzip and tar+zstd are"
        ))
    })
}

fn decompressor<'a>(source: impl BufRead + 'a, compression: Compression) -> Box<dyn Read + 'a> {
    match compression {
        Compression::None => Box::new(source),
        Compression::Gzip => Box::new(MultiGzDecoder::new(source)),
        Compression::Zstd => Box::new(Zstd::new(source)),
    }
}
