//! Figures, not promises: run with `cargo nextest run -p glassgate-runtime --run-ignored only speed --no-capture`.

use crate::support::{chat, collect, greedy, serve};
use glassgate_runtime::{Request, SamplingParams, Settings, Sink, StepRecord};
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

#[derive(Default)]
struct Steps(Mutex<Vec<StepRecord>>);

impl Sink for Steps {
    fn step(&self, _: &str, step: &StepRecord) {
        self.0.lock().expect("not poisoned").push(*step);
    }
}

#[tokio::test]
#[ignore = "a measurement"]
async fn tokens_per_second() {
    for (sequences, threads) in [(1, 1), (8, 1), (32, 1), (1, 2), (8, 2), (32, 2)] {
        let steps = Arc::new(Steps::default());
        let settings = Settings { threads, sink: Some(steps.clone()), ..Settings::default() };
        let (_runtime, model) = serve(settings, "glimmer-2");
        let started = Instant::now();
        let generations: Vec<_> = (0..sequences)
            .map(|seed| {
                let params = SamplingParams { temperature: 1.0, top_p: 0.9, seed, ..SamplingParams::default() };
                let prompt = chat(&model, "Count down from 20 to 9").repeat(3);
                model.generate(Request { params, ..greedy(prompt, 400) }).expect("accepted")
            })
            .collect();
        let mut tokens = 0;
        for generation in generations {
            tokens += collect(generation).await.timeline.output_tokens;
        }
        let took = started.elapsed();
        let steps = steps.0.lock().expect("not poisoned");
        let full: Vec<&StepRecord> =
            steps.iter().filter(|step| step.decode_tokens as u64 >= sequences && step.prefill_tokens == 0).collect();
        let mean = |of: fn(&StepRecord) -> Duration| {
            full.iter().map(|step| of(step)).sum::<Duration>() / full.len().max(1) as u32
        };
        let rate = sequences as f64 / (mean(|s| s.gap + s.build + s.forward + s.sample + s.emit)).as_secs_f64();
        println!(
            "{sequences} sequences, {threads} threads: {tokens} tokens in {took:?} ({:.0}/s); full steps {rate:.0} tokens/s: gap {:?} build {:?} forward {:?} sample {:?} emit {:?}",
            f64::from(tokens) / took.as_secs_f64(),
            mean(|s| s.gap),
            mean(|s| s.build),
            mean(|s| s.forward),
            mean(|s| s.sample),
            mean(|s| s.emit),
        );
    }
}

#[tokio::test]
#[ignore = "a measurement"]
async fn prompt_tokens_per_second() {
    for threads in [1, 2] {
        let (_runtime, model) = serve(Settings { threads, ..Settings::default() }, "glimmer-2");
        let started = Instant::now();
        for _ in 0..5 {
            collect(model.generate(greedy(vec![300; 1000], 1)).expect("accepted")).await;
        }
        println!("prefill of 1000 tokens, {threads} threads: {:.0} tokens/s", 5000.0 / started.elapsed().as_secs_f64());
    }
}
