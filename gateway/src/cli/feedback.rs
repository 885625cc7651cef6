//! `glassgate feedback`: which version answers better, from the ledger.

use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::{Outcome, Place, text};
use crate::accounting::core::NanoUsd;
use crate::accounting::ledger::feedback::{Answers, Judged, answers, judged};
use crate::accounting::ledger::sqlite::{self, GroupBy};
use crate::ports::{Clock, SystemClock};

#[derive(Args)]
pub struct Options {
    /// What to compare
    #[arg(long, value_enum, default_value = "variant")]
    by: GroupBy,
    /// Only judgements with this name, such as `correct`
    #[arg(long)]
    name: Option<String>,
    /// Only answers of the last so many hours
    #[arg(long, value_name = "HOURS")]
    hours: Option<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is known of the answers of one group under one name.
#[derive(Debug, Serialize)]
struct Line {
    group: String,
    answers: u64,
    cost_usd_per_answer: String,
    name: Option<String>,
    /// Judgements with this name; those with labels are in every line of a label.
    judged: u64,
    /// `true`, `mean`, or a label, whose share this is.
    what: Option<String>,
    estimate: Option<Estimate>,
}

/// A share or a mean, with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Estimate {
    value: f64,
    low: f64,
    high: f64,
}

/// The two-sided 95 % quantile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// A share with Wilson's score interval (E. B. Wilson 1927, JASA 22, 209–212): unlike the textbook's, it stays between 0
/// and 1 and holds for few judgements, too. Somebody must have judged.
fn share(yes: f64, count: f64) -> Estimate {
    let value = yes / count;
    let scale = 1.0 + Z * Z / count;
    let centre = (value + Z * Z / (2.0 * count)) / scale;
    let half = Z / scale * (value * (1.0 - value) / count + Z * Z / (4.0 * count * count)).sqrt();
    Estimate { value, low: (centre - half).max(0.0), high: (centre + half).min(1.0) }
}

/// A mean ± z·s/√n, with the sample's own variance; one judgement alone says nothing of how far off it is.
fn mean(sum: f64, sum_of_squares: f64, count: f64) -> Estimate {
    let value = sum / count;
    let variance = (sum_of_squares - count * value * value).max(0.0) / (count - 1.0);
    let half = if count > 1.0 { Z * (variance / count).sqrt() } else { f64::INFINITY };
    Estimate { value, low: value - half, high: value + half }
}

pub fn run(place: &Place, options: &Options) -> Outcome {
    let path = place.data_dir()?.ledger();
    if !path.exists() {
        return Err(format!(
            "there is no ledger at {}; it begins with the first start of `glassgate serve`",
            path.display()
        ));
    }
    let db = sqlite::open_readonly(&path).map_err(text)?;
    let since = options.hours.map_or(0, |hours| {
        SystemClock.now_ns().saturating_sub(Duration::from_secs(u64::from(hours) * 3600).as_nanos() as i64)
    });
    let groups = answers(&db, options.by, since).map_err(text)?;
    let mut judged = judged(&db, options.by, since).map_err(text)?;
    judged.retain(|judged| options.name.as_ref().is_none_or(|name| *name == judged.name));
    let lines: Vec<Line> = groups.iter().flat_map(|group| lines(group, &judged)).collect();
    if options.json {
        println!("{}", serde_json::to_string_pretty(&lines).map_err(text)?);
    } else {
        show(options.by, &lines);
    }
    Ok(())
}

/// One line for what has been judged under each name, or one that says that nothing was.
fn lines(group: &Answers, judged: &[Judged]) -> Vec<Line> {
    let cost = group.billed_nano_usd / group.count.max(1);
    let line = |name: Option<&Judged>| Line {
        group: group.group.clone(),
        answers: group.count,
        cost_usd_per_answer: NanoUsd(cost).to_string(),
        name: name.map(|judged| judged.name.clone()),
        judged: 0,
        what: None,
        estimate: None,
    };
    let of_group: Vec<&Judged> = judged.iter().filter(|judged| judged.group == group.group).collect();
    if of_group.is_empty() {
        return vec![line(None)];
    }
    let estimated = of_group.iter().map(|one| {
        let of_kind = of_group.iter().filter(|other| other.name == one.name && other.kind == one.kind);
        let all: u64 = of_kind.map(|other| other.count).sum();
        let (count, total) = (one.count as f64, all as f64);
        let (what, estimate) = match (one.kind.as_str(), &one.label) {
            (_, Some(label)) => (label.clone(), share(count, total)),
            ("boolean", None) => ("true".to_owned(), share(one.sum, total)),
            (_, None) => ("mean".to_owned(), mean(one.sum, one.sum_of_squares, total)),
        };
        Line { judged: all, what: Some(what), estimate: Some(estimate), ..line(Some(one)) }
    });
    estimated.collect()
}

fn show(by: GroupBy, lines: &[Line]) {
    let by = format!("{by:?}").to_lowercase();
    println!("{by:20} {:>9} {:>16}   {:16} {:>8}   95 % interval", "answers", "USD per answer", "feedback", "judged");
    for line in lines {
        let Line { group, answers, cost_usd_per_answer, name, judged, what, estimate } = line;
        let name = name.as_deref().unwrap_or("-");
        let said = match (what, estimate) {
            (Some(what), Some(estimate)) if what == "mean" => {
                format!("mean {:.3} ({:.3} to {:.3})", estimate.value, estimate.low, estimate.high)
            }
            (Some(what), Some(Estimate { value, low, high })) => {
                format!("{what} {:.1} % ({:.1} to {:.1} %)", value * 100.0, low * 100.0, high * 100.0)
            }
            _ => "nobody has judged yet".to_owned(),
        };
        println!("{group:20} {answers:>9} {cost_usd_per_answer:>16}   {name:16} {judged:>8}   {said}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(estimate: Estimate, expected: [f64; 3]) {
        let found = [estimate.value, estimate.low, estimate.high];
        let far = found.iter().zip(expected).any(|(found, expected)| (found - expected).abs() > 5e-5);
        assert!(!far, "{found:?}, expected {expected:?}");
    }

    /// R: `binom::binom.confint(8, 10, methods = "wilson")`, and by hand for none and all: z²/(n+z²).
    #[test]
    fn a_share_has_wilsons_interval() {
        is(share(8.0, 10.0), [0.8, 0.4902, 0.9433]);
        is(share(0.0, 10.0), [0.0, 0.0, 0.2775]);
        is(share(10.0, 10.0), [1.0, 0.7225, 1.0]);
    }

    #[test]
    fn a_mean_has_the_normal_interval_and_one_judgement_has_none() {
        // 1, 2, 3, 4: s² = 5/3, so z·s/√4 = 1.2651.
        is(mean(10.0, 30.0, 4.0), [2.5, 1.23485, 3.76515]);
        assert_eq!(mean(4.0, 16.0, 1.0).high, f64::INFINITY);
    }

    #[test]
    fn labels_share_what_was_said_under_one_name() {
        let judged = |label: &str, count| Judged {
            group: "glimmer-1".into(),
            name: "tone".into(),
            kind: "label".into(),
            label: Some(label.into()),
            count,
            sum: 0.0,
            sum_of_squares: 0.0,
        };
        let group = Answers { group: "glimmer-1".into(), count: 40, billed_nano_usd: 400 };
        let lines = lines(&group, &[judged("rude", 2), judged("warm", 8)]);
        assert_eq!(lines.iter().map(|line| line.judged).collect::<Vec<_>>(), [10, 10]);
        is(lines[1].estimate.unwrap(), [0.8, 0.4902, 0.9433]);
        assert_eq!(lines[0].cost_usd_per_answer, "0.000000010");
    }
}
