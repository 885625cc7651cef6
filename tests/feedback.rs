//! What clients say of answers: whose, once, for good, and counted exactly.

use std::io::BufReader;
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::gateway::{Setup, TestGateway, chat, chat_with, check, remote};
use crate::support::http::{self, Response};
use crate::support::upstream::{Script, Upstream, delta, response, stream_of};

const CACHED: &str = "sticky   = [";
const WITH_CACHE: &str = "cache    = { ttl = \"10m\" }\nsticky   = [";

fn judge_as(gateway: &TestGateway, key: &str, body: &Value) -> Response {
    gateway.send(&http::post("/v1/feedback", Some(key), &[], body.to_string().as_bytes()))
}

fn judge(gateway: &TestGateway, body: &Value) -> Response {
    judge_as(gateway, &gateway.key, body)
}

fn correct(response_id: &str, value: impl Into<Value>) -> Value {
    json!({"response_id": response_id, "name": "correct", "value": value.into()})
}

/// The status of a judgement that was taken.
fn taken(response: &Response) -> String {
    assert_eq!(response.status, 200, "{}", response.json());
    response.json()["status"].as_str().unwrap().to_owned()
}

fn refused(response: &Response) -> (u16, String) {
    (response.status, response.json()["error"]["code"].as_str().unwrap_or_default().to_owned())
}

fn id(response: &Response) -> String {
    assert_eq!(response.status, 200, "{}", String::from_utf8_lossy(&response.body));
    response.json()["id"].as_str().unwrap().to_owned()
}

fn ask(gateway: &TestGateway) -> String {
    id(&gateway.post(&chat("12 + 34 = ?")))
}

/// request_id, name, kind, number, label, comment
type Row = (String, String, String, Option<f64>, Option<String>, Option<String>);

fn rows(gateway: &TestGateway) -> Vec<Row> {
    let db = Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let mut query =
        db.prepare("SELECT request_id, name, kind, number, label, comment FROM feedback ORDER BY created_ns").unwrap();
    let rows = query
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?)))
        .unwrap();
    rows.collect::<rusqlite::Result<_>>().unwrap()
}

fn counted(gateway: &TestGateway, family: &str, value: &str) -> f64 {
    gateway.metric(family, &[&format!("value=\"{value}\"")])
}

fn key(gateway: &TestGateway, args: &[&str]) -> String {
    let key = gateway.cli(&[&["keys", "create"], args].concat()).trim().to_owned();
    let models = http::get("/v1/models", Some(&key));
    eventually("the key to count", || (gateway.send(&models).status == 200).then_some(()));
    key
}

#[test]
fn a_judgement_joins_the_answers_row_and_is_counted_once_however_often_it_is_sent() {
    let gateway = TestGateway::start();
    let answer = ask(&gateway);
    let first = judge(&gateway, &json!({"response_id": answer, "name": "correct", "value": false, "comment": "46?"}));
    assert_eq!(taken(&first), "created");
    let body = first.json();
    assert_eq!((&body["object"], &body["response_id"]), (&json!("feedback"), &json!(answer)));
    assert_eq!((&body["name"], &body["value"]), (&json!("correct"), &json!(false)));
    let again = judge(&gateway, &correct(&answer, false));
    assert_eq!((taken(&again).as_str(), &again.json()["id"]), ("unchanged", &body["id"]));
    let revised = judge(&gateway, &correct(&answer, true));
    assert_eq!((taken(&revised).as_str(), &revised.json()["id"]), ("revised", &body["id"]));

    let request = answer.strip_prefix("chatcmpl-").unwrap().to_owned();
    let expected = (request.clone(), "correct".into(), "boolean".into(), Some(1.0), None, Some("46?".into()));
    assert_eq!(rows(&gateway), [expected]);
    let (total, withdrawn) = ("gateway_feedback_total", "gateway_feedback_revised_total");
    assert_eq!((counted(&gateway, total, "false"), counted(&gateway, withdrawn, "false")), (1.0, 1.0));
    assert_eq!((counted(&gateway, total, "true"), counted(&gateway, withdrawn, "true")), (1.0, 0.0));

    let told: Value = serde_json::from_str(&gateway.cli(&["feedback", "--json"])).unwrap();
    let line = &told[0];
    assert_eq!((&line["answers"], &line["judged"], &line["estimate"]["value"]), (&json!(1), &json!(1), &json!(1.0)));
    let other_words =
        judge(&gateway, &json!({"response_id": answer, "name": "correct", "value": true, "comment": "46!"}));
    assert_eq!(taken(&other_words), "revised");
    assert_eq!(rows(&gateway)[0].5.as_deref(), Some("46!"));
    assert_eq!((counted(&gateway, total, "true"), counted(&gateway, withdrawn, "true")), (1.0, 0.0));
    let db = Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let joined: String = db
        .query_row("SELECT ledger.response_id FROM feedback JOIN ledger USING (request_id)", [], |row| row.get(0))
        .unwrap();
    assert_eq!(joined, answer);
}

#[test]
fn numbers_and_labels_are_judgements_too_and_each_name_is_its_own() {
    let gateway = TestGateway::start();
    let answer = ask(&gateway);
    for (name, value) in [("stars", json!(4.5)), ("tone", json!("warm")), ("stars", json!(2)), ("tone", json!("rude"))]
    {
        let said = judge(&gateway, &json!({"response_id": answer, "name": name, "value": value}));
        assert_eq!(said.json()["value"].as_f64(), value.as_f64(), "{}", said.json());
        taken(&said);
    }
    let stand = |(_, name, kind, number, label, _): Row| (name, kind, number, label);
    assert_eq!(
        rows(&gateway).into_iter().map(stand).collect::<Vec<_>>(),
        [
            ("stars".into(), "number".into(), Some(2.0), None),
            ("tone".into(), "label".into(), None, Some("rude".into()))
        ]
    );
    assert_eq!(counted(&gateway, "gateway_feedback_total", "number"), 2.0);
    assert_eq!(counted(&gateway, "gateway_feedback_revised_total", "number"), 1.0);
    assert_eq!(counted(&gateway, "gateway_feedback_revised_total", "warm"), 1.0);
    assert_eq!(gateway.metric("gateway_feedback_score_sum", &["name=\"stars\""]), 6.5);
    let told = gateway.cli(&["feedback", "--name", "tone"]);
    assert!(told.contains("rude 100.0 %") && !told.contains("stars"), "{told}");
}

#[test]
fn only_the_tenant_that_was_answered_may_judge_and_nobody_learns_whose_answer_it_was() {
    let gateway = TestGateway::start();
    let (sibling, stranger) = (key(&gateway, &["sibling"]), key(&gateway, &["stranger", "--tenant", "somebody-else"]));
    let response = gateway.post(&chat("12 + 34 = ?"));
    let (answer, trace) = (id(&response), response.header("traceparent").unwrap()[3..35].to_owned());
    let foreign = judge_as(&gateway, &stranger, &correct(&answer, true));
    let unknown = judge_as(&gateway, &stranger, &correct("chatcmpl-00000000000000000000000000000000", true));
    assert_eq!(refused(&foreign), (404, "answer_not_found".into()));
    assert_eq!(foreign.body, unknown.body);
    let by_trace = json!({"trace_id": trace, "name": "correct", "value": true});
    assert_eq!(refused(&judge_as(&gateway, &stranger, &by_trace)), (404, "answer_not_found".into()));
    // The same tenant's other key has a judgement of its own.
    assert_eq!(taken(&judge(&gateway, &correct(&answer, true))), "created");
    assert_eq!(taken(&judge_as(&gateway, &sibling, &by_trace)), "created");
    assert_eq!(rows(&gateway).len(), 2);
    assert_eq!(counted(&gateway, "gateway_feedback_total", "true"), 2.0);
}

#[test]
fn a_trace_says_which_answer_is_meant_unless_it_holds_several() {
    let gateway = TestGateway::start();
    let by_trace = |trace: &str| json!({"trace_id": trace, "name": "correct", "value": true});
    let own = gateway.post(&chat("12 + 34 = ?"));
    let trace = own.header("traceparent").unwrap()[3..35].to_owned();
    let judged = judge(&gateway, &by_trace(&trace));
    assert_eq!((taken(&judged).as_str(), judged.json()["response_id"].as_str()), ("created", Some(id(&own).as_str())));
    // The caller's own trace, and the one that we began, go on with another request.
    let parent = |trace: &str| format!("00-{trace}-b7ad6b7169203331-01");
    let theirs = "4bf92f3577b34da6a3ce929d0e0e4736";
    let asked = |trace: &str| {
        gateway.send(&gateway.chat_bytes(&chat("12 + 34 = ?"), &[("traceparent", parent(trace).as_str())]))
    };
    let first = asked(theirs);
    assert_eq!(judge(&gateway, &by_trace(theirs)).json()["response_id"], json!(id(&first)));
    for trace in [theirs, &trace] {
        let second = asked(trace);
        assert_eq!(refused(&judge(&gateway, &by_trace(trace))), (409, "trace_ambiguous".into()));
        assert_eq!(taken(&judge(&gateway, &correct(&id(&second), true))), "created");
    }
}

#[test]
fn a_hundred_who_say_the_same_at_once_are_counted_once() {
    let gateway = TestGateway::start();
    let answer = ask(&gateway);
    let statuses: Vec<String> = thread::scope(|scope| {
        let clients: Vec<_> =
            (0..100).map(|_| scope.spawn(|| taken(&judge(&gateway, &correct(&answer, true))))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(statuses.iter().filter(|status| *status == "created").count(), 1);
    assert_eq!(statuses.iter().filter(|status| *status == "unchanged").count(), 99);
    assert_eq!((rows(&gateway).len(), counted(&gateway, "gateway_feedback_total", "true")), (1, 1.0));
}

#[test]
fn what_was_taken_survives_kill_9_and_older_answers_can_still_be_judged_then() {
    let mut gateway = TestGateway::start();
    for _ in 0..5 {
        let (answer, later) = (ask(&gateway), gateway.post(&chat("What is Glassgate?")));
        taken(&judge(&gateway, &correct(&answer, true)));
        gateway.kill_and_restart();
        assert_eq!(taken(&judge(&gateway, &correct(&answer, true))), "unchanged");
        let trace = &later.header("traceparent").unwrap()[3..35];
        assert_eq!(taken(&judge(&gateway, &json!({"trace_id": trace, "name": "correct", "value": true}))), "created");
    }
    assert_eq!(rows(&gateway).len(), 10);
}

#[test]
fn answers_from_the_cache_and_broken_off_ones_and_completions_can_be_judged_and_shadows_cannot() {
    let upstream = Upstream::start();
    let setup = Setup::upstream(&upstream, "");
    setup.replace("routes.toml", "glimmer-1 = 90, glimmer-2 = 10", "glimmer-1 = 1");
    let shadow = format!("shadow   = {{ variant = \"glimmer-2\", sample = 1.0 }}\n{WITH_CACHE}");
    setup.replace("routes.toml", CACHED, &shadow);
    let gateway = setup.start();
    let made = ask(&gateway);
    let hit = gateway.post(&chat("12 + 34 = ?"));
    assert_eq!(hit.header("x-glassgate-cache"), Some("hit"));
    eventually("the shadow", || (gateway.metric("gateway_shadow_requests_total", &["paired"]) == 1.0).then_some(()));
    let body = json!({"model": "assistant", "prompt": "Once upon a time", "max_tokens": 4});
    let text = id(&gateway.send(&http::post("/v1/completions", Some(&gateway.key), &[], body.to_string().as_bytes())));
    assert!(text.starts_with("cmpl-"));
    // It says one word and no more, so that it cannot end before its client leaves.
    upstream.plays(Script::Hang(stream_of(&[delta(json!({"content": "Once"}), None)])));
    let mut open = gateway.open(&gateway.chat_bytes(&remote(json!({"stream": true})), &[]));
    let first = String::from_utf8(open.chunk().unwrap().unwrap()).unwrap();
    let event: Value = serde_json::from_str(first.lines().next().unwrap().strip_prefix("data: ").unwrap()).unwrap();
    let broken_off = event["id"].as_str().unwrap().to_owned();
    assert_eq!(refused(&judge(&gateway, &correct(&broken_off, false))), (404, "answer_not_found".into()), "not yet");
    drop(open);
    upstream.release();
    eventually("the hang-up to be noticed", || {
        (gateway.metric("gateway_in_flight_requests", &[]) == 0.0).then_some(())
    });
    for answer in [&made, &id(&hit), &text, &broken_off] {
        assert_eq!(taken(&judge(&gateway, &correct(answer, true))), "created");
    }
    let db = Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let judged = "SELECT COUNT(*) FROM feedback JOIN ledger USING (request_id) WHERE role <> 'shadow'";
    let count: i64 = db.query_row(judged, [], |row| row.get(0)).unwrap();
    assert_eq!(count, 4);
    // The shadow's row has the same request id, and is nobody's answer.
    let told: Value = serde_json::from_str(&gateway.cli(&["feedback", "--json"])).unwrap();
    let told: Vec<_> = told.as_array().unwrap().iter().map(|line| (&line["group"], &line["judged"])).collect();
    assert_eq!(told, [(&json!("glimmer-1"), &json!(3)), (&json!("remote-model"), &json!(1))]);
}

#[test]
fn answers_are_counted_with_what_they_cost_and_apart_from_replays_and_failures() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "cache = { ttl = \"10m\" }").start();
    let ask = || gateway.post(&remote(json!({"temperature": 0})));
    let cost = |response: &Response| response.json()["glassgate"]["cost_usd"].as_str().unwrap().to_owned();
    let made = ask();
    assert_eq!(ask().header("x-glassgate-cache"), Some("hit"));
    upstream.plays(Script::Raw(response("500 Internal Server Error", &[], "{}")));
    assert_eq!(gateway.post(&remote(json!({"temperature": 1}))).status, 502);
    eventually("the rows to be in the store", || {
        let told: Value = serde_json::from_str(&gateway.cli(&["feedback", "--json"])).unwrap();
        let line = &told[0];
        (line["failed"] == 1).then(|| {
            assert_eq!((&line["answers"], &line["from_cache"]), (&json!(1), &json!(1)));
            assert_eq!(line["cost_usd_per_answer"], json!(cost(&made)));
        })
    });
}

#[test]
fn a_key_judges_an_answer_under_sixteen_names_and_no_more() {
    let gateway = TestGateway::start();
    let sibling = key(&gateway, &["sibling"]);
    let answer = ask(&gateway);
    let named = |name: usize| json!({"response_id": answer, "name": format!("name-{name}"), "value": 1});
    for name in 0..16 {
        assert_eq!(taken(&judge(&gateway, &named(name))), "created");
    }
    assert_eq!(refused(&judge(&gateway, &named(16))), (409, "too_many_names".into()));
    assert_eq!(taken(&judge(&gateway, &named(3))), "unchanged");
    assert_eq!(taken(&judge_as(&gateway, &sibling, &named(16))), "created");
    assert_eq!(rows(&gateway).len(), 17);
}

#[test]
fn a_ledger_from_before_there_was_feedback_can_be_judged() {
    let mut gateway = TestGateway::start();
    let answer = ask(&gateway);
    gateway.stop();
    let path = gateway.data_dir().join("ledger.sqlite");
    let earlier =
        "DROP TABLE feedback; DROP INDEX ledger_by_foreign_trace; DROP TABLE spend_hour; DROP TABLE ledger_count; DROP TABLE ledger_kept; DROP TABLE adjustment;
                   ALTER TABLE ledger DROP COLUMN user_id; ALTER TABLE ledger DROP COLUMN unpriced;
                   ALTER TABLE ledger DROP COLUMN service_tier; ALTER TABLE ledger DROP COLUMN images; PRAGMA user_version = 0";
    Connection::open(&path).unwrap().execute_batch(earlier).unwrap();
    let early = gateway.run(&["feedback"]);
    assert!(
        String::from_utf8(early.stderr).unwrap().contains("the next start of `glassgate serve` brings it up to date")
    );
    gateway.restart();
    assert_eq!(taken(&judge(&gateway, &correct(&answer, true))), "created");
}

#[test]
fn the_trace_of_an_answer_that_was_judged_shows_the_answer() {
    let gateway = TestGateway::start();
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let parent = format!("00-{trace}-b7ad6b7169203331-01");
    let headers = [("traceparent", parent.as_str())];
    let answer = id(&gateway.send(&gateway.chat_bytes(&chat("12 + 34 = ?"), &headers)));
    let body = correct(&answer, true).to_string();
    taken(&gateway.send(&http::post("/v1/feedback", Some(&gateway.key), &headers, body.as_bytes())));
    eventually("both to end", || (gateway.metric("gateway_in_flight_requests", &[]) == 0.0).then_some(()));
    let shown: Value = serde_json::from_str(&gateway.cli(&["trace", trace, "--json"])).unwrap();
    assert_eq!((&shown["record"]["op"], &shown["record"]["response_id"]), (&json!("chat"), &json!(answer)), "{shown}");
}

#[test]
fn judging_takes_nothing_from_what_a_key_may_ask_and_has_a_limit_of_its_own() {
    let gateway = TestGateway::start();
    let small = key(&gateway, &["small", "--rpm", "1"]);
    let body = chat("12 + 34 = ?").to_string();
    let asked = http::post("/v1/chat/completions", Some(&small), &[], body.as_bytes());
    let answer = id(&gateway.send(&asked));
    for name in ["a", "b", "c", "d"] {
        taken(&judge_as(&gateway, &small, &json!({"response_id": answer, "name": name, "value": 1})));
    }
    let fifth = judge_as(&gateway, &small, &json!({"response_id": answer, "name": "e", "value": 1}));
    assert_eq!(refused(&fifth), (429, "feedback_limited".into()));
    assert!(fifth.header("retry-after").is_some());
    assert_eq!(refused(&gateway.send(&asked)), (429, "rate_limit_exceeded".into()));
    assert_eq!(gateway.metric("gateway_limit_decisions_total", &["feedback", "allowed"]), 4.0);
    assert_eq!(gateway.metric("gateway_limit_decisions_total", &["feedback", "denied"]), 1.0);
}

#[test]
fn a_judgement_that_cannot_be_right_is_refused_with_the_field_that_is_wrong() {
    let gateway = TestGateway::start();
    let answer = ask(&gateway);
    for (body, status, code, param) in [
        ("{", 400, "invalid_json", Value::Null),
        ("{\"name\":\"a\",\"name\":\"b\"}", 400, "invalid_json", Value::Null),
        ("{\"name\":\"a\",\"value\":true}", 400, "invalid_parameter", json!("response_id")),
        ("{\"response_id\":\"ID\",\"value\":true}", 400, "invalid_parameter", json!("name")),
        ("{\"response_id\":\"ID\",\"name\":\"a\"}", 400, "invalid_parameter", json!("value")),
        ("{\"response_id\":\"ID\",\"name\":\"a\",\"value\":\"true\"}", 400, "invalid_parameter", json!("value")),
        ("{\"response_id\":\"ID\",\"name\":\"a\",\"value\":1e308}", 400, "invalid_parameter", json!("value")),
        ("{\"response_id\":\"ID\",\"name\":\"a\",\"value\":1,\"why\":1}", 400, "invalid_parameter", json!("why")),
        ("{\"response_id\":\"ID-\",\"name\":\"a\",\"value\":1}", 404, "answer_not_found", json!("response_id")),
        ("{\"response_id\":\"17\",\"name\":\"a\",\"value\":1}", 404, "answer_not_found", json!("response_id")),
    ] {
        let body = body.replace("ID", &answer);
        let response = gateway.send(&http::post("/v1/feedback", Some(&gateway.key), &[], body.as_bytes()));
        assert_eq!((refused(&response), &response.json()["error"]["param"]), ((status, code.into()), &param), "{body}");
    }
    let large = format!("{{\"comment\":{:?}}}", "x".repeat(40_000));
    let sent = [
        (http::post("/v1/feedback", Some(&gateway.key), &[], large.as_bytes()), (413, "request_too_large")),
        (http::post("/v1/feedback", None, &[], b"{}"), (401, "missing_api_key")),
        (http::get("/v1/feedback", Some(&gateway.key)), (405, "method_not_allowed")),
    ];
    for (bytes, (status, code)) in sent {
        assert_eq!(refused(&gateway.send(&bytes)), (status, code.to_owned()));
    }
    assert!(rows(&gateway).is_empty());
    assert_eq!(gateway.metric("gateway_feedback_total", &[]), 0.0);
}

#[test]
fn while_the_store_is_locked_feedback_waits_and_then_says_so_and_answers_go_on() {
    let gateway = TestGateway::start();
    let answer = ask(&gateway);
    let blocker = Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    eventually("the store to be free", || blocker.execute_batch("BEGIN IMMEDIATE").ok());
    let began = Instant::now();
    let refusal = thread::scope(|scope| {
        let waiting = scope.spawn(|| judge(&gateway, &correct(&answer, true)));
        assert_eq!(gateway.post(&chat_with("12 + 34 = ?", json!({"max_tokens": 2}))).status, 200);
        waiting.join().unwrap()
    });
    assert_eq!(refused(&refusal), (503, "feedback_unavailable".into()));
    assert!(began.elapsed() >= Duration::from_secs(4), "it gave up after {:?}", began.elapsed());
    check(&refusal);
    blocker.execute_batch("ROLLBACK").unwrap();
    // What was sent again counts once, whether or not the first was still taken.
    taken(&judge(&gateway, &correct(&answer, true)));
    assert_eq!((rows(&gateway).len(), counted(&gateway, "gateway_feedback_total", "true")), (1, 1.0));
}

/// A judgement that waits for the store, and what keeps it waiting.
fn waiting(gateway: &TestGateway) -> (Connection, String, std::net::TcpStream) {
    let answer = ask(gateway);
    let blocker = Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    eventually("the store to be free", || blocker.execute_batch("BEGIN IMMEDIATE").ok());
    eventually("the answer to end", || (gateway.metric("gateway_in_flight_requests", &[]) == 0.0).then_some(()));
    let body = correct(&answer, true).to_string();
    let waiting = gateway.open_unread(&http::post("/v1/feedback", Some(&gateway.key), &[], body.as_bytes()));
    eventually("it to be let in", || {
        (gateway.metric("gateway_limit_decisions_total", &["feedback", "allowed"]) == 1.0).then_some(())
    });
    (blocker, answer, waiting)
}

fn lines(gateway: &TestGateway) -> Vec<Value> {
    let lines = gateway.stdout();
    let lines = lines.lines().map(|line| serde_json::from_str(line).unwrap());
    lines.filter(|line: &Value| line["op"] == "feedback").collect()
}

#[test]
fn feedback_that_waited_for_a_store_that_was_locked_for_a_moment_is_taken() {
    let gateway = TestGateway::start();
    let (blocker, _, waiting) = waiting(&gateway);
    blocker.execute_batch("ROLLBACK").unwrap();
    let response = http::read_head(BufReader::new(waiting)).unwrap().finish();
    assert_eq!(taken(&response), "created");
}

#[test]
fn who_hangs_up_is_not_waited_for_and_nor_is_who_waits_when_the_gateway_goes() {
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "pre_drain = \"0s\"", "pre_drain = \"0s\"\ndrain = \"1s\"");
    let mut gateway = setup.start();
    let (blocker, answer, left) = waiting(&gateway);
    drop(left);
    let line = eventually("the hang-up to be noticed", || lines(&gateway).pop());
    assert_eq!((&line["status"], &line["error_type"]), (&json!(499), &json!("client_closed_request")));
    let refusal = thread::scope(|scope| {
        let waiting = scope.spawn(|| judge(&gateway, &correct(&answer, true)));
        eventually("it to be let in", || {
            (gateway.metric("gateway_limit_decisions_total", &["feedback", "allowed"]) == 2.0).then_some(())
        });
        gateway.terminate();
        waiting.join().unwrap()
    });
    assert_eq!(refused(&refusal), (503, "shutting_down".into()));
    blocker.execute_batch("ROLLBACK").unwrap();
    gateway.wait_end();
}

#[test]
fn feedback_is_a_request_with_a_line_and_a_span_and_without_a_price() {
    let mut gateway = TestGateway::start();
    let answer = ask(&gateway);
    taken(&judge(&gateway, &correct(&answer, true)));
    // A record closes after its answer has left.
    eventually("the request to be counted", || {
        (gateway.metric("gateway_requests_total", &["op=\"feedback\"", "2xx"]) == 1.0).then_some(())
    });
    gateway.stop();
    let lines: Vec<Value> = gateway.stdout().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let line = lines.iter().find(|line| line["op"] == "feedback").expect("a line");
    assert_eq!((line["status"].as_u64(), line["response_id"].as_str()), (Some(200), Some(answer.as_str())));
    assert_eq!((&line["cost_usd"], &line["outcome"]), (&Value::Null, &json!("answered")));
    let traces = std::fs::read_to_string(gateway.data_dir().join("traces.jsonl")).unwrap();
    assert!(traces.contains("POST /v1/feedback"));
    let db = Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let count: i64 = db.query_row("SELECT COUNT(*) FROM ledger", [], |row| row.get(0)).unwrap();
    assert_eq!(count, 1, "a judgement has no row among the answers");
}
