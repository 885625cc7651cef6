//! Every way in which an answer can end other than well: each is said to the client and leaves one right row.

use serde_json::json;

use crate::support::eventually;
use crate::support::evidence::ledger;
use crate::support::gateway::{Setup, TestGateway, chat_with, long};

/// A gateway whose answers may be long and must be quick.
fn hurried(total: &str) -> TestGateway {
    let setup = Setup::shipped();
    setup.replace("routes.toml", "total = \"120s\"", &format!("total = \"{total}\""));
    // One thread, so that a bigger machine does not finish in time after all.
    setup.replace("gateway.toml", "device = \"auto\"", "device = \"auto\"\nthreads = 1");
    setup.replace("routes.toml", "source = \"glimmer-1\"", "source = \"glimmer-1\"\noutput_max = 2000");
    setup.replace("routes.toml", "source = \"glimmer-2\"", "source = \"glimmer-2\"\noutput_max = 2000");
    setup.start()
}

#[test]
fn a_stream_over_its_total_time_ends_with_an_error_event_and_no_clean_end() {
    let gateway = hurried("200ms");
    // Eight at once take far longer than one, and each begins at once.
    let bytes = gateway.chat_bytes(&long(1900), &[]);
    let responses: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(|| gateway.open(&bytes).finish())).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    for response in &responses {
        assert_eq!(response.status, 200);
        assert!(!response.complete, "a cut stream must not look complete");
        let events = response.events();
        let last: serde_json::Value = serde_json::from_str(events.last().unwrap()).unwrap();
        assert_eq!(last["error"]["code"], "timeout");
        assert!(!events.iter().any(|event| event == "[DONE]" || event.contains("glassgate\":{")));
    }
    let rows = eventually("the rows", || Some(ledger(&gateway)).filter(|rows| rows.len() == 8));
    for row in rows {
        assert_eq!(row.outcome, "timed_out");
        assert!((1..1900).contains(&row.output), "what was delivered is owed: {}", row.output);
    }
    assert_eq!(gateway.metric("gateway_requests_total", &["code_class=\"5xx\"", "error_type=\"timeout\""]), 8.0);
}

#[test]
fn a_whole_answer_that_is_not_ready_in_time_is_a_504_that_costs_nothing() {
    let gateway = hurried("20ms");
    let response = gateway.post(&chat_with("Count.", json!({"max_tokens": 1900, "ignore_eos": true})));
    assert_eq!(response.status, 504);
    assert_eq!(response.json()["error"]["code"], "timeout");
    let row = eventually("the row", || ledger(&gateway).pop());
    assert_eq!((row.outcome.as_str(), row.output, row.billed), ("timed_out", 0, 0));
}

#[test]
fn a_full_ledger_refuses_new_requests_and_the_running_ones_end_well() {
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "durability = \"process\"", "durability = \"process\"\nwal_max = \"3KiB\"");
    let gateway = setup.start();
    // One request's intent and the room for its end fill the log.
    let mut running = gateway.open(&gateway.chat_bytes(&long(600), &[]));
    running.chunk().unwrap();
    let refused = gateway.post(&chat_with("Hello!", json!({})));
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str().unwrap()), (503, "ledger_full"));
    assert!(refused.header("retry-after").is_some());
    assert_eq!(running.finish().chunks().last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[test]
fn sigterm_lets_running_streams_finish() {
    // Far more than fits into the sockets' buffers: it cannot end before we read.
    let mut gateway = hurried("120s");
    let mut running = gateway.open(&gateway.chat_bytes(&long(1900), &[]));
    running.chunk().unwrap();
    gateway.terminate();
    eventually("readiness to turn", || (gateway.admin_get("/readyz").status == 503).then_some(()));
    let response = running.finish();
    assert_eq!(response.chunks().last().unwrap()["choices"][0]["finish_reason"], "length");
    gateway.wait_end();
    assert_eq!(ledger(&gateway)[0].outcome, "answered");
}

#[test]
fn an_engine_with_a_full_queue_says_when_to_return_and_charges_nothing() {
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "device = \"auto\"", "device = \"auto\"\nqueue_max = 1\nkv_cache = \"1MiB\"");
    let gateway = setup.start();
    // The cache holds few sequences of this length and the queue holds one: of twelve at once, some must be refused.
    let bytes = gateway.chat_bytes(&long(400), &[("x-session-id", "one")]);
    let responses: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..12).map(|_| scope.spawn(|| gateway.send(&bytes))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let refused: Vec<_> = responses.iter().filter(|response| response.status == 503).collect();
    assert!(!refused.is_empty() && refused.len() < 12, "{} refused", refused.len());
    for response in &refused {
        assert_eq!(response.json()["error"]["code"], "engine_busy");
        assert!(response.header("retry-after-ms").is_some());
    }
    let rows = eventually("all rows", || Some(ledger(&gateway)).filter(|rows| rows.len() == 12));
    let released: Vec<_> = rows.iter().filter(|row| row.outcome == "released").collect();
    assert_eq!(released.len(), refused.len());
    assert!(released.iter().all(|row| row.billed == 0 && row.input == 0));
}
