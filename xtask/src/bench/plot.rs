//! The results as a picture: for each measure how much of the peer's time (or memory) ours is.

use std::fmt::Write as _;

use super::Results;
use super::case::Tool;
use super::report::{median, ratio};

/// One bar.
#[derive(Debug, PartialEq)]
pub struct Row {
    /// The case, at its first row only.
    group: Option<&'static str>,
    /// What is measured.
    label: &'static str,
    /// Ours by theirs; none without a peer.
    ratio: Option<f64>,
    /// The figures.
    figures: String,
}

/// What is drawn.
pub fn rows(results: &Results) -> Vec<Row> {
    let mut rows = Vec::new();
    for outcome in &results.outcomes {
        for (i, (measure, samples)) in outcome.samples.iter().enumerate() {
            let of = |tool| samples.get(&tool).and_then(|s| median(s));
            let Some(own) = of(Tool::Own) else { continue };
            let figures = match of(Tool::Peer) {
                Some(peer) => format!("{own:.1} : {peer:.1} {}", measure.unit()),
                None => format!("{own:.1} {}", measure.unit()),
            };
            rows.push(Row {
                group: (i == 0).then_some(outcome.case.title),
                label: measure.name(),
                ratio: ratio(samples, Tool::Peer),
                figures,
            });
        }
    }
    rows
}

const ROW: usize = 20;
const LEFT: usize = 330;
const FULL: f64 = 300.0;
const WIDTH: usize = 820;

/// The picture. A bar that is longer than the scale is cut at its end.
pub fn svg(rows: &[Row]) -> String {
    let height = 60 + rows.len() * ROW;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"14\">dormouse by CRIU (grey: CRIU, the shorter the better)</text>\n"
    );
    for (i, row) in rows.iter().enumerate() {
        let y = 45 + i * ROW;
        let text = y + 12;
        if let Some(group) = row.group {
            let _ = writeln!(svg, "<line x1=\"10\" y1=\"{y}\" x2=\"{}\" y2=\"{y}\" stroke=\"#cccccc\"/>", WIDTH - 10);
            let _ = writeln!(svg, "<text x=\"10\" y=\"{text}\">{}</text>", escaped(group));
        }
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{}</text>", LEFT - 8, row.label);
        let bar = |width: f64, colour: &str| {
            format!(
                "<rect x=\"{LEFT}\" y=\"{}\" width=\"{width:.1}\" height=\"{}\" fill=\"{colour}\"/>\n",
                y + 3,
                ROW - 6
            )
        };
        let mut figures = row.figures.clone();
        if let Some(ratio) = row.ratio {
            svg.push_str(&bar(FULL, "#dddddd"));
            svg.push_str(&bar((ratio * FULL).min(FULL * 1.3), if ratio > 1.0 { "#b5563c" } else { "#4a7a4a" }));
            let _ = write!(figures, " ({ratio:.2})");
        }
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{text}\">{figures}</text>", LEFT + (FULL * 1.3) as usize - 80);
    }
    svg + "</svg>\n"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_ratio() {
        let row = Row { group: Some("a < b"), label: "dump", ratio: Some(0.5), figures: "1.0 : 2.0 ms".into() };
        let svg = svg(&[row]);
        assert!(svg.contains("width=\"150.0\""), "{svg}");
        assert!(svg.contains("a &lt; b") && svg.contains("1.0 : 2.0 ms (0.50)"), "{svg}");
    }
}
