//! Remote servers: what they are asked, how their answers arrive, and every way in which they can fail.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::gateway::{Setup, TestGateway, append, remote};
use crate::support::http::{self, Response};
use crate::support::upstream::{
    PROMPT_TOKENS, Script, Upstream, delta, event, response, stream_head, stream_of, usage, words,
};

/// One row as the ledger's own column names have it.
fn rows(gateway: &TestGateway) -> Vec<Value> {
    let db = rusqlite::Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let mut query = db.prepare("SELECT * FROM ledger ORDER BY request_id, attempt").unwrap();
    let names: Vec<String> = query.column_names().map(str::to_owned).collect();
    let found = query.query_map([], |row| {
        let value = |index| match row.get_ref(index).unwrap() {
            rusqlite::types::ValueRef::Integer(number) => json!(number),
            rusqlite::types::ValueRef::Text(text) => json!(std::str::from_utf8(text).unwrap()),
            rusqlite::types::ValueRef::Null => Value::Null,
            other => panic!("{other:?}"),
        };
        Ok(names.iter().enumerate().map(|(index, name)| (name.clone(), value(index))).collect::<Value>())
    });
    found.unwrap().collect::<rusqlite::Result<_>>().unwrap()
}

/// The rows of everything so far, once there are as many as expected and nobody is in flight.
fn settled(gateway: &TestGateway, count: usize) -> Vec<Value> {
    eventually("the rows", || {
        let rows = rows(gateway);
        (rows.len() >= count && gateway.metric("gateway_in_flight_requests", &[]) == 0.0).then_some(rows)
    })
}

/// What every row's story is told by.
fn story(row: &Value) -> (String, String, String, u64, u64, u64) {
    let text = |name: &str| row[name].as_str().unwrap().to_owned();
    let number = |name: &str| row[name].as_u64().unwrap();
    let tokens = number("input_tokens") + number("cache_read_tokens");
    let output = number("output_tokens") + number("reasoning_tokens");
    (text("role"), text("outcome"), text("usage_source"), tokens, output, number("billed_nano_usd"))
}

fn text(response: &Response) -> String {
    let chunks = response.chunks();
    let content = |chunk: &Value| chunk["choices"][0]["delta"]["content"].as_str().unwrap_or("").to_owned();
    chunks.iter().map(content).collect()
}

fn code(response: &Response) -> (u16, String) {
    (response.status, response.json()["error"]["code"].as_str().unwrap_or_default().to_owned())
}

/// What eleven prompt tokens (three of them cached) and so many of output cost at the mock's prices.
fn price(output: u64) -> u64 {
    (PROMPT_TOKENS - 3) * 30 + 3 * 10 + output * 120
}

#[test]
fn an_upstreams_answer_arrives_under_our_name_with_its_own_usage_streamed_and_whole() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "").start();
    let whole = gateway.post(&remote(json!({"max_tokens": 50})));
    assert_eq!(whole.status, 200, "{}", String::from_utf8_lossy(&whole.body));
    let body = whole.json();
    assert_eq!(body["choices"][0]["message"]["content"], "Hello from upstream.");
    assert_eq!(body["model"], "remote");
    assert_eq!(body["id"].as_str().unwrap(), format!("chatcmpl-{}", whole.header("x-request-id").unwrap()));
    assert_eq!((&body["usage"]["prompt_tokens"], &body["usage"]["completion_tokens"]), (&json!(11), &json!(3)));
    assert_eq!(body["glassgate"]["usage_source"], "reported");
    assert_eq!(whole.header("x-glassgate-model"), Some("remote-model"));

    let streamed = gateway.post(&remote(json!({"stream": true})));
    assert_eq!(text(&streamed), "Hello from upstream.");
    assert!(streamed.chunks().iter().all(|chunk| chunk["model"] == "remote" && chunk.get("usage").is_none()));
    assert_eq!(streamed.chunks().last().unwrap()["glassgate"]["usage"]["cache_read"], 3);

    let with_usage = gateway.post(&remote(json!({"stream": true, "stream_options": {"include_usage": true}})));
    assert_eq!(with_usage.chunks().last().unwrap()["usage"]["completion_tokens_details"]["reasoning_tokens"], 1);

    let rows = settled(&gateway, 3);
    let told = ("primary".into(), "answered".into(), "reported".into(), 11, 3, price(3));
    assert!(rows.iter().all(|row| story(row) == told), "{rows:?}");
    assert!(rows.iter().all(|row| row["provider_cost_nano_usd"] == price(3) && row["provider"] == "mock"));

    let asked = upstream.asked();
    assert!(asked.iter().all(|asked| asked.path == "/v1/chat/completions" && asked.body["model"] == "their-model"));
    assert_eq!(asked[0].body["max_tokens"], 50);
    assert_eq!(asked[1].body["max_completion_tokens"], 1024, "an answer nobody bounded is bounded");
    assert_eq!(asked[1].body["stream_options"]["include_usage"], true, "usage is asked for");
    assert!(asked.iter().all(|asked| asked.header("authorization").is_none()), "our caller's key stays here");
    let traces: Vec<&str> = asked.iter().map(|asked| asked.header("traceparent").unwrap()).collect();
    assert_eq!(traces[0][3..35], whole.header("traceparent").unwrap()[3..35], "one trace");
    assert_eq!(asked[0].header("x-request-id"), whole.header("x-request-id"));
    // A stream's is free when its framing has ended, which may be after the client knows that the answer has.
    assert_eq!((asked[0].connection, asked[1].connection), (0, 0), "the connection is used again");
}

#[test]
fn tool_calls_and_log_probabilities_pass_through_as_they_came() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "").start();
    let call = json!({"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]});
    let mut script =
        stream_of(&[delta(json!({"role": "assistant", "content": null}), None), delta(call.clone(), None)]);
    let mut last = delta(json!({}), Some("tool_calls"));
    last["usage"] = usage(5);
    script.extend(event(&last));
    script.extend(b"data: [DONE]\n\n");
    upstream.plays(Script::HalfClose(script));
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let streamed = gateway.post(&remote(json!({"stream": true, "tools": tools})));
    let chunks = streamed.chunks();
    assert_eq!(chunks[1]["choices"][0]["delta"], call);
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    assert_eq!(upstream.asked()[0].body["tools"], tools);

    let message = json!({"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]});
    let logprobs = json!({"content": [{"token": "a", "logprob": -0.5, "bytes": null, "top_logprobs": []}]});
    let body = json!({"choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "tool_calls"}], "usage": usage(5)});
    upstream.plays(Script::Raw(response("200 OK", &[], &body.to_string())));
    let whole = gateway.post(&remote(json!({"tools": tools, "logprobs": true}))).json();
    assert_eq!(whole["choices"][0]["message"], message);
    assert_eq!(whole["choices"][0]["logprobs"], logprobs);
}

#[test]
fn text_completions_and_several_answers_reach_an_upstream_too() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "").start();
    let ask = |more: Value| {
        let mut body = json!({"model": "remote", "prompt": "Once", "n": 2});
        more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        gateway.send(&http::post("/v1/completions", Some(&gateway.key), &[], body.to_string().as_bytes()))
    };
    let whole = ask(json!({})).json();
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(whole["choices"].as_array().unwrap().len(), 2);
    assert_eq!(whole["choices"][1]["text"], "Hello from upstream.");
    let chunks = ask(json!({"stream": true})).chunks();
    for index in 0..2 {
        let of = chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == index);
        assert_eq!(
            of.clone().filter_map(|c| c["choices"][0]["text"].as_str()).collect::<String>(),
            "Hello from upstream."
        );
        assert_eq!(of.filter(|chunk| chunk["choices"][0]["finish_reason"] == "stop").count(), 1);
    }
    assert_eq!(upstream.asked()[0].path, "/v1/completions");
    assert_eq!(settled(&gateway, 2)[0]["op"], "text_completion");
}

#[test]
fn a_body_of_several_mebibytes_passes() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "").start();
    let mut body = remote(json!({}));
    body["messages"][0]["content"] = "x".repeat(3 << 20).into();
    assert_eq!(gateway.post(&body).status, 200);
    assert!(upstream.asked()[0].bytes > 3 << 20);
}

#[test]
fn a_stale_pooled_connection_costs_one_retry_and_nobody_notices() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "").start();
    assert_eq!(gateway.post(&remote(json!({}))).status, 200);
    // The server takes the next request on the pooled connection and closes without a word.
    upstream.plays(Script::Cut(Vec::new()));
    assert_eq!(gateway.post(&remote(json!({}))).status, 200);
    let rows = settled(&gateway, 3);
    let stories: Vec<_> = rows.iter().map(|row| (row["attempt"].as_u64().unwrap(), story(row))).collect();
    let answered = ("answered".to_owned(), "reported".to_owned(), 11, 3, price(3));
    let tell = |role: &str, (outcome, source, input, output, billed): (String, String, u64, u64, u64)| {
        (role.to_owned(), outcome, source, input, output, billed)
    };
    assert_eq!(stories[0], (0, tell("primary", answered.clone())));
    assert_eq!(stories[1], (0, tell("primary", ("failed_over".into(), "counted".into(), 0, 0, 0))));
    assert_eq!(stories[2], (1, tell("retry", answered)));
    let connections: Vec<_> = upstream.asked().iter().map(|asked| asked.connection).collect();
    assert_eq!(connections, [0, 0, 1]);
    // A fresh connection that breaks is no stale one: it is not tried again.
    upstream.always(Script::Cut(Vec::new()));
    let before = upstream.calls();
    let failed = gateway.post(&remote(json!({})));
    assert_eq!(code(&failed), (502, "upstream_failed".into()));
    assert!(upstream.calls() - before <= 2, "at most one retry");
}

#[test]
fn a_retry_never_meets_a_connection_that_was_used_before() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "").start();
    // The server closes whatever was used before, also what was fresh for the retry before this one.
    upstream.decides(|asked| match asked.earlier {
        0 => Script::Answer(words("Hello from upstream.")),
        _ => Script::Cut(Vec::new()),
    });
    for _ in 0..6 {
        assert_eq!(gateway.post(&remote(json!({}))).status, 200);
    }
    let rows = settled(&gateway, 11);
    assert_eq!(rows.iter().filter(|row| row["role"] == "retry" && row["outcome"] == "answered").count(), 5, "{rows:?}");
}

/// A fault before anything was said: what the client reads if nobody stands in.
type Fault = (&'static str, Script, u16, &'static str, &'static str);

fn faults() -> Vec<Fault> {
    let error = |status: &str, headers: &[(&str, &str)]| {
        Script::Raw(response(
            status,
            headers,
            r#"{"error":{"message":"boom sk-secret-upstream-key","type":"server_error"}}"#,
        ))
    };
    vec![
        ("closed", Script::Cut(Vec::new()), 502, "upstream_failed", "failed"),
        ("hang before the head", Script::Hang(Vec::new()), 504, "timeout", "timed_out"),
        ("hang after the head", Script::Hang(stream_head(false)), 504, "timeout", "timed_out"),
        ("half-close", Script::HalfClose(stream_head(false)), 502, "upstream_failed", "failed"),
        ("garbage for HTTP", Script::Cut(b"SSH-2.0-OpenSSH\r\n\r\n".to_vec()), 502, "upstream_failed", "failed"),
        (
            "garbage for SSE",
            Script::HalfClose([stream_head(false), b"data: {oops\n\n".to_vec()].concat()),
            502,
            "upstream_failed",
            "failed",
        ),
        ("500", error("500 Internal Server Error", &[]), 502, "upstream_failed", "failed"),
        ("503", error("503 Service Unavailable", &[]), 502, "upstream_failed", "failed"),
        ("redirect", error("302 Found", &[("location", "http://127.0.0.1:1/")]), 502, "upstream_failed", "failed"),
        ("401", error("401 Unauthorized", &[]), 502, "upstream_auth", "failed"),
        ("429", error("429 Too Many Requests", &[("retry-after-ms", "1")]), 429, "upstream_rate_limited", "failed"),
        (
            "error inside 200",
            Script::HalfClose(stream_of(&[json!({"error": {"message": "overloaded"}})])),
            502,
            "upstream_failed",
            "failed",
        ),
        (
            "error after the role",
            Script::HalfClose(stream_of(&[
                delta(json!({"role": "assistant", "content": ""}), None),
                json!({"error": {"message": "overloaded"}}),
            ])),
            502,
            "upstream_failed",
            "failed",
        ),
        (
            "no finish",
            Script::HalfClose([stream_head(false), b"data: [DONE]\n\n".to_vec()].concat()),
            502,
            "upstream_failed",
            "failed",
        ),
    ]
}

#[test]
fn every_fault_before_the_first_word_is_an_error_that_costs_nothing_and_leaves_one_row() {
    let upstream = Upstream::start();
    let gateway =
        Setup::upstream(&upstream, "timeouts = { first_token = \"300ms\", idle = \"300ms\", total = \"5s\" }").start();
    for (number, (name, script, status, error, outcome)) in faults().into_iter().enumerate() {
        upstream.plays(script);
        let response = gateway.post(&remote(json!({"stream": true})));
        assert_eq!(code(&response), (status, error.to_owned()), "{name}");
        assert!(!String::from_utf8_lossy(&response.body).contains("boom"), "{name}: an upstream's words are not ours");
        let rows = settled(&gateway, number + 1);
        assert_eq!(rows.len(), number + 1, "{name}: exactly one row");
        let row = rows.iter().find(|row| row["request_id"] == response.header("x-request-id").unwrap()).unwrap();
        let (role, found, _, input, output, billed) = story(row);
        assert_eq!((role.as_str(), found.as_str(), input + output + billed), ("primary", outcome, 0), "{name}");
        if status == 429 {
            eventually("the cool-down to pass", || (gateway.post(&remote(json!({}))).status == 200).then_some(()));
            return_to(&gateway, number + 1);
        }
    }
}

/// Forgets rows beyond a count, so that what follows can count its own.
fn return_to(gateway: &TestGateway, count: usize) {
    settled(gateway, count + 1);
    let db = rusqlite::Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    db.execute("DELETE FROM ledger WHERE outcome = 'answered' OR cache = 'x' OR (outcome = 'released')", []).unwrap();
}

#[test]
fn every_fault_before_the_first_word_is_answered_by_the_fallback_and_nobody_notices() {
    let upstream = Upstream::start();
    let route =
        "fallback = [\"glimmer-2\"]\ntimeouts = { first_token = \"300ms\", idle = \"300ms\", total = \"1200ms\" }";
    let gateway = Setup::upstream(&upstream, route).start();
    for (name, script, ..) in faults() {
        for stream in [false, true] {
            upstream.always(script.clone());
            let response = gateway.post(&remote(json!({"stream": stream, "max_tokens": 8})));
            upstream.always(Script::Answer(words("Hello from upstream.")));
            assert_eq!(response.status, 200, "{name}: {}", String::from_utf8_lossy(&response.body));
            assert_eq!(response.header("x-glassgate-model"), Some("glimmer-2"), "{name}");
            let id = response.header("x-request-id").unwrap();
            let rows = eventually("all rows", || {
                let found: Vec<Value> = rows(&gateway).into_iter().filter(|row| row["request_id"] == id).collect();
                found.last().is_some_and(|row| row["role"] == "fallback").then_some(found)
            });
            let (answered, left) = rows.split_last().unwrap();
            assert_eq!((story(answered).0.as_str(), story(answered).1.as_str()), ("fallback", "answered"), "{name}");
            // A pooled connection that closes is tried once more, on a fresh one.
            assert!((1..=2).contains(&left.len()) && left[0]["role"] == "primary", "{name}: {left:?}");
            assert!(left.iter().all(|row| story(row).1 == "failed_over" && story(row).5 == 0), "{name}: {left:?}");
            // Whatever cools down is over before the next one.
            eventually("the cool-down", || {
                (gateway.post(&remote(json!({"max_tokens": 1}))).header("x-glassgate-model") == Some("remote-model"))
                    .then_some(())
            });
        }
    }
    assert!(gateway.metric("gateway_tokens_total", &["role=\"fallback\""]) > 0.0);
}

#[test]
fn a_request_that_is_wrong_is_wrong_everywhere() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "fallback = [\"glimmer-2\"]").start();
    let body =
        r#"{"error":{"message":"Unknown tool.","type":"invalid_request_error","param":"tools","code":"bad_tool"}}"#;
    upstream.plays(Script::Raw(response("400 Bad Request", &[], body)));
    let refused = gateway.post(&remote(json!({})));
    assert_eq!(code(&refused), (400, "upstream_rejected".into()));
    assert_eq!(refused.json()["error"]["param"], "tools");
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("Unknown tool."));
    assert_eq!(settled(&gateway, 1).len(), 1);
    eventually("the request to be counted", || {
        (gateway.metric("gateway_requests_total", &["error_type=\"upstream_rejected\"", "4xx"]) == 1.0).then_some(())
    });
    assert_eq!(gateway.metric("gateway_requests_total", &["5xx"]), 0.0, "what a client did wrong is no error of ours");
}

#[test]
fn a_server_that_asks_for_peace_gets_it() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "").start();
    upstream.plays(Script::Raw(response("429 Too Many Requests", &[("retry-after", "60")], "{}")));
    let limited = gateway.post(&remote(json!({})));
    assert_eq!((limited.status, limited.header("retry-after")), (429, Some("60")));
    let again = gateway.post(&remote(json!({})));
    assert_eq!(code(&again), (429, "upstream_rate_limited".into()));
    assert!(again.header("retry-after").unwrap().parse::<u64>().unwrap() <= 60);
    assert_eq!(upstream.calls(), 1, "it is not asked again meanwhile");
}

#[test]
fn a_fault_in_the_stream_is_told_never_looks_complete_and_what_was_delivered_is_owed() {
    let upstream = Upstream::start();
    let route = "fallback = [\"glimmer-2\"]\ntimeouts = { first_token = \"5s\", idle = \"300ms\", total = \"5s\" }";
    let gateway = Setup::upstream(&upstream, route).start();
    let begun = || stream_of(&["One ", "two ", "three "].map(|word| delta(json!({"content": word}), None)));
    let error = event(&json!({"error": {"message": "sk-secret"}}));
    let cases = [
        ("hang", Script::Hang(begun()), "timeout", "timed_out"),
        ("cut", Script::Cut(begun()), "upstream_failed", "failed"),
        ("half-close", Script::HalfClose(begun()), "upstream_failed", "failed"),
        ("garbage", Script::HalfClose([begun(), b"data: <html>\n\n".to_vec()].concat()), "upstream_failed", "failed"),
        ("error", Script::HalfClose([begun(), error].concat()), "upstream_failed", "failed"),
        (
            "done without a finish",
            Script::HalfClose([begun(), b"data: [DONE]\n\n".to_vec()].concat()),
            "upstream_failed",
            "failed",
        ),
        (
            "an endless event",
            Script::HalfClose([begun(), b"data: ".to_vec(), vec![b'x'; 2 << 20]].concat()),
            "upstream_failed",
            "failed",
        ),
    ];
    let mut in_stream = 0;
    for (name, script, error, outcome) in cases {
        // The first words are read before the fault comes, so that it is a fault in the stream.
        upstream.plays(script);
        let response = gateway.post(&remote(json!({"stream": true})));
        let id = response.header("x-request-id").unwrap().to_owned();
        let row = eventually("the row", || {
            rows(&gateway).into_iter().find(|row| row["request_id"] == id && row["outcome"] != "killed")
        });
        if response.status != 200 || response.header("x-glassgate-model") == Some("glimmer-2") {
            // Both came in one read: nothing had been sent, so it could still fail over.
            continue;
        }
        in_stream += 1;
        assert!(!response.complete, "{name}: a cut stream must not look complete");
        let events = response.events();
        let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
        assert_eq!(last["error"]["code"], error, "{name}");
        assert!(
            !events.iter().any(|event| event.contains("finish_reason\":\"") || event.contains("sk-secret")),
            "{name}"
        );
        let (role, found, source, input, output, billed) = story(&row);
        assert_eq!((role.as_str(), found.as_str(), source.as_str()), ("primary", outcome, "estimated"), "{name}");
        assert!(input > 0 && output >= 3 && billed > 0, "{name}: {row}");
    }
    assert!(in_stream >= 2, "only {in_stream} faults came after words: this proved little");
}

#[test]
fn usage_that_is_missing_or_absurd_is_estimated_and_said_so() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "").start();
    let absurd = [
        json!(null),
        json!({}),
        json!({"prompt_tokens": -1, "completion_tokens": 2}),
        json!({"prompt_tokens": 11, "completion_tokens": 1e15}),
        json!({"prompt_tokens": 9_000_000_000_000u64, "completion_tokens": 2}),
        json!({"prompt_tokens": "11", "completion_tokens": 2}),
        json!({"prompt_tokens": 11, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 12}}),
    ];
    for (number, usage) in absurd.into_iter().enumerate() {
        let mut last = delta(json!({"content": "two"}), Some("stop"));
        last["usage"] = usage.clone();
        let script =
            [stream_of(&[delta(json!({"content": "One "}), None), last]), b"data: [DONE]\n\n".to_vec()].concat();
        upstream.plays(Script::HalfClose(script));
        let response = gateway.post(&remote(json!({"stream": true, "max_tokens": 100})));
        let told = response.chunks().last().unwrap()["glassgate"].clone();
        assert_eq!(told["usage_source"], "estimated", "{usage}");
        let rows = settled(&gateway, number + 1);
        let row = rows.iter().find(|row| row["request_id"] == response.header("x-request-id").unwrap()).unwrap();
        let (_, outcome, source, input, output, billed) = story(row);
        assert_eq!((outcome.as_str(), source.as_str()), ("answered", "estimated"), "{usage}");
        assert!((1..200).contains(&input) && (2..=100).contains(&output) && billed > 0, "{usage}: {row}");
        assert_eq!(told["usage"]["output"], output);
    }
}

#[test]
fn a_server_that_is_not_there_or_not_who_it_says_is_told_apart() {
    let upstream = Upstream::start();
    let setup = Setup::upstream(&upstream, "");
    // Nobody listens here any more.
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    setup.add_upstream("gone", &format!("http://{gone}/v1"), "gone-model");
    setup.add_upstream("plain", &format!("https://{}/v1", upstream.address), "tls-model");
    setup.add_upstream("nameless", "http://no-such-host.invalid/v1", "nameless-model");
    let routes = ["gone", "tls", "nameless"].map(|name| format!("\n[routes.{name}]\nsplit = {{ {name}-model = 1 }}\n"));
    append(&setup.path("routes.toml"), &routes.concat());
    let gateway = setup.start();
    for (route, error) in
        [("gone", "upstream_unreachable"), ("tls", "upstream_tls"), ("nameless", "upstream_unreachable")]
    {
        let mut body = remote(json!({}));
        body["model"] = route.into();
        assert_eq!(code(&gateway.post(&body)), (502, error.to_owned()), "{route}");
    }
    let rows = settled(&gateway, 3);
    assert!(rows.iter().all(|row| story(row).1 == "failed" && story(row).5 == 0));
}

/// A server of certain certificates that gives everybody the same whole answer.
fn tls_server(certificate: &rcgen::CertifiedKey<rcgen::KeyPair>) -> std::net::SocketAddr {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = certificate.signing_key.serialize_der().try_into().unwrap();
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.cert.der().clone()], key)
        .unwrap();
    let (tls, listener) = (Arc::new(tls), TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let session = rustls::ServerConnection::new(tls.clone()).unwrap();
            let mut stream = BufReader::new(rustls::StreamOwned::new(session, stream));
            let mut length = 0;
            let mut line = String::new();
            while stream.read_line(&mut line).is_ok_and(|read| read > 2) {
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
                    length = value.trim().parse().unwrap();
                }
                line.clear();
            }
            if stream.read_exact(&mut vec![0; length]).is_ok() && length > 0 {
                let body = json!({"choices": [{"index": 0, "message": {"role": "assistant", "content": "Safe."}, "finish_reason": "stop"}], "usage": usage(1)});
                let _ = stream.get_mut().write_all(&response("200 OK", &[("connection", "close")], &body.to_string()));
            }
        }
    });
    address
}

#[test]
fn an_upstream_is_reached_over_tls_if_its_certificate_is_trusted_and_names_it() {
    let [good, other] =
        ["localhost", "localhost"].map(|name| rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap());
    let misnamed = rcgen::generate_simple_self_signed(vec!["elsewhere".to_owned()]).unwrap();
    for (certificate, trusted, status) in [(&good, &good, 200), (&good, &other, 502), (&misnamed, &misnamed, 502)] {
        let address = tls_server(certificate);
        let setup = Setup::shipped();
        setup.add_upstream("safe", &format!("https://localhost:{}/v1", address.port()), "remote-model");
        std::fs::write(setup.path("ca.pem"), trusted.cert.pem()).unwrap();
        setup.replace("routes.toml", "connect_timeout = \"10s\"", "connect_timeout = \"10s\"\nca = \"ca.pem\"");
        append(&setup.path("routes.toml"), "\n[routes.remote]\nsplit = { remote-model = 1 }\n");
        let gateway = setup.start();
        let answer = gateway.post(&remote(json!({})));
        assert_eq!(answer.status, status, "{}", String::from_utf8_lossy(&answer.body));
        if status == 200 {
            assert_eq!(answer.json()["choices"][0]["message"]["content"], "Safe.");
        } else {
            assert_eq!(code(&answer), (502, "upstream_tls".into()));
        }
    }
}

/// Speaks HTTP/2 without TLS; the first so many requests are refused unprocessed. Counts connections and requests.
fn h2_server(refuse: usize) -> (std::net::SocketAddr, Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let (connections, requests) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (counted, asked) = (connections.clone(), requests.clone());
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async move {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            tell.send(listener.local_addr().unwrap()).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::SeqCst);
                let asked = asked.clone();
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    while let Some(Ok((request, mut respond))) = connection.accept().await {
                        if asked.fetch_add(1, Ordering::SeqCst) < refuse {
                            respond.send_reset(h2::Reason::REFUSED_STREAM);
                            continue;
                        }
                        assert_eq!(request.uri().path(), "/v1/chat/completions");
                        tokio::spawn(h2_answer(request.into_body(), respond));
                    }
                });
            }
        });
    });
    (told.recv().unwrap(), connections, requests)
}

async fn h2_answer(mut body: h2::RecvStream, mut respond: h2::server::SendResponse<bytes::Bytes>) {
    let mut asked = Vec::new();
    while let Some(Ok(data)) = body.data().await {
        let _ = body.flow_control().release_capacity(data.len());
        asked.extend_from_slice(&data);
    }
    let asked: Value = serde_json::from_slice(&asked).unwrap();
    let (kind, answer) = if asked["stream"] == true {
        let mut last = delta(json!({}), Some("stop"));
        last["usage"] = usage(2);
        let events = [delta(json!({"content": "Over "}), None), delta(json!({"content": "HTTP/2."}), None), last];
        let mut bytes: Vec<u8> = events.iter().flat_map(event).collect();
        bytes.extend(b"data: [DONE]\n\n");
        ("text/event-stream", bytes)
    } else {
        let message = json!({"role": "assistant", "content": "Over HTTP/2."});
        let body = json!({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage(2)});
        ("application/json", body.to_string().into_bytes())
    };
    let head = ::http::Response::builder().header("content-type", kind).body(()).unwrap();
    let mut out = respond.send_response(head, false).unwrap();
    out.send_data(answer.into(), true).unwrap();
}

fn h2_gateway(address: std::net::SocketAddr) -> TestGateway {
    let setup = Setup::shipped();
    setup.add_upstream("two", &format!("http://{address}/v1"), "remote-model");
    setup.replace("routes.toml", "connect_timeout = \"10s\"", "connect_timeout = \"10s\"\nhttp2 = true");
    append(&setup.path("routes.toml"), "\n[routes.remote]\nsplit = { remote-model = 1 }\n");
    setup.start()
}

#[test]
fn an_upstream_that_speaks_http_2_serves_many_requests_on_one_connection() {
    let (address, connections, requests) = h2_server(0);
    let gateway = h2_gateway(address);
    assert_eq!(gateway.post(&remote(json!({}))).json()["choices"][0]["message"]["content"], "Over HTTP/2.");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(text(&gateway.post(&remote(json!({"stream": true})))), "Over HTTP/2."));
        }
    });
    let rows = settled(&gateway, 9);
    assert!(rows.iter().all(|row| story(row).1 == "answered" && story(row).2 == "reported"), "{rows:?}");
    assert_eq!((connections.load(Ordering::SeqCst), requests.load(Ordering::SeqCst)), (1, 9));
}

#[test]
fn a_stream_that_http_2_refused_unprocessed_is_sent_once_more() {
    let (address, _, requests) = h2_server(1);
    let gateway = h2_gateway(address);
    assert_eq!(gateway.post(&remote(json!({}))).status, 200);
    let told: Vec<_> = settled(&gateway, 2).iter().map(|row| (story(row).0, story(row).1)).collect();
    let expected = [("primary", "failed_over"), ("retry", "answered")].map(|(r, o)| (r.to_owned(), o.to_owned()));
    assert_eq!((told, requests.load(Ordering::SeqCst)), (expected.to_vec(), 2));
}

#[test]
fn who_leaves_before_an_upstream_fails_owes_nothing() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "").start();
    upstream.always(Script::Hang(Vec::new()));
    let client = gateway.open_unread(&gateway.chat_bytes(&remote(json!({})), &[]));
    eventually("the call", || (upstream.calls() == 1).then_some(()));
    drop(client);
    // It closes without an answer.
    upstream.release();
    let row = &settled(&gateway, 1)[0];
    assert_eq!((story(row).1.as_str(), story(row).5), ("failed", 0), "{row}");
}

#[test]
fn usage_of_images_is_believed_where_text_alone_would_not_be() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "").start();
    let message = json!({"role": "assistant", "content": "A cat."});
    let usage = json!({"prompt_tokens": 25_000, "completion_tokens": 3});
    let body = json!({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage});
    let image = json!([{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "https://images.invalid/cat.png"}}]);
    for (content, source) in [(image, "reported"), (json!("What is this?"), "estimated")] {
        upstream.plays(Script::Raw(response("200 OK", &[], &body.to_string())));
        let mut request = remote(json!({}));
        request["messages"][0]["content"] = content;
        assert_eq!(gateway.post(&request).json()["glassgate"]["usage_source"], source);
    }
}

#[test]
fn after_a_hang_up_the_upstream_is_heard_to_its_usage_or_billed_by_count() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "").start();
    // It goes on after the client has left, and says in the end what it used.
    let chunked =
        |data: &[u8]| [format!("{:x}\r\n", data.len()).into_bytes(), data.to_vec(), b"\r\n".to_vec()].concat();
    let begun = [stream_head(true), chunked(&event(&delta(json!({"content": "One "}), None)))].concat();
    upstream.plays(Script::Hang(begun.clone()));
    let mut open = gateway.open(&gateway.chat_bytes(&remote(json!({"stream": true})), &[]));
    open.chunk().unwrap();
    drop(open);
    // The hanging stream ends when the mock lets go of it, without usage: billed by count.
    eventually("the client's hang-up to be noticed", || {
        (gateway.metric("gateway_in_flight_requests", &[]) == 1.0).then_some(())
    });
    upstream.release();
    let row = &settled(&gateway, 1)[0];
    let (role, outcome, source, _, output, billed) = story(row);
    assert_eq!(
        (role.as_str(), outcome.as_str(), source.as_str(), output),
        ("primary", "aborted", "estimated", 2),
        "{row}"
    );
    assert!(billed > 0);

    // A client that leaves a stream of many words: the usage event still comes, and is what is billed.
    upstream.always(Script::Answer(words(&"word ".repeat(400))));
    let mut open = gateway.open(&gateway.chat_bytes(&remote(json!({"stream": true})), &[]));
    open.chunk().unwrap();
    drop(open);
    let rows = settled(&gateway, 2);
    let (_, outcome, source, input, output, billed) = story(rows.last().unwrap());
    assert_eq!((source.as_str(), input, output, billed), ("reported", 11, 400, price(400)));
    assert!(["aborted", "answered"].contains(&outcome.as_str()));
}

#[test]
fn the_whole_answers_time_covers_all_attempts() {
    let upstream = Upstream::start();
    let route = "fallback = [\"remote-two\", \"glimmer-2\"]\ntimeouts = { first_token = \"400ms\", idle = \"5s\", total = \"600ms\" }";
    let setup = Setup::upstream(&upstream, route);
    setup.add_upstream("second", &upstream.url(), "remote-two");
    let gateway = setup.start();
    upstream.always(Script::Hang(Vec::new()));
    let began = std::time::Instant::now();
    let response = gateway.post(&remote(json!({"stream": true})));
    assert!(began.elapsed() < Duration::from_secs(3));
    assert_eq!(code(&response), (504, "timeout".into()));
    let rows = settled(&gateway, 2);
    let told: Vec<_> = rows.iter().map(|row| story(row).1).collect();
    assert_eq!(told, ["failed_over", "timed_out"]);
    eventually("the upstream to be left", || (upstream.left() == 2).then_some(()));
}
