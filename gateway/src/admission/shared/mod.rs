//! Counts that several gateways share through a store: a rule that says `shared` is counted there, all others here.
//!
//! What binds a request is asked in one call of a script, for all of its shared rules together, or not at all where a lease
//! has enough. Beside the store each gateway keeps books of what it has itself used. They tell a store that has forgotten,
//! and they are what holds where the store is out of reach: what each rule's `down` says.

pub mod leases;
pub mod script;
mod settle;
pub mod store;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;

use self::leases::{Drawn, Lacking, Leases};
use self::script::{Reply, Want};
use self::settle::{Message, Open, Untold};
use self::store::{Away, Store};
use super::before::Before;
use super::core::rule::{Down, Rule, Sharing};
use super::core::{Short, State, Wait};
use super::counts::{Ask, Counts, Denied, Grant, Time};
use super::local::{Granted, Local};
use crate::api::limit::Per;
use crate::config::RedisConfig;
use crate::observe::metrics::Metrics;

/// Counters whose last state is remembered, for those who ask how they stand.
const SEEN_MAX: u64 = 100_000;
/// When to try again where others, perhaps elsewhere, must end first.
const FOR_OTHERS: Duration = Duration::from_millis(200);

pub struct Shared {
    /// What is not shared.
    local: Arc<Local>,
    /// What this gateway has used itself of what is.
    books: Arc<Books>,
    store: Arc<Store>,
    leases: Arc<Leases>,
    settles: mpsc::Sender<Message>,
    seen: moka::sync::Cache<settle::Name, State>,
    /// Grants of this life.
    life: String,
    grants: AtomicU64,
}

impl Shared {
    /// Starts a thread that keeps the connection, and waits for it for a moment. `gateway` is this one's name among all.
    ///
    /// # Errors
    /// What is wrong with the address. A store that is not there is none.
    pub fn start(
        config: &RedisConfig,
        gateway: String,
        local: Arc<Local>,
        before: Arc<Before>,
        time: Arc<Time>,
        metrics: Arc<Metrics>,
    ) -> Result<Shared, String> {
        let wrong = |why| format!("`storage.redis`: {why}");
        let life = format!("{:x}", time.clock.now_ns());
        let store = Arc::new(Store::new(config, gateway, time.clock.clone(), metrics).map_err(wrong)?);
        let books = Arc::new(Books { used: Local::new(time.clone(), before), untold: Arc::default() });
        let (leases, called) = Leases::new(time);
        let (settles, ended) = settle::queue();
        let (first, is_there) = std::sync::mpsc::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| error.to_string())?;
        let (kept, tended, known) = (store.clone(), leases.clone(), books.clone());
        let work = move || {
            runtime.block_on(async {
                tokio::join!(
                    kept.keep(first),
                    settle::send(&kept, ended, known.untold.clone()),
                    tended.tend(&kept, called, |key, ask| known.told(key, ask)),
                )
            });
        };
        std::thread::Builder::new().name("redis".into()).spawn(work).map_err(|error| error.to_string())?;
        // One that is slow to come is none, for now.
        let _ = is_there.recv_timeout(store::CONNECT_MAX);
        let seen = moka::sync::Cache::new(SEEN_MAX);
        Ok(Shared { local, books, store, leases, settles, seen, life, grants: AtomicU64::new(0) })
    }

    /// What was used before this process began, known only now.
    pub fn remember(&self, before: &Arc<Before>) {
        self.local.remember(before.clone());
        self.books.used.remember(before.clone());
    }

    fn key(&self, ask: &Ask) -> String {
        script::key(&ask.rule, if ask.rule.is_clients_choice() { self.books.used.subject(ask) } else { ask.subject })
    }

    /// Takes what is asked of shared rules.
    async fn share(&self, asks: Vec<Ask>) -> Result<Held, Denied> {
        let (at_once, on_lease): (Vec<usize>, Vec<usize>) = (0..asks.len()).partition(|at| lease(&asks[*at]).is_none());
        let keys: Vec<String> = asks.iter().map(|ask| self.key(ask)).collect();
        let mut drawn: Vec<Drawn> = on_lease.iter().map(|at| self.leases.take(keys[*at].clone(), &asks[*at])).collect();
        let not_there = on_lease.iter().zip(&drawn).filter(|(_, drawn)| !drawn.is_taken()).map(|(at, _)| *at);
        let unasked: Vec<usize> = at_once.iter().copied().chain(not_there).collect();
        let found = Lacking::find(&mut drawn, &self.store, |key, ask| self.books.told(key, ask)).await;
        let (open, out_of_reach) = match found {
            Ok(lacking) => self.draw(&asks, &keys, (&at_once, &on_lease), lacking).await?,
            Err(Away) => (None, unasked),
        };
        let noted = self.keep_books(&asks, &out_of_reach)?;
        let is_there = |at: &usize| !out_of_reach.contains(at);
        let drawn = on_lease.iter().zip(drawn).filter(|(at, _)| is_there(at));
        Ok(Held {
            is_apart: out_of_reach.iter().any(|at| down(&asks[*at]) == Down::Local),
            noted,
            books: self.books.clone(),
            drawn: drawn.map(|(at, drawn)| (asks[*at].clone(), drawn)).collect(),
            open,
            asked: at_once.iter().map(|at| (keys[*at].clone(), asks[*at].clone())).collect(),
        })
    }

    /// Asks the store for what is asked at once and what leases lack. Gives the grant, and what was out of reach.
    async fn draw(
        &self,
        asks: &[Ask],
        keys: &[String],
        (at_once, on_lease): (&[usize], &[usize]),
        lacking: Lacking,
    ) -> Result<(Option<Open>, Vec<usize>), Denied> {
        // In the order in which they are asked for.
        let asked: Vec<usize> = at_once.iter().copied().chain(lacking.at.iter().map(|at| on_lease[*at])).collect();
        let mut wants: Vec<Want> = at_once.iter().map(|at| self.want(&keys[*at], &asks[*at])).collect();
        wants.extend(lacking.wants.iter().cloned());
        let (open, reply) = self.ask(at_once.len(), &wants).await;
        match reply {
            Ok(Reply::Taken(got)) => {
                wants.iter().zip(&got).for_each(|(want, got)| self.see(want, got.state));
                lacking.fill(got[at_once.len()..].iter().map(|got| got.amount));
                Ok((open, Vec::new()))
            }
            Ok(Reply::Short(at, short)) => {
                open.into_iter().for_each(Open::forget);
                lacking.refuse();
                self.see(&wants[at], short.state);
                let wait = if short.wait == Wait::ForOthers { Wait::For(FOR_OTHERS) } else { short.wait };
                Err(Denied { ask: asked[at], short: Some(Short { wait, ..short }) })
            }
            Err(Away) => Ok((open, asked)),
        }
    }

    /// One call for all, with a grant if something is to be settled afterwards.
    async fn ask(&self, parts: usize, wants: &[Want]) -> (Option<Open>, Result<Reply, Away>) {
        if wants.is_empty() {
            return (None, Ok(Reply::Taken(Vec::new())));
        }
        if parts == 0 {
            return (None, self.store.reserve("", wants).await);
        }
        let name = format!("{}.{:x}", self.life, self.grants.fetch_add(1, Ordering::Relaxed));
        let Some(open) = Open::new(&self.settles, name, parts) else { return (None, Err(Away)) };
        let reply = self.store.reserve(&open.grant, wants).await;
        (Some(open), reply)
    }

    /// Notes what is let in. Where the store is out of reach, the rules say what that means.
    fn keep_books(&self, asks: &[Ask], out_of_reach: &[usize]) -> Result<[Granted; 2], Denied> {
        if let Some(ask) = out_of_reach.iter().find(|at| down(&asks[**at]) == Down::Closed) {
            return Err(Denied { ask: *ask, short: None });
        }
        let stands_in = |at: &usize| out_of_reach.contains(at) && down(&asks[*at]) == Down::Local;
        let (checked, noted): (Vec<usize>, Vec<usize>) = (0..asks.len()).partition(stands_in);
        let parts = |which: &[usize]| which.iter().map(|at| part(&asks[*at])).collect::<Vec<Ask>>();
        let taken =
            self.books.used.take(&parts(&checked)).map_err(|denied| Denied { ask: checked[denied.ask], ..denied })?;
        Ok([taken, self.books.used.take_anyway(&parts(&noted))])
    }

    fn see(&self, want: &Want, state: State) {
        self.seen.insert(name(&want.key, &want.ask), state);
    }

    fn want(&self, key: &str, ask: &Ask) -> Want {
        let books = self.books.told(key, ask);
        Want { key: key.to_owned(), ask: ask.clone(), least: ask.amount, most: ask.amount, books, leased: None }
    }
}

#[async_trait]
impl Counts for Shared {
    /// Only what is counted here: a look elsewhere would cost as much as to take.
    fn peek(&self, asks: &[Ask]) -> Result<(), Denied> {
        let (_, own) = apart(asks);
        let denied = self.local.peek(&pick(asks, &own));
        denied.map_err(|denied| Denied { ask: own[denied.ask], ..denied })
    }

    async fn reserve(&self, asks: &[Ask]) -> Result<Box<dyn Grant>, Denied> {
        let (shared, own) = apart(asks);
        if shared.is_empty() {
            return self.local.reserve(asks).await;
        }
        // What is near first: a refusal by it asks nobody.
        let local = self.local.take(&pick(asks, &own)).map_err(|denied| Denied { ask: own[denied.ask], ..denied })?;
        let held = self.share(pick(asks, &shared)).await;
        let held = held.map_err(|denied| Denied { ask: shared[denied.ask], ..denied })?;
        Ok(Box::new(Both { local, held }))
    }

    /// As the store last said, and what is left of a lease.
    fn state(&self, ask: &Ask) -> State {
        if ask.rule.shared.is_none() {
            return self.local.state(ask);
        }
        let key = self.key(ask);
        let unknown = State { limit: ask.limit, used: 0, held: 0, remaining: ask.limit, reset: Duration::ZERO };
        let state = self.seen.get(&name(&key, ask)).unwrap_or(unknown);
        let left = if lease(ask).is_some() { self.leases.left(key, ask) } else { 0 };
        let held = state.held.saturating_sub(left);
        State { held, remaining: state.remaining.saturating_add(left).min(ask.limit), ..state }
    }

    fn close(&self) {
        let (done, is_done) = std::sync::mpsc::channel();
        settle::close(&self.settles, done.clone());
        self.leases.close(done);
        // Once for each of the two. Without a store neither can, and what is left counts as used.
        let _ = is_done.recv_timeout(CLOSE_MAX).and_then(|()| is_done.recv_timeout(CLOSE_MAX));
    }
}

/// How long an end waits for the store.
const CLOSE_MAX: Duration = Duration::from_secs(1);

struct Both {
    local: Granted,
    held: Held,
}

impl Grant for Both {
    fn settle(mut self: Box<Self>, used: &dyn Fn(&Rule) -> u64) {
        self.local.end(used);
        self.held.settle(used);
    }

    fn is_apart(&self) -> bool {
        self.held.is_apart
    }
}

/// What a request has of shared rules. Dropped, all of it goes back.
struct Held {
    /// What was taken from a part of a limit, and what was only noted.
    noted: [Granted; 2],
    books: Arc<Books>,
    drawn: Vec<(Ask, Drawn)>,
    open: Option<Open>,
    /// The grant's counters.
    asked: Vec<(String, Ask)>,
    is_apart: bool,
}

impl Held {
    fn settle(mut self, uses: &dyn Fn(&Rule) -> u64) {
        // A strict rule reserved the most that can be: it is never exceeded by what it let in.
        let uses_of = |ask: &Ask| if ask.rule.strict { uses(&ask.rule).min(ask.amount) } else { uses(&ask.rule) };
        let parts = self.asked.iter().map(|(_, ask)| uses_of(ask)).collect();
        let told = self.asked.iter().filter(|(_, ask)| self.open.is_some() && is_calendar(ask));
        let counted: Vec<(settle::Name, u64)> = told.map(|(key, ask)| (name(key, ask), uses_of(ask))).collect();
        // In this order nothing is in the books that the store would not know if it is told what they say, and no lease is
        // less before they are more.
        self.books.untold.add(&counted);
        self.noted.iter_mut().for_each(|noted| noted.end(uses));
        for (ask, drawn) in self.drawn.drain(..) {
            drawn.settle(uses_of(&ask));
        }
        if let Some(open) = self.open.take() {
            open.settle(parts, counted);
        }
    }
}

/// What this gateway has itself used under shared rules.
struct Books {
    used: Local,
    untold: Arc<Untold>,
}

impl Books {
    /// What the store should know at least of a day or a month.
    fn told(&self, key: &str, ask: &Ask) -> u64 {
        if !is_calendar(ask) {
            return 0;
        }
        let used = self.used.state(&part(ask)).used;
        used.saturating_sub(self.untold.get(&name(key, ask)))
    }
}

fn is_calendar(ask: &Ask) -> bool {
    ask.rule.per.is_some_and(Per::is_calendar)
}

fn name(key: &str, ask: &Ask) -> settle::Name {
    (key.to_owned(), ask.at.period.start_ns)
}

/// What is shared, and what is not.
fn apart(asks: &[Ask]) -> (Vec<usize>, Vec<usize>) {
    (0..asks.len()).partition(|at| asks[*at].rule.shared.is_some())
}

fn pick(asks: &[Ask], which: &[usize]) -> Vec<Ask> {
    which.iter().map(|at| asks[*at].clone()).collect()
}

/// What is taken ahead. Places always are, one at a time at the least: who asks one after the other finds their own again,
/// however late the store hears of it.
fn lease(ask: &Ask) -> Option<u64> {
    let at_a_time = ask.rule.per.is_none().then_some(1);
    ask.rule.shared.and_then(|Sharing { lease, .. }| lease.or(at_a_time))
}

fn down(ask: &Ask) -> Down {
    ask.rule.shared.map_or(Down::Closed, |Sharing { down, .. }| down)
}

/// The same of this gateway's part of the limit.
fn part(ask: &Ask) -> Ask {
    let replicas = ask.rule.shared.map_or(1, |Sharing { replicas, .. }| replicas);
    Ask { limit: (ask.limit / replicas.max(1)).max(1), ..ask.clone() }
}

#[cfg(test)]
#[path = "../../../../tests/support/fault.rs"]
#[allow(dead_code, reason = "the end-to-end tests need more of it")]
mod fault;
#[cfg(test)]
#[path = "../../../../tests/support/redis.rs"]
#[allow(dead_code, reason = "the end-to-end tests need more of it")]
mod redis_server;
#[cfg(test)]
mod script_model;
#[cfg(test)]
#[path = "../../../../tests/support/server.rs"]
#[allow(dead_code, reason = "the end-to-end tests need more of it")]
mod server;
#[cfg(test)]
mod tests;
