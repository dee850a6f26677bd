//! The reference to an image: `oci:DIR[:TAG]`, as skopeo has it.

use std::{path::PathBuf, str::FromStr};

/// An image in a layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageReference {
    /// The layout's directory.
    pub dir: PathBuf,
    /// The image's `org.opencontainers.image.ref.name`. Needed if the layout has several images.
    pub tag: Option<String>,
}

impl FromStr for ImageReference {
    type Err = String;

    /// Parses a reference. The directory ends at the first colon, because tags have colons too
    /// ("registry:5000/name:1").
    fn from_str(text: &str) -> Result<Self, String> {
        let Some(rest) = text.strip_prefix("oci:") else {
            return Err("an image is named oci:DIR or oci:DIR:TAG; skopeo copies any other kind \
                        to one (skopeo copy docker://NAME oci:DIR:TAG)"
                .to_owned());
        };
        let (dir, tag) = match rest.split_once(':') {
            Some((dir, tag)) => (dir, Some(tag)),
            None => (rest, None),
        };
        if dir.is_empty() || tag == Some("") {
            return Err("an image is named oci:DIR or oci:DIR:TAG".to_owned());
        }
        Ok(Self { dir: dir.into(), tag: tag.map(str::to_owned) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_and_tag_are_told_apart_as_skopeo_does() {
        for (text, dir, tag) in [
            ("oci:a", "a", None),
            ("oci:/a/b:latest", "/a/b", Some("latest")),
            ("oci:a:r.example:5000/b:1", "a", Some("r.example:5000/b:1")),
        ] {
            let expected = ImageReference { dir: dir.into(), tag: tag.map(str::to_owned) };
            assert_eq!(text.parse(), Ok(expected));
        }
        for text in ["", "a", "oci:", "oci::a", "oci:a:", "docker://busybox"] {
            assert!(text.parse::<ImageReference>().is_err(), "{text}");
        }
    }
}
