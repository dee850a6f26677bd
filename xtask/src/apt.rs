//! Debian packages, installed on the machine or unpacked into the cache.
//!
//! The machine's apt configuration is used and never changed.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process::{capture, command, run_logged};
use crate::progress::{say, step};
use crate::{cache, repository};

/// A Debian package and its purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    /// Name of the package.
    pub(crate) package: &'static str,
    /// Purpose, in two or three words.
    pub(crate) purpose: &'static str,
}

/// Installs the missing packages of `needs` in one apt call, and prints their names and purposes.
///
/// Fails for users other than root if a package is missing.
pub(crate) fn ensure(needs: impl IntoIterator<Item = Need>) -> Result<()> {
    let missing = missing(needs)?;
    if missing.is_empty() {
        return Ok(());
    }
    say("installing missing Debian packages:");
    for need in &missing {
        say(format!("    {:<20} {}", need.package, need.purpose));
    }
    let names: Vec<&str> = missing.iter().map(|need| need.package).collect();
    step(&format!("install {} Debian packages", names.len()), || install(&names))
}

/// The packages of `needs` that [`ensure`] would install, sorted by name.
///
/// Fails for users other than root if a package is missing, and names all missing packages.
pub(crate) fn missing(needs: impl IntoIterator<Item = Need>) -> Result<Vec<Need>> {
    let needs: Vec<Need> = needs.into_iter().collect();
    let installed = installed(&needs)?;
    let mut missing: Vec<Need> = needs
        .into_iter()
        .filter(|need| !installed.iter().any(|have| have == need.package))
        .collect();
    missing.sort_by_key(|need| need.package);
    missing.dedup_by_key(|need| need.package);
    if !missing.is_empty() && !nix::unistd::geteuid().is_root() {
        let names: Vec<&str> = missing.iter().map(|need| need.package).collect();
        bail!(
            "Debian packages are missing; install them as root: apt-get install {}",
            names.join(" ")
        );
    }
    Ok(missing)
}

/// The packages of `needs` that are installed or unpacked.
fn installed(needs: &[Need]) -> Result<Vec<String>> {
    let names: Vec<&str> = needs.iter().map(|need| need.package).collect();
    let known = versions(&names)?;
    let installed =
        known.lines().filter_map(|line| line.strip_suffix(" installed")?.split(' ').next());
    let unpacked = names.iter().copied().filter(|name| unpacked(name).is_some());
    Ok(installed.chain(unpacked).map(str::to_owned).collect())
}

/// Installs packages without removing any package of the machine.
///
/// A package that conflicts with an installed one is unpacked into the cache instead.
fn install(names: &[&str]) -> Result<()> {
    let plan = match Plan::of(names) {
        Ok(plan) => plan,
        Err(_) => {
            // The package lists are missing, or name versions that the archive no longer has.
            update(&[])?;
            Plan::of(names)?
        }
    };
    if plan.removed.is_empty() {
        return install_beside(names);
    }
    // Sorts all new packages, dependencies included, by a conflict with an installed package.
    let mut beside: Vec<&str> = Vec::new();
    let mut apart: Vec<&str> = Vec::new();
    for name in plan.new.iter().map(String::as_str) {
        if Plan::of(&[name])?.removed.is_empty() { beside.push(name) } else { apart.push(name) }
    }
    let refused = apart.iter().find(|name| !CAN_BE_UNPACKED.contains(name));
    if let Some(refused) = refused {
        bail!(
            "{refused} cannot be installed here without removing {}; nothing was changed; install \
             a version of {refused} that fits, or remove these packages by hand",
            plan.removed.join(" ")
        );
    }
    say(format!(
        "    {} would remove {}; unpacking into the cache instead",
        apart.join(" and "),
        plan.removed.join(" and ")
    ));
    if !beside.is_empty() {
        install_beside(&beside)?;
    }
    unpack(&apart)
}

/// Installs packages that conflict with no installed one.
fn install_beside(names: &[&str]) -> Result<()> {
    if run_install(names).is_err() {
        update(&[])?;
        run_install(names)?;
    }
    Ok(())
}

/// Packages that also work from the directory that [`unpacked`] returns.
const CAN_BE_UNPACKED: [&str; 2] = ["qemu-system-common", "qemu-system-x86"];

/// Names, versions and states of packages: a line for each package that dpkg knows, sorted.
pub(crate) fn versions(packages: &[&str]) -> Result<String> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat", "${Package} ${Version} ${db:Status-Status}\n"]);
    // dpkg-query exits with 1 if it does not know a package. That is no failure here.
    let output = query
        .args(packages)
        .output()
        .context("cannot run dpkg-query; these commands need a Debian machine")?;
    let mut lines: Vec<String> =
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
    lines.sort();
    Ok(lines.join("\n"))
}

/// Root directory of a package that was unpacked into the cache.
pub(crate) fn unpacked(package: &str) -> Option<PathBuf> {
    let dir = cache::root().ok()?.join("unpacked").join(package);
    dir.is_dir().then_some(dir)
}

/// Unpacks packages that depend on each other, in apt's current versions.
fn unpack(names: &[&str]) -> Result<()> {
    let shelf = cache::root()?.join("unpacked");
    for name in names {
        let dir = shelf.join(name);
        if dir.is_dir() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
    }
    for name in names {
        let offer = find(name, |_| true)?;
        cache::entry("unpacked", name, |dir| {
            offer.unpack(dir)?;
            SHARED_DATA.iter().try_for_each(|data| link_to_installed(dir, data))
        })?;
    }
    Ok(())
}

/// Data folders of installed packages, linked into each unpacked package.
///
/// The unpacked programs look for these folders relative to themselves.
const SHARED_DATA: [&str; 3] = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe"];

/// Links the folder `data` of an unpacked package to the installed one, unless `dir` has it.
fn link_to_installed(dir: &Path, data: &str) -> Result<()> {
    let (link, to) = (dir.join(data), Path::new("/").join(data));
    if link.exists() {
        return Ok(());
    }
    let parent = link.parent().unwrap_or(dir);
    fs::create_dir_all(parent)
        .and_then(|()| std::os::unix::fs::symlink(&to, &link))
        .with_context(|| format!("cannot link {} to {}", link.display(), to.display()))
}

/// Changes that apt would make to install packages.
struct Plan {
    /// Packages that would be installed.
    new: Vec<String>,
    /// Packages that would be removed.
    removed: Vec<String>,
}

impl Plan {
    fn of(names: &[&str]) -> Result<Self> {
        Ok(Self::read(&simulate(names)?))
    }

    /// Reads the output of `apt-get --simulate`: lines `Inst NAME ...` and `Remv NAME ...`.
    fn read(text: &str) -> Self {
        let of = |mark: &str| {
            let names = text.lines().filter_map(|line| line.strip_prefix(mark));
            names.filter_map(|rest| rest.split_whitespace().next()).map(str::to_owned).collect()
        };
        Self { new: of("Inst "), removed: of("Remv ") }
    }
}

fn simulate(names: &[&str]) -> Result<String> {
    let mut apt = apt_get(&[]);
    capture(apt.args(["--simulate", "--no-install-recommends", "install"]).args(names))
}

fn run_install(names: &[&str]) -> Result<()> {
    // A process group of its own and no parent-death signal: an interrupted dpkg leaves packages
    // half installed.
    let mut apt = Command::new("apt-get");
    apt.process_group(0);
    set_up(&mut apt, &[]);
    // --no-remove holds even if the archive has changed since the simulation.
    apt.args(["--yes", "--no-remove", "--no-install-recommends"]);
    apt.args(["-o", "DPkg::Lock::Timeout=300", "install"]);
    run_logged(apt.args(names), &repository::target().join("apt.log"))
}

fn update(options: &[String]) -> Result<()> {
    step("fetch apt's package lists", || {
        run_logged(apt_get(options).arg("update"), &repository::target().join("apt.log"))
    })
}

fn apt_get(options: &[String]) -> Command {
    let mut apt = command("apt-get");
    set_up(&mut apt, options);
    apt
}

fn set_up(apt: &mut Command, options: &[String]) {
    apt.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    // apt's unprivileged user `_apt` cannot write below root's home.
    apt.args(["--quiet", "-o", "APT::Sandbox::User=root"]).args(options);
}

/// Tells if apt's present package lists have the package `package`.
pub(crate) fn knows(package: &str) -> bool {
    capture(command("apt-cache").args(["show", "--no-all-versions", package])).is_ok()
}

/// A downloadable version of a package.
#[derive(Debug, Clone)]
pub(crate) struct Offer {
    /// Name of the package.
    pub(crate) package: String,
    /// Its full Debian version.
    pub(crate) version: String,
    /// apt options with which apt finds this version; none for the machine's own configuration.
    options: Vec<String>,
}

/// The newest version of `package` that `wanted` accepts.
///
/// The machine's package sources come first, before and after an update of the package lists. The
/// backports of the same archive come last.
pub(crate) fn find(package: &str, wanted: impl Fn(&str) -> bool) -> Result<Offer> {
    let search = |options: &[String]| -> Result<Option<Offer>> {
        let mut madison = command("apt-cache");
        let list = capture(madison.args(options).args(["madison", package]))?;
        // Newest first: `package | version | source`.
        let versions = list.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim);
        let version = versions.into_iter().find(|version| wanted(version));
        Ok(version.map(|version| Offer {
            package: package.to_owned(),
            version: version.to_owned(),
            options: options.to_vec(),
        }))
    };
    if let Some(offer) = search(&[])? {
        return Ok(offer);
    }
    update(&[])?;
    if let Some(offer) = search(&[])? {
        return Ok(offer);
    }
    say(format!("    this machine's package sources have no such {package}; trying backports"));
    let backports = backports()?;
    update(&backports)?;
    match search(&backports)? {
        Some(offer) => Ok(offer),
        None => bail!("no such {package} in this machine's package sources or in backports"),
    }
}

impl Offer {
    /// Downloads the package into the folder `dir`. Returns the package file.
    pub(crate) fn download(&self, dir: &Path) -> Result<PathBuf> {
        let mut apt = apt_get(&self.options);
        apt.current_dir(dir).arg("download").arg(format!("{}={}", self.package, self.version));
        capture(&mut apt)?;
        let found = fs::read_dir(dir)
            .with_context(|| format!("cannot list {}", dir.display()))?
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .find(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with(&format!("{}_", self.package)) && name.ends_with(".deb")
            });
        found.with_context(|| format!("apt-get download left no {}_*.deb", self.package))
    }

    /// Downloads the package and unpacks its files below `dir`, without installing it.
    pub(crate) fn unpack(&self, dir: &Path) -> Result<()> {
        let archive = self.download(dir)?;
        capture(command("dpkg-deb").arg("--extract").arg(&archive).arg(dir))?;
        fs::remove_file(&archive).with_context(|| format!("cannot remove {}", archive.display()))
    }

    /// Names of the dependencies, without versions and alternatives.
    pub(crate) fn depends(&self) -> Result<Vec<String>> {
        let mut show = command("apt-cache");
        show.args(&self.options).arg("show").arg(format!("{}={}", self.package, self.version));
        let record = capture(&mut show)?;
        let depends = record.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or("");
        let first_word = |one: &str| one.split_whitespace().next().map(str::to_owned);
        Ok(depends.split(',').filter_map(first_word).collect())
    }
}

/// URL of the Debian archive in the machine's own package sources.
pub(crate) fn archive() -> Result<String> {
    release_and_archive().map(|(_, archive)| archive)
}

/// Codename of the machine's Debian release, and the URL of its archive.
fn release_and_archive() -> Result<(String, String)> {
    let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .context("/etc/os-release names no VERSION_CODENAME; these commands need a Debian release")?
        .trim_matches('"');
    let format = "$(ORIGIN)|$(CODENAME)|$(COMPONENT)|$(REPO_URI)";
    let targets = capture(command("apt-get").args([
        "indextargets",
        "--format",
        format,
        "Created-By: Packages",
    ]))?;
    let wanted = format!("Debian|{codename}|main|");
    let archive = targets
        .lines()
        .find_map(|line| line.strip_prefix(&wanted))
        .with_context(|| format!("apt has no package source for Debian {codename} main"))?;
    Ok((codename.to_owned(), archive.to_owned()))
}

/// Writes an apt configuration for the backports into the cache. Returns apt options for it.
///
/// The backports come from the archive that the machine itself uses.
fn backports() -> Result<Vec<String>> {
    let (codename, archive) = release_and_archive()?;
    let dir = cache::root()?.join("apt");
    let lists = dir.join("lists");
    fs::create_dir_all(&lists).with_context(|| format!("cannot create {}", lists.display()))?;
    let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let signed_by =
        if Path::new(keys).exists() { format!("[signed-by={keys}] ") } else { String::new() };
    let list = dir.join("sources.list");
    fs::write(&list, format!("deb {signed_by}{archive} {codename}-backports main\n"))
        .with_context(|| format!("cannot write {}", list.display()))?;
    let settings = [
        format!("Dir::Etc::SourceList={}", list.display()),
        "Dir::Etc::SourceParts=/dev/null".to_owned(),
        format!("Dir::State::Lists={}", lists.display()),
        format!("Dir::Cache={}", dir.join("cache").display()),
    ];
    Ok(settings.into_iter().flat_map(|setting| ["-o".to_owned(), setting]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_tells_what_comes_and_what_goes() {
        let plan = Plan::read(
            "The following packages will be REMOVED:\n  qemu-utils\n\
             Remv qemu-utils [1:10.0.2]\nInst ipxe-qemu (1.0.0 Debian:12 [all])\n\
             Inst qemu-system-x86 [1:7.1] (1:7.2 Debian:12 [amd64])\nConf ipxe-qemu (1.0.0)\n",
        );
        assert_eq!(plan.new, ["ipxe-qemu", "qemu-system-x86"]);
        assert_eq!(plan.removed, ["qemu-utils"]);
    }
}
