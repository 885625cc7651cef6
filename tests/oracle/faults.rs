//! What must not go unnoticed: each fault damages one thing that a witness says.

use crate::support::evidence::{Call, Evidence, LedgerRow, Seen, Span};

/// Damages one thing and tells which leg must notice.
pub type Fault = (&'static str, fn(&mut Evidence));

fn row(evidence: &mut Evidence, is: impl Fn(&LedgerRow) -> bool) -> &mut LedgerRow {
    evidence.rows.iter_mut().find(|row| is(row)).expect("such a row")
}

fn forget(evidence: &mut Evidence, is: impl Fn(&LedgerRow) -> bool) {
    let at = evidence.rows.iter().position(is).expect("such a row");
    evidence.rows.remove(at);
}

fn seen(evidence: &mut Evidence, is: impl Fn(&Seen) -> bool) -> &mut Seen {
    evidence.seen.iter_mut().find(|seen| is(seen)).expect("such a request")
}

fn attribute(evidence: &mut Evidence, name: &str, is: impl Fn(&Span) -> bool, value: &str) {
    let span = evidence.spans.iter_mut().find(|span| span.attributes.contains_key(name) && is(span));
    span.expect("such a span").attributes.insert(name.to_owned(), value.to_owned());
}

/// One series of a family, which counted something, is not there.
fn lose(evidence: &mut Evidence, series: &str) {
    let is_it = |line: &&str| line.starts_with(series) && line.rsplit(' ').next().unwrap().contains(|c| c > '0');
    let line = evidence.metrics.lines().find(is_it).expect(series).to_owned();
    evidence.metrics = evidence.metrics.replacen(&line, "", 1);
}

/// One series of a family counts one more.
fn miscount(evidence: &mut Evidence, family: &str, label: &str) {
    let mut lines: Vec<String> = evidence.metrics.lines().map(str::to_owned).collect();
    let is_it = |line: &&mut String| line.starts_with(family) && line.contains(label) && !line.ends_with(" 0");
    let line = lines.iter_mut().find(is_it).expect("such a series");
    let (name, value) = line.rsplit_once(' ').unwrap();
    *line = format!("{name} {}", value.parse::<u64>().unwrap() + 1);
    evidence.metrics = lines.join("\n");
}

/// Every leg, and faults that it is there to find.
pub const FAULTS: [Fault; 63] = [
    ("record", |e| drop(e.log.pop())),
    ("record", |e| e.log.push(e.log[0].clone())),
    ("record", |e| miscount(e, "gateway_access_log_lines_total", "suppressed")),
    ("client", |e| seen(e, |seen| seen.usage.is_some()).usage.as_mut().unwrap()[3] += 1),
    ("client", |e| seen(e, |seen| seen.usage.is_some_and(|usage| usage[1] > 0)).usage.as_mut().unwrap()[1] += 1),
    ("client", |e| seen(e, |seen| seen.cost_usd.is_some()).cost_usd = Some("0.000000001".into())),
    ("client", |e| seen(e, |seen| seen.kind == "left" && seen.status == 200).pieces = 10_000),
    ("client", |e| seen(e, |seen| seen.kind == "whole").bytes_out = Some(1)),
    ("client", |e| seen(e, |seen| seen.kind == "remote").key_id = "somebody-else".into()),
    ("client", |e| seen(e, |seen| seen.kind == "cut" && seen.error_code.is_some()).error_code = None),
    ("recount", |e| e.rows.iter_mut().for_each(|row| row.tokens[0] += u64::from(row.tokens[0] > 0))),
    // A row that is lost, or one too many.
    ("ledger", |e| e.rows.push(e.rows[0].clone())),
    ("ledger", |e| forget(e, |row| row.outcome == "failed_over" && row.attempt == 0)),
    ("ledger", |e| forget(e, |row| row.role == "fallback" && row.is_terminal())),
    ("ledger", |e| row(e, |row| row.outcome == "failed_over").outcome = "answered".into()),
    ("ledger", |e| {
        let again = row(e, LedgerRow::is_terminal).clone();
        e.rows.push(LedgerRow { attempt: again.attempt + 1, role: "retry".into(), ..again });
    }),
    ("log", |e| forget(e, |row| row.is_terminal() && row.attempt == 0)),
    ("log", |e| {
        let lines = &mut e.log.iter_mut();
        lines.find(|line| line["tokens"].is_object()).unwrap()["tokens"]["output"] = 9999.into()
    }),
    // What nobody owes.
    ("ledger", |e| row(e, LedgerRow::is_shadow).billed = 100),
    ("ledger", |e| row(e, |row| row.cache == "hit").billed = 100),
    ("ledger", |e| row(e, |row| row.cache == "coalesced").billed = 100),
    ("ledger", |e| row(e, |row| row.outcome == "failed_over").billed = 100),
    ("ledger", |e| row(e, |row| row.role == "shadow").tenant = "other-tenant".into()),
    ("price", |e| row(e, |row| row.billed > 0).billed += 1),
    ("price", |e| row(e, |row| row.provider == "mock" && row.provider_cost > 0).provider_cost += 1),
    ("price", |e| row(e, |row| row.is_shadow() && row.provider == "mirror" && row.billed == 0).tokens[1] += 1),
    ("span", |e| drop(e.spans.remove(0))),
    ("span", |e| e.spans.push(e.spans[0].clone())),
    ("span", |e| attribute(e, "gen_ai.usage.output_tokens", |_| true, "9999")),
    ("span", |e| attribute(e, "glassgate.role", |span| span.attributes["glassgate.role"] == "shadow", "primary")),
    ("span", |e| attribute(e, "glassgate.attempt.role", |_| true, "shadow")),
    ("span", |e| {
        let at = e.spans.iter().position(|span| span.attributes.contains_key("glassgate.attempt.number"));
        e.spans.remove(at.unwrap());
    }),
    // A call that nobody has a row for, and one that nobody made.
    ("upstream", |e| e.calls.push(Call { span: "0123456789abcdef".into(), ..e.calls[0].clone() })),
    ("upstream", |e| e.calls.push(e.calls[0].clone())),
    ("upstream", |e| {
        let at = e.calls.iter().position(|call| call.told.is_some());
        e.calls.remove(at.unwrap());
    }),
    ("upstream", |e| *e.calls.iter_mut().find_map(|call| call.told.as_mut()).unwrap() += 1),
    ("upstream", |e| forget(e, |row| row.is_shadow() && row.provider == "mirror")),
    ("metric", |e| lose(e, "gateway_tokens_total{")),
    ("metric", |e| lose(e, "gateway_requests_total{")),
    ("metric", |e| lose(e, "gateway_upstream_attempts_total{")),
    ("metric", |e| miscount(e, "gateway_rejections_total", "model_not_found")),
    ("metric", |e| miscount(e, "gateway_tokens_total", "role=\"shadow\"")),
    ("metric", |e| lose(e, "gateway_cost_usd_total{")),
    ("metric", |e| lose(e, "gateway_provider_cost_usd_total{")),
    ("metric", |e| lose(e, "gateway_budget_spent_usd{")),
    ("metric", |e| lose(e, "gateway_cache_saved_usd_total{")),
    ("metric", |e| miscount(e, "gateway_cache_saved_tokens_total", "kind=\"output\"")),
    ("metric", |e| miscount(e, "gateway_settled_requests_total", "usage_source=\"estimated\"")),
    ("metric", |e| miscount(e, "gateway_attempts_total", "outcome=\"failed_over\"")),
    ("metric", |e| miscount(e, "gateway_client_aborts_total", "phase=\"stream\"")),
    ("metric", |e| miscount(e, "gateway_client_aborts_total", "phase=\"queue\"")),
    ("metric", |e| miscount(e, "gateway_overhead_seconds_count", "phase=\"admit\"")),
    ("cache", |e| miscount(e, "gateway_cache_requests_total", "hit")),
    ("cache", |e| row(e, |row| row.cache == "hit").tokens[3] += 1),
    ("limit", |e| miscount(e, "gateway_limit_decisions_total", "decision=\"denied\",kind=\"concurrency\"")),
    ("feedback", |e| drop(e.judged.pop())),
    ("feedback", |e| miscount(e, "gateway_feedback_total", "correct")),
    ("limit", |e| miscount(e, "gateway_limit_decisions_total", "decision=\"allowed\",kind=\"feedback\"")),
    ("funnel", |e| miscount(e, "gateway_shadow_requests_total", "paired")),
    ("funnel", |e| miscount(e, "gateway_shadow_requests_total", "eligible")),
    ("engine", |e| lose(e, "runtime_generated_tokens_total{")),
    ("engine", |e| lose(e, "runtime_prompt_tokens_total{")),
    ("engine", |e| lose(e, "runtime_prefix_tokens_total{")),
];
