//! What the tests share: the bundled models, a runtime with a test's own settings, and whole answers.

use glassgate_runtime::{
    Activations, Class, Event, Failure, FinishReason, Generation, LoadOptions, Logprobs, Message, Model, Request,
    Runtime, SamplingParams, Settings, Timeline,
};
use std::{
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

pub const MODELS: [&str; 2] = ["glimmer-1", "glimmer-2"];

pub fn folder(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "models", name].iter().collect()
}

/// A file that `tests/formats/make.py` wrote.
pub fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "formats", name].iter().collect()
}

/// A folder of a test's own, gone with it.
pub struct Temporary(pub PathBuf);

impl Temporary {
    pub fn new() -> Temporary {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("glassgate-folder-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("a temporary folder");
        Temporary(path)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.0.join(name), bytes).expect("written");
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// How byte-level tokenizers write down the 256 bytes.
pub fn letters() -> impl Iterator<Item = char> {
    (0..256u32).map(|byte| match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => char::from_u32(byte).expect("a character"),
        0..=0x20 => char::from_u32(0x100 + byte).expect("a character"),
        0x7F..=0xA0 => char::from_u32(0x121 + byte - 0x7F).expect("a character"),
        _ => '\u{143}',
    })
}

pub fn golden_text() -> serde_json::Value {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "golden", "text.json"].iter().collect();
    serde_json::from_str(&std::fs::read_to_string(path).expect("golden/text.json")).expect("valid JSON")
}

/// Small and quick to start; tests change what they care about.
pub fn settings() -> Settings {
    Settings { threads: 1, kv_bytes: 32 << 20, activations: Activations::F32, ..Settings::default() }
}

pub fn serve(settings: Settings, name: &str) -> (Runtime, Model) {
    serve_as(settings, name, LoadOptions::default())
}

pub fn serve_as(settings: Settings, name: &str, options: LoadOptions) -> (Runtime, Model) {
    let runtime = Runtime::start(settings).expect("valid settings");
    let model = runtime.load(name, &folder(name), &options).expect("the bundled model");
    (runtime, model)
}

pub fn glimmer() -> (Runtime, Model) {
    serve(settings(), "glimmer-2")
}

pub fn messages(turns: &serde_json::Value) -> Vec<Message> {
    let text = |turn: &serde_json::Value, name: &str| turn[name].as_str().expect("text").to_owned();
    let turns = turns.as_array().expect("a list of turns");
    turns.iter().map(|turn| Message { role: text(turn, "role"), content: text(turn, "content") }).collect()
}

pub fn chat(model: &Model, question: &str) -> Vec<u32> {
    let message = Message { role: "user".to_owned(), content: question.to_owned() };
    model.tokenize(&model.prompt(&[message]).expect("a prompt")).expect("ids")
}

pub fn greedy(prompt: Vec<u32>, max_tokens: u32) -> Request {
    Request {
        prompt,
        max_tokens,
        params: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        stop: Vec::new(),
        ignore_eos: false,
        tenant: 0,
        salt: [0; 16],
        class: Class::Interactive,
        deadline: None,
    }
}

/// A request that samples to its bound, and all over the vocabulary.
pub fn endless(prompt: Vec<u32>, max_tokens: u32) -> Request {
    let params = SamplingParams { temperature: 50.0, seed: 7, ..SamplingParams::default() };
    Request { params, ignore_eos: true, ..greedy(prompt, max_tokens) }
}

#[derive(Debug)]
pub struct Answer {
    pub text: String,
    /// The tokens of every piece of text, and those after the last.
    pub tokens: Vec<Vec<u32>>,
    /// Of these tokens, if they were asked for.
    pub logprobs: Vec<Vec<Logprobs>>,
    pub ending: Result<FinishReason, Failure>,
    pub timeline: Timeline,
}

/// Reads an answer to its end, checking what every stream promises.
pub async fn collect(mut generation: Generation) -> Answer {
    let (mut text, mut tokens, mut logprobs) = (String::new(), Vec::new(), Vec::new());
    let (ending, timeline) = loop {
        match generation.next().await.expect("an ending before the end of the stream") {
            Event::Text { text: piece, tokens: new, logprobs: told } => {
                assert!(!piece.is_empty(), "empty text");
                assert!(!new.is_empty(), "two pieces for one token");
                tokens.push(new);
                logprobs.push(told);
                text.push_str(&piece);
            }
            Event::Finished { reason, tokens: rest, logprobs: told, timeline } => {
                tokens.push(rest);
                logprobs.push(told);
                break (Ok(reason), timeline);
            }
            Event::Failed { failure, timeline } => break (Err(failure), timeline),
        }
    };
    assert!(generation.next().await.is_none(), "an event after the ending");
    assert_eq!(generation.produced(), timeline.output_tokens);
    assert!(
        timeline.queue() + timeline.prefill().unwrap_or_default() + timeline.decode().unwrap_or_default()
            <= timeline.finished.duration_since(timeline.submitted)
    );
    Answer { text, tokens, logprobs, ending, timeline }
}

pub async fn ask(model: &Model, request: Request) -> Answer {
    let answer = collect(model.generate(request).expect("accepted")).await;
    if answer.ending.is_ok() {
        let told = answer.tokens.iter().map(Vec::len).sum::<usize>();
        assert_eq!(told, answer.timeline.output_tokens as usize, "every token is told, and once");
    }
    answer
}

/// Checks that nothing runs, nothing waits and nothing leaked: so it is when the last ending was heard.
pub async fn settled(runtime: &Runtime) {
    for model in runtime.report().models {
        assert_eq!((model.running, model.waiting, model.kv_blocks_used), (0, 0, 0), "{}", model.name);
    }
}

/// Names and shapes of the tensors of one layer of a Llama whose queries are as wide as its stream.
pub fn llama_layer(hidden: usize, kv: usize, inner: usize) -> [(&'static str, Vec<usize>); 9] {
    [
        ("input_layernorm", vec![hidden]),
        ("self_attn.q_proj", vec![hidden, hidden]),
        ("self_attn.k_proj", vec![kv, hidden]),
        ("self_attn.v_proj", vec![kv, hidden]),
        ("self_attn.o_proj", vec![hidden, hidden]),
        ("post_attention_layernorm", vec![hidden]),
        ("mlp.gate_proj", vec![inner, hidden]),
        ("mlp.up_proj", vec![inner, hidden]),
        ("mlp.down_proj", vec![hidden, inner]),
    ]
}
