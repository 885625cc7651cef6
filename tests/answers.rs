//! What a client gets from `/v1/chat/completions`, and what it leaves behind.

use serde_json::{Value, json};

use crate::support::evidence::attribute;
use crate::support::gateway::{TestGateway, chat, chat_with, connect, long, metric};
use crate::support::{eventually, http};

/// The gate of the whole: one request, and four records of it that agree.
#[test]
fn the_printed_curl_line_streams_an_answer_and_leaves_four_agreeing_records() {
    let mut gateway = TestGateway::start();
    // The line itself, as a newcomer copies it, run by the real curl.
    let greeting = gateway.stderr();
    let line = greeting.split("Try it:").nth(1).expect("the greeting has a curl line").trim().to_owned();
    assert!(line.starts_with("curl -N "), "{line}");
    let output =
        std::process::Command::new("bash").arg("-c").arg(format!("{line} -sS -D /dev/stderr")).output().unwrap();
    assert!(output.status.success());
    let (head, body) = (String::from_utf8(output.stderr).unwrap(), String::from_utf8(output.stdout).unwrap());
    assert!(body.trim_end().ends_with("data: [DONE]"), "{body}");
    let chunks: Vec<Value> = body
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .filter(|event| *event != "[DONE]")
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert!(text.contains("Glassgate"), "a model that was trained on itself knows its name: {text:?}");
    let said = chunks.last().unwrap()["glassgate"].clone();
    let id = said["request_id"].as_str().unwrap().to_owned();
    assert!(head.to_lowercase().contains(&format!("x-request-id: {id}")));

    let metrics = eventually("the request to be counted", || {
        let text = gateway.metrics();
        (metric(&text, "gateway_in_flight_requests", &[]) == 0.0 && metric(&text, "gateway_requests_total", &[]) == 1.0)
            .then_some(text)
    });
    gateway.stop();
    let log: Value = serde_json::from_str(gateway.stdout().lines().next().unwrap()).unwrap();
    let traces = std::fs::read_to_string(gateway.data_dir().join("traces.jsonl")).unwrap();
    let trace: Value = serde_json::from_str(traces.lines().next().unwrap()).unwrap();
    let span = trace["resourceSpans"][0]["scopeSpans"][0]["spans"]
        .as_array()
        .unwrap()
        .iter()
        .find(|span| span["name"] == "chat assistant")
        .unwrap()
        .clone();
    let row = &crate::support::evidence::ledger(&gateway)[0];

    let story = (
        said["usage"]["input"].as_u64().unwrap(),
        said["usage"]["output"].as_u64().unwrap(),
        said["cost_usd"].as_str().unwrap().to_owned(),
    );
    assert!(story.0 > 0 && story.1 > 0);
    let number = |key: &str| attribute(&span, key).unwrap().parse::<u64>().unwrap();
    assert_eq!(story, (row.input, row.output, format!("0.{:09}", row.billed)), "the ledger");
    assert_eq!(
        story,
        (
            log["tokens"]["input"].as_u64().unwrap(),
            log["tokens"]["output"].as_u64().unwrap(),
            log["cost_usd"].as_str().unwrap().to_owned()
        ),
        "the log"
    );
    assert_eq!(
        story,
        (
            number("gen_ai.usage.input_tokens"),
            number("gen_ai.usage.output_tokens"),
            attribute(&span, "glassgate.cost_usd").unwrap()
        ),
        "the span"
    );
    let tokens = |kind: &str| metric(&metrics, "gateway_tokens_total", &[&format!("kind=\"{kind}\"")]) as u64;
    let cost = metrics
        .lines()
        .find(|line| line.starts_with("gateway_cost_usd_total{"))
        .unwrap()
        .rsplit(' ')
        .next()
        .unwrap()
        .to_owned();
    assert_eq!(story, (tokens("input"), tokens("output"), cost), "the metrics");
    assert_eq!([row.request_id.as_str(), log["request_id"].as_str().unwrap()], [&id, &id]);
    assert_eq!(log["trace_id"], span["traceId"]);
}

#[test]
fn a_streamed_answer_and_a_whole_one_are_the_same() {
    let gateway = TestGateway::start();
    for question in ["What is Glassgate?", "12 + 34 = ?", "이 영화 정말 재미있어요!"] {
        let whole = gateway.ask(question);
        let response =
            gateway.post(&chat_with(question, json!({"stream": true, "stream_options": {"include_usage": true}})));
        let chunks = response.chunks();
        let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(text, whole);
        assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
        let usage = chunks.last().unwrap();
        assert_eq!(usage["choices"], json!([]), "the usage chunk has no choices");
        assert!(
            chunks[..chunks.len() - 1]
                .iter()
                .all(|chunk| chunk.as_object().unwrap().get("usage") == Some(&Value::Null))
        );
        assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], "stop");
    }
}

#[test]
fn a_seed_repeats_an_answer_and_another_seed_gives_another() {
    let gateway = TestGateway::start();
    let ask = |seed: u64| {
        let response = gateway.post(&chat_with("Hello!", json!({"temperature": 1.5, "seed": seed, "max_tokens": 32})));
        response.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    assert_eq!(ask(1), ask(1));
    let different = (2..12).map(ask).collect::<std::collections::HashSet<_>>();
    assert!(different.len() > 1, "ten seeds at temperature 1.5 cannot all agree");
}

#[test]
fn a_stop_string_ends_the_answer_before_it() {
    let gateway = TestGateway::start();
    let whole = gateway.ask("What is Glassgate?");
    let middle = whole.char_indices().nth(whole.chars().count() / 2).unwrap().0;
    let stop: String = whole[middle..].chars().take(3).collect();
    let response = gateway.post(&chat_with("What is Glassgate?", json!({"stop": [stop]})));
    let body = response.json();
    assert_eq!(body["choices"][0]["message"]["content"], whole[..whole.find(&stop).unwrap()]);
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
}

#[test]
fn max_tokens_bounds_the_answer_and_says_length() {
    let gateway = TestGateway::start();
    for (field, tokens) in [("max_tokens", 3), ("max_completion_tokens", 5)] {
        let response = gateway.post(&chat_with("What is Glassgate?", json!({(field): tokens})));
        let body = response.json();
        assert_eq!(body["usage"]["completion_tokens"], tokens);
        assert_eq!(body["choices"][0]["finish_reason"], "length");
    }
}

#[test]
fn a_client_that_hangs_up_frees_its_sequence_and_pays_for_what_was_produced() {
    let gateway = TestGateway::start();
    let mut open = gateway.open(&gateway.chat_bytes(&long(1000), &[]));
    let id = open.header("x-request-id").unwrap().to_owned();
    for _ in 0..8 {
        open.chunk().unwrap();
    }
    drop(open);
    let row = eventually("the aborted row", || {
        crate::support::evidence::ledger(&gateway).into_iter().find(|row| row.request_id == id)
    });
    assert_eq!(row.outcome, "aborted");
    assert!((8..1000).contains(&row.output), "{} tokens", row.output);
    let metrics = gateway.metrics();
    assert_eq!(metric(&metrics, "runtime_kv_blocks", &["state=\"used\""]), 0.0);
    assert_eq!(metric(&metrics, "runtime_requests", &[]), 0.0);
    assert_eq!(metric(&metrics, "runtime_generated_tokens_total", &[]), row.output as f64);
}

#[test]
fn a_client_that_hangs_up_before_the_first_byte_is_noticed_too() {
    let gateway = TestGateway::start();
    let mut body = long(1000);
    body["stream"] = false.into();
    let (mut stream, _) = connect(gateway.data);
    std::io::Write::write_all(&mut stream, &gateway.chat_bytes(&body, &[])).unwrap();
    eventually("the sequence to run", || {
        (gateway.metric("runtime_requests", &["state=\"running\""]) == 1.0).then_some(())
    });
    stream.shutdown(std::net::Shutdown::Both).unwrap();
    let row = eventually("the aborted row", || crate::support::evidence::ledger(&gateway).pop());
    assert_eq!(row.outcome, "aborted");
    assert!(row.output < 1000);
    let line = eventually("the log line", || gateway.stdout().lines().next().map(str::to_owned));
    let line: Value = serde_json::from_str(&line).unwrap();
    assert_eq!([&line["status"], &line["error_type"]], [&json!(499), &json!("client_closed_request")]);
}

#[test]
fn two_pipelined_requests_are_both_answered_in_order() {
    let gateway = TestGateway::start();
    let (mut stream, mut reader) = connect(gateway.data);
    let mut bytes = gateway.chat_bytes(&chat("12 + 34 = ?"), &[]);
    bytes.extend(http::get("/v1/models", Some(&gateway.key)));
    std::io::Write::write_all(&mut stream, &bytes).unwrap();
    for expected in ["chat.completion", "list"] {
        assert_eq!(read_one(&mut reader)["object"], expected);
    }
}

/// Reads one response with a content length from a kept connection.
fn read_one(reader: &mut impl std::io::BufRead) -> Value {
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    serde_json::from_slice(&body).unwrap()
}

#[test]
fn a_trace_that_the_caller_began_goes_on() {
    let mut gateway = TestGateway::start();
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let response = gateway.send(&gateway.chat_bytes(&chat("Hello!"), &[("traceparent", parent)]));
    assert!(response.header("traceparent").unwrap().starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-"));
    gateway.stop();
    let traces = std::fs::read_to_string(gateway.data_dir().join("traces.jsonl")).unwrap();
    assert!(traces.contains("\"parentSpanId\":\"00f067aa0ba902b7\""), "{traces}");
}

#[test]
fn trace_shows_where_one_request_went() {
    let gateway = TestGateway::start();
    let response = gateway.post(&chat("12 + 34 = ?"));
    let id = response.header("x-request-id").unwrap();
    let shown = eventually("the record to close", || {
        let output = gateway.run(&["trace", id]);
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    });
    for word in ["answered", "quickstart", "route assistant", "measure", "prefill", "decode", "billed", id] {
        assert!(shown.contains(word), "{word} is missing:\n{shown}");
    }
    let unknown = gateway.run(&["trace", "0000"]);
    assert!(!unknown.status.success() && String::from_utf8_lossy(&unknown.stderr).contains("traces.jsonl"));
}

#[test]
fn models_lists_the_route_first_and_probes_need_no_key() {
    let gateway = TestGateway::start();
    let models = gateway.send(&http::get("/v1/models", Some(&gateway.key))).json();
    assert_eq!(models["data"][0]["id"], "assistant");
    assert_eq!(gateway.send(&http::get("/v1/models/assistant", Some(&gateway.key))).json()["id"], "assistant");
    assert_eq!(gateway.send(&http::get("/health", None)).json()["status"], "ok");
    assert_eq!(gateway.send(&http::get("/", None)).json()["name"], "Glassgate");
    for probe in ["/livez", "/readyz", "/startupz"] {
        assert_eq!(gateway.admin_get(probe).status, 200, "{probe}");
    }
}
