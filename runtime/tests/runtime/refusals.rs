//! What cannot be answered is refused at the door, with the numbers that say why.

use crate::support::{ask, chat, collect, endless, folder, glimmer, greedy, serve, settings, settled};
use glassgate_runtime::{Failure, LoadOptions, Refusal, Request, Runtime, SamplingParams, Settings, StartError};
use std::time::{Duration, Instant};

#[tokio::test]
async fn impossible_requests_are_refused_and_the_largest_possible_one_is_not() {
    // 32 KiB for 32 tokens of this model with two bytes a number, twice that with four.
    let (runtime, model) = serve(Settings { kv_bytes: 8 * 65_536, ..settings() }, "glimmer-2");
    let total = runtime.report().models[0].kv_blocks_total * 32;
    let context = model.context();
    assert!(total < context, "the test needs a pool smaller than the context");
    let refused = |request: Request| model.generate(request).expect_err("a refusal");
    let fits = |prompt: u32, max_tokens: u32| greedy(vec![5; prompt as usize], max_tokens);
    assert_eq!(refused(fits(0, 5)), Refusal::EmptyPrompt);
    assert_eq!(refused(fits(5, 0)), Refusal::NothingToGenerate);
    assert_eq!(refused(fits(100, context)), Refusal::OverContext { prompt: 100, max_tokens: context, context });
    assert_eq!(refused(fits(5, u32::MAX)), Refusal::OverContext { prompt: 5, max_tokens: u32::MAX, context });
    let need_tokens = total + 1;
    assert_eq!(refused(fits(total, 1)), Refusal::NeverFits { need_tokens, total_tokens: total });
    assert!(matches!(refused(greedy(vec![1_000_000], 5)), Refusal::UnknownToken { id: 1_000_000, .. }));
    let answer = ask(&model, fits(total - 1, 1)).await;
    assert!(answer.ending.is_ok());
    settled(&runtime).await;
}

#[test]
fn parameters_out_of_range_are_refused_by_name() {
    let (_runtime, model) = glimmer();
    let fine = SamplingParams::default();
    let cases = [
        ("temperature", SamplingParams { temperature: -0.1, ..fine.clone() }),
        ("temperature", SamplingParams { temperature: f32::NAN, ..fine.clone() }),
        ("top_p", SamplingParams { top_p: 0.0, ..fine.clone() }),
        ("top_p", SamplingParams { top_p: 1.5, ..fine.clone() }),
        ("min_p", SamplingParams { min_p: f32::INFINITY, ..fine.clone() }),
        ("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..fine.clone() }),
        ("frequency_penalty", SamplingParams { frequency_penalty: 2.5, ..fine.clone() }),
        ("presence_penalty", SamplingParams { presence_penalty: -2.5, ..fine }),
    ];
    for (name, params) in cases {
        match model.generate(Request { params, ..greedy(vec![5], 5) }) {
            Err(Refusal::BadParams(bad)) => assert_eq!(bad.name, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_says_when_to_return() {
    let (runtime, model) = serve(Settings { running_max: 1, waiting_max: 5, ..settings() }, "glimmer-2");
    let mut accepted = Vec::new();
    let refusal = loop {
        match model.generate(endless(chat(&model, "go"), 200)) {
            Ok(generation) => accepted.push(generation),
            Err(refusal) => break refusal,
        }
        assert!(accepted.len() < 100, "the queue has no end");
    };
    let Refusal::Overloaded { retry_after } = refusal else { panic!("{refusal:?}") };
    assert!(retry_after > Duration::ZERO);
    assert!(accepted.len() >= 3);
    // The other half is for others.
    let other = Request { tenant: 1, ..endless(chat(&model, "go"), 20) };
    accepted.push(model.generate(other).expect("room for another tenant"));
    for generation in accepted {
        assert!(collect(generation).await.ending.is_ok());
    }
    settled(&runtime).await;
}

#[tokio::test]
async fn more_choices_than_may_wait_are_served_when_nobody_else_does() {
    let (runtime, model) = serve(Settings { running_max: 2, waiting_max: 2, ..settings() }, "glimmer-2");
    for choice in model.generate_many(endless(chat(&model, "go"), 20), 7).expect("accepted") {
        assert!(collect(choice).await.ending.is_ok());
    }
    settled(&runtime).await;
}

#[tokio::test]
async fn a_deadline_that_passes_in_the_queue_fails_the_request() {
    let (runtime, model) = serve(Settings { running_max: 1, ..settings() }, "glimmer-2");
    let first = model.generate(endless(chat(&model, "go"), 400)).expect("accepted");
    // It passes while the first one runs, however slow the machine is: at once.
    let deadline = Some(Instant::now());
    let late = Request { deadline, ..greedy(chat(&model, "hi"), 5) };
    let late = collect(model.generate(late).expect("accepted")).await;
    assert_eq!(late.ending, Err(Failure::DeadlineExceeded));
    assert_eq!((late.timeline.admitted, late.timeline.output_tokens), (None, 0));
    assert!(collect(first).await.ending.is_ok());
    assert_eq!(runtime.report().models[0].failures, 1);
    settled(&runtime).await;
}

#[test]
fn settings_that_cannot_work_are_refused_by_name() {
    let cases = [
        ("threads", Settings { threads: 0, ..settings() }),
        ("kv_bytes", Settings { kv_bytes: 0, ..settings() }),
        ("prefill_chunk", Settings { prefill_chunk: 0, ..settings() }),
        ("running_max", Settings { running_max: 0, ..settings() }),
        ("waiting_max", Settings { waiting_max: 0, ..settings() }),
        ("step_tokens", Settings { step_tokens: 64, running_max: 64, ..settings() }),
    ];
    for (name, settings) in cases {
        match Runtime::start(settings) {
            Err(StartError::BadSetting { name: got, .. }) => assert_eq!(got, name),
            Err(other) => panic!("{name}: {other}"),
            Ok(_) => panic!("{name} was accepted"),
        }
    }
    let runtime = Runtime::start(Settings { kv_bytes: 100, ..settings() }).expect("a valid number");
    let error = runtime
        .load("glimmer-2", &folder("glimmer-2"), &LoadOptions::default())
        .err()
        .expect("no room for one block")
        .to_string();
    assert!(error.contains("kv_bytes") && error.contains("config.json"), "{error}");
}
