//! The script and the counters of `admission/core` are given the same histories, and decide the same.

use std::collections::HashMap;

use jiff::tz::TimeZone;
use redis::{Connection, cmd};

use super::redis_server::Redis;
use super::script::*;
use crate::admission::core::calendar::Period;
use crate::admission::core::rule::{Mode, Rule, Sharing, Subject};
use crate::admission::core::set::{self, Claim, Counter, Moment};
use crate::admission::core::{State, Taken, Wait};
use crate::admission::counts::Ask;
use crate::api::limit::{Of, Per};
use std::sync::Arc;
use std::time::Duration;

/// Histories of so many steps each. `make test-long` plays more.
const HISTORIES: u64 = 400;
const STEPS: usize = 40;
const GATEWAYS: u64 = 3;
const MS: i64 = 1_000_000;
const DAY_MS: i64 = 86_400_000;

/// Chance, the same again for a seed.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound.max(1)
    }
}

/// One counter on both sides.
struct Pair {
    rule: Arc<Rule>,
    limit: u64,
    core: Option<Counter>,
    /// What each gateway has used in each period.
    books: HashMap<(u64, i64), u64>,
    /// The periods that its calendar knows.
    known: Vec<i64>,
}

impl Pair {
    /// The period in which a request counts: a clock's mistake is one of the first that is known.
    fn counted_in(&self, start_ns: i64) -> i64 {
        self.known.first().map_or(start_ns, |first| start_ns.max(*first))
    }

    fn know(&mut self, start_ns: i64) {
        let start_ns = self.counted_in(start_ns);
        if let Err(at) = self.known.binary_search(&start_ns) {
            self.known.insert(at, start_ns);
            self.known.drain(..self.known.len().saturating_sub(3));
        }
    }
}

struct Open {
    gateway: u64,
    name: String,
    parts: Vec<(usize, Taken, i64)>,
}

/// The clock of the store: its own, or one that the test moves.
#[derive(Clone, Copy, PartialEq)]
enum Clock {
    Stores,
    Tests,
}

struct World {
    connection: Connection,
    clock: Clock,
    source: String,
    now_ms: i64,
    chance: Chance,
    pairs: Vec<Pair>,
    open: Vec<Open>,
    grants: u64,
}

fn rule(chance: &mut Chance, number: usize) -> Rule {
    let (of, per, exact, mode) = match chance.below(8) {
        0 => (Of::Concurrency, None, false, Mode::Hard),
        1 => (Of::Usd, Some(Per::Day), false, Mode::Hard),
        2 => (Of::Tokens, Some(Per::Day), false, Mode::Soft),
        3 => (Of::Tokens, Some(Per::Minute), true, Mode::Hard),
        4 => (Of::Tokens, Some(Per::Second), true, Mode::Hard),
        5 => (Of::Tokens, Some(Per::Second), false, Mode::Hard),
        _ => (Of::Tokens, Some(Per::Minute), false, Mode::Hard),
    };
    Rule {
        name: format!("rule-{number}"),
        limit: 0,
        of,
        per,
        by: Vec::new(),
        only: Vec::new(),
        zone: TimeZone::UTC,
        mode,
        exact,
        strict: false,
        wait: Duration::ZERO,
        shared: Some(Sharing { lease: None, down: crate::admission::core::rule::Down::Closed, replicas: 1 }),
    }
}

impl World {
    fn new(redis: &Redis, clock: Clock, source: &str, seed: u64) -> World {
        let client = ::redis::Client::open(redis.url()).unwrap();
        let mut connection = client.get_connection().unwrap();
        let _: String = cmd("FLUSHALL").query(&mut connection).unwrap();
        let time = "local time = redis.call('TIME')\n";
        assert!(source.contains(time), "the script asks the store what time it is");
        let source = match clock {
            Clock::Stores => source.to_owned(),
            Clock::Tests => source.replace(time, "local time = cmsgpack.unpack(redis.call('GET', 'clock'))\n"),
        };
        let mut chance = Chance(seed);
        let limit = |chance: &mut Chance| {
            let most = [5, 100, 1_000_000_000][chance.below(3) as usize];
            1 + chance.below(most)
        };
        let pair = |number, chance: &mut Chance| Pair {
            rule: Arc::new(rule(chance, number)),
            limit: limit(chance),
            core: None,
            books: HashMap::new(),
            known: Vec::new(),
        };
        let pairs = (0..1 + chance.below(4) as usize).map(|number| pair(number, &mut chance)).collect();
        let now_ms = 1_790_000_000_000 + chance.below(DAY_MS as u64) as i64;
        World { connection, clock, source, now_ms, chance, pairs, open: Vec::new(), grants: 0 }
    }

    /// What the script says, and its time.
    fn run(&mut self, doing: &str, keys: &[String], gateway: u64, add: impl FnOnce(&mut redis::Cmd)) -> Vec<i64> {
        if self.clock == Clock::Tests {
            let (s, us) = (self.now_ms / 1_000, self.now_ms % 1_000 * 1_000 + 123);
            let set = "redis.call('SET', 'clock', cmsgpack.pack({ ARGV[1], ARGV[2] }))";
            let _: () = cmd("EVAL").arg(set).arg(0).arg(s).arg(us).query(&mut self.connection).unwrap();
        }
        let mut command = cmd("EVAL");
        command.arg(&self.source).arg(keys.len()).arg(keys);
        // Gateways live for ever here, except for those that are said to have died.
        command.arg(doing).arg(format!("gateway-{gateway}")).arg(1).arg(1_000_000_000_000_i64);
        add(&mut command);
        let numbers = numbers(command.query(&mut self.connection).unwrap()).unwrap();
        self.now_ms = numbers[1];
        numbers
    }

    fn period(&mut self) -> Period {
        // Most requests are of today; some began yesterday, or on a machine whose clock is wrong.
        let days = [0, 0, 0, 0, 0, -1, -1, 3][self.chance.below(8) as usize];
        let start = (self.now_ms / DAY_MS + days) * DAY_MS;
        Period { start_ns: start * MS, end_ns: (start + DAY_MS) * MS, now_ns: self.now_ms * MS }
    }

    fn reserve(&mut self) {
        let gateway = self.chance.below(GATEWAYS);
        let period = self.period();
        let mut which: Vec<usize> = (0..self.pairs.len()).filter(|_| self.chance.below(4) > 0).collect();
        if self.chance.below(2) == 0 {
            which.reverse();
        }
        let mut wants = Vec::new();
        for at in &which {
            let pair = &mut self.pairs[*at];
            if self.chance.below(30) == 0 {
                pair.limit = 1 + self.chance.below(2 * pair.limit);
            }
            let amount = match pair.rule.per {
                None => self.chance.below(3),
                Some(_) => self.chance.below(pair.limit + pair.limit / 8 + 2) / (1 + self.chance.below(8)),
            };
            let at = Moment { now: Duration::ZERO, period };
            let subject = Subject([7; 16]);
            let ask = Ask { rule: pair.rule.clone(), subject, limit: pair.limit, amount, at };
            let books = pair.books.get(&(gateway, pair.counted_in(period.start_ns))).copied().unwrap_or(0);
            wants.push(Want { key: key(&pair.rule, subject), ask, least: amount, most: amount, books, leased: None });
        }
        let keys: Vec<String> = wants.iter().map(|want| want.key.clone()).collect();
        self.grants += 1;
        let name = format!("grant-{}", self.grants);
        let numbers = self.run("reserve", &keys, gateway, |command| {
            command.arg(&name);
            wants.iter().for_each(|want| want.add_to(command));
        });
        let reply = reply(&numbers, &wants).unwrap();
        let at = Moment { now: Duration::from_millis(self.now_ms as u64), period };
        let mut fresh = Vec::new();
        for (which, want) in which.iter().zip(&wants) {
            let pair = &mut self.pairs[*which];
            if pair.core.is_none() {
                pair.core = Some(Counter::new(&pair.rule, pair.limit, at, 0));
                fresh.push(*which);
            }
            pair.core.as_mut().unwrap().set_limit(at.now, want.ask.limit, pair.rule.mode);
        }
        let mut cores: Vec<(usize, &mut Pair)> = self.pairs.iter_mut().enumerate().collect();
        cores.retain(|(at, _)| which.contains(at));
        cores.sort_by_key(|(at, _)| which.iter().position(|other| other == at));
        let mut claims: Vec<Claim<'_>> = cores
            .iter_mut()
            .zip(&wants)
            .map(|((_, pair), want)| Claim {
                mode: pair.rule.mode,
                counter: pair.core.as_mut().unwrap(),
                at,
                amount: want.ask.amount,
            })
            .collect();
        match (set::reserve(&mut claims), reply) {
            (Ok(taken), Reply::Taken(got)) => {
                for (claim, got) in claims.iter().zip(&got) {
                    assert_eq!((got.amount, got.state), (claim.amount, in_ms(claim.counter.state(at))));
                }
                let part = |(at, taken): (&usize, Taken)| {
                    self.pairs[*at].know(period.start_ns);
                    (*at, taken, self.pairs[*at].counted_in(period.start_ns))
                };
                let parts = which.iter().zip(taken).map(part).collect();
                self.open.push(Open { gateway, name, parts });
            }
            (Err(denied), Reply::Short(which, short)) => {
                assert_eq!(short.wait, wait_in_ms(denied.short.wait));
                // Of those that take as long, either may be named.
                let named = claims[which].counter.check(at, claims[which].amount).unwrap_err();
                assert_eq!((short.wait, short.state), (wait_in_ms(named.wait), in_ms(named.state)));
                // Nothing was taken: what was not there is not there.
                fresh.into_iter().for_each(|at| self.pairs[at].core = None);
            }
            (core, script) => panic!("core: {core:?}; script: {script:?}"),
        }
    }

    fn settle(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let at = self.chance.below(self.open.len() as u64) as usize;
        let Open { gateway, name, parts } = self.open.swap_remove(at);
        let mut used = Vec::new();
        for (at, taken, start_ns) in &parts {
            let part = match self.chance.below(4) {
                0 => 0,
                1 => taken.amount(),
                2 => self.chance.below(taken.amount() + 1),
                // A debt.
                _ => taken.amount() + self.chance.below(taken.amount() / 4 + 2),
            };
            *self.pairs[*at].books.entry((gateway, *start_ns)).or_default() += part;
            used.push(part);
        }
        let settled = Settled { grant: name, parts: used.clone() };
        let twice = self.chance.below(4) == 0;
        self.run("settle", &[], gateway, |command| settled.add_to(command));
        // Told again it changes nothing, and the time of the first is what counts.
        let now = Duration::from_millis(self.now_ms as u64);
        if twice {
            self.run("settle", &[], gateway, |command| settled.add_to(command));
        }
        for ((at, taken, _), used) in parts.into_iter().zip(used) {
            self.pairs[at].core.as_mut().unwrap().settle(now, taken, used);
        }
    }

    /// What a gateway that died had open counts as used. Its next life finds that in its ledger.
    fn die(&mut self) {
        let dead = self.chance.below(GATEWAYS);
        while self.run("leave", &[], dead, |_| ()).last() == Some(&0) {}
        let now = Duration::from_millis(self.now_ms as u64);
        let (of_dead, open): (Vec<Open>, Vec<Open>) = self.open.drain(..).partition(|open| open.gateway == dead);
        self.open = open;
        for (at, taken, start_ns) in of_dead.into_iter().flat_map(|open| open.parts) {
            let (pair, amount) = (&mut self.pairs[at], taken.amount());
            *pair.books.entry((dead, start_ns)).or_default() += amount;
            pair.core.as_mut().unwrap().settle(now, taken, amount);
        }
    }

    fn pass(&mut self) {
        let most = [20, 1_000, 20_000, 90_000][self.chance.below(4) as usize];
        let ms = self.chance.below(most) as i64;
        match self.clock {
            Clock::Stores => std::thread::sleep(Duration::from_micros(ms.min(2_000) as u64)),
            // Clocks jump, now and then.
            Clock::Tests if self.chance.below(20) == 0 => self.now_ms -= ms,
            Clock::Tests => self.now_ms += ms,
        }
    }

    fn play(&mut self) {
        for _ in 0..STEPS {
            match self.chance.below(20) {
                0..=9 => self.reserve(),
                10..=14 => self.settle(),
                15..=18 => self.pass(),
                _ => self.die(),
            }
        }
    }
}

fn in_ms(state: State) -> State {
    State { reset: ms(state.reset), ..state }
}

fn wait_in_ms(wait: Wait) -> Wait {
    if let Wait::For(wait) = wait { Wait::For(ms(wait)) } else { wait }
}

fn ms(time: Duration) -> Duration {
    Duration::from_millis(time.as_nanos().div_ceil(1_000_000) as u64)
}

fn play(clock: Clock, source: &str, histories: u64) {
    let redis = Redis::start();
    for seed in 0..histories {
        let mut world = World::new(&redis, clock, source, seed);
        let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.play()));
        if let Err(cause) = played {
            eprintln!("in the history of seed {seed}");
            std::panic::resume_unwind(cause);
        }
    }
}

fn histories() -> u64 {
    std::env::var("GLASSGATE_HISTORIES").map_or(HISTORIES, |histories| histories.parse().unwrap())
}

#[test]
fn the_script_and_the_core_decide_the_same_whatever_the_clock_does() {
    play(Clock::Tests, SOURCE, histories());
}

#[test]
fn the_script_and_the_core_decide_the_same_by_the_stores_own_clock() {
    play(Clock::Stores, SOURCE, histories() / 8);
}

#[test]
fn a_script_with_a_mistake_is_found_out() {
    for (line, mistake) in [
        // What ran over meanwhile comes back.
        (
            "math.min((amount - used) * counter.window, counter.limit * counter.window - peak[2])",
            "(amount - used) * counter.window",
        ),
        ("local SLICES = 65", "local SLICES = 64"),
        // A settlement that is told twice counts twice.
        ("redis.call('HDEL', GRANTS .. gateway, name)", ""),
        // What a dead gateway held is free.
        ("used and used[at] or amount", "used and used[at] or 0"),
        // A request that is refused takes all the same.
        (
            "if counters[at].changed then",
            "if counters[at].changed or kinds[asks[at].kind].take(counters[at], asks[at], asks[at].least) then",
        ),
        // What is full goes on refilling.
        (
            "math.min(counter.level + (now - counter.at) * counter.limit, counter.limit * counter.window)",
            "counter.level + (now - counter.at) * counter.limit",
        ),
    ] {
        assert!(SOURCE.contains(line), "{line}");
        let wrong = SOURCE.replace(line, mistake);
        let found = std::panic::catch_unwind(|| play(Clock::Tests, &wrong, HISTORIES));
        assert!(found.is_err(), "the histories prove nothing of: {line}");
    }
}
