//! What the demo does and when: a deck of acts, dealt from a seed. The same seed is the same plan.

use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;

/// The evaluation's prompts, each with the only right answer.
const EVALUATION: &str = include_str!("../../../../models/eval.jsonl");

/// How often each act is in the deck: about what a service sees, with every kind of trouble in it.
const DECK: [(Kind, usize); 5] =
    [(Kind::Ask, 28), (Kind::Repeat, 6), (Kind::Crowd, 1), (Kind::Leave, 2), (Kind::Misstep, 3)];
/// Repeats are of the last so many questions.
const RECENT: usize = 8;

/// A question with its answer.
#[derive(Deserialize)]
pub struct Case {
    pub messages: Box<RawValue>,
    pub answer: String,
}

/// # Errors
/// When the evaluation that this program was built with is not one prompt a line.
pub fn cases() -> Result<Vec<Case>, String> {
    EVALUATION
        .lines()
        .map(|line| serde_json::from_str(line).map_err(|error| format!("the evaluation: {error}")))
        .collect()
}

#[derive(Clone, Copy)]
enum Kind {
    Ask,
    Repeat,
    Crowd,
    Leave,
    Misstep,
}

/// Something that a client should not do, or may not; each has one right refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misstep {
    NoKey,
    UnknownRoute,
    BrokenBody,
    /// With a key that may ask once a minute.
    TooOften,
    /// With a key that may spend nearly nothing.
    Unaffordable,
}

/// A question of one of the callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    pub case: usize,
    pub caller: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Ask {
        question: Question,
        stream: bool,
    },
    /// Three at once ask the same.
    Crowd(Question),
    /// Reads the beginning of a long stream and hangs up.
    Leave(Question),
    Misstep(Misstep, Question),
}

/// One arrival.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// After the one before it.
    pub after: Duration,
    pub act: Act,
}

/// Arrivals without end.
pub struct Plan {
    random: Random,
    per_second: f64,
    callers: usize,
    missteps: Vec<Misstep>,
    /// The cases in this seed's order, and how many were asked.
    order: Vec<usize>,
    asked: usize,
    misstepped: usize,
    deck: Vec<Kind>,
    recent: Vec<Question>,
}

impl Plan {
    /// Arrivals at `per_second` on average, of so many callers, about so many cases.
    pub fn new(seed: u64, per_second: f64, callers: usize, cases: usize, missteps: Vec<Misstep>) -> Plan {
        let mut random = Random(seed);
        let mut order: Vec<usize> = (0..cases).collect();
        random.shuffle(&mut order);
        Plan {
            random,
            per_second,
            callers,
            missteps,
            order,
            asked: 0,
            misstepped: 0,
            deck: Vec::new(),
            recent: Vec::new(),
        }
    }

    fn question(&mut self) -> Question {
        let case = self.order[self.asked % self.order.len()];
        self.asked += 1;
        // The first has half of the traffic, the next half of the rest, …
        let skewed = (self.random.next().leading_zeros() as usize).min(self.callers - 1);
        Question { case, caller: skewed }
    }

    fn act(&mut self) -> Act {
        if self.deck.is_empty() {
            self.deck = DECK.iter().flat_map(|(kind, count)| std::iter::repeat_n(*kind, *count)).collect();
            self.random.shuffle(&mut self.deck);
        }
        let stream = self.random.below(2) == 0;
        match self.deck.pop() {
            Some(Kind::Repeat) if !self.recent.is_empty() => {
                let question = self.recent[self.random.below(self.recent.len())];
                Act::Ask { question, stream }
            }
            Some(Kind::Crowd) => Act::Crowd(self.question()),
            Some(Kind::Leave) => Act::Leave(self.question()),
            Some(Kind::Misstep) => {
                let misstep = self.missteps[self.misstepped % self.missteps.len()];
                self.misstepped += 1;
                Act::Misstep(misstep, self.question())
            }
            Some(Kind::Ask | Kind::Repeat) | None => {
                let question = self.question();
                if self.recent.len() == RECENT {
                    self.recent.remove(0);
                }
                self.recent.push(question);
                Act::Ask { question, stream }
            }
        }
    }
}

impl Iterator for Plan {
    type Item = Step;

    /// Arrivals are independent of each other and of answers, so the gaps are exponential.
    fn next(&mut self) -> Option<Step> {
        let gap = -(1.0 - self.random.share()).ln() / self.per_second;
        Some(Step { after: Duration::from_secs_f64(gap), act: self.act() })
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, and good enough to deal cards.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to below 1.
    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.share() * bound as f64) as usize
    }

    fn shuffle<T>(&mut self, cards: &mut [T]) {
        for last in (1..cards.len()).rev() {
            let other = self.below(last + 1);
            cards.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(seed: u64) -> Vec<Step> {
        let missteps = vec![Misstep::NoKey, Misstep::UnknownRoute, Misstep::BrokenBody];
        Plan::new(seed, 10.0, 3, cases().unwrap().len(), missteps).take(2_000).collect()
    }

    #[test]
    fn the_same_seed_is_the_same_plan() {
        assert_eq!(plan(7), plan(7));
        assert_ne!(plan(7), plan(8));
    }

    #[test]
    fn everything_that_a_service_sees_is_in_it_at_the_rate_that_was_asked_for() {
        let steps = plan(1);
        let seconds: f64 = steps.iter().map(|step| step.after.as_secs_f64()).sum();
        assert!((180.0..220.0).contains(&seconds), "2,000 arrivals at 10 a second took {seconds} s");
        let share = |is: fn(&Act) -> bool| steps.iter().filter(|step| is(&step.act)).count();
        assert!(share(|act| matches!(act, Act::Ask { stream: true, .. })) > 700);
        assert!(share(|act| matches!(act, Act::Ask { stream: false, .. })) > 700);
        assert_eq!(share(|act| matches!(act, Act::Crowd(_))), 50);
        assert_eq!(share(|act| matches!(act, Act::Leave(_))), 100);
        assert_eq!(share(|act| matches!(act, Act::Misstep(Misstep::BrokenBody, _))), 50);
        let asks = steps.iter().filter_map(|step| match step.act {
            Act::Ask { question, .. } => Some(question.caller),
            _ => None,
        });
        let mut by_caller = [0; 3];
        asks.for_each(|caller| by_caller[caller] += 1);
        assert!(by_caller[0] > by_caller[1] && by_caller[1] > 300 && by_caller[2] > 300, "{by_caller:?}");
    }
}
