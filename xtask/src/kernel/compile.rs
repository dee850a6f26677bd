//! Configures, compiles and strips a kernel, with the same result on every machine.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::process::{capture, command, run_logged, tail};
use crate::progress::{say, seconds};
use crate::repository;

use super::options::KernelOptions;

/// Path of the kernel configuration, relative to the work folder.
pub(super) const CONFIG: &str = "objects/.config";

/// Build user, host and number. They are constant, so that equal inputs give equal images.
const VARIABLES: [(&str, &str); 3] = [
    ("KBUILD_BUILD_USER", "isopod"),
    ("KBUILD_BUILD_HOST", "isopod"),
    ("KBUILD_BUILD_VERSION", "1"),
];

/// Options of `strip`. They leave the loaded segments, which include the KALLSYMS symbol table.
const STRIP: [&str; 3] = ["--strip-all", "--remove-section=.comment", "--output-file"];

/// Number of lines that `make` prints in a full build, about one for each object. Only an estimate.
const EXPECTED_LINES: usize = 1910;

/// Number of log lines in an error message.
const LOG_LINES: usize = 30;

/// Inputs of the image beside source, patches and options: the compiler, and its call.
pub(super) fn recipe() -> Result<String> {
    let compiler = capture(command("gcc").arg("--version"))?;
    let compiler = compiler.lines().next().unwrap_or_default();
    Ok(format!("{compiler}\n{VARIABLES:?}\n{STRIP:?}"))
}

/// Writes the configuration of the kernel source in `tree` below the folder `work`.
pub(super) fn configure(
    tree: &Path,
    work: &Path,
    options: &KernelOptions,
    version: &str,
) -> Result<()> {
    let objects = objects(work);
    fs::create_dir_all(&objects).with_context(|| format!("cannot create {}", objects.display()))?;
    let asked = work.join("asked.config");
    fs::write(&asked, options.text())
        .with_context(|| format!("cannot write {}", asked.display()))?;
    let mut configure = make(tree, &objects, version)?;
    run_logged(configure.arg("allnoconfig").env("KCONFIG_ALLCONFIG", &asked), &log())?;
    let config = work.join(CONFIG);
    let config =
        fs::read_to_string(&config).with_context(|| format!("cannot read {}", config.display()))?;
    options.verify(&config)
}

/// Compiles the configured kernel. Returns the unstripped image.
///
/// `version` is the Debian version of the source; `uname -v` shows it.
pub(super) fn compile(tree: &Path, work: &Path, version: &str) -> Result<PathBuf> {
    let objects = objects(work);
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let mut build = make(tree, &objects, version)?;
    build.arg(format!("--jobs={jobs}")).arg("vmlinux");
    run_with_progress(&mut build, &log())?;
    Ok(objects.join("vmlinux"))
}

/// Folder of the configuration and of the compiled files.
fn objects(work: &Path) -> PathBuf {
    work.join("objects")
}

/// Log file of `make`.
fn log() -> PathBuf {
    repository::target().join("kernel.log")
}

/// Writes a copy of `image` without symbols to `stripped`.
pub(super) fn strip(image: &Path, stripped: &Path) -> Result<()> {
    capture(command("strip").args(STRIP).arg(stripped).arg(image)).map(drop)
}

/// `make` with an environment that has only PATH from the caller: the rest could change the image.
fn make(tree: &Path, objects: &Path, version: &str) -> Result<Command> {
    let path = std::env::var_os("PATH").context("PATH is not set")?;
    // nice: the product's binaries must not wait for the kernel. Their last step uses one
    // processor.
    let mut make = command("nice");
    make.args(["-n", "5", "make"]).env_clear().env("PATH", path).env("LC_ALL", "C").envs(VARIABLES);
    // `uname -v` shows this text in place of the build time.
    make.env("KBUILD_BUILD_TIMESTAMP", format!("Debian {version}"));
    let mut output = std::ffi::OsString::from("O=");
    output.push(objects);
    make.arg("--directory").arg(tree).arg(output);
    Ok(make)
}

/// Runs `make` with its output in `log`, and prints its progress every ten seconds.
fn run_with_progress(make: &mut Command, log: &Path) -> Result<()> {
    let errors = File::options().create(true).append(true).open(log);
    let errors = errors.with_context(|| format!("cannot write {}", log.display()))?;
    let out = errors.try_clone().context("cannot duplicate a descriptor")?;
    let what = "compile the guest kernel";
    say(format!("{what} ..."));
    let began = Instant::now();
    let mut child = make
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .context("cannot run make")?;
    let copied = match child.stdout.take() {
        Some(output) => copy_lines(output, out, |lines| {
            let share = (100 * lines / EXPECTED_LINES).min(99);
            say(format!("{what} ... about {share} % ({lines} objects), {} so far", seconds(began)));
        }),
        None => Ok(()),
    };
    let status = child.wait().context("cannot wait for make")?;
    copied.with_context(|| format!("cannot write {}", log.display()))?;
    if !status.success() {
        bail!("make failed ({status}); the end of {}:\n{}", log.display(), tail(log, LOG_LINES));
    }
    say(format!("{what}: done in {}", seconds(began)));
    Ok(())
}

/// Copies `from` to `log` until its end.
///
/// Calls `report` every ten seconds with the number of compiled objects so far.
fn copy_lines(from: ChildStdout, mut log: File, report: impl Fn(usize)) -> std::io::Result<()> {
    let (sender, receiver) = channel();
    thread::scope(|scope| {
        let reader = scope.spawn(move || -> std::io::Result<()> {
            for line in BufReader::new(from).lines() {
                let line = line?;
                writeln!(log, "{line}")?;
                // Such as `  CC      kernel/fork.o`.
                if line.starts_with("  ") && sender.send(()).is_err() {
                    break;
                }
            }
            Ok(())
        });
        let (mut lines, mut next) = (0, Instant::now() + Duration::from_secs(10));
        loop {
            match receiver.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(()) => lines += 1,
                Err(RecvTimeoutError::Timeout) => {
                    report(lines);
                    next += Duration::from_secs(10);
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        reader.join().unwrap_or_else(|_| Err(std::io::Error::other("the reader failed")))
    })
}
