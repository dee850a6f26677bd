//! Where sandboxes run: on this machine when its KVM is real, in the lab when not.

use std::fs;
use std::io::{self, IsTerminal as _, Read as _, Write as _, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::apt::Need;
use crate::lab::{self, Ended, Input, Lab, Options, Run, Show};
use crate::process;
use crate::progress::say;

/// Chooses the place: `force` for the lab, `off` for this machine.
const CHOICE: &str = "ISOPOD_LAB";

/// Where directories are copied to in the lab.
const BROUGHT: &str = "/opt/isopod";

/// Shows the lab the path `$1` of this machine, as its `$2`th; see lab/initramfs.sh for /run/host.
const EXPOSE: &str = r#"
set -e
if ! [ -d "/run/host$1" ]; then
    # What is there already is the same file, on the share for writing.
    ! [ -e "$1" ] || exit 0
    mkdir -p "$(dirname "$1")"
    exec cp -a "/run/host$1" "$1"
fi
layers=/run/exposed/$2
mkdir -p "$1" "$layers/files" "$layers/work"
cd "/run/host$1"
exec mount -t overlay -o "lowerdir=.,upperdir=$layers/files,workdir=$layers/work" exposed "$1"
"#;

/// A place where sandboxes run.
#[derive(Debug)]
pub(crate) enum Place {
    /// This machine.
    Here,
    /// A lab that ends with this value.
    Lab(Box<Lab>),
}

impl Place {
    /// The place that this machine's KVM or `ISOPOD_LAB` asks for, and says which.
    pub(crate) fn open(options: &Options) -> Result<Self> {
        if is_here(options.count)? {
            return Ok(Self::Here);
        }
        Ok(Self::Lab(Box::new(Lab::private(options)?)))
    }

    /// What to call it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Here => "on this machine",
            Self::Lab(_) => "in the lab",
        }
    }

    /// A directory there with the contents of `from`: in the lab a copy in its memory, for what comes
    /// from shared directories is slower, and waiting for it spoils counting.
    pub(crate) fn bring(&self, from: &Path) -> Result<PathBuf> {
        if let Self::Here = self {
            return Ok(from.to_owned());
        }
        let name = from.file_name().context("a directory to copy has no name")?;
        let to = Path::new(BROUGHT).join(name);
        self.must(&["mkdir", "-p", BROUGHT])?;
        self.must(&["cp", "-a", "--", lab::text(from)?, lab::text(&to)?])?;
        Ok(to)
    }

    /// Lets the lab have the directories and files `paths` of this machine under their own names
    /// where it has none of them, or another one: those below a directory that is the lab's own, and
    /// those that it shares for writing. What is written to them there is lost with the lab.
    pub(crate) fn expose(&self, paths: &[PathBuf]) -> Result<()> {
        if let Self::Here = self {
            return Ok(());
        }
        for (number, path) in lab::hidden(paths).into_iter().enumerate() {
            let path = lab::text(&path)?;
            // An overlay's directories are best named relatively: any byte may be in `path`.
            self.must(&["sh", "-c", EXPOSE, "expose", path, &number.to_string()])
                .with_context(|| format!("cannot show {path} to the lab"))?;
        }
        Ok(())
    }

    /// This process's input, as far as a command there can have it.
    pub(crate) fn input(&self) -> Input {
        match self {
            Self::Here => Input::Own,
            Self::Lab(_) => own_input(),
        }
    }

    /// Runs a command there that has no input and must succeed.
    pub(crate) fn must(&self, argv: &[&str]) -> Result<()> {
        let run = Run::here(argv.iter().map(|&word| word.to_owned()).collect())?;
        match self.run(&run, Input::Nothing, &mut Show::Through)? {
            Ended::Status(0) => Ok(()),
            Ended::Status(status) => {
                bail!("{} ended with status {status} {}", argv.join(" "), self.name())
            }
            Ended::Refused(why) => bail!("{why}"),
        }
    }

    /// Runs a command there.
    pub(crate) fn run(&self, run: &Run, input: Input, show: &mut Show<'_>) -> Result<Ended> {
        match self {
            Self::Here => run_here(run, input, show),
            Self::Lab(lab) => lab.run(run, input, show),
        }
    }
}

/// Why sandboxes run in a lab, if they do: this machine's KVM or `ISOPOD_LAB` decides, and counting,
/// which only a lab can do.
fn reason_for_lab(counting: bool) -> Result<Option<String>> {
    let choice = std::env::var(CHOICE).unwrap_or_default();
    match choice.as_str() {
        "" if counting => Ok(Some("it counts instructions".to_owned())),
        "" if hardware_kvm() => Ok(None),
        "" => Ok(Some("this machine has no hardware KVM".to_owned())),
        "off" => Ok(None),
        "force" => Ok(Some(format!("{CHOICE}=force"))),
        other => bail!("{CHOICE} is {other:?}; it has to be `force` or `off`, or not set"),
    }
}

/// What running sandboxes needs from Debian: a lab's packages, where one has to be booted.
pub(crate) fn needs(counting: bool) -> Result<Vec<Need>> {
    Ok(reason_for_lab(counting)?.map_or_else(Vec::new, |_| lab::needs().collect()))
}

/// Whether sandboxes run on this machine. Says where they run, and why.
pub(crate) fn is_here(counting: bool) -> Result<bool> {
    let Some(why) = reason_for_lab(counting)? else {
        say("sandboxes run directly on this machine");
        return Ok(true);
    };
    say(format!("sandboxes run in the lab, an emulated machine with nested KVM ({why})"));
    Ok(false)
}

/// This process's input, unless that is a terminal, which a command in a lab cannot have.
pub(crate) fn own_input() -> Input {
    if stdin().is_terminal() { Input::Nothing } else { Input::Own }
}

fn run_here(run: &Run, input: Input, show: &mut Show<'_>) -> Result<Ended> {
    let (program, args) = run.argv.split_first().context("there is no command")?;
    let mut command = process::command(program);
    command.args(args).env_clear().envs(run.env.iter().map(|(name, value)| (name, value)));
    command.current_dir(&run.cwd);
    command.stdin(if input == Input::Own { Stdio::inherit() } else { Stdio::null() });
    // A terminal stays one.
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

/// Whether this machine's processor and kernel have KVM, and not only a `/dev/kvm` in software.
fn hardware_kvm() -> bool {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu.lines().find(|line| line.starts_with("flags")).unwrap_or("");
    let flag = |name: &str| flags.split_whitespace().any(|flag| flag == name);
    let module = |name: &str| Path::new("/sys/module").join(name).exists();
    let processor = (flag("svm") && module("kvm_amd")) || (flag("vmx") && module("kvm_intel"));
    processor && Path::new("/dev/kvm").exists()
}

impl Show<'_> {
    /// Passes a piece of standard output on.
    pub(crate) fn stdout(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Through => {}
            Self::Also(kept) => kept.extend_from_slice(bytes),
            Self::Only(kept) => {
                kept.extend_from_slice(bytes);
                return Ok(());
            }
            Self::Timed(lines) => return lines.push(bytes),
        }
        stdout().write_all(bytes)?;
        stdout().flush()
    }
}
