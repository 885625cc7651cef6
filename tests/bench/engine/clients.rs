//! Eight clients whose prompts and answers differ in length, each asking again once it was answered. Output tokens a
//! second, of each engine.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use super::super::load::{Client, post};
use super::super::process::{Process, peer};
use super::super::python::Script;
use super::ours::{Engine, ids};

pub const CLIENTS: usize = 8;
/// Prompt and answer, in tokens; each client begins elsewhere in the list.
const LENGTHS: [(u32, u32); 4] = [(32, 96), (256, 32), (96, 64), (160, 16)];

pub fn ours(engine: &Engine, temperature: f32) -> f64 {
    all(|client, turn| {
        let (prompt, tokens) = lengths(client, turn);
        engine.answer(prompt, tokens, temperature)
    })
}

pub fn llama(server: &Process) -> f64 {
    all(|client, turn| ask(server.address, lengths(client, turn)))
}

fn lengths(client: usize, turn: usize) -> (u32, u32) {
    LENGTHS[(client + turn) % LENGTHS.len()]
}

fn tokens() -> f64 {
    let tokens: u32 = LENGTHS.iter().map(|(_, tokens)| tokens).sum();
    CLIENTS as f64 * f64::from(tokens)
}

/// Each client goes through the list once.
fn all<F: Future<Output = ()>>(answer: impl Fn(usize, usize) -> F) -> f64 {
    let executor = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let began = Instant::now();
    executor.block_on(async {
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
    });
    tokens() / began.elapsed().as_secs_f64()
}

/// The prompt is in token ids: the server's words would be cut in another way.
async fn ask(address: SocketAddr, (prompt, tokens): (u32, u32)) {
    let body = json!({"prompt": ids(prompt), "n_predict": tokens, "ignore_eos": true,
                      "temperature": 0, "cache_prompt": false});
    let mut client = Client::connect(address).await;
    let request = post(&body.to_string(), "none").to_path("/completion");
    client.ask(&request).await;
}

pub struct Mistral(Script);

impl Mistral {
    pub fn start(root: &Path, folder: &Path) -> Mistral {
        Mistral(Script::start(&peer("python"), root, "clients.py", &[folder.as_ref()]))
    }

    pub fn tokens_per_s(&mut self) -> f64 {
        let client = |client| (0..LENGTHS.len()).map(|turn| lengths(client, turn)).collect::<Vec<_>>();
        let told = self.0.ask(&json!((0..CLIENTS).map(client).collect::<Vec<_>>()));
        tokens() / told["seconds"].as_f64().unwrap()
    }
}

/// One batch of equal lengths, so that nothing is padded and nobody waits: what `generate` does best.
pub struct Transformers(Script);

impl Transformers {
    pub fn start(root: &Path, folder: &Path) -> Transformers {
        Transformers(Script::start(&peer("python"), root, "generate.py", &[folder.as_ref()]))
    }

    pub fn tokens_per_s(&mut self, clients: usize) -> f64 {
        let told: Value =
            self.0.ask(&json!({"prompt": ids(super::DEPTH), "clients": clients, "tokens": super::DECODED}));
        clients as f64 * f64::from(super::DECODED) / told["seconds"].as_f64().unwrap()
    }
}
