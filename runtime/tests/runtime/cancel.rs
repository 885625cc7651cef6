//! Whoever leaves stops costing anything within one step, and never disturbs the others.

use crate::support::{ask, chat, collect, endless, glimmer, greedy, serve, settings, settled};
use glassgate_runtime::{Event, FinishReason, Generation, Settings, Sink, StepRecord};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

#[tokio::test]
async fn a_cancelled_answer_ends_within_one_step_and_frees_its_blocks() {
    let (runtime, model) = glimmer();
    for _ in 0..20 {
        let mut generation = model.generate(endless(chat(&model, "go"), 1000)).expect("accepted");
        assert!(matches!(generation.next().await, Some(Event::Text { .. })));
        generation.cancel();
        let before = generation.produced();
        let answer = collect(generation).await;
        assert_eq!(answer.ending, Ok(FinishReason::Cancelled));
        // The step that was under way may still give one.
        let after = answer.timeline.output_tokens;
        assert!(after <= before + 1, "{after} after {before}");
        settled(&runtime).await;
    }
}

/// Runs a test's code on the engine's thread, after every step.
struct AfterStep(Box<dyn Fn() + Send + Sync>);

impl Sink for AfterStep {
    fn step(&self, _: &str, _: &StepRecord) {
        (self.0)();
    }
}

/// The cancellation happens between two steps: exactly no further step may take part.
#[tokio::test]
async fn no_further_step_is_spent_on_a_cancelled_answer() {
    let going: Arc<Mutex<Option<Generation>>> = Arc::default();
    let produced_at_cancel = Arc::new(AtomicU32::new(0));
    let sink = AfterStep(Box::new({
        let (going, produced) = (Arc::clone(&going), Arc::clone(&produced_at_cancel));
        move || {
            if let Some(generation) = going.lock().expect("not poisoned").as_ref()
                && generation.produced() >= 5
                && produced.load(Ordering::SeqCst) == 0
            {
                generation.cancel();
                produced.store(generation.produced(), Ordering::SeqCst);
            }
        }
    }));
    let (runtime, model) = serve(Settings { sink: Some(Arc::new(sink)), ..settings() }, "glimmer-2");
    let other = model.generate(endless(chat(&model, "stay"), 1500)).expect("accepted");
    let go = model.generate(endless(chat(&model, "go"), 1000)).expect("accepted");
    *going.lock().expect("not poisoned") = Some(go);
    while produced_at_cancel.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let go = going.lock().expect("not poisoned").take().expect("the generation");
    let answer = collect(go).await;
    assert_eq!(answer.ending, Ok(FinishReason::Cancelled));
    assert_eq!(answer.timeline.output_tokens, produced_at_cancel.load(Ordering::SeqCst));
    other.cancel();
    collect(other).await;
    settled(&runtime).await;
}

#[tokio::test]
async fn queued_and_half_read_requests_can_be_cancelled_too() {
    let one = Settings { running_max: 1, prefill_chunk: 1, ..settings() };
    let (runtime, model) = serve(one, "glimmer-2");
    // One token a step: it is still being read when it is cancelled.
    let reading = model.generate(greedy(vec![5; 900], 10)).expect("accepted");
    let queued = model.generate(greedy(chat(&model, "hi"), 10)).expect("accepted");
    let last = model.generate(greedy(chat(&model, "12+34"), 10)).expect("accepted");
    queued.cancel();
    let queued = collect(queued).await;
    assert_eq!((queued.ending, queued.timeline.admitted), (Ok(FinishReason::Cancelled), None));
    reading.cancel();
    let reading = collect(reading).await;
    assert_eq!(reading.ending, Ok(FinishReason::Cancelled));
    assert!(reading.timeline.admitted.is_some() && reading.timeline.first_token.is_none());
    assert_eq!(collect(last).await.ending, Ok(FinishReason::Stop));
    settled(&runtime).await;
}

#[tokio::test]
async fn a_dropped_stream_cancels_and_a_slow_one_loses_nothing() {
    let (runtime, model) = glimmer();
    let want = ask(&model, greedy(chat(&model, "Count down from 20 to 9"), 60)).await;
    let slow = model.generate(greedy(chat(&model, "Count down from 20 to 9"), 60)).expect("accepted");
    for n in 0..50 {
        let mut generation = model.generate(endless(chat(&model, "go"), 1000)).expect("accepted");
        if n % 2 == 0 {
            generation.next().await;
        }
        drop(generation);
    }
    // Nobody reads `slow` meanwhile.
    assert_eq!(ask(&model, greedy(chat(&model, "Count down from 20 to 9"), 60)).await.text, want.text);
    let slow = collect(slow).await;
    assert_eq!((slow.text, slow.tokens), (want.text, want.tokens));
    while runtime.report().models[0].running + runtime.report().models[0].waiting > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    settled(&runtime).await;
}

/// A future that is dropped half-way must not swallow an event.
#[tokio::test]
async fn waiting_for_an_event_may_be_given_up() {
    let (_runtime, model) = glimmer();
    let request = greedy(chat(&model, "Count down from 20 to 9"), 60);
    let want = ask(&model, request.clone()).await;
    let mut generation = model.generate(request).expect("accepted");
    let mut text = String::new();
    loop {
        match tokio::time::timeout(Duration::from_micros(30), generation.next()).await {
            Err(_) => {}
            Ok(Some(Event::Text { text: piece, .. })) => text.push_str(&piece),
            Ok(ending) => {
                assert!(matches!(ending, Some(Event::Finished { .. })));
                break;
            }
        }
    }
    assert_eq!(text, want.text);
}
