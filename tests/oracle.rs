//! Conservation: after mixed traffic every witness tells the same story, and each leg of that check can fail.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::evidence::{CLIENT_SPAN, Call, Evidence, LedgerRow, Prompt, Seen, Span};
use crate::support::gateway::{Setup, TestGateway, append};
use crate::support::http::{self, Open, Response};
use crate::support::upstream::{Asked, Script, Upstream, delta, event, response, stream_head, stream_of, words};

const QUESTIONS: [&str; 6] = [
    "What is Glassgate?",
    "12 + 34 = ?",
    "Sort: 9 4 7 1",
    "이 영화 정말 재미있어요!",
    "Reverse the words: red green blue yellow orange purple brown black white pink gold silver grey",
    "안녕하세요 👋🏽",
];
const LONG: &str = "Count up from 1 to 99.";
const CLIENTS: usize = 8;
const ROUNDS: usize = 240;

/// Routes beside the shipped one. Those with a shadow mirror everything.
const ROUTES: &str = r#"
[routes.remote]
split = { remote-model = 1 }
[routes.guarded]
split = { remote-model = 1 }
fallback = ["spare-model", "glimmer-2"]
[routes.impatient]
split = { remote-model = 1 }
fallback = ["glimmer-1"]
timeouts = { first_token = "150ms", idle = "5s", total = "60s" }
[routes.cached]
split = { glimmer-1 = 1 }
cache = { ttl = "10m" }
[routes.shared]
split = { remote-model = 1 }
cache = { ttl = "10m" }
[routes.mirrored]
split = { glimmer-1 = 1 }
shadow = { variant = "mirror-model", sample = 1.0 }
[routes.rehearsed]
split = { remote-model = 1 }
shadow = { variant = "glimmer-2", sample = 1.0 }
"#;
const SHADOWS: [(&str, &str); 2] = [("mirrored", "mirror-model"), ("rehearsed", "glimmer-2")];

/// What a client does, and how often in a round of all.
const DECK: [(&str, usize); 31] = [
    ("whole", 12),
    ("streamed", 10),
    ("sampled", 5),
    ("text", 5),
    ("several", 6),
    ("left", 8),
    ("left unread", 5),
    ("remote", 8),
    ("remote text", 4),
    ("remote several", 4),
    ("remote left", 5),
    ("remote left unread", 4),
    ("broken", 7),
    ("cut", 4),
    ("guarded", 8),
    ("hanging", 1),
    ("silent", 3),
    ("stale", 5),
    ("cached", 10),
    ("crowd", 2),
    ("crowd here", 1),
    ("leader left", 2),
    ("mirrored", 6),
    ("rehearsed", 5),
    ("stranger", 4),
    ("bad", 6),
    ("limited", 4),
    ("concurrent", 2),
    ("feedback", 2),
    ("models", 2),
    ("health", 1),
];

/// Everything an upstream can be asked to do, told by the prompt's first word.
fn play(asked: &Asked) -> Script {
    let error = |status: &str| Script::Raw(response(status, &[], r#"{"error":{"message":"boom"}}"#));
    let begun = || stream_of(&["One ", "two ", "three "].map(|word| delta(json!({"content": word}), None)));
    match asked.text().split(' ').next().unwrap_or_default() {
        "500" => error("500 Internal Server Error"),
        "400" => error("400 Bad Request"),
        "401" => error("401 Unauthorized"),
        "429" => error("429 Too Many Requests"),
        "closed" => Script::Cut(Vec::new()),
        "garbage" => Script::Cut(b"SSH-2.0-OpenSSH\r\n\r\n".to_vec()),
        "nothing" => Script::HalfClose([stream_head(false), b"data: [DONE]\n\n".to_vec()].concat()),
        "hang" => Script::Hang(Vec::new()),
        "cut" => Script::Cut(begun()),
        "half" => Script::HalfClose(begun()),
        "error" => Script::HalfClose([begun(), event(&json!({"error": {"message": "overloaded"}}))].concat()),
        "silent" if asked.body["stream"] == true => {
            let last = delta(json!({"content": "four"}), Some("stop"));
            Script::HalfClose([begun(), event(&last), b"data: [DONE]\n\n".to_vec()].concat())
        }
        "silent" => {
            let message = json!({"role": "assistant", "content": "One two three four"});
            let body = json!({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]});
            Script::Raw(response("200 OK", &[], &body.to_string()))
        }
        // Only a connection that was used before can have been closed meanwhile.
        "stale" if asked.earlier > 0 => Script::Cut(Vec::new()),
        "many" => Script::Answer(words(&"word ".repeat(300))),
        "late" => Script::Late(Duration::from_millis(40), words("Better late than never.")),
        _ => Script::Answer(words("Hello from upstream.")),
    }
}

/// The one who stands in first fails where all are to fail.
fn stand_in(asked: &Asked) -> Script {
    match asked.text().ends_with("everywhere") {
        true => Script::Raw(response("500 Internal Server Error", &[], "{}")),
        false => Script::Answer(words("Hello from the spare.")),
    }
}

struct World {
    gateway: TestGateway,
    mock: Upstream,
    spare: Upstream,
    mirror: Upstream,
    keys: BTreeMap<&'static str, Key>,
    traces: AtomicU64,
}

struct Key {
    token: String,
    id: String,
    tenant: &'static str,
}

/// One request before it is sent.
struct Ask {
    seen: Seen,
    bytes: Vec<u8>,
}

impl Ask {
    /// As long as before, and of no type that we take.
    fn untyped(mut self) -> Ask {
        let text = String::from_utf8(self.bytes).expect("a request is UTF-8");
        (self.bytes, self.seen.prompt) = (text.replace("application/json", "application/text").into(), None);
        self
    }

    /// As long as before, and no JSON any more.
    fn broken(mut self) -> Ask {
        self.seen.prompt = None;
        *self.bytes.last_mut().expect("a body") = b'?';
        self
    }
}

impl World {
    fn start() -> World {
        let [mock, spare, mirror] = [(); 3].map(|()| Upstream::start());
        mock.decides(play);
        spare.decides(stand_in);
        mirror.decides(play);
        let setup = Setup::shipped();
        for (name, server) in [("mock", &mock), ("spare", &spare), ("mirror", &mirror)] {
            let model = if name == "mock" { "remote-model".to_owned() } else { format!("{name}-model") };
            setup.add_upstream(name, &server.url(), &model);
        }
        append(&setup.path("routes.toml"), ROUTES);
        setup.replace("gateway.toml", "[listen]", "[listen]\nthreads = 2");
        append(&setup.path("gateway.toml"), "\n[shadow]\nconcurrency = 8\nqueue_max = 200\n");
        let many = ["--rpm", "1000000"].as_slice();
        let keys = [
            ("one", "default", many),
            ("two", "default", many),
            ("three", "other", many),
            ("requests", "default", ["--rpm", "1"].as_slice()),
            ("tokens", "other", ["--rpm", "1000000", "--tpm", "60"].as_slice()),
            ("money", "other", ["--rpm", "1000000", "--usd-per-day", "0.000001"].as_slice()),
            ("places", "default", ["--rpm", "1000000", "--concurrency", "1"].as_slice()),
        ];
        let gateway = setup.start();
        let keys = keys.map(|(name, tenant, limits)| {
            let token =
                gateway.cli(&[&["keys", "create", name, "--tenant", tenant], limits].concat()).trim().to_owned();
            let id = token.split('-').nth(1).expect("a key has an id").to_owned();
            (name, Key { token, id, tenant })
        });
        World { gateway, mock, spare, mirror, keys: keys.into(), traces: AtomicU64::new(1) }
    }

    /// Asks with every key until it is known. What it is told before is a refusal like any other.
    fn knock(&self) -> Vec<Seen> {
        let mut seen = Vec::new();
        for name in self.keys.keys() {
            eventually("the keys to count", || {
                let told = self.whole(self.ask("models", name, "/v1/models", &json!({})));
                let is_known = told.status == 200;
                seen.push(Seen { authenticated: is_known, ..told });
                is_known.then_some(())
            });
        }
        seen
    }

    /// A chat.
    fn chat(&self, kind: &'static str, key: &str, route: &str, question: &str, more: Value) -> Ask {
        let mut body = json!({"model": route, "temperature": 0, "messages": [{"role": "user", "content": question}]});
        more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        self.ask(kind, key, "/v1/chat/completions", &body)
    }

    /// A text completion.
    fn text(&self, kind: &'static str, key: &str, route: &str, prompt: &str, more: Value) -> Ask {
        let mut body = json!({"model": route, "temperature": 0, "prompt": prompt});
        more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        self.ask(kind, key, "/v1/completions", &body)
    }

    fn ask(&self, kind: &'static str, key: &str, path: &str, body: &Value) -> Ask {
        let key = self.keys.get(key);
        let prompt = body["messages"][0]["content"].as_str().map(|text| Prompt::Chat(text.to_owned()));
        let prompt = prompt.or_else(|| body["prompt"].as_str().map(|text| Prompt::Text(text.to_owned())));
        // Every trace is the client's own: it tells requests apart even where no answer was read.
        let trace_id = format!("{:032x}", (1_u128 << 120) | u128::from(self.traces.fetch_add(1, Ordering::Relaxed)));
        let session = format!("session-{trace_id}");
        let headers = [("traceparent", format!("00-{trace_id}-{CLIENT_SPAN}-01")), ("x-session-id", session)];
        let headers = headers.each_ref().map(|(name, value)| (*name, value.as_str()));
        let text = body.to_string();
        let token = key.map(|key| key.token.as_str());
        let bytes = match path {
            "/v1/models" | "/health" => get(path, token, &headers),
            _ => http::post(path, token, &headers, text.as_bytes()),
        };
        let seen = Seen {
            kind,
            request_id: String::new(),
            trace_id,
            tenant: key.map(|key| key.tenant.to_owned()).unwrap_or_default(),
            key_id: key.map(|key| key.id.clone()).unwrap_or_default(),
            authenticated: key.is_some(),
            op: match path {
                "/v1/chat/completions" => "chat",
                "/v1/completions" => "text_completion",
                "/v1/feedback" => "feedback",
                "/v1/models" => "models",
                "/health" => "health",
                _ => "other",
            },
            route: body["model"].as_str().unwrap_or_default().to_owned(),
            stream: body["stream"] == true,
            n: body["n"].as_u64().unwrap_or(1),
            prompt,
            same: None,
            bytes_in: text.len() as u64,
            status: 0,
            error_code: None,
            usage: None,
            cost_usd: None,
            cache: None,
            is_read: false,
            bytes_out: None,
            pieces: 0,
        };
        Ask { seen, bytes }
    }

    /// Reads the answer to its end.
    fn whole(&self, ask: Ask) -> Seen {
        ask.seen.read(&self.send(&ask.bytes))
    }

    fn send(&self, bytes: &[u8]) -> Response {
        self.gateway.open(bytes).finish()
    }

    /// Reads the head and so many pieces, and leaves.
    fn leave(&self, ask: Ask, after: usize) -> Seen {
        let mut open = self.gateway.open(&ask.bytes);
        if open.status != 200 {
            return ask.seen.read(&open.finish());
        }
        let mut seen = begun(ask, &open);
        for _ in 0..after {
            let Ok(Some(data)) = open.chunk() else { break };
            let text = String::from_utf8_lossy(&data).into_owned();
            text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).for_each(|event| seen.event(event));
        }
        seen
    }

    /// Leaves before anything was read.
    fn leave_unread(&self, ask: Ask) -> Seen {
        drop(self.gateway.open_unread(&ask.bytes));
        ask.seen
    }

    /// Several clients with the same request at once.
    fn together(&self, asks: Vec<Ask>) -> Vec<Seen> {
        thread::scope(|scope| {
            let clients: Vec<_> = asks.into_iter().map(|ask| scope.spawn(|| self.whole(ask))).collect();
            clients.into_iter().map(|client| client.join().expect("a client")).collect()
        })
    }
}

fn calls(servers: [(&'static str, &Upstream); 3]) -> Vec<Call> {
    let of = |(name, server): (&'static str, &Upstream)| {
        server.asked().into_iter().map(move |asked| Call::new(name, &asked)).collect::<Vec<_>>()
    };
    servers.into_iter().flat_map(of).collect()
}

fn begun(ask: Ask, open: &Open) -> Seen {
    let mut seen = ask.seen;
    seen.told(open.status, open.header("x-request-id"), open.header("x-glassgate-cache"));
    seen
}

fn get(path: &str, token: Option<&str>, headers: &[(&str, &str)]) -> Vec<u8> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let key = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    format!("GET {path} HTTP/1.1\r\nhost: gateway\r\n{key}{headers}\r\n").into_bytes()
}

/// What may be answered with the same answer.
fn same(mut ask: Ask, name: &str) -> Ask {
    ask.seen.same = Some(name.to_owned());
    ask
}

/// One client's share of the traffic.
fn client(world: &World, number: usize) -> Vec<Seen> {
    let deck: Vec<&'static str> = DECK.iter().flat_map(|(kind, count)| std::iter::repeat_n(*kind, *count)).collect();
    let key = ["one", "two", "three"][number % 3];
    let cards = (0..ROUNDS).map(|round| (round, deck[(number * 19 + round * 47) % deck.len()]));
    cards.flat_map(|(round, kind)| turn(world, key, kind, number * ROUNDS + round)).collect()
}

/// One thing that a client does. `turn` is a number of its own.
fn turn(world: &World, key: &str, kind: &'static str, turn: usize) -> Vec<Seen> {
    let question = QUESTIONS[turn % QUESTIONS.len()];
    let stream = turn.is_multiple_of(2);
    let usage = json!({"include_usage": turn.is_multiple_of(4)});
    let either = || json!({"stream": stream, "stream_options": if stream { usage.clone() } else { json!(null) }});
    let with = |mut body: Value, more: Value| {
        more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        body
    };
    let endless = |tokens: usize| json!({"stream": true, "max_tokens": tokens, "ignore_eos": true});
    let chat = |route: &str, text: &str, more: Value| world.chat(kind, key, route, text, more);
    let one = |ask: Ask| vec![world.whole(ask)];
    match kind {
        "whole" => one(chat("assistant", question, json!({}))),
        "streamed" => one(chat("assistant", question, json!({"stream": true, "stream_options": usage}))),
        "sampled" => one(chat(
            "assistant",
            question,
            with(either(), json!({"temperature": 1.0, "seed": turn, "max_tokens": 24})),
        )),
        "text" => {
            one(world.text(kind, key, "assistant", "Once upon a time", with(either(), json!({"max_tokens": 12}))))
        }
        "several" => {
            let more = json!({"n": 2, "temperature": 1.0, "seed": turn, "max_tokens": 16});
            one(chat("assistant", question, with(either(), more)))
        }
        "left" => {
            let n = 1 + turn / 2 % 2;
            let ask = chat("assistant", LONG, with(endless(300), json!({"n": n})));
            vec![world.leave(ask, turn % 17)]
        }
        "left unread" => {
            let more = if stream { endless(200) } else { json!({"max_tokens": 200, "ignore_eos": true}) };
            vec![world.leave_unread(chat("assistant", LONG, more))]
        }
        "remote" => one(chat("remote", question, either())),
        "remote text" => one(world.text(kind, key, "remote", "Once upon a time", either())),
        "remote several" => one(chat("remote", question, with(either(), json!({"n": 2})))),
        "remote left" => vec![world.leave(chat("remote", "many words", json!({"stream": true})), turn % 13)],
        "remote left unread" => vec![world.leave_unread(chat("remote", "late words", either()))],
        "broken" => {
            let fault = ["500", "400", "401", "429", "closed", "garbage", "nothing"][turn % 7];
            one(chat("remote", fault, either()))
        }
        "cut" => one(chat("remote", ["cut", "half", "error"][turn % 3], either())),
        "guarded" => {
            let fault = ["500", "closed everywhere", "401 everywhere", "garbage", "nothing everywhere"][turn % 5];
            one(chat("guarded", fault, with(either(), json!({"max_tokens": 12}))))
        }
        "hanging" => one(chat("impatient", "hang", json!({"stream": true, "max_tokens": 12}))),
        "silent" => one(chat("remote", "silent", either())),
        "stale" => one(chat("remote", "stale", either())),
        "cached" => one(same(chat("cached", question, either()), question)),
        "crowd" | "crowd here" => {
            // Different ways to be told the same.
            let asks = (0..4).map(|i| {
                let more = json!({"seed": turn, "stream": i % 2 == 0});
                let ask = match kind {
                    "crowd" => chat("shared", "late words", more),
                    _ => chat("cached", LONG, with(more, json!({"max_tokens": 60, "ignore_eos": true}))),
                };
                same(ask, &format!("{kind} {turn}"))
            });
            world.together(asks.collect())
        }
        "leader left" => {
            let ask = || same(chat("shared", "late words", json!({"seed": turn})), &format!("{kind} {turn}"));
            let (leader, follower) = (ask(), ask());
            let first = world.gateway.open_unread(&leader.bytes);
            eventually("the leader's call", || world.mock.was_asked(|asked| asked.body["seed"] == turn).then_some(()));
            let second = world.gateway.open_unread(&follower.bytes);
            let others = (0..2).map(|_| ask()).collect();
            drop((first, second));
            let mut seen = world.together(others);
            seen.extend([leader.seen, follower.seen]);
            seen
        }
        "mirrored" => {
            let text = if turn.is_multiple_of(5) { "500 for the shadow" } else { question };
            one(chat("mirrored", text, with(either(), json!({"max_tokens": 16}))))
        }
        "rehearsed" => {
            let text = ["500", question, "many words", question][turn % 4];
            let ask =
                chat("rehearsed", text, with(either(), json!({"max_tokens": if turn % 4 == 2 { 400 } else { 16 }})));
            // Who leaves is not compared.
            if turn % 8 == 2 { vec![world.leave(ask, 2)] } else { one(ask) }
        }
        "stranger" => {
            let mut ask = world.chat(kind, "nobody", "assistant", question, json!({}));
            match turn % 4 {
                0 => ask.bytes = http::post("/v1/chat/completions", Some("gg-nobody"), &[], b"{}"),
                1 => ask = world.ask(kind, "nobody", "/v1/nothing", &json!({})),
                2 => (ask.seen.op, ask.bytes) = ("other", get("/v1/chat/completions", None, &[])),
                _ => {}
            }
            one(ask)
        }
        "bad" => {
            let ask = match turn % 8 {
                0 => chat("assistant", question, json!({"temperature": 9})),
                1 => chat("assistant", question, json!({"max_tokens": 1_000_000})),
                2 => chat("gpt-5", question, json!({})),
                3 => chat("assistant", question, json!({"messages": []})),
                4 => world.text(kind, key, "assistant", "Once", json!({"n": 1000})),
                5 => chat("assistant", question, json!({})).untyped(),
                6 => Ask::broken(chat("assistant", question, json!({}))),
                _ => world.ask(kind, key, "/v1/chat/completions", &json!({"model": "assistant"})),
            };
            one(ask)
        }
        "limited" => {
            let (key, tokens) = [("requests", 1), ("tokens", 400), ("money", 400), ("tokens", 12)][turn % 4];
            one(world.chat(kind, key, "assistant", question, json!({"max_tokens": tokens})))
        }
        "concurrent" => {
            let ask = |more| world.chat(kind, "places", "assistant", LONG, more);
            let held = ask(endless(400));
            let open = world.gateway.open(&held.bytes);
            let second = world.whole(ask(json!({"max_tokens": 4})));
            let first = held.seen.read(&open.finish());
            vec![first, second]
        }
        "feedback" => {
            let answer = world.whole(chat("assistant", question, json!({})));
            let said =
                json!({"response_id": format!("chatcmpl-{}", answer.request_id), "name": "correct", "value": stream});
            vec![answer, world.whole(world.ask(kind, key, "/v1/feedback", &said))]
        }
        "models" => one(world.ask(kind, key, "/v1/models", &json!({}))),
        _ => one(world.ask(kind, "nobody", "/health", &json!({}))),
    }
}

fn traffic() -> Evidence {
    let world = Arc::new(World::start());
    let first = world.knock();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let world = world.clone();
            thread::spawn(move || client(&world, number))
        })
        .collect();
    let traffic = clients.into_iter().flat_map(|client| client.join().expect("a client"));
    let seen = first.into_iter().chain(traffic).collect();
    let World { mut gateway, mock, spare, mirror, .. } = Arc::into_inner(world).expect("the clients are done");
    Evidence::gather(&mut gateway, seen, || calls([("mock", &mock), ("spare", &spare), ("mirror", &mirror)]), &SHADOWS)
}

/// Damages one thing and tells which leg must notice.
type Fault = (&'static str, fn(&mut Evidence));

fn row(evidence: &mut Evidence, is: impl Fn(&LedgerRow) -> bool) -> &mut LedgerRow {
    evidence.rows.iter_mut().find(|row| is(row)).expect("such a row")
}

fn forget(evidence: &mut Evidence, is: impl Fn(&LedgerRow) -> bool) {
    let at = evidence.rows.iter().position(is).expect("such a row");
    evidence.rows.remove(at);
}

fn seen(evidence: &mut Evidence, is: impl Fn(&Seen) -> bool) -> &mut Seen {
    evidence.seen.iter_mut().find(|seen| is(seen)).expect("such a request")
}

fn attribute(evidence: &mut Evidence, name: &str, is: impl Fn(&Span) -> bool, value: &str) {
    let span = evidence.spans.iter_mut().find(|span| span.attributes.contains_key(name) && is(span));
    span.expect("such a span").attributes.insert(name.to_owned(), value.to_owned());
}

/// One series of a family, which counted something, is not there.
fn lose(evidence: &mut Evidence, series: &str) {
    let is_it = |line: &&str| line.starts_with(series) && line.rsplit(' ').next().unwrap().contains(|c| c > '0');
    let line = evidence.metrics.lines().find(is_it).expect(series).to_owned();
    evidence.metrics = evidence.metrics.replacen(&line, "", 1);
}

/// One series of a family counts one more.
fn miscount(evidence: &mut Evidence, family: &str, label: &str) {
    let mut lines: Vec<String> = evidence.metrics.lines().map(str::to_owned).collect();
    let is_it = |line: &&mut String| line.starts_with(family) && line.contains(label) && !line.ends_with(" 0");
    let line = lines.iter_mut().find(is_it).expect("such a series");
    let (name, value) = line.rsplit_once(' ').unwrap();
    *line = format!("{name} {}", value.parse::<u64>().unwrap() + 1);
    evidence.metrics = lines.join("\n");
}

/// Every leg, and faults that it is there to find.
const FAULTS: [Fault; 63] = [
    ("record", |e| drop(e.log.pop())),
    ("record", |e| e.log.push(e.log[0].clone())),
    ("record", |e| miscount(e, "gateway_access_log_lines_total", "suppressed")),
    ("client", |e| seen(e, |seen| seen.usage.is_some()).usage.as_mut().unwrap()[3] += 1),
    ("client", |e| seen(e, |seen| seen.usage.is_some_and(|usage| usage[1] > 0)).usage.as_mut().unwrap()[1] += 1),
    ("client", |e| seen(e, |seen| seen.cost_usd.is_some()).cost_usd = Some("0.000000001".into())),
    ("client", |e| seen(e, |seen| seen.kind == "left" && seen.status == 200).pieces = 10_000),
    ("client", |e| seen(e, |seen| seen.kind == "whole").bytes_out = Some(1)),
    ("client", |e| seen(e, |seen| seen.kind == "remote").key_id = "somebody-else".into()),
    ("client", |e| seen(e, |seen| seen.kind == "cut" && seen.error_code.is_some()).error_code = None),
    ("recount", |e| e.rows.iter_mut().for_each(|row| row.tokens[0] += u64::from(row.tokens[0] > 0))),
    // A row that is lost, or one too many.
    ("ledger", |e| e.rows.push(e.rows[0].clone())),
    ("ledger", |e| forget(e, |row| row.outcome == "failed_over" && row.attempt == 0)),
    ("ledger", |e| forget(e, |row| row.role == "fallback" && row.is_terminal())),
    ("ledger", |e| row(e, |row| row.outcome == "failed_over").outcome = "answered".into()),
    ("ledger", |e| {
        let again = row(e, LedgerRow::is_terminal).clone();
        e.rows.push(LedgerRow { attempt: again.attempt + 1, role: "retry".into(), ..again });
    }),
    ("log", |e| forget(e, |row| row.is_terminal() && row.attempt == 0)),
    ("log", |e| {
        let lines = &mut e.log.iter_mut();
        lines.find(|line| line["tokens"].is_object()).unwrap()["tokens"]["output"] = 9999.into()
    }),
    // What nobody owes.
    ("ledger", |e| row(e, LedgerRow::is_shadow).billed = 100),
    ("ledger", |e| row(e, |row| row.cache == "hit").billed = 100),
    ("ledger", |e| row(e, |row| row.cache == "coalesced").billed = 100),
    ("ledger", |e| row(e, |row| row.outcome == "failed_over").billed = 100),
    ("ledger", |e| row(e, |row| row.role == "shadow").tenant = "other-tenant".into()),
    ("price", |e| row(e, |row| row.billed > 0).billed += 1),
    ("price", |e| row(e, |row| row.provider == "mock" && row.provider_cost > 0).provider_cost += 1),
    ("price", |e| row(e, |row| row.is_shadow() && row.provider == "mirror" && row.billed == 0).tokens[1] += 1),
    ("span", |e| drop(e.spans.remove(0))),
    ("span", |e| e.spans.push(e.spans[0].clone())),
    ("span", |e| attribute(e, "gen_ai.usage.output_tokens", |_| true, "9999")),
    ("span", |e| attribute(e, "glassgate.role", |span| span.attributes["glassgate.role"] == "shadow", "primary")),
    ("span", |e| attribute(e, "glassgate.attempt.role", |_| true, "shadow")),
    ("span", |e| {
        let at = e.spans.iter().position(|span| span.attributes.contains_key("glassgate.attempt.number"));
        e.spans.remove(at.unwrap());
    }),
    // A call that nobody has a row for, and one that nobody made.
    ("upstream", |e| e.calls.push(Call { span: "0123456789abcdef".into(), ..e.calls[0].clone() })),
    ("upstream", |e| e.calls.push(e.calls[0].clone())),
    ("upstream", |e| {
        let at = e.calls.iter().position(|call| call.told.is_some());
        e.calls.remove(at.unwrap());
    }),
    ("upstream", |e| *e.calls.iter_mut().find_map(|call| call.told.as_mut()).unwrap() += 1),
    ("upstream", |e| forget(e, |row| row.is_shadow() && row.provider == "mirror")),
    ("metric", |e| lose(e, "gateway_tokens_total{")),
    ("metric", |e| lose(e, "gateway_requests_total{")),
    ("metric", |e| lose(e, "gateway_upstream_attempts_total{")),
    ("metric", |e| miscount(e, "gateway_rejections_total", "model_not_found")),
    ("metric", |e| miscount(e, "gateway_tokens_total", "role=\"shadow\"")),
    ("metric", |e| lose(e, "gateway_cost_usd_total{")),
    ("metric", |e| lose(e, "gateway_provider_cost_usd_total{")),
    ("metric", |e| lose(e, "gateway_budget_spent_usd{")),
    ("metric", |e| lose(e, "gateway_cache_saved_usd_total{")),
    ("metric", |e| miscount(e, "gateway_cache_saved_tokens_total", "kind=\"output\"")),
    ("metric", |e| miscount(e, "gateway_settled_requests_total", "usage_source=\"estimated\"")),
    ("metric", |e| miscount(e, "gateway_attempts_total", "outcome=\"failed_over\"")),
    ("metric", |e| miscount(e, "gateway_client_aborts_total", "phase=\"stream\"")),
    ("metric", |e| miscount(e, "gateway_client_aborts_total", "phase=\"queue\"")),
    ("metric", |e| miscount(e, "gateway_overhead_seconds_count", "phase=\"admit\"")),
    ("cache", |e| miscount(e, "gateway_cache_requests_total", "hit")),
    ("cache", |e| row(e, |row| row.cache == "hit").tokens[3] += 1),
    ("limit", |e| miscount(e, "gateway_limit_decisions_total", "decision=\"denied\",kind=\"concurrency\"")),
    ("feedback", |e| drop(e.judged.pop())),
    ("feedback", |e| miscount(e, "gateway_feedback_total", "correct")),
    ("limit", |e| miscount(e, "gateway_limit_decisions_total", "decision=\"allowed\",kind=\"feedback\"")),
    ("funnel", |e| miscount(e, "gateway_shadow_requests_total", "paired")),
    ("funnel", |e| miscount(e, "gateway_shadow_requests_total", "eligible")),
    ("engine", |e| lose(e, "runtime_generated_tokens_total{")),
    ("engine", |e| lose(e, "runtime_prompt_tokens_total{")),
    ("engine", |e| lose(e, "runtime_prefix_tokens_total{")),
];

/// Prints how often each thing was there.
fn tell(what: &str, names: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    names.for_each(|name| *counts.entry(name).or_default() += 1);
    let list: Vec<String> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
    println!("{what}: {}", list.join(", "));
    counts
}

#[test]
fn every_witness_tells_the_same_story_and_each_leg_of_the_oracle_can_fail() {
    let evidence = traffic();
    let disagreements = evidence.disagreements();
    let first = disagreements.iter().take(40).cloned().collect::<Vec<_>>().join("\n");
    assert!(disagreements.is_empty(), "{} disagreements:\n{first}", disagreements.len());

    println!("{} requests, {} rows, {} spans", evidence.seen.len(), evidence.rows.len(), evidence.spans.len());
    assert!(evidence.seen.len() >= 2000);
    let kinds = tell("sent", evidence.seen.iter().map(|seen| seen.kind.to_owned()));
    assert!(DECK.iter().all(|(kind, _)| kinds.get(*kind).is_some_and(|count| *count >= 8)), "a kind is missing");
    let rows = || evidence.rows.iter();
    let outcomes = tell("rows", rows().map(|row| format!("{} {}", row.role, row.outcome)));
    let caches = tell("cache", rows().filter(|row| row.is_terminal()).map(|row| row.cache.clone()));
    let sources = tell("usage", rows().map(|row| format!("{} {}", row.provider, row.usage_source)));
    let calls = tell("calls", evidence.calls.iter().map(|call| call.server.to_owned()));
    let refusals = tell("refused", evidence.seen.iter().filter_map(|seen| seen.error_code.clone()));
    let left = tell("left", rows().filter(|row| row.outcome == "aborted").map(|row| row.provider.clone()));
    let variants = tell("variants", rows().map(|row| row.variant.clone()));
    // The traffic must be mixed to prove anything.
    for (counts, name, least) in [
        (&outcomes, "primary answered", 800),
        (&outcomes, "primary aborted", 80),
        (&outcomes, "primary failed", 60),
        (&outcomes, "primary failed_over", 100),
        (&outcomes, "primary released", 1),
        (&outcomes, "retry answered", 20),
        (&outcomes, "fallback failed_over", 20),
        (&outcomes, "fallback answered", 60),
        (&outcomes, "shadow answered", 60),
        (&outcomes, "shadow failed", 5),
        (&caches, "hit", 60),
        (&caches, "coalesced", 40),
        (&caches, "miss", 40),
        (&sources, "glassgate counted", 600),
        (&sources, "mock reported", 200),
        (&sources, "mock estimated", 30),
        (&calls, "mock", 400),
        (&calls, "spare", 60),
        (&calls, "mirror", 40),
        (&left, "glassgate", 60),
        (&left, "mock", 10),
        (&variants, "glimmer-1", 400),
        (&variants, "glimmer-2", 50),
        (&refusals, "invalid_api_key", 5),
        (&refusals, "missing_api_key", 5),
        (&refusals, "unknown_path", 5),
        (&refusals, "method_not_allowed", 5),
        (&refusals, "unsupported_media_type", 5),
        (&refusals, "invalid_parameter", 10),
        (&refusals, "invalid_json", 5),
        (&refusals, "model_not_found", 5),
        (&refusals, "context_length_exceeded", 5),
        (&refusals, "rate_limit_exceeded", 5),
        (&refusals, "tokens_limited", 5),
        (&refusals, "concurrency_limited", 5),
        (&refusals, "insufficient_quota", 5),
    ] {
        let count = counts.get(name).copied().unwrap_or(0);
        assert!(count >= least, "{name}: {count} are too few");
    }

    let is_stale = |seen: &&Seen| seen.kind == "stale";
    assert!(evidence.seen.iter().filter(is_stale).all(|seen| seen.status == 200), "a closed connection was noticed");

    for (number, (leg, damage)) in FAULTS.iter().enumerate() {
        let mut damaged = evidence.clone();
        damage(&mut damaged);
        let found = damaged.disagreements();
        assert!(
            found.iter().any(|line| line.starts_with(leg)),
            "fault {number} was not noticed by the leg `{leg}`: {found:?}"
        );
    }
}
