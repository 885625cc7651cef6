//! Who asks in the demo: keys of several tenants, made in the key store of the gateway and used again the next time.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::plan::Misstep;
use crate::accounting::core::NanoUsd;
use crate::auth::api_key::{ApiKey, generate};
use crate::auth::store::OwnLimits;
use crate::cli::{keys, text};
use crate::control::edit::KeyEdit;
use crate::control::{Change, Control};
use crate::data_dir::write_secret;

/// Keys that are made, with whose they are and what they may. Nobody but the last two comes near a limit.
const CAST: [(&str, &str, OwnLimits); 5] = [
    ("demo-search", "demo-search", limits(60_000, 20_000_000, 64, 10_000_000_000)),
    ("demo-support", "demo-support", limits(30_000, 10_000_000, 32, 5_000_000_000)),
    ("demo-lab", "demo-lab", limits(30_000, 10_000_000, 16, 1_000_000_000)),
    (HURRIED, "demo-lab", limits(1, 200_000, 4, 1_000_000_000)),
    (PENNILESS, "demo-lab", limits(60_000, 200_000, 4, 1_000)),
];
const HURRIED: &str = "demo-hurried";
const PENNILESS: &str = "demo-penniless";

const fn limits(requests: u32, tokens: u32, concurrency: u32, nano_usd: u64) -> OwnLimits {
    OwnLimits {
        requests_per_minute: Some(requests),
        tokens_per_minute: Some(tokens),
        concurrency: Some(concurrency),
        per_day: Some(NanoUsd(nano_usd)),
    }
}

/// Who the record of changes says it was.
const ACTOR: &str = "demo";

/// The keys, by what they are for.
pub struct Callers {
    pub regular: Vec<String>,
    hurried: Option<String>,
    penniless: Option<String>,
}

impl Callers {
    /// Everybody is the one who has this key.
    pub fn one(key: &str) -> Callers {
        Callers { regular: vec![key.to_owned()], hurried: None, penniless: None }
    }

    /// Makes the keys that are missing, and revokes those that it replaces.
    ///
    /// # Errors
    /// When the key store, or the file that remembers the keys, cannot be written.
    pub fn in_store(control: &Control) -> Result<Callers, String> {
        let file = control.data_dir().path().join("demo.keys.json");
        let mut known: BTreeMap<String, String> = read(&file);
        let stored = control.store().map_err(text)?.list().map_err(text)?;
        for (name, tenant, limits) in CAST {
            let id = known.get(name).and_then(|token| ApiKey::parse(token)).map(|key| key.id().to_owned());
            let last = stored.iter().find(|row| Some(&row.who.key_id) == id.as_ref() && row.revoked_ns.is_none());
            if last.is_some_and(|row| row.who.tenant == tenant && row.who.limits == limits) {
                continue;
            }
            // Revoked keys keep their names.
            let taken = |name: &str| stored.iter().any(|row| row.who.key_name == name);
            let mut names = std::iter::once(name.to_owned()).chain((2..).map(|number: u32| format!("{name}-{number}")));
            let called = names.find(|name| !taken(name)).unwrap_or_default();
            let token = generate().map_err(text)?;
            // The last one ends before it is forgotten, and the new one is remembered before it begins: whatever
            // happens, no key works that nobody knows of.
            if let Some(row) = last {
                let id = row.who.key_id.clone();
                control.apply(ACTOR, Change::RevokeKey { id }, None).map_err(text)?;
            }
            known.insert(name.to_owned(), token.clone());
            write_secret(&file, &serde_json::to_string_pretty(&known).map_err(text)?).map_err(text)?;
            let edit = KeyEdit {
                requests_per_minute: Some(limits.requests_per_minute),
                tokens_per_minute: Some(limits.tokens_per_minute),
                concurrency: Some(limits.concurrency),
                usd_per_day: Some(limits.per_day),
                ..KeyEdit::default()
            };
            keys::create(control, ACTOR, &token, &called, tenant, edit)?;
        }
        let regular = CAST[..3].iter().filter_map(|(name, _, _)| known.remove(*name)).collect();
        Ok(Callers { regular, hurried: known.remove(HURRIED), penniless: known.remove(PENNILESS) })
    }

    pub fn all(&self) -> impl Iterator<Item = &String> {
        self.regular.iter().chain(&self.hurried).chain(&self.penniless)
    }

    /// What can be done wrong with these keys.
    pub fn missteps(&self) -> Vec<Misstep> {
        let mut missteps = vec![Misstep::NoKey, Misstep::UnknownRoute, Misstep::BrokenBody];
        missteps.extend(self.hurried.is_some().then_some(Misstep::TooOften));
        missteps.extend(self.penniless.is_some().then_some(Misstep::Unaffordable));
        missteps
    }

    /// The key for a misstep of the caller with the key `regular`.
    pub fn key_for(&self, misstep: Misstep, regular: &str) -> String {
        match misstep {
            // A wrong one would be a guess, and who guesses is not listened to for a while.
            Misstep::NoKey => String::new(),
            Misstep::UnknownRoute | Misstep::BrokenBody => regular.to_owned(),
            Misstep::TooOften => self.hurried.clone().unwrap_or_default(),
            Misstep::Unaffordable => self.penniless.clone().unwrap_or_default(),
        }
    }
}

/// What the last demo left; nothing if it cannot be read, then keys are made anew.
fn read(file: &PathBuf) -> BTreeMap<String, String> {
    let bytes = std::fs::read(file).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}
