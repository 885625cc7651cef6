//! Lines that are long, and whoever waits in one asks for nothing until they are called.

use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::task::{Context, Poll, Waker};

use super::super::core::State;
use super::super::core::rule::{Rule, Subjects};
use super::super::rules::{Bound, Defaults};
use super::*;

/// A store that is full, and counts how often it was asked.
#[derive(Default)]
struct Full(AtomicU64);

#[async_trait::async_trait]
impl Counts for Full {
    fn peek(&self, _asks: &[Ask]) -> Result<(), Denied> {
        Ok(())
    }
    async fn reserve(&self, asks: &[Ask]) -> Result<Box<dyn Grant>, Denied> {
        self.0.fetch_add(1, Ordering::Relaxed);
        // Soon there is room, for whoever is first then.
        Err(Denied {
            ask: 0,
            short: Some(Short { state: self.state(&asks[0]), wait: Wait::For(Duration::from_millis(100)) }),
        })
    }
    fn state(&self, ask: &Ask) -> State {
        State { limit: ask.limit, used: ask.limit, held: 0, remaining: 0, reset: Duration::from_secs(60) }
    }
}

fn ask(wait: Duration) -> Vec<Ask> {
    let rule = Arc::new(Rule { wait, by: Vec::new(), ..Defaults::default().per_day().as_ref().clone() });
    let bound = Bound { rule, limit: 1 };
    vec![bound.ask(&Subjects::default(), 1, Duration::ZERO, 0, 0)]
}

type Taking<'q> = Pin<Box<dyn Future<Output = Result<(Box<dyn Grant>, Option<Duration>), Refused>> + 'q>>;

fn poll(taking: &mut Taking<'_>) -> Option<Result<Option<Duration>, Refused>> {
    match taking.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(taken) => Some(taken.map(|(_, waited)| waited)),
        Poll::Pending => None,
    }
}

#[tokio::test(start_paused = true)]
async fn only_who_is_next_asks_again_and_only_when_there_may_be_room() {
    let (queue, full, asks) = (Queue::default(), Full::default(), ask(Duration::from_secs(2)));
    let waiting = ["a", "b", "c"].map(|key| queue.take(&full, &asks, key));
    let [one, two, three] = waiting;
    let (one, two, three) = tokio::join!(one, two, three);
    for taken in [one, two, three] {
        let Err(refused) = taken else { panic!("there is never room") };
        assert_eq!(refused.waited, Some(Duration::from_secs(2)));
    }
    // The first asks when it comes; whoever is next asks every 100 ms of 2 s; each asks once more when its time is over.
    let asked = full.0.load(Ordering::Relaxed);
    assert!((20..=30).contains(&asked), "{asked}");
}

#[tokio::test(start_paused = true)]
async fn a_line_that_is_full_is_no_way_past_those_who_wait_in_it() {
    let (queue, full, asks) = (Queue::default(), Full::default(), ask(Duration::from_secs(2)));
    let mut taking: Vec<Taking<'_>> = Vec::new();
    let mut come = |key: &'static str| {
        let mut one: Taking<'_> = Box::pin(queue.take(&full, &asks, key));
        let said = poll(&mut one);
        taking.push(one);
        said
    };
    for key in ["a", "b"] {
        assert!((0..500).all(|_| come(key).is_none()), "500 of a key may wait");
    }
    let before = full.0.load(Ordering::Relaxed);
    for key in ["a", "c"] {
        let refused = come(key).expect("is told at once").expect_err("there is no place");
        assert_eq!(
            (refused.waited, refused.denied.short.map(|short| short.wait)),
            (None, Some(Wait::ForOthers)),
            "{key}"
        );
    }
    assert_eq!(full.0.load(Ordering::Relaxed), before, "and asked for no room that others wait for");
}
