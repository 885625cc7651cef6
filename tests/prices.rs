//! What a request costs, from the price file to the ledger; and price lists of others.

use std::process::Output;

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::evidence::ledger;
use crate::support::gateway::{Setup, chat_with};

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
        "cache_read_input_token_cost": 7.5e-8, "input_cost_per_token_above_128k_tokens": 3e-7});
    std::fs::write(&list, json!({"theirs": model}).to_string()).unwrap();
    let list = list.to_str().unwrap();
    let import = |model: &str| setup.run(&["prices", "import", "--from", "litellm", list, "--model", model]);

    let output = import("glimmer-2=theirs");
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("theirs: input_cost_per_image is not imported"), "{}", stderr(&output));
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

    for (model, said) in [("glimmer-2=thiers", "Did you mean `theirs`?"), ("glimmer-2", "must be NAME=THEIRS")] {
        let output = import(model);
        assert!(!output.status.success() && stderr(&output).contains(said), "{}", stderr(&output));
    }
    let output = setup.run(&["prices", "import", "--from", "litellm", list]);
    assert!(stderr(&output).contains("say --model NAME=THEIRS"), "{}", stderr(&output));
}
