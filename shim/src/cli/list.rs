//! `list`: lists the containers below the root directory.

use std::path::Path;

use clap::{Args, ValueEnum};

use crate::{
    cli::{Global, print},
    engine::Record,
    error::{Error, Explain, Result},
    state::{DEFAULT_ROOT, StateDir, ids},
};

#[derive(Debug, Args)]
pub(super) struct List {
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
        let mut records = Vec::new();
        // The first container makes the default root. Another root that is missing is a mistake.
        if global.root != Path::new(DEFAULT_ROOT) && !global.root.exists() {
            return Err(Error::new(format!(
                "cannot list containers: there is no directory {}, which --root names",
                global.root.display()
            )));
        }
        for id in ids(&global.root)? {
            // A container that is being made has no record yet. A container that is being deleted
            // may have lost its record.
            match StateDir::open(&global.root, &id).and_then(|dir| Record::read(&dir)) {
                Ok(Some(record)) => records.push(record),
                Ok(None) => {}
                Err(error) => log::warn!("{error}"),
            }
        }
        let text = match (self.quiet, self.format) {
            (true, _) => records.iter().map(|record| format!("{}\n", record.id)).collect(),
            (false, Format::Json) => {
                let states: Vec<_> = records.iter().map(Record::to_oci).collect();
                format!("{}\n", serde_json::to_string(&states).explain(|| "the list".into())?)
            }
            (false, Format::Table) => table(&records),
        };
        print(&text)?;
        Ok(0)
    }
}

fn table(records: &[Record]) -> String {
    let heading = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let mut rows = vec![heading];
    rows.extend(records.iter().map(|record| {
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
