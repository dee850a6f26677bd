//! Prometheus's text format (version 0.0.4), which collectors read.

use std::fmt::Write as _;

/// A label's name and value.
pub(crate) type Label<'a> = (&'static str, &'a str);

/// The kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// A metric: all lines of one name, which have to follow each other.
#[derive(Debug)]
pub(crate) struct Metric {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    lines: String,
}

impl Metric {
    /// A metric without a value. Unit and kind are part of the name by Prometheus's rules.
    pub(crate) fn new(name: &'static str, kind: Kind, help: &'static str) -> Self {
        Self { name, help, kind, lines: String::new() }
    }

    /// Adds a value.
    pub(crate) fn add(&mut self, labels: &[Label<'_>], value: impl std::fmt::Display) {
        self.line("", labels, value);
    }

    /// Adds a histogram. `counts` has the number of each bucket alone, one more than there are
    /// upper bounds. Bounds and sum are in microseconds.
    pub(crate) fn add_times(
        &mut self,
        labels: &[Label<'_>],
        bounds_us: &[u64],
        counts: &[u64],
        sum_us: u64,
    ) {
        let bounds = bounds_us.iter().map(|bound| seconds(*bound)).chain(["+Inf".to_owned()]);
        let mut sum = 0_u64;
        for (bound, count) in bounds.zip(counts) {
            sum = sum.saturating_add(*count);
            self.line("_bucket", &[labels, &[("le", &bound)]].concat(), sum);
        }
        self.line("_sum", labels, seconds(sum_us));
        self.line("_count", labels, sum);
    }

    fn line(&mut self, suffix: &str, labels: &[Label<'_>], value: impl std::fmt::Display) {
        let labels: Vec<String> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let labels = labels.join(",");
        // Writing to a String cannot fail.
        let _ = writeln!(self.lines, "{}{suffix}{{{labels}}} {value}", self.name);
    }

    /// The metric's text; empty without a value.
    pub(crate) fn text(&self) -> String {
        let Self { name, help, kind, lines } = self;
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        if lines.is_empty() {
            return String::new();
        }
        format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{lines}")
    }
}

/// Microseconds as seconds, exactly.
pub(crate) fn seconds(us: u64) -> String {
    let text = format!("{}.{:06}", us / 1_000_000, us % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_prometheuss() {
        let mut gauge = Metric::new("a_bytes", Kind::Gauge, "A.");
        assert_eq!(gauge.text(), "");
        gauge.add(&[("id", "x\"\\\n")], 3);
        gauge.add(&[("id", "y"), ("k", "v")], 0.5);
        let text = "# HELP a_bytes A.\n# TYPE a_bytes gauge\n\
                    a_bytes{id=\"x\\\"\\\\\\n\"} 3\na_bytes{id=\"y\",k=\"v\"} 0.5\n";
        assert_eq!(gauge.text(), text);
    }

    #[test]
    fn buckets_of_a_histogram_include_those_before() {
        let mut times = Metric::new("b_seconds", Kind::Histogram, "B.");
        times.add_times(&[("m", "x")], &[100, 2_000_000], &[2, 3, 1], 12_000_001);
        let lines = [
            "b_seconds_bucket{m=\"x\",le=\"0.0001\"} 2",
            "b_seconds_bucket{m=\"x\",le=\"2\"} 5",
            "b_seconds_bucket{m=\"x\",le=\"+Inf\"} 6",
            "b_seconds_sum{m=\"x\"} 12.000001",
            "b_seconds_count{m=\"x\"} 6",
        ];
        let text = times.text();
        assert_eq!(text.lines().skip(2).collect::<Vec<_>>(), lines);
        assert!(text.contains("# TYPE b_seconds histogram\n"));
        assert_eq!([0, 1, 1_500_000].map(seconds), ["0", "0.000001", "1.5"]);
    }
}
