//! What is counted is written exactly, from closed or bounded sets of labels.

use super::table::{KEYS_MAX, TENANTS_MAX};
use super::*;
use crate::accounting::core::Usage;
use crate::accounting::row::{Outcome, Role, UsageSource};
use crate::observe::labels::{FEEDBACK_LABELS_MAX, FEEDBACK_NAMES_MAX, FEEDBACK_WORDS_OF_TENANT_MAX};

const SERVED: Served<'_> = Served { route: "assistant", model: "glimmer-1", variant: "glimmer-1" };

fn receipt(billed: u64) -> Receipt {
    Receipt {
        role: Role::Primary,
        outcome: Outcome::Answered,
        usage: Usage::tokens(3, 4),
        usage_source: UsageSource::Counted,
        billed: NanoUsd(billed),
        unbilled: NanoUsd(0),
        unpriced_service: None,
        provider_cost: NanoUsd(0),
        saved: None,
    }
}

#[test]
fn money_is_written_exactly_to_the_nano_dollar() {
    let metrics = Metrics::new();
    for _ in 0..3 {
        metrics.settled(SERVED, "default", &receipt(1_000_000_001));
    }
    let line = metrics.encode().lines().find(|line| line.starts_with("gateway_cost_usd_total{")).map(str::to_owned);
    assert_eq!(line.as_deref().and_then(|line| line.rsplit(' ').next()), Some("3.000000003"));
}

#[test]
fn tenants_beyond_the_bound_share_one_series() {
    let metrics = Metrics::new();
    for i in 0..TENANTS_MAX + 50 {
        metrics.settled(SERVED, &format!("t{i}"), &receipt(1));
    }
    let text = metrics.encode();
    let series = text.lines().filter(|line| line.starts_with("gateway_cost_usd_total{")).count();
    assert_eq!(series, TENANTS_MAX + 1);
    assert!(text.contains("tenant=\"other\""));
}

fn judged(tenant: &str) -> Judged<'_> {
    Judged { tenant, route: "assistant", variant: "glimmer-1" }
}

fn series(metrics: &Metrics, start: &str) -> usize {
    metrics.encode().lines().filter(|line| line.starts_with(start)).count()
}

#[test]
fn names_and_labels_beyond_the_bound_share_one_series_and_keep_it() {
    let metrics = Metrics::new();
    let label = |i: usize| Score::Label(format!("label {i}"));
    for i in 0..200 {
        let tenant = format!("tenant-{i}");
        metrics.feedback(judged(&tenant), &format!("name-{i}"), &Score::Number(1.0));
        metrics.feedback(judged(&tenant), "name-0", &label(i));
    }
    metrics.feedback_revised(judged("tenant-199"), "name-0", &label(199));
    metrics.feedback_revised(judged("tenant-0"), "name-0", &label(0));
    assert_eq!(series(&metrics, "gateway_feedback_total{"), FEEDBACK_NAMES_MAX + 1 + FEEDBACK_LABELS_MAX + 1);
    let text = metrics.encode();
    let counted = |line: &str| text.lines().any(|found| found == line);
    let labels =
        |value: &str| format!("{{name=\"name-0\",route=\"assistant\",value=\"{value}\",variant=\"glimmer-1\"}}");
    assert!(counted(&format!("gateway_feedback_total{} 184", labels("other"))), "{text}");
    assert!(counted(&format!("gateway_feedback_revised_total{} 1", labels("other"))));
    assert!(counted(&format!("gateway_feedback_revised_total{} 1", labels("label 0"))));
}

#[test]
fn no_tenant_can_use_up_the_words_of_the_others() {
    let metrics = Metrics::new();
    for i in 0..200 {
        metrics.feedback(judged("loud"), &format!("loud-{i}"), &Score::Number(1.0));
    }
    metrics.feedback(judged("quiet"), "tone", &Score::Label("warm".into()));
    assert_eq!(series(&metrics, "gateway_feedback_total{name=\"loud-"), FEEDBACK_WORDS_OF_TENANT_MAX);
    assert_eq!(series(&metrics, "gateway_feedback_total{name=\"tone\",route=\"assistant\",value=\"warm\""), 1);
    // What another tenant makes known later changes nothing for a word that was counted among the others.
    metrics.feedback(judged("quiet"), "loud-199", &Score::Number(1.0));
    metrics.feedback_revised(judged("loud"), "loud-199", &Score::Number(1.0));
    let text = metrics.encode();
    let revised = |name: &str| {
        let start = format!("gateway_feedback_revised_total{{name=\"{name}\"");
        text.lines().find(|line| line.starts_with(&start)).and_then(|line| line.rsplit(' ').next())
    };
    assert_eq!((revised("other"), revised("loud-199")), (Some("1"), Some("0")));
}

#[test]
fn a_judgement_begins_at_zero_with_all_that_it_may_turn_into() {
    let metrics = Metrics::new();
    metrics.serves(SERVED, "primary", false);
    assert_eq!(series(&metrics, "gateway_feedback_total{name=\"correct\""), 2);
    metrics.feedback(judged("quiet"), "useful", &Score::Boolean(true));
    assert_eq!(series(&metrics, "gateway_feedback_total{name=\"useful\""), 2);
    assert_eq!(series(&metrics, "gateway_feedback_revised_total{name=\"useful\""), 2);
}

#[test]
fn keys_beyond_the_bound_are_shown_as_their_sum() {
    let metrics = Metrics::new();
    let names: Vec<String> = (0..KEYS_MAX + 50).map(|i| format!("k{i}")).collect();
    let budgets = || {
        let budget = |key| Budget { tenant: "acme", key, limit: NanoUsd(5_000_000_000), spent: NanoUsd(1) };
        names.iter().map(move |key| budget(key.as_str()))
    };
    metrics.budgets(budgets());
    metrics.budgets(budgets());
    let text = metrics.encode();
    assert_eq!(text.lines().filter(|line| line.starts_with("gateway_budget_limit_usd{")).count(), KEYS_MAX + 1);
    assert!(text.contains("gateway_budget_limit_usd{key=\"other\",tenant=\"acme\"} 250.000000000"));
    assert!(text.contains("gateway_budget_spent_usd{key=\"other\",tenant=\"acme\"} 0.000000050"));
}

#[test]
fn bucket_edges_have_one_spelling() {
    let metrics = Metrics::new();
    metrics.admitted(SERVED, Duration::from_millis(5), Some(Duration::from_millis(1)), None);
    let text = metrics.encode();
    assert!(text.contains("le=\"1.0\"") && text.contains("le=\"+Inf\"") && !text.contains("le=\"1\""));
}
