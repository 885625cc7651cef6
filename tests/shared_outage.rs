//! What a request pays while the store that gateways share is out of reach: at most one wait for it before that is known, and
//! none afterwards.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::shared::{rule, setup};
use crate::support::eventually;
use crate::support::fault::{FaultProxy, Faults};
use crate::support::gateway::{TestGateway, remote};
use crate::support::redis::Redis;
use crate::support::upstream::Upstream;

fn blackhole() -> Faults {
    Faults { blackhole: true, ..Faults::default() }
}

fn calls(gateway: &TestGateway, result: &str) -> f64 {
    gateway.metric("gateway_redis_calls_total", &[&format!("result=\"{result}\"")])
}

fn is_up(gateway: &TestGateway, up: bool) {
    eventually("the gauge to say so", || {
        (gateway.metric("gateway_store_up", &["store=\"redis\""]) == f64::from(u8::from(up))).then_some(())
    });
}

/// So many requests, twelve at a time, which must all be let in; the longest that one took.
fn ask(gateway: &TestGateway, requests: usize) -> Duration {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..12)
            .map(|_| {
                scope.spawn(|| {
                    let mut longest = Duration::ZERO;
                    while next.fetch_add(1, Ordering::Relaxed) < requests {
                        let began = Instant::now();
                        let response = gateway.post(&remote(json!({"max_tokens": 4})));
                        assert_eq!(response.status, 200, "{}", response.json());
                        longest = longest.max(began.elapsed());
                    }
                    longest
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).max().unwrap()
    })
}

#[test]
fn of_those_who_come_after_it_is_known_nobody_waits_for_a_store_that_does_not_answer() {
    let (redis, upstream) = (Redis::start(), Upstream::start());
    let proxy = FaultProxy::start(([127, 0, 0, 1], redis.server.port).into(), 1);
    let more = |shared: &str| format!("per = \"day\"\nshared = \"{shared}\"\ndown = \"open\"");
    let rules =
        rule("strict", "100_000", "requests", &more("strict")) + &rule("leased", "100_000", "tokens", &more("0.1%"));
    let setup = setup(&format!("redis://{}", proxy.address), "500ms", &upstream, &rules);
    setup.replace("gateway.toml", "[limits]", "[limits]\nshared = \"1%\"\ndown = \"open\"");
    let gateway = setup.start();
    is_up(&gateway, true);
    ask(&gateway, 1);
    proxy.to_client(blackhole());
    ask(&gateway, 12);
    is_up(&gateway, false);
    let asked = |result: &[&str]| result.iter().map(|result| calls(&gateway, result)).sum::<f64>();
    let (waited, passed) = (asked(&["answered", "late", "failed"]), asked(&["not_made"]));
    ask(&gateway, 200);
    // What is settled, taken ahead and the sign of life may have been on their way when it was noticed.
    assert!(asked(&["answered", "late", "failed"]) <= waited + 3.0, "nothing is asked of it");
    assert!(asked(&["not_made"]) >= passed + 200.0);
    proxy.heal();
    is_up(&gateway, true);
    let before = asked(&["answered"]);
    ask(&gateway, 20);
    assert!(asked(&["answered"]) >= before + 20.0, "it is asked again");
}

#[test]
fn who_waits_for_somebody_elses_question_does_not_ask_it_again() {
    const DEADLINE: Duration = Duration::from_secs(3);
    let (redis, upstream) = (Redis::start(), Upstream::start());
    let proxy = FaultProxy::start(([127, 0, 0, 1], redis.server.port).into(), 1);
    // A lease of one: everybody has to ask, one after the other.
    let rules = rule("one", "100", "requests", "per = \"day\"\nshared = \"1%\"\ndown = \"open\"");
    let gateway = setup(&format!("redis://{}", proxy.address), "3s", &upstream, &rules).start();
    is_up(&gateway, true);
    ask(&gateway, 1);
    proxy.to_client(blackhole());
    let longest = ask(&gateway, 12);
    // Two questions in a row cannot take less than this.
    assert!(longest < 2 * DEADLINE, "{longest:?}");
}
