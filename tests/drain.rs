//! How the gateway goes: it says so first, serves what still comes, lets what runs finish, and cuts what does not.

use std::io::Write;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::RecvStream;
use h2::client::SendRequest;
use serde_json::json;

use crate::support::eventually;
use crate::support::evidence::ledger;
use crate::support::gateway::{Setup, TestGateway, chat, chat_with, connect, long};
use crate::support::http::{self, Open, Response};

const STREAMS: usize = 50;
const TOKENS: u32 = 150;
const SIGTERMS: usize = 20;

/// A gateway whose answers may be long, and which takes so long to go.
fn going(pre_drain: &str, drain: &str) -> TestGateway {
    going_with(pre_drain, drain, "")
}

fn going_with(pre_drain: &str, drain: &str, more: &str) -> TestGateway {
    let setup = Setup::shipped();
    let keys = format!("pre_drain = \"{pre_drain}\"\ndrain = \"{drain}\"\n{more}");
    setup.replace("gateway.toml", "pre_drain = \"0s\"", &keys);
    // One thread, so that a bigger machine does not finish in time after all.
    setup.replace("gateway.toml", "device = \"auto\"", "device = \"auto\"\nthreads = 1");
    for model in ["glimmer-1", "glimmer-2"] {
        let source = format!("source = \"{model}\"");
        setup.replace("routes.toml", &source, &format!("{source}\noutput_max = 2000"));
    }
    setup.start()
}

/// Streams that have begun and that nobody reads on yet.
fn begun(gateway: &TestGateway, count: usize, tokens: u32) -> Vec<Open> {
    let bytes = gateway.chat_bytes(&long(tokens), &[]);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..count)
            .map(|_| {
                scope.spawn(|| {
                    let mut open = gateway.open(&bytes);
                    open.chunk().unwrap();
                    open
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    })
}

/// Reads all to their ends, at the same time.
fn finish(streams: Vec<Open>) -> Vec<Response> {
    std::thread::scope(|scope| {
        let readers: Vec<_> = streams.into_iter().map(|stream| scope.spawn(|| stream.finish())).collect();
        readers.into_iter().map(|reader| reader.join().unwrap()).collect()
    })
}

fn until_unready(gateway: &TestGateway) {
    eventually("readiness to turn", || (gateway.admin_get("/readyz").status == 503).then_some(()));
}

#[test]
fn no_sigterm_cuts_a_stream_that_can_finish() {
    for round in 0..SIGTERMS {
        let mut gateway = going("0s", "60s");
        let mut streams = begun(&gateway, STREAMS, TOKENS);
        // Another moment of their lives each time.
        for stream in &mut streams {
            for _ in 0..round % 7 {
                stream.chunk().unwrap();
            }
        }
        let live = gateway.metric("gateway_in_flight_requests", &[]);
        assert!(live > 0.0, "all had ended before the signal: round {round} proved nothing");
        gateway.terminate();
        for response in finish(streams) {
            let chunks = response.chunks();
            assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
        }
        gateway.wait_end();
        let rows = ledger(&gateway);
        assert_eq!(rows.len(), STREAMS);
        assert!(rows.iter().all(|row| row.outcome == "answered" && row.output == u64::from(TOKENS)), "round {round}");
    }
}

#[test]
fn requests_are_served_before_the_drain_and_refused_during_it() {
    let mut gateway = going("3s", "60s");
    let short = chat_with("12 + 34 = ?", json!({"max_tokens": 2}));
    let (mut kept, reader) = connect(gateway.data);
    kept.write_all(&http::get("/health", None)).unwrap();
    let (before, reader) = http::read_head(reader).unwrap().finish_and_keep();
    assert_eq!((before.status, before.header("connection")), (200, Some("keep-alive")));
    // A body under way keeps the drain waiting for as long as we like: so much of it has come that it may rest.
    let body = format!("{}{short}", " ".repeat(200_000));
    let bytes = http::post("/v1/chat/completions", Some(&gateway.key), &[], body.as_bytes());
    let (most, rest) = bytes.split_at(bytes.len() - 10);
    let (mut running, running_reader) = connect(gateway.data);
    running.write_all(most).unwrap();
    eventually("it to be in flight", || (gateway.metric("gateway_in_flight_requests", &[]) == 1.0).then_some(()));
    gateway.terminate();
    until_unready(&gateway);
    let served = gateway.post(&short);
    assert_eq!((served.status, served.header("connection")), (200, Some("close")), "a new connection is served");
    let streamed = gateway.send(&gateway.chat_bytes(&chat_with("Hello!", json!({"stream": true})), &[]));
    assert_eq!((streamed.chunks().is_empty(), streamed.header("connection")), (false, Some("close")));
    kept.write_all(&gateway.chat_bytes(&short, &[])).unwrap();
    let served = http::read_head(reader).unwrap().finish();
    assert_eq!((served.status, served.header("connection")), (200, Some("close")), "one from before is served too");
    assert_eq!(gateway.send(&http::get("/health", None)).status, 503, "while health says that we are going");

    let refused = eventually("the drain", || Some(gateway.post(&short)).filter(|response| response.status != 200));
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str().unwrap()), (503, "shutting_down"));
    assert_eq!(refused.header("connection"), Some("close"));
    assert!(refused.header("retry-after").is_some());
    running.write_all(rest).unwrap();
    let finished = http::read_head(running_reader).unwrap().finish();
    assert_eq!((finished.status, finished.header("connection")), (200, Some("close")), "what ran runs on");
    let idle = Instant::now();
    gateway.wait_end();
    assert!(idle.elapsed() < Duration::from_secs(10), "with nothing to wait for it ends: {:?}", idle.elapsed());
}

fn assert_cut(gateway: &TestGateway, responses: &[Response]) {
    for response in responses {
        assert_eq!(response.status, 200);
        assert!(!response.complete, "a cut stream must not look complete");
        let events = response.events();
        let last: serde_json::Value = serde_json::from_str(events.last().unwrap()).unwrap();
        assert_eq!(last["error"]["code"], "shutting_down");
        assert!(!events.iter().any(|event| event == "[DONE]" || event.contains("glassgate\":{")));
    }
    let rows = ledger(gateway);
    let cut: Vec<_> = rows.iter().filter(|row| row.outcome == "cut" && row.output > 0).collect();
    assert_eq!(cut.len(), responses.len(), "{rows:?}");
    for (row, response) in cut.iter().flat_map(|row| responses.iter().map(move |response| (row, response))) {
        if response.header("x-request-id") == Some(&row.request_id) {
            // The role comes with the first piece and the error after the last; each piece is one token or more.
            assert!(row.output as usize + 2 >= response.events().len() && row.output < 1900, "{row:?}");
            assert!(row.billed > 0, "what was delivered is owed");
        }
    }
    let log = gateway.stdout();
    assert_eq!(log.matches("\"outcome\":\"cut\"").count(), rows.len(), "the log tells the same: {log}");
}

#[test]
fn what_is_not_done_at_the_deadline_is_cut_and_says_so() {
    let mut gateway = going("0s", "100ms");
    let streams = begun(&gateway, 8, 1900);
    let whole = chat_with("Count.", json!({"max_tokens": 1900, "ignore_eos": true}));
    let bytes = gateway.chat_bytes(&whole, &[]);
    let address = gateway.data;
    let waiting = std::thread::spawn(move || http::raw(address, &bytes).unwrap().finish());
    // And one that is still sending its body: it was never admitted, so it leaves no row.
    let (mut sending, reader) = connect(gateway.data);
    let head = String::from_utf8(gateway.chat_bytes(&whole, &[])).unwrap();
    sending.write_all(&head.as_bytes()[..head.len() - 5]).unwrap();
    eventually("all to be in flight", || (gateway.metric("gateway_in_flight_requests", &[]) == 10.0).then_some(()));
    let signalled = Instant::now();
    gateway.terminate();
    let responses = finish(streams);
    let whole = waiting.join().unwrap();
    assert_eq!((whole.status, whole.json()["error"]["code"].as_str().unwrap()), (503, "shutting_down"));
    let unsent = http::read_head(reader).unwrap().finish();
    assert_eq!((unsent.status, unsent.json()["error"]["code"].as_str().unwrap()), (503, "shutting_down"));
    gateway.wait_end();
    assert!(signalled.elapsed() < Duration::from_secs(20), "{:?}", signalled.elapsed());
    assert_cut(&gateway, &responses);
    let rows = ledger(&gateway);
    assert_eq!(rows.len(), 9, "exactly one row each");
    let nothing = rows.iter().find(|row| row.output == 0).unwrap();
    assert_eq!((nothing.outcome.as_str(), nothing.billed), ("cut", 0), "who only got an error does not pay");
}

#[test]
fn a_second_signal_cuts_at_once() {
    for (pre_drain, first) in [("60s", "-TERM"), ("0s", "-TERM"), ("60s", "-INT")] {
        let mut gateway = going(pre_drain, "60s");
        let streams = begun(&gateway, 8, 1900);
        gateway.signal(first);
        until_unready(&gateway);
        let signalled = Instant::now();
        gateway.signal("-TERM");
        let responses = finish(streams);
        gateway.wait_end();
        assert!(signalled.elapsed() < Duration::from_secs(20), "{:?}", signalled.elapsed());
        assert_cut(&gateway, &responses);
    }
}

#[test]
fn an_idle_gateway_ends_at_once_and_a_developer_never_waits() {
    for (pre_drain, signal) in [("0s", "-TERM"), ("60s", "-INT")] {
        let mut gateway = going(pre_drain, "60s");
        assert_eq!(gateway.post(&chat("Hello!")).status, 200);
        // Connections that rest are nobody's request.
        let resting: Vec<_> = (0..10).map(|_| connect(gateway.data)).collect();
        let signalled = Instant::now();
        gateway.signal(signal);
        gateway.wait_end();
        assert!(signalled.elapsed() < Duration::from_secs(20), "{signal}: {:?}", signalled.elapsed());
        drop(resting);
    }
}

/// An HTTP/2 connection with the smallest windows, driven in the background, and a stream on it that has begun.
async fn begun_on_http2(gateway: &TestGateway, body: &serde_json::Value) -> (SendRequest<Bytes>, RecvStream) {
    let socket = tokio::net::TcpStream::connect(gateway.data).await.unwrap();
    let (client, connection) = h2::client::handshake(socket).await.unwrap();
    tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let request = ::http::Request::post("http://gateway/v1/chat/completions")
        .header("authorization", format!("Bearer {}", gateway.key))
        .header("content-type", "application/json");
    let (response, mut send) = client.send_request(request.body(()).unwrap(), false).unwrap();
    send.send_data(body.to_string().into(), true).unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.status(), 200);
    (client, response.into_body())
}

async fn rest(mut stream: RecvStream) -> String {
    let mut text = Vec::new();
    while let Some(data) = stream.data().await {
        let data = data.unwrap();
        stream.flow_control().release_capacity(data.len()).unwrap();
        text.extend_from_slice(&data);
    }
    String::from_utf8(text).unwrap()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

#[test]
fn an_http2_connection_is_said_goodbye_to_and_its_streams_finish() {
    let mut gateway = going_with("2s", "30s", "http2 = true");
    run(async {
        // More than the window holds: it cannot end before we read.
        let (client, stream) = begun_on_http2(&gateway, &long(1000)).await;
        gateway.terminate();
        until_unready(&gateway);
        let (_later, other) = begun_on_http2(&gateway, &long(5)).await;
        assert!(rest(other).await.ends_with("data: [DONE]\n\n"), "a new connection is served");
        let mut client = client;
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::future::poll_fn(|cx| client.poll_ready(cx)).await.is_ok() {
            assert!(Instant::now() < deadline, "there was no GOAWAY");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(rest(stream).await.ends_with("data: [DONE]\n\n"), "what ran runs on");
    });
    gateway.wait_end();
}

#[test]
fn a_stream_that_is_stuck_in_a_write_is_cut_like_any_other() {
    let mut gateway = going_with("0s", "300ms", "http2 = true");
    run(async {
        // Nobody makes room in its window, so that it soon waits for room.
        let (_client, stream) = begun_on_http2(&gateway, &long(1900)).await;
        let signalled = Instant::now();
        gateway.terminate();
        gateway.wait_end();
        assert!(signalled.elapsed() < Duration::from_secs(20), "{:?}", signalled.elapsed());
        drop(stream);
    });
    let rows = ledger(&gateway);
    assert_eq!((rows.len(), rows[0].outcome.as_str()), (1, "cut"));
    assert!(rows[0].output > 0 && rows[0].billed > 0, "what was delivered is owed");
}

#[test]
fn a_client_that_does_not_read_cannot_keep_us() {
    let mut gateway = going("0s", "100ms");
    let stalled = begun(&gateway, 8, 1900);
    let signalled = Instant::now();
    gateway.terminate();
    gateway.wait_end();
    assert!(signalled.elapsed() < Duration::from_secs(8), "{:?}", signalled.elapsed());
    drop(stalled);
    let rows = ledger(&gateway);
    assert_eq!(rows.len(), 8, "one row each, wherever they were: {rows:?}");
    assert!(rows.iter().all(|row| row.output > 0 && row.billed > 0), "{rows:?}");
    assert_eq!(gateway.stdout().lines().count(), 8);
}
