//! Tenants as rows. A tenant need not have one: keys name theirs, and so do tokens.

use rusqlite::{Connection, Params, Row, params};

use super::{json, texts};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tenant {
    pub id: String,
    /// For people.
    pub name: Option<String>,
    /// Of all its keys and tokens, beside their own.
    pub tags: Vec<String>,
    /// From then on nobody of it is let in.
    pub disabled_ns: Option<i64>,
    /// The change that made it what it is.
    pub seq: i64,
}

pub(super) fn rows(db: &Connection, which: &str, parameters: impl Params) -> rusqlite::Result<Vec<Tenant>> {
    let sql = format!("SELECT id, name, tags, disabled_ns, changed_seq FROM tenants WHERE {which}");
    db.prepare_cached(&sql)?.query_map(parameters, read)?.collect()
}

fn read(row: &Row<'_>) -> rusqlite::Result<Tenant> {
    Ok(Tenant {
        id: row.get("id")?,
        name: row.get("name")?,
        tags: texts(row, "tags")?,
        disabled_ns: row.get("disabled_ns")?,
        seq: row.get("changed_seq")?,
    })
}

pub(super) fn write(db: &Connection, tenant: &Tenant) -> rusqlite::Result<usize> {
    let sql = "INSERT OR REPLACE INTO tenants (id, name, tags, disabled_ns, changed_seq) VALUES (?1, ?2, ?3, ?4, ?5)";
    let values = params![tenant.id, tenant.name, json(&tenant.tags), tenant.disabled_ns, tenant.seq];
    db.prepare_cached(sql)?.execute(values)
}
