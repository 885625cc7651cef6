//! Shadow traffic: copies for comparison that no user notices or pays for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::gateway::{Setup, TestGateway, append, chat, chat_with, long, remote};
use crate::support::upstream::{Script, Upstream, response, words};

/// The shipped route with a mock as its shadow.
fn shadowed(upstream: &Upstream, sample: f64, more: &str) -> TestGateway {
    let setup = Setup::shipped();
    setup.add_upstream("mock", &upstream.url(), "remote-model");
    let rule = format!("shadow   = {{ variant = \"remote-model\", sample = {sample} }}\ntimeouts =");
    setup.replace("routes.toml", "timeouts =", &rule);
    append(&setup.path("gateway.toml"), more);
    setup.start()
}

/// Copies by how they ended.
fn funnel(gateway: &TestGateway) -> BTreeMap<String, u64> {
    let text = gateway.metrics();
    let of = |outcome: &str| {
        let label = format!("outcome=\"{outcome}\"");
        crate::support::gateway::metric(&text, "gateway_shadow_requests_total", &[&label]) as u64
    };
    ["eligible", "sampled", "shed", "primary_failed", "shadow_failed", "both_failed", "paired"]
        .map(|outcome| (outcome.to_owned(), of(outcome)))
        .into_iter()
        .collect()
}

/// The funnel once every sampled copy has ended.
fn ended(gateway: &TestGateway, eligible: u64) -> BTreeMap<String, u64> {
    eventually("every copy to end", || {
        let funnel = funnel(gateway);
        let ends = ["shed", "primary_failed", "shadow_failed", "both_failed", "paired"];
        let count: u64 = ends.iter().map(|end| funnel[*end]).sum();
        (funnel["eligible"] == eligible && count == funnel["sampled"]).then_some(funnel)
    })
}

/// (request id, role, outcome, model, billed, provider's cost) of every row.
fn rows(gateway: &TestGateway) -> Vec<(String, String, String, String, i64, i64)> {
    eventually("all rows", || (gateway.metric("gateway_ledger_queue_rows", &[]) == 0.0).then_some(()));
    let db = rusqlite::Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let mut query = db
        .prepare("SELECT request_id, role, outcome, model, billed_nano_usd, provider_cost_nano_usd FROM ledger ORDER BY request_id, role")
        .unwrap();
    let rows = query
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?)))
        .unwrap();
    rows.collect::<rusqlite::Result<_>>().unwrap()
}

#[test]
fn a_copy_goes_out_after_the_answer_and_costs_its_user_nothing() {
    let upstream = Upstream::start();
    let mut gateway = shadowed(&upstream, 1.0, "");
    let answers: Vec<_> =
        [false, true].map(|stream| gateway.post(&chat_with("Sort: 9 4 7 1", json!({"stream": stream})))).into();
    assert_eq!(ended(&gateway, 2)["paired"], 2);
    let rows = rows(&gateway);
    assert_eq!(rows.len(), 4);
    for pair in rows.chunks(2) {
        let [user, shadow] = pair else { panic!("a pair") };
        assert_eq!(user.0, shadow.0, "they share the request's id");
        assert_eq!((user.1.as_str(), shadow.1.as_str(), shadow.2.as_str()), ("primary", "shadow", "answered"));
        assert!(user.4 > 0 && user.3.starts_with("glimmer"));
        assert!(shadow.4 == 0 && shadow.5 > 0 && shadow.3 == "remote-model", "the provider is paid, by us: {shadow:?}");
    }
    let asked = upstream.asked();
    assert_eq!(asked[0].body["messages"], chat("Sort: 9 4 7 1")["messages"]);
    assert_eq!(gateway.metric("gateway_cost_usd_total", &["role=\"shadow\""]), 0.0);
    assert!(gateway.metric("gateway_tokens_total", &["role=\"shadow\"", "variant=\"remote-model\""]) > 0.0);
    assert_eq!(gateway.metric("gateway_requests_total", &[]), 2.0, "a copy is no request");

    let trace = answers[0].header("traceparent").unwrap()[3..35].to_owned();
    gateway.stop();
    let spans = std::fs::read_to_string(gateway.data_dir().join("traces.jsonl")).unwrap();
    let of_shadow = spans.lines().filter(|line| line.contains(&trace) && line.contains("remote-model"));
    assert_eq!(of_shadow.count(), 1, "in the trace of its request");
}

#[test]
fn the_share_that_is_sampled_is_the_share_that_was_asked_for() {
    let upstream = Upstream::start();
    let gateway = shadowed(&upstream, 0.5, "");
    for seed in 0..60 {
        gateway.post(&chat_with("x", json!({"max_tokens": 1, "seed": seed})));
    }
    let funnel = ended(&gateway, 60);
    assert!((15..=45).contains(&funnel["sampled"]), "{funnel:?}");
    assert_eq!(upstream.calls() as u64, funnel["sampled"] - funnel["shed"]);
}

#[test]
fn every_pair_ends_in_one_of_four_ways_and_only_comparable_requests_make_one() {
    let upstream = Upstream::start();
    let setup = Setup::upstream(&upstream, "shadow = { variant = \"second\", sample = 1.0 }");
    let second = Upstream::start();
    setup.add_upstream("other", &second.url(), "second");
    let gateway = setup.start();
    let broken = || Script::Raw(response("500 Internal Server Error", &[], "{}"));
    for (primary_fails, shadow_fails) in [(false, false), (true, false), (false, true), (true, true)] {
        let before = funnel(&gateway)["eligible"];
        if primary_fails {
            upstream.plays(broken());
        }
        if shadow_fails {
            second.plays(broken());
        }
        let status = gateway.post(&remote(json!({}))).status;
        assert_eq!(status, if primary_fails { 502 } else { 200 });
        ended(&gateway, before + 1);
    }
    let funnel = ended(&gateway, 4);
    for outcome in ["paired", "primary_failed", "shadow_failed", "both_failed"] {
        assert_eq!(funnel[outcome], 1, "{funnel:?}");
    }
    // What was refused, or left by its client, is nothing to compare with.
    assert_eq!(gateway.post(&remote(json!({"temperature": 9}))).status, 400);
    upstream.always(Script::Answer(words(&"word ".repeat(2000))));
    let mut open = gateway.open(&gateway.chat_bytes(&remote(json!({"stream": true})), &[]));
    open.chunk().unwrap();
    drop(open);
    eventually("it to be noticed", || (gateway.metric("gateway_in_flight_requests", &[]) == 0.0).then_some(()));
    let outcomes = rows(&gateway).into_iter().map(|row| row.2).collect::<Vec<_>>();
    let left = outcomes.iter().any(|outcome| outcome == "aborted");
    assert_eq!(ended(&gateway, if left { 4 } else { 5 })["eligible"], if left { 4 } else { 5 });
}

#[test]
fn a_shadow_that_hangs_holds_nobody_up_and_its_queue_has_an_end() {
    let upstream = Upstream::start();
    upstream.always(Script::Hang(Vec::new()));
    let gateway = shadowed(&upstream, 1.0, "\n[shadow]\nconcurrency = 2\nqueue_max = 3\n");
    for _ in 0..10 {
        let began = Instant::now();
        assert_eq!(gateway.post(&chat_with("x", json!({"max_tokens": 2}))).status, 200);
        assert!(began.elapsed() < Duration::from_secs(5), "a user waited for a shadow");
    }
    eventually("two to run", || (upstream.calls() == 2).then_some(()));
    let funnel = eventually("the others to be shed", || Some(funnel(&gateway)).filter(|funnel| funnel["shed"] == 5));
    assert_eq!((funnel["sampled"], upstream.calls()), (10, 2));
    upstream.release();
}

#[test]
fn shadows_of_our_own_make_way_for_users() {
    let setup = Setup::shipped();
    setup.replace("routes.toml", "{ glimmer-1 = 90, glimmer-2 = 10 }", "{ glimmer-1 = 1 }");
    let rule = "shadow   = { variant = \"glimmer-2\", sample = 1.0 }\ntimeouts =";
    setup.replace("routes.toml", "timeouts =", rule);
    append(&setup.path("routes.toml"), "\n[routes.second]\nsplit = { glimmer-2 = 1 }\n");
    let gateway = setup.start();
    // Copies of long answers keep the second model busy, while users ask it too.
    for _ in 0..6 {
        let streamed = gateway.post(&long(300));
        assert_eq!(streamed.chunks().last().unwrap()["choices"][0]["finish_reason"], "length");
        let mut body = chat_with("12 + 34 = ?", json!({}));
        body["model"] = "second".into();
        assert_eq!(gateway.post(&body).status, 200);
    }
    let funnel = ended(&gateway, 6);
    assert_eq!(funnel["paired"] + funnel["shed"], 6, "{funnel:?}");
    let rows = rows(&gateway);
    let shadows: Vec<_> = rows.iter().filter(|row| row.1 == "shadow").collect();
    assert_eq!(shadows.len(), 6);
    assert!(shadows.iter().all(|row| row.4 == 0 && row.3 == "glimmer-2"));
}

#[test]
fn a_stand_ins_answer_is_the_primarys_failure_and_is_not_compared_with_itself() {
    let upstream = Upstream::start();
    let second = Upstream::start();
    let setup = Setup::upstream(&upstream, "fallback = [\"glimmer-2\"]\nshadow = { variant = \"second\" }");
    setup.add_upstream("other", &second.url(), "second");
    let own = "\n[routes.own]\nsplit = { remote-model = 1 }\nfallback = [\"glimmer-2\"]\nshadow = { variant = \"glimmer-2\" }\n";
    append(&setup.path("routes.toml"), own);
    let gateway = setup.start();
    let broken = || Script::Raw(response("500 Internal Server Error", &[], "{}"));
    upstream.plays(broken());
    assert_eq!(gateway.post(&remote(json!({"max_tokens": 4}))).header("x-glassgate-model"), Some("glimmer-2"));
    assert_eq!(ended(&gateway, 1)["primary_failed"], 1);
    upstream.plays(broken());
    let mut body = remote(json!({"max_tokens": 4}));
    body["model"] = "own".into();
    assert_eq!(gateway.post(&body).header("x-glassgate-model"), Some("glimmer-2"));
    assert_eq!(ended(&gateway, 1)["eligible"], 1, "it was the shadow that answered");
}

#[test]
fn what_a_shadow_runs_into_keeps_no_user_away() {
    let upstream = Upstream::start();
    let setup = Setup::upstream(&upstream, "");
    let route = "\n[routes.mirrored]\nsplit = { glimmer-1 = 1 }\nshadow = { variant = \"remote-model\" }\n";
    append(&setup.path("routes.toml"), route);
    let gateway = setup.start();
    upstream.plays(Script::Raw(response("429 Too Many Requests", &[("retry-after", "60")], "{}")));
    let mut body = chat_with("x", json!({"max_tokens": 1}));
    body["model"] = "mirrored".into();
    assert_eq!(gateway.post(&body).status, 200);
    assert_eq!(ended(&gateway, 1)["shed"], 1);
    assert_eq!(gateway.post(&remote(json!({}))).status, 200);
}

#[test]
fn a_variant_is_not_compared_with_itself_and_a_hit_was_compared_before() {
    let upstream = Upstream::start();
    let setup = Setup::upstream(&upstream, "cache = { ttl = \"10m\" }\nshadow = { variant = \"glimmer-2\" }");
    append(
        &setup.path("routes.toml"),
        "\n[routes.own]\nsplit = { glimmer-2 = 1 }\nshadow = { variant = \"glimmer-2\" }\n",
    );
    let gateway = setup.start();
    let mut own: Value = chat_with("x", json!({"max_tokens": 1}));
    own["model"] = "own".into();
    assert_eq!(gateway.post(&own).status, 200);
    for expected in ["miss", "hit"] {
        assert_eq!(gateway.post(&remote(json!({"max_tokens": 4}))).header("x-glassgate-cache"), Some(expected));
    }
    assert_eq!(ended(&gateway, 1)["paired"], 1);
}
