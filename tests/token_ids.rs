//! vLLM's `return_token_ids`: the ids of prompt and answer, beside the text that they make.

use serde_json::{Value, json};

use crate::support::gateway::{Setup, TestGateway, chat_with, remote};
use crate::support::http::{self, Response};
use crate::support::upstream::Upstream;
use crate::support::{eventually, root};

/// Every key gets the same version.
fn glimmer_1() -> Setup {
    let setup = Setup::shipped();
    setup.replace("routes.toml", "{ glimmer-1 = 90, glimmer-2 = 10 }", "{ glimmer-1 = 1 }");
    setup
}

/// The text that ids make.
fn text_of(ids: &Value) -> String {
    let tokenizer = tokenizers::Tokenizer::from_file(root().join("models/glimmer-1/tokenizer.json")).unwrap();
    tokenizer.decode(&serde_json::from_value::<Vec<u32>>(ids.clone()).unwrap(), true).unwrap()
}

/// A question whose answer is to tell its ids.
fn asked(more: Value) -> Value {
    let mut request = chat_with("What is Glassgate?", more);
    request["return_token_ids"] = true.into();
    request
}

/// Text and ids of a choice of a streamed chat.
fn streamed_chat(chunks: &[Value], choice: usize) -> (Value, Value) {
    let of = || chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|found| found["index"] == choice);
    let text: String = of().filter_map(|found| found["delta"]["content"].as_str()).collect();
    let ids = of().filter_map(|found| found["token_ids"].as_array()).flatten();
    (text.into(), ids.cloned().collect())
}

fn complete(gateway: &TestGateway, more: Value) -> Response {
    let mut body = json!({"model": "assistant", "temperature": 0, "max_tokens": 12, "return_token_ids": true});
    more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
    gateway.send(&http::post("/v1/completions", Some(&gateway.key), &[], body.to_string().as_bytes()))
}

/// What every choice of a stream told of itself: its prompt's ids, its text, its own ids.
fn streamed(chunks: &[Value], choice: usize) -> (Value, String, Vec<Value>) {
    let of: Vec<&Value> = chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == choice).collect();
    let prompts: Vec<&Value> = of.iter().filter_map(|chunk| chunk["choices"][0].get("prompt_token_ids")).collect();
    assert_eq!(prompts.len(), 1, "told once");
    let text = of.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    let tokens = of.iter().filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array()).flatten();
    (prompts[0].clone(), text, tokens.cloned().collect())
}

#[test]
fn each_choice_of_a_text_completion_tells_its_prompt_and_its_own_tokens() {
    let gateway = glimmer_1().start();
    let tokenizer = tokenizers::Tokenizer::from_file(root().join("models/glimmer-1/tokenizer.json")).unwrap();
    let asked = json!({"prompt": ["Red", "Count: 1 2 3"], "n": 2});
    let whole = complete(&gateway, asked.clone()).json();
    assert!(whole.get("prompt_token_ids").is_none(), "it is in the choices");
    let mut stream = asked;
    stream["stream"] = true.into();
    let chunks = complete(&gateway, stream).chunks();
    let mut told = 0;
    for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let prompt = ["Red", "Count: 1 2 3"][index / 2];
        assert_eq!(choice["prompt_token_ids"], json!(tokenizer.encode(prompt, false).unwrap().get_ids()));
        let ids: Vec<u32> = serde_json::from_value(choice["token_ids"].clone()).unwrap();
        assert_eq!(choice["text"], tokenizer.decode(&ids, true).unwrap(), "the text that the tokens make");
        told += ids.len();
        let (prompt, text, tokens) = streamed(&chunks, index);
        assert_eq!(
            (&prompt, &json!(text), &json!(tokens)),
            (&choice["prompt_token_ids"], &choice["text"], &choice["token_ids"])
        );
    }
    assert_eq!(whole["usage"]["completion_tokens"], told, "no token is left out, the last included");
}

#[test]
fn who_does_not_ask_is_told_nothing() {
    let gateway = glimmer_1().start();
    for more in [json!({}), json!({"return_token_ids": false}), json!({"stream": true})] {
        let answer = gateway.post(&chat_with("12 + 34 = ?", more));
        assert!(!String::from_utf8(answer.body).unwrap().contains("token_ids"));
    }
}

#[test]
fn each_choice_of_a_streamed_chat_tells_the_same_ids_as_whole() {
    let gateway = glimmer_1().start();
    let sampled = json!({"n": 3, "temperature": 1.5, "seed": 7, "max_tokens": 24});
    let whole = gateway.post(&asked(sampled.clone())).json();
    let mut stream = asked(sampled);
    stream["stream"] = true.into();
    let chunks = gateway.post(&stream).chunks();
    let prompts: Vec<&Value> = chunks.iter().filter_map(|chunk| chunk.get("prompt_token_ids")).collect();
    assert_eq!(prompts, [&whole["prompt_token_ids"]; 3], "told as each choice begins");
    for choice in 0..3 {
        let told = &whole["choices"][choice];
        let (text, ids) = streamed_chat(&chunks, choice);
        assert_eq!((&text, &ids), (&told["message"]["content"], &told["token_ids"]));
        assert_eq!(text, text_of(&ids));
    }
    assert_ne!(whole["choices"][0]["token_ids"], whole["choices"][1]["token_ids"], "each its own");
}

#[test]
fn a_stop_string_cuts_the_text_and_no_id() {
    let gateway = glimmer_1().start();
    let ask = |more: Value| {
        let mut stream = asked(more.clone());
        stream["stream"] = true.into();
        let whole = gateway.post(&asked(more)).json();
        let choice = &whole["choices"][0];
        let (text, ids) = (choice["message"]["content"].clone(), choice["token_ids"].clone());
        assert_eq!(streamed_chat(&gateway.post(&stream).chunks(), 0), (text.clone(), ids.clone()));
        assert_eq!(whole["usage"]["completion_tokens"], ids.as_array().unwrap().len());
        (text.as_str().unwrap().to_owned(), ids)
    };
    let (text, ids) = ask(json!({}));
    let middle = text.len() / 2;
    let stop = &text[middle..middle + 3];
    let (cut, of_cut) = ask(json!({"stop": [stop]}));
    assert_eq!(cut, text[..text.find(stop).unwrap()]);
    assert!(text_of(&of_cut).starts_with(&format!("{cut}{stop}")), "the ids of the stop string are there");
    assert!(ids.as_array().unwrap().starts_with(of_cut.as_array().unwrap()));
    // Held back until it is no stop string after all.
    let never = format!("{}\u{1}", &text[..middle]);
    assert_eq!(ask(json!({"stop": [never]})), (text, ids));
}

#[test]
fn a_model_of_ours_that_stands_in_tells_its_ids_too() {
    let setup = glimmer_1();
    setup.replace("routes.toml", "timeouts =", "fallback = [\"glimmer-2\"]\ntimeouts =");
    setup.replace("gateway.toml", "device = \"auto\"", "device = \"auto\"\nqueue_max = 1\nkv_cache = \"1MiB\"");
    let gateway = setup.start();
    // Each model has room for a few of this length: of twelve at once, glimmer-1 refuses some.
    let body = asked(json!({"max_tokens": 400, "ignore_eos": true}));
    let answers: Vec<Response> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..12).map(|_| scope.spawn(|| gateway.post(&body))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let told: Vec<Value> = answers.iter().filter(|answer| answer.status == 200).map(Response::json).collect();
    assert!(told.iter().any(|body| body["glassgate"]["variant"] == "glimmer-2"), "somebody stood in");
    for body in told {
        let count = |ids: &Value| json!(ids.as_array().unwrap().len());
        assert_eq!(count(&body["prompt_token_ids"]), body["usage"]["prompt_tokens"]);
        assert_eq!(count(&body["choices"][0]["token_ids"]), body["usage"]["completion_tokens"]);
    }
}

/// With a cache.
fn cached() -> TestGateway {
    let setup = glimmer_1();
    setup.replace("routes.toml", "timeouts =", "cache    = { ttl = \"10m\" }\ntimeouts =");
    setup.start()
}

#[test]
fn whoever_waited_for_anothers_answer_is_told_its_ids() {
    let gateway = cached();
    // Long enough that all of them ask before it is there.
    let body = asked(json!({"max_tokens": 1000, "ignore_eos": true}));
    let answers: Vec<Response> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..3).map(|_| scope.spawn(|| gateway.post(&body))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let mut how: Vec<_> = answers.iter().map(|answer| answer.header("x-glassgate-cache").unwrap()).collect();
    how.sort_unstable();
    assert_eq!(how, ["coalesced", "coalesced", "miss"]);
    let told = |answer: &Response| {
        let body = answer.json();
        (body["prompt_token_ids"].clone(), body["choices"][0]["token_ids"].clone())
    };
    let (prompt, ids) = told(&answers[0]);
    assert!(!prompt.as_array().unwrap().is_empty() && ids.as_array().unwrap().len() == 1000);
    assert!(answers.iter().all(|answer| told(answer) == (prompt.clone(), ids.clone())));
}

#[test]
fn a_cached_answer_tells_the_ids_to_those_who_ask_for_them() {
    let gateway = cached();
    let ask = |more: Value| gateway.post(&chat_with("What is Glassgate?", more));
    // The answer without ids is there first, and serves nobody who asks for them.
    assert_eq!(ask(json!({})).header("x-glassgate-cache"), Some("miss"));
    let first = ask(json!({"return_token_ids": true}));
    let again = ask(json!({"return_token_ids": true}));
    let stream = ask(json!({"return_token_ids": true, "stream": true}));
    assert_eq!(
        [&first, &again, &stream].map(|answer| answer.header("x-glassgate-cache").unwrap()),
        ["miss", "hit", "hit"]
    );
    let (first, again, chunks) = (first.json(), again.json(), stream.chunks());
    let prompt = &first["prompt_token_ids"];
    assert_eq!(prompt.as_array().unwrap().len(), first["usage"]["prompt_tokens"].as_u64().unwrap() as usize);
    assert_eq!((prompt, &first["choices"]), (&again["prompt_token_ids"], &again["choices"]));
    let tokens = chunks.iter().filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array()).flatten();
    assert_eq!(json!(tokens.collect::<Vec<_>>()), first["choices"][0]["token_ids"]);
    assert_eq!(chunks[0]["prompt_token_ids"], *prompt);
}

#[test]
fn an_upstream_whose_ids_we_could_not_hand_on_is_not_asked_even_if_a_model_of_ours_stands_in() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "fallback = [\"glimmer-2\"]").start();
    let refused = gateway.post(&remote(json!({"return_token_ids": true})));
    let error = &refused.json()["error"];
    assert_eq!((refused.status, error["param"].as_str()), (400, Some("return_token_ids")));
    assert_eq!(error["code"], "unsupported_parameter");
    assert_eq!(upstream.calls(), 0);
}

#[test]
fn an_upstream_as_shadow_gets_the_copy_without_the_field_since_nobody_reads_its_ids() {
    let upstream = Upstream::start();
    let setup = glimmer_1();
    setup.add_upstream("mock", &upstream.url(), "remote-model");
    let rule = "shadow   = { variant = \"remote-model\", sample = 1.0 }\ntimeouts =";
    setup.replace("routes.toml", "timeouts =", rule);
    let gateway = setup.start();
    let answer = gateway.post(&asked(json!({}))).json();
    assert!(!answer["choices"][0]["token_ids"].as_array().unwrap().is_empty());
    eventually("the pair", || {
        (gateway.metric("gateway_shadow_requests_total", &["outcome=\"paired\""]) == 1.0).then_some(())
    });
    assert!(upstream.asked()[0].body.get("return_token_ids").is_none());
}
