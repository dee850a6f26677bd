//! `cargo xtask install`: installs the product in the folders that `isopod` searches
//! (shim/src/settings.rs).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use lexopt::prelude::*;

use crate::build;
use crate::process::{capture, command};
use crate::progress::say;

const HELP: &str = "\
Usage: cargo xtask install [--prefix DIR]

  --prefix DIR   install below DIR [/usr/local]

Builds and installs isopod in DIR/bin, with a link for containerd's shim beside it. The VMM goes to
DIR/libexec/isopod, guest kernel and guest image to DIR/share/isopod. Man pages and completions of
bash, fish and zsh go below DIR/share. isopod finds the other files relative to itself, so DIR may
be moved.";

/// Files of the product, each with its folder below the prefix.
pub(crate) const FILES: [(&str, &str); 4] = [
    ("isopod", "bin"),
    ("isopod-vmm", "libexec/isopod"),
    ("vmlinux", "share/isopod"),
    ("isopod.initramfs", "share/isopod"),
];

/// Completions of each shell, with their files below the prefix.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "share/bash-completion/completions/isopod"),
    ("fish", "share/fish/vendor_completions.d/isopod.fish"),
    ("zsh", "share/zsh/site-functions/_isopod"),
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
    let link = build::link_shim(&prefix.join("bin"))?;
    say(format!("installed {}", link.display()));
    pages(&product.join("isopod"), &prefix)?;
    let isopod = prefix.join("bin/isopod");
    let isopod = isopod.display();
    say(format!("next: {isopod} check; then {isopod} install registers it with the engines"));
    Ok(0)
}

/// Writes the man pages, and the completions where each shell looks for them.
fn pages(isopod: &Path, prefix: &Path) -> Result<()> {
    let man = prefix.join("share/man/man1");
    fs::create_dir_all(&man).with_context(|| format!("cannot create {}", man.display()))?;
    capture(command(isopod).arg("man").arg(&man))?;
    say(format!("installed {}/isopod*.1", man.display()));
    for (shell, file) in COMPLETIONS {
        let file = prefix.join(file);
        let folder = file.parent().unwrap_or(prefix);
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let script = capture(command(isopod).args(["completions", shell]))?;
        fs::write(&file, script).with_context(|| format!("cannot write {}", file.display()))?;
        say(format!("installed {}", file.display()));
    }
    Ok(())
}
