//! Conservation: after mixed traffic every witness tells the same story, and each leg of that check can fail.

use std::sync::Arc;
use std::thread;

use serde_json::json;

use crate::support::evidence::{Evidence, Seen};
use crate::support::gateway::{TestGateway, chat, chat_with, long};
use crate::support::http;

const QUESTIONS: [&str; 6] = [
    "What is Glassgate?",
    "12 + 34 = ?",
    "Sort: 9 4 7 1",
    "이 영화 정말 재미있어요!",
    "Reverse the words: red green blue",
    "안녕하세요 👋🏽",
];

/// One client's share of the traffic: answers in both forms, hang-ups at different moments, refusals of every kind.
fn client(gateway: &TestGateway, number: usize) -> Vec<Seen> {
    let mut seen = Vec::new();
    for round in 0..20 {
        let question = QUESTIONS[(number + round) % QUESTIONS.len()];
        let session = format!("session-{number}-{round}");
        let with_session = |body: &serde_json::Value| gateway.chat_bytes(body, &[("x-session-id", &session)]);
        match round % 10 {
            0 | 1 | 5 => {
                let response = gateway.send(&with_session(&chat(question)));
                seen.push(Seen::whole(&response, Some(question), true));
            }
            2 | 6 => {
                let body = chat_with(question, json!({"stream": true, "stream_options": {"include_usage": true}}));
                seen.push(Seen::whole(&gateway.send(&with_session(&body)), Some(question), true));
            }
            3 => {
                let body =
                    chat_with(question, json!({"stream": true, "temperature": 1.0, "seed": round, "max_tokens": 24}));
                seen.push(Seen::whole(&gateway.send(&with_session(&body)), Some(question), true));
            }
            4 | 7 => seen.push(hang_up(gateway, number * 3 + round)),
            8 => {
                let response = gateway.post(&chat_with(question, json!({"temperature": 9})));
                seen.push(Seen::whole(&response, None, true));
                let response = gateway.post(&chat_with(question, json!({"max_tokens": 1_000_000})));
                seen.push(Seen::whole(&response, None, true));
            }
            _ => {
                let mut body = chat(question);
                body["model"] = "gpt-5".into();
                seen.push(Seen::whole(&gateway.post(&body), None, true));
                let bytes = http::post("/v1/chat/completions", Some("gg-nobody"), &[], b"{}");
                seen.push(Seen::whole(&gateway.send(&bytes), None, false));
                seen.push(Seen::whole(&gateway.send(&http::get("/v1/models", Some(&gateway.key))), None, true));
            }
        }
    }
    seen
}

/// Reads a few pieces of a long stream and leaves.
fn hang_up(gateway: &TestGateway, after: usize) -> Seen {
    let mut open = gateway.open(&gateway.chat_bytes(&long(400), &[]));
    let id = open.header("x-request-id").unwrap().to_owned();
    let mut pieces = 0;
    for _ in 0..after % 17 {
        let Ok(Some(data)) = open.chunk() else { break };
        pieces += String::from_utf8_lossy(&data).matches("\"delta\":{\"content\":\"").count() as u64;
    }
    Seen {
        request_id: id,
        status: 200,
        error_code: None,
        usage: None,
        cost_usd: None,
        pieces,
        prompt: Some("Count up from 1 to 99.".into()),
        authenticated: true,
    }
}

fn traffic() -> Evidence {
    let mut gateway = Arc::new(TestGateway::start());
    let clients: Vec<_> = (0..6)
        .map(|number| {
            let gateway = gateway.clone();
            thread::spawn(move || client(&gateway, number))
        })
        .collect();
    let seen = clients.into_iter().flat_map(|client| client.join().expect("a client")).collect();
    Evidence::gather(Arc::get_mut(&mut gateway).expect("the clients are done"), seen)
}

/// Damages one thing and tells which leg must notice.
type Fault = (&'static str, fn(&mut Evidence));

/// Every leg, and a fault that only it is there to find.
const FAULTS: [Fault; 16] = [
    ("record", |e| drop(e.log.pop())),
    ("record", |e| e.log.push(e.log[0].clone())),
    ("client", |e| e.seen.iter_mut().find_map(|seen| seen.usage.as_mut()).unwrap().1 += 1),
    ("client", |e| {
        e.seen.iter_mut().find(|seen| seen.cost_usd.is_some()).unwrap().cost_usd = Some("0.000000001".into())
    }),
    ("client", |e| {
        e.seen
            .iter_mut()
            .find(|seen| {
                seen.usage.is_none() && seen.status == 200 && seen.error_code.is_none() && seen.prompt.is_some()
            })
            .unwrap()
            .pieces = 10_000
    }),
    ("ledger", |e| e.rows.push(e.rows[0].clone())),
    ("log", |e| drop(e.rows.pop())),
    ("log", |e| e.log.iter_mut().find(|line| line["tokens"].is_object()).unwrap()["tokens"]["output"] = 9999.into()),
    ("span", |e| drop(e.spans.remove(0))),
    ("span", |e| {
        e.spans
            .iter_mut()
            .flat_map(|span| span["attributes"].as_array_mut().unwrap())
            .find(|a| a["key"] == "gen_ai.usage.output_tokens")
            .unwrap()["value"] = json!({"intValue": "9999"})
    }),
    ("metric", |e| e.metrics = e.metrics.replacen("gateway_tokens_total{", "gateway_tokens_lost{", 1)),
    ("metric", |e| e.metrics = e.metrics.replacen("gateway_requests_total{", "gateway_requests_lost{", 1)),
    ("metric", |e| e.metrics = e.metrics.replacen("gateway_cost_usd_total{", "gateway_cost_lost{", 1)),
    ("metric", |e| e.metrics = e.metrics.replace("reason=\"model_not_found\"", "reason=\"lost\"")),
    ("engine", |e| e.metrics = e.metrics.replacen("runtime_generated_tokens_total{", "runtime_generated_lost{", 1)),
    ("price", |e| e.rows.iter_mut().find(|row| row.billed > 0).unwrap().billed += 1),
];

#[test]
fn every_witness_tells_the_same_story_and_each_leg_of_the_oracle_can_fail() {
    let evidence = traffic();
    let disagreements = evidence.disagreements();
    assert!(disagreements.is_empty(), "{} disagreements:\n{}", disagreements.len(), disagreements.join("\n"));

    let outcomes = |outcome: &str| evidence.rows.iter().filter(|row| row.outcome == outcome).count();
    println!(
        "{} requests, {} rows: {} answered, {} aborted",
        evidence.seen.len(),
        evidence.rows.len(),
        outcomes("answered"),
        outcomes("aborted")
    );
    assert!(outcomes("answered") >= 50 && outcomes("aborted") >= 10, "the traffic must be mixed to prove anything");
    for variant in ["glimmer-1", "glimmer-2"] {
        assert!(evidence.rows.iter().any(|row| row.variant == variant), "{variant} got no request");
    }

    for (number, (leg, damage)) in FAULTS.iter().enumerate() {
        let mut damaged = evidence.clone();
        damage(&mut damaged);
        let found = damaged.disagreements();
        assert!(
            found.iter().any(|line| line.starts_with(leg)),
            "fault {number} was not noticed by the leg `{leg}`: {found:?}"
        );
    }
    let mut recounted = evidence;
    for row in &mut recounted.rows {
        row.input += u64::from(row.input > 0);
    }
    assert!(recounted.disagreements().iter().any(|line| line.starts_with("recount")));
}
