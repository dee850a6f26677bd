//! The work in the guest: timed parts, one after the other. Later parts need files of earlier ones.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::ground::{BULK, MANY, SOURCES, SPAN};
use crate::clock;

/// Names and units of the parts of the work.
pub(super) type Parts = Vec<(String, f64)>;

/// File on the volume with the results.
pub(super) const RESULTS: &str = "results.json";

/// Bytes of a sequential read or write.
const CHUNK: usize = 128 << 10;

/// Bytes of a random read or write.
const BLOCK: usize = 4096;

/// Number of random reads or writes.
const BLOCKS: usize = 500;

/// Does the work below `volume` and writes the results there.
pub(crate) fn work(volume: &Path) -> Result<()> {
    let mut parts = Parts::new();
    let mut part = |name: &str, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let start = clock::now()?;
        work().with_context(|| name.to_owned())?;
        parts.push((name.to_owned(), clock::now()? - start));
        Ok(())
    };
    let at = |name: &str| volume.join(name);
    let many: Vec<_> = (0..MANY).map(|number| at(&format!("many/{number}"))).collect();
    let made: Vec<_> = (0..MANY).map(|number| at(&format!("made/{number}"))).collect();

    part("read 16 MiB", &mut || read(&at("bulk")))?;
    part("read it again", &mut || read(&at("bulk")))?;
    part("write 16 MiB", &mut || write(&at("new")))?;
    part("500 random reads", &mut || random_reads(&at("span")))?;
    part("500 random writes", &mut || random_writes(&at("written")))?;
    part("list 500 files", &mut || list(&at("many")))?;
    part("stat 500 files", &mut || stat(&many))?;
    part("stat them again", &mut || stat(&many))?;
    part("read 500 files", &mut || read_each(&many))?;
    part("read them again", &mut || read_each(&many))?;
    fs::create_dir(at("made")).context("made")?;
    part("create 500 files", &mut || create(&made))?;
    part("unlink 500 files", &mut || unlink(&made))?;
    part("unpack 200 files", &mut || {
        call(Command::new("tar").arg("-C").arg(volume).arg("-xf").arg(at("tree.tar")))
    })?;
    part("remove that tree", &mut || Ok(fs::remove_dir_all(at("tree"))?))?;
    part("build a C program", &mut || build(&at("source")))?;

    let results = serde_json::to_vec(&parts)?;
    fs::write(at(RESULTS), results).context("the results")
}

fn read(path: &Path) -> Result<()> {
    let mut file = File::open(path)?;
    let mut chunk = vec![0; CHUNK];
    let mut total = 0;
    loop {
        match file.read(&mut chunk)? {
            0 if total == BULK => return Ok(()),
            0 => bail!("it has {total} bytes"),
            n => total += n,
        }
    }
}

fn write(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    let chunk = vec![0x33; CHUNK];
    for _ in 0..BULK / CHUNK {
        file.write_all(&chunk)?;
    }
    Ok(file.sync_all()?)
}

/// Offsets of blocks in a file of [`SPAN`] bytes, the same in every run.
///
/// A linear congruence, whose values are all different.
fn places() -> impl Iterator<Item = u64> {
    let blocks = SPAN / BLOCK;
    (0..BLOCKS).map(move |n| ((n * 1201 + 17) % blocks * BLOCK) as u64)
}

fn random_reads(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
    let mut block = vec![0; BLOCK];
    for place in places() {
        file.read_exact_at(&mut block, place)?;
    }
    Ok(())
}

fn random_writes(path: &Path) -> Result<()> {
    let file = File::options().write(true).open(path)?;
    let block = vec![0x33; BLOCK];
    for place in places() {
        file.write_all_at(&block, place)?;
    }
    Ok(file.sync_all()?)
}

fn list(dir: &Path) -> Result<()> {
    let found = fs::read_dir(dir)?.filter(Result::is_ok).count();
    if found != MANY {
        bail!("there are {found} files");
    }
    Ok(())
}

fn stat<P: AsRef<Path>>(paths: &[P]) -> Result<()> {
    for path in paths {
        fs::metadata(path)?;
    }
    Ok(())
}

fn read_each<P: AsRef<Path>>(paths: &[P]) -> Result<()> {
    for path in paths {
        if fs::read(path)?.is_empty() {
            bail!("{} is empty", path.as_ref().display());
        }
    }
    Ok(())
}

fn create<P: AsRef<Path>>(paths: &[P]) -> Result<()> {
    for path in paths {
        fs::write(path, b"a few words of a new file\n")?;
    }
    Ok(())
}

fn unlink<P: AsRef<Path>>(paths: &[P]) -> Result<()> {
    for path in paths {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Compiles each source file, links the objects, and runs the program.
fn build(source: &Path) -> Result<()> {
    let parts = (0..SOURCES).map(|number| format!("part{number}"));
    let all: Vec<String> = parts.chain(["main".to_owned()]).collect();
    for name in &all {
        let mut gcc = Command::new("gcc");
        gcc.args(["-O1", "-c", &format!("{name}.c")]);
        call(gcc.current_dir(source))?;
    }
    let objects = all.iter().map(|name| format!("{name}.o"));
    call(Command::new("gcc").args(["-o", "program"]).args(objects).current_dir(source))?;
    call(&mut Command::new(source.join("program")))
}

fn call(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn places_are_within_the_file_and_differ() {
        let all: BTreeSet<u64> = places().collect();
        assert_eq!(all.len(), BLOCKS);
        assert!(all.iter().all(|place| place + BLOCK as u64 <= SPAN as u64));
    }
}
