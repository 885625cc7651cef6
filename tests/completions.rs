//! `POST /v1/completions`, and several answers to one request, by models of our own.

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::gateway::{Setup, TestGateway, chat_with};
use crate::support::http::{self, Response};

fn complete(gateway: &TestGateway, more: Value) -> Response {
    let mut body = json!({"model": "assistant", "temperature": 0, "max_tokens": 12});
    more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
    gateway.send(&http::post("/v1/completions", Some(&gateway.key), &[], body.to_string().as_bytes()))
}

/// The texts of a whole answer, in order.
fn texts(response: &Response) -> Vec<String> {
    let body = response.json();
    let choices = body["choices"].as_array().unwrap_or_else(|| panic!("{body}"));
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        assert!(choice["finish_reason"].is_string());
    }
    choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
}

/// A conversation in the bundled models' own template, written by hand.
const WRITTEN: &str = "<|im_start|>user\n12 + 34 = ?<|im_end|>\n<|im_start|>assistant\n";

#[test]
fn text_goes_on_as_it_is_without_a_template() {
    let gateway = TestGateway::start();
    let whole = complete(&gateway, json!({"prompt": "Count: 1 2 3"}));
    let body = whole.json();
    assert_eq!((&body["object"], &body["model"]), (&json!("text_completion"), &json!("assistant")));
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    assert!(body["choices"][0]["logprobs"].is_null() && body["choices"][0].get("message").is_none());
    let streamed = complete(
        &gateway,
        json!({"prompt": "Count: 1 2 3", "stream": true, "stream_options": {"include_usage": true}}),
    );
    let chunks = streamed.chunks();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(vec![text], texts(&whole));
    assert!(
        chunks.iter().all(|chunk| chunk["object"] == "text_completion" && chunk["choices"][0].get("delta").is_none())
    );
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], body["usage"]["completion_tokens"]);

    // Whoever writes the template themselves gets what a chat gets.
    let chat = gateway.post(&chat_with("12 + 34 = ?", json!({}))).json();
    let written = complete(&gateway, json!({"prompt": WRITTEN}));
    assert_eq!(texts(&written), [chat["choices"][0]["message"]["content"].as_str().unwrap()]);
    assert_eq!(written.json()["usage"]["prompt_tokens"], chat["usage"]["prompt_tokens"]);
}

#[test]
fn prompts_may_be_tokens_and_several_and_each_has_its_answers() {
    let gateway = TestGateway::start();
    let tokens: Vec<u32> = {
        let path = crate::support::root().join("models/glimmer-1/tokenizer.json");
        let tokenizer = tokenizers::Tokenizer::from_file(path).unwrap();
        tokenizer.encode(WRITTEN, false).unwrap().get_ids().to_vec()
    };
    let chat = gateway.post(&chat_with("12 + 34 = ?", json!({}))).json();
    let by_tokens = complete(&gateway, json!({"prompt": tokens}));
    assert_eq!(texts(&by_tokens), [chat["choices"][0]["message"]["content"].as_str().unwrap()], "the same tokens");
    assert_eq!(by_tokens.json()["usage"]["prompt_tokens"], chat["usage"]["prompt_tokens"]);

    let one = |prompt: &str| texts(&complete(&gateway, json!({"prompt": prompt}))).remove(0);
    let both = complete(&gateway, json!({"prompt": ["Red", "Count: 1 2 3"], "n": 2}));
    let (red, count) = (one("Red"), one("Count: 1 2 3"));
    assert_eq!(texts(&both), [red.clone(), red, count.clone(), count], "greedy answers to one prompt are alike");
    for wrong in [json!([99_999_999]), json!([]), json!(7), json!(["a", 7])] {
        let refused = complete(&gateway, json!({"prompt": wrong}));
        assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (400, Some("prompt")), "{wrong}");
    }
    let refused = complete(&gateway, json!({"prompt": "x", "echo": true}));
    assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (400, Some("echo")));
}

#[test]
fn several_answers_are_independent_and_the_first_is_the_one_that_comes_alone() {
    let gateway = TestGateway::start();
    let ask = |n: u32, stream: bool| {
        let more =
            json!({"n": n, "seed": 11, "temperature": 1.5, "max_tokens": 16, "ignore_eos": true, "stream": stream});
        gateway.post(&chat_with("Reverse the words: red green blue", more))
    };
    let content = |response: &Response| -> Vec<String> {
        let body = response.json();
        let choices = body["choices"].as_array().unwrap();
        choices.iter().map(|choice| choice["message"]["content"].as_str().unwrap().to_owned()).collect()
    };
    let (alone, four) = (ask(1, false), ask(4, false));
    let answers = content(&four);
    assert_eq!(content(&alone)[0], answers[0]);
    let distinct: std::collections::BTreeSet<_> = answers.iter().collect();
    assert_eq!(distinct.len(), 4, "{answers:?}");
    assert_eq!(four.json()["usage"]["completion_tokens"], 64);
    assert_eq!(
        four.json()["usage"]["prompt_tokens"],
        alone.json()["usage"]["prompt_tokens"],
        "the prompt is paid once"
    );

    let streamed = ask(4, true).chunks();
    for (index, answer) in answers.iter().enumerate() {
        let of: Vec<&Value> = streamed.iter().filter(|chunk| chunk["choices"][0]["index"] == index).collect();
        let text: String = of.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(text, *answer);
        assert_eq!(of.iter().filter(|chunk| chunk["choices"][0]["delta"]["role"] == "assistant").count(), 1);
        assert_eq!(of.iter().filter(|chunk| chunk["choices"][0]["finish_reason"] == "length").count(), 1);
    }
    assert_eq!(streamed.iter().filter(|chunk| chunk.get("glassgate").is_some()).count(), 1, "told once, at the end");
}

#[test]
fn a_hang_up_ends_all_of_them_and_each_token_is_owed() {
    let gateway = TestGateway::start();
    let more = json!({"n": 4, "stream": true, "max_tokens": 400, "ignore_eos": true});
    let mut open = gateway.open(&gateway.chat_bytes(&chat_with("Count.", more), &[]));
    open.chunk().unwrap();
    drop(open);
    let row = eventually("the row", || {
        let idle =
            gateway.metric("runtime_requests", &[]) == 0.0 && gateway.metric("gateway_in_flight_requests", &[]) == 0.0;
        idle.then(|| crate::support::evidence::ledger(&gateway).pop()).flatten()
    });
    assert_eq!(row.outcome, "aborted");
    assert_eq!(row.output as f64, gateway.metric("runtime_generated_tokens_total", &[]));
    assert!((4..1600).contains(&row.output), "{}", row.output);
}

#[test]
fn a_hang_up_is_billed_for_the_prompts_that_were_read_and_no_others() {
    let setup = Setup::shipped();
    // A thousand tokens: there is room for one of the two at a time.
    setup.replace("gateway.toml", "device = \"auto\"", "device = \"auto\"\nkv_cache = \"1MiB\"");
    let gateway = setup.start();
    let prompts = [vec![5; 560], vec![6; 560]];
    let body = json!({
        "model": "assistant", "prompt": prompts, "max_tokens": 440, "ignore_eos": true, "stream": true,
    });
    let mut open = gateway.open(&http::post("/v1/completions", Some(&gateway.key), &[], body.to_string().as_bytes()));
    open.chunk().unwrap();
    drop(open);
    let row = eventually("the row", || {
        let idle =
            gateway.metric("runtime_requests", &[]) == 0.0 && gateway.metric("gateway_in_flight_requests", &[]) == 0.0;
        idle.then(|| crate::support::evidence::ledger(&gateway).pop()).flatten()
    });
    assert_eq!((row.outcome.as_str(), row.input), ("aborted", 560));
}
