//! What a request costs, from the price file to the ledger; and price lists of others.

use std::process::Output;

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::evidence::ledger;
use crate::support::gateway::{Setup, TestGateway, chat_with, remote};
use crate::support::upstream::{Script, Upstream, response, usage};

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Everything of the assistant is answered by one model at prices of a test's own.
fn priced(lines: &str) -> Setup {
    let setup = Setup::shipped();
    setup.replace("routes.toml", "glimmer-1 = 90, glimmer-2 = 10", "glimmer-1 = 1");
    setup.replace("prices.toml", "input = 0.02\noutput = 0.08\n", &format!("{lines}\n[unused]\n"));
    setup.replace(
        "prices.toml",
        "[unused]\ndevice_hour = 0.10           # what the machine costs us; gives the provider cost",
        "",
    );
    setup
}

fn billed_each(setup: Setup, texts: &[&str]) -> Vec<(u64, u64, u64)> {
    let gateway = setup.start();
    for text in texts {
        assert_eq!(gateway.post(&chat_with(text, json!({"max_tokens": 3, "ignore_eos": true}))).status, 200);
    }
    eventually("every row", || (gateway.metric("gateway_ledger_queue_rows", &[]) == 0.0).then_some(()));
    let rows = ledger(&gateway);
    rows.iter().map(|row| (row.tokens[0] + row.tokens[1], row.tokens[3], row.billed)).collect()
}

#[test]
fn a_long_prompt_is_billed_by_its_tier_and_every_request_its_fee() {
    let setup = priced("input = 1\noutput = 2\nrequest = 0.000_5\n[[models.glimmer-1.tier]]\nabove = 40\ninput = 10");
    let long = "Sort these words: ".to_owned() + &"pear apple plum ".repeat(10);
    let rows = billed_each(setup, &["2+2?", &long]);
    let [(short_prompt, _, short), (long_prompt, _, long)] = rows[..] else { panic!("{rows:?}") };
    assert!(short_prompt <= 40 && long_prompt > 40, "{rows:?}");
    assert_eq!(short, short_prompt * 1_000 + 3 * 2_000 + 500_000);
    assert_eq!(long, long_prompt * 10_000 + 3 * 2_000 + 500_000, "what a tier does not name costs what it does below");
}

#[test]
fn a_price_holds_from_its_day_on() {
    let setup = priced(
        "input = 1\n[[models.glimmer-1.change]]\nfrom = \"2020-01-01\"\ninput = 3\noutput = 0\n[[models.glimmer-1.change]]\nfrom = \"2120-01-01T00:00:00+02:00\"\ninput = 9",
    );
    let shown: Value = serde_json::from_slice(&setup.run(&["prices", "show", "--json"]).stdout).unwrap();
    assert_eq!(shown["models"]["glimmer-1"]["input"], "3");
    assert_eq!(shown["models"]["glimmer-1"]["later"][0]["input"], "9");
    let rows = billed_each(setup, &["2+2?"]);
    assert_eq!(rows[0].2, rows[0].0 * 3_000);
}

#[test]
fn a_model_without_a_price_is_free_and_its_rows_say_so() {
    let setup = Setup::shipped();
    setup.replace("routes.toml", "glimmer-1 = 90, glimmer-2 = 10", "glimmer-2 = 1");
    let path = setup.path("prices.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.split("[models.glimmer-2]").next().unwrap()).unwrap();
    let gateway = setup.start();
    assert_eq!(gateway.post(&chat_with("2+2?", json!({}))).status, 200);
    eventually("every row", || (gateway.metric("gateway_ledger_queue_rows", &[]) == 0.0).then_some(()));
    let db = rusqlite::Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let row = db.query_row("SELECT model, unpriced, output_tokens > 0, billed_nano_usd FROM ledger", [], |row| {
        Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
    });
    let (model, unpriced, used, billed): (String, bool, bool, i64) = row.unwrap();
    assert_eq!((model.as_str(), unpriced, used, billed), ("glimmer-2", true, true, 0));
}

/// Reserved at the dearest of what a prompt and an answer can become, so that no budget is overshot.
#[test]
fn cached_tokens_may_cost_more_than_others_and_are_reserved_so() {
    let setup = priced("input = 1\ncache_read = 5\noutput = 1").limited(1_000_000_000, 10_000, "0.000_1");
    let gateway = setup.start();
    // 5,000 nano-dollars a token of the prompt are reserved: 20 of them are the budget.
    let refused = gateway.post(&chat_with("Add 1 and 2, please: what is it? Say a number.", json!({"max_tokens": 1})));
    assert_eq!(refused.status, 429, "{}", refused.json());
    assert_eq!(refused.json()["error"]["code"], "insufficient_quota");
}

#[test]
fn lists_of_others_become_lines_that_check_takes() {
    let setup = Setup::shipped();
    let list = setup.0.path().join("list.json");
    let model = json!({"input_cost_per_token": 1.5e-7, "output_cost_per_token": 6e-7, "input_cost_per_image": 0.1,
        "cache_read_input_token_cost": 7.5e-8, "input_cost_per_token_above_128k_tokens": 3e-7,
        "input_cost_per_token_flex": 7.5e-8, "output_cost_per_token_flex": 3e-7, "input_cost_per_audio_token": 1e-6,
        "input_cost_per_token_above_128k_tokens_priority": 6e-7, "input_cost_per_token_priority": 3e-7});
    std::fs::write(&list, json!({"theirs": model}).to_string()).unwrap();
    let list = list.to_str().unwrap();
    let import = |model: &str| setup.run(&["prices", "import", "--from", "litellm", list, "--model", model]);

    let output = import("glimmer-2=theirs");
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("theirs: input_cost_per_audio_token is not imported"), "{}", stderr(&output));
    let path = setup.path("prices.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let kept = text.split("[models.glimmer-2]").next().unwrap();
    std::fs::write(&path, format!("{kept}{}", stdout(&output))).unwrap();
    let output = setup.run(&["check"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let shown: Value = serde_json::from_slice(&setup.run(&["prices", "show", "--json"]).stdout).unwrap();
    let price = &shown["models"]["glimmer-2"];
    assert_eq!(
        (&price["input"], &price["cache_read"], &price["reasoning"]),
        (&json!("0.15"), &json!("0.075"), &json!("0.6"))
    );
    assert_eq!((&price["tier"][0]["above"], &price["tier"][0]["input"]), (&json!(128_000), &json!("0.3")));

    assert_eq!(price["image"], "0.100000000");
    let [flex, priority] = ["flex", "priority"].map(|service| &price["service"][service]);
    assert_eq!((&flex["input"], &flex["output"]), (&json!("0.075"), &json!("0.3")));
    assert_eq!(
        (&flex["tier"], &flex["image"]),
        (&price["tier"], &price["image"]),
        "what it does not say is as without it"
    );
    assert_eq!((&priority["tier"][0]["input"], &priority["output"]), (&json!("0.6"), &json!("0.6")));

    for (model, said) in [("glimmer-2=thiers", "Did you mean `theirs`?"), ("glimmer-2", "must be NAME=THEIRS")] {
        let output = import(model);
        assert!(!output.status.success() && stderr(&output).contains(said), "{}", stderr(&output));
    }
    let output = setup.run(&["prices", "import", "--from", "litellm", list]);
    assert!(stderr(&output).contains("say --model NAME=THEIRS"), "{}", stderr(&output));
}

/// A route to an upstream with dearer and cheaper service, and a price for images.
fn served() -> (Upstream, Setup) {
    let upstream = Upstream::start();
    let setup = Setup::upstream(&upstream, "");
    let theirs = "cache_read = 0.01\noutput = 0.12\n";
    let more = "image = 0.000_1\n[models.remote-model.service.flex]\ninput = 0.02\n\
                [models.remote-model.service.priority]\ninput = 0.3\noutput = 1.2\nimage = 0.000_2\n";
    setup.replace("prices.toml", theirs, &format!("{theirs}{more}"));
    (upstream, setup)
}

/// Service, images and billed of each row, in order.
fn served_rows(gateway: &TestGateway, count: usize) -> Vec<(Option<String>, u32, u32)> {
    let db = rusqlite::Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let mut query =
        db.prepare("SELECT service_tier, images, billed_nano_usd FROM ledger ORDER BY started_ns, request_id").unwrap();
    eventually("the rows", || {
        let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
        let rows = rows.collect::<rusqlite::Result<Vec<_>>>().unwrap();
        (rows.len() == count).then_some(rows)
    })
}

#[test]
fn an_answer_costs_what_the_service_costs_that_the_upstream_says_it_got() {
    let (upstream, setup) = served();
    let gateway = setup.start();
    // Eleven tokens of prompt, three of them cached; three of an answer. What flex does not name costs what others do.
    let [standard, flex, priority] =
        [8 * 30 + 3 * 10 + 3 * 120, 8 * 20 + 3 * 10 + 3 * 120, 8 * 300 + 3 * 10 + 3 * 1200];
    let cases = [
        (json!({}), None, standard),
        (json!({"service_tier": "flex"}), Some("flex"), flex),
        (json!({"service_tier": "priority", "stream": true}), Some("priority"), priority),
        (json!({"service_tier": "auto"}), Some("default"), standard),
        (json!({"service_tier": "batch"}), Some("batch"), standard),
        (json!({"service_tier": null}), None, standard),
    ];
    for (asked, told, cost) in &cases {
        let answer = gateway.post(&remote(asked.clone()));
        assert_eq!(answer.status, 200, "{asked}");
        let last = if asked["stream"] == true { answer.chunks().pop().unwrap() } else { answer.json() };
        assert_eq!(last["service_tier"].as_str(), *told, "{asked}");
        assert_eq!(last["glassgate"]["cost_usd"], format!("0.{cost:09}"), "{asked}");
    }
    let passed: Vec<_> = upstream.asked().iter().map(|asked| asked.body["service_tier"].clone()).collect();
    assert_eq!(passed, cases.clone().map(|(asked, ..)| asked["service_tier"].clone()), "as the client said it");
    let rows = served_rows(&gateway, cases.len());
    assert_eq!(rows, cases.map(|(_, told, cost)| (told.map(str::to_owned), 0, cost)));
    let unpriced =
        |service: &str| gateway.metric("gateway_unpriced_service_tiers_total", &[&format!("service=\"{service}\"")]);
    assert_eq!((unpriced("batch"), unpriced("flex"), unpriced("default")), (1.0, 0.0, 0.0));

    // Another word than was asked for, one that nobody knows, and none.
    let told = |service: Value| {
        let choice = json!({"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"});
        let body = json!({"choices": [choice], "usage": usage(3), "service_tier": service});
        Script::Raw(response("200 OK", &[], &body.to_string()))
    };
    for (told, expected) in
        [(told(json!("priority")), None), (told(json!("turbo")), Some("other")), (told(json!(7)), None)]
    {
        upstream.plays(told);
        let answer = gateway.post(&remote(json!({"service_tier": "flex"}))).json();
        assert_eq!(
            (&answer["service_tier"], &answer["glassgate"]["cost_usd"]),
            (&Value::Null, &json!(format!("0.{standard:09}")))
        );
        let row = served_rows(&gateway, upstream.calls()).pop().unwrap();
        assert_eq!((row.0.as_deref(), row.2), (expected, standard));
    }
    assert_eq!(unpriced("other"), 1.0);
    assert!(gateway.stderr().contains("a service tier that was not asked for"));
}

/// With the dearest service that it can get: the budget has room for one request that names it, or for one that names none.
#[test]
fn the_dearest_service_that_a_request_can_get_is_reserved() {
    for (asked, is_let_in) in [
        (json!({"service_tier": "default"}), true),
        (json!({"service_tier": "flex"}), true),
        (json!({"service_tier": "priority"}), false),
        (json!({"service_tier": "auto"}), false),
        (json!({}), false),
    ] {
        let (_upstream, setup) = served();
        let gateway = setup.limited(1_000_000_000, 10_000, "0.000_02").start();
        let mut asked = asked;
        asked["max_tokens"] = 50.into();
        assert_eq!(gateway.post(&remote(asked.clone())).status, if is_let_in { 200 } else { 429 }, "{asked}");
    }
}

#[test]
fn images_are_counted_reserved_and_billed() {
    let (_upstream, setup) = served();
    let gateway = setup.limited(1_000_000_000, 10_000, "0.001_5").start();
    let image = json!({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}});
    let with = |images: usize| {
        let parts: Vec<Value> =
            [json!({"type": "text", "text": "What is it?"})].into_iter().chain(vec![image.clone(); images]).collect();
        json!({"max_tokens": 5, "service_tier": "default", "messages": [{"role": "user", "content": parts}]})
    };
    let tokens = 8 * 30 + 3 * 10 + 3 * 120;
    let answer = gateway.post(&remote(with(2)));
    assert_eq!((answer.status, answer.header("x-glassgate-cost")), (200, Some(&*format!("0.{:09}", tokens + 200_000))));
    assert_eq!(served_rows(&gateway, 1), [(Some("default".to_owned()), 2, tokens + 200_000)]);
    let refused = gateway.post(&remote(with(13)));
    assert_eq!(refused.json()["error"]["code"], "insufficient_quota", "thirteen more are beyond the budget");
}
