//! The place of a VMM on the host: its cgroup, and its turn when the host's memory runs out.

use std::{
    fs::{File, OpenOptions},
    io,
    path::PathBuf,
};

use rustix::fs::{Mode, OFlags};

use crate::error::{Explain, Result};

/// The place of a VMM on the host. The process that starts the VMM stays where it is.
#[derive(Debug, Default)]
pub(crate) struct Placement {
    /// Directory of the VMM's cgroup. Without one, the VMM stays in the cgroup of its parent.
    pub(crate) cgroup: Option<PathBuf>,
    /// `oom_score_adj` of the VMM, -1000 to 1000. Without one, it has that of its parent.
    pub(crate) oom_score_adj: Option<i32>,
}

/// A place that is open, for a process that is about to go there.
#[derive(Debug)]
pub(super) struct OpenPlace {
    procs: Option<File>,
    /// `oom_score_adj` as text.
    oom_score_adj: Option<String>,
}

impl Placement {
    /// Opens the place.
    pub(super) fn open(&self) -> Result<OpenPlace> {
        let procs = self.cgroup.as_ref().map(|cgroup| {
            let path = cgroup.join("cgroup.procs");
            let opened = OpenOptions::new().write(true).open(&path);
            opened.explain(|| format!("cannot open {}", path.display()))
        });
        let oom_score_adj = self.oom_score_adj.map(|value| value.to_string());
        Ok(OpenPlace { procs: procs.transpose()?, oom_score_adj })
    }
}

impl OpenPlace {
    /// Moves the calling process there. For use between `fork` and `execve`: makes system calls and
    /// no more.
    pub(super) fn enter(&self) -> io::Result<()> {
        if let Some(procs) = &self.procs {
            rustix::io::write(procs, b"0")?;
        }
        if let Some(text) = &self.oom_score_adj {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let file = rustix::fs::open(c"/proc/self/oom_score_adj", flags, Mode::empty())?;
            rustix::io::write(&file, text.as_bytes())?;
        }
        Ok(())
    }
}
