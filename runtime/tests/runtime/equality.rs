//! The same request gives the same bits, whatever happens around it.

use crate::support::{Answer, ask, chat, collect, endless, greedy, serve, serve_as, settings};
use glassgate_runtime::{KvDtype, LoadOptions, Model, Quantize, Request, SamplingParams, Settings, Sink, StepRecord};
use std::sync::{Arc, Mutex};

const QUESTIONS: [&str; 6] = [
    "12+34",
    "Count down from 20 to 9",
    "단어 순서를 거꾸로: 사과 바다 기차",
    "Extract name, age and city as JSON: My name is Mina, I am 24 years old and I live in Seoul.",
    "hi",
    "Sort from smallest to largest: 31, 7, 90, 18, 55, 12, 99, 3, 41, 76, 28, 64, 87, 19, 5, 33, 70, 46",
];

fn seeded(prompt: Vec<u32>, seed: u64) -> Request {
    let params = SamplingParams { temperature: 3.0, top_p: 0.95, seed, ..SamplingParams::default() };
    Request { params, ..greedy(prompt, 40) }
}

fn requests(model: &Model) -> Vec<Request> {
    let greedy = QUESTIONS.iter().map(|question| greedy(chat(model, question), 40));
    let seeded = QUESTIONS.iter().zip(1..).map(|(question, seed)| seeded(chat(model, question), seed));
    greedy.chain(seeded).collect()
}

/// Text, and the tokens that each piece of it came of.
fn essence(answer: Answer) -> (String, Vec<Vec<u32>>) {
    assert!(answer.ending.is_ok(), "{:?}", answer.ending);
    (answer.text, answer.tokens)
}

async fn alone(settings: Settings, options: LoadOptions) -> Vec<(String, Vec<Vec<u32>>)> {
    let (_runtime, model) = serve_as(settings, "glimmer-2", options);
    let mut answers = Vec::new();
    for request in requests(&model) {
        answers.push(essence(ask(&model, request).await));
    }
    answers
}

/// Holds the engine after a step until a test has submitted all it wants to see in one batch.
#[derive(Default)]
struct Gate(Mutex<()>);

impl Sink for Gate {
    fn step(&self, _: &str, _: &StepRecord) {
        drop(self.0.lock());
    }
}

/// All requests at once, among strangers that come and go.
async fn crowded(settings: Settings, options: LoadOptions) -> Vec<(String, Vec<Vec<u32>>)> {
    let gate = Arc::new(Gate::default());
    let (_runtime, model) = serve_as(Settings { sink: Some(gate.clone()), ..settings }, "glimmer-2", options);
    let closed = gate.0.lock().expect("not poisoned");
    let stranger =
        |n: u32| model.generate(endless(chat(&model, &"x 1 ".repeat(n as usize)), 5 + 7 * n)).expect("accepted");
    let mut strangers = Vec::new();
    let mut generations = Vec::new();
    for (n, request) in requests(&model).into_iter().enumerate() {
        strangers.push(stranger(1 + n as u32 % 9));
        generations.push(model.generate(request).expect("accepted"));
        if n % 3 == 0 {
            drop(strangers.remove(0));
        }
    }
    drop(closed);
    let mut answers = Vec::new();
    let mut batch_max = 0;
    for generation in generations {
        let answer = collect(generation).await;
        batch_max = batch_max.max(answer.timeline.batch_max);
        answers.push(essence(answer));
    }
    assert!(batch_max > 4, "nothing was batched");
    answers
}

async fn in_every_way(base: Settings, options: LoadOptions) {
    let want = alone(base.clone(), options).await;
    assert_eq!(crowded(base.clone(), options).await, want, "batched");
    for chunk in [1, 7, 32, usize::MAX] {
        let chunked = Settings { prefill_chunk: chunk, step_tokens: usize::MAX, ..base.clone() };
        assert_eq!(alone(chunked.clone(), options).await, want, "chunks of {chunk}");
        assert_eq!(crowded(chunked, options).await, want, "batched in chunks of {chunk}");
    }
    let narrow = Settings { step_tokens: 9, running_max: 8, ..base };
    assert_eq!(crowded(narrow, options).await, want, "nine tokens a step");
}

#[tokio::test]
async fn answers_are_identical_alone_batched_with_strangers_and_in_chunks_of_any_size() {
    for kv_dtype in [KvDtype::F32, KvDtype::Bf16] {
        in_every_way(Settings { kv_dtype, ..settings() }, LoadOptions::default()).await;
    }
}

#[tokio::test]
async fn so_are_the_answers_of_quantised_models() {
    for quantize in [Quantize::Q8_0, Quantize::Q4K] {
        in_every_way(settings(), LoadOptions { quantize: Some(quantize) }).await;
    }
}

#[tokio::test]
async fn answers_are_identical_with_more_threads() {
    for quantize in [None, Some(Quantize::Q8_0), Some(Quantize::Q4K)] {
        let options = LoadOptions { quantize };
        let want = alone(settings(), options).await;
        let shared = Settings { threads: 2, ..settings() };
        assert_eq!(alone(shared.clone(), options).await, want);
        assert_eq!(crowded(shared, options).await, want);
    }
}

#[tokio::test]
async fn seeds_matter_and_repeat() {
    let (_runtime, model) = serve(settings(), "glimmer-2");
    let prompt = chat(&model, "Tell me a joke");
    let first = essence(ask(&model, seeded(prompt.clone(), 1)).await);
    assert_eq!(essence(ask(&model, seeded(prompt.clone(), 1)).await), first);
    assert_ne!(essence(ask(&model, seeded(prompt, 2)).await), first);
}
