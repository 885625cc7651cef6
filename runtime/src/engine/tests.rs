//! The engine with a fake model: what happens when a step goes wrong.

mod turns;

use super::{
    Command,
    events::{Event, Failure, FinishReason, Generation},
    forward::Forward,
    places::Most,
    request::{Class, Request},
    roster::Roster,
    scheduler::Limits,
    sequence::{Sequence, Vocabulary},
    stats::Stats,
    stepper::Stepper,
};
use crate::{
    kernels::batch::StepBatch,
    kv::block_pool::BlockCopy,
    memory::Memory,
    report::{StepRecord, Timeline},
    sampling::params::SamplingParams,
    text::detokenize::TokenBytes,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

const VOCAB: usize = 16;
/// In a prompt: what is sampled behind it ends an answer.
const LAST: u32 = 10;
const END: u32 = 12;
/// The step that reads it gives a row too few.
const SHORT: u32 = 11;
/// It panics, fails, or gives no numbers.
const PANIC: u32 = 13;
const ERROR: u32 = 14;
const NAN: u32 = 15;

/// Answers every token with the next one, 1..=9 in a circle, and remembers what it was shown in its pool: an answer is
/// right only if every earlier token of the sequence is still there.
struct Fake {
    /// slot → token
    pool: Vec<u32>,
    resets: Arc<AtomicU32>,
    /// Fail this many resets.
    bad_resets: u32,
    /// What is next to the likeliest in a bad row.
    bad_logit: f32,
    /// Every step waits for one; all may go when the other end is gone.
    permits: Receiver<()>,
    /// Told when a step begins to wait.
    entered: Sender<()>,
}

impl Forward for Fake {
    fn forward(&mut self, batch: StepBatch) -> Result<Vec<f32>, String> {
        let _ = self.entered.send(());
        let _ = self.permits.recv();
        for (t, &id) in batch.ids.iter().enumerate() {
            match id {
                PANIC => panic!("told to"),
                ERROR => return Err("told to".to_owned()),
                _ => self.pool[batch.slot[t] as usize] = id,
            }
        }
        let mut logits = Vec::new();
        for &row in &batch.sel {
            let row = row as usize;
            for at in 0..batch.pos[row] {
                let slot = batch.table_of(row)[at as usize / 32] * 32 + at % 32;
                assert_ne!(self.pool[slot as usize], 0, "a token's keys are missing");
            }
            let next = if batch.ids[row] == LAST { END } else { batch.ids[row] % 9 + 1 };
            let fill = if batch.ids[row] == NAN { self.bad_logit } else { 0.0 };
            let likeliest = if fill == f32::NEG_INFINITY { fill } else { 1.0 };
            logits.extend((0..VOCAB as u32).map(|id| if id == next { likeliest } else { fill }));
        }
        if batch.ids.contains(&SHORT) {
            logits.truncate(logits.len() - VOCAB);
        }
        Ok(logits)
    }

    fn copy(&mut self, copies: &[BlockCopy]) -> Result<(), String> {
        for copy in copies {
            let from = copy.from as usize * 32;
            self.pool.copy_within(from..from + 32, copy.to as usize * 32);
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), String> {
        self.resets.fetch_add(1, Ordering::SeqCst);
        self.pool.fill(0);
        if self.bad_resets > 0 {
            self.bad_resets -= 1;
            return Err("not now".to_owned());
        }
        Ok(())
    }

    fn vocab(&self) -> usize {
        VOCAB
    }
}

struct Bench {
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
    stats: Arc<Stats>,
    resets: Arc<AtomicU32>,
    entered: Receiver<()>,
}

impl Bench {
    fn new(limits: Limits) -> Bench {
        Bench::with_permits(limits, 0).0
    }

    fn with_permits(limits: Limits, bad_resets: u32) -> (Bench, Sender<()>) {
        Bench::with_faults(limits, bad_resets, f32::NAN)
    }

    /// The engine takes one step for each permit, and as it likes when the sender is dropped.
    fn with_faults(limits: Limits, bad_resets: u32, bad_logit: f32) -> (Bench, Sender<()>) {
        let (gate, permits) = channel();
        gate.send(()).expect("for the warm-up");
        let resets = Arc::new(AtomicU32::new(0));
        let (enter, entered) = channel();
        let fake = Fake {
            pool: vec![0; 64 * 32],
            resets: Arc::clone(&resets),
            bad_resets,
            bad_logit,
            permits,
            entered: enter,
        };
        let resident = Roster::new(0).admit(Stats::new("fake", 64, Memory::default())).expect("room");
        let stats = Arc::clone(&resident.stats);
        let letters = (0..VOCAB as u8).map(|id| vec![b'a' + id]);
        let vocabulary = Vocabulary { bytes: Arc::new(TokenBytes::new(letters)), end: vec![END] };
        let stepper = Box::new(Stepper::new(Box::new(fake), limits, vocabulary, Arc::clone(&stats)));
        let (commands, thread) = super::start(1, None).expect("a thread");
        let (ready, answer) = channel();
        commands.send(Command::Add { id: 0, stepper, resident, ready }).expect("the engine runs");
        assert_eq!(answer.recv(), Ok(Ok(())));
        entered.recv().expect("the warm-up");
        (Bench { commands, thread: Some(thread), stats, resets, entered }, gate)
    }

    fn submit(&self, prompt: &[u32], max_tokens: u32) -> Generation {
        self.submit_many(prompt, max_tokens, 1).remove(0)
    }

    fn submit_many(&self, prompt: &[u32], max_tokens: u32, n: u32) -> Vec<Generation> {
        self.submit_choices(&vec![request(prompt, max_tokens); n as usize], None)
    }

    /// Choices of one prompt; Some: whose tokens from here on are scored.
    fn submit_choices(&self, requests: &[Request], scored_from: Option<usize>) -> Vec<Generation> {
        assert!(self.stats.enter_queue(0, requests.len() as u32, Most::halves(200)).is_some());
        let submitted = Instant::now();
        let choice = |request: &Request| {
            let (sequence, events) = Sequence::new(request.clone(), submitted);
            let flags = Arc::clone(&sequence.flags);
            let prompt_tokens = request.prompt.len() as u32;
            let sequence = scored_from.into_iter().fold(sequence, |sequence, from| sequence.scoring(from, 1, 1));
            (sequence, Generation { events, flags, submitted, prompt_tokens, ended: false })
        };
        let (choices, generations) = requests.iter().map(choice).unzip();
        self.commands.send(Command::Submit { id: 0, choices }).expect("the engine runs");
        generations
    }

    fn assert_nothing_leaked(&self) {
        let report = self.stats.report();
        assert_eq!((report.running, report.waiting, report.kv_blocks_used), (0, 0, 0));
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn request(prompt: &[u32], max_tokens: u32) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        params: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        stop: Vec::new(),
        ignore_eos: false,
        tenant: 0,
        class: Class::Interactive,
        salt: [0; 16],
        deadline: None,
    }
}

async fn collect(mut generation: Generation) -> (String, Result<FinishReason, Failure>, Timeline) {
    let mut text = String::new();
    loop {
        match generation.next().await.expect("an ending") {
            Event::Text { text: piece, .. } => text += &piece,
            Event::Finished { reason, timeline, .. } => return (text, Ok(reason), timeline),
            Event::Failed { failure, timeline } => return (text, Err(failure), timeline),
        }
    }
}

fn limits(step_tokens: usize, prefill_chunk: usize) -> Limits {
    let itl_target = Duration::from_secs(1);
    Limits { step_tokens, prefill_chunk, running_max: 8, block_tokens: 32, itl_target, preempt_always: false }
}

/// What the fake answers after a prompt that ends in token 1.
fn circle(count: usize) -> String {
    (0..count).map(|n| char::from(b'a' + 1 + ((n + 1) % 9) as u8)).collect()
}

#[tokio::test]
async fn a_panic_fails_the_requests_of_its_step_and_nobody_elses() {
    for (bad, bad_resets) in [(PANIC, 0), (ERROR, 0), (PANIC, 1)] {
        let (bench, gate) = Bench::with_permits(limits(100, 4), bad_resets);
        let beside = bench.submit(&[2, 1], 500);
        let guilty = bench.submit(&[3, 3, 3, 3, bad, 1], 5);
        drop(gate);
        let (_, guilty, timeline) = collect(guilty).await;
        let Err(Failure::Step(why)) = guilty else { panic!("{guilty:?}") };
        assert!(why.contains("told to"), "{why}");
        assert_eq!((timeline.output_tokens, timeline.prefill_chunks), (0, 1));
        let (text, beside, _) = collect(beside).await;
        assert!(matches!(beside, Err(Failure::Step(_))), "{beside:?}");
        assert!(circle(3).starts_with(&text), "{text}");

        // Later ones are none the worse.
        assert_eq!(collect(bench.submit(&[4, 1], 50)).await.0, circle(50));
        assert_eq!(bench.resets.load(Ordering::SeqCst), 1 + bad_resets);
        assert_eq!(bench.stats.report().failures, 2);
        bench.assert_nothing_leaked();
    }
}

/// A half-read prompt that had no place in the bad step is read again from its beginning, and answered.
#[tokio::test]
async fn a_sequence_that_sat_the_bad_step_out_goes_on() {
    let (bench, gate) = Bench::with_permits(limits(10, 8), 0);
    let entered = || bench.entered.recv().expect("the engine runs");
    let first = bench.submit(&[1], 1);
    entered();
    // They come in while the engine is in its first step, and share the second: eight tokens, one and one.
    let guilty = bench.submit(&[[3; 14].as_slice(), &[PANIC, 1]].concat(), 5);
    let decoding = bench.submit_many(&[2], 100, 2);
    let waiting = bench.submit(&[[5; 31].as_slice(), &[1]].concat(), 20);
    gate.send(()).expect("the engine runs");
    assert_eq!(collect(first).await.0, circle(1));
    // Two choices decode, so the third step has no room for the waiting one.
    entered();
    drop(gate);
    assert!(matches!(collect(guilty).await.1, Err(Failure::Step(_))));
    for choice in decoding {
        assert!(matches!(collect(choice).await.1, Err(Failure::Step(_))));
    }
    let (text, ending, timeline) = collect(waiting).await;
    assert_eq!((text, ending), (circle(20), Ok(FinishReason::Length)));
    // One token before, all 32 in four chunks after.
    assert_eq!((timeline.prefill_chunks, timeline.output_tokens), (5, 20));
    bench.assert_nothing_leaked();
}

#[tokio::test]
async fn logits_that_are_no_numbers_fail_their_own_request_only() {
    let bench = Bench::new(limits(100, 100));
    let beside = bench.submit(&[2, 1], 500);
    let (_, broken, timeline) = collect(bench.submit(&[1, NAN], 5)).await;
    assert_eq!((broken, timeline.output_tokens), (Err(Failure::NotFinite), 0));
    assert_eq!(collect(beside).await.0, circle(500));
    bench.assert_nothing_leaked();
}

#[tokio::test]
async fn the_end_token_ends_an_answer_and_is_counted() {
    let bench = Bench::new(limits(100, 100));
    let (text, ending, timeline) = collect(bench.submit(&[1, LAST], 3)).await;
    assert_eq!((text.as_str(), ending, timeline.output_tokens), ("", Ok(FinishReason::Stop), 1));
}

/// The first choice finds no token that it may take, the others do.
#[tokio::test]
async fn a_choice_that_fails_at_its_first_token_takes_no_other_with_it() {
    let bench = Bench::new(limits(100, 100));
    let mut choices = vec![request(&[2, 1], 20); 3];
    choices[0].params.logit_bias = (0..VOCAB as u32).map(|id| (id, f32::NEG_INFINITY)).collect();
    let mut generations = bench.submit_choices(&choices, None).into_iter();
    assert_eq!(collect(generations.next().expect("three")).await.1, Err(Failure::NotFinite));
    for generation in generations {
        assert_eq!(collect(generation).await.0, circle(20));
    }
    bench.assert_nothing_leaked();
}

/// The step ends after their first tokens were chosen and before anybody was told.
#[tokio::test]
async fn choices_that_began_in_a_bad_step_fail_with_it_and_miss_no_text() {
    let (bench, gate) = Bench::with_permits(limits(100, 100), 0);
    let first = bench.submit(&[1], 1);
    bench.entered.recv().expect("the engine runs");
    let choices = bench.submit_many(&[2, 1], 20, 3);
    let guilty = bench.submit(&[SHORT, 1], 20);
    drop(gate);
    assert_eq!(collect(first).await.0, circle(1));
    for generation in choices.into_iter().chain([guilty]) {
        let (text, ending, timeline) = collect(generation).await;
        assert!(matches!(ending, Err(Failure::Step(_))), "{ending:?} after {text:?}");
        assert_eq!((text.as_str(), timeline.first_token), ("", None));
    }
    assert_eq!(bench.stats.report().failures, 4);
    bench.assert_nothing_leaked();
}

#[tokio::test]
async fn a_score_of_what_is_no_number_is_a_failure() {
    for bad_logit in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let (bench, gate) = Bench::with_faults(limits(100, 100), 0, bad_logit);
        drop(gate);
        let good = bench.submit_choices(&[request(&[3, 4, 5], 1)], Some(2)).remove(0);
        assert_eq!(collect(good).await.1, Ok(FinishReason::Stop));
        let bad = bench.submit_choices(&[request(&[3, NAN, 5], 1)], Some(2)).remove(0);
        assert_eq!(collect(bad).await.1, Err(Failure::NotFinite), "{bad_logit}");
        bench.assert_nothing_leaked();
    }
}

/// Choices without a place of their own at first compute the prompt a second time.
#[tokio::test]
async fn what_a_choice_computes_again_is_no_prompt() {
    let bench = Bench::new(Limits { running_max: 1, ..limits(100, 100) });
    for generation in bench.submit_many(&[&[3; 40][..], &[1]].concat(), 5, 3) {
        assert_eq!(collect(generation).await.0, circle(5));
    }
    let records = bench.stats.records();
    let sum = |of: fn(&StepRecord) -> u32| records.iter().map(of).sum::<u32>();
    assert_eq!(sum(|record| record.prefill_tokens), 41);
    // A block of it is found.
    assert_eq!(sum(|record| record.recomputed_tokens), 2 * (41 - 32));
}

/// Nobody reads, and everybody else is served all the same.
#[tokio::test]
async fn receivers_that_never_read_cost_nobody_anything() {
    let bench = Bench::new(limits(100, 100));
    let unread: Vec<Generation> = (0..7).map(|_| bench.submit(&[1], 250)).collect();
    assert_eq!(collect(bench.submit(&[1], 250)).await.0, circle(250));
    for generation in unread {
        assert_eq!(collect(generation).await.0, circle(250));
    }
    let mut closed: Vec<Generation> = (0..7).map(|_| bench.submit(&[1], 250)).collect();
    closed.iter_mut().for_each(|generation| generation.events.close());
    assert_eq!(collect(bench.submit(&[1], 250)).await.0, circle(250));
    bench.assert_nothing_leaked();
}

#[tokio::test]
async fn an_engine_that_is_gone_still_gives_an_ending() {
    let bench = Bench::new(limits(100, 100));
    let mut generation = bench.submit(&[1], 5);
    // As if the engine's thread had vanished with its end of the channel.
    let (_, empty) = tokio::sync::mpsc::channel(1);
    generation.events = empty;
    let (_, ending, timeline) = collect(generation).await;
    assert_eq!((ending, timeline.prompt_tokens), (Err(Failure::EngineStopped), 1));
}
