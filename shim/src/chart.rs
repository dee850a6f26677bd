//! Charts of a timeline: bars on a terminal, and the same bars as SVG.

use std::fmt::Write as _;

use crate::timeline::{Span, milliseconds};

/// Columns beside the bars on a terminal: part, step, begin and duration.
const BESIDE: usize = 10 + 18 + 10 + 10;

/// Fewest columns of the bars.
const LEAST_BARS: usize = 10;

/// The marks that a bar is drawn with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Marks {
    /// For a terminal that shows ASCII only.
    Ascii,
    /// Blocks of Unicode.
    Blocks,
}

/// Draws the steps as lines of text, `columns` wide.
pub(crate) fn text(spans: &[Span], columns: usize, marks: Marks) -> String {
    let bars = columns.saturating_sub(BESIDE).max(LEAST_BARS);
    let mark = match marks {
        Marks::Ascii => '#',
        Marks::Blocks => '\u{2588}',
    };
    let (first, total) = extent(spans);
    // Writing to a String cannot fail.
    let mut text = String::new();
    let _ =
        writeln!(text, "{:<10}{:<18}{:bars$}{:>10}{:>10}", "part", "step", "", "at ms", "took ms");
    for span in spans {
        let begin = cell(span.begin_us - first, total, bars).min(bars - 1);
        let end = cell(span.end_us - first, total, bars).max(begin + 1);
        let bar: String =
            (0..bars).map(|at| if (begin..end).contains(&at) { mark } else { ' ' }).collect();
        let at = milliseconds(span.begin_us, first);
        let took = milliseconds(span.end_us, span.begin_us);
        let _ = writeln!(text, "{:<10}{:<18}{bar}{at:>10}{took:>10}", span.part, span.step);
    }
    text
}

/// Begin of the first step, and the time from there to the end of the last one, at least 1.
fn extent(spans: &[Span]) -> (u64, u64) {
    let first = spans.first().map_or(0, |span| span.begin_us);
    let last = spans.last().map_or(0, |span| span.end_us);
    (first, last.saturating_sub(first).max(1))
}

/// The column at `us` of `total` microseconds.
fn cell(us: u64, total: u64, columns: usize) -> usize {
    let at = u128::from(us) * columns as u128 / u128::from(total);
    usize::try_from(at).unwrap_or(columns)
}

/// Measures of the SVG in its own units.
const WIDTH: u32 = 960;
const LEFT: u32 = 230;
const BARS: u32 = 580;
const TOP: u32 = 70;
const ROW: u32 = 26;

/// Most lines of the scale.
const MAX_TICKS: u64 = 10;

/// Draws the steps as an SVG document with this title. Screen readers get the title, and a sentence
/// for each step.
pub(crate) fn svg(title: &str, spans: &[Span]) -> String {
    let (first, total) = extent(spans);
    let x = |us: u64| f64::from(LEFT) + f64::from(BARS) * (us as f64) / (total as f64);
    let rows = u32::try_from(spans.len()).unwrap_or(u32::MAX);
    let bottom = TOP.saturating_add(ROW.saturating_mul(rows));
    let height = bottom.saturating_add(20);
    let title = escaped(title);
    // Writing to a String cannot fail.
    let mut svg = String::new();
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" aria-labelledby=\"title steps\" \
         viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"14\">"
    );
    let _ = writeln!(svg, "<title id=\"title\">{title}</title>");
    let sentence = |span: &Span| {
        let at = milliseconds(span.begin_us, first);
        let took = milliseconds(span.end_us, span.begin_us);
        format!("{}, {}: begins at {at} ms and takes {took} ms.", span.part, span.step)
    };
    let sentences: Vec<String> = spans.iter().map(sentence).collect();
    let _ = writeln!(svg, "<desc id=\"steps\">{}</desc>", escaped(&sentences.join(" ")));
    let _ = writeln!(svg, "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>");
    let _ = writeln!(svg, "<text x=\"10\" y=\"24\" font-size=\"16\">{title}</text>");
    let step = tick(total);
    for at in (0..=MAX_TICKS).map(|number| number * step).take_while(|at| *at <= total) {
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {} V{bottom}\" stroke=\"#bbbbbb\"/><text x=\"{x:.1}\" y=\"{}\" \
             text-anchor=\"middle\">{} ms</text>",
            TOP - 10,
            TOP - 16,
            decimal(at),
            x = x(at),
        );
    }
    for (span, y) in spans.iter().zip((TOP..).step_by(ROW as usize)) {
        let (begin, end) = (x(span.begin_us - first), x(span.end_us - first));
        let _ = writeln!(
            svg,
            "<text x=\"10\" y=\"{text}\">{}</text><text x=\"90\" y=\"{text}\">{}</text>\
             <rect x=\"{begin:.1}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"{}\"><title>{}\
             </title></rect><text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{} ms</text>",
            escaped(span.part),
            escaped(span.step),
            y + 3,
            (end - begin).max(1.0),
            ROW - 6,
            colour(span.part),
            escaped(&sentence(span)),
            WIDTH - 10,
            milliseconds(span.end_us, span.begin_us),
            text = y + 18,
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// Time between two lines of the scale in microseconds: 1, 2 or 5 times a power of ten.
fn tick(total: u64) -> u64 {
    let mut power = 1_u64;
    loop {
        for step in [power, power.saturating_mul(2), power.saturating_mul(5)] {
            if total / step <= MAX_TICKS {
                return step;
            }
        }
        power = power.saturating_mul(10);
    }
}

/// Microseconds as milliseconds, with as many decimal places as there are.
fn decimal(us: u64) -> String {
    let text = format!("{}.{:03}", us / 1000, us % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A colour for each part. The lightness differs too, so the parts differ without colours.
fn colour(part: &str) -> &'static str {
    match part {
        "host" => "#1b4965",
        "VMM" => "#7a5195",
        "kernel" => "#c1562b",
        "agent" => "#d99a2b",
        _ => "#3d8b5f",
    }
}

/// Text for an element or an attribute of XML.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // XML 1.0 has no such characters.
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans() -> [Span; 3] {
        let span = |part, step, begin_us, end_us| Span { part, step, begin_us, end_us };
        [
            span("host", "command", 1_000, 3_000),
            span("kernel", "boot", 3_000, 9_000),
            span("agent", "start", 9_000, 9_000),
        ]
    }

    #[test]
    fn bars_are_as_long_as_the_steps() {
        let chart = text(&spans(), BESIDE + 16, Marks::Ascii);
        let bars: Vec<&str> = chart.lines().skip(1).map(|line| &line[28..44]).collect();
        // A step that takes no time has a mark, too.
        assert_eq!(bars, ["####            ", "    ############", "               #"]);
        let figures: Vec<&str> =
            chart.lines().skip(1).filter_map(|line| line.split_whitespace().last()).collect();
        assert_eq!(figures, ["2.0", "6.0", "0.0"]);
        assert!(chart.lines().all(|line| line.len() == BESIDE + 16), "{chart}");
        assert!(text(&spans(), 5, Marks::Blocks).contains('\u{2588}'));
        assert_eq!(text(&[], 80, Marks::Ascii).lines().count(), 1);
    }

    #[test]
    fn the_drawing_is_xml_with_a_text_for_each_step() {
        let drawing = svg("container a<b> & \"c\"\u{1}", &spans());
        assert!(drawing.contains("<title id=\"title\">container a&lt;b&gt; &amp; &quot;c&quot; <"));
        assert!(drawing.contains("kernel, boot: begins at 2.0 ms and takes 6.0 ms."));
        assert_eq!(drawing.matches("<rect x=").count(), 3);
        assert_eq!(drawing.matches(" ms</text>").count(), 3 + 9, "{drawing}");
        assert!(!drawing.contains('\u{1}'));
        assert!(svg("none", &[]).ends_with("</svg>\n"));
    }

    #[test]
    fn scales_have_round_numbers() {
        assert_eq!([1, 10, 11, 8_000, 123_456].map(tick), [1, 1, 2, 1_000, 20_000]);
        assert_eq!([0, 500, 20_000, 1_234].map(decimal), ["0", "0.5", "20", "1.234"]);
        assert!(u64::MAX / tick(u64::MAX) <= MAX_TICKS);
    }
}
