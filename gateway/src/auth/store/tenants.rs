//! Tenants as rows. A tenant need not have one: keys name theirs, and so do tokens.

use super::sql::{Row, Sql, Value};
use super::{StoreError, json, texts};

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

pub(super) fn rows(db: &dyn Sql, which: &str, values: &[Value]) -> Result<Vec<Tenant>, StoreError> {
    let sql = format!("SELECT id, name, tags, disabled_ns, changed_seq FROM #tenants {which}");
    db.rows(&sql, values)?.iter().map(read).collect()
}

fn read(row: &Row) -> Result<Tenant, StoreError> {
    Ok(Tenant {
        id: row.get("id")?,
        name: row.get("name")?,
        tags: texts(row, "tags")?,
        disabled_ns: row.get("disabled_ns")?,
        seq: row.get("changed_seq")?,
    })
}

pub(super) fn write(db: &dyn Sql, tenant: &Tenant) -> Result<u64, StoreError> {
    let sql = "INSERT INTO #tenants (id, name, tags, disabled_ns, changed_seq) VALUES (?1, ?2, ?3, ?4, ?5) \
               ON CONFLICT (id) DO UPDATE SET name = excluded.name, tags = excluded.tags, \
               disabled_ns = excluded.disabled_ns, changed_seq = excluded.changed_seq";
    let Tenant { id, name, tags, disabled_ns, seq } = tenant.clone();
    db.execute(sql, &[id.into(), name.into(), json(&tags).into(), disabled_ns.into(), seq.into()])
}
