//! One version of a model takes over from another while it serves.

use crate::support::{ask, chat, collect, endless, folder, glimmer, greedy, settings};
use glassgate_runtime::{Event, Failure, LoadOptions, ModelState, Refusal, Runtime};
use std::{
    path::Path,
    time::{Duration, Instant},
};

const AN_HOUR: Duration = Duration::from_secs(3600);

fn states(runtime: &Runtime) -> Vec<(String, ModelState)> {
    runtime.report().models.into_iter().map(|model| (model.digest, model.state)).collect()
}

#[tokio::test]
async fn a_new_version_loads_beside_the_old_one_which_finishes_what_it_began() {
    let runtime = Runtime::start(settings()).expect("valid settings");
    let load = |source: &str| runtime.load("m", &folder(source), &LoadOptions::default());
    let old = load("glimmer-1").expect("the bundled model");
    let want = ask(&old, greedy(chat(&old, "Count down from 20 to 9"), 60)).await.text;
    let under_way = old.generate(greedy(chat(&old, "Count down from 20 to 9"), 60)).expect("accepted");
    assert!(runtime.load("m", Path::new("nowhere"), &LoadOptions::default()).is_err());
    assert_eq!(states(&runtime), [(old.digest().to_owned(), ModelState::Ready)], "a failed load changes nothing");

    let new = load("glimmer-2").expect("the bundled model");
    old.drain(Instant::now() + AN_HOUR);
    // Who was sent here before the switch is still answered.
    let late = old.generate(greedy(chat(&old, "Count down from 20 to 9"), 60)).expect("accepted");
    let digests = [old.digest().to_owned(), new.digest().to_owned()];
    assert_eq!(collect(late).await.text, want);
    let [old_digest, new_digest] = digests;
    assert_eq!(
        states(&runtime),
        [(old_digest, ModelState::Draining), (new_digest.clone(), ModelState::Ready)],
        "both are there"
    );
    drop(old);
    assert_eq!(collect(under_way).await.text, want);
    while states(&runtime).len() > 1 {
        tokio::task::yield_now().await;
    }
    assert_eq!(states(&runtime), [(new_digest, ModelState::Ready)]);
    assert!(ask(&new, greedy(chat(&new, "hi"), 5)).await.ending.is_ok());
}

#[tokio::test]
async fn whoever_is_left_at_the_deadline_is_told_that_the_model_was_unloaded() {
    let (runtime, model) = glimmer();
    let mut running = model.generate(endless(chat(&model, "go"), 1500)).expect("accepted");
    assert!(matches!(running.next().await, Some(Event::Text { .. })));
    model.drain(Instant::now());
    assert_eq!(collect(running).await.ending, Err(Failure::Unloaded));
    while !states(&runtime).is_empty() {
        tokio::task::yield_now().await;
    }
    // The handle is still there, the model is not.
    let too_late = model.generate(greedy(chat(&model, "hi"), 5)).expect("queued");
    assert_eq!(collect(too_late).await.ending, Err(Failure::Unloaded));
    drop(runtime);
    assert_eq!(model.generate(greedy(chat(&model, "hi"), 5)).err(), Some(Refusal::Draining));
}

/// An idle engine sleeps until somebody calls: a deadline has to wake it.
#[tokio::test]
async fn an_idle_model_is_unloaded_at_its_deadline_though_its_handle_is_kept() {
    let (runtime, model) = glimmer();
    model.drain(Instant::now() + Duration::from_millis(20));
    while !states(&runtime).is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(model.name(), "glimmer-2");
}
