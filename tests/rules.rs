//! `[[limits.rules]]`: limits by whatever tells callers apart, several at once, hard and soft.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::support::evidence::ledger;
use crate::support::gateway::{Setup, TestGateway, append, chat_with, long, remote, replace};
use crate::support::http::{self, Response};
use crate::support::upstream::{Script, Upstream, response, words};
use crate::support::{eventually, root};

/// A gateway with rules of its own beside the limits of every key.
fn with_rules(rules: &str) -> TestGateway {
    let setup = Setup::shipped();
    append(&setup.path("gateway.toml"), rules);
    setup.start()
}

fn key(gateway: &TestGateway, name: &str, tenant: &str) -> String {
    let key = gateway.cli(&["keys", "create", name, "--tenant", tenant]).trim().to_owned();
    eventually("the key to be known", || {
        (gateway.send(&http::get("/v1/models", Some(&key))).status == 200).then_some(())
    });
    key
}

fn ask(gateway: &TestGateway, key: &str, body: &Value) -> Response {
    gateway.send(&http::post("/v1/chat/completions", Some(key), &[], body.to_string().as_bytes()))
}

fn exactly(tokens: u64) -> Value {
    chat_with("Count.", json!({"max_tokens": tokens, "ignore_eos": true}))
}

/// What a refusal says of the limit, to programs.
fn limit(response: &Response) -> Value {
    assert_eq!(response.status, 429, "{}", String::from_utf8_lossy(&response.body));
    response.json()["error"]["limit"].clone()
}

#[test]
fn a_tenants_keys_share_its_limits_and_what_these_refuse_costs_a_key_nothing() {
    let gateway = with_rules(
        r#"
        [[limits.rules]]
        name = "acme-requests"
        limit = 3
        of = "requests"
        per = "day"
        by = ["tenant"]
        only = { tenant = "acme" }
        "#,
    );
    let (one, two) = (key(&gateway, "one", "acme"), key(&gateway, "two", "acme"));
    let left = |response: &Response| response.header("x-ratelimit-remaining-requests").unwrap().to_owned();
    for (key, remaining) in [(&one, "2"), (&two, "1"), (&one, "0")] {
        let response = ask(&gateway, key, &exactly(1));
        assert_eq!((response.status, left(&response).as_str()), (200, remaining));
        assert_eq!(response.header("x-ratelimit-limit-requests"), Some("3"), "the tightest limit is told");
    }
    let tokens = |response: &Response| response.header("x-ratelimit-remaining-tokens").unwrap().to_owned();
    let refused = [&one, &two, &two].map(|key| ask(&gateway, key, &exactly(1)));
    assert_eq!(tokens(&refused[1]), tokens(&refused[2]), "what is refused takes nothing");
    let said = limit(&refused[1]);
    let wait = said["retry_after_ms"].as_u64().unwrap();
    assert!((1..=86_400_000).contains(&wait), "{said}");
    assert_eq!(refused[1].header("retry-after-ms"), Some(wait.to_string().as_str()));
    assert!(said["resets_at"].as_str().unwrap().ends_with("T00:00:00Z"), "{said}");
    let of = |name: &str| said[name].clone();
    assert_eq!(
        ["rule", "scope", "of", "per", "limit", "used", "reserved", "requested"].map(of),
        [
            json!("acme-requests"),
            json!("tenant"),
            json!("requests"),
            json!("day"),
            json!(3),
            json!(3),
            json!(0),
            json!(1)
        ]
    );
    let message = refused[1].json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.starts_with("This tenant may make 3 requests a day"), "{message}");
    assert_eq!(gateway.post(&exactly(1)).status, 200, "nobody else is held up");
    let denied = ["scope=\"tenant\"", "kind=\"requests\"", "decision=\"denied\""];
    assert_eq!(gateway.metric("gateway_limit_decisions_total", &denied), 3.0);
    assert_eq!(gateway.metric("gateway_limit_decisions_total", &["scope=\"key\"", "decision=\"denied\""]), 0.0);
}

#[test]
fn rules_by_model_bind_once_it_is_known_which_and_their_places_are_free_again() {
    let gateway = with_rules(
        r#"
        [[limits.rules]]
        name = "one-at-a-time"
        limit = 1
        of = "concurrency"
        by = ["key", "route"]
        [[limits.rules]]
        name = "answers"
        limit = 2000
        of = "output_tokens"
        per = "minute"
        exact = true
        "#,
    );
    let (one, two) = (key(&gateway, "one", "acme"), key(&gateway, "two", "acme"));
    let body = |key: &str| http::post("/v1/chat/completions", Some(key), &[], long(900).to_string().as_bytes());
    let mut running = gateway.open(&body(&one));
    running.chunk().unwrap();
    let said = limit(&ask(&gateway, &one, &exactly(1)));
    assert_eq!(
        (&said["rule"], &said["scope"], &said["reserved"]),
        (&json!("one-at-a-time"), &json!("key_route"), &json!(1))
    );
    let mut other = gateway.open(&body(&two));
    other.chunk().unwrap();
    drop((running, other));
    eventually("both places", || {
        [&one, &two].iter().all(|key| ask(&gateway, key, &exactly(1)).status == 200).then_some(())
    });
    assert_eq!(ask(&gateway, &one, &exactly(1000)).status, 200, "what was cut came back");
    let said = limit(&ask(&gateway, &two, &exactly(1000)));
    assert_eq!((&said["rule"], &said["scope"], &said["limit"]), (&json!("answers"), &json!("everybody"), &json!(2000)));
    assert!(said["used"].as_u64().unwrap() >= 1000, "{said}");
}

#[test]
fn a_soft_budget_warns_and_is_counted_and_a_restart_forgives_neither_it_nor_a_month() {
    let mut gateway = with_rules(
        r#"
        [[limits.rules]]
        name = "team-month"
        limit = 0.000001
        of = "usd"
        per = "month"
        by = ["tenant"]
        zone = "Europe/Berlin"
        mode = "soft"
        [[limits.rules]]
        name = "acme-tokens"
        limit = 400
        of = "tokens"
        per = "month"
        by = ["tenant"]
        only = { tenant = "acme" }
        "#,
    );
    let one = key(&gateway, "one", "acme");
    let first = ask(&gateway, &one, &exactly(200));
    assert_eq!(first.status, 200);
    let told = first.header("x-glassgate-budget-warning").unwrap();
    assert!(told.starts_with("team-month 0.0000") && told.ends_with("/0.000001000"), "{told}");
    let rows = eventually("the row", || Some(ledger(&gateway)).filter(|rows| rows.len() == 1));
    gateway.kill_and_restart();
    let said = limit(&ask(&gateway, &one, &exactly(200)));
    assert_eq!(
        (&said["rule"], &said["used"]),
        (&json!("acme-tokens"), &json!(rows[0].input + rows[0].output + rows[0].other_tokens))
    );
    let small = ask(&gateway, &one, &exactly(1));
    assert!(small.header("x-glassgate-budget-warning").is_some(), "what was spent before the kill is spent");
    assert_eq!(gateway.metric("gateway_budget_exceeded_total", &["rule=\"team-month\""]), 1.0);
}

#[test]
fn a_spent_budget_that_throttles_lets_some_in_and_tells_the_others_when() {
    let gateway = with_rules(
        r#"
        [[limits.rules]]
        name = "slow"
        limit = 0.000001
        of = "usd"
        per = "day"
        mode = "throttle"
        throttle = "1/minute"
        "#,
    );
    // The first costs more than there is: it takes the minute's turn.
    let first = gateway.post(&exactly(100));
    assert_eq!(first.status, 200);
    assert!(first.header("x-glassgate-budget-warning").unwrap().starts_with("slow "));
    let refused = gateway.post(&exactly(100));
    let said = limit(&refused);
    let wait = said["retry_after_ms"].as_u64().unwrap();
    assert!((1..=60_000).contains(&wait) && said["rule"] == "slow", "{said}");
    assert_eq!(refused.header("x-should-retry"), Some("true"));
    let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("Try again in"), "{message}");
    assert_eq!(gateway.metric("gateway_budget_exceeded_total", &["rule=\"slow\"", "mode=\"throttle\""]), 1.0);
}

#[test]
fn an_edited_rule_counts_at_once_and_keeps_what_was_used() {
    let rule = "\n[[limits.rules]]\nname = \"all\"\nlimit = 1000\nof = \"tokens\"\nper = \"day\"\n";
    let gateway = with_rules(rule);
    assert_eq!(gateway.post(&exactly(500)).status, 200);
    replace(&gateway.config("gateway.toml"), "limit = 1000", "limit = 501");
    assert_eq!(gateway.admin("POST", "/admin/reload").status, 200);
    let said = limit(&gateway.post(&exactly(1)));
    assert_eq!(
        (&said["rule"], &said["limit"], &said["retry_after_ms"].is_null()),
        (&json!("all"), &json!(501), &false)
    );
    let shown = gateway.admin("GET", "/admin/config").json()["rules"].clone();
    assert_eq!(
        shown,
        json!([{"name": "all", "limit": 501, "of": "tokens", "per": "day", "scope": "everybody", "mode": "hard"}])
    );
    replace(&gateway.config("gateway.toml"), "limit = 501", "limit = 5000");
    assert_eq!(gateway.admin("POST", "/admin/reload").status, 200);
    assert_eq!(gateway.post(&exactly(1)).status, 200);
}

/// A server that says it read far more than anybody would estimate, and less than it could have.
#[test]
fn a_strict_budget_is_never_overshot_by_a_server_that_counts_more_than_was_estimated() {
    const BUDGET: f64 = 0.004;
    let upstream = Upstream::start();
    let answer = json!({
        "id": "x", "object": "chat.completion", "created": 1, "model": "their-model",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 4000, "completion_tokens": 2, "total_tokens": 4002},
    });
    upstream.always(Script::Raw(response("200 OK", &[], &answer.to_string())));
    let setup = Setup::upstream(&upstream, "");
    let rule = format!(
        "\n[[limits.rules]]\nname = \"strict\"\nlimit = {BUDGET}\nof = \"usd\"\nper = \"day\"\nstrict = true\n"
    );
    append(&setup.path("gateway.toml"), &rule);
    let gateway = setup.start();
    let (answered, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..10 {
                    match gateway.post(&remote(json!({"max_tokens": 5}))).status {
                        200 => answered.fetch_add(1, Ordering::Relaxed),
                        429 => refused.fetch_add(1, Ordering::Relaxed),
                        other => panic!("{other}"),
                    };
                }
            });
        }
    });
    let (answered, refused) = (answered.into_inner(), refused.into_inner());
    let rows = eventually("the rows", || Some(ledger(&gateway)).filter(|rows| rows.len() == answered));
    let billed: u64 = rows.iter().map(|row| row.billed).sum();
    assert!(billed as f64 <= BUDGET * 1e9, "{billed} nano-dollars");
    assert!(answered > 20 && refused > 5, "this proved nothing: {answered} answered, {refused} refused");
    assert!(rows.iter().all(|row| row.input == 4000), "what was reported is what is billed");
    assert_eq!(gateway.metric("gateway_unbilled_usd_total", &[]), 0.0);
}

#[test]
fn a_rule_that_cannot_be_meant_is_refused_with_its_line() {
    let rule = "[[limits.rules]]\nname = \"r\"\nlimit = 5\nof = \"tokens\"\nper = \"minute\"\n";
    let with = |from: &str, to: &str| rule.replace(from, to);
    let twice = format!("{rule}{rule}");
    for (rules, said) in [
        (twice, "there are two rules called `r`"),
        (with("\"r\"", "\"tokens_per_minute\""), "is what the limit of every key is called"),
        (with("\"r\"", "\"a b\""), "`a b` cannot name a rule"),
        (with("name = \"r\"\n", ""), "a rule needs a `name`, a `limit`"),
        (with("\"tokens\"", "\"token\""), "Did you mean `tokens`?"),
        (with("per = \"minute\"\n", ""), "`r` needs `per`: second, minute, day or month"),
        (with("\"tokens\"", "\"concurrency\""), "`per` means something for what is used up"),
        (with("limit = 5", "limit = 0.5"), "must be a whole number from 1"),
        (with("\"tokens\"", "\"usd\"").replace("limit = 5", "limit = -1"), "US dollars from 0"),
        (format!("{rule}zone = \"UTC\"\n"), "`zone` means something for days and months"),
        (with("minute", "day") + "zone = \"Europe/Bonn\"\n", "there is no time zone `Europe/Bonn`"),
        (with("minute", "day") + "exact = true\n", "`exact` means something for seconds and minutes"),
        (with("minute", "month") + "wait = \"2s\"\n", "`wait` means something for requests and tokens"),
        (format!("{rule}wait = \"61s\"\n"), "must be at most \"60s\""),
        (format!("{rule}mode = \"soft\"\n"), "`mode` means something for days and months"),
        (with("\"tokens\"", "\"requests\"") + "strict = true\n", "`strict` means something for tokens"),
        (with("minute", "day") + "strict = true\nmode = \"soft\"\n", "leave out one of the two"),
        (with("minute", "day") + "mode = \"throttle\"\n", "needs to know how many: `throttle = \"10/minute\"`"),
        (with("minute", "day") + "throttle = \"1/minute\"\n", "`throttle` means something where `mode = \"throttle\"`"),
        (
            with("minute", "day") + "mode = \"throttle\"\nthrottle = \"1/day\"\n",
            "must be requests a second or a minute",
        ),
        (
            format!("{rule}by = [\"keys\"]\n"),
            "`keys` is none of key, user, tenant, route, model, ip. Did you mean `key`?",
        ),
        (
            format!("{rule}only = {{ route = \"asistant\" }}\n"),
            "there is no route `asistant`. Did you mean `assistant`?",
        ),
        (format!("{rule}only = {{ model = \"glimmer-9\" }}\n"), "there is no model `glimmer-9`"),
    ] {
        let setup = Setup::shipped();
        append(&setup.path("gateway.toml"), &format!("\n{rules}"));
        let output = setup.run(&["check"]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() && text.contains(said), "{said:?} is missing in: {text}");
        assert!(text.contains("gateway.toml:"), "{text}");
    }
    let reference = std::fs::read_to_string(root().join("configs/reference.toml")).unwrap();
    assert!(reference.contains("[[limits.rules]]"));
}

#[test]
fn who_stands_in_is_bound_by_the_limits_of_their_own_model_and_who_failed_used_none() {
    let upstream = Upstream::start();
    let setup = Setup::upstream(&upstream, "fallback = [\"glimmer-2\"]");
    let by_model = |name: &str, model: &str, limit: u32| {
        format!(
            "[[limits.rules]]\nname = \"{name}\"\nlimit = {limit}\nof = \"requests\"\nper = \"day\"\n\
             only = {{ model = \"{model}\" }}\n"
        )
    };
    append(&setup.path("gateway.toml"), &by_model("the-remote", "remote-model", 2));
    append(&setup.path("gateway.toml"), &by_model("the-stand-in", "glimmer-2", 2));
    let gateway = setup.start();
    let asked = || gateway.post(&remote(json!({"max_tokens": 4})));

    upstream.always(Script::Raw(response("503 Service Unavailable", &[("retry-after", "0")], "")));
    for _ in 0..2 {
        let response = asked();
        assert_eq!((response.status, response.header("x-glassgate-model")), (200, Some("glimmer-2")));
    }
    let failed = asked();
    assert_eq!(failed.status, 502, "the stand-in has no room, so what the first one said stands: {}", failed.json());
    upstream.always(Script::Answer(words("Hello.")));
    let answered = eventually("the cool-down", || {
        let response = asked();
        (response.status == 200).then_some(response)
    });
    assert_eq!(
        answered.header("x-glassgate-model"),
        Some("remote-model"),
        "what others answered is not counted for it"
    );
    assert_eq!(limit(&asked())["rule"], "the-remote");
}

#[test]
fn a_rule_that_cannot_be_shared_is_refused_and_says_what_is_missing() {
    let rule = "[[limits.rules]]\nname = \"r\"\nlimit = 5\nof = \"usd\"\nper = \"day\"\n";
    let store = "redis = \"redis://127.0.0.1:1\"";
    for (storage, rules, said) in [
        ("", "shared = \"strict\"\ndown = \"open\"", "set `redis` in `[storage]`"),
        ("", "down = \"open\"", "`down` means something for what is `shared`"),
        (store, "shared = \"strict\"", "say how many there are with `limits.replicas`"),
        (store, "shared = \"60%\"\ndown = \"open\"", "a part from \"0.1%\" to \"50%\", not \"60%\""),
        (store, "shared = \"loosely\"\ndown = \"open\"", "must be \"no\", \"strict\" or a part"),
        (store, "shared = \"5%\"\ndown = \"shut\"", "must be \"local\" or \"open\" or \"closed\""),
        (store, "shared = \"5%\"\ndown = \"open\"\nmode = \"throttle\"\nthrottle = \"1/minute\"", "cannot throttle"),
        ("redis = \"http://127.0.0.1\"", "", "`storage.redis` must begin with redis:// or rediss://"),
        ("redis = \"env:NO_SUCH_REDIS\"", "", "the environment variable `NO_SUCH_REDIS` is not set"),
        ("redis_deadline = \"1s\"", "", "means something beside `redis`"),
    ] {
        let setup = Setup::shipped();
        setup.replace("gateway.toml", "[storage]", &format!("[storage]\n{storage}"));
        append(&setup.path("gateway.toml"), &format!("\n{rule}{rules}\n"));
        let output = setup.run(&["check"]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() && text.contains(said), "{said:?} is missing in: {text}");
    }
}
