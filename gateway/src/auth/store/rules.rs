//! Limit rules as rows: the words that were given. What they mean is read where the configuration's rules are.

use serde_json::{Map, Value};

use super::sql::{Row, Sql};
use super::{StoreError, json, texts};

#[derive(Clone, Debug, PartialEq)]
pub struct StoredRule {
    pub name: String,
    /// Those of a `[[limits.rules]]`, without its name.
    pub words: Map<String, Value>,
    /// The change that made it what it is.
    pub seq: i64,
}

pub(super) fn rows(db: &dyn Sql) -> Result<Vec<StoredRule>, StoreError> {
    let rows = db.rows("SELECT name, rule, changed_seq FROM #rules ORDER BY name", &[])?;
    let read =
        |row: &Row| Ok(StoredRule { name: row.get("name")?, words: texts(row, "rule")?, seq: row.get("changed_seq")? });
    rows.iter().map(read).collect()
}

pub(super) fn write(db: &dyn Sql, rule: &StoredRule) -> Result<u64, StoreError> {
    let sql = "INSERT INTO #rules (name, rule, changed_seq) VALUES (?1, ?2, ?3) \
               ON CONFLICT (name) DO UPDATE SET rule = excluded.rule, changed_seq = excluded.changed_seq";
    db.execute(sql, &[rule.name.as_str().into(), json(&rule.words).into(), rule.seq.into()])
}

pub(super) fn delete(db: &dyn Sql, name: &str) -> Result<u64, StoreError> {
    db.execute("DELETE FROM #rules WHERE name = ?1", &[name.into()])
}
