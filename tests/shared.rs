//! `shared` in a rule: several real gateways count together in a real Redis, and hold to what each rule says where it is out
//! of reach.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::eventually;
use crate::support::evidence::ledger;
use crate::support::fault::{FaultProxy, Faults};
use crate::support::gateway::{Setup, TestGateway, append, chat_with, remote};
use crate::support::http::Response;
use crate::support::redis::Redis;
use crate::support::upstream::{Script, Upstream, words};

/// How long a gateway is believed to live without a sign of life, and how often the others look.
const LIFE: Duration = Duration::from_secs(10);

/// A configuration that asks a mock, with rules that are counted at `redis`. A test's store may be slow to answer on a busy
/// machine, and is given so long.
pub fn setup(redis: &str, deadline: &str, upstream: &Upstream, rules: &str) -> Setup {
    let setup = Setup::upstream(upstream, "");
    setup.env("REDIS_URL", redis);
    setup.replace("gateway.toml", "[listen]", "[listen]\nthreads = 2");
    let storage = format!("[storage]\nredis = \"env:REDIS_URL\"\nredis_deadline = \"{deadline}\"");
    setup.replace("gateway.toml", "[storage]", &storage);
    setup.replace("gateway.toml", "[limits]", "[limits]\nreplicas = 3");
    append(&setup.path("gateway.toml"), rules);
    setup
}

pub fn rule(name: &str, limit: &str, of: &str, more: &str) -> String {
    format!("\n[[limits.rules]]\nname = \"{name}\"\nlimit = {limit}\nof = \"{of}\"\n{more}\n")
}

fn gateways(count: usize, redis: &str, upstream: &Upstream, rules: &str) -> Vec<TestGateway> {
    (0..count).map(|_| setup(redis, "10s", upstream, rules).start()).collect()
}

fn post(gateway: &TestGateway) -> Response {
    gateway.post(&remote(json!({"max_tokens": 4})))
}

fn code(response: &Response) -> String {
    if response.status == 200 { "ok".into() } else { response.json()["error"]["code"].as_str().unwrap().to_owned() }
}

/// Sends so many over all gateways at once: how many were let in. The others were refused by the limit.
pub fn race(gateways: &[TestGateway], requests: usize, ask: impl Fn(&TestGateway) -> Response + Sync) -> usize {
    let (next, let_in) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                while let Some(number) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|number| *number < requests)
                {
                    let response = ask(&gateways[number % gateways.len()]);
                    match response.status {
                        200 => let_in.fetch_add(1, Ordering::Relaxed),
                        status => {
                            assert_eq!(status, 429, "{}", code(&response));
                            continue;
                        }
                    };
                }
            });
        }
    });
    let_in.into_inner()
}

#[test]
fn three_gateways_let_in_exactly_the_strict_limit_together_and_the_mock_has_seen_no_more() {
    let (redis, upstream) = (Redis::start(), Upstream::start());
    let strict = rule("day", "90", "requests", "per = \"day\"\nshared = \"strict\"\ndown = \"closed\"");
    let gateways = gateways(3, &redis.url(), &upstream, &strict);
    assert_eq!((race(&gateways, 300, post), upstream.calls()), (90, 90));
    let refused = post(&gateways[1]);
    assert_eq!(code(&refused), "rate_limit_exceeded");
    let limit = &refused.json()["error"]["limit"];
    assert_eq!((&limit["rule"], &limit["used"], &limit["limit"]), (&json!("day"), &json!(90), &json!(90)), "{limit}");
    assert_eq!(refused.header("x-ratelimit-remaining-requests"), Some("0"));
}

#[test]
fn three_gateways_on_leases_never_pass_the_limit_and_use_it_up_but_for_a_lease_each() {
    let (redis, upstream) = (Redis::start(), Upstream::start());
    let leased = rule("day", "200", "requests", "per = \"day\"\nshared = \"5%\"\ndown = \"closed\"");
    let gateways = gateways(3, &redis.url(), &upstream, &leased);
    let let_in = race(&gateways, 500, post);
    assert_eq!(let_in, upstream.calls());
    assert!((200 - 3 * 20..=200).contains(&let_in), "{let_in}");
    // What one has left over goes back, and another may have it.
    eventually("all of it to be used", || {
        let _ = post(&gateways[2]);
        (upstream.calls() == 200).then_some(())
    });
    assert_eq!(race(&gateways, 30, post), 0);
}

#[test]
fn a_rule_that_is_put_while_they_serve_is_shared_too() {
    let (redis, upstream) = (Redis::start(), Upstream::start());
    let gateways = gateways(2, &redis.url(), &upstream, "");
    for gateway in &gateways {
        let words = ["--limit", "3", "--of", "requests", "--per", "day", "--shared", "strict", "--down", "closed"];
        gateway.cli(&[&["limits", "put", "day"][..], &words].concat());
        eventually("the rule to bind", || {
            let rules: Vec<String> = gateway.admin("GET", "/admin/limits?key=quickstart").json()["rules"]
                .as_array()?
                .iter()
                .map(|rule| rule["name"].to_string())
                .collect();
            rules.contains(&"\"day\"".to_owned()).then_some(())
        });
    }
    assert_eq!(race(&gateways, 10, post), 3);
    let shown = gateways[0].admin("GET", "/admin/rules/day").json();
    assert_eq!((&shown["shared"], &shown["down"]), (&json!("strict"), &json!("closed")), "{shown}");
}

#[test]
fn a_budget_that_three_gateways_share_is_not_overshot_by_a_nano_dollar() {
    const BUDGET: u64 = 60_000;
    let (redis, upstream) = (Redis::start(), Upstream::start());
    let strict = rule("day", "0.00006", "usd", "per = \"day\"\nstrict = true\nshared = \"strict\"\ndown = \"closed\"");
    let gateways = gateways(3, &redis.url(), &upstream, &strict);
    // Of a model of ours the price is known before: it is what is billed.
    let asked = chat_with("Count.", json!({"max_tokens": 6, "ignore_eos": true}));
    let (let_in, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for number in 0..9 {
            let (gateway, let_in, refused, asked) = (&gateways[number % 3], &let_in, &refused, &asked);
            scope.spawn(move || {
                while refused.load(Ordering::Relaxed) < 9 {
                    let response = gateway.post(asked);
                    assert!(matches!(code(&response).as_str(), "ok" | "insufficient_quota"), "{}", code(&response));
                    let count = if response.status == 200 { let_in } else { refused };
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let let_in = let_in.into_inner();
    let billed = eventually("all rows", || {
        let rows = gateways.iter().flat_map(ledger).map(|row| row.billed).collect::<Vec<u64>>();
        (rows.len() == let_in).then_some(rows)
    });
    let (all, each) = (billed.iter().sum::<u64>(), billed[0]);
    println!("{let_in} were let in and billed {all} of {BUDGET}, {each} each");
    assert!(all <= BUDGET && all + each > BUDGET && let_in > 20, "{all} of {BUDGET}, {each} each");
}

#[test]
fn no_more_run_at_a_time_than_may_on_all_gateways_and_a_place_is_there_again_for_who_comes_next() {
    let (redis, upstream) = (Redis::start(), Upstream::start());
    let places = rule("places", "6", "concurrency", "shared = \"20%\"\ndown = \"closed\"");
    let gateways = gateways(3, &redis.url(), &upstream, &places);
    upstream.always(Script::Gated(words("Hello.")));
    std::thread::scope(|scope| {
        let asks: Vec<_> = (0..18)
            .map(|number| {
                scope.spawn({
                    let gateway = &gateways[number % 3];
                    move || post(gateway)
                })
            })
            .collect();
        // All but those that run are refused.
        eventually("the others to be refused", || {
            (asks.iter().filter(|ask| ask.is_finished()).count() == 12).then_some(())
        });
        assert_eq!(upstream.calls(), 6);
        upstream.always(Script::Answer(words("Hello.")));
        upstream.release();
        let answers: Vec<Response> = asks.into_iter().map(|ask| ask.join().unwrap()).collect();
        let refused: Vec<String> = answers.iter().map(code).filter(|code| code != "ok").collect();
        assert_eq!(
            (refused.len(), refused.iter().all(|code| code == "concurrency_limited")),
            (12, true),
            "{refused:?}"
        );
    });
    // One after the other on one gateway: each finds the place of the one before.
    for _ in 0..20 {
        assert_eq!(code(&post(&gateways[0])), "ok");
    }
}

/// A route for each thing that a rule can say for when the store is away, and one that no shared rule is about.
const MODES: [&str; 4] = ["local", "open", "closed", "free"];

/// A gateway that reaches its store through a network that misbehaves.
struct Chaos {
    redis: Redis,
    proxy: FaultProxy,
    gateway: TestGateway,
}

impl Chaos {
    fn start(upstream: &Upstream) -> Chaos {
        let redis = Redis::start();
        let proxy = FaultProxy::start(([127, 0, 0, 1], redis.server.port).into(), 1);
        let rules = MODES[..3].iter().map(|down| {
            let more =
                format!("per = \"day\"\nshared = \"strict\"\ndown = \"{down}\"\nonly = {{ route = \"{down}\" }}");
            rule(down, "100_000", "requests", &more)
        });
        let setup = setup(&format!("redis://{}", proxy.address), "250ms", upstream, &rules.collect::<String>());
        for mode in MODES {
            append(&setup.path("routes.toml"), &format!("\n[routes.{mode}]\nsplit = {{ remote-model = 1 }}\n"));
        }
        let chaos = Chaos { redis, proxy, gateway: setup.start() };
        chaos.is_up(true);
        chaos
    }

    fn ask(&self, route: &str) -> (String, bool, Duration) {
        let (mut body, began) = (remote(json!({"max_tokens": 4})), Instant::now());
        body["model"] = route.into();
        let response = self.gateway.post(&body);
        (code(&response), response.header("x-ratelimit-mode") == Some("local"), began.elapsed())
    }

    fn is_up(&self, up: bool) {
        eventually("the gauge to say so", || {
            let gauge = self.gateway.metric("gateway_store_up", &["store=\"redis\""]);
            (gauge == f64::from(u8::from(up))).then_some(())
        });
    }

    /// While it is out of reach everybody is answered, in time, as the rule says.
    fn holds_without(&self, what: &str) {
        // From the first request on, before anybody knows.
        for round in 0..6 {
            for (route, expected) in
                MODES.iter().zip([("ok", true), ("ok", false), ("limits_unavailable", false), ("ok", false)])
            {
                let (code, is_local, took) = self.ask(route);
                assert_eq!((code.as_str(), is_local), expected, "{what}: {route}, round {round}");
                assert!(took < Duration::from_secs(5), "{what}: {route} took {took:?}");
            }
        }
        self.is_up(false);
        assert_eq!(self.gateway.admin_get("/readyz").status, 200, "{what}: it serves");
    }

    fn is_back(&self, what: &str) {
        self.is_up(true);
        for route in MODES {
            let (code, is_local, _) = self.ask(route);
            assert_eq!((code.as_str(), is_local), ("ok", false), "{what} is over: {route}");
        }
    }
}

#[test]
fn whatever_happens_to_the_store_each_rule_holds_as_it_says_and_nobody_hangs() {
    let upstream = Upstream::start();
    let mut chaos = Chaos::start(&upstream);
    chaos.is_back("nothing");
    let none = Faults::default();
    let on_the_way = [
        ("slow", Faults { latency: Duration::from_secs(2), ..none.clone() }),
        ("a blackhole", Faults { blackhole: true, ..none.clone() }),
        ("garbage", Faults { garbage_after: Some(0), ..none.clone() }),
        ("resets", Faults { reset_after: Some(20), ..none.clone() }),
        ("half-closed", Faults { close_after: Some(3), ..none.clone() }),
    ];
    for (what, faults) in on_the_way {
        chaos.proxy.to_client(faults);
        chaos.holds_without(what);
        chaos.proxy.heal();
        chaos.is_back(what);
    }
    chaos.redis.server.freeze();
    chaos.holds_without("frozen");
    chaos.redis.server.thaw();
    chaos.is_back("frozen");
    chaos.redis.server.kill();
    chaos.holds_without("killed");
    chaos.redis.server.restart();
    chaos.is_back("killed");
    // What has no room for another byte, or is a copy, takes no writes.
    chaos.redis.ask(&["config", "set", "maxmemory", "1"]);
    chaos.holds_without("full");
    chaos.redis.ask(&["config", "set", "maxmemory", "0"]);
    chaos.is_back("full");
    // Somebody else's data under our names is written over.
    let key = chaos.redis.ask(&["keys", "*c:closed:*"]);
    for wrong in [["lpush", &key, "x", "y"].as_slice(), &["set", &key, "text"]] {
        chaos.redis.ask(&["del", &key]);
        chaos.redis.ask(wrong);
        assert_eq!(chaos.ask("closed").0, "ok", "{wrong:?}");
    }
    chaos.redis.ask(&["script", "flush"]);
    eventually("the script to be there again", || (chaos.ask("closed").0 == "ok").then_some(()));
    let bad = chaos.gateway.stderr();
    assert!(!bad.contains("panicked"), "{bad}");
}

#[test]
fn slices_and_jitter_on_the_way_to_the_store_are_no_fault() {
    let upstream = Upstream::start();
    let chaos = Chaos::start(&upstream);
    chaos.proxy.to_client(Faults { slice_bytes: Some(40), jitter: Duration::from_millis(5), ..Faults::default() });
    for _ in 0..20 {
        assert_eq!(chaos.ask("closed").0, "ok");
    }
}

#[test]
fn a_store_that_was_never_there_leaves_each_gateway_its_part_of_the_limit() {
    let upstream = Upstream::start();
    let mut redis = Redis::start();
    redis.server.kill();
    let rules = rule("day", "7", "requests", "per = \"day\"\nshared = \"strict\"");
    let gateway = setup(&redis.url(), "250ms", &upstream, &rules).start();
    for _ in 0..2 {
        let response = post(&gateway);
        assert_eq!((code(&response).as_str(), response.header("x-ratelimit-mode")), ("ok", Some("local")));
    }
    assert_eq!(code(&post(&gateway)), "rate_limit_exceeded", "a third of seven are two");
    // It comes, and is told what was used meanwhile.
    redis.server.restart();
    eventually("the store", || (gateway.metric("gateway_store_up", &["store=\"redis\""]) == 1.0).then_some(()));
    let answers: Vec<String> = (0..8)
        .map(|_| post(&gateway))
        .map(|response| if response.status == 200 { "ok".into() } else { response.json().to_string() })
        .collect();
    assert_eq!(answers.iter().filter(|a| *a == "ok").count(), 5, "{answers:#?} {}", redis.ask(&["keys", "*"]));
}

#[test]
fn what_was_taken_ahead_is_used_up_before_anybody_notices_that_the_store_is_gone() {
    let (mut redis, upstream) = (Redis::start(), Upstream::start());
    let rules = rule("day", "20", "requests", "per = \"day\"\nshared = \"50%\"\ndown = \"closed\"");
    let gateway = setup(&redis.url(), "10s", &upstream, &rules).start();
    // One, and half of the limit ahead.
    assert_eq!(code(&post(&gateway)), "ok");
    redis.server.kill();
    let answers: Vec<String> = (0..11).map(|_| code(&post(&gateway))).collect();
    assert!(answers[..10].iter().all(|code| code == "ok"), "{answers:?}");
    assert_eq!(answers[10], "limits_unavailable");
}

#[test]
fn a_store_that_has_forgotten_everything_is_told_what_was_spent_today() {
    let (redis, upstream) = (Redis::start(), Upstream::start());
    let rules = rule("day", "8", "requests", "per = \"day\"\nshared = \"strict\"\ndown = \"closed\"");
    let gateways = gateways(2, &redis.url(), &upstream, &rules);
    for gateway in [0, 0, 0, 1, 1] {
        assert_eq!(code(&post(&gateways[gateway])), "ok");
    }
    redis.ask(&["flushall"]);
    let let_in = (0..8).map(|number| post(&gateways[number % 2])).filter(|response| response.status == 200).count();
    assert_eq!((let_in, upstream.calls()), (3, 8));
}

#[test]
fn what_a_killed_gateway_held_is_back_or_counted_within_its_time_and_counted_once() {
    let (redis, upstream) = (Redis::start(), Upstream::start());
    let rules = [
        rule("places", "4", "concurrency", "shared = \"strict\"\ndown = \"closed\""),
        rule("day", "10", "requests", "per = \"day\"\nshared = \"strict\"\ndown = \"closed\""),
        rule("month", "10", "requests", "per = \"month\"\nshared = \"50%\"\ndown = \"closed\""),
    ];
    let mut gateways = gateways(2, &redis.url(), &upstream, &rules.concat());
    upstream.always(Script::Gated(words("Hello.")));
    let bytes = gateways[0].chat_bytes(&remote(json!({"max_tokens": 4})), &[]);
    let _held: Vec<_> = (0..4).map(|_| gateways[0].open_unread(&bytes)).collect();
    eventually("all places to be taken", || (upstream.calls() == 4).then_some(()));
    assert_eq!(code(&post(&gateways[1])), "concurrency_limited");
    upstream.always(Script::Answer(words("Hello.")));
    gateways[0].child.kill().unwrap();
    gateways[0].child.wait().unwrap();
    let killed = Instant::now();
    eventually("the places to be free", || (post(&gateways[1]).status == 200).then_some(()));
    assert!(killed.elapsed() <= LIFE + Duration::from_secs(5), "{:?}", killed.elapsed());
    // Its next life finds in its ledger what the others have counted already: four, and this one. What it had ahead beyond
    // that is there again.
    gateways[0].restart();
    let let_in = (0..12).map(|number| post(&gateways[number % 2])).filter(|response| response.status == 200).count();
    assert_eq!(let_in, 5);
}

#[test]
fn a_gateway_that_is_stopped_gives_back_what_it_had_ahead() {
    let (redis, upstream) = (Redis::start(), Upstream::start());
    let rules = rule("day", "20", "requests", "per = \"day\"\nshared = \"50%\"\ndown = \"closed\"");
    let mut gateways = gateways(2, &redis.url(), &upstream, &rules);
    assert_eq!(code(&post(&gateways[0])), "ok");
    gateways[0].stop();
    assert_eq!((race(&gateways[1..], 30, post), upstream.calls()), (19, 20));
}

#[test]
fn a_password_opens_the_store_and_is_told_to_nobody() {
    let upstream = Upstream::start();
    let redis = Redis::start_with(&["--requirepass", "open-sesame-93"]);
    let rules = rule("day", "8", "requests", "per = \"day\"\nshared = \"strict\"\ndown = \"closed\"");
    let port = redis.server.port;
    for (password, expected) in [("open-sesame-93", "ok"), ("wrong-sesame-93", "limits_unavailable")] {
        let gateway = setup(&format!("redis://:{password}@127.0.0.1:{port}/3"), "10s", &upstream, &rules).start();
        assert_eq!(code(&post(&gateway)), expected);
        let told = [gateway.stderr(), gateway.stdout(), gateway.metrics()].concat();
        assert!(!told.contains("sesame"), "{told}");
    }
}

#[test]
fn the_way_to_the_store_is_encrypted_where_that_is_asked_and_only_to_one_that_is_trusted() {
    let (upstream, folder) = (Upstream::start(), tempfile::tempdir().unwrap());
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(path("key.pem"), made.signing_key.serialize_pem()).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let redis = Redis::start_with(&[
        "--tls-port",
        &port,
        "--tls-cert-file",
        &path("cert.pem"),
        "--tls-key-file",
        &path("key.pem"),
        "--tls-auth-clients",
        "no",
    ]);
    let rules = rule("day", "8", "requests", "per = \"day\"\nshared = \"strict\"\ndown = \"closed\"");
    let plain = redis.server.port.to_string();
    let other = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    std::fs::write(path("other.pem"), other.cert.pem()).unwrap();
    for (host, port, trusted, expected) in [
        ("localhost", &port, "cert.pem", "ok"),
        ("localhost", &port, "other.pem", "limits_unavailable"),
        // A name that the certificate is not of.
        ("127.0.0.1", &port, "cert.pem", "limits_unavailable"),
        // A server that speaks in the clear is none.
        ("localhost", &plain, "cert.pem", "limits_unavailable"),
    ] {
        let setup = setup(&format!("rediss://{host}:{port}"), "10s", &upstream, &rules);
        setup.env("SSL_CERT_FILE", &path(trusted));
        assert_eq!(code(&post(&setup.start())), expected, "{host}:{port} {trusted}");
    }
    assert_eq!(upstream.calls(), 1);
}
