//! Several models in one engine: whose step is next.

use super::*;
use crate::report::Sink;
use std::sync::Mutex;

/// Whose steps were taken, in their order.
#[derive(Default)]
struct Turns(Mutex<Vec<usize>>);

impl Sink for Turns {
    fn step(&self, model: &str, _: &StepRecord) {
        self.0.lock().expect("sound").push(model.parse().expect("a number"));
    }
}

/// What one model is asked for.
struct Asked {
    model: usize,
    class: Class,
    tokens: u32,
}

/// The steps of two models, of which the second is asked while the first takes its first step.
async fn turns(first: Asked, second: Asked) -> Vec<usize> {
    let turns = Arc::new(Turns::default());
    let sink: Arc<dyn Sink> = turns.clone();
    let (commands, thread) = super::super::start(1, Some(sink)).expect("a thread");
    let roster = Roster::new(0);
    let (enter, entered) = channel();
    let mut models: Vec<(Arc<Stats>, Option<Sender<()>>)> = Vec::new();
    for id in 0..2 {
        let (gate, permits) = channel();
        gate.send(()).expect("for the warm-up");
        let resets = Arc::default();
        let entered = enter.clone();
        let fake = Fake { pool: vec![0; 64 * 32], resets, bad_resets: 0, bad_logit: 0.0, permits, entered };
        let resident = roster.admit(Stats::new(&id.to_string(), 64, Memory::default())).expect("room");
        let stats = Arc::clone(&resident.stats);
        let bytes = Arc::new(TokenBytes::new((0..VOCAB as u8).map(|id| vec![b'a' + id])));
        let vocabulary = Vocabulary { bytes, end: vec![END] };
        let stepper = Box::new(Stepper::new(Box::new(fake), limits(20, 16), vocabulary, Arc::clone(&stats)));
        let (ready, answer) = channel();
        commands.send(Command::Add { id, stepper, resident, ready }).expect("the engine runs");
        assert_eq!(answer.recv(), Ok(Ok(())));
        models.push((stats, Some(gate)));
    }
    entered.try_iter().for_each(drop);
    models[second.model].1 = None;
    let ask = |Asked { model, class, tokens }| {
        assert!(models[model].0.enter_queue(0, 1, Most::halves(200)).is_some());
        let (sequence, events) = Sequence::new(Request { class, ..request(&[1], tokens) }, Instant::now());
        let flags = Arc::clone(&sequence.flags);
        commands.send(Command::Submit { id: model as u64, choices: vec![sequence] }).expect("the engine runs");
        Generation { events, flags, submitted: Instant::now(), prompt_tokens: 1, ended: false }
    };
    let one = ask(first);
    entered.recv().expect("its first step");
    let other = ask(second);
    models.clear();
    for generation in [one, other] {
        assert_eq!(collect(generation).await.1, Ok(FinishReason::Length));
    }
    commands.send(Command::Stop).expect("the engine runs");
    thread.join().expect("the engine's thread");
    std::mem::take(&mut turns.0.lock().expect("sound"))
}

#[tokio::test]
async fn busy_models_take_a_step_each_in_turn() {
    let class = Class::Interactive;
    let steps = turns(Asked { model: 0, class, tokens: 20 }, Asked { model: 1, class, tokens: 10 }).await;
    assert_eq!(steps, [vec![0], [0, 1].repeat(10), vec![0; 9]].concat());
    // Also while only a batch waits at one of them.
    let class = Class::Batch;
    let steps = turns(Asked { model: 1, class, tokens: 10 }, Asked { model: 0, class, tokens: 20 }).await;
    assert_eq!(steps, [vec![1], [0, 1].repeat(9), vec![0; 11]].concat());
}

#[tokio::test]
async fn a_model_that_only_shadows_ask_steps_when_no_user_of_another_waits() {
    let (user, shadow) = (Class::Interactive, Class::Shadow);
    for (users, shadows) in [(0, 1), (1, 0)] {
        let asked = |model, class| Asked { model, class, tokens: 10 };
        let steps = turns(asked(users, user), asked(shadows, shadow)).await;
        assert_eq!(steps, [vec![users; 10], vec![shadows; 10]].concat());
        // One that is under way is finished, and then it waits.
        let steps = turns(asked(shadows, shadow), asked(users, user)).await;
        assert_eq!(steps, [vec![shadows], vec![users; 10], vec![shadows; 9]].concat());
    }
}
