//! The queue, the batches and the endings, over a model that only counts.

use super::{BATCH_TOKENS, Embedded, Encode, Encoder, Job};
use crate::{
    engine::{events::Failure, places::Most, stats::Stats},
    kernels::texts::TextBatch,
    memory::Memory,
    report::EmbedTimeline,
};
use candle_core::{Device, Result, Tensor};
use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};
use tokio::sync::oneshot::{self, Receiver, error::TryRecvError};

const FATAL: u32 = 666;
const NAN: u32 = 667;

/// A text's vector is the sum of its ids.
struct Sums;

impl Encode for Sums {
    fn layers(&self) -> usize {
        3
    }

    fn begin(&self, batch: &Arc<TextBatch>) -> Result<Tensor> {
        Tensor::new(batch.ids.as_slice(), &Device::Cpu)
    }

    fn layer(&self, _: usize, h: &Tensor, batch: &Arc<TextBatch>) -> Result<Tensor> {
        assert!(!batch.ids.contains(&FATAL), "told to");
        Ok(h.clone())
    }

    fn finish(&self, h: &Tensor, batch: &Arc<TextBatch>) -> Result<Vec<Vec<f32>>> {
        let ids: Vec<u32> = h.to_vec1()?;
        let value = |ids: &[u32]| if ids.contains(&NAN) { f32::NAN } else { ids.iter().sum::<u32>() as f32 };
        Ok(batch.starts.windows(2).map(|text| vec![value(&ids[text[0]..text[1]])]).collect())
    }
}

fn encoder() -> Encoder {
    Encoder::new(Box::new(Sums), Arc::new(Stats::new("sums", 0, Memory::default())))
}

fn submit(encoder: &mut Encoder, texts: Vec<Vec<u32>>, deadline: Option<Instant>) -> Receiver<Embedded> {
    submit_for(encoder, 0, texts, deadline)
}

fn submit_for(
    encoder: &mut Encoder,
    tenant: u64,
    texts: Vec<Vec<u32>>,
    deadline: Option<Instant>,
) -> Receiver<Embedded> {
    let (reply, answer) = oneshot::channel();
    let mut place = encoder.stats.enter_queue(tenant, 1, Most::halves(200)).expect("a place");
    let places = [place.split(), place];
    let timeline = EmbedTimeline::begin(&texts);
    encoder.submit(Job::new(texts, tenant, places, deadline, timeline, Arc::default(), reply));
    answer
}

/// Lets it compute until nothing is left, and looks that nothing is.
fn drain(encoder: &mut Encoder) {
    while encoder.turn(None) {}
    assert!(encoder.is_idle());
    assert_eq!((encoder.stats.report().running, encoder.stats.waiting()), (0, 0));
}

#[test]
fn every_text_gets_its_own_vector_however_batches_fall() {
    let mut encoder = encoder();
    let requests: Vec<Vec<Vec<u32>>> =
        (1..30).map(|n| (0..n).map(|k| vec![n; 1 + (k * 37 % 200) as usize]).collect()).collect();
    let answers: Vec<_> = requests.iter().map(|texts| submit(&mut encoder, texts.clone(), None)).collect();
    drain(&mut encoder);
    for (texts, mut answer) in requests.iter().zip(answers) {
        let Embedded { vectors, timeline } = answer.try_recv().expect("an answer");
        let want: Vec<Vec<f32>> = texts.iter().map(|text| vec![text.iter().sum::<u32>() as f32]).collect();
        assert_eq!(vectors, Ok(want));
        assert!(timeline.batches >= 1 && timeline.texts_max >= 1 && timeline.started.is_some());
    }
    let tokens: usize = requests.iter().flatten().map(Vec::len).sum();
    assert_eq!(encoder.stats.prompt_tokens.load(Relaxed), tokens as u64);
    assert!(encoder.stats.steps.load(Relaxed) < 2 + 2 * (tokens / BATCH_TOKENS) as u64, "batches are filled");
}

#[test]
fn a_request_of_many_texts_delays_the_next_one_by_a_batch() {
    let mut encoder = encoder();
    let mut many = submit(&mut encoder, vec![vec![1; 50]; 2048], None);
    assert!(encoder.turn(None));
    let mut one = submit(&mut encoder, vec![vec![2; 3]], None);
    let batches = encoder.stats.steps.load(Relaxed);
    let vectors = loop {
        match one.try_recv() {
            Ok(embedded) => break embedded.vectors,
            Err(TryRecvError::Empty) => assert!(encoder.turn(None)),
            Err(TryRecvError::Closed) => panic!("it was dropped"),
        }
    };
    assert_eq!(vectors, Ok(vec![vec![6.0]]));
    assert!(encoder.stats.steps.load(Relaxed) <= batches + 2);
    assert!(many.try_recv().is_err());
    drain(&mut encoder);
    assert_eq!(many.try_recv().expect("an answer").vectors.expect("vectors").len(), 2048);
}

/// However many requests it has, each with a text that waits.
#[test]
fn a_tenant_of_many_requests_delays_another_by_a_batch() {
    let mut encoder = encoder();
    let flood: Vec<_> = (0..90).map(|_| submit_for(&mut encoder, 1, vec![vec![1; BATCH_TOKENS]; 3], None)).collect();
    assert!(encoder.turn(None));
    let mut one = submit_for(&mut encoder, 2, vec![vec![2; 3]], None);
    let batches = encoder.stats.steps.load(Relaxed);
    while one.try_recv().is_err() {
        assert!(encoder.turn(None));
    }
    assert!(encoder.stats.steps.load(Relaxed) <= batches + 3);
    drop(flood);
    drain(&mut encoder);
}

#[test]
fn a_batch_that_panics_fails_its_requests_and_no_others() {
    let mut encoder = encoder();
    let mut bad = submit(&mut encoder, vec![vec![1], vec![FATAL]], None);
    let mut odd = submit(&mut encoder, vec![vec![NAN; BATCH_TOKENS], vec![1]], None);
    let mut good = submit(&mut encoder, vec![vec![3; BATCH_TOKENS]], None);
    drain(&mut encoder);
    assert_eq!(bad.try_recv().expect("an answer").vectors, Err(Failure::Step("panic: told to".to_owned())));
    assert_eq!(odd.try_recv().expect("an answer").vectors, Err(Failure::NotFinite));
    assert_eq!(good.try_recv().expect("an answer").vectors, Ok(vec![vec![3.0 * BATCH_TOKENS as f32]]));
    assert_eq!(encoder.stats.failures.load(Relaxed), 2);
}

#[test]
fn whoever_leaves_is_not_computed_for_and_whoever_is_late_hears_of_it() {
    let mut encoder = encoder();
    let late = Instant::now();
    let mut gone: Vec<_> = (0..5).map(|_| submit(&mut encoder, vec![vec![1; 400]; 9], None)).collect();
    let mut late = submit(&mut encoder, vec![vec![1]], Some(late));
    assert!(encoder.turn(None));
    gone.clear();
    drain(&mut encoder);
    assert_eq!(late.try_recv().expect("an answer").vectors, Err(Failure::DeadlineExceeded));
    assert!(encoder.stats.steps.load(Relaxed) <= 1, "nothing more was computed");
    assert_eq!(encoder.stats.failures.load(Relaxed), 1, "to leave is not to fail");
}
