//! `cargo xtask install`: the product, where `isopod` looks for its parts (shim/src/settings.rs).

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use lexopt::prelude::*;

use crate::build;
use crate::progress::say;

const HELP: &str = "\
Usage: cargo xtask install [--prefix DIR]

  --prefix DIR   install below DIR [/usr/local]

Builds what is to be installed: isopod in DIR/bin, the VMM in DIR/libexec/isopod, guest kernel and guest
image in DIR/share/isopod. isopod looks for the others from where it is itself, so DIR may be moved.";

/// Where each file goes below the prefix.
const FILES: [(&str, &str); 4] = [
    ("isopod", "bin"),
    ("isopod-vmm", "libexec/isopod"),
    ("vmlinux", "share/isopod"),
    ("isopod.initramfs", "share/isopod"),
];

/// Builds and installs.
pub(crate) fn main(mut args: lexopt::Parser) -> Result<i32> {
    let mut prefix = PathBuf::from("/usr/local");
    while let Some(arg) = args.next()? {
        match arg {
            Long("help") | Short('h') => {
                println!("{HELP}");
                return Ok(0);
            }
            Long("prefix") => prefix = args.value()?.into(),
            _ => return Err(arg.unexpected().into()),
        }
    }
    let product = build::build()?;
    for (name, folder) in FILES {
        let folder = prefix.join(folder);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        build::place(&product.join(name), &folder.join(name))?;
        say(format!("installed {}", folder.join(name).display()));
    }
    Ok(0)
}
