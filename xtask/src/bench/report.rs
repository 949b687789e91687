//! The results as text and as JSON.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::case::Tool;
use super::limits::Limits;
use super::{Outcome, Results, Samples};
use crate::cmd;

/// The middle one; of an even number the mean of the two.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// Ours by another tool's: the median of the ratios of each round, which saw the same machine.
pub fn ratio(samples: &Samples, other: Tool) -> Option<f64> {
    let (own, theirs) = (samples.get(&Tool::Own)?, samples.get(&other)?);
    let ratios: Vec<f64> = own.iter().zip(theirs).filter(|(_, t)| **t > 0.0).map(|(o, t)| o / t).collect();
    median(&ratios)
}

/// One case as lines of text.
pub fn case(outcome: &Outcome, tools: &[(Tool, PathBuf)]) -> String {
    let mut text = format!("{}\n", outcome.case.title);
    for (measure, samples) in &outcome.samples {
        let _ = write!(text, "  {:<15}", measure.name());
        for (tool, _) in tools {
            if let Some(m) = samples.get(tool).and_then(|s| median(s)) {
                let _ = write!(text, "  {} {m:>9.1} {}", tool.name(), measure.unit());
            }
        }
        for (tool, _) in tools.iter().filter(|(t, _)| *t != Tool::Own) {
            if let Some(r) = ratio(samples, *tool) {
                let _ = write!(text, "  {r:.2} x {}", tool.name());
            }
        }
        text.push('\n');
    }
    text
}

/// Everything as text.
pub fn text(results: &Results) -> String {
    let mut text = String::from("What dumps and restores cost, by `cargo xtask bench`\n\n");
    let _ = writeln!(text, "{}, {} processors, Linux {}", machine("cpu"), machine("processors"), machine("kernel"));
    let _ = writeln!(text, "medians of {} rounds, the tools in turn; ratios: medians of paired rounds", results.rounds);
    for (tool, bin) in &results.tools {
        let _ = writeln!(text, "{}: {}", tool.name(), version(bin));
    }
    text.push_str("\nThe machine's limits for 1 GB\n");
    for (name, ms) in &results.limits.0 {
        let _ = writeln!(text, "  {ms:>9.1} ms  {}", Limits::title(name));
    }
    text.push('\n');
    results.outcomes.iter().for_each(|o| text.push_str(&case(o, &results.tools)));
    text
}

/// Everything as JSON, all samples too.
///
/// # Errors
/// None that is known: serde_json's.
pub fn json(results: &Results) -> Result<String> {
    let mut cases = Map::new();
    for outcome in &results.outcomes {
        let mut measures = Map::new();
        for (measure, samples) in &outcome.samples {
            let mut one = Map::new();
            one.insert("unit".into(), json!(measure.unit()));
            for (tool, values) in samples {
                one.insert(tool.name().into(), json!({ "median": median(values), "samples": values }));
                if *tool != Tool::Own {
                    one.insert(format!("by_{}", tool.name()), json!(ratio(samples, *tool)));
                }
            }
            measures.insert(measure.name().into(), Value::Object(one));
        }
        cases.insert(outcome.case.name.into(), json!({ "title": outcome.case.title, "measures": measures }));
    }
    let limits: Map<String, Value> = results.limits.0.iter().map(|(n, ms)| (n.clone(), json!(ms))).collect();
    let tools: Map<String, Value> =
        results.tools.iter().map(|(t, bin)| (t.name().to_owned(), json!(version(bin)))).collect();
    let all = json!({
        "cpu": machine("cpu"),
        "processors": machine("processors"),
        "kernel": machine("kernel"),
        "rounds": results.rounds,
        "tools": tools,
        "limits_ms_per_gb": limits,
        "cases": cases,
    });
    Ok(serde_json::to_string_pretty(&all)? + "\n")
}

fn version(bin: &PathBuf) -> String {
    let text = cmd::read(std::process::Command::new(bin).arg("--version")).unwrap_or_default();
    text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(", ")
}

/// A property of the machine, as /proc tells it.
fn machine(what: &str) -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    match what {
        "kernel" => read("/proc/sys/kernel/osrelease").trim().to_owned(),
        "processors" => std::thread::available_parallelism().map_or(0, usize::from).to_string(),
        _ => {
            let info = read("/proc/cpuinfo");
            let model = info.lines().find_map(|l| l.strip_prefix("model name")).and_then(|l| l.split_once(':'));
            model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let samples = Samples::from([(Tool::Own, vec![1.0, 20.0, 3.0]), (Tool::Peer, vec![2.0, 40.0, 3.0])]);
        assert_eq!(ratio(&samples, Tool::Peer), Some(0.5));
        assert_eq!(ratio(&samples, Tool::Base), None);
    }
}
