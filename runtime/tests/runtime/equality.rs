//! The same request gives the same bits, whatever happens around it.

use crate::support::{Answer, MODELS, ask, chat, collect, endless, greedy, serve, serve_as, settings};
use glassgate_runtime::{
    Activations, Generation, LoadOptions, Model, Quantize, Renders, Request, SamplingParams, Settings, Sink, StepRecord,
};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU32, Ordering},
};

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

const PLAIN: LoadOptions = LoadOptions { quantize: None, renders: Renders::Here };

/// One after the other, and nothing found in the cache.
async fn alone(settings: Settings, name: &str, options: LoadOptions) -> Vec<(String, Vec<Vec<u32>>)> {
    let (_runtime, model) = serve_as(settings, name, options);
    let mut answers = Vec::new();
    for (request, n) in requests(&model).into_iter().zip(1..) {
        let answer = ask(&model, Request { salt: [n; 16], ..request }).await;
        assert_eq!(answer.timeline.cached_tokens, 0);
        answers.push(essence(answer));
    }
    answers
}

/// Holds the engine after a step until a test has submitted all it wants to see in one batch; then a stranger leaves after
/// every third step.
#[derive(Default)]
struct Gate {
    closed: Mutex<()>,
    strangers: Mutex<Vec<Generation>>,
    steps: AtomicU32,
    /// Strangers that left so.
    left: AtomicU32,
}

impl Sink for Gate {
    fn step(&self, _: &str, _: &StepRecord) {
        drop(self.closed.lock());
        if self.steps.fetch_add(1, Ordering::SeqCst) % 3 == 2 {
            let gone = self.strangers.lock().expect("not poisoned").pop();
            self.left.fetch_add(gone.is_some().into(), Ordering::SeqCst);
        }
    }
}

/// All requests at once, among strangers that come and go.
async fn crowded(settings: Settings, name: &str, options: LoadOptions) -> Vec<(String, Vec<Vec<u32>>)> {
    let gate = Arc::new(Gate::default());
    let (_runtime, model) = serve_as(Settings { sink: Some(gate.clone()), ..settings }, name, options);
    let closed = gate.closed.lock().expect("not poisoned");
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
    *gate.strangers.lock().expect("not poisoned") = strangers;
    drop(closed);
    let mut answers = Vec::new();
    let mut batch_max = 0;
    for generation in generations {
        let answer = collect(generation).await;
        batch_max = batch_max.max(answer.timeline.batch_max);
        answers.push(essence(answer));
    }
    assert!(batch_max > 4, "nothing was batched");
    assert!(gate.left.load(Ordering::SeqCst) > 0, "nobody left on the way");
    answers
}

async fn in_every_way(base: Settings, name: &str, options: LoadOptions) {
    let want = alone(base.clone(), name, options).await;
    assert_eq!(crowded(base.clone(), name, options).await, want, "batched");
    for chunk in [1, 7, 32, usize::MAX] {
        let chunked = Settings { prefill_chunk: chunk, step_tokens: usize::MAX, ..base.clone() };
        assert_eq!(alone(chunked.clone(), name, options).await, want, "chunks of {chunk}");
        assert_eq!(crowded(chunked, name, options).await, want, "batched in chunks of {chunk}");
    }
    let narrow = Settings { step_tokens: 9, running_max: 8, ..base };
    assert_eq!(crowded(narrow, name, options).await, want, "nine tokens a step");
}

const ACTIVATIONS: [Activations; 2] = [Activations::F32, Activations::Bf16];

#[tokio::test]
async fn answers_are_identical_alone_batched_with_strangers_and_in_chunks_of_any_size() {
    for activations in ACTIVATIONS {
        for name in MODELS {
            in_every_way(Settings { activations, ..settings() }, name, PLAIN).await;
        }
    }
}

#[tokio::test]
async fn so_are_the_answers_of_quantised_models() {
    for quantize in [Quantize::Q8_0, Quantize::Q4K] {
        in_every_way(settings(), "glimmer-2", LoadOptions { quantize: Some(quantize), ..PLAIN }).await;
    }
}

#[tokio::test]
async fn answers_are_identical_with_more_threads() {
    for quantize in [None, Some(Quantize::Q8_0), Some(Quantize::Q4K)] {
        let options = LoadOptions { quantize, ..PLAIN };
        let want = alone(settings(), "glimmer-2", options).await;
        let shared = Settings { threads: 2, ..settings() };
        assert_eq!(alone(shared.clone(), "glimmer-2", options).await, want);
        assert_eq!(crowded(shared, "glimmer-2", options).await, want);
    }
}

#[tokio::test]
async fn answers_are_identical_when_blocks_are_taken_away_after_every_token() {
    for activations in ACTIVATIONS {
        for name in MODELS {
            let base = Settings { activations, ..settings() };
            let want = alone(base.clone(), name, PLAIN).await;
            let hard = Settings { preempt_always: true, prefill_chunk: 7, ..base.clone() };
            assert_eq!(alone(hard.clone(), name, PLAIN).await, want, "{name}, {activations:?}");
            assert_eq!(crowded(hard, name, PLAIN).await, want, "{name}, {activations:?}, batched");
        }
    }
}

/// They outgrow the pool together, so some really have to make way.
#[tokio::test]
async fn answers_are_identical_in_a_pool_that_is_too_small_for_all_of_them() {
    for (activations, block) in ACTIVATIONS.into_iter().zip([65_536, 32_768]) {
        for name in MODELS {
            let (_runtime, plain) = serve(Settings { activations, ..settings() }, name);
            let (runtime, small) = serve(Settings { activations, kv_bytes: 14 * block, ..settings() }, name);
            let long = |request| Request { max_tokens: 150, ignore_eos: true, ..request };
            let all: Vec<_> =
                requests(&small).into_iter().map(|r| small.generate(long(r)).expect("accepted")).collect();
            for (generation, request) in all.into_iter().zip(requests(&plain)) {
                let want = essence(ask(&plain, long(request)).await);
                assert_eq!(essence(collect(generation).await), want, "{name}, {activations:?}");
            }
            let report = &runtime.report().models[0];
            assert!(report.preemptions > 0, "{} blocks are enough for all", report.kv_blocks_total);
        }
    }
}

#[tokio::test]
async fn answers_are_identical_whatever_of_the_prompt_was_found_in_the_cache() {
    for activations in ACTIVATIONS {
        for name in MODELS {
            let (runtime, model) = serve(Settings { activations, ..settings() }, name);
            let prompt: Vec<u32> = chat(&model, QUESTIONS[5]).into_iter().cycle().take(129).collect();
            let request = |salt| Request { salt: [salt; 16], ..seeded(prompt.clone(), 3) };
            let want = essence(ask(&model, request(0)).await);
            for (salt, seen, found) in [(1, 0, 0), (2, 32, 32), (3, 63, 32), (4, 96, 96), (5, 129, 128)] {
                if seen > 0 {
                    ask(&model, Request { salt: [salt; 16], ..greedy(prompt[..seen].to_vec(), 1) }).await;
                }
                let answer = ask(&model, request(salt)).await;
                assert_eq!(answer.timeline.cached_tokens, found, "{seen} tokens seen before");
                assert_eq!(essence(answer), want, "{name}, {activations:?}, {found} tokens found");
            }
            // An answer's own tokens are found by the next turn of its conversation.
            let whole: Vec<u32> = prompt.iter().chain(want.1.iter().flatten()).copied().collect();
            let turn = ask(&model, greedy(whole.clone(), 5)).await;
            assert_eq!(turn.timeline.cached_tokens as usize, (whole.len() - 1) / 32 * 32);
            assert!(runtime.report().models[0].prefix.found_tokens >= 32 + 32 + 96 + 128);
        }
    }
}

#[tokio::test]
async fn answers_are_identical_as_choices_of_one_prompt() {
    for activations in ACTIVATIONS {
        for name in MODELS {
            for preempt_always in [false, true] {
                let base = Settings { activations, ..settings() };
                let (_runtime, plain) = serve(base.clone(), name);
                let (runtime, model) = serve(Settings { preempt_always, ..base }, name);
                for question in [QUESTIONS[0], QUESTIONS[5]] {
                    let before = runtime.report().models[0].prompt_tokens;
                    let prompt = chat(&model, question);
                    let choices = model.generate_many(seeded(prompt.clone(), 40), 5).expect("accepted");
                    for (choice, seed) in choices.into_iter().zip(40..) {
                        let want = essence(ask(&plain, seeded(prompt.clone(), seed)).await);
                        assert_eq!(essence(collect(choice).await), want, "{name}, {activations:?}, seed {seed}");
                    }
                    let read = runtime.report().models[0].prompt_tokens - before;
                    assert_eq!(read, prompt.len() as u64, "one prompt");
                    let steps = runtime.steps(name);
                    assert!(!steps.is_empty() && steps.is_sorted_by_key(|step| step.at));
                }
            }
        }
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
