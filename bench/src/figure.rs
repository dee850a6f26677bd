//! Measured figures, and their table.

use std::fmt::Write as _;

use serde::Serialize;

/// A measured figure: one line of the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Figure {
    /// Name of the figure, such as `boot-to-ready`.
    pub(crate) figure: String,
    /// Unit: `units` (millions of instructions), `KiB`, `exits`.
    pub(crate) unit: &'static str,
    /// Isopod's value.
    pub(crate) value: f64,
    /// Name of the peer.
    pub(crate) peer: Option<&'static str>,
    /// The peer's value.
    pub(crate) peer_value: Option<f64>,
}

impl Figure {
    /// A figure without a peer.
    pub(crate) fn alone(figure: impl Into<String>, unit: &'static str, value: f64) -> Self {
        Self { figure: figure.into(), unit, value, peer: None, peer_value: None }
    }

    /// A figure with a peer.
    pub(crate) fn beside(
        figure: &str,
        unit: &'static str,
        value: f64,
        peer: &'static str,
        peer_value: f64,
    ) -> Self {
        Self { peer: Some(peer), peer_value: Some(peer_value), ..Self::alone(figure, unit, value) }
    }
}

/// The figures as a text table.
pub(crate) fn table(figures: &[Figure]) -> String {
    let heading = ["figure", "unit", "isopod", "peer", "ratio"].map(str::to_owned);
    let mut rows = vec![heading];
    for f in figures {
        let peer = match (f.peer, f.peer_value) {
            (Some(name), Some(value)) => format!("{name} {value:.1}"),
            _ => "-".to_owned(),
        };
        let ratio = match f.peer_value {
            Some(value) if value > 0.0 => format!("{:.2}", f.value / value),
            _ => "-".to_owned(),
        };
        rows.push([f.figure.clone(), f.unit.to_owned(), format!("{:.1}", f.value), peer, ratio]);
    }
    columns(&rows)
}

/// Rows as text, with columns of equal width. The first column is left-aligned, others
/// right-aligned.
fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..N).map(|column| width(column).unwrap_or(0)).collect();
    let mut table = String::new();
    for row in rows {
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            // Writing to a String cannot fail.
            let _ = match column {
                0 => write!(table, "{cell:<width$}"),
                _ => write!(table, "  {cell:>width$}"),
            };
        }
        table.push('\n');
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_gives_a_ratio_and_json_has_every_field() {
        let figures = [
            Figure::beside("boot-to-ready", "units", 50.0, "qemu-microvm", 125.0),
            Figure::alone("vmm-rss", "KiB", 1700.0),
        ];
        let long = "tcp-from-host-with-a-name-that-is-longer-than-others";
        let wide = Figure::beside(long, "bytes/unit", 1e12, "qemu-with-virtiofsd", 1e12);
        let table = table(&[figures.as_slice(), &[wide]].concat());
        assert!(table.lines().nth(1).unwrap().ends_with("0.40"));
        assert!(table.lines().nth(2).unwrap().ends_with('-'));
        let cells: Vec<&str> = table.lines().nth(3).unwrap().split("  ").map(str::trim).collect();
        let cells: Vec<&str> = cells.into_iter().filter(|cell| !cell.is_empty()).collect();
        let peer = "qemu-with-virtiofsd 1000000000000.0";
        assert_eq!(cells, [long, "bytes/unit", "1000000000000.0", peer, "1.00"]);
        let json = serde_json::to_value(&figures[1]).unwrap();
        for field in ["figure", "unit", "value", "peer", "peer_value"] {
            assert!(json.get(field).is_some(), "{field}");
        }
    }
}
