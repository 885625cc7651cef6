//! Whether a token is what it says it is, and whose. No I/O and no clock: keys and the time are passed in.
//!
//! Everything that is wrong has a name (`TokenFlaw`). A token chooses nothing: which keys and algorithms may be used is the
//! configuration's word, and a header that brings a key, or says where to fetch one, is refused as it stands.

use std::collections::BTreeSet;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Number, Value};

use super::keys::{Algorithm, Key, Named};
use crate::auth::identity::Identity;
use crate::ports::Scope;
use crate::refusal::TokenFlaw;

const TOKEN_BYTES_MAX: usize = 8 << 10;
const KEY_ID_BYTES_MAX: usize = 256;
/// As of names that operators give.
const NAME_BYTES_MAX: usize = 64;
const USER_BYTES_MAX: usize = 256;
/// The end of the year 9999: a later one is a mistake.
const SECONDS_MAX: f64 = 253_402_300_799.0;

/// What an issuer's tokens must be, and what they say of their bearer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// What we call the issuer.
    pub name: String,
    /// `iss`, to the letter.
    pub issuer: String,
    /// One of `aud` must be one of these.
    pub audience: Vec<String>,
    pub algorithms: Vec<Algorithm>,
    /// How far clocks may differ.
    pub leeway: Duration,
    pub claims: Claims,
}

/// Where a token says who its bearer is, as JSON pointers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    pub tenant: Tenant,
    pub user: String,
    /// `None`: the token bounds nothing.
    pub scopes: Option<String>,
    pub tier: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tenant {
    /// Everybody's of this issuer.
    Fixed(String),
    At(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    alg: String,
    typ: Option<String>,
    kid: Option<String>,
    /// Thumbprints of certificates: some issuers send them, and nobody here reads them.
    #[serde(rename = "x5t")]
    _x5t: Option<IgnoredAny>,
    #[serde(rename = "x5t#S256")]
    _x5t_s256: Option<IgnoredAny>,
}

/// The claims that every token must have, each of its own type and once.
#[derive(Deserialize)]
struct Registered {
    iss: String,
    aud: Audience,
    exp: Number,
    nbf: Option<Number>,
    #[serde(rename = "iat")]
    _iat: Option<Number>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Several(Vec<String>),
}

/// A token of the right form. Nothing that it says is believed yet.
pub struct Token<'t> {
    signed: &'t str,
    /// In base64, all of it as it must be.
    signature: &'t str,
    header: Header,
    registered: Registered,
    claims: Value,
}

/// What a token has proved, and between which moments it counts, in Unix nanoseconds.
#[derive(Clone, Debug)]
pub struct Proven {
    pub identity: Identity,
    pub from_ns: i64,
    pub until_ns: i64,
}

impl<'t> Token<'t> {
    /// # Errors
    /// `Malformed`, or `Claims` where one is missing or of another type.
    pub fn parse(text: &'t str) -> Result<Token<'t>, TokenFlaw> {
        if text.len() > TOKEN_BYTES_MAX {
            return Err(TokenFlaw::Malformed);
        }
        let (signed, signature) = text.rsplit_once('.').ok_or(TokenFlaw::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(TokenFlaw::Malformed)?;
        // No padding, no other alphabet, no bits to spare: one token has one spelling.
        let bytes = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenFlaw::Malformed);
        let (header, payload, _) = (bytes(header)?, bytes(payload)?, bytes(signature)?);
        let claims = object(&payload)?;
        // Once more from the bytes, into fields: what is there twice could be read either way.
        object(&header)?;
        let header: Header = serde_json::from_slice(&header).map_err(|_| TokenFlaw::Malformed)?;
        let is_token = |typ: &str| {
            let essence = typ.strip_prefix("application/").unwrap_or(typ);
            essence.eq_ignore_ascii_case("jwt") || essence.eq_ignore_ascii_case("at+jwt")
        };
        let is_key_id = |id: &str| id.len() <= KEY_ID_BYTES_MAX;
        if !header.typ.as_deref().is_none_or(is_token) || !header.kid.as_deref().is_none_or(is_key_id) {
            return Err(TokenFlaw::Malformed);
        }
        let registered = serde_json::from_slice(&payload).map_err(|_| TokenFlaw::Claims)?;
        Ok(Token { signed, signature, header, registered, claims })
    }

    /// Who says to have made it.
    pub fn issuer(&self) -> &str {
        &self.registered.iss
    }

    /// The algorithm, if this issuer may use it.
    ///
    /// # Errors
    /// `Algorithm`, also for `none`.
    pub fn algorithm(&self, rules: &Rules) -> Result<Algorithm, TokenFlaw> {
        let algorithm = self.header.alg.parse().ok().filter(|algorithm| rules.algorithms.contains(algorithm));
        algorithm.ok_or(TokenFlaw::Algorithm)
    }

    /// The key of a set that it names. Without a name there must be no choice.
    ///
    /// # Errors
    /// `UnknownKey` if there is none that this algorithm may be used with.
    pub fn key<'k>(&self, algorithm: Algorithm, set: &'k [Named]) -> Result<&'k Key, TokenFlaw> {
        let fits = |named: &&Named| named.key.fits(algorithm) && named.algorithm.is_none_or(|only| only == algorithm);
        let mut found =
            set.iter().filter(fits).filter(|named| self.header.kid.is_none() || named.id == self.header.kid);
        match (found.next(), found.next()) {
            (Some(named), None) => Ok(&named.key),
            _ => Err(TokenFlaw::UnknownKey),
        }
    }

    /// Who its bearer is, once `key` has proved it.
    ///
    /// # Errors
    /// `Signature` before anything else; then `Issuer`, `Audience`, `Expired`, `NotYet`, `Claims`.
    pub fn prove(&self, rules: &Rules, algorithm: Algorithm, key: &Key, now_ns: i64) -> Result<Proven, TokenFlaw> {
        if !key.has_signed(algorithm, self.signed.as_bytes(), self.signature) {
            return Err(TokenFlaw::Signature);
        }
        if self.registered.iss != rules.issuer {
            return Err(TokenFlaw::Issuer);
        }
        let is_meant = |audience: &String| rules.audience.contains(audience);
        let is_for_us = match &self.registered.aud {
            Audience::One(audience) => is_meant(audience),
            Audience::Several(several) => several.iter().any(is_meant),
        };
        if !is_for_us {
            return Err(TokenFlaw::Audience);
        }
        let leeway = i64::try_from(rules.leeway.as_nanos()).unwrap_or(i64::MAX);
        let until_ns = unix_ns(&self.registered.exp)?.saturating_add(leeway);
        let from_ns = self.registered.nbf.as_ref().map(unix_ns).transpose()?;
        let from_ns = from_ns.map_or(i64::MIN, |from| from.saturating_sub(leeway));
        let identity = self.identity(rules)?;
        let proven = Proven { identity, from_ns, until_ns };
        proven.counts(now_ns)?;
        Ok(proven)
    }

    fn identity(&self, rules: &Rules) -> Result<Identity, TokenFlaw> {
        let text = |at: &str, most: usize| {
            let text = self.claims.pointer(at).and_then(Value::as_str).ok_or(TokenFlaw::Claims)?;
            let is_name = !text.is_empty() && text.len() <= most && !text.chars().any(char::is_control);
            if is_name { Ok(text.to_owned()) } else { Err(TokenFlaw::Claims) }
        };
        let tenant = match &rules.claims.tenant {
            Tenant::Fixed(tenant) => tenant.clone(),
            Tenant::At(at) => text(at, NAME_BYTES_MAX)?,
        };
        let tier = rules.claims.tier.as_ref().filter(|at| self.claims.pointer(at).is_some());
        let scopes = rules.claims.scopes.as_ref().map(|at| scopes(self.claims.pointer(at)));
        let user = text(&rules.claims.user, USER_BYTES_MAX)?;
        let tier = tier.map(|at| text(at, NAME_BYTES_MAX)).transpose()?;
        Ok(Identity { scopes: scopes.transpose()?, ..rules.bearer(tenant, user, tier) })
    }
}

impl Rules {
    /// Who has a token that says this.
    pub fn bearer(&self, tenant: String, user: String, tier: Option<String>) -> Identity {
        // Tenants never share what is counted by key.
        let key_id = match &self.claims.tenant {
            Tenant::Fixed(_) => format!("jwt:{}", self.name),
            Tenant::At(_) => format!("jwt:{}/{tenant}", self.name),
        };
        Identity { tenant, key_id, key_name: self.name.clone(), user: Some(user), tier, ..Identity::default() }
    }
}

impl Proven {
    /// # Errors
    /// `Expired` or `NotYet`.
    pub fn counts(&self, now_ns: i64) -> Result<(), TokenFlaw> {
        if now_ns >= self.until_ns {
            Err(TokenFlaw::Expired)
        } else if now_ns < self.from_ns {
            Err(TokenFlaw::NotYet)
        } else {
            Ok(())
        }
    }
}

/// Serde would also take a list for a structure.
fn object(json: &[u8]) -> Result<Value, TokenFlaw> {
    let value: Value = serde_json::from_slice(json).map_err(|_| TokenFlaw::Malformed)?;
    if value.is_object() { Ok(value) } else { Err(TokenFlaw::Malformed) }
}

/// A list of words, or words with blanks between them (RFC 8693 4.2). Those that we do not know are for others; without
/// any, nothing is allowed.
fn scopes(found: Option<&Value>) -> Result<BTreeSet<Scope>, TokenFlaw> {
    match found {
        None => Ok(BTreeSet::new()),
        Some(Value::String(words)) => Ok(words.split(' ').filter_map(Scope::parse).collect()),
        Some(Value::Array(words)) => {
            let words: Option<Vec<&str>> = words.iter().map(Value::as_str).collect();
            Ok(words.ok_or(TokenFlaw::Claims)?.into_iter().filter_map(Scope::parse).collect())
        }
        Some(_) => Err(TokenFlaw::Claims),
    }
}

/// Seconds since 1970, whole or not (RFC 7519 2), as nanoseconds.
fn unix_ns(seconds: &Number) -> Result<i64, TokenFlaw> {
    let seconds = seconds.as_f64().filter(|seconds| (0.0..=SECONDS_MAX).contains(seconds)).ok_or(TokenFlaw::Claims)?;
    // Later than what nanoseconds can say (the year 2262) is as good as never.
    Ok((seconds * 1e9) as i64)
}
