//! `list`: lists the containers below the root directory, or those of all front ends.

use std::path::Path;

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::{
    cli::{
        Global,
        all_roots::{Found, below, everywhere},
        print,
    },
    container_id::ContainerId,
    engine::{OciState, Record},
    error::{Error, Explain, Result},
    state::DEFAULT_ROOT,
    text::printable,
};

#[derive(Debug, Args)]
pub(super) struct List {
    /// List the containers of all front ends: the command line, containerd, Docker, Podman, CRI-O.
    #[arg(short, long)]
    all: bool,
    /// Format of the list.
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    format: Format,
    /// Print ids only.
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Table,
    Json,
}

impl List {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        // The first container makes the default root. Another root that is missing is a mistake.
        if global.root != Path::new(DEFAULT_ROOT) && !global.root.exists() {
            return Err(Error::new(format!(
                "cannot list containers: there is no directory {}, which --root names",
                global.root.display()
            )));
        }
        let found = if self.all { everywhere(&global.root) } else { below(&global.root) }?;
        let records = || found.iter().map(|found| &found.record);
        let text = match (self.quiet, self.format) {
            (true, _) => records().map(|record| format!("{}\n", record.id)).collect(),
            (false, Format::Json) if self.all => json(found.iter().map(Entry::of))?,
            (false, Format::Json) => json(records().map(Record::to_oci))?,
            (false, Format::Table) if self.all => table_of_all(&found),
            (false, Format::Table) => table(records()),
        };
        print(&text)?;
        Ok(0)
    }
}

/// A container of a list of all front ends.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry<'a> {
    #[serde(flatten)]
    state: OciState<'a>,
    /// The front end that has made the container.
    front_end: &'a str,
    /// Namespace of the front end, if it has any.
    namespace: Option<&'a str>,
    /// The container that the microVM was made for.
    sandbox: &'a ContainerId,
    /// The state root, for `--root` of other verbs.
    root: &'a Path,
}

impl<'a> Entry<'a> {
    fn of(found: &'a Found) -> Self {
        let (front_end, namespace) = found.front_end();
        let (state, sandbox) = (found.record.to_oci(), found.sandbox());
        Self { state, front_end, namespace, sandbox, root: &found.root }
    }
}

fn json(states: impl Iterator<Item = impl Serialize>) -> Result<String> {
    let states: Vec<_> = states.collect();
    let json = serde_json::to_string(&states).explain(|| "cannot write the list".into())?;
    Ok(format!("{json}\n"))
}

/// The containers of all front ends. Those of a microVM follow each other, the first one first.
fn table_of_all(found: &[Found]) -> String {
    let heading =
        ["FRONTEND", "NAMESPACE", "SANDBOX", "ID", "PID", "STATUS", "BUNDLE", "CREATED", "ROOT"];
    let mut rows = vec![heading.map(str::to_owned)];
    let mut found: Vec<&Found> = found.iter().collect();
    found.sort_by_key(|found| {
        let is_member = found.record.pod.is_some();
        (found.root.clone(), found.sandbox().clone(), is_member, found.record.id.clone())
    });
    rows.extend(found.iter().map(|found| {
        let (front_end, namespace) = found.front_end();
        let record = &found.record;
        [
            front_end.to_owned(),
            namespace.unwrap_or("-").to_owned(),
            found.sandbox().to_string(),
            record.id.to_string(),
            record.current_pid().to_string(),
            status(record),
            printable(&record.bundle.display().to_string()),
            record.created.clone(),
            printable(&found.root.display().to_string()),
        ]
    }));
    columns(&rows)
}

fn table<'r>(records: impl Iterator<Item = &'r Record>) -> String {
    let heading = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let mut rows = vec![heading];
    rows.extend(records.map(|record| {
        [
            record.id.to_string(),
            record.current_pid().to_string(),
            status(record),
            record.bundle.display().to_string(),
            record.created.clone(),
            record.owner(),
        ]
    }));
    columns(&rows)
}

/// The status in one word, because scripts split the columns. `state` has the reason for a loss.
fn status(record: &Record) -> String {
    let status = record.current_status();
    if record.is_lost() { format!("{status}(lost)") } else { status.to_string() }
}

/// Formats rows of cells, padded so that the columns line up.
pub(super) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..N).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
