//! A measured figure, and how figures are shown.

use std::fmt::Write as _;

use serde::Serialize;

/// One line of a benchmark's result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Figure {
    /// What was measured, such as `boot-to-ready`.
    pub(crate) figure: String,
    /// Its unit: `units` (million instructions), `KiB`, `exits`.
    pub(crate) unit: &'static str,
    /// Isopod's.
    pub(crate) value: f64,
    /// Which program stands beside it.
    pub(crate) peer: Option<&'static str>,
    /// The peer's.
    pub(crate) peer_value: Option<f64>,
}

impl Figure {
    /// A figure of Isopod alone.
    pub(crate) fn alone(figure: impl Into<String>, unit: &'static str, value: f64) -> Self {
        Self { figure: figure.into(), unit, value, peer: None, peer_value: None }
    }

    /// A figure beside `peer`'s.
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

/// The figures as a table for a person.
pub(crate) fn table(figures: &[Figure]) -> String {
    let mut table =
        format!("{:<32}{:>8}{:>12}{:>20}{:>8}\n", "figure", "unit", "isopod", "peer", "ratio");
    for f in figures {
        let peer = match (f.peer, f.peer_value) {
            (Some(name), Some(value)) => format!("{name} {value:.1}"),
            _ => "-".to_owned(),
        };
        let ratio = match f.peer_value {
            Some(value) if value > 0.0 => format!("{:.2}", f.value / value),
            _ => "-".to_owned(),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            table,
            "{:<32}{:>8}{:>12.1}{:>20}{:>8}",
            f.figure, f.unit, f.value, peer, ratio
        );
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
        let table = table(&figures);
        assert!(table.lines().nth(1).unwrap().ends_with("0.40"));
        assert!(table.lines().nth(2).unwrap().ends_with('-'));
        let json = serde_json::to_value(&figures[1]).unwrap();
        for field in ["figure", "unit", "value", "peer", "peer_value"] {
            assert!(json.get(field).is_some(), "{field}");
        }
    }
}
