//! All that operators decided, as one document, and back into an empty store: the same keys, tenants and rules.
//!
//! Of a key's secret it holds what the store holds, a hash that says nothing without the pepper; the pepper goes its own way.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::edit::{KeyEdit, invalid, items, known, text, word};
use super::{CheckedRule, Control, Denied, view};
use crate::auth::Identity;
use crate::auth::api_key::Pepper;
use crate::auth::store::{KeyRow, StoredRule, Tenant, Writing};
use crate::config::Config;

/// Of the document's form.
const VERSION: u64 = 1;

/// # Errors
/// When the store cannot be read.
pub fn export(control: &Control) -> Result<Value, Denied> {
    let store = control.store()?;
    let rule = |rule: StoredRule| {
        let mut object = Map::from_iter([("name".to_owned(), Value::from(rule.name))]);
        object.extend(rule.words);
        Value::Object(object)
    };
    Ok(json!({
        "version": VERSION,
        "pepper": control.pepper()?.mark(),
        "tenants": store.tenants()?.iter().map(|tenant| without_nulls(view::tenant(tenant))).collect::<Vec<_>>(),
        "rules": store.rules()?.into_iter().map(rule).collect::<Vec<_>>(),
        "keys": store.list()?.iter().map(key).collect::<Vec<_>>(),
    }))
}

fn key(key: &KeyRow) -> Value {
    let mut object = without_nulls(view::key(key));
    object["hash"] = hex(&key.hash).into();
    if let Some((hash, _)) = key.previous {
        object["previous_hash"] = hex(&hash).into();
    }
    object
}

/// TOML has none.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(object) => Value::Object(object.into_iter().filter(|(_, value)| !value.is_null()).collect()),
        other => other,
    }
}

/// A document that was read whole.
pub struct Import {
    pepper: String,
    tenants: Vec<Tenant>,
    rules: Vec<CheckedRule>,
    keys: Vec<KeyRow>,
}

const KEY_ONLY: [&str; 9] =
    ["id", "name", "tenant", "created", "disabled", "revoked", "previous_secret_until", "hash", "previous_hash"];

impl Import {
    /// # Errors
    /// `Invalid`, with the path of what cannot be read.
    pub fn read(document: &Value, config: &Config) -> Result<Import, Denied> {
        let object = document.as_object().ok_or_else(|| invalid("document", "must be an export of glassgate"))?;
        known(object, &["version", "pepper", "tenants", "rules", "keys"])?;
        if object.get("version").and_then(Value::as_u64) != Some(VERSION) {
            return Err(invalid("version", format!("must be {VERSION}: other versions are of other programs")));
        }
        let nothing = json!([]);
        let list = |name: &str| object.get(name).unwrap_or(&nothing);
        Ok(Import {
            pepper: text("pepper", object.get("pepper").unwrap_or(&Value::Null))?.to_owned(),
            tenants: items("tenants", list("tenants"), tenant)?,
            rules: items("rules", list("rules"), |path, value| rule(path, value, config))?,
            keys: items("keys", list("keys"), read_key)?,
        })
    }

    /// Into a store that is empty.
    pub(super) fn write(self, writing: &Writing<'_>, pepper: &Pepper) -> Result<Value, Denied> {
        if !writing.is_empty()? {
            return Err(Denied::Conflict(
                "there are keys, tenants or rules already; import into an empty folder or database".into(),
            ));
        }
        if !self.keys.is_empty() && self.pepper != pepper.mark() {
            return Err(Denied::Conflict(
                "these keys were made with another pepper; put the file `pepper` of their folder into this one first, or what it \
                 holds into `auth.pepper`"
                    .into(),
            ));
        }
        for key in &self.keys {
            if !writing.add_key(key)? {
                let who = &key.who;
                return Err(Denied::Conflict(format!(
                    "there are two keys `{}/{}` or `{}`",
                    who.tenant, who.key_name, who.key_id
                )));
            }
        }
        let seq = writing.seq();
        for tenant in &self.tenants {
            writing.put_tenant(&Tenant { seq, ..tenant.clone() })?;
        }
        for CheckedRule { name, words } in &self.rules {
            writing.put_rule(&StoredRule { name: name.clone(), words: words.clone(), seq })?;
        }
        Ok(json!({
            "change": "import",
            "keys": self.keys.iter().map(|key| &key.who.key_id).collect::<Vec<_>>(),
            "tenants": self.tenants.iter().map(|tenant| &tenant.id).collect::<Vec<_>>(),
            "rules": self.rules.iter().map(|rule| &rule.name).collect::<Vec<_>>(),
        }))
    }
}

/// The fields of one thing in the document.
struct Item<'v> {
    path: &'v str,
    fields: &'v Map<String, Value>,
}

impl<'v> Item<'v> {
    fn new(path: &'v str, value: &'v Value, names: &[&str]) -> Result<Item<'v>, Denied> {
        let fields = value.as_object().ok_or_else(|| invalid(path, "must be an object"))?;
        known(fields, names).map_err(|denied| below(path, denied))?;
        Ok(Item { path, fields })
    }

    fn at(&self, name: &str) -> String {
        format!("{}.{name}", self.path)
    }

    fn text(&self, name: &str) -> Result<Option<&'v str>, Denied> {
        self.fields.get(name).map(|value| text(&self.at(name), value)).transpose()
    }

    fn word(&self, name: &str) -> Result<String, Denied> {
        let found = self.text(name)?.unwrap_or_default();
        word(&self.at(name), found, 64)?;
        Ok(found.to_owned())
    }

    fn moment(&self, name: &str) -> Result<Option<i64>, Denied> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let moment = OffsetDateTime::parse(text, &Rfc3339).ok();
        let moment = moment.and_then(|moment| i64::try_from(moment.unix_timestamp_nanos()).ok());
        moment.map(Some).ok_or_else(|| invalid(&self.at(name), "must be a moment such as \"2027-01-31T12:00:00Z\""))
    }

    fn hash(&self, name: &str) -> Result<Option<[u8; 32]>, Denied> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        unhex(text).map(Some).ok_or_else(|| invalid(&self.at(name), "must have 64 hexadecimal digits"))
    }
}

fn below(path: &str, denied: Denied) -> Denied {
    match denied {
        Denied::Invalid { param, why } => {
            Denied::Invalid { param: param.map(|param| format!("{path}.{param}")), why: format!("`{path}`: {why}") }
        }
        other => other,
    }
}

fn tenant(path: &str, value: &Value) -> Result<Tenant, Denied> {
    let item = Item::new(path, value, &["id", "name", "tags", "disabled"])?;
    let tags = item
        .fields
        .get("tags")
        .map(|tags| items(&item.at("tags"), tags, |path, tag| text(path, tag).map(str::to_owned)));
    Ok(Tenant {
        id: item.word("id")?,
        name: item.text("name")?.map(str::to_owned),
        tags: tags.transpose()?.unwrap_or_default(),
        disabled_ns: item.moment("disabled")?,
        seq: 0,
    })
}

fn rule(path: &str, value: &Value, config: &Config) -> Result<CheckedRule, Denied> {
    let mut words = value.as_object().cloned().ok_or_else(|| invalid(path, "must be an object"))?;
    let name = words.remove("name").unwrap_or_default();
    CheckedRule::new(text(&format!("{path}.name"), &name)?, words, config).map_err(|denied| below(path, denied))
}

fn read_key(path: &str, value: &Value) -> Result<KeyRow, Denied> {
    let names: Vec<&str> = KEY_ONLY.into_iter().chain(super::edit::FIELDS).collect();
    let item = Item::new(path, value, &names)?;
    let settings = item.fields.iter().filter(|(name, _)| !KEY_ONLY.contains(&name.as_str()));
    let settings = settings.map(|(name, value)| (name.clone(), value.clone())).collect();
    let edit = KeyEdit::read(&settings, 0).map_err(|denied| below(path, denied))?;
    let missing = |name: &str| invalid(&item.at(name), "is missing");
    let who = Identity {
        key_id: item.word("id")?,
        key_name: item.word("name")?,
        tenant: item.word("tenant")?,
        ..Identity::default()
    };
    let mut row = KeyRow {
        who: Arc::new(who),
        hash: item.hash("hash")?.ok_or_else(|| missing("hash"))?,
        previous: item.hash("previous_hash")?.zip(item.moment("previous_secret_until")?),
        created_ns: item.moment("created")?.ok_or_else(|| missing("created"))?,
        expires_ns: None,
        disabled_ns: item.moment("disabled")?,
        revoked_ns: item.moment("revoked")?,
        metadata: Default::default(),
    };
    edit.apply(&mut row);
    Ok(row)
}

pub fn hex(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(bytes)
}
