//! `timeline`: draws the start of a container.

use std::{env, path::PathBuf};

use clap::Args;

use crate::{
    chart::{self, Marks},
    cli::{Global, all_roots, print},
    error::{Error, Explain, Result},
    state::write_whole,
    terminal,
    text::printable,
    timeline::milliseconds,
};

/// Width of a chart that no terminal bounds.
const COLUMNS: usize = 100;

#[derive(Debug, Args)]
pub(super) struct Timeline {
    /// Write the chart as SVG to this file, or to standard output for -.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Id of the container.
    id: String,
}

impl Timeline {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let found = all_roots::find(global, &self.id)?;
        let record = &found.record;
        let spans = record.timeline.spans();
        let (Some(first), Some(last)) = (spans.first(), spans.last()) else {
            return Err(Error::new(format!("container {} has no timeline yet", record.id)));
        };
        let until = match (record.timeline.started, record.timeline.created) {
            (Some(_), _) => "to the start of its process",
            (None, Some(_)) => "to its creation",
            (None, None) => "so far",
        };
        let whole = milliseconds(last.end_us, first.begin_us);
        let mut title = format!("container {}: {whole} ms {until}", record.id);
        if let Some(pod) = &record.pod {
            title.push_str(&format!(", in the microVM of {}", pod.sandbox));
        }
        match &self.svg {
            Some(file) if file.as_os_str() == "-" => print(&chart::svg(&title, &spans))?,
            Some(file) => write_whole(file, chart::svg(&title, &spans).as_bytes())
                .explain(|| format!("cannot write {}", file.display()))?,
            None => {
                let size = terminal::size(rustix::stdio::stdout());
                let columns = size.map_or(COLUMNS, |size| size.columns.into());
                let mut text = format!("{title}\n{}", chart::text(&spans, columns, marks()));
                if let Some(guest) = record.timeline.guest_line() {
                    text.push_str(&format!("{}\n", printable(&guest)));
                }
                print(&text)?;
            }
        }
        Ok(0)
    }
}

/// The marks that the locale has. The first variable that is set counts (locale(7)).
fn marks() -> Marks {
    let values = ["LC_ALL", "LC_CTYPE", "LANG"].map(|name| env::var(name).unwrap_or_default());
    let locale = values.into_iter().find(|value| !value.is_empty()).unwrap_or_default();
    let locale = locale.to_ascii_lowercase();
    if locale.contains("utf-8") || locale.contains("utf8") { Marks::Blocks } else { Marks::Ascii }
}
