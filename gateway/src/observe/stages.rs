//! A record → where its time went: one row a stage, in the order of the path. `glassgate trace` prints it, spans carry it.

use std::time::Duration;

use serde::Serialize;

use crate::answer::EngineTimes;
use crate::exchange::{Attempt, EMBEDDED, Record};

/// A stretch of a request, as time since it began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stage {
    pub name: &'static str,
    #[serde(rename = "start_ns", serialize_with = "nanos")]
    pub began: Duration,
    #[serde(rename = "end_ns", serialize_with = "nanos")]
    pub ended: Duration,
    /// What a reader wants to know beside it; mostly nothing.
    pub detail: String,
}

fn nanos<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

impl Stage {
    fn new(name: &'static str, began: Duration, ended: Duration) -> Stage {
        Stage { name, began, ended: ended.max(began), detail: String::new() }
    }
}

/// Every stage that the request reached and left.
pub fn stages(record: &Record) -> Vec<Stage> {
    let mut stages = before(record);
    stages.extend(attempts(record));
    stages.extend(
        phases(record)
            .map(|phase| Stage { detail: remark(record, phase), ..Stage::new(phase.name, phase.began, phase.ended) }),
    );
    stages.extend(after(record));
    stages
}

/// What we do until somebody is asked for an answer: each stage begins where the one before it ended.
pub fn before(record: &Record) -> Vec<Stage> {
    let marks = &record.marks;
    let mut began = Duration::ZERO;
    let mut stages = Vec::new();
    for (name, left) in [
        ("auth", marks.identified),
        ("door", marks.knocked),
        ("body", marks.body_read),
        ("route", marks.routed),
        ("measure", marks.measured),
        ("admit", marks.admitted),
        ("cache", marks.looked_up),
    ] {
        if let Some(left) = left {
            stages.push(Stage::new(name, began, left));
            began = left;
        }
    }
    stages
}

/// What of its time the gateway itself took, by phase, and in `total`. A phase that is mostly waiting is none of them: the
/// body comes as fast as the client sends it, and a relay writes as fast as a model produces and the client reads.
pub fn overhead(record: &Record) -> impl Iterator<Item = (&'static str, Duration)> + use<> {
    let settle =
        record.marks.settling.zip(record.marks.settled).map(|(began, ended)| Stage::new("settle", began, ended));
    let stages = before(record).into_iter().filter(|stage| stage.name != "body").chain(settle);
    let waited = record.cache_waited;
    let mut phases: Vec<(&'static str, Duration)> = stages
        .map(|stage| (stage.name, stage.ended - stage.began))
        .map(|(name, took)| (name, if name == "cache" { took.saturating_sub(waited) } else { took }))
        .collect();
    if !phases.is_empty() {
        phases.push(("total", phases.iter().map(|(_, took)| *took).sum()));
    }
    phases.into_iter()
}

/// How far a request had come whose client left.
pub fn abandoned_in(record: &Record) -> &'static str {
    let is_elsewhere = record.attempts.last().is_some_and(|attempt| attempt.provider != EMBEDDED);
    if record.first_token().is_some() {
        "stream"
    } else if is_elsewhere || record.engine.is_some_and(|engine| engine.steps > 0) {
        "prefill"
    } else {
        "queue"
    }
}

/// What we do with the answer. A stream is settled while it is relayed, a whole answer before.
pub fn after(record: &Record) -> Vec<Stage> {
    let marks = &record.marks;
    let relay = marks.sent.map(|sent| Stage::new("relay", sent, marks.closed));
    let settle = marks.settling.zip(marks.settled).map(|(began, ended)| Stage::new("settle", began, ended));
    relay.into_iter().chain(settle).collect()
}

/// All attempts together, then each of them where there are records of them.
fn attempts(record: &Record) -> Vec<Stage> {
    let marks = &record.marks;
    let asked = !record.attempts.is_empty() || engine(record).is_some();
    let Some(dispatched) = dispatched(record).filter(|_| asked) else { return Vec::new() };
    let ended = record.attempts.iter().map(|attempt| attempt.ended).max();
    let ended = ended.or(marks.settling).unwrap_or(marks.closed);
    let mut stages = vec![Stage::new("attempts", dispatched, ended)];
    stages.extend(
        record
            .attempts
            .iter()
            .map(|attempt| Stage { detail: describe(attempt), ..Stage::new("attempt", attempt.began, attempt.ended) }),
    );
    stages
}

fn describe(attempt: &Attempt) -> String {
    let Attempt { number, role, model, provider, outcome, error_type, .. } = attempt;
    let status = attempt.status.map(|status| format!(" {status}")).unwrap_or_default();
    let why = if error_type.is_empty() { String::new() } else { format!(" ({error_type})") };
    format!("{number} {role} {model} at {provider}: {outcome}{status}{why}")
}

/// A phase of the engine, as it timed it.
#[derive(Clone, Copy, Debug)]
pub struct Phase {
    pub number: u8,
    pub name: &'static str,
    pub began: Duration,
    pub ended: Duration,
}

/// What explains how long a phase took.
fn remark(record: &Record, phase: Phase) -> String {
    let engine = record.engine.unwrap_or_default();
    match phase.name {
        "prefill" if engine.cached_tokens > 0 => {
            format!("{} of {} prompt tokens were cached", engine.cached_tokens, record.usage().prompt())
        }
        "decode" if engine.preemptions > 0 => format!("gave way to others {} times", engine.preemptions),
        _ => String::new(),
    }
}

/// Queue, prefill and decode, as far as it came.
pub fn phases(record: &Record) -> impl Iterator<Item = Phase> + use<> {
    let engine = engine(record);
    let embedded = record.attempts.iter().rev().find(|attempt| attempt.provider == EMBEDDED);
    let mut began = embedded.map(|attempt| attempt.began).or_else(|| dispatched(record)).unwrap_or_default();
    let times = engine.map_or([None; 3], |engine| [Some(engine.queue), engine.prefill, engine.decode]);
    (0..).zip(["queue", "prefill", "decode"]).zip(times).filter_map(move |((number, name), took)| {
        let phase = Phase { number, name, began, ended: began + took? };
        began = phase.ended;
        Some(phase)
    })
}

/// The engine's clock, if it was asked at all.
pub fn engine(record: &Record) -> Option<EngineTimes> {
    record.engine.filter(|engine| *engine != EngineTimes::default())
}

fn dispatched(record: &Record) -> Option<Duration> {
    record.marks.looked_up.or(record.marks.admitted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::Exchange;

    #[test]
    fn who_waits_for_a_body_a_model_or_another_s_answer_is_not_held_up_by_us() {
        let exchange = Exchange::for_tests();
        let mut record = exchange.record().unwrap().clone();
        assert_eq!(overhead(&record).count(), 0, "who proved nothing has reached no stage");
        let at = |micros| Some(Duration::from_micros(micros));
        record.marks.identified = at(10);
        record.marks.knocked = at(15);
        record.marks.body_read = at(5_000_015);
        record.marks.routed = at(5_000_035);
        record.marks.measured = at(5_000_135);
        record.marks.admitted = at(5_000_185);
        record.marks.looked_up = at(7_000_186);
        record.cache_waited = Duration::from_secs(2);
        record.marks.sent = at(9_000_000);
        record.marks.settling = at(9_500_000);
        record.marks.settled = at(9_500_030);
        record.marks.closed = Duration::from_secs(10);
        let found: Vec<(&str, u128)> = overhead(&record).map(|(phase, took)| (phase, took.as_micros())).collect();
        let expected = [
            ("auth", 10),
            ("door", 5),
            ("route", 20),
            ("measure", 100),
            ("admit", 50),
            ("cache", 1),
            ("settle", 30),
            ("total", 216),
        ];
        assert_eq!(found, expected);
    }
}
