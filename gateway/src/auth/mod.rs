//! Who is calling → `Known`, and whether they may come in → `Caller`.

pub mod api_key;
pub mod directory;
pub mod failures;
mod follow;
pub mod identity;
pub mod jwt;
mod presented;
pub mod store;

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use http::HeaderMap;
use subtle::ConstantTimeEq as _;

use crate::admission::core::rule::Rule;
use crate::config::{AuthConfig, Common, JwtConfig};
use crate::network::is_in;
use crate::observe::metrics::Metrics;
use crate::ports::Clock;
use crate::refusal::{Refusal, TokenFlaw};
use api_key::{ApiKey, Pepper};
use directory::Directory;
use failures::Failures;
pub use identity::{Caller, Identity, Known};
use jwt::Issuers;
use presented::{Presented, presented};
use store::{Location, OpenError};

/// Knows every key; a lookup is one hash and two constant-time comparisons.
pub struct Auth {
    directory: Directory,
    pepper: Pepper,
    issuers: ArcSwap<Issuers>,
    failures: Failures,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
    began: Instant,
}

impl Auth {
    /// # Errors
    /// When the key store cannot be read, or is of another pepper. One that gateways share may be away: its last `copy` is
    /// read then.
    pub fn open(
        keys: &Location,
        copy: &Path,
        pepper: Pepper,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
    ) -> Result<Auth, OpenError> {
        let directory = Directory::open(keys, copy, pepper.mark(), metrics.clone())?;
        let (issuers, failures, began) = (ArcSwap::default(), Failures::default(), clock.instant());
        Ok(Auth { directory, pepper, issuers, failures, began, clock, metrics })
    }

    /// Prepares to take the tokens of these issuers; `trust` begins it.
    ///
    /// # Errors
    /// When an issuer's keys cannot be followed.
    pub fn open_issuers(&self, configs: &[JwtConfig]) -> Result<Issuers, String> {
        self.issuers.load().open(configs)
    }

    pub fn trust(&self, issuers: Issuers) {
        self.issuers.store(Arc::new(issuers));
    }

    /// From now on the configuration has these limit rules, beside those of the key store.
    pub fn bind(&self, rules: &[Arc<Rule>], common: Common) {
        self.directory.set_file_rules(rules, common);
    }

    /// The limit rules that bind now.
    pub fn rules(&self) -> Arc<Vec<Arc<Rule>>> {
        self.directory.rules()
    }

    /// Every key, tenant and rule, as they are known.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Shows how old issuers' keys are.
    pub fn observe(&self) {
        self.metrics.jwks_ages(self.issuers.load().ages(self.clock.instant()));
    }

    /// Says who is calling from `ip`, which is the client's address.
    ///
    /// # Errors
    /// What is wrong with the credential, and what to do; `TooManyFailures` to whoever has guessed too often.
    pub async fn identify(&self, config: &AuthConfig, headers: &HeaderMap, ip: IpAddr) -> Result<Known, Refusal> {
        let presented = presented(headers, &config.jwt);
        let method = presented.as_ref().map_or("none", Presented::method);
        let identified = match presented {
            Ok(presented) => self.guarded(config, &presented, ip).await,
            Err(refusal) => Err(refusal),
        };
        let identified = identified.and_then(|(identity, secret)| {
            let tenant = self.directory.tenant(&identity.tenant);
            match tenant.as_ref().and_then(|tenant| tenant.disabled_ns) {
                Some(_) => Err(Refusal::DisabledTenant),
                None => Ok((Known::new(identity, tenant, ip), secret)),
            }
        });
        let result = match &identified {
            Ok((_, Secret::Current)) => "accepted",
            Ok((_, Secret::Previous)) => "accepted_previous",
            Err(refusal) => refusal.describe().code,
        };
        self.metrics.authenticated(method, result);
        identified.map(|(known, _)| known)
    }

    /// Asks the limiter before anything else: who has guessed too often is not told whether they are right now.
    async fn guarded(&self, config: &AuthConfig, presented: &Presented<'_>, ip: IpAddr) -> Result<Found, Refusal> {
        // A proxy that does not say whom it heard stands for all of its clients; they must not pay for one of them.
        let limited = !is_in(ip, &config.trusted_proxies);
        let (per_minute, now) = (config.failures_per_minute, self.clock.instant() - self.began);
        if limited {
            let may = self.failures.may_try(ip, per_minute, now);
            may.map_err(|retry_after| Refusal::TooManyFailures { limit: per_minute, retry_after })?;
        }
        // Before anything was read nobody is wrong, and no tenant known to be shut out.
        if !self.directory.is_known() {
            return Err(Refusal::KeysUnavailable);
        }
        let identified = match presented {
            Presented::Key(key) => self.key(key),
            Presented::Token(token) => {
                let issuers = self.issuers.load_full();
                let identified = issuers.identify(token, self.clock.now_ns(), self.clock.instant()).await;
                identified.map(|identity| (identity, Secret::Current))
            }
            Presented::Unknown => Err(Refusal::MalformedKey),
        };
        if limited && identified.as_ref().is_err_and(is_guess) {
            self.failures.failed(ip, per_minute, now);
        }
        identified
    }

    fn key(&self, presented: &ApiKey<'_>) -> Result<Found, Refusal> {
        let keys = self.directory.keys();
        let key = keys.get(presented.id());
        // An unknown id is compared with nothing real, so that its answer takes as long as a wrong secret's; a key that was
        // never rotated likewise.
        let previous = key.and_then(|key| key.previous);
        let hash = presented.hash(&self.pepper);
        let is = |stored: [u8; 32]| bool::from(hash.ct_eq(&stored));
        let is_current = is(key.map_or([0; 32], |key| key.hash));
        let is_previous = is(previous.map_or([0; 32], |(hash, _)| hash));
        let Some(key) = key.filter(|_| is_current || is_previous) else { return Err(Refusal::UnknownKey) };
        let now = self.clock.now_ns();
        let ended = |end: Option<i64>| end.is_some_and(|end| end <= now);
        if key.revoked_ns.is_some() {
            Err(Refusal::RevokedKey)
        } else if key.disabled_ns.is_some() {
            Err(Refusal::DisabledKey)
        } else if ended(key.expires_ns) || (is_previous && ended(previous.map(|(_, until)| until))) {
            Err(Refusal::ExpiredKey)
        } else {
            Ok((key.who.clone(), if is_current { Secret::Current } else { Secret::Previous }))
        }
    }
}

/// Which of a key's secrets it was.
#[derive(Clone, Copy)]
enum Secret {
    Current,
    /// The one before the last rotation, in its grace.
    Previous,
}

type Found = (Arc<Identity>, Secret);

/// Whether somebody tried what they do not have. Who had it once, or may not come in with it, has not guessed.
fn is_guess(refusal: &Refusal) -> bool {
    use TokenFlaw::{Algorithm, Issuer, Malformed, Signature, UnknownKey};
    matches!(
        refusal,
        Refusal::MalformedKey
            | Refusal::UnknownKey
            | Refusal::BadToken(Malformed | Algorithm | Issuer | UnknownKey | Signature)
    )
}

#[cfg(test)]
mod tests;
