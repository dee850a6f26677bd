//! The machine on which sandboxes run: this one if it has hardware KVM, otherwise a lab.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::apt::Need;
use crate::lab::{self, Ended, Input, Lab, LabOptions, Run, Show};
use crate::process;
use crate::progress::{say, short_step, step};

/// Environment variable that overrides the choice: `force` for a lab, `off` for this machine.
const CHOICE: &str = "ISOPOD_LAB";

/// Directory of the lab for copied directories.
const BROUGHT: &str = "/opt/isopod";

/// Shell script that makes the path `$1` of this machine visible in the lab.
///
/// `$2` is a number that no other exposed path has. `/run/host` is made by lab/initramfs.sh.
const EXPOSE: &str = r#"
set -e
if ! [ -d "/run/host$1" ]; then
    # An existing file is the same file: it lies on the writable share.
    ! [ -e "$1" ] || exit 0
    mkdir -p "$(dirname "$1")"
    exec cp -a "/run/host$1" "$1"
fi
layers=/run/exposed/$2
mkdir -p "$1" "$layers/files" "$layers/work"
cd "/run/host$1"
exec mount -t overlay -o "lowerdir=.,upperdir=$layers/files,workdir=$layers/work" exposed "$1"
"#;

/// A machine on which sandboxes run.
#[derive(Debug)]
pub(crate) enum Target {
    /// This machine.
    Here,
    /// A lab, ended when this value is dropped.
    Lab(Box<Lab>),
}

impl Target {
    /// Chooses this machine or boots a lab, and prints the choice and its reason; see [`is_here`].
    pub(crate) fn open(options: &LabOptions) -> Result<Self> {
        if is_here(options.count)? {
            return Ok(Self::Here);
        }
        Ok(Self::Lab(Box::new(Lab::private(options)?)))
    }

    /// Name for messages, with a preposition.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Here => "on this machine",
            Self::Lab(_) => "in the lab",
        }
    }

    /// Returns a directory of the target with the contents of `from`.
    ///
    /// In a lab the directory is a copy in memory. Shared directories are slower, and the wait for
    /// the host would show in a lab that counts instructions.
    pub(crate) fn bring(&self, from: &Path) -> Result<PathBuf> {
        if let Self::Here = self {
            return Ok(from.to_owned());
        }
        let name = from.file_name().context("a directory to copy has no name")?;
        let to = Path::new(BROUGHT).join(name);
        step(&format!("copy {} to the lab", from.display()), || {
            self.must(&["mkdir", "-p", BROUGHT])?;
            self.must(&["cp", "-a", "--", lab::text(from)?, lab::text(&to)?])
        })?;
        Ok(to)
    }

    /// Makes directories and files of this machine visible in the lab under the same paths.
    ///
    /// Only some `paths` need it: those below a directory that the lab has for itself, and those on
    /// the writable share. Writes to an exposed path are lost when the lab ends.
    pub(crate) fn expose(&self, paths: &[PathBuf]) -> Result<()> {
        if let Self::Here = self {
            return Ok(());
        }
        for (number, path) in lab::hidden(paths).into_iter().enumerate() {
            let path = lab::text(&path)?;
            // EXPOSE names the lower directory `.`: overlay options could not quote every `path`.
            short_step(&format!("show {path} to the lab"), || {
                self.must(&["sh", "-c", EXPOSE, "expose", path, &number.to_string()])
            })
            .with_context(|| format!("cannot show {path} to the lab"))?;
        }
        Ok(())
    }

    /// This process's standard input, if a command on the target can have it.
    pub(crate) fn input(&self) -> Input {
        match self {
            Self::Here => Input::Own,
            Self::Lab(_) => Input::for_lab(),
        }
    }

    /// Runs a command without standard input. An exit status other than 0 is an error.
    pub(crate) fn must(&self, argv: &[&str]) -> Result<()> {
        let run = Run::here(argv.iter().map(|&word| word.to_owned()).collect())?;
        match self.run(&run, Input::Nothing, &mut Show::Through)? {
            Ended::Status(0) => Ok(()),
            Ended::Status(status) => {
                bail!("{} ended with status {status} {}", process::shell_line(argv), self.name())
            }
            Ended::Refused(why) => bail!("{why}"),
        }
    }

    /// Runs a command on the target.
    pub(crate) fn run(&self, run: &Run, input: Input, show: &mut Show<'_>) -> Result<Ended> {
        match self {
            Self::Here => run_here(run, input, show),
            Self::Lab(lab) => lab.run(run, input, show),
        }
    }
}

/// Reason for a lab, or none if sandboxes run on this machine.
///
/// `ISOPOD_LAB` decides. If it is not set, counting instructions needs a lab, and so does a machine
/// without hardware KVM.
fn reason_for_lab(counting: bool) -> Result<Option<String>> {
    let choice = std::env::var(CHOICE).unwrap_or_default();
    match choice.as_str() {
        "" if counting => Ok(Some("it counts instructions".to_owned())),
        "" if has_hardware_kvm() => Ok(None),
        "" => Ok(Some("this machine has no hardware KVM".to_owned())),
        "off" => Ok(None),
        "force" => Ok(Some(format!("{CHOICE}=force"))),
        other => bail!("{CHOICE} is {other:?}; it has to be `force` or `off`, or not set"),
    }
}

/// Debian packages for running sandboxes: those of a lab if sandboxes run in one, otherwise none.
pub(crate) fn needs(counting: bool) -> Result<Vec<Need>> {
    Ok(reason_for_lab(counting)?.map_or_else(Vec::new, |_| lab::needs().collect()))
}

/// Tells if sandboxes run on this machine. Prints the choice and its reason.
pub(crate) fn is_here(counting: bool) -> Result<bool> {
    let Some(why) = reason_for_lab(counting)? else {
        say("sandboxes run directly on this machine");
        return Ok(true);
    };
    say(format!("sandboxes run in the lab, an emulated machine with nested KVM ({why})"));
    Ok(false)
}

/// Runs a command on this machine.
fn run_here(run: &Run, input: Input, show: &mut Show<'_>) -> Result<Ended> {
    let (program, args) = run.argv.split_first().context("there is no command")?;
    let mut command = process::command(program);
    command.args(args).env_clear().envs(run.env.iter().map(|(name, value)| (name, value)));
    command.current_dir(&run.cwd);
    command.stdin(if input == Input::Own { Stdio::inherit() } else { Stdio::null() });
    // Inherited, not copied, so that a terminal stays a terminal.
    let through = matches!(show, Show::Through);
    command.stdout(if through { Stdio::inherit() } else { Stdio::piped() });
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Ok(Ended::Refused(format!("cannot run {program}: {error}"))),
    };
    let output = child.stdout.take();
    let passed_on = output.map_or(Ok(()), |output| pass_on(output, show));
    let status = child.wait().with_context(|| format!("cannot wait for {program}"))?;
    passed_on.map(|()| Ended::Status(process::shell_status(status)))
}

/// Shows `output` until its end.
fn pass_on(mut output: ChildStdout, show: &mut Show<'_>) -> Result<()> {
    let mut chunk = vec![0; 64 * 1024];
    loop {
        match output.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(length) => show.stdout(&chunk[..length]).context("cannot write output")?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("cannot read a command's output"),
        }
    }
}

/// Tells if processor and kernel have KVM. `/dev/kvm` alone is not enough: it may be emulated.
pub(crate) fn has_hardware_kvm() -> bool {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu.lines().find(|line| line.starts_with("flags")).unwrap_or("");
    let flag = |name: &str| flags.split_whitespace().any(|flag| flag == name);
    let module = |name: &str| Path::new("/sys/module").join(name).exists();
    let processor = (flag("svm") && module("kvm_amd")) || (flag("vmx") && module("kvm_intel"));
    processor && Path::new("/dev/kvm").exists()
}
