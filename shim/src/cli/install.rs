//! `install` and `uninstall`: register the runtime with the engines of a host, or remove that.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::{
    cli::print,
    error::{Error, Explain, Result},
    install::{self, Engine, Options, Report},
    state::DEFAULT_ROOT,
};

/// Options of both verbs.
#[derive(Debug, Args)]
pub(super) struct Install {
    /// Engines; without one, all that are installed, or all that know of isopod.
    #[arg(value_name = "ENGINE")]
    engines: Vec<Engine>,
    /// Print the changes as a diff, and make none.
    #[arg(long)]
    dry_run: bool,
    // The id is that of the global option, which has no use here: this one takes its place.
    /// Directory with the root file system of the host, for an installer in a container.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_ROOT, hide_default_value = true)]
    root: PathBuf,
    /// Directory of isopod on the host; by default that of this program.
    #[arg(long, value_name = "DIR")]
    binary_dir: Option<PathBuf>,
    /// Name of the runtime for the engines.
    #[arg(long, value_name = "NAME", default_value = "isopod")]
    handler: String,
}

impl Install {
    pub(super) fn install(self) -> Result<u8> {
        show(install::install(&self.options()?)?)
    }

    pub(super) fn uninstall(self) -> Result<u8> {
        show(install::uninstall(&self.options()?)?)
    }

    fn options(self) -> Result<Options> {
        let binary_dir = match self.binary_dir {
            Some(dir) => dir,
            None => {
                let program =
                    std::env::current_exe().explain(|| "cannot read /proc/self/exe".into())?;
                program.parent().unwrap_or(Path::new("/")).to_owned()
            }
        };
        // The default is that of the global option.
        let given = self.root != Path::new(DEFAULT_ROOT);
        Ok(Options {
            root: if given { self.root } else { "/".into() },
            binary_dir,
            handler: self.handler,
            engines: self.engines,
            dry_run: self.dry_run,
        })
    }
}

/// Prints what was done, and logs what was not. Returns the exit status.
fn show(report: Report) -> Result<u8> {
    print(&report.text)?;
    report.failures.iter().for_each(|error: &Error| log::error!("{error}"));
    Ok(u8::from(!report.failures.is_empty()))
}
