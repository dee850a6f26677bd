//! `cargo xtask install`: installs the product in the folders that `isopod` searches
//! (shim/src/settings.rs).

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use lexopt::prelude::*;

use crate::build;
use crate::progress::say;

const HELP: &str = "\
Usage: cargo xtask install [--prefix DIR]

  --prefix DIR   install below DIR [/usr/local]

Builds and installs isopod in DIR/bin, the VMM in DIR/libexec/isopod, and guest kernel and guest
image in DIR/share/isopod. isopod finds the other files relative to itself, so DIR may be moved.";

/// Files of the product, each with its folder below the prefix.
const FILES: [(&str, &str); 4] = [
    ("isopod", "bin"),
    ("isopod-vmm", "libexec/isopod"),
    ("vmlinux", "share/isopod"),
    ("isopod.initramfs", "share/isopod"),
];

/// Builds the product and installs it.
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
