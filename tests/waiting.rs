//! `wait` in a rule: room comes, or it does not.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::eventually;
use crate::support::gateway::{Setup, TestGateway, append, long, remote};
use crate::support::http;
use crate::support::upstream::{Script, Upstream, words};

/// One at a time may ask a server that answers when the test lets it.
fn one_at_a_time(upstream: &Upstream, wait: &str) -> TestGateway {
    let setup = Setup::upstream(upstream, "");
    setup.replace("gateway.toml", "[listen]", "[listen]\nthreads = 4");
    let rule = format!("\n[[limits.rules]]\nname = \"one\"\nlimit = 1\nof = \"concurrency\"\nwait = \"{wait}\"\n");
    append(&setup.path("gateway.toml"), &rule);
    setup.start()
}

fn in_flight(gateway: &TestGateway, count: f64) {
    eventually("all to be there", || (gateway.metric("gateway_in_flight_requests", &[]) == count).then_some(()));
}

#[test]
fn who_waits_is_let_in_when_there_is_room_and_told_how_long_it_took() {
    let upstream = Upstream::start();
    let gateway = one_at_a_time(&upstream, "30s");
    upstream.always(Script::Gated(words("Hello.")));
    std::thread::scope(|scope| {
        let asks: Vec<_> = (0..4).map(|_| scope.spawn(|| gateway.post(&remote(json!({}))))).collect();
        in_flight(&gateway, 4.0);
        assert!(upstream.calls() <= 1, "the others wait here");
        upstream.always(Script::Answer(words("Hello.")));
        upstream.release();
        let answers: Vec<_> = asks.into_iter().map(|ask| ask.join().unwrap()).collect();
        assert!(answers.iter().all(|answer| answer.status == 200));
        let waited = answers.iter().filter_map(|answer| answer.header("x-glassgate-waited-ms"));
        assert_eq!(waited.count(), 3, "all but the first");
    });
    assert_eq!(gateway.metric("gateway_reserved_tokens", &[]), 0.0);
    let at_once = gateway.post(&remote(json!({})));
    assert_eq!((at_once.status, at_once.header("x-glassgate-waited-ms")), (200, None));
}

#[test]
fn who_waits_too_long_is_refused_by_the_limit_and_who_hangs_up_leaves_the_line() {
    let upstream = Upstream::start();
    let gateway = one_at_a_time(&upstream, "400ms");
    upstream.always(Script::Gated(words("Hello.")));
    let mut running = None;
    std::thread::scope(|scope| {
        let first = scope.spawn(|| gateway.post(&remote(json!({}))));
        eventually("the first to be there", || (upstream.calls() == 1).then_some(()));
        let began = Instant::now();
        let refused = gateway.post(&remote(json!({})));
        assert!(began.elapsed() >= Duration::from_millis(400));
        assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (429, Some("waited_too_long")));
        let limit = &refused.json()["error"]["limit"];
        assert_eq!((&limit["rule"], &limit["reserved"], &limit["limit"]), (&json!("one"), &json!(1), &json!(1)));
        let body = remote(json!({})).to_string();
        let leaver = gateway.open_unread(&http::post("/v1/chat/completions", Some(&gateway.key), &[], body.as_bytes()));
        in_flight(&gateway, 2.0);
        drop(leaver);
        in_flight(&gateway, 1.0);
        upstream.release();
        running = Some(first.join().unwrap());
    });
    assert_eq!(running.unwrap().status, 200);
    upstream.always(Script::Answer(words("Hello.")));
    assert_eq!(gateway.post(&remote(json!({}))).status, 200);
    assert_eq!(gateway.post(&long(2)).status, 200);
    assert_eq!(upstream.calls(), 2, "who was refused or left never reached it");
}
