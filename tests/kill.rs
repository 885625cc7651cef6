//! `kill -9` under load: what was acknowledged is there, nothing is there twice.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use rusqlite::Connection;
use serde_json::json;

use crate::support::eventually;
use crate::support::gateway::{TestGateway, chat_with, long};
use crate::support::http;

const CLIENTS: usize = 6;
const IN_FLIGHT_MIN: usize = 4;

/// How far a request had come, seen from its client, when the process died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Connecting,
    Sent,
    HeadRead,
    Streaming,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Per client, where it is now.
    phases: Mutex<HashMap<usize, Phase>>,
    /// (request id, completion tokens) of everything that was read to its end.
    acknowledged: Mutex<Vec<(String, u64)>>,
}

impl Shared {
    fn at(&self, client: usize, phase: Phase) {
        self.phases.lock().unwrap().insert(client, phase);
    }
}

/// Sends requests until told to stop; errors are what a killed server looks like.
fn client(number: usize, data: std::net::SocketAddr, key: &str, shared: &Shared) {
    let mut round = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        round += 1;
        let body = if (number + round).is_multiple_of(3) {
            chat_with("What is Glassgate?", json!({"seed": round}))
        } else {
            long(64 + (round % 5) as u32 * 40)
        };
        shared.at(number, Phase::Connecting);
        let outcome = request(number, data, key, &body, shared);
        if outcome.is_err() {
            return;
        }
    }
}

fn request(
    number: usize,
    data: std::net::SocketAddr,
    key: &str,
    body: &serde_json::Value,
    shared: &Shared,
) -> std::io::Result<()> {
    let bytes = http::post("/v1/chat/completions", Some(key), &[], body.to_string().as_bytes());
    shared.at(number, Phase::Sent);
    let mut open = http::raw(data, &bytes)?;
    shared.at(number, Phase::HeadRead);
    let id = open.header("x-request-id").expect("an id").to_owned();
    assert_eq!(open.status, 200);
    if open.header("content-type") == Some("application/json") {
        let response = open.finish();
        if response.complete {
            let tokens = response.json()["usage"]["completion_tokens"].as_u64().unwrap();
            shared.acknowledged.lock().unwrap().push((id, tokens));
            return Ok(());
        }
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let mut text = Vec::new();
    while let Some(data) = open.chunk()? {
        shared.at(number, Phase::Streaming);
        text.extend_from_slice(&data);
        // The usage itself is the acknowledgement, even if `[DONE]` no longer comes.
        if let Some(tokens) = acknowledged_tokens(&text) {
            shared.acknowledged.lock().unwrap().push((id.clone(), tokens));
            text.clear();
        }
    }
    Ok(())
}

fn acknowledged_tokens(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    let chunk = text.split("\n\n").find(|event| event.contains("\"glassgate\":"))?;
    let chunk: serde_json::Value = serde_json::from_str(chunk.strip_prefix("data: ")?).ok()?;
    chunk["glassgate"]["usage"]["output"].as_u64()
}

/// (outcome, output tokens) by request id; a duplicate would be a second row of the same id.
fn ledger(gateway: &TestGateway) -> Vec<(String, String, u64)> {
    let db = Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let mut query = db.prepare("SELECT request_id, outcome, output_tokens FROM ledger").unwrap();
    let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get::<_, i64>(2)? as u64)));
    rows.unwrap().collect::<rusqlite::Result<_>>().unwrap()
}

#[test]
fn a_kill_loses_no_acknowledged_row_and_doubles_none() {
    let kills: usize = std::env::var("GLASSGATE_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(20);
    let mut gateway = TestGateway::start();
    let mut histogram: BTreeMap<Phase, usize> = BTreeMap::new();
    let mut acknowledged: Vec<(String, u64)> = Vec::new();
    let mut killed_rows = 0;
    let mut least = usize::MAX;
    for round in 0..kills {
        let shared = Arc::new(Shared::default());
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let (shared, data, key) = (shared.clone(), gateway.data, gateway.key.clone());
                thread::spawn(move || client(number, data, &key, &shared))
            })
            .collect();
        // Another moment of the traffic each time: after so many acknowledged answers, and enough requests in flight.
        eventually("traffic", || {
            let enough = shared.acknowledged.lock().unwrap().len() >= round % 7;
            let sent = shared.phases.lock().unwrap().values().filter(|phase| **phase >= Phase::Sent).count();
            (enough && sent >= IN_FLIGHT_MIN).then_some(())
        });
        // The gateway's own word, right before it dies.
        let in_flight = eventually("requests in flight", || {
            Some(gateway.metric("gateway_in_flight_requests", &[]) as usize).filter(|count| *count >= IN_FLIGHT_MIN)
        });
        let phases = shared.phases.lock().unwrap().clone();
        shared.stop.store(true, Ordering::Relaxed);
        gateway.kill_and_restart();
        for client in clients {
            client.join().expect("a client that saw the kill");
        }
        least = least.min(in_flight);
        for phase in phases.values() {
            *histogram.entry(*phase).or_default() += 1;
        }
        acknowledged.append(&mut shared.acknowledged.lock().unwrap());

        let rows = ledger(&gateway);
        let mut by_id: HashMap<&str, (&str, u64)> = HashMap::new();
        for (id, outcome, tokens) in &rows {
            assert!(by_id.insert(id, (outcome, *tokens)).is_none(), "{id} has two rows");
        }
        for (id, tokens) in &acknowledged {
            assert_eq!(by_id.get(id.as_str()), Some(&("answered", *tokens)), "kill {round}: {id} was acknowledged");
        }
        killed_rows = rows.iter().filter(|(_, outcome, _)| outcome == "killed").count();
    }
    println!(
        "{kills} kills with at least {least} requests in flight, phases hit: {histogram:?}; {} acknowledged, {killed_rows} recovered as killed",
        acknowledged.len()
    );
    assert!(killed_rows > 0, "no kill hit an admitted request: this proved nothing");
}
