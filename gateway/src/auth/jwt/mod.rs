//! Tokens of issuers that we trust → `Identity`.

pub mod core;
pub mod jwks;
pub mod keys;
mod verify;

use std::sync::Arc;
use std::time::{Duration, Instant};

use moka::sync::Cache;

use self::core::{Proven, Token};
use self::jwks::{Good, Jwks, PACE, Pace};
use self::keys::{Key, fingerprint};
use super::identity::Identity;
use crate::config::{JwtConfig, JwtKeys};
use crate::refusal::{Refusal, TokenFlaw};

/// Tokens of one issuer that were proved and are remembered, so that a request costs no signature.
const KNOWN_MAX: u64 = 10_000;

/// Everybody whose tokens we take.
#[derive(Default)]
pub struct Issuers(Vec<Arc<Issuer>>);

struct Issuer {
    config: JwtConfig,
    keys: Keys,
    /// By the fingerprint of the whole token.
    known: Cache<[u8; 32], Arc<Known>>,
}

enum Keys {
    Fixed(Key),
    Published(Jwks),
}

/// A proved token, and by which set.
struct Known {
    identity: Arc<Identity>,
    proven: Proven,
    set: u64,
}

impl Issuers {
    /// Builds what the configuration says. Issuers that it says nothing new of keep their keys and their memory.
    ///
    /// # Errors
    /// When an issuer's keys cannot be followed.
    pub fn open(&self, configs: &[JwtConfig]) -> Result<Issuers, String> {
        self.open_at(configs, PACE)
    }

    fn open_at(&self, configs: &[JwtConfig], pace: Pace) -> Result<Issuers, String> {
        let open = |config: &JwtConfig| {
            if let Some(same) = self.0.iter().find(|issuer| issuer.config == *config) {
                return Ok(same.clone());
            }
            let keys = match &config.keys {
                JwtKeys::Fixed(key) => Keys::Fixed(key.clone()),
                JwtKeys::At(url) => Keys::Published(Jwks::follow(url.clone(), config.rules.name.clone(), pace)?),
            };
            Ok(Arc::new(Issuer { config: config.clone(), keys, known: Cache::new(KNOWN_MAX) }))
        };
        configs.iter().map(open).collect::<Result<_, String>>().map(Issuers)
    }

    /// Says whose token this is.
    ///
    /// # Errors
    /// What is wrong with it, or `TokenKeysUnavailable` while its issuer's keys are out of reach.
    pub async fn identify(&self, text: &str, now_ns: i64, now: Instant) -> Result<Arc<Identity>, Refusal> {
        let fingerprint = fingerprint(text);
        for issuer in &self.0 {
            if let Some(known) = issuer.known.get(&fingerprint) {
                // A set that is gone proves nothing any more, and a new one may have left the key out.
                if issuer.set(now).await?.is_none_or(|set| set.number == known.set) {
                    known.proven.counts(now_ns)?;
                    return Ok(known.identity.clone());
                }
            }
        }
        let token = Token::parse(text)?;
        let issuer =
            self.0.iter().find(|issuer| issuer.config.rules.issuer == token.issuer()).ok_or(TokenFlaw::Issuer)?;
        let (proven, set) = issuer.prove(&token, now_ns, now).await?;
        let identity = Arc::new(proven.identity.clone());
        issuer.known.insert(fingerprint, Arc::new(Known { identity: identity.clone(), proven, set }));
        Ok(identity)
    }

    /// Issuers with published keys, and how old those are.
    pub fn ages(&self, now: Instant) -> impl Iterator<Item = (&str, Option<Duration>)> {
        self.0.iter().filter_map(move |issuer| match &issuer.keys {
            Keys::Published(jwks) => Some((issuer.config.rules.name.as_str(), jwks.age(now))),
            Keys::Fixed(_) => None,
        })
    }
}

impl Issuer {
    /// The published set that counts now; none where the key is fixed.
    async fn set(&self, now: Instant) -> Result<Option<Good>, Refusal> {
        match &self.keys {
            Keys::Fixed(_) => Ok(None),
            Keys::Published(jwks) => jwks.good(now).await.map(Some).ok_or(Refusal::TokenKeysUnavailable),
        }
    }

    async fn prove(&self, token: &Token<'_>, now_ns: i64, now: Instant) -> Result<(Proven, u64), Refusal> {
        let rules = &self.config.rules;
        // Before any key is looked for: a token that could never be taken makes nobody look.
        let algorithm = token.algorithm(rules)?;
        let jwks = match &self.keys {
            Keys::Fixed(key) => return Ok((token.prove(rules, algorithm, key, now_ns)?, 0)),
            Keys::Published(jwks) => jwks,
        };
        let mut set = jwks.good(now).await.ok_or(Refusal::TokenKeysUnavailable)?;
        if token.key(algorithm, &set.keys).is_err()
            && let Some(newer) = jwks.newer(&set, now).await
        {
            set = newer;
        }
        let key = token.key(algorithm, &set.keys)?;
        Ok((token.prove(rules, algorithm, key, now_ns)?, set.number))
    }
}

#[cfg(test)]
mod jwks_tests;
#[cfg(test)]
pub mod tests;
