//! Log-probabilities, biases and forms of answers, by models of our own.

use std::thread;

use serde_json::{Value, json};

use crate::support::gateway::{Setup, TestGateway, chat_with};
use crate::support::http::{self, Response};

/// Every key gets the second version.
fn glimmer_2() -> TestGateway {
    let setup = Setup::shipped();
    setup.replace("routes.toml", "{ glimmer-1 = 90, glimmer-2 = 10 }", "{ glimmer-2 = 1 }");
    setup.start()
}

fn asked(more: Value) -> Value {
    let mut request = chat_with("What is Glassgate?", json!({"temperature": 0, "max_tokens": 24}));
    more.as_object().unwrap().iter().for_each(|(name, value)| request[name] = value.clone());
    request
}

fn complete(gateway: &TestGateway, more: Value) -> Response {
    let mut body = json!({"model": "assistant", "temperature": 0, "max_tokens": 12, "prompt": "Count: 1 2 3"});
    more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
    gateway.send(&http::post("/v1/completions", Some(&gateway.key), &[], body.to_string().as_bytes()))
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{answer}"))
}

/// The tokens of a choice's `logprobs`, put together.
fn tokens(logprobs: &Value) -> String {
    let places = logprobs["content"].as_array().unwrap_or_else(|| panic!("{logprobs}"));
    let bytes: Vec<u8> = places
        .iter()
        .flat_map(|place| place["bytes"].as_array().expect("bytes"))
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn a_chat_tells_how_likely_its_tokens_were_whole_and_streamed() {
    let gateway = glimmer_2();
    let plain = gateway.post(&asked(json!({}))).json();
    assert_eq!(plain["choices"][0]["logprobs"], Value::Null);
    let ask = json!({"logprobs": true, "top_logprobs": 2});
    let whole = gateway.post(&asked(ask.clone())).json();
    assert_eq!(text(&whole), text(&plain), "telling changes nothing");
    let told = &whole["choices"][0]["logprobs"];
    assert_eq!(tokens(told), text(&whole), "the end token is no part of the answer");
    for place in told["content"].as_array().unwrap() {
        let top = place["top_logprobs"].as_array().unwrap();
        assert_eq!((top.len(), &top[0]["token"], &top[0]["logprob"]), (2, &place["token"], &place["logprob"]));
        assert!(place["logprob"].as_f64().unwrap() <= 0.0);
    }
    let mut stream = asked(ask);
    stream["stream"] = true.into();
    let chunks = gateway.post(&stream).chunks();
    let pieces = chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(json!(pieces.flatten().collect::<Vec<_>>()), told["content"]);

    let without_top = gateway.post(&asked(json!({"logprobs": true}))).json();
    assert_eq!(without_top["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[test]
fn a_text_completion_tells_its_tokens_in_lists() {
    let gateway = glimmer_2();
    let whole = complete(&gateway, json!({"logprobs": 2})).json();
    let choice = &whole["choices"][0];
    let told = &choice["logprobs"];
    let list = |name: &str| told[name].as_array().unwrap_or_else(|| panic!("{whole}")).clone();
    let texts: Vec<String> = list("tokens").iter().map(|token| token.as_str().unwrap().to_owned()).collect();
    assert_eq!(texts.concat(), choice["text"].as_str().unwrap());
    let mut offset = 0;
    for (at, token) in list("text_offset").iter().zip(&texts) {
        assert_eq!(at.as_u64(), Some(offset));
        offset += token.chars().count() as u64;
    }
    for ((top, logprob), token) in list("top_logprobs").iter().zip(list("token_logprobs")).zip(&texts) {
        assert_eq!((top.as_object().unwrap().len(), &top[token]), (2, &logprob));
    }
    let chunks = complete(&gateway, json!({"logprobs": 2, "stream": true})).chunks();
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let pieces = chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"][name].as_array());
        assert_eq!(pieces.flatten().cloned().collect::<Vec<_>>(), list(name), "{name}");
    }
}

#[test]
fn a_cached_answer_tells_its_log_probabilities_again_and_only_to_who_asks() {
    let setup = Setup::shipped();
    setup.replace("routes.toml", "timeouts =", "cache    = { ttl = \"10m\" }\ntimeouts =");
    let gateway = setup.start();
    let found = |response: &Response| response.header("x-glassgate-cache").map(str::to_owned);
    let ask = json!({"logprobs": true, "top_logprobs": 1});
    let first = gateway.post(&asked(ask.clone()));
    let again = gateway.post(&asked(ask));
    assert_eq!((found(&first).as_deref(), found(&again).as_deref()), (Some("miss"), Some("hit")));
    assert_eq!(first.json()["choices"], again.json()["choices"]);
    let plain = gateway.post(&asked(json!({})));
    assert_eq!(found(&plain).as_deref(), Some("miss"));
    assert!(plain.json()["choices"][0]["logprobs"].is_null());
}

#[test]
fn a_bias_bans_a_token_and_forces_another() {
    let gateway = glimmer_2();
    let ids = |more: Value| {
        let mut request = asked(more);
        request["return_token_ids"] = true.into();
        gateway.post(&request).json()["choices"][0]["token_ids"].clone()
    };
    let free = ids(json!({}));
    let first = free[0].to_string();
    let banned = ids(json!({"logit_bias": {first: -100}}));
    assert!(!banned.as_array().unwrap().contains(&free[0]), "{banned}");
    assert_eq!(ids(json!({"logit_bias": {"300": 100}, "max_tokens": 4})), json!([300, 300, 300, 300]));
    let refused = gateway.post(&asked(json!({"logit_bias": {"999999": 1}})));
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("logit_bias")));
}

const SCHEMA: &str = r#"{"type":"object","properties":{"label":{"enum":["positive","negative"]},"score":{"type":"integer","minimum":0,"maximum":100},"why":{"type":"string","maxLength":16}},"required":["label","score","why"],"additionalProperties":false}"#;

fn check(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    assert_eq!(value.as_object().unwrap().len(), 3, "{text}");
    assert!(value["label"] == "positive" || value["label"] == "negative", "{text}");
    assert!(value["score"].as_u64().unwrap() <= 100, "{text}");
    assert!(value["why"].as_str().unwrap().chars().count() <= 16, "{text}");
}

/// Answers to `count` seeds at a temperature at which the model alone writes nonsense.
fn samples(gateway: &TestGateway, form: &Value, count: u64) -> Vec<String> {
    let ask = |seed: u64| {
        let mut request = asked(json!({"temperature": 1.5, "max_tokens": 160, "seed": seed}));
        form.as_object().unwrap().iter().for_each(|(name, value)| request[name] = value.clone());
        let answer = gateway.post(&request).json();
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        text(&answer).to_owned()
    };
    thread::scope(|scope| {
        let clients: Vec<_> =
            (0..5).map(|client| scope.spawn(move || (client..count).step_by(5).map(ask).collect::<Vec<_>>())).collect();
        clients.into_iter().flat_map(|client| client.join().expect("no client fails")).collect()
    })
}

#[test]
fn answers_keep_to_the_form_that_was_asked_for() {
    let setup = Setup::shipped();
    setup.replace("routes.toml", "{ glimmer-1 = 90, glimmer-2 = 10 }", "{ glimmer-2 = 1 }");
    setup.replace("gateway.toml", "requests_per_minute = 600", "requests_per_minute = 1_000_000");
    let gateway = setup.start();
    let schema: Value = serde_json::from_str(SCHEMA).unwrap();
    let format = json!({"response_format": {"type": "json_schema",
                        "json_schema": {"name": "judgement", "strict": true, "schema": schema}}});
    for answer in samples(&gateway, &format, 60) {
        check(&answer);
    }
    for answer in samples(&gateway, &json!({"structured_outputs": {"regex": "[0-9]{3}-[0-9]{4}"}}), 50) {
        let (left, right) = answer.split_once('-').expect("a dash");
        assert!((left.len(), right.len()) == (3, 4) && answer.bytes().all(|b| b == b'-' || b.is_ascii_digit()));
    }
    for answer in samples(&gateway, &json!({"guided_choice": ["yes", "no", "잘 모르겠어요"]}), 50) {
        assert!(["yes", "no", "잘 모르겠어요"].contains(&answer.as_str()), "{answer}");
    }

    // Several answers to one request each begin at the beginning; a stream is no different.
    let mut several = asked(json!({"n": 4, "temperature": 1.5, "seed": 7, "max_tokens": 160}));
    several["response_format"] = format["response_format"].clone();
    let answer = gateway.post(&several).json();
    for choice in answer["choices"].as_array().unwrap() {
        check(choice["message"]["content"].as_str().unwrap());
    }
    several["n"] = 1.into();
    several["stream"] = true.into();
    let chunks = gateway.post(&several).chunks();
    check(&chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect::<String>());

    let cut = gateway.post(&asked(json!({"max_tokens": 3, "response_format": format["response_format"]}))).json();
    assert_eq!(cut["choices"][0]["finish_reason"], "length", "{cut}");
}

#[test]
fn forms_that_cannot_be_kept_to_are_refused_with_their_field_and_reason() {
    let gateway = glimmer_2();
    let schema = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}});
    // It can be compiled, and is more than one token may cost: more ways to go on than the limit.
    let ways: Vec<String> = (0..1_200).map(|way| format!("\"a{way}\"")).collect();
    let bomb = format!("start: \"x\" way\nway: {}", ways.join(" | "));
    let nested = "(".repeat(500) + "a" + &")".repeat(500);
    for (form, param, why) in [
        (schema(json!({"type": "strin"})), "response_format", "strin"),
        (schema(json!({"type": "integer", "minimum": 5, "maximum": 4})), "response_format", "minimum (5)"),
        (schema(json!({"$ref": "file:///etc/passwd"})), "response_format", "ref"),
        (schema(json!("object")), "response_format", "must be an object"),
        (json!({"guided_regex": "(a"}), "guided_regex", "unclosed group"),
        (json!({"structured_outputs": {"regex": nested}}), "structured_outputs", "nested deeper"),
        (json!({"structured_outputs": {"grammar": bomb}}), "structured_outputs", "could not be followed"),
        (json!({"guided_grammar": "start: nothing"}), "guided_grammar", "unknown name"),
        (json!({"guided_choice": []}), "guided_choice", "at least one"),
        (json!({"tools": [{"type": "function", "function": {"name": "f"}}]}), "tools", "cannot call tools"),
        (json!({"tool_choice": "required"}), "tool_choice", "cannot call tools"),
    ] {
        let refused = gateway.post(&asked(form.clone()));
        let error = &refused.json()["error"];
        assert_eq!((refused.status, &error["param"]), (400, &json!(param)), "{form}: {error}");
        assert!(error["message"].as_str().unwrap().contains(why), "{form}: {error}");
    }
    assert_eq!(gateway.post(&asked(json!({}))).status, 200);
}
