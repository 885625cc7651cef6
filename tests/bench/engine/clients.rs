//! Eight clients whose prompts and answers differ in length, each asking again once it was answered.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Instant;

use serde_json::json;

use super::super::load::{Client, post};
use super::super::report::Rounds;
use super::llama::Llama;
use super::ours::Engine;

const CLIENTS: usize = 8;
/// Prompt and answer, in tokens; each client begins elsewhere in the list.
const LENGTHS: [(u32, u32); 4] = [(32, 96), (256, 32), (96, 64), (160, 16)];

/// Output tokens a second of both, and the share of a step that is not the forward.
pub fn run(engine: &Engine, peer: Option<&Llama>, file: &Path, rounds: usize) -> Rounds {
    let executor = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = peer.map(|peer| peer.serve(file, CLIENTS, 512));
    let mut measured = Rounds::default();
    for round in 0..=rounds {
        let before = engine.last_step();
        let ours = executor.block_on(all(|client, turn| {
            let (prompt, tokens) = lengths(client, turn);
            engine.answer(prompt, tokens)
        }));
        let mut figures = json!({"ours": ours, "overhead_percent": engine.overhead_percent(before)});
        if let Some(server) = &server {
            let theirs = executor.block_on(all(|client, turn| ask(server.address, lengths(client, turn))));
            figures["llama"] = theirs.into();
        }
        // The first round warms caches and clocks.
        if round > 0 {
            measured.0.push(figures);
        }
    }
    measured
}

fn lengths(client: usize, turn: usize) -> (u32, u32) {
    LENGTHS[(client + turn) % LENGTHS.len()]
}

/// Output tokens a second when each client goes through the list once.
async fn all<F: Future<Output = ()>>(answer: impl Fn(usize, usize) -> F) -> f64 {
    let began = Instant::now();
    let clients = (0..CLIENTS).map(|client| {
        let answer = &answer;
        async move {
            for turn in 0..LENGTHS.len() {
                answer(client, turn).await;
            }
        }
    });
    let mut clients: Vec<_> = clients.map(Box::pin).collect();
    std::future::poll_fn(|context| {
        clients.retain_mut(|client| client.as_mut().poll(context).is_pending());
        if clients.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    let tokens: u32 = LENGTHS.iter().map(|(_, tokens)| tokens).sum();
    (CLIENTS as u32 * tokens) as f64 / began.elapsed().as_secs_f64()
}

/// The prompt is in token ids: the server's words would be cut in another way.
async fn ask(address: SocketAddr, (prompt, tokens): (u32, u32)) {
    let body = json!({"prompt": super::ours::ids(prompt), "n_predict": tokens, "ignore_eos": true,
                      "temperature": 0, "cache_prompt": false});
    let mut client = Client::connect(address).await;
    let request = post(&body.to_string(), "none").to_path("/completion");
    client.ask(&request.next()).await;
}
