//! Keys as rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::sql::{Row, Sql, Value};
use super::{StoreError, json, parsed, texts};
use crate::accounting::core::NanoUsd;
use crate::auth::identity::Identity;
use crate::ports::Scope;

/// A key as stored. Never the secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRow {
    pub who: Arc<Identity>,
    pub hash: [u8; 32],
    /// The hash before the last rotation, and until when it counts, in Unix nanoseconds.
    pub previous: Option<([u8; 32], i64)>,
    pub created_ns: i64,
    pub expires_ns: Option<i64>,
    pub disabled_ns: Option<i64>,
    pub revoked_ns: Option<i64>,
    /// What its owner wants to remember; nobody here reads it.
    pub metadata: BTreeMap<String, String>,
}

/// The limits that a key has of its own; the configuration's stand where it has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnLimits {
    pub requests_per_minute: Option<u32>,
    pub tokens_per_minute: Option<u32>,
    pub concurrency: Option<u32>,
    pub per_day: Option<NanoUsd>,
}

const COLUMNS: &str = "id, tenant, name, hash, previous_hash, previous_until_ns, created_ns, expires_ns, disabled_ns, \
                       revoked_ns, user_id, tags, metadata, scopes, models, networks, requests_per_minute, \
                       tokens_per_minute, concurrency, nano_usd_per_day, changed_seq";

/// A key, and the change that made it what it is.
pub type Found = (KeyRow, i64);

/// Whether a key may take the place of another with its id.
#[derive(Clone, Copy)]
pub enum Place {
    New,
    Same,
}

impl Place {
    fn on_conflict(self) -> &'static str {
        match self {
            Place::New => "ON CONFLICT DO NOTHING",
            Place::Same => {
                "ON CONFLICT (id) DO UPDATE SET hash = excluded.hash, previous_hash = excluded.previous_hash, \
                 previous_until_ns = excluded.previous_until_ns, expires_ns = excluded.expires_ns, \
                 disabled_ns = excluded.disabled_ns, revoked_ns = excluded.revoked_ns, user_id = excluded.user_id, \
                 tags = excluded.tags, metadata = excluded.metadata, scopes = excluded.scopes, \
                 models = excluded.models, networks = excluded.networks, \
                 requests_per_minute = excluded.requests_per_minute, \
                 tokens_per_minute = excluded.tokens_per_minute, concurrency = excluded.concurrency, \
                 nano_usd_per_day = excluded.nano_usd_per_day, changed_seq = excluded.changed_seq"
            }
        }
    }
}

pub(super) fn rows(db: &dyn Sql, which: &str, values: &[Value]) -> Result<Vec<Found>, StoreError> {
    db.rows(&format!("SELECT {COLUMNS} FROM #keys {which}"), values)?.iter().map(read).collect()
}

/// Returns how many rows it wrote: none where the key's tenant has one of its name.
pub(super) fn write(db: &dyn Sql, key: &KeyRow, seq: i64, place: Place) -> Result<u64, StoreError> {
    let who = &key.who;
    let scopes = who.scopes.as_ref().map(|scopes| json(&scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>()));
    let networks = who.networks.as_ref();
    let networks = networks.map(|networks| json(&networks.iter().map(ToString::to_string).collect::<Vec<_>>()));
    let per_day = who.limits.per_day.map(|usd| i64::try_from(usd.0).unwrap_or(i64::MAX));
    // In the order of `COLUMNS`.
    let values = [
        who.key_id.clone().into(),
        who.tenant.clone().into(),
        who.key_name.clone().into(),
        key.hash.into(),
        key.previous.map(|(hash, _)| hash).into(),
        key.previous.map(|(_, until)| until).into(),
        key.created_ns.into(),
        key.expires_ns.into(),
        key.disabled_ns.into(),
        key.revoked_ns.into(),
        who.user.clone().into(),
        json(&who.tags).into(),
        json(&key.metadata).into(),
        scopes.into(),
        who.models.as_ref().map(json).into(),
        networks.into(),
        who.limits.requests_per_minute.into(),
        who.limits.tokens_per_minute.into(),
        who.limits.concurrency.into(),
        per_day.into(),
        seq.into(),
    ];
    let places: Vec<String> = (1..=values.len()).map(|at| format!("?{at}")).collect();
    let sql = format!("INSERT INTO #keys ({COLUMNS}) VALUES ({}) {}", places.join(", "), place.on_conflict());
    db.execute(&sql, &values)
}

fn read(row: &Row) -> Result<Found, StoreError> {
    let words = |column| texts::<Option<Vec<String>>>(row, column);
    let scopes = words("scopes")?.map(|words| words.iter().map(|word| parsed("scopes", Scope::parse(word))).collect());
    let networks =
        words("networks")?.map(|words| words.iter().map(|word| parsed("networks", word.parse().ok())).collect());
    let who = Identity {
        tenant: row.get("tenant")?,
        key_id: row.get("id")?,
        key_name: row.get("name")?,
        user: row.get("user_id")?,
        tags: texts(row, "tags")?,
        tier: None,
        scopes: scopes.transpose()?,
        models: texts(row, "models")?,
        networks: networks.transpose()?,
        limits: OwnLimits {
            requests_per_minute: row.get("requests_per_minute")?,
            tokens_per_minute: row.get("tokens_per_minute")?,
            concurrency: row.get("concurrency")?,
            per_day: row.get::<Option<i64>>("nano_usd_per_day")?.map(|nano| NanoUsd(nano.max(0).unsigned_abs())),
        },
    };
    let previous: Option<[u8; 32]> = row.get("previous_hash")?;
    let key = KeyRow {
        who: Arc::new(who),
        hash: row.get("hash")?,
        previous: previous.zip(row.get("previous_until_ns")?),
        created_ns: row.get("created_ns")?,
        expires_ns: row.get("expires_ns")?,
        disabled_ns: row.get("disabled_ns")?,
        revoked_ns: row.get("revoked_ns")?,
        metadata: texts(row, "metadata")?,
    };
    Ok((key, row.get("changed_seq")?))
}
