//! Traces to any OTLP backend: what arrives is right, every span is accounted for, and whatever the backend does, no
//! request notices.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use serde_json::{Value, json};

use crate::support::collector::{Collector, Mood, attributes, hex};
use crate::support::evidence::{LedgerRow, ledger};
use crate::support::gateway::{Setup, TestGateway, chat, chat_with, metric};
use crate::support::http;
use crate::support::{eventually, root};

const SECRET: &str = "sk-lf-that-nobody-may-see";

/// The shipped configuration with further sinks.
fn with_sinks(sinks: &str) -> Setup {
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "[[telemetry.traces]]", &format!("{sinks}\n[[telemetry.traces]]"));
    setup
}

/// An `otlp` sink with further keys.
fn otlp(address: SocketAddr, more: &str) -> String {
    format!("[[telemetry.traces]]\nkind = \"otlp\"\nendpoint = \"http://{address}/v1/traces\"\n{more}\n")
}

/// Spans of one sink by what became of them.
fn tally(gateway: &TestGateway, sink: &str) -> BTreeMap<String, u64> {
    let text = gateway.metrics();
    ["exported", "dropped", "failed", "rejected", "sampled_out"]
        .map(|result| {
            let labels = [format!("sink=\"{sink}\""), format!("result=\"{result}\"")];
            let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
            (result.to_owned(), metric(&text, "gateway_telemetry_spans_total", &labels) as u64)
        })
        .into_iter()
        .filter(|(_, spans)| *spans > 0)
        .collect()
}

/// Waits until a sink has accounted for so many spans.
fn accounted(gateway: &TestGateway, sink: &str, spans: u64) -> BTreeMap<String, u64> {
    eventually(&format!("{sink} to account for {spans} spans"), || {
        let tally = tally(gateway, sink);
        (tally.values().sum::<u64>() >= spans).then_some(tally)
    })
}

fn counts(counts: &[(&str, u64)]) -> BTreeMap<String, u64> {
    counts.iter().map(|(result, spans)| ((*result).to_owned(), *spans)).collect()
}

/// The spans of two answers, a stream, a list and a refusal.
const ALL: u64 = 3 * 5 + 1 + 1;

/// What a collector does in turn, keys of its sink, and what became of the spans.
type Case = (&'static [Mood], &'static str, &'static [(&'static str, u64)]);

/// Sends them and returns what was said.
fn traffic(gateway: &TestGateway) -> Vec<String> {
    // One session, so that every gateway takes the same variant.
    let send = |body| gateway.send(&gateway.chat_bytes(&body, &[("x-session-id", "1")]));
    let content = |body: Value| body["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let mut said = ["What is Glassgate?", "12 + 34 = ?"].map(|question| content(send(chat(question)).json())).to_vec();
    let stream = send(chat_with("Sort: 9 4 7 1", json!({"stream": true})));
    said.push(stream.chunks().iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect());
    let models = gateway.send(&http::get("/v1/models", Some(&gateway.key)));
    let refused = gateway.post(&chat_with("Hello!", json!({"temperature": 9})));
    said.extend([models.status.to_string(), refused.status.to_string()]);
    said
}

#[test]
fn whatever_a_collector_does_no_answer_changes_and_every_span_is_accounted_for() {
    let expected = {
        let setup = Setup::shipped();
        setup.replace("gateway.toml", "[[telemetry.traces]]\nkind = \"file\"", "");
        traffic(&setup.start())
    };
    let cases: &[Case] = &[
        (&[Mood::Accept], "", &[("exported", ALL)]),
        (&[Mood::Hang], "timeout = \"100ms\"", &[("failed", ALL)]),
        (&[Mood::Answer(400, "")], "", &[("failed", ALL)]),
        (&[Mood::Answer(307, "location: /elsewhere\r\n")], "", &[("failed", ALL)]),
        (&[Mood::Answer(500, "")], "", &[("failed", ALL)]),
        (&[Mood::Answer(503, ""), Mood::Answer(502, ""), Mood::Accept], "", &[("exported", ALL)]),
        (&[Mood::Answer(503, "")], "retry_for = \"1ms\"", &[("failed", ALL)]),
        (&[Mood::Partial(1)], "", &[]),
        (&[Mood::HangUp, Mood::Accept], "", &[("exported", ALL)]),
        (&[Mood::HangUp], "retry_for = \"1ms\"", &[("failed", ALL)]),
        (&[Mood::Endless], "timeout = \"1s\"", &[("exported", ALL)]),
        (&[], "retry_for = \"1ms\"", &[("failed", ALL)]),
    ];
    std::thread::scope(|scope| {
        for case in cases {
            scope.spawn(|| one_mood(case, &expected));
        }
    });
}

/// One gateway, one collector, and the same traffic as for everybody.
fn one_mood(&(moods, keys, became): &Case, expected: &[String]) {
    let collector = Collector::start(moods);
    // Nobody listens on port 1.
    let address = if moods.is_empty() { SocketAddr::from(([127, 0, 0, 1], 1)) } else { collector.address };
    let gateway = with_sinks(&otlp(address, keys)).start();
    let began = Instant::now();
    assert_eq!(traffic(&gateway), expected, "{moods:?}");
    let took = began.elapsed();
    let found = accounted(&gateway, "otlp", ALL);
    if let [Mood::Partial(rejected)] = moods {
        let rejected = *rejected as u64 * collector.posts().len() as u64;
        assert_eq!(found, counts(&[("exported", ALL - rejected), ("rejected", rejected)]), "never tried again");
    } else {
        assert_eq!(found, counts(became), "{moods:?}");
    }
    // What must not be sent twice is not: here every try carries spans of its own.
    if moods.len() == 1 && !keys.contains("retry_for") {
        let mut ids = BTreeSet::new();
        assert!(collector.spans().iter().all(|span| ids.insert(span.span_id.clone())), "{moods:?}: sent twice");
    }
    assert_eq!(accounted(&gateway, "file", ALL), counts(&[("exported", ALL)]), "{moods:?}: another sink noticed");
    assert!(took < Duration::from_secs(10), "{moods:?}: {took:?}");
}

#[test]
fn a_slow_collector_holds_nobody_up_and_what_its_queue_cannot_take_is_counted() {
    let collector = Collector::start(&[Mood::Wait]);
    let gateway = with_sinks(&otlp(collector.address, "queue_max = 2")).start();
    gateway.ask("12 + 34 = ?");
    eventually("the first batch to be under way", || (!collector.posts().is_empty()).then_some(()));
    // While the collector is silent two more records find room, and the next three do not.
    for _ in 0..5 {
        assert_eq!(gateway.send(&http::get("/v1/models", Some(&gateway.key))).status, 200);
    }
    assert_eq!(accounted(&gateway, "otlp", 3), counts(&[("dropped", 3)]));
    assert_eq!(gateway.metric("gateway_telemetry_queue_length", &["sink=\"otlp\""]), 2.0);
    assert_eq!(accounted(&gateway, "file", 10), counts(&[("exported", 10)]), "the other sink has a queue of its own");
    collector.open_gate();
    assert_eq!(accounted(&gateway, "otlp", 10), counts(&[("dropped", 3), ("exported", 7)]));
    assert_eq!(gateway.metric("gateway_telemetry_queue_length", &[]), 0.0);
}

#[test]
fn a_collector_that_asks_for_time_gets_it() {
    let collector = Collector::start(&[Mood::Answer(429, "retry-after: 1\r\n"), Mood::Accept]);
    let gateway = with_sinks(&otlp(collector.address, "")).start();
    gateway.ask("12 + 34 = ?");
    assert_eq!(accounted(&gateway, "otlp", 5), counts(&[("exported", 5)]));
    let posts = collector.posts();
    assert_eq!(posts.len(), 2);
    assert_eq!(posts[0].spans, posts[1].spans, "the same batch, once more");
    let waited = posts[1].at - posts[0].at;
    assert!(waited >= Duration::from_secs(1), "asked for a second, came back after {waited:?}");
}

#[test]
fn what_is_queued_at_the_end_is_sent() {
    let collector = Collector::start(&[Mood::Accept]);
    let mut gateway = with_sinks(&otlp(collector.address, "")).start();
    for _ in 0..20 {
        gateway.post(&chat("12 + 34 = ?"));
    }
    gateway.stop();
    assert_eq!(collector.spans().len(), 100);
    assert!(!gateway.stderr().contains("dropped"), "{}", gateway.stderr());
}

#[test]
fn an_end_does_not_wait_for_a_collector_that_hangs_and_says_what_is_lost() {
    let collector = Collector::start(&[Mood::Hang]);
    let setup = with_sinks(&otlp(collector.address, ""));
    setup.env("NO_COLOR", "1");
    let mut gateway = setup.start();
    gateway.ask("12 + 34 = ?");
    eventually("the batch to be under way", || (!collector.posts().is_empty()).then_some(()));
    gateway.ask("12 + 34 = ?");
    let began = Instant::now();
    gateway.stop();
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    let said = gateway.stderr();
    // Both the batch under way and what was queued behind it.
    assert!(said.contains("are dropped") && said.contains("spans=10") && said.contains("sink=otlp"), "{said}");
}

/// The one inference span of a trace.
fn generation(spans: &[Span]) -> &Span {
    let mut generations =
        spans.iter().filter(|span| attributes(&span.attributes)["langfuse.observation.type"] == "generation");
    let found = generations.next().expect("a generation");
    assert!(generations.next().is_none(), "a second generation would be paid for twice");
    found
}

#[test]
fn langfuse_gets_its_keys_its_headers_and_on_every_span_what_it_groups_by() {
    let collector = Collector::start(&[Mood::Accept]);
    let setup = with_sinks(&format!(
        "environment = \"test\"\n[[telemetry.traces]]\nkind = \"langfuse\"\nendpoint = \"http://{}/\"\n\
         public_key = \"pk-lf-1\"\nsecret_key = \"env:LF_SECRET\"\nheaders = {{ x-tenant = \"env:TENANT\" }}\n",
        collector.address
    ));
    setup.env("LF_SECRET", SECRET);
    setup.env("TENANT", "acme");
    // Meant for the one backend of other programs: a key in it must not reach this one.
    setup.env("OTEL_EXPORTER_OTLP_HEADERS", "x-stray=1");
    let mut gateway = setup.start();
    let shown = gateway.admin("GET", "/admin/config").json();
    let bytes = gateway.chat_bytes(
        &chat_with("Sort: 9 4 7 1", json!({"stream": true, "user": "alice", "max_tokens": 8, "seed": 7})),
        &[("x-session-id", "session-1")],
    );
    let id = gateway.send(&bytes).header("x-request-id").unwrap().to_owned();
    gateway.stop();
    let row: LedgerRow = ledger(&gateway).pop().unwrap();
    let log: Value = serde_json::from_str(gateway.stdout().lines().next().unwrap()).unwrap();

    let posts = collector.posts();
    assert_eq!(posts.len(), 1);
    let (post, spans) = (&posts[0], &posts[0].spans);
    assert_eq!(post.path, "/api/public/otel/v1/traces");
    let pair = base64(&format!("pk-lf-1:{SECRET}"));
    for (name, value) in [
        ("authorization", format!("Basic {pair}").as_str()),
        ("x-langfuse-ingestion-version", "4"),
        ("x-tenant", "acme"),
        ("content-type", "application/x-protobuf"),
        ("content-encoding", "gzip"),
        ("user-agent", concat!("glassgate/", env!("CARGO_PKG_VERSION"))),
    ] {
        assert_eq!(post.headers.get(name).map(String::as_str), Some(value), "{name}");
    }
    assert!(!post.headers.contains_key("x-stray"));
    assert_eq!(post.resource["service.name"], "glassgate");
    assert_eq!(post.resource["deployment.environment.name"], "test");

    // Ids and parents: one tree, as the log and the response say.
    let by_name: HashMap<&str, &Span> = spans.iter().map(|span| (span.name.as_str(), span)).collect();
    assert_eq!(by_name.len(), 5);
    let server = by_name["POST /v1/chat/completions"];
    let inference = generation(spans);
    assert_eq!(hex(&server.span_id), log["span_id"]);
    assert!(server.parent_span_id.is_empty());
    assert_eq!(inference.name, "chat assistant");
    assert_eq!(inference.parent_span_id, server.span_id);
    assert_eq!(server.kind, SpanKind::Server as i32);
    assert_eq!(inference.kind, SpanKind::Internal as i32, "the model runs in this process");
    for phase in ["queue", "prefill", "decode"] {
        assert_eq!(by_name[phase].parent_span_id, inference.span_id);
    }
    for span in spans {
        assert_eq!(hex(&span.trace_id), log["trace_id"]);
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano);
        assert!(server.start_time_unix_nano <= span.start_time_unix_nano);
        let found = attributes(&span.attributes);
        for (name, value) in [
            ("langfuse.user.id", "alice".to_owned()),
            ("langfuse.session.id", "session-1".to_owned()),
            ("langfuse.trace.name", "assistant".to_owned()),
            ("langfuse.trace.tags", format!("route:assistant,variant:{}", row.variant)),
            ("langfuse.version", format!("assistant:{}", row.variant)),
            ("langfuse.environment", "test".to_owned()),
            ("langfuse.release", env!("CARGO_PKG_VERSION").to_owned()),
        ] {
            assert_eq!(found.get(name), Some(&value), "{name} of {}", span.name);
        }
        if span.span_id != inference.span_id {
            assert_eq!(found["langfuse.observation.type"], "span", "{}", span.name);
            let guesses = ["model", "gen_ai.request.model", "gen_ai.response.model", "gen_ai.operation.name"];
            let named = guesses.iter().find(|name| found.contains_key(**name));
            assert_eq!(named, None, "{} would be taken for a generation", span.name);
            assert!(!found.keys().any(|name| name.starts_with("gen_ai.usage")), "{}", span.name);
        }
    }

    let said = attributes(&inference.attributes);
    let json = |name: &str| serde_json::from_str::<Value>(&said[name]).unwrap();
    let usage = json("langfuse.observation.usage_details");
    assert_eq!(
        usage,
        json!({"input": row.input, "input_cached_tokens": 0, "input_cache_creation": 0, "output": row.output,
               "output_reasoning_tokens": 0, "total": row.input + row.output})
    );
    let cost = format!("0.{:09}", row.billed);
    assert_eq!(said["langfuse.observation.cost_details"], format!("{{\"total\":{cost}}}"), "as written, no float");
    assert!(json("langfuse.observation.cost_details")["total"].is_f64(), "and JSON takes it for a number");
    assert_eq!([&said["glassgate.cost_usd"], log["cost_usd"].as_str().unwrap()], [&cost, &cost]);
    assert_eq!(said["langfuse.observation.model.name"], row.variant);
    assert_eq!(
        json("langfuse.observation.model.parameters"),
        json!({"max_tokens": 8, "temperature": 0.0, "seed": 7, "stream": true})
    );
    assert_eq!(said["langfuse.observation.level"], "DEFAULT");
    assert_eq!(said["gen_ai.response.id"], format!("chatcmpl-{id}"));
    let first = &said["langfuse.observation.completion_start_time"];
    assert!(first.len() == 27 && first.ends_with('Z') && &first[10..11] == "T", "{first}");
    assert!(first.as_str() >= log["ts"].as_str().unwrap());

    // The secret was sent, and is shown nowhere.
    let sink = shown["telemetry"]["traces"][0].clone();
    assert_eq!(sink["name"], "langfuse");
    assert_eq!(sink["headers"]["authorization"], "***");
    for text in [shown.to_string(), gateway.stderr(), gateway.stdout()] {
        assert!(!text.contains(SECRET) && !text.contains(&pair), "{text}");
    }
}

/// Written out: the test must not trust the library that it checks.
fn base64(text: &str) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for three in text.as_bytes().chunks(3) {
        let bits = (0..3).fold(0_u32, |bits, at| bits << 8 | u32::from(three.get(at).copied().unwrap_or(0)));
        for at in 0..4 {
            let letter = ALPHABET[(bits >> (18 - 6 * at)) as usize & 63] as char;
            out.push(if at <= three.len() { letter } else { '=' });
        }
    }
    out
}

#[test]
fn a_refusal_and_a_hang_up_are_an_error_and_a_warning() {
    let collector = Collector::start(&[Mood::Accept]);
    let mut gateway = with_sinks(&otlp(collector.address, "")).start();
    let refused = gateway.post(&chat_with("Hello!", json!({"temperature": 9})));
    let refused = refused.header("x-request-id").unwrap().to_owned();
    let mut open = gateway.open(&gateway.chat_bytes(&crate::support::gateway::long(1000), &[]));
    open.chunk().unwrap();
    drop(open);
    eventually("the aborted row", || ledger(&gateway).pop());
    gateway.stop();
    let spans = collector.spans();
    let found = attributes(&generation(&spans).attributes);
    assert_eq!(found["langfuse.observation.level"], "WARNING");
    assert_eq!(found["langfuse.observation.status_message"], "client_closed_request");
    let server = spans
        .iter()
        .map(|span| attributes(&span.attributes))
        .find(|found| found.get("glassgate.request_id") == Some(&refused))
        .unwrap();
    assert_eq!(server["error.type"], "invalid_parameter");
    assert_eq!(server["langfuse.observation.type"], "span");
}

#[test]
fn sampling_keeps_the_same_traces_in_every_sink_and_every_error() {
    let collector = Collector::start(&[Mood::Accept]);
    let setup = with_sinks(&otlp(collector.address, "sample = 0.25"));
    setup.replace("gateway.toml", "kind = \"file\"", "sample = 0.25\nkind = \"file\"");
    let mut gateway = setup.start();
    // The lower half of a trace id decides, as OpenTelemetry's own ratio sampler has it.
    let traces = [
        ("0000000000000001", false),
        ("3fffffffffffffff", false),
        ("4000000000000000", true),
        ("ffffffffffffffff", true),
        ("ffffffffffffffff", false),
    ];
    for (number, (low, broken)) in traces.into_iter().enumerate() {
        let parent = format!("00-{number:015x}1{low}-00f067aa0ba902b7-01");
        let body = if broken { chat_with("Hello!", json!({"temperature": 9})) } else { chat("12 + 34 = ?") };
        gateway.send(&gateway.chat_bytes(&body, &[("traceparent", &parent)]));
    }
    for sink in ["otlp", "file"] {
        assert_eq!(accounted(&gateway, sink, 17), counts(&[("exported", 12), ("sampled_out", 5)]), "{sink}");
    }
    gateway.stop();
    let kept: BTreeSet<String> = collector.spans().iter().map(|span| hex(&span.trace_id)).collect();
    let expected = [0, 1, 2, 3].map(|number| format!("{number:015x}1{}", traces[number].0));
    assert_eq!(kept, BTreeSet::from(expected));
    let file = std::fs::read_to_string(gateway.data_dir().join("traces.jsonl")).unwrap();
    assert_eq!(file.lines().count(), 4);
    assert!(kept.iter().all(|trace| file.contains(trace)));
}

#[test]
fn several_sinks_of_a_kind_are_told_apart() {
    let (first, second) = (Collector::start(&[Mood::Accept]), Collector::start(&[Mood::Answer(400, "")]));
    let gateway = with_sinks(&(otlp(first.address, "") + &otlp(second.address, ""))).start();
    gateway.ask("12 + 34 = ?");
    assert_eq!(accounted(&gateway, "otlp", 5), counts(&[("exported", 5)]));
    assert_eq!(accounted(&gateway, "otlp-2", 5), counts(&[("failed", 5)]));
}

#[test]
fn spans_travel_over_tls_to_a_collector_whose_certificate_is_trusted_and_to_no_other() {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], made.signing_key.serialize_der().try_into().unwrap())
        .unwrap();
    let collector = Collector::start_tls(&[Mood::Accept], tls);
    let other = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    for (trusted, became) in [(&made, "exported"), (&other, "failed")] {
        let sink = otlp(collector.address, "retry_for = \"1ms\"").replace("http://127.0.0.1", "https://localhost");
        let setup = with_sinks(&sink);
        let roots = setup.0.path().join("roots.pem");
        std::fs::write(&roots, trusted.cert.pem()).unwrap();
        setup.env("SSL_CERT_FILE", roots.to_str().unwrap());
        let gateway = setup.start();
        gateway.ask("12 + 34 = ?");
        assert_eq!(accounted(&gateway, "otlp", 5), counts(&[(became, 5)]), "{}", gateway.stderr());
    }
    assert_eq!(collector.spans().len(), 5);
}

#[test]
fn what_a_sink_lacks_is_said_with_file_and_line_and_without_secrets() {
    let langfuse = "[[telemetry.traces]]\nkind = \"langfuse\"\nendpoint = \"https://cloud.langfuse.com\"\n";
    let mistakes: &[(&str, &[&str])] = &[
        ("[[telemetry.traces]]\nkind = \"otlp\"\n", &["line +0", "needs an `endpoint`"]),
        (&format!("{langfuse}public_key = \"pk\"\n"), &["line +0", "needs a `secret_key`"]),
        (
            &format!("{langfuse}public_key = \"pk\"\nsecret_key = \"env:NOT_SET\"\n"),
            &["line +4", "the environment variable `NOT_SET` is not set"],
        ),
        (&format!("{langfuse}public_key = \"pk\"\nsecret_key = \"{SECRET}\"\n"), &["line +4", "must be \"env:NAME\""]),
        (
            &format!(
                "{langfuse}public_key = \"pk\"\nsecret_key = \"env:BROKEN\"\nheaders = {{ x-a = \"env:BROKEN\" }}\n"
            ),
            &["line +5", "the value of `x-a` cannot be sent"],
        ),
        (
            &format!(
                "{langfuse}public_key = \"pk\"\nsecret_key = \"env:GOOD\"\nheaders = {{ authorization = \"x\" }}\n"
            ),
            &["line +5", "`authorization` cannot be set here"],
        ),
        (&langfuse.replace(".com", ".com/api/public/otel/v1/traces"), &["line +2", "is the host of Langfuse"]),
        (
            &format!("[[telemetry.traces]]\nkind = \"otlp\"\nendpoint = \"https://me:{SECRET}@host/v1/traces\"\n"),
            &["line +2", "without a password"],
        ),
        (
            "[[telemetry.traces]]\nkind = \"otlp\"\nendpoint = \"http://a/v1/traces\"\nsample = 1.5\npublic_key = \"a\"\n",
            &["line +3", "a share from 0 to 1", "line +4", "unknown key"],
        ),
        ("[[telemetry.traces]]\nkind = \"oltp\"\n", &["line +1", "Did you mean `otlp`?"]),
    ];
    for (sink, expected) in mistakes {
        let setup = with_sinks(sink);
        setup.env("BROKEN", "a\u{1}b");
        setup.env("GOOD", SECRET);
        let output = setup.run(&["check"]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "accepted: {sink}");
        let shipped = std::fs::read_to_string(root().join("configs/gateway.toml")).unwrap();
        let first = 1 + shipped.lines().take_while(|line| !line.starts_with("[[telemetry.traces]]")).count();
        for text in *expected {
            // A line is counted from the sink's own first.
            let text = match text.strip_prefix("line +") {
                Some(line) => format!("gateway.toml:{}:", first + line.parse::<usize>().unwrap()),
                None => (*text).to_owned(),
            };
            assert!(said.contains(&text), "{sink}: {text:?} is missing in:\n{said}");
        }
        assert!(!said.contains(SECRET), "{said}");
    }
}

#[test]
fn trace_shows_the_waterfall_in_the_order_of_the_path() {
    let gateway = TestGateway::start();
    for stream in [false, true] {
        let response = gateway.post(&chat_with("What is Glassgate?", json!({"stream": stream})));
        let id = response.header("x-request-id").unwrap();
        let shown = eventually("the record to close", || {
            let output = gateway.run(&["trace", id]);
            output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
        });
        let table = shown.split("took\n").nth(1).unwrap();
        let rows: Vec<(&str, f64, f64)> = table
            .lines()
            .map(|line| {
                let mut words = line.split_whitespace();
                let name = words.next().unwrap();
                let from: f64 = words.next().unwrap().parse().unwrap();
                assert_eq!(words.next(), Some("ms"));
                let took: f64 = words.next().unwrap().parse().unwrap();
                assert!(line.contains('█'), "{line}");
                (name, from, took)
            })
            .collect();
        let names: Vec<&str> = rows.iter().map(|(name, ..)| *name).collect();
        let expected = [
            "auth", "door", "body", "route", "measure", "admit", "attempts", "attempt", "queue", "prefill", "decode",
            "relay", "settle", "total",
        ];
        assert_eq!(names, expected, "{shown}");
        let total = rows.last().unwrap().2;
        for (name, from, took) in &rows {
            assert!(*from >= 0.0 && *took >= 0.0 && from + took <= total + 0.01, "{name} is outside:\n{shown}");
        }
        for pair in rows[..6].windows(2) {
            assert!((pair[0].1 + pair[0].2 - pair[1].1).abs() < 0.002, "each begins where the last ended:\n{shown}");
        }
    }
}
