//! vLLM's `return_token_ids`: the ids of prompt and answer, beside the text that they make.

use serde_json::{Value, json};

use crate::support::gateway::{Setup, TestGateway, chat_with, remote};
use crate::support::http::{self, Response};
use crate::support::root;
use crate::support::upstream::Upstream;

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
    let gateway = TestGateway::start();
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
    let gateway = TestGateway::start();
    for more in [json!({}), json!({"return_token_ids": false}), json!({"stream": true})] {
        let answer = gateway.post(&chat_with("12 + 34 = ?", more));
        assert!(!String::from_utf8(answer.body).unwrap().contains("token_ids"));
    }
}

#[test]
fn a_cached_answer_tells_the_ids_to_those_who_ask_for_them() {
    let setup = Setup::shipped();
    setup.replace("routes.toml", "timeouts =", "cache    = { ttl = \"10m\" }\ntimeouts =");
    let gateway = setup.start();
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
fn an_upstream_whose_ids_we_could_not_hand_on_is_not_asked() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "").start();
    let refused = gateway.post(&remote(json!({"return_token_ids": true})));
    let error = &refused.json()["error"];
    assert_eq!((refused.status, error["param"].as_str()), (400, Some("return_token_ids")));
    assert_eq!(error["code"], "unsupported_parameter");
    assert_eq!(upstream.calls(), 0);
}
