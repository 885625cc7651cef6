//! Mixed traffic: every client plays a deck of things that clients do.

use std::sync::Arc;
use std::thread;

use serde_json::{Value, json};

use super::world::{Ask, SHADOWS, World, calls, get, same};
use crate::support::eventually;
use crate::support::evidence::{Evidence, Seen};
use crate::support::http;

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

/// What a client does, and how often in a round of all.
pub const DECK: [(&str, usize); 31] = [
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

pub fn traffic() -> Evidence {
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
