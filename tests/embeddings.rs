//! `POST /v1/embeddings`: vectors by a model of our own or of a server, on the path of every other request.

use base64::Engine;
use serde_json::{Value, json};

use crate::support::evidence::{attribute, ledger};
use crate::support::gateway::{Setup, TestGateway, append, chat, replace};
use crate::support::http::{self, Response};
use crate::support::upstream::{Script, Upstream, response};
use crate::support::{eventually, root};

/// The shipped configuration and `tiny`, an encoder whose vectors sentence-transformers has computed; `vectors` is a route
/// to it with a cache.
pub fn setup() -> Setup {
    let setup = Setup::shipped();
    let models = root().join("models").canonicalize().unwrap();
    let tiny = root().join("runtime/tests/golden/bert").canonicalize().unwrap();
    let (models, tiny) = (models.display(), tiny.display());
    setup.replace("gateway.toml", &format!("[\"{models}\"]"), &format!("[\"{models}\", \"{tiny}\"]"));
    let text = "\n[models.tiny]\nsource = \"mean\"\npublic = true\n\n[routes.vectors]\nsplit = { tiny = 1 }\ncache = { ttl = \"10m\" }\n";
    append(&setup.path("routes.toml"), text);
    append(&setup.path("prices.toml"), "\n[models.tiny]\ninput = 0.5\ndevice_hour = 0.1\n");
    setup
}

/// (text, vector)
fn golden() -> Vec<(String, Vec<f32>)> {
    let path = root().join("runtime/tests/golden/bert/mean/embeddings.json");
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    cases.iter().map(|case| (case["text"].as_str().unwrap().to_owned(), numbers(&case["embedding"]))).collect()
}

fn numbers(vector: &Value) -> Vec<f32> {
    vector.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

fn embed(gateway: &TestGateway, model: &str, more: Value) -> Response {
    let mut body = json!({"model": model});
    more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
    gateway.send(&http::post("/v1/embeddings", Some(&gateway.key), &[], body.to_string().as_bytes()))
}

/// The vectors of an answer, in order, whichever way they are written.
fn vectors(response: &Response) -> Vec<Vec<f32>> {
    let body = response.json();
    assert_eq!((response.status, &body["object"]), (200, &json!("list")), "{body}");
    let vector = |(index, entry): (usize, &Value)| {
        assert_eq!((&entry["index"], &entry["object"]), (&json!(index), &json!("embedding")));
        let Some(text) = entry["embedding"].as_str() else { return numbers(&entry["embedding"]) };
        let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
        bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
    };
    body["data"].as_array().unwrap().iter().enumerate().map(vector).collect()
}

fn refusal(response: &Response) -> (u16, String, String) {
    let error = &response.json()["error"];
    let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
    (response.status, text("code"), text("param"))
}

#[test]
fn vectors_are_those_of_sentence_transformers_in_either_format_and_paid_by_the_token() {
    let gateway = setup().start();
    // OpenAI knows no empty text.
    let cases: Vec<_> = golden().into_iter().filter(|(text, _)| !text.is_empty()).collect();
    let texts: Vec<&str> = cases.iter().map(|(text, _)| text.as_str()).collect();
    let float = embed(&gateway, "tiny", json!({"input": texts, "truncate": true}));
    let base64 = embed(&gateway, "tiny", json!({"input": texts, "truncate": true, "encoding_format": "base64"}));
    assert_eq!(vectors(&float), vectors(&base64));
    for ((text, want), got) in cases.iter().zip(vectors(&float)) {
        let error = want.iter().zip(&got).fold(0f32, |most, (x, y)| most.max((x - y).abs()));
        assert!(want.len() == got.len() && error < 1e-5, "{text:?} is off by {error}");
    }
    let alone = embed(&gateway, "tiny", json!({"input": texts[3], "truncate": true}));
    assert_eq!(vectors(&alone)[0], vectors(&float)[3], "the same bits alone");

    let body = float.json();
    assert_eq!(body["model"], "tiny");
    let tokens = body["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(body["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));
    let row = eventually("the row", || ledger(&gateway).into_iter().next());
    assert_eq!((row.op.as_str(), row.outcome.as_str(), row.input, row.output), ("embeddings", "answered", tokens, 0));
    assert_eq!(row.billed, tokens * 500, "half a dollar a million is 500 nano-dollars each");
    assert_eq!(float.header("x-glassgate-cost"), Some(crate::support::evidence::usd(row.billed).as_str()));
}

#[test]
fn a_request_for_vectors_is_told_alike_by_metrics_and_spans() {
    let gateway = setup().start();
    let answer = embed(&gateway, "tiny", json!({"input": ["hello world", "fox"], "user": "u"}));
    let tokens = answer.json()["usage"]["prompt_tokens"].as_u64().unwrap();
    let count = |family: &str, labels: &[&str]| gateway.metric(family, labels);
    eventually("the metrics", || {
        (count("gateway_requests_total", &["op=\"embeddings\"", "model=\"tiny\"", "code_class=\"2xx\""]) == 1.0)
            .then_some(())
    });
    assert_eq!(count("gateway_tokens_total", &["model=\"tiny\"", "kind=\"input\""]), tokens as f64);
    assert_eq!(count("runtime_prompt_tokens_total", &["model=\"tiny\""]), tokens as f64);
    assert_eq!(count("runtime_requests", &["model=\"tiny\""]), 0.0);
    let id = answer.header("x-request-id").unwrap();
    let span = eventually("the span", || {
        let text = std::fs::read_to_string(gateway.data_dir().join("traces.jsonl")).ok()?;
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let spans: Vec<Value> = lines
            .flat_map(|line| line["resourceSpans"].as_array().cloned().unwrap_or_default())
            .flat_map(|resource| resource["scopeSpans"].as_array().cloned().unwrap_or_default())
            .flat_map(|scope| scope["spans"].as_array().cloned().unwrap_or_default())
            .collect();
        spans.into_iter().find(|span| attribute(span, "gen_ai.operation.name").as_deref() == Some("embeddings"))
    });
    let told = |key: &str| attribute(&span, key);
    assert_eq!(span["name"], "embeddings tiny");
    assert_eq!(told("gen_ai.usage.input_tokens"), Some(tokens.to_string()));
    assert_eq!(told("gen_ai.response.id"), Some(format!("embd-{id}")));
    assert_eq!(told("gen_ai.response.finish_reasons"), None);
    assert_eq!(told("langfuse.observation.type").as_deref(), Some("embedding"));
}

#[test]
fn what_a_model_does_not_do_is_said_clearly() {
    let gateway = setup().start();
    let long = "word ".repeat(100);
    for (model, more, want) in [
        ("assistant", json!({"input": "x"}), (400, "invalid_parameter", "model")),
        ("tiny", json!({"input": ["fine", long]}), (400, "context_length_exceeded", "input")),
        ("tiny", json!({"input": vec![5; 25]}), (400, "context_length_exceeded", "input")),
        ("tiny", json!({"input": [91]}), (400, "invalid_parameter", "input")),
        ("tiny", json!({"input": ""}), (400, "invalid_parameter", "input")),
        ("tiny", json!({"input": "x", "dimensions": 16}), (400, "unsupported_parameter", "dimensions")),
        ("tiny", json!({"input": "x", "encoding_format": "int8"}), (400, "invalid_parameter", "encoding_format")),
        ("nobody", json!({"input": "x"}), (404, "model_not_found", "model")),
    ] {
        let refused = embed(&gateway, model, more.clone());
        assert_eq!(refusal(&refused), (want.0, want.1.to_owned(), want.2.to_owned()), "{model} {more}");
    }
    assert_eq!(vectors(&embed(&gateway, "tiny", json!({"input": "x", "dimensions": 32}))).len(), 1);
    assert_eq!(vectors(&embed(&gateway, "tiny", json!({"input": [[2, 44, 3], [2, 3]]}))).len(), 2);
    let mut body = chat("x");
    body["model"] = "tiny".into();
    assert_eq!(refusal(&gateway.post(&body)), (400, "invalid_parameter".to_owned(), "model".to_owned()));

    // As it is shipped, nothing makes vectors, and the refusal says what would.
    let shipped = TestGateway::start();
    let refused = embed(&shipped, "assistant", json!({"input": "x"}));
    assert_eq!(refusal(&refused), (503, "no_embedding_model".to_owned(), String::new()));
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("pip install"));
}

#[test]
fn an_embedding_model_that_is_to_be_quantised_is_refused_with_what_to_do() {
    let gateway = setup().start();
    replace(&gateway.config("routes.toml"), "source = \"mean\"", "source = \"mean\"\nquantize = \"q8_0\"");
    let reload = gateway.admin("POST", "/admin/reload");
    let said = reload.json()["problems"].to_string();
    assert!(reload.status == 422 && said.contains("`tiny`") && said.contains("remove the key"), "{said}");
    assert_eq!(vectors(&embed(&gateway, "tiny", json!({"input": "as before"}))).len(), 1);
}

#[test]
fn the_same_texts_are_answered_from_the_cache_and_never_in_the_wrong_format() {
    let gateway = setup().start();
    let ask = |more: Value| {
        let answer = embed(&gateway, "vectors", more);
        (answer.header("x-glassgate-cache").unwrap().to_owned(), vectors(&answer), answer)
    };
    let (made, first, _) = ask(json!({"input": ["hello", "world"], "user": "a"}));
    let (found, again, answer) = ask(json!({"user": "b", "input": ["hello", "world"]}));
    assert_eq!((made.as_str(), found.as_str()), ("miss", "hit"));
    assert_eq!(first, again);
    assert_eq!(answer.header("x-glassgate-cost"), Some("0.000000000"));
    let (other, decoded, _) = ask(json!({"input": ["hello", "world"], "encoding_format": "base64"}));
    assert_eq!((other.as_str(), decoded), ("miss", first));
}

#[test]
fn a_server_makes_vectors_too_and_one_that_fails_is_stood_in_for() {
    let upstream = Upstream::start();
    let setup = setup();
    setup.add_upstream("mock", &upstream.url(), "remote-model");
    append(&setup.path("routes.toml"), "\n[routes.remote]\nsplit = { remote-model = 1 }\nfallback = [\"tiny\"]\n");
    let gateway = setup.start();
    let theirs = json!({"object": "list", "model": "their-model", "usage": {"prompt_tokens": 5, "total_tokens": 5},
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}, {"object": "embedding", "index": 1, "embedding": "AACAPw=="}]});
    upstream.plays(Script::Raw(response("200 OK", &[("content-type", "application/json")], &theirs.to_string())));
    let answer = embed(&gateway, "remote", json!({"input": ["a", "b"], "dimensions": 2}));
    let body = answer.json();
    assert_eq!((&body["data"], &body["model"]), (&theirs["data"], &json!("remote")), "{body}");
    assert_eq!(body["usage"], json!({"prompt_tokens": 5, "total_tokens": 5}));
    let asked = upstream.asked().remove(0);
    assert!(asked.path.ends_with("/embeddings"));
    let sent: Value = serde_json::from_str(&asked.body.to_string()).unwrap();
    assert_eq!(
        sent,
        json!({"model": "their-model", "input": ["a", "b"], "dimensions": 2}),
        "no bound, nothing of ours"
    );

    upstream.plays(Script::Raw(response("500 Internal Server Error", &[], "{}")));
    let answer = embed(&gateway, "remote", json!({"input": "hello world"}));
    assert_eq!(answer.header("x-glassgate-variant"), Some("tiny"));
    assert_eq!(vectors(&answer), vectors(&embed(&gateway, "tiny", json!({"input": "hello world"}))));
    let rows = eventually("the rows", || Some(ledger(&gateway)).filter(|rows| rows.len() == 4));
    assert!(rows.iter().all(|row| row.op == "embeddings"));
}
