//! An issuer's published keys: fetched in the background, seldom, and the last good set kept for a while.
//!
//! A request never fetches. One that names a key we do not know may ask for a look, and wait a moment for it, if the last
//! look was long enough ago; however many ask, there is one look in that time.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::rt::TokioExecutor;
use tokio::sync::watch;

use super::keys::{Named, parse_set};
use crate::outbound;

/// A set of 64 keys with certificates has less.
const SET_BYTES_MAX: usize = 256 << 10;
const FETCH_MAX: Duration = Duration::from_secs(5);

/// How often, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between two looks, when nobody asks.
    pub every: Duration,
    /// Between two looks, whoever asks and whatever failed.
    pub at_least: Duration,
    /// How long a set counts that cannot be fetched anew.
    pub lasts: Duration,
    /// How long a request waits for a look that it asked for.
    pub patience: Duration,
}

pub const PACE: Pace = Pace {
    every: Duration::from_secs(300),
    at_least: Duration::from_secs(30),
    lasts: Duration::from_secs(3_600),
    patience: Duration::from_secs(1),
};

/// What the last look found.
#[derive(Clone, Debug)]
struct Told {
    looks: u64,
    not_before: Instant,
    good: Option<Good>,
}

/// A set, and when it was fetched. `number` tells one set from the next.
#[derive(Clone, Debug)]
pub struct Good {
    pub keys: Arc<Vec<Named>>,
    pub number: u64,
    pub fetched: Instant,
}

pub struct Jwks {
    told: watch::Receiver<Told>,
    ask: SyncSender<()>,
    pace: Pace,
}

impl Jwks {
    /// Begins to follow the keys at `url`, until it is dropped.
    ///
    /// # Errors
    /// When the address needs TLS and this machine has no root certificates, or no thread can be started.
    pub fn follow(url: Uri, issuer: String, pace: Pace) -> Result<Jwks, String> {
        let pool =
            Pool::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(outbound::connector(&url, FETCH_MAX)?);
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
        let (tell, told) = watch::channel(Told { looks: 0, not_before: Instant::now(), good: None });
        let (ask, asked) = sync_channel(1);
        let follow = move || {
            loop {
                let fetched = runtime.block_on(fetch(&pool, &url));
                if let Err(why) = &fetched {
                    tracing::warn!(%issuer, %why, "the issuer's keys cannot be fetched; the last good ones stay for a while");
                }
                let failed = fetched.is_err();
                tell.send_modify(|told| {
                    told.looks += 1;
                    told.not_before = Instant::now() + pace.at_least;
                    if let Ok(keys) = fetched {
                        told.good = Some(Good { keys: Arc::new(keys), number: told.looks, fetched: Instant::now() });
                    }
                });
                if !wait(&asked, pace, failed) {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("jwks".into()).spawn(follow).map_err(|error| error.to_string())?;
        Ok(Jwks { told, ask, pace })
    }

    /// The last good set, while it counts. At the very start the first look is waited for.
    pub async fn good(&self, now: Instant) -> Option<Good> {
        if self.told.borrow().looks == 0 {
            self.wait_for_look_after(0).await;
        }
        self.current(now)
    }

    fn current(&self, now: Instant) -> Option<Good> {
        let good = self.told.borrow().good.clone()?;
        (now.saturating_duration_since(good.fetched) <= self.pace.lasts).then_some(good)
    }

    /// A set that is newer than `than`, if a look at it is due and brings one in time.
    pub async fn newer(&self, than: &Good, now: Instant) -> Option<Good> {
        let Told { looks, not_before, good } = self.told.borrow().clone();
        if good.is_none_or(|good| good.number == than.number) {
            if not_before > Instant::now() {
                return None;
            }
            // Full: somebody has asked already.
            let _ = self.ask.try_send(());
            self.wait_for_look_after(looks).await;
        }
        self.current(now).filter(|good| good.number != than.number)
    }

    async fn wait_for_look_after(&self, looks: u64) {
        let mut told = self.told.clone();
        // Whether it came or not, the next look at what was told shows.
        let _ = tokio::time::timeout(self.pace.patience, told.wait_for(|told| told.looks > looks)).await;
    }

    /// How old the last good set is.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        self.told.borrow().good.as_ref().map(|good| now.saturating_duration_since(good.fetched))
    }
}

/// Until the next look is due; `false` once nobody needs one. What is asked for in the meantime has to wait for it too.
fn wait(asked: &Receiver<()>, pace: Pace, failed: bool) -> bool {
    let began = Instant::now();
    let mut due = began + if failed { pace.at_least } else { pace.every };
    loop {
        match asked.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Ok(()) => due = due.min(began + pace.at_least),
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => return false,
        }
    }
}

/// One GET, with a bound on everything. A redirect is no answer: whoever may say where keys are may say which.
async fn fetch(pool: &Pool<outbound::Connector, Empty<Bytes>>, url: &Uri) -> Result<Vec<Named>, String> {
    let request = Request::get(url).header("accept", "application/json").body(Empty::new());
    let request = request.map_err(|error| error.to_string())?;
    let answer = async {
        let response = pool.request(request).await.map_err(|error| outbound::causes(&error))?;
        if response.status() != http::StatusCode::OK {
            return Err(format!("{url} answers {}", response.status()));
        }
        let body = Limited::new(response.into_body(), SET_BYTES_MAX).collect().await;
        parse_set(&body.map_err(|error| error.to_string())?.to_bytes())
    };
    tokio::time::timeout(FETCH_MAX, answer).await.map_err(|_| format!("{url} has not answered within {FETCH_MAX:?}"))?
}
