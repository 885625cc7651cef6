//! Limit rules as rows: the words that were given. What they mean is read where the configuration's rules are.

use rusqlite::{Connection, params};
use serde_json::{Map, Value};

use super::{json, texts};

#[derive(Clone, Debug, PartialEq)]
pub struct StoredRule {
    pub name: String,
    /// Those of a `[[limits.rules]]`, without its name.
    pub words: Map<String, Value>,
    /// The change that made it what it is.
    pub seq: i64,
}

pub(super) fn rows(db: &Connection) -> rusqlite::Result<Vec<StoredRule>> {
    let mut query = db.prepare_cached("SELECT name, rule, changed_seq FROM rules ORDER BY name")?;
    let rows = query.query_map([], |row| {
        Ok(StoredRule { name: row.get("name")?, words: texts(row, "rule")?, seq: row.get("changed_seq")? })
    })?;
    rows.collect()
}

pub(super) fn write(db: &Connection, rule: &StoredRule) -> rusqlite::Result<usize> {
    let sql = "INSERT OR REPLACE INTO rules (name, rule, changed_seq) VALUES (?1, ?2, ?3)";
    db.prepare_cached(sql)?.execute(params![rule.name, json(&rule.words), rule.seq])
}

pub(super) fn delete(db: &Connection, name: &str) -> rusqlite::Result<usize> {
    db.prepare_cached("DELETE FROM rules WHERE name = ?1")?.execute([name])
}
