//! What the script is asked and what it answers, in its own units: whole numbers, and times in milliseconds.

use std::time::Duration;

use redis::{Cmd, Value};

use crate::admission::core::rule::{Mode, Rule, Subject};
use crate::admission::core::{Short, State, Wait};
use crate::admission::counts::Ask;
use crate::api::limit::Per;

pub const SOURCE: &str = concat!(include_str!("counters.lua"), "\n", include_str!("script.lua"));
/// Numbers of an answer for each counter that was taken from.
const GOT_FIELDS: usize = 5;
const MS: i64 = 1_000_000;

/// What a request, or a gateway ahead of its requests, wants of one counter.
#[derive(Clone, Debug)]
pub struct Want {
    pub key: String,
    pub ask: Ask,
    /// It takes what there is, up to the most; with less than the least, nothing.
    pub least: u64,
    pub most: u64,
    /// What this gateway has used in the ask's day or month, and has told.
    pub books: u64,
    /// What it has on lease, if it takes ahead.
    pub leased: Option<u64>,
}

/// What was taken, and how the counter then stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Got {
    pub amount: u64,
    pub state: State,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Taken(Vec<Got>),
    /// Which of the wants had no room. Nothing was taken.
    Short(usize, Short),
}

/// How a grant ends: what was used under each of its counters.
#[derive(Clone, Debug)]
pub struct Settled {
    pub grant: String,
    pub parts: Vec<u64>,
}

/// A counter's name among all that are shared. What counts something else than a rule of its name did begins anew.
pub fn key(rule: &Rule, subject: Subject) -> String {
    let what = format!("{:?} {:?} {:?} {} {:?}", rule.of, rule.per, rule.by, rule.exact, rule.zone.iana_name());
    let what = blake3::hash(what.as_bytes()).to_hex();
    let subject = subject.0.map(|byte| format!("{byte:02x}")).concat();
    format!("{{gg}}c:{}:{}:{subject}", rule.name, &what[..8])
}

/// The window of what refills, as the script wants it.
pub fn window_ms(per: Per) -> i64 {
    if per == Per::Second { 1_000 } else { 60_000 }
}

impl Want {
    pub fn add_to(&self, command: &mut Cmd) {
        let Ask { rule, limit, at, .. } = &self.ask;
        let (kind, from, to) = match rule.per {
            None => ("s", 0, 0),
            Some(Per::Day | Per::Month) => ("c", at.period.start_ns / MS, at.period.end_ns / MS),
            Some(per) => (if rule.exact { "x" } else { "b" }, window_ms(per), 0),
        };
        command.arg(kind).arg(*limit).arg(from).arg(to).arg(at.period.now_ns / MS).arg(self.least).arg(self.most);
        command.arg(u8::from(rule.mode == Mode::Soft)).arg(self.books);
        match self.leased {
            Some(leased) => command.arg(leased),
            None => command.arg(""),
        };
    }
}

impl Settled {
    pub fn add_to(&self, command: &mut Cmd) {
        command.arg(&self.grant).arg(self.parts.len()).arg(&self.parts);
    }
}

/// The numbers of an answer whose first says that it is one.
///
/// # Errors
/// What it is instead.
pub fn numbers(value: Value) -> Result<Vec<i64>, String> {
    let Value::Array(values) = value else { return Err(format!("not a list but {value:?}")) };
    let number =
        |value| if let Value::Int(number) = value { Ok(number) } else { Err(format!("not a number: {value:?}")) };
    let numbers = values.into_iter().map(number).collect::<Result<Vec<i64>, String>>()?;
    match numbers.first() {
        Some(0 | 1) => Ok(numbers),
        Some(-1) => Err("another gateway goes by the name of this one, or a later connection of it; each needs a data folder of its own".into()),
        _ => Err(format!("no answer of ours: {numbers:?}")),
    }
}

/// # Errors
/// When it is no answer to these wants.
pub fn reply(numbers: &[i64], wants: &[Want]) -> Result<Reply, String> {
    let strange = || format!("no answer to {} wants: {numbers:?}", wants.len());
    match numbers {
        [1, _now, got @ ..] if got.len() == GOT_FIELDS * wants.len() => {
            let got = got.chunks_exact(GOT_FIELDS).zip(wants);
            Ok(Reply::Taken(
                got.map(|(got, want)| Got { amount: amount(got[0]), state: state(want, &got[1..]) }).collect(),
            ))
        }
        [0, _now, at, counted @ .., wait] if counted.len() == GOT_FIELDS - 1 => {
            let at = usize::try_from(*at).map_err(|_| strange())?;
            let want = wants.get(at).ok_or_else(strange)?;
            let wait = match *wait {
                -1 => Wait::Never,
                -2 => Wait::ForOthers,
                ms => Wait::For(Duration::from_millis(amount(ms))),
            };
            Ok(Reply::Short(at, Short { state: state(want, counted), wait }))
        }
        _ => Err(strange()),
    }
}

fn state(want: &Want, counted: &[i64]) -> State {
    let at = |field: usize| counted.get(field).copied().map_or(0, amount);
    State { limit: want.ask.limit, used: at(0), held: at(1), remaining: at(2), reset: Duration::from_millis(at(3)) }
}

fn amount(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
