//! `shared` in `[limits]`: the four limits of a key that several gateways know are one for all of them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use crate::callers::code;
use crate::shared;
use crate::support::eventually;
use crate::support::evidence::ledger;
use crate::support::gateway::{Setup, TestGateway, chat_with, remote};
use crate::support::http::{self, Response};
use crate::support::redis::Redis;
use crate::support::upstream::{Script, Upstream, words};

/// Keys by name, and what each may do.
type Keys<'k> = [(&'k str, &'k [&'k str])];

/// Three gateways that know the same keys, as `config export` and `import` bring them from one to the next, and the keys.
fn trio(redis: &str, upstream: &Upstream, sharing: &str, keys: &Keys<'_>) -> (Vec<TestGateway>, Vec<String>) {
    let setup = || {
        let setup = shared::setup(redis, "10s", upstream, "");
        setup.replace("gateway.toml", "[limits]\n", &format!("[limits]\n{sharing}\n"));
        setup
    };
    let run = |setup: &Setup, args: &[&str]| {
        let output = setup.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let first = setup();
    let made = keys.iter().map(|(name, limits)| run(&first, &[&["keys", "create", name][..], limits].concat()));
    let made: Vec<String> = made.collect();
    let (data, export) = (first.0.path().join("data"), first.path("export.toml"));
    std::fs::write(&export, run(&first, &["config", "export"])).unwrap();
    let others = (0..2).map(|_| {
        let other = setup();
        std::fs::create_dir_all(other.0.path().join("data")).unwrap();
        std::fs::copy(data.join("pepper"), other.0.path().join("data/pepper")).unwrap();
        run(&other, &["config", "import", export.to_str().unwrap()]);
        other
    });
    let setups: Vec<Setup> = others.collect();
    let gateways = setups.into_iter().chain([first]).map(|setup| {
        // Nobody was made a key of their own: there are some.
        std::fs::write(setup.0.path().join("data/quickstart.key"), &made[0]).unwrap();
        setup.start()
    });
    (gateways.collect(), made)
}

fn ask(gateway: &TestGateway, key: &str, body: &Value) -> Response {
    gateway.send(&http::post("/v1/chat/completions", Some(key), &[], body.to_string().as_bytes()))
}

fn short() -> Value {
    remote(json!({"max_tokens": 4}))
}

/// Of a bucket of so many a minute, the most that all may have had since it was full.
fn most(limit: f64, since: Instant) -> usize {
    (limit + limit / 60.0 * since.elapsed().as_secs_f64()).ceil() as usize
}

/// Of a model of ours the price is known before: it is what is billed.
fn priced() -> Value {
    chat_with("Count.", json!({"max_tokens": 6, "ignore_eos": true}))
}

/// All ask until they have been refused often: so many answers were let in.
fn spend(gateways: &[TestGateway], key: &str) -> usize {
    let asked = priced();
    let (let_in, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for number in 0..6 {
            let (gateway, let_in, refused, asked) = (&gateways[number % 3], &let_in, &refused, &asked);
            scope.spawn(move || {
                while refused.load(Ordering::Relaxed) < 9 {
                    let response = ask(gateway, key, asked);
                    assert!(response.status == 200 || code(&response) == "insufficient_quota", "{}", code(&response));
                    let count = if response.status == 200 { let_in } else { refused };
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let_in.into_inner()
}

/// What each answer of ours cost, once so many are in the ledgers.
fn billed(gateways: &[TestGateway], answers: usize) -> (u64, u64) {
    let rows = eventually("all rows", || {
        let rows = gateways.iter().flat_map(ledger).map(|row| row.billed).collect::<Vec<u64>>();
        (rows.len() == answers).then_some(rows)
    });
    (rows.iter().sum(), rows[0])
}

#[test]
fn the_limits_of_a_key_are_exact_over_three_gateways_that_ask_each_time_also_when_they_are_edited() {
    const BUDGET: u64 = 30_000;
    let (mut redis, upstream) = (Redis::start(), Upstream::start());
    let keys: &Keys<'_> = &[
        ("money", &["--usd-per-day", "0.00003"]),
        ("requests", &["--rpm", "30"]),
        ("tokens", &["--tpm", "600"]),
        ("places", &["--concurrency", "6"]),
    ];
    let (gateways, keys) = trio(&redis.url(), &upstream, "shared = \"strict\"\ndown = \"closed\"", keys);
    let [money, requests, tokens, places] = [0, 1, 2, 3].map(|at: usize| keys[at].as_str());

    let let_in = spend(&gateways, money);
    let (all, each) = billed(&gateways, let_in);
    assert!(all <= BUDGET && all + each > BUDGET && let_in > 9, "{all} of {BUDGET}, {each} each");
    let mut more = 0;
    for gateway in &gateways {
        gateway.cli(&["keys", "edit", "money", "--usd-per-day", "0.00006", "--rpm", "599"]);
        eventually("the edit", || {
            let response = ask(gateway, money, &priced());
            more += usize::from(response.status == 200);
            (response.header("x-ratelimit-limit-requests") == Some("599")).then_some(())
        });
    }
    more += spend(&gateways, money);
    let (all, each) = billed(&gateways, let_in + more);
    assert!(all <= 2 * BUDGET && all + each > 2 * BUDGET, "{all} of {}, {each} each", 2 * BUDGET);

    let began = Instant::now();
    let let_in = shared::race(&gateways, 120, |gateway| ask(gateway, requests, &short()));
    assert!((30..=most(30.0, began)).contains(&let_in), "{let_in}");
    let refused = ask(&gateways[1], requests, &short());
    let limit = &refused.json()["error"]["limit"];
    assert_eq!((&limit["rule"], &limit["limit"]), (&json!("requests_per_minute"), &json!(30)), "{limit}");

    // What an answer used is the same for each: the mock counts.
    let began = Instant::now();
    let let_in = shared::race(&gateways, 120, |gateway| ask(gateway, tokens, &short()));
    let used = ask(&gateways[0], requests, &short());
    assert_eq!(used.status, 429);
    assert!(let_in > 3 && let_in < 120, "{let_in}");
    let spent: u64 = gateways
        .iter()
        .flat_map(|gateway| {
            let sums: Value = serde_json::from_str(&gateway.cli(&["spend", "--by", "key", "--json"])).unwrap();
            sums.as_array().unwrap().clone()
        })
        .filter(|sum| sum["name"].as_str().unwrap().starts_with("tokens"))
        .map(|sum| sum["input_tokens"].as_u64().unwrap() + sum["output_tokens"].as_u64().unwrap())
        .sum();
    assert!(spent as usize <= most(600.0, began), "{spent}");

    upstream.always(Script::Gated(words("Hello.")));
    let before = upstream.calls();
    std::thread::scope(|scope| {
        let asks: Vec<_> = (0..18)
            .map(|number| {
                let gateway = &gateways[number % 3];
                scope.spawn(move || ask(gateway, places, &short()))
            })
            .collect();
        eventually("the others to be refused", || {
            (asks.iter().filter(|ask| ask.is_finished()).count() == 12).then_some(())
        });
        // Those that were let in may still be on their way.
        eventually("six to run", || (upstream.calls() - before == 6).then_some(()));
        upstream.always(Script::Answer(words("Hello.")));
        upstream.release();
    });

    redis.server.kill();
    assert_eq!(code(&ask(&gateways[0], tokens, &short())), "limits_unavailable");
}

#[test]
fn the_limits_of_a_key_on_leases_are_never_passed_and_without_the_store_each_gateway_holds_its_part() {
    const BUDGET: u64 = 30_000;
    let (mut redis, upstream) = (Redis::start(), Upstream::start());
    let keys: &Keys<'_> =
        &[("money", &["--usd-per-day", "0.00003"]), ("requests", &["--rpm", "120"]), ("apart", &["--rpm", "6"])];
    let (gateways, keys) = trio(&redis.url(), &upstream, "shared = \"5%\"\ndown = \"local\"", keys);
    let let_in = spend(&gateways, &keys[0]);
    let (all, _) = billed(&gateways, let_in);
    // A lease and an answer may be left to each.
    assert!((BUDGET * 6 / 10..=BUDGET).contains(&all), "{all}");
    let began = Instant::now();
    let let_in = shared::race(&gateways, 300, |gateway| ask(gateway, &keys[1], &short()));
    assert!((120 - 3 * 12..=most(120.0, began)).contains(&let_in), "{let_in}");

    redis.server.kill();
    let told = |response: Response| (response.status, response.header("x-ratelimit-mode") == Some("local"));
    let answers: Vec<(u16, bool)> =
        (0..4).map(|_| told(ask(&gateways[0], &keys[2], &short()))).filter(|(_, is_local)| *is_local).collect();
    assert_eq!(answers[..2], [(200, true), (200, true)], "a third of six are two");
    assert_eq!(ask(&gateways[0], &keys[2], &short()).status, 429);
}
