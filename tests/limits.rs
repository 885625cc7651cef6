//! Limits of a key: requests at a time, tokens, money. What is refused costs nothing, and nothing is overshot.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::evidence::{LedgerRow, ledger};
use crate::support::gateway::{Setup, TestGateway, chat, chat_with, long, metric, replace};
use crate::support::http::{self, Response};
use crate::support::{eventually, root};

/// A key with limits of its own, once the running gateway knows it.
fn key(gateway: &TestGateway, limits: &[&str]) -> String {
    let key = gateway.cli(&[&["keys", "create", "limited"], limits].concat()).trim().to_owned();
    eventually("the key to be known", || {
        (gateway.send(&http::get("/v1/models", Some(&key))).status == 200).then_some(())
    });
    key
}

fn post(key: &str, body: &Value) -> Vec<u8> {
    http::post("/v1/chat/completions", Some(key), &[], body.to_string().as_bytes())
}

/// A gateway with several threads of its own, so that whatever can overlap does.
fn threaded() -> TestGateway {
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "[listen]", "[listen]\nthreads = 4");
    setup.start()
}

/// An answer of exactly so many tokens, in one piece.
fn exactly(tokens: u64) -> Value {
    chat_with("Count.", json!({"max_tokens": tokens, "ignore_eos": true}))
}

fn code(response: &Response) -> String {
    response.json()["error"]["code"].as_str().unwrap().to_owned()
}

fn message(response: &Response) -> String {
    response.json()["error"]["message"].as_str().unwrap().to_owned()
}

fn number(response: &Response, header: &str) -> u64 {
    response.header(header).unwrap_or_else(|| panic!("no {header}")).parse().unwrap()
}

/// Waits until nothing is under way, checks that then nothing is held, and gives a row for each that was let in.
fn at_rest(gateway: &TestGateway) -> Vec<LedgerRow> {
    let text = eventually("everything to end", || {
        let text = gateway.metrics();
        let quiet = ["gateway_in_flight_requests", "runtime_requests"];
        quiet.iter().all(|gauge| metric(&text, gauge, &[]) == 0.0).then_some(text)
    });
    for held in ["gateway_reserved_tokens", "gateway_reserved_usd"] {
        assert_eq!(metric(&text, held, &[]), 0.0, "{held}");
    }
    let admitted = metric(&text, "gateway_limit_decisions_total", &["kind=\"tokens\"", "decision=\"allowed\""]);
    eventually("the rows to be shipped", || Some(ledger(gateway)).filter(|rows| rows.len() as f64 == admitted))
}

fn usd(nano: u64) -> String {
    format!("{}.{:09}", nano / 1_000_000_000, nano % 1_000_000_000)
}

#[test]
fn a_thousand_racing_requests_never_overshoot_a_budget_and_what_is_refused_costs_nothing() {
    const BUDGET: u64 = 150_000;
    let gateway = threaded();
    let key = key(&gateway, &["--rpm", "100000", "--usd-per-day", &usd(BUDGET)]);
    let (next, refused, cut) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                while let i @ 0..1000 = next.fetch_add(1, Ordering::Relaxed) {
                    let body = chat_with("12 + 34 = ?", json!({"max_tokens": 8 + i % 32, "stream": i % 3 == 0}));
                    let mut open = gateway.open(&post(&key, &body));
                    if open.status == 200 && i % 9 == 0 {
                        // Leaves in the middle: what it did not use comes back.
                        let _ = open.chunk();
                        cut.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    let response = open.finish();
                    if response.status != 200 {
                        assert_eq!((response.status, code(&response).as_str()), (429, "insufficient_quota"));
                        assert_eq!(response.header("x-should-retry"), Some("false"));
                        refused.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let rows = at_rest(&gateway);
    let billed: u64 = rows.iter().map(|row| row.billed).sum();
    let (refused, cut) = (refused.into_inner(), cut.into_inner());
    println!("{} admitted ({cut} cut), {refused} refused; {billed} of {BUDGET} nano-dollars billed", rows.len());
    assert!(billed <= BUDGET, "overshot by {}", billed - BUDGET);
    assert_eq!(rows.len() + refused, 1000, "one row for each that was let in, none for the others");
    assert!(refused > 100 && rows.len() > 20 && cut > 0, "this proved nothing");
    let text = gateway.metrics();
    let tokens: u64 = rows.iter().map(|row| row.input + row.output + row.other_tokens).sum();
    assert_eq!(metric(&text, "gateway_tokens_total", &[]), tokens as f64);
    assert_eq!(metric(&text, "runtime_prompt_tokens_total", &[]), rows.iter().map(|row| row.input).sum::<u64>() as f64);
    let decided = |decision: &str| {
        metric(&text, "gateway_limit_decisions_total", &["kind=\"budget\"", &format!("decision=\"{decision}\"")])
    };
    assert_eq!((decided("allowed"), decided("denied")), (rows.len() as f64, refused as f64));
}

#[test]
fn a_token_limit_says_what_is_used_and_a_retry_after_exactly_the_wait_passes() {
    let gateway = TestGateway::start();
    let key = key(&gateway, &["--tpm", "1200"]);
    let first = gateway.send(&post(&key, &exactly(1000)));
    assert_eq!(first.status, 200);
    let prompt = first.json()["usage"]["prompt_tokens"].as_u64().unwrap();
    let left = number(&first, "x-ratelimit-remaining-tokens");
    assert!(left < 900, "{left} left");

    // Two seconds' worth more than there is.
    let wanted = left + 40;
    let body = exactly(wanted - prompt);
    let refused = gateway.send(&post(&key, &body));
    assert_eq!((refused.status, code(&refused).as_str()), (429, "tokens_limited"));
    let used = 1200 - number(&refused, "x-ratelimit-remaining-tokens");
    let said = message(&refused);
    for text in ["1200 tokens a minute".to_owned(), format!("reserved {used}"), format!("could use {wanted}")] {
        assert!(said.contains(&text), "{text:?} is missing in: {said}");
    }
    assert_eq!(refused.header("x-should-retry"), Some("true"));
    assert!(refused.header("x-ratelimit-reset-tokens").unwrap().ends_with('s'));
    let wait = number(&refused, "retry-after-ms");
    assert!((1..=2_000).contains(&wait) && number(&refused, "retry-after") == wait.div_ceil(1000), "{wait} ms");
    std::thread::sleep(Duration::from_millis(wait));
    assert_eq!(gateway.send(&post(&key, &body)).status, 200, "the wait was honest");
    assert_eq!(at_rest(&gateway).len(), 2, "the refused one left no row");
}

#[test]
fn a_request_that_no_wait_can_help_is_told_so() {
    let gateway = Setup::shipped().limited(500, 8, "0.00001").start();
    let dear = gateway.post(&exactly(400));
    assert_eq!((dear.status, code(&dear).as_str()), (429, "insufficient_quota"));
    let large = gateway.post(&exactly(600));
    assert_eq!(large.status, 429);
    for response in [&dear, &large] {
        assert_eq!(response.header("x-should-retry"), Some("false"));
        assert!(message(response).contains("can never pass"), "{}", message(response));
        assert_eq!(response.header("retry-after"), None, "there is no right moment");
    }
    let key = key(&gateway, &["--usd-per-day", "1"]);
    let large = gateway.send(&post(&key, &exactly(600)));
    assert_eq!((large.status, code(&large).as_str()), (429, "tokens_limited"));
    assert!(message(&large).contains("500 a minute") && message(&large).contains("could use 6"), "{}", message(&large));
    assert_eq!(gateway.post(&exactly(1)).status, 200, "and a small one passes");
    assert_eq!(at_rest(&gateway).len(), 1);
}

#[test]
fn a_spent_budget_names_what_is_spent_and_reserved_and_when_it_resets() {
    let gateway = TestGateway::start();
    // One reservation of a thousand tokens fits (80,000 or 120,000 nano-dollars and the prompt), and not a second.
    let key = key(&gateway, &["--usd-per-day", "0.00015"]);
    let mut running = gateway.open(&post(&key, &long(1000)));
    running.chunk().unwrap();
    let held = running.header("x-glassgate-cost-max").unwrap().to_owned();
    let refused = gateway.send(&post(&key, &exactly(1000)));
    assert_eq!((refused.status, code(&refused).as_str()), (429, "insufficient_quota"));
    assert_eq!(refused.json()["error"]["type"], "insufficient_quota");
    let said = message(&refused);
    for text in ["0.000150000 USD a day".to_owned(), "used 0.000000000".into(), format!("reserved {held}")] {
        assert!(said.contains(&text), "{text:?} is missing in: {said}");
    }
    let wait = number(&refused, "retry-after");
    assert!((1..=86_400).contains(&wait) && said.contains("T00:00:00Z, in "), "{said}");
    drop(running);
    let spent: u64 = at_rest(&gateway).iter().map(|row| row.billed).sum();
    assert!(spent > 0 && usd(spent) < held, "{spent} of {held}");
    assert_eq!(gateway.send(&post(&key, &exactly(300))).status, 200, "what the cut stream did not use is there again");
}

#[test]
fn a_stream_that_is_cut_gives_back_the_tokens_it_did_not_use() {
    let gateway = TestGateway::start();
    let key = key(&gateway, &["--tpm", "1200"]);
    let mut running = gateway.open(&post(&key, &long(1000)));
    running.chunk().unwrap();
    let left: u64 = running.header("x-ratelimit-remaining-tokens").unwrap().parse().unwrap();
    assert!(left < 200, "all it could use is reserved: {left} left");
    drop(running);
    let row = at_rest(&gateway).remove(0);
    assert_eq!(row.outcome, "aborted");
    let next = gateway.send(&post(&key, &exactly(1)));
    let left = number(&next, "x-ratelimit-remaining-tokens");
    assert!(left + row.input + row.output + 20 > 1150, "{left} left after {row:?}");
}

#[test]
fn a_third_stream_waits_until_one_of_two_has_ended_and_is_let_in_at_once_then() {
    let gateway = TestGateway::start();
    let key = key(&gateway, &["--concurrency", "2"]);
    let body = long(900);
    let mut two: Vec<_> = (0..2).map(|_| gateway.open(&post(&key, &body))).collect();
    for open in &mut two {
        open.chunk().unwrap();
    }
    let third = gateway.send(&post(&key, &body));
    assert_eq!((third.status, code(&third).as_str()), (429, "concurrency_limited"));
    assert!(message(&third).contains("2 requests"), "{}", message(&third));
    assert_eq!((third.header("retry-after"), third.header("x-should-retry")), (Some("1"), Some("true")));
    // Only what passed the door was counted as a request.
    assert_eq!(number(&third, "x-ratelimit-limit-requests") - number(&third, "x-ratelimit-remaining-requests"), 2);
    // Somebody else is not held up.
    assert_eq!(gateway.post(&exactly(1)).status, 200);
    // Whoever has read the end of an answer may ask again: no waiting, no retry.
    let first = two.remove(0).finish();
    assert_eq!(first.chunks().last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(gateway.send(&post(&key, &exactly(1))).status, 200);
    // A hang-up frees its place, too.
    drop(two);
    eventually("the place", || (gateway.send(&post(&key, &exactly(1))).status == 200).then_some(()));
    let rows = at_rest(&gateway);
    assert!(rows.iter().all(|row| row.outcome == "answered" || row.outcome == "aborted"));
}

#[test]
fn one_request_at_a_time_is_enough_for_a_client_that_asks_one_after_the_other() {
    let gateway = threaded();
    let key = key(&gateway, &["--concurrency", "1"]);
    for i in 0..40 {
        let body = chat_with("12 + 34 = ?", json!({"max_tokens": 4, "stream": i % 2 == 0}));
        assert_eq!(gateway.send(&post(&key, &body)).status, 200, "request {i}");
        assert_eq!(gateway.send(&post(&key, &json!({"model": 1}))).status, 400, "a refused one frees its place");
    }
}

#[test]
fn a_keys_own_limits_beat_the_default_and_are_listed() {
    let gateway = Setup::shipped().limited(40, 3, "0.5").start();
    assert_eq!(code(&gateway.post(&exactly(500))), "tokens_limited", "the default");
    let key = key(&gateway, &["--rpm", "50", "--tpm", "5000", "--concurrency", "9", "--usd-per-day", "2.5"]);
    let response = gateway.send(&post(&key, &exactly(500)));
    assert_eq!(response.status, 200);
    assert_eq!(number(&response, "x-ratelimit-limit-requests"), 50);
    assert_eq!(number(&response, "x-ratelimit-limit-tokens"), 5000);

    let listed: Value = serde_json::from_str(&gateway.cli(&["keys", "list", "--json"])).unwrap();
    let own = |name: &str| {
        ["requests_per_minute", "tokens_per_minute", "concurrency", "usd_per_day"]
            .map(|limit| listed.as_array().unwrap().iter().find(|key| key["name"] == name).unwrap()[limit].clone())
    };
    assert_eq!(own("limited"), [json!(50), json!(5000), json!(9), json!("2.500000000")]);
    assert_eq!(own("quickstart"), [Value::Null, Value::Null, Value::Null, Value::Null]);
    assert!(gateway.cli(&["keys", "list"]).contains("2.500000000"));
    let shown = gateway.admin("GET", "/admin/config").json()["limits"].clone();
    let default = json!({"requests_per_minute": 600, "tokens_per_minute": 40, "concurrency": 3,
                         "usd_per_day": "0.500000000", "shared": null, "down": null});
    assert_eq!(shown, default);
    for (option, value) in [("--tpm", "0"), ("--concurrency", "10001"), ("--usd-per-day", "-1"), ("--usd-per-day", "x")]
    {
        let output = gateway.run(&["keys", "create", "bad", option, value]);
        assert!(!output.status.success(), "{option} {value}");
    }
}

#[test]
fn a_kill_forgives_no_spending() {
    let mut gateway = TestGateway::start();
    let key = key(&gateway, &["--usd-per-day", "0.00015"]);
    for _ in 0..3 {
        assert_eq!(gateway.send(&post(&key, &exactly(5))).status, 200);
    }
    let mut running = gateway.open(&post(&key, &long(1000)));
    running.chunk().unwrap();
    gateway.kill_and_restart();
    let rows = ledger(&gateway);
    assert_eq!(rows.iter().filter(|row| row.outcome == "killed").count(), 1);
    let spent: u64 = rows.iter().map(|row| row.billed).sum();
    let refused = gateway.send(&post(&key, &exactly(1000)));
    assert_eq!((refused.status, code(&refused).as_str()), (429, "insufficient_quota"));
    let said = message(&refused);
    assert!(said.contains(&format!("used {}", usd(spent))), "{spent} nano-dollars, but: {said}");
    assert_eq!(gateway.send(&post(&key, &exactly(5))).status, 200, "what is left can be used");
}

#[test]
fn an_edited_limit_counts_at_once_and_keeps_what_was_spent() {
    let gateway = TestGateway::start();
    assert_eq!(gateway.post(&exactly(500)).status, 200);
    let spent: u64 = at_rest(&gateway).iter().map(|row| row.billed).sum();
    replace(&gateway.config("gateway.toml"), "usd_per_day = 1_000_000", &format!("usd_per_day = {}", usd(spent)));
    replace(&gateway.config("gateway.toml"), "tokens_per_minute = 1000000000", "tokens_per_minute = 600");
    assert_eq!(gateway.admin("POST", "/admin/reload").status, 200);
    let refused = gateway.post(&exactly(1));
    assert_eq!(code(&refused), "insufficient_quota");
    let said = message(&refused);
    assert!(said.contains(&format!("{} USD a day; it has used {}", usd(spent), usd(spent))), "{spent}, but: {said}");
    assert_eq!(number(&refused, "x-ratelimit-limit-tokens"), 600);
}

#[test]
fn answers_and_refusals_tell_what_is_left_in_openais_words() {
    let gateway = TestGateway::start();
    let key = key(&gateway, &["--rpm", "60", "--tpm", "60000"]);
    let names = ["limit", "remaining", "reset"]
        .map(|what| ["requests", "tokens"].map(|kind| format!("x-ratelimit-{what}-{kind}")));
    let bad = chat_with("x", json!({"temperature": 9}));
    for (body, status) in [(chat("Hello!"), 200), (long(5), 200), (bad, 400), (exactly(1_000_000), 400)] {
        let response = gateway.send(&post(&key, &body));
        assert_eq!(response.status, status);
        for name in names.as_flattened() {
            assert!(response.header(name).is_some(), "{status} has no {name}");
        }
        let reset = response.header("x-ratelimit-reset-requests").unwrap();
        assert!(reset.ends_with('s') && reset.starts_with(|c: char| c.is_ascii_digit()), "{reset}");
    }
    let stranger = gateway.send(&http::post("/v1/chat/completions", None, &[], b"{}"));
    assert!(stranger.headers.iter().all(|(name, _)| !name.starts_with("x-ratelimit")), "who is nobody has no limits");
}

#[test]
fn the_shipped_limits_are_the_documented_ones() {
    let text = std::fs::read_to_string(root().join("configs/gateway.toml")).unwrap();
    for line in ["requests_per_minute = 600", "tokens_per_minute = 200_000", "concurrency = 64", "usd_per_day = 5.0"] {
        assert!(text.contains(line), "{line}");
    }
}
