//! The response cache: the same answer once more, for nothing, and never across a wall.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::gateway::{Setup, TestGateway, chat_with, remote, replace};
use crate::support::http::{self, Response};
use crate::support::upstream::{Script, Upstream, delta, response, stream_of, words};

fn cached(ttl: &str) -> TestGateway {
    let setup = Setup::shipped();
    setup.replace("routes.toml", "timeouts =", &format!("cache    = {{ ttl = \"{ttl}\" }}\ntimeouts ="));
    // Another version's answers are others.
    setup.replace("routes.toml", "glimmer-1 = 90, glimmer-2 = 10", "glimmer-1 = 1");
    setup.start()
}

fn cached_upstream(upstream: &Upstream, more: &str) -> TestGateway {
    Setup::upstream(upstream, &format!("cache = {{ ttl = \"10m\" }}\n{more}")).start()
}

fn found(response: &Response) -> &str {
    response.header("x-glassgate-cache").expect("every answer says")
}

fn with_key(gateway: &TestGateway, key: &str, body: &Value) -> Response {
    gateway.send(&http::post("/v1/chat/completions", Some(key.trim()), &[], body.to_string().as_bytes()))
}

/// (cache, outcome, tokens, billed, provider's cost) of every row.
fn rows(gateway: &TestGateway) -> Vec<(String, String, i64, i64, i64)> {
    eventually("nobody in flight", || (gateway.metric("gateway_in_flight_requests", &[]) == 0.0).then_some(()));
    eventually("all rows", || (gateway.metric("gateway_ledger_queue_rows", &[]) == 0.0).then_some(()));
    let db = rusqlite::Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let mut query = db
        .prepare("SELECT cache, outcome, input_tokens + cache_read_tokens + output_tokens + reasoning_tokens, billed_nano_usd, provider_cost_nano_usd FROM ledger ORDER BY request_id, attempt")
        .unwrap();
    let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?)));
    rows.unwrap().collect::<rusqlite::Result<_>>().unwrap()
}

#[test]
fn the_same_request_gets_the_same_answer_for_nothing_whole_and_streamed() {
    let gateway = cached("10m");
    let ask = |more: Value| gateway.post(&chat_with("What is Glassgate?", more));
    let first = ask(json!({}));
    assert_eq!(found(&first), "miss");
    let again = ask(json!({"user": "somebody"}));
    assert_eq!(found(&again), "hit");
    let (first_body, body) = (first.json(), again.json());
    assert_eq!(body["choices"], first_body["choices"]);
    assert_eq!(body["usage"], first_body["usage"], "usage as first produced");
    assert_ne!(body["id"], first_body["id"], "an answer of its own");
    assert_eq!(
        (again.header("x-glassgate-cost"), body["glassgate"]["cost_usd"].as_str()),
        (Some("0.000000000"), Some("0.000000000"))
    );

    let streamed = ask(json!({"stream": true, "stream_options": {"include_usage": true}}));
    assert_eq!((found(&streamed), streamed.header("x-glassgate-cost-max")), ("hit", Some("0.000000000")));
    let chunks = streamed.chunks();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, first_body["choices"][0]["message"]["content"].as_str().unwrap());
    assert_eq!(chunks.last().unwrap()["usage"], first_body["usage"]);

    // What was streamed first is replayed whole too.
    let streamed = gateway.post(&chat_with("12 + 34 = ?", json!({"stream": true})));
    assert_eq!(found(&streamed), "miss");
    assert_eq!(found(&gateway.post(&chat_with("12 + 34 = ?", json!({})))), "hit");

    let rows = rows(&gateway);
    let told: Vec<(&str, &str)> = rows.iter().map(|row| (row.0.as_str(), row.1.as_str())).collect();
    assert_eq!(
        told,
        [("miss", "answered"), ("hit", "answered"), ("hit", "answered"), ("miss", "answered"), ("hit", "answered")]
    );
    assert_eq!(rows[0].2, rows[1].2);
    assert!(rows[0].3 > 0 && rows[1].3 == 0 && rows[1].4 == 0);
    assert_eq!(gateway.metric("gateway_cache_requests_total", &["route=\"assistant\"", "result=\"hit\""]), 3.0);
    assert_eq!(gateway.metric("gateway_requests_total", &["cache=\"hit\""]), 3.0);
    assert_eq!(gateway.metric("gateway_time_to_first_token_seconds_count", &[]), 2.0, "hits say nothing of a model");
}

#[test]
fn only_what_must_be_the_same_is_answered_the_same() {
    let gateway = cached("10m");
    for (name, fields, expected) in [
        ("sampled", json!({"temperature": 1}), "none"),
        ("nothing said", json!({"temperature": null}), "none"),
        ("greedy", json!({"temperature": 0}), "hit"),
        ("seeded", json!({"temperature": 1, "seed": 7}), "hit"),
    ] {
        let body = chat_with("Sort: 9 4 7 1", fields);
        gateway.post(&body);
        assert_eq!(found(&gateway.post(&body)), expected, "{name}");
    }
    let body = chat_with("Sort: 9 4 7 1", json!({}));
    for (name, asked) in [("another bound", json!({"max_tokens": 3})), ("another stop", json!({"stop": "4"}))] {
        assert_eq!(found(&gateway.post(&chat_with("Sort: 9 4 7 1", asked))), "miss", "{name}");
    }
    let fresh = gateway.send(&gateway.chat_bytes(&body, &[("cache-control", "no-cache")]));
    assert_eq!(found(&fresh), "none", "whoever wants a fresh answer gets one");
    // A route may say that any answer will do.
    replace(&gateway.config("routes.toml"), "ttl = \"10m\"", "ttl = \"10m\", sampled = true");
    assert_eq!(gateway.admin("POST", "/admin/reload").status, 200);
    let body = chat_with("Sort: 9 4 7 1", json!({"temperature": 1}));
    gateway.post(&body);
    assert_eq!(found(&gateway.post(&body)), "hit");
}

#[test]
fn tenants_are_walls_and_keys_of_one_tenant_are_not() {
    let gateway = cached("10m");
    let colleague = gateway.cli(&["keys", "create", "colleague"]);
    let stranger = gateway.cli(&["keys", "create", "stranger", "--tenant", "other"]);
    // One variant for all of them.
    let body = chat_with("What is Glassgate?", json!({"user": "one"}));
    eventually("the keys to count", || {
        (with_key(&gateway, &stranger, &chat_with("x", json!({}))).status == 200).then_some(())
    });
    assert_eq!(found(&gateway.post(&body)), "miss");
    assert_eq!(found(&with_key(&gateway, &colleague, &body)), "hit");
    assert_eq!(found(&with_key(&gateway, &stranger, &body)), "miss");
    assert_eq!(found(&with_key(&gateway, &stranger, &body)), "hit");
}

#[test]
fn an_answer_is_kept_as_long_as_its_route_says() {
    let gateway = cached("300ms");
    let body = chat_with("What is Glassgate?", json!({}));
    gateway.post(&body);
    assert_eq!(found(&gateway.post(&body)), "hit");
    eventually("the answer to be too old", || (found(&gateway.post(&body)) == "miss").then_some(()));
}

#[test]
fn the_cache_has_a_bound_in_bytes() {
    let upstream = Upstream::start();
    let setup = Setup::upstream(&upstream, "cache = { ttl = \"10m\" }");
    let text = std::fs::read_to_string(setup.path("gateway.toml")).unwrap() + "\n[cache]\nmax = \"64KiB\"\n";
    std::fs::write(setup.path("gateway.toml"), text).unwrap();
    let gateway = setup.start();
    upstream.always(Script::Answer(words(&"word ".repeat(400))));
    for seed in 0..60 {
        assert_eq!(found(&gateway.post(&remote(json!({"seed": seed})))), "miss");
        assert!(gateway.metric("gateway_cache_bytes", &[]) <= 65536.0);
    }
    assert!(gateway.metric("gateway_cache_bytes", &[]) > 16384.0, "it is used");
    // Larger than its share: answered, and not kept.
    upstream.always(Script::Answer(words(&"word ".repeat(4000))));
    for _ in 0..2 {
        assert_eq!(found(&gateway.post(&remote(json!({"seed": 1000})))), "miss");
    }
}

/// Until so many wait for somebody else's answer.
fn waiting(gateway: &TestGateway, count: usize) {
    let all = || gateway.metric("gateway_cache_waiting_requests", &[]) == count as f64;
    eventually("all to wait", || all().then_some(()));
}

#[test]
fn whoever_waited_for_anothers_answer_gets_it_however_long_it_took() {
    let upstream = Upstream::start();
    let times = "timeouts = { first_token = \"300ms\", idle = \"30s\", total = \"60s\" }";
    let gateway = cached_upstream(&upstream, times);
    upstream.always(Script::Gated(words("Hello from upstream.")));
    // A whole answer has no first token to wait for; who streams the same meanwhile waits as long.
    let answers = thread::scope(|scope| {
        let leader = scope.spawn(|| gateway.post(&remote(json!({}))));
        eventually("the call", || (upstream.calls() == 1).then_some(()));
        let followers = scope.spawn(|| crowd(&gateway, 4, |i| remote(json!({"stream": i % 2 == 0}))));
        waiting(&gateway, 4);
        let since = Instant::now();
        eventually("longer than a first token may take", || {
            (since.elapsed() > Duration::from_millis(400)).then_some(())
        });
        upstream.release();
        assert_eq!(leader.join().unwrap().status, 200);
        followers.join().unwrap()
    });
    for answer in answers {
        assert_eq!((answer.status, found(&answer)), (200, "coalesced"), "{}", String::from_utf8_lossy(&answer.body));
    }
    assert_eq!(upstream.calls(), 1);
}

#[test]
fn a_changed_server_or_a_shorter_time_counts_for_what_is_kept_already() {
    let upstream = Upstream::start();
    let gateway = cached_upstream(&upstream, "");
    let body = remote(json!({}));
    gateway.post(&body);
    assert_eq!(found(&gateway.post(&body)), "hit");
    let reload = |from: &str, to: &str| {
        replace(&gateway.config("routes.toml"), from, to);
        assert_eq!(gateway.admin("POST", "/admin/reload").status, 200);
    };
    reload("/v1\"", "/v2\"");
    assert_eq!(found(&gateway.post(&body)), "miss", "another path may be another model");
    assert_eq!(found(&gateway.post(&body)), "hit");
    reload("ttl = \"10m\"", "ttl = \"1ms\"");
    assert_eq!(found(&gateway.post(&body)), "miss");
}

/// Sends the same request from so many clients at once.
fn crowd(gateway: &TestGateway, count: usize, body: impl Fn(usize) -> Value + Sync) -> Vec<Response> {
    thread::scope(|scope| {
        let body = &body;
        let clients: Vec<_> = (0..count).map(|i| scope.spawn(move || gateway.post(&body(i)))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    })
}

#[test]
fn of_many_who_ask_the_same_at_once_one_asks_the_model_and_pays() {
    let upstream = Upstream::start();
    let gateway = cached_upstream(&upstream, "");
    upstream.always(Script::Gated(words("Hello from upstream.")));
    let answers = thread::scope(|scope| {
        let crowd = scope.spawn(|| crowd(&gateway, 12, |i| remote(json!({"stream": i % 2 == 0}))));
        waiting(&gateway, 11);
        eventually("one call", || (upstream.calls() == 1).then_some(()));
        upstream.release();
        crowd.join().unwrap()
    });
    assert_eq!(upstream.calls(), 1);
    let count = |how: &str| answers.iter().filter(|answer| found(answer) == how).count();
    assert_eq!((count("miss"), count("coalesced")), (1, 11));
    assert!(answers.iter().all(|answer| String::from_utf8_lossy(&answer.body).contains("upstream.")));
    let rows = rows(&gateway);
    assert_eq!(rows.iter().filter(|row| row.3 > 0).count(), 1, "one pays: {rows:?}");
    assert!(rows.iter().all(|row| row.1 == "answered" && row.2 == rows[0].2));
}

#[test]
fn when_the_one_who_asked_leaves_the_next_one_asks() {
    let upstream = Upstream::start();
    let gateway = cached_upstream(&upstream, "");
    upstream.always(Script::Gated(words("Hello from upstream.")));
    let leader = gateway.open_unread(&gateway.chat_bytes(&remote(json!({})), &[]));
    eventually("the first call", || (upstream.calls() == 1).then_some(()));
    let answers = thread::scope(|scope| {
        let crowd = scope.spawn(|| crowd(&gateway, 5, |_| remote(json!({}))));
        waiting(&gateway, 5);
        assert_eq!(upstream.calls(), 1);
        let left = Instant::now();
        drop(leader);
        eventually("the second call", || (upstream.calls() == 2).then_some(()));
        // The first one's server says nothing for as long as it is listened to; nobody else waits for that.
        assert!(left.elapsed() < Duration::from_secs(5), "{:?}", left.elapsed());
        upstream.release();
        crowd.join().unwrap()
    });
    assert_eq!(upstream.calls(), 2);
    assert!(answers.iter().all(|answer| answer.status == 200));
    assert_eq!(answers.iter().filter(|answer| found(answer) == "coalesced").count(), 4);
    let rows = rows(&gateway);
    assert_eq!(rows.iter().filter(|row| row.1 == "aborted").count(), 1, "{rows:?}");
    assert_eq!(rows.iter().filter(|row| row.1 == "answered" && row.3 > 0).count(), 1, "{rows:?}");
}

#[test]
fn who_waits_may_leave_too_and_owes_nothing() {
    let upstream = Upstream::start();
    let gateway = cached_upstream(&upstream, "");
    upstream.always(Script::Gated(words("Hello from upstream.")));
    let leader = gateway.open_unread(&gateway.chat_bytes(&remote(json!({})), &[]));
    eventually("the first call", || (upstream.calls() == 1).then_some(()));
    let follower = gateway.open_unread(&gateway.chat_bytes(&remote(json!({})), &[]));
    waiting(&gateway, 1);
    drop(follower);
    eventually("its leaving to be noticed", || {
        (gateway.metric("gateway_in_flight_requests", &[]) == 1.0).then_some(())
    });
    upstream.release();
    drop(leader);
    let rows = rows(&gateway);
    assert_eq!(rows.len(), 2);
    assert_eq!(rows.iter().filter(|row| row.1 == "released" && row.2 + row.3 == 0).count(), 1, "{rows:?}");
}

#[test]
fn errors_cuts_and_stand_ins_are_never_kept() {
    let upstream = Upstream::start();
    let gateway = cached_upstream(&upstream, "fallback = [\"glimmer-2\"]");
    let body = remote(json!({"max_tokens": 8}));
    upstream.plays(Script::Raw(response("500 Internal Server Error", &[], "{}")));
    let stood_in = gateway.post(&body);
    assert_eq!((stood_in.status, stood_in.header("x-glassgate-model")), (200, Some("glimmer-2")));
    let own = gateway.post(&body);
    assert_eq!((found(&own), own.header("x-glassgate-model")), ("miss", Some("remote-model")));
    upstream.plays(Script::Raw(response("400 Bad Request", &[], r#"{"error":{"message":"no"}}"#)));
    let other = remote(json!({"max_tokens": 9}));
    assert_eq!(gateway.post(&other).status, 400);
    assert_eq!(found(&gateway.post(&other)), "miss");
    // A stream that its client leaves is no answer for others.
    upstream.plays(Script::Hang(stream_of(&[delta(json!({"content": "Half "}), None)])));
    let long = remote(json!({"stream": true, "seed": 5}));
    let mut open = gateway.open(&gateway.chat_bytes(&long, &[]));
    open.chunk().unwrap();
    drop(open);
    upstream.release();
    rows(&gateway);
    let again = gateway.post(&long);
    assert_eq!((found(&again), again.chunks().len() > 3), ("miss", true));
}
