//! What clients and operators see of the engine: cached prompts, who waits for whom, and its steps.

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::evidence::{attribute, ledger};
use crate::support::gateway::{Setup, TestGateway, append, chat_with};
use crate::support::http::{self, Response};

/// Some hundred tokens.
fn document(number: u32) -> String {
    (0..40).map(|word| format!("word {number} {word}, ")).collect::<String>() + "what was the last word?"
}

fn ask(gateway: &TestGateway, text: &str, more: Value) -> Value {
    let response = gateway.post(&chat_with(text, more));
    assert_eq!(response.status, 200, "{}", readable(&response));
    response.json()
}

fn readable(response: &Response) -> String {
    String::from_utf8_lossy(&response.body).into_owned()
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

#[test]
fn a_prompt_that_is_known_is_told_as_cached_and_priced_by_the_list() {
    let setup = Setup::shipped();
    setup.replace("routes.toml", "glimmer-1 = 90, glimmer-2 = 10", "glimmer-1 = 1");
    setup.replace("prices.toml", "input = 0.02", "input = 0.02\ncache_read = 0.002");
    let gateway = setup.start();
    let first = ask(&gateway, &document(1), json!({"max_tokens": 4, "ignore_eos": true}));
    let again = ask(&gateway, &document(1), json!({"max_tokens": 4, "ignore_eos": true, "n": 2, "seed": 1}));
    let (prompt, found) = (first["usage"]["prompt_tokens"].as_u64().unwrap(), cached(&again));
    assert_eq!(cached(&first), 0);
    // All but the last token may be found, in whole blocks.
    assert_eq!((found, again["usage"]["prompt_tokens"].as_u64()), ((prompt - 1) / 32 * 32, Some(prompt)));
    assert_eq!(again["choices"][0]["message"], first["choices"][0]["message"]);

    eventually("both rows", || (gateway.metric("gateway_ledger_queue_rows", &[]) == 0.0).then_some(()));
    let rows = ledger(&gateway);
    let row = rows.last().unwrap();
    assert_eq!(row.tokens, [prompt - found, found, 0, 8, 0]);
    assert_eq!(row.billed, (prompt - found) * 20 + found * 2 + 8 * 80);
    assert_eq!(gateway.metric("runtime_prefix_tokens_total", &["glimmer-1", "result=\"hit\""]), found as f64);
    assert_eq!(gateway.metric("gateway_tokens_total", &["tenant=\"default\"", "kind=\"cache_read\""]), found as f64);
    assert_eq!(gateway.metric("runtime_prompt_tokens_total", &["glimmer-1"]), (2 * prompt - found) as f64);
}

#[test]
fn without_a_price_of_its_own_a_cached_prompt_costs_what_it_always_does() {
    let gateway = TestGateway::start();
    let ask = || ask(&gateway, &document(2), json!({"max_tokens": 4, "ignore_eos": true}));
    let (first, again) = (ask(), ask());
    assert!(cached(&again) > 0);
    assert_eq!(again["glassgate"]["cost_usd"], first["glassgate"]["cost_usd"]);
}

#[test]
fn nobody_finds_what_another_tenant_has_asked() {
    let gateway = TestGateway::start();
    let key = gateway.cli(&["keys", "create", "stranger", "--tenant", "strangers"]);
    let body = chat_with(&document(3), json!({"max_tokens": 1})).to_string();
    let ask = |key: &str| {
        let request = http::post("/v1/chat/completions", Some(key), &[("x-session-id", "1")], body.as_bytes());
        let response = gateway.send(&request);
        (response.status == 200).then(|| cached(&response.json()))
    };
    assert_eq!((ask(&gateway.key), ask(&gateway.key).map(|found| found > 0)), (Some(0), Some(true)));
    let found = eventually("the stranger's key to count", || ask(key.trim()));
    assert_eq!(found, 0, "how fast an answer comes would tell what others ask");
}

#[test]
fn who_waits_longer_than_the_route_allows_is_told_when_to_come_back_and_owes_nothing() {
    let setup = Setup::shipped();
    setup.replace("routes.toml", "glimmer-1 = 90, glimmer-2 = 10", "glimmer-1 = 1");
    let hurried = "\n[routes.hurried]\nsplit = { glimmer-1 = 1 }\ntimeouts = { queue = \"1ms\" }\n";
    append(&setup.path("routes.toml"), hurried);
    // The engine holds 1,024 tokens, and a long answer fills most of them.
    setup.replace("gateway.toml", "[models]", "[models]\nkv_cache = \"1MiB\"");
    let gateway = setup.start();
    let more = json!({"stream": true, "max_tokens": 500, "ignore_eos": true});
    let mut open = gateway.open(&gateway.chat_bytes(&chat_with(&document(4), more), &[]));
    open.chunk().expect("its first token");
    let mut second = chat_with(&(document(5) + &document(6)), json!({"max_tokens": 1}));
    second["model"] = "hurried".into();
    let refused = gateway.post(&second);
    assert_eq!((refused.status, code(&refused)), (503, "engine_busy".to_owned()), "{}", readable(&refused));
    assert!(
        refused.header("retry-after").is_some() && readable(&refused).contains("0.001 s"),
        "{}",
        readable(&refused)
    );
    assert_eq!(gateway.metric("runtime_failures_total", &[]), 0.0, "nothing is broken");
    assert_eq!(open.finish().status, 200);
    eventually("both rows", || (ledger(&gateway).len() == 2).then_some(()));
    let rows = ledger(&gateway);
    let row = rows.iter().find(|row| row.outcome == "failed").expect("the row of who was refused");
    assert_eq!((row.tokens, row.billed), ([0; 5], 0));
}

fn code(response: &Response) -> String {
    response.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_client_may_let_others_go_first_and_never_push_itself_forward() {
    let setup = Setup::shipped();
    let text = "\n[routes.nightly]\nsplit = { glimmer-1 = 1 }\npriority = \"batch\"\n";
    append(&setup.path("routes.toml"), text);
    let gateway = setup.start();
    let ask = |route: &str, priority: &str| {
        let mut body = chat_with("12 + 34 = ?", json!({}));
        body["model"] = route.into();
        gateway.send(&gateway.chat_bytes(&body, &[("x-glassgate-priority", priority)]))
    };
    let asked = |class: &str| {
        let label = format!("class=\"{class}\"");
        gateway.metric("runtime_queue_seconds_count", &[&label]) as u64
    };
    assert_eq!(ask("assistant", "interactive").status, 200);
    assert_eq!((asked("interactive"), asked("batch")), (1, 0));
    assert_eq!(ask("assistant", "batch").status, 200);
    assert_eq!((asked("interactive"), asked("batch")), (1, 1));
    let last = ask("nightly", "interactive");
    assert_eq!((asked("interactive"), asked("batch")), (1, 2), "a route that waits waits");
    let refused = ask("assistant", "urgent");
    assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (400, Some("x-glassgate-priority")));

    let id = last.header("x-request-id").unwrap().to_owned();
    let spans = || std::fs::read_to_string(gateway.data_dir().join("traces.jsonl")).unwrap_or_default();
    let priority = eventually("the spans of the last", || {
        let text = spans();
        let line = text.lines().find(|line| line.contains(&id))?;
        let line: Value = serde_json::from_str(line).unwrap();
        let spans = line["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array()?.clone();
        spans.iter().find_map(|span| attribute(span, "glassgate.priority"))
    });
    assert_eq!(priority, "batch");
}

#[test]
fn a_trace_says_what_was_cached() {
    let gateway = TestGateway::start();
    ask(&gateway, &document(8), json!({"max_tokens": 1}));
    let again = ask(&gateway, &document(8), json!({"max_tokens": 1}));
    let id = again["glassgate"]["request_id"].as_str().unwrap();
    let told = eventually("the record", || {
        let output = gateway.run(&["trace", id]);
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    });
    let prompt = again["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(told.contains(&format!("{} of {prompt} prompt tokens were cached", cached(&again))), "{told}");
}

#[test]
fn the_engine_s_last_steps_can_be_read_and_add_up() {
    let gateway = TestGateway::start();
    let answer = ask(&gateway, &document(7), json!({"max_tokens": 20, "ignore_eos": true}));
    let model = answer["glassgate"]["model"].as_str().unwrap().to_owned();
    let steps = |query: &str| -> Vec<Value> {
        let response = gateway.admin_get(&format!("/debug/steps?{query}"));
        assert_eq!(response.status, 200, "{}", readable(&response));
        readable(&response).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    };
    let sum = |all: &[Value], name: &str| all.iter().map(|step| step[name].as_u64().expect(name)).sum::<u64>();
    // A step hands out its tokens before it is over and told.
    let all = eventually("the last step is told", || {
        Some(steps(&format!("model={model}"))).filter(|all| sum(all, "sampled_tokens") == 20)
    });
    assert_eq!(Some(sum(&all, "prefill_tokens")), answer["usage"]["prompt_tokens"].as_u64());
    assert_eq!(steps(&format!("model={model}&last=2")), all[all.len() - 2..]);
    let unknown = gateway.admin_get("/debug/steps?model=nobody");
    assert!(unknown.status == 404 && readable(&unknown).contains(&model), "{}", readable(&unknown));
    assert_eq!(gateway.admin_get(&format!("/debug/steps?model={model}&last=few")).status, 400);
    assert_eq!(gateway.metric("runtime_stuck", &[]), 0.0);
}
