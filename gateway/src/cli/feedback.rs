//! `glassgate feedback`: which version answers better, from the ledger.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use clap::Args;
use serde::Serialize;

use super::{Outcome, Place, ledger, since, text};
use crate::accounting::core::NanoUsd;
use crate::accounting::ledger::store::GroupBy;
use crate::accounting::ledger::store::feedback::{Answers, Judged, Moments};

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

/// Labels of one name that have a line of their own; the rest share `other`, which no label is called.
const LABELS_MAX: usize = 16;

/// What is known of the answers of one group under one name.
#[derive(Clone, Debug, Serialize)]
struct Line {
    group: String,
    /// Made by a model.
    answers: u64,
    cost_usd_per_answer: String,
    from_cache: u64,
    failed: u64,
    name: Option<String>,
    /// Judgements with this name that are of the same kind.
    judged: u64,
    estimate: Option<Estimate>,
}

/// What is estimated, with its 95 % interval.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Estimate {
    #[serde(flatten)]
    of: Of,
    value: f64,
    low: f64,
    high: f64,
}

/// The share of `true`, the mean of numbers, or the share of a label.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", content = "label", rename_all = "lowercase")]
enum Of {
    Boolean,
    Number,
    Label(String),
}

/// The two-sided 95 % quantile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// A share with Wilson's score interval (E. B. Wilson 1927, JASA 22, 209–212): unlike the textbook's, it stays between 0
/// and 1 and holds for few judgements, too. Somebody must have judged.
fn share(of: Of, yes: u64, all: u64) -> Estimate {
    let count = all as f64;
    let value = yes as f64 / count;
    let scale = 1.0 + Z * Z / count;
    let centre = (value + Z * Z / (2.0 * count)) / scale;
    let half = Z / scale * (value * (1.0 - value) / count + Z * Z / (4.0 * count * count)).sqrt();
    Estimate { of, value, low: (centre - half).max(0.0), high: (centre + half).min(1.0) }
}

/// A mean ± t·s/√n, with the sample's own variance; one judgement alone says nothing of how far off it is.
fn mean(of: &Moments) -> Estimate {
    let half =
        of.variance().map_or(f64::INFINITY, |variance| student(of.count - 1) * (variance / of.count as f64).sqrt());
    Estimate { of: Of::Number, value: of.mean, low: of.mean - half, high: of.mean + half }
}

/// The two-sided 95 % quantile of Student's t: a table, and where that ends its expansion at the normal one's (Abramowitz
/// and Stegun 26.7.5), which is then right to 0.2 %. There must be a degree of freedom.
fn student(degrees: u64) -> f64 {
    match degrees {
        0..=1 => 12.706,
        2 => 4.303,
        3 => 3.182,
        4 => 2.776,
        _ => {
            let n = degrees as f64;
            let first = (Z.powi(3) + Z) / 4.0;
            let second = (5.0 * Z.powi(5) + 16.0 * Z.powi(3) + 3.0 * Z) / 96.0;
            let third = (3.0 * Z.powi(7) + 19.0 * Z.powi(5) + 17.0 * Z.powi(3) - 15.0 * Z) / 384.0;
            Z + (first + (second + third / n) / n) / n
        }
    }
}

pub fn run(place: &Place, options: &Options) -> Outcome {
    let books = ledger(&place.store(&place.data_dir()?)?)?;
    let since = since(options.hours);
    let groups = books.answers(options.by, since).map_err(text)?;
    let mut judged = books.judged(options.by, since).map_err(text)?;
    judged.retain(|(_, name), _| options.name.as_ref().is_none_or(|only| only == name));
    let lines: Vec<Line> = groups.iter().flat_map(|group| lines(group, &judged)).collect();
    if options.json {
        println!("{}", serde_json::to_string_pretty(&lines).map_err(text)?);
    } else {
        show(options.by, &lines);
    }
    Ok(())
}

/// A line for each thing that was said under each name, or one that says that nothing was.
fn lines(group: &Answers, judged: &BTreeMap<(String, String), Judged>) -> Vec<Line> {
    let nothing = Line {
        group: group.group.clone(),
        answers: group.made,
        cost_usd_per_answer: NanoUsd(group.billed_nano_usd / group.made.max(1)).to_string(),
        from_cache: group.from_cache,
        failed: group.failed,
        name: None,
        judged: 0,
        estimate: None,
    };
    let of_group = judged.range((group.group.clone(), String::new())..).take_while(|((of, _), _)| *of == group.group);
    let mut lines = Vec::new();
    for ((_, name), judged) in of_group {
        lines.extend(estimates(judged).into_iter().map(|(judged, estimate)| Line {
            name: Some(name.clone()),
            judged,
            estimate: Some(estimate),
            ..nothing.clone()
        }));
    }
    if lines.is_empty() { vec![nothing] } else { lines }
}

/// What was said under one name, each with how many judgements it is from.
fn estimates(judged: &Judged) -> Vec<(u64, Estimate)> {
    let mut estimates = Vec::new();
    let [no, yes] = judged.booleans;
    if yes + no > 0 {
        estimates.push((yes + no, share(Of::Boolean, yes, yes + no)));
    }
    if judged.numbers.count > 0 {
        estimates.push((judged.numbers.count, mean(&judged.numbers)));
    }
    let all: u64 = judged.labels.values().sum();
    let mut labels: Vec<(&str, u64)> = judged.labels.iter().map(|(label, count)| (label.as_str(), *count)).collect();
    labels.sort_by_key(|(_, count)| Reverse(*count));
    let rest: u64 = labels.drain(LABELS_MAX.min(labels.len())..).map(|(_, count)| count).sum();
    labels.extend((rest > 0).then_some(("other", rest)));
    estimates.extend(labels.into_iter().map(|(label, count)| (all, share(Of::Label(label.to_owned()), count, all))));
    estimates
}

fn show(by: GroupBy, lines: &[Line]) {
    let by = format!("{by:?}").to_lowercase();
    println!(
        "{by:20} {:>9} {:>16} {:>11} {:>7}   {:16} {:>8}   95 % interval",
        "answers", "USD per answer", "from cache", "failed", "feedback", "judged"
    );
    for line in lines {
        let Line { group, answers, cost_usd_per_answer, from_cache, failed, name, judged, estimate } = line;
        let name = name.as_deref().unwrap_or("-");
        let share = |of: &str, Estimate { value, low, high, .. }: &Estimate| {
            format!("{of} {:.1} % ({:.1} to {:.1} %)", value * 100.0, low * 100.0, high * 100.0)
        };
        let said = match estimate {
            Some(Estimate { of: Of::Number, value, low, high }) => format!("mean {value:.3} ({low:.3} to {high:.3})"),
            Some(estimate @ Estimate { of: Of::Boolean, .. }) => share("true", estimate),
            Some(estimate @ Estimate { of: Of::Label(label), .. }) => share(label, estimate),
            None => "nobody has judged yet".to_owned(),
        };
        println!(
            "{group:20} {answers:>9} {cost_usd_per_answer:>16} {from_cache:>11} {failed:>7}   {name:16} {judged:>8}   {said}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(estimate: &Estimate, expected: [f64; 3]) {
        let found = [estimate.value, estimate.low, estimate.high];
        let far = found.iter().zip(expected).any(|(found, expected)| (found - expected).abs() > 5e-5);
        assert!(!far, "{found:?}, expected {expected:?}");
    }

    fn moments(numbers: impl IntoIterator<Item = f64>) -> Moments {
        let mut moments = Moments::default();
        numbers.into_iter().for_each(|number| moments.add(number));
        moments
    }

    /// R: `binom::binom.confint(8, 10, methods = "wilson")`, and by hand for none and all: z²/(n+z²).
    #[test]
    fn a_share_has_wilsons_interval() {
        is(&share(Of::Boolean, 8, 10), [0.8, 0.4902, 0.9433]);
        is(&share(Of::Boolean, 0, 10), [0.0, 0.0, 0.2775]);
        is(&share(Of::Boolean, 10, 10), [1.0, 0.7225, 1.0]);
    }

    #[test]
    fn a_mean_has_students_interval_and_one_judgement_has_none() {
        // 1, 2, 3, 4: s² = 5/3, so t·s/√4 = 3.182 · 0.645497.
        is(&mean(&moments([1.0, 2.0, 3.0, 4.0])), [2.5, 0.44603, 4.55397]);
        assert_eq!(mean(&moments([4.0])).high, f64::INFINITY);
    }

    /// R: `qt(0.975, n)`.
    #[test]
    fn students_quantiles_are_those_of_the_tables() {
        for (degrees, expected) in [(1, 12.706), (5, 2.571), (6, 2.447), (10, 2.228), (30, 2.042), (120, 1.980)] {
            assert!((student(degrees) / expected - 1.0).abs() < 2e-3, "{degrees}: {}", student(degrees));
        }
    }

    #[test]
    fn numbers_that_are_large_and_alike_keep_their_variance() {
        let large = moments([0.001, 0.002, 0.003].map(|small| 1e6 - small));
        assert!((large.variance().unwrap() / 1e-6 - 1.0).abs() < 1e-3, "{large:?}");
    }

    #[test]
    fn labels_share_what_was_said_under_one_name_and_the_rare_ones_share_a_line() {
        let group = Answers { group: "glimmer-1".into(), made: 40, billed_nano_usd: 400, ..Answers::default() };
        let lines_of = |labels: BTreeMap<String, u64>| {
            let judged = Judged { labels, ..Judged::default() };
            lines(&group, &BTreeMap::from([(("glimmer-1".to_owned(), "tone".to_owned()), judged)]))
        };
        let two = lines_of(BTreeMap::from([("mean".into(), 2), ("warm".into(), 8)]));
        assert_eq!(two.iter().map(|line| line.judged).collect::<Vec<_>>(), [10, 10]);
        is(two[0].estimate.as_ref().unwrap(), [0.8, 0.4902, 0.9433]);
        assert_eq!(two[1].estimate.as_ref().unwrap().of, Of::Label("mean".into()));
        assert_eq!(two[0].cost_usd_per_answer, "0.000000010");
        let many = lines_of((1..=40).map(|count| (format!("label {count}"), count)).collect());
        assert_eq!(many.len(), LABELS_MAX + 1);
        let other = many.last().unwrap().estimate.as_ref().unwrap();
        assert_eq!(other.of, Of::Label("other".into()));
        // 1 + … + 24 of 1 + … + 40.
        assert!((other.value - 300.0 / 820.0).abs() < 1e-9);
    }
}
