//! `kill -9` under load: what was acknowledged is there, nothing is there twice, and whatever was cut off is owed once.
//! Among the load are clients that leave and upstreams that break; after each kill `ledger verify` looks, too.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::evidence::{LedgerRow, ledger};
use crate::support::gateway::{Setup, TestGateway, append, chat_with, long};
use crate::support::http;
use crate::support::upstream::{Asked, Script, Upstream, delta, response, stream_of, words};

const IN_FLIGHT_MIN: usize = 4;
/// Answers that were acknowledged before each kill, at the least.
const ACKNOWLEDGED_MIN: usize = 21;

/// What each client asks for, again and again until the end.
const CLIENTS: [Kind; 15] = [
    Kind::Embedded,
    Kind::Embedded,
    Kind::Embedded,
    Kind::Remote,
    Kind::Dripping,
    Kind::Shared,
    Kind::Shared,
    Kind::Shared,
    Kind::Mirrored,
    Kind::Rehearsed,
    Kind::Guarded,
    Kind::Quick,
    Kind::Quick,
    Kind::Leaving,
    Kind::Broken,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Embedded,
    /// An upstream that answers, or the cache in its place.
    Remote,
    /// One that says a word and nothing more.
    Dripping,
    /// All ask the same, and the upstream says nothing: one leads, the others wait.
    Shared,
    /// Answered here, and its copy never is.
    Mirrored,
    /// Answered by an upstream, and its copy waits for the engine.
    Rehearsed,
    /// The upstream fails, and who stands in says nothing.
    Guarded,
    /// A short answer from here, one after the other.
    Quick,
    /// The client goes away in the middle of a stream.
    Leaving,
    /// The upstream goes away in the middle of one.
    Broken,
}

const ROUTES: &str = r#"
[routes.remote]
split = { remote-model = 1 }
durability = "power"
[routes.shared]
split = { remote-model = 1 }
cache = { ttl = "10m" }
[routes.mirrored]
split = { glimmer-1 = 1 }
durability = "power"
shadow = { variant = "mirror-model", sample = 1.0 }
[routes.rehearsed]
split = { remote-model = 1 }
shadow = { variant = "glimmer-2", sample = 1.0 }
[routes.guarded]
split = { remote-model = 1 }
fallback = ["spare-model"]
"#;

impl Kind {
    fn body(self, life: usize, round: usize) -> Value {
        let (route, text) = match self {
            Kind::Embedded if round.is_multiple_of(3) => {
                return chat_with("What is Glassgate?", json!({"seed": round}));
            }
            Kind::Embedded => return long(64 + (round % 5) as u32 * 40),
            Kind::Remote if round.is_multiple_of(3) => ("shared", "answer"),
            Kind::Remote => ("remote", "answer"),
            Kind::Dripping => ("remote", "drip"),
            Kind::Shared => ("shared", "hang"),
            Kind::Mirrored => ("mirrored", "What is Glassgate?"),
            Kind::Rehearsed => ("rehearsed", "answer"),
            Kind::Guarded => ("guarded", "fail"),
            Kind::Quick => return chat_with("12 + 34 = ?", json!({"max_tokens": 4, "seed": round})),
            Kind::Leaving => return long(400),
            Kind::Broken => ("remote", "break"),
        };
        let stream = matches!(self, Kind::Dripping | Kind::Broken) || round.is_multiple_of(2);
        // The seed tells lives apart.
        chat_with(text, json!({"model": route, "seed": life, "stream": stream, "max_tokens": 16}))
    }
}

fn play(asked: &Asked) -> Script {
    match asked.text() {
        "drip" => Script::Hang(stream_of(&[delta(json!({"content": "One "}), None)])),
        "hang" => Script::Hang(Vec::new()),
        "break" => Script::Cut(stream_of(&[delta(json!({"content": "One "}), None)])),
        "fail" => Script::Raw(response("500 Internal Server Error", &[], "{}")),
        _ => Script::Answer(words("Hello from upstream.")),
    }
}

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
    /// How many of them came from the cache.
    hits: AtomicUsize,
    /// Whatever had a head of 200: it was admitted.
    begun: Mutex<Vec<String>>,
}

impl Shared {
    fn at(&self, client: usize, phase: Phase) {
        self.phases.lock().unwrap().insert(client, phase);
    }
}

/// Sends requests until told to stop; errors are what a killed server looks like.
fn client(number: usize, life: usize, data: SocketAddr, key: &str, shared: &Shared) {
    let mut round = number;
    while !shared.stop.load(Ordering::Relaxed) {
        round += 1;
        shared.at(number, Phase::Connecting);
        let kind = CLIENTS[number];
        let body = kind.body(life, round);
        // One whose upstream breaks goes on, until it is told to stop.
        if request(number, data, key, &body, shared).is_err() && kind != Kind::Broken {
            return;
        }
    }
}

fn request(number: usize, data: SocketAddr, key: &str, body: &Value, shared: &Shared) -> std::io::Result<()> {
    let bytes = http::post("/v1/chat/completions", Some(key), &[], body.to_string().as_bytes());
    shared.at(number, Phase::Sent);
    let sent = Instant::now();
    let mut open = http::raw(data, &bytes)?;
    shared.at(number, Phase::HeadRead);
    let id = open.header("x-request-id").expect("an id").to_owned();
    let is_hit = open.header("x-glassgate-cache") == Some("hit");
    let acknowledge = |tokens| {
        shared.acknowledged.lock().unwrap().push((id.clone(), tokens));
        shared.hits.fetch_add(usize::from(is_hit), Ordering::Relaxed);
    };
    if CLIENTS[number] == Kind::Broken && open.status == 502 {
        // It broke before it had said anything.
        return Ok(());
    }
    let status = open.status;
    if status != 200 {
        panic!("{:?} got {status} after {:?}: {}", CLIENTS[number], sent.elapsed(), open.finish().json());
    }
    shared.begun.lock().unwrap().push(id.clone());
    if open.header("content-type") == Some("application/json") {
        let response = open.finish();
        if response.complete {
            let tokens = response.json()["usage"]["completion_tokens"].as_u64().unwrap();
            acknowledge(tokens);
            return Ok(());
        }
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let mut text = Vec::new();
    while let Some(data) = open.chunk()? {
        shared.at(number, Phase::Streaming);
        if CLIENTS[number] == Kind::Leaving {
            return Ok(());
        }
        text.extend_from_slice(&data);
        // The usage itself is the acknowledgement, even if `[DONE]` no longer comes.
        if let Some(tokens) = acknowledged_tokens(&text) {
            acknowledge(tokens);
            text.clear();
        }
    }
    Ok(())
}

fn acknowledged_tokens(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    let chunk = text.split("\n\n").find(|event| event.contains("\"glassgate\":"))?;
    let chunk: Value = serde_json::from_str(chunk.strip_prefix("data: ")?).ok()?;
    let usage = &chunk["glassgate"]["usage"];
    Some(usage["output"].as_u64()? + usage["reasoning"].as_u64()?)
}

/// A gateway with upstreams that answer, fail, and hang.
struct World {
    gateway: TestGateway,
    mock: Upstream,
    spare: Upstream,
    mirror: Upstream,
}

impl World {
    fn start() -> World {
        let [mock, spare, mirror] = [(); 3].map(|()| Upstream::start());
        mock.decides(play);
        spare.always(Script::Hang(Vec::new()));
        mirror.always(Script::Hang(Vec::new()));
        let setup = Setup::shipped();
        setup.add_upstream("mock", &mock.url(), "remote-model");
        setup.add_upstream("spare", &spare.url(), "spare-model");
        setup.add_upstream("mirror", &mirror.url(), "mirror-model");
        append(&setup.path("routes.toml"), ROUTES);
        append(&setup.path("gateway.toml"), "\n[shadow]\nconcurrency = 64\n");
        setup.replace("gateway.toml", "requests_per_minute = 600", "requests_per_minute = 1_000_000");
        World { gateway: setup.start(), mock, spare, mirror }
    }

    /// Whether requests of each kind that hangs are under way in this life.
    fn all_hang(&self, life: usize) -> bool {
        let asked = |server: &Upstream, text: &str| {
            server.was_asked(|asked| asked.body["seed"] == life && asked.text() == text)
        };
        asked(&self.mock, "drip")
            && asked(&self.mock, "hang")
            && asked(&self.spare, "fail")
            && self.mirror.was_asked(|asked| asked.body["seed"] == life)
    }

    /// Every request that any of the upstreams was asked for.
    fn called(&self) -> BTreeSet<String> {
        let servers = [&self.mock, &self.spare, &self.mirror];
        let asked = servers.into_iter().flat_map(Upstream::asked);
        asked.map(|asked| asked.header("x-request-id").expect("an id").to_owned()).collect()
    }
}

type Id = (String, u64, String);

fn id(row: &LedgerRow) -> Id {
    (row.request_id.clone(), row.attempt, row.role.clone())
}

/// What a row may never change.
fn told(row: &LedgerRow) -> (String, [u64; 5], u64, u64) {
    (row.outcome.clone(), row.tokens, row.billed, row.provider_cost)
}

/// Every request has its attempts in order, of which the last alone ends it, and a shadow at the most.
fn check(rows: &[LedgerRow]) {
    let mut requests: HashMap<&str, Vec<&LedgerRow>> = HashMap::new();
    let mut ids = BTreeSet::new();
    for row in rows {
        assert!(ids.insert(id(row)), "there twice: {row:?}");
        requests.entry(&row.request_id).or_default().push(row);
        let is_free = row.is_shadow() || row.is_shared() || row.outcome == "failed_over";
        assert!(!is_free || row.billed == 0, "nobody owes this: {row:?}");
        // It is not known what it had used: the most that it could have, and once.
        let is_reserved = row.outcome == "killed" && !row.is_shadow() && row.route != "shared";
        assert!(!is_reserved || (row.usage_source == "reserved" && row.billed > 0), "{row:?}");
    }
    for (request, mut rows) in requests {
        let shadows = rows.extract_if(.., |row| row.is_shadow()).count();
        rows.sort_by_key(|row| row.attempt);
        let ends = rows.iter().filter(|row| row.is_terminal()).count();
        assert!(shadows <= 1 && ends == 1 && rows.last().unwrap().is_terminal(), "{request}: {rows:?}");
        assert!(rows.iter().enumerate().all(|(number, row)| row.attempt == number as u64), "{request}: {rows:?}");
    }
}

/// Kills on one data folder: all of it is read after each, so there are not too many.
const KILLS_A_FOLDER: usize = 100;

/// What the kills hit.
#[derive(Default)]
struct Found {
    least_in_flight: Option<usize>,
    phases: BTreeMap<Phase, usize>,
    cut_off: BTreeMap<String, usize>,
    acknowledged: usize,
    from_cache: usize,
    rows: usize,
    left: usize,
    broken: usize,
}

/// These lives on a folder of their own.
fn kill_and_look(lives: Range<usize>, found: &mut Found) {
    let mut world = World::start();
    let (mut acknowledged, mut begun) = (Vec::new(), Vec::new());
    let (mut before, mut hits) = (BTreeMap::new(), 0);
    for life in lives {
        let shared = Arc::new(Shared::default());
        let clients: Vec<_> = (0..CLIENTS.len())
            .map(|number| {
                let (shared, data, key) = (shared.clone(), world.gateway.data, world.gateway.key.clone());
                thread::spawn(move || client(number, life, data, &key, &shared))
            })
            .collect();
        // Another moment of the traffic each time: after so many acknowledged answers, and enough requests in flight; in
        // three lives of four with one of each kind that hangs among them, in one with an answer from the cache.
        eventually("traffic", || {
            let enough = shared.acknowledged.lock().unwrap().len() >= ACKNOWLEDGED_MIN + life % 7;
            let sent = shared.phases.lock().unwrap().values().filter(|phase| **phase >= Phase::Sent).count();
            let hangs = life % 4 == 0 || world.all_hang(life);
            let is_hit = life % 4 != 1 || shared.hits.load(Ordering::Relaxed) > 0;
            (enough && sent >= IN_FLIGHT_MIN && hangs && is_hit).then_some(())
        });
        // The gateway's own word, right before it dies.
        let in_flight = eventually("requests in flight", || {
            let count = world.gateway.metric("gateway_in_flight_requests", &[]) as usize;
            Some(count).filter(|count| *count >= IN_FLIGHT_MIN)
        });
        let phases = shared.phases.lock().unwrap().clone();
        shared.stop.store(true, Ordering::Relaxed);
        world.gateway.kill_and_restart();
        for client in clients {
            client.join().expect("a client that saw the kill");
        }
        found.least_in_flight = Some(found.least_in_flight.map_or(in_flight, |least| least.min(in_flight)));
        for phase in phases.values() {
            *found.phases.entry(*phase).or_default() += 1;
        }
        acknowledged.append(&mut shared.acknowledged.lock().unwrap());
        begun.append(&mut shared.begun.lock().unwrap());

        let verdict = world.gateway.run(&["ledger", "verify"]);
        assert!(verdict.status.success(), "kill {life}: {}", String::from_utf8_lossy(&verdict.stdout));
        let rows = ledger(&world.gateway);
        check(&rows);
        let ends: HashMap<&str, &LedgerRow> =
            rows.iter().filter(|row| row.is_terminal()).map(|row| (row.request_id.as_str(), row)).collect();
        for (id, tokens) in &acknowledged {
            let row = ends.get(id.as_str()).unwrap_or_else(|| panic!("kill {life}: {id} was acknowledged and is lost"));
            assert_eq!(
                (row.outcome.as_str(), row.tokens[3] + row.tokens[4]),
                ("answered", *tokens),
                "kill {life}: {id}"
            );
        }
        hits = acknowledged.iter().filter(|(id, _)| ends[id.as_str()].is_shared()).count();
        let called = world.called();
        for id in begun.iter().chain(&called) {
            assert!(ends.contains_key(id.as_str()), "kill {life}: {id} had begun and is not in the ledger");
        }
        let now: BTreeMap<Id, _> = rows.iter().map(|row| (id(row), told(row))).collect();
        for (id, told) in &before {
            assert_eq!(now.get(id), Some(told), "kill {life}: {id:?} is another row than before");
        }
        for row in rows.iter().filter(|row| row.outcome == "killed" && !before.contains_key(&id(row))) {
            let kind = match row.route.as_str() {
                "shared" if called.contains(&row.request_id) => "one who leads".to_owned(),
                "shared" => "one who waits for an answer to somebody else".to_owned(),
                _ => format!("{} {}", row.role, row.provider),
            };
            *found.cut_off.entry(kind).or_default() += 1;
        }
        before = now;
    }
    let ended = |outcome: &str| before.values().filter(|(found, ..)| found == outcome).count();
    found.left += ended("aborted");
    found.broken += ended("failed");
    found.acknowledged += acknowledged.len();
    found.from_cache += hits;
    found.rows += before.len();
}

#[test]
fn a_kill_loses_no_acknowledged_row_and_doubles_none() {
    let kills: usize = std::env::var("GLASSGATE_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(20);
    let mut found = Found::default();
    for first in (0..kills).step_by(KILLS_A_FOLDER) {
        kill_and_look(first..kills.min(first + KILLS_A_FOLDER), &mut found);
    }
    let Found { least_in_flight, phases, cut_off, acknowledged, from_cache, rows, left, broken } = found;
    println!(
        "{kills} kills with at least {} requests in flight, phases hit: {phases:?}; {acknowledged} acknowledged ({from_cache} from the cache), {rows} rows",
        least_in_flight.unwrap_or(0)
    );
    println!("{left} left by their clients, {broken} broken by their upstreams");
    println!("cut off: {cut_off:?}");
    assert!(acknowledged >= kills * ACKNOWLEDGED_MIN);
    assert!(left >= kills && broken >= kills, "too few left or broke to prove anything");
    assert!(from_cache >= kills / 4, "hardly anything that the cache answered was acknowledged");
    for kind in [
        "primary glassgate",
        "primary mock",
        "fallback spare",
        "shadow glassgate",
        "shadow mirror",
        "one who leads",
        "one who waits for an answer to somebody else",
    ] {
        let count = cut_off.get(kind).copied().unwrap_or(0);
        assert!(count >= kills / 4, "{kind}: {count} in {kills} kills prove nothing");
    }
}
