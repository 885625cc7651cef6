//! The record of changes: a chain, in which every entry is sealed together with the one before it.
//!
//! The seal is keyed by the pepper, so whoever can write the file alone cannot mend the chain after a change. An end that is
//! cut off shows as long as `head` is left; whoever noted a head elsewhere sees that, too.

use std::fmt;

use super::StoreError;
use super::sql::{Row, Sql};

/// What seals are made with.
pub struct ChainKey(pub [u8; 32]);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Without gaps; also the number that rows carry which this change made what they are.
    pub n: i64,
    pub at_ns: i64,
    pub actor: String,
    /// JSON.
    pub change: String,
    pub previous_hash: [u8; 32],
    pub hash: [u8; 32],
}

/// The last entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub n: i64,
    pub hash: [u8; 32],
}

impl Head {
    pub(super) fn read(row: &Row) -> Result<Head, StoreError> {
        Ok(Head { n: row.get("n")?, hash: row.get("hash")? })
    }

    pub(super) fn next(self, key: &ChainKey, at_ns: i64, actor: &str, change: String) -> Entry {
        let (n, actor) = (self.n + 1, actor.to_owned());
        let entry = Entry { n, at_ns, actor, change, previous_hash: self.hash, hash: [0; 32] };
        Entry { hash: entry.seal(key), ..entry }
    }
}

impl Entry {
    fn seal(&self, key: &ChainKey) -> [u8; 32] {
        let mut hash = blake3::Hasher::new_keyed(&key.0);
        hash.update(&self.previous_hash).update(&self.n.to_le_bytes()).update(&self.at_ns.to_le_bytes());
        hash.update(&(self.actor.len() as u64).to_le_bytes()).update(self.actor.as_bytes());
        *hash.update(self.change.as_bytes()).finalize().as_bytes()
    }

    fn head(&self) -> Head {
        Head { n: self.n, hash: self.hash }
    }
}

/// Where the record was tampered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Broken {
    /// It is not what was written.
    Changed { n: i64 },
    /// From the first to the last.
    Missing { from: i64, to: i64 },
    /// It is sealed, and not after the one before it.
    Unchained { n: i64 },
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Broken::Changed { n } => write!(f, "entry {n} was changed after it was written"),
            Broken::Missing { from, to } if from == to => write!(f, "entry {from} is missing"),
            Broken::Missing { from, to } => write!(f, "entries {from} to {to} are missing"),
            Broken::Unchained { n } => write!(f, "entry {n} does not follow the one before it"),
        }
    }
}

/// Follows the chain as it is read.
pub struct Verifier<'k> {
    key: &'k ChainKey,
    last: Option<Head>,
    pub broken: Vec<Broken>,
}

impl<'k> Verifier<'k> {
    pub fn new(key: &'k ChainKey) -> Verifier<'k> {
        Verifier { key, last: None, broken: Vec::new() }
    }

    pub fn read(&mut self, entry: &Entry) {
        let last = self.last.replace(entry.head());
        if entry.seal(self.key) != entry.hash {
            self.broken.push(Broken::Changed { n: entry.n });
        }
        match last {
            Some(last) if entry.n != last.n + 1 => {
                self.broken.push(Broken::Missing { from: last.n + 1, to: entry.n - 1 });
            }
            Some(last) if entry.previous_hash != last.hash => self.broken.push(Broken::Unchained { n: entry.n }),
            Some(_) => {}
            // What it all begins with follows nothing.
            None if entry.previous_hash == [0; 32] => {}
            None => self.broken.push(Broken::Missing { from: entry.n - 1, to: entry.n - 1 }),
        }
    }

    /// The end must be where the store says that it is.
    pub fn end(mut self, head: Option<Head>) -> Vec<Broken> {
        match (self.last, head) {
            (Some(last), Some(head)) if last.n < head.n => {
                self.broken.push(Broken::Missing { from: last.n + 1, to: head.n });
            }
            (Some(last), Some(head)) if last != head => self.broken.push(Broken::Unchained { n: head.n }),
            (Some(last), None) => self.broken.push(Broken::Missing { from: last.n + 1, to: last.n + 1 }),
            // Before the first change there is nothing to seal.
            (None, Some(head)) if head.hash != [0; 32] => {
                self.broken.push(Broken::Missing { from: head.n, to: head.n })
            }
            _ => {}
        }
        self.broken
    }
}

pub(super) fn rows(db: &dyn Sql, after: i64, most: u32) -> Result<Vec<Entry>, StoreError> {
    let sql = "SELECT n, at_ns, actor, change, previous_hash, hash FROM #audit WHERE n > ?1 ORDER BY n LIMIT ?2";
    let read = |row: &Row| {
        Ok(Entry {
            n: row.get("n")?,
            at_ns: row.get("at_ns")?,
            actor: row.get("actor")?,
            change: row.get("change")?,
            previous_hash: row.get("previous_hash")?,
            hash: row.get("hash")?,
        })
    };
    db.rows(sql, &[after.into(), most.into()])?.iter().map(read).collect()
}

pub(super) fn write(db: &dyn Sql, entry: Entry) -> Result<Head, StoreError> {
    let head = entry.head();
    let Entry { n, at_ns, actor, change, previous_hash, hash } = entry;
    let values = [n.into(), at_ns.into(), actor.into(), change.into(), previous_hash.into(), hash.into()];
    db.execute("INSERT INTO #audit VALUES (?1, ?2, ?3, ?4, ?5, ?6)", &values)?;
    write_head(db, head)?;
    Ok(head)
}

pub(super) fn write_head(db: &dyn Sql, head: Head) -> Result<u64, StoreError> {
    db.execute("UPDATE #head SET n = ?1, hash = ?2", &[head.n.into(), head.hash.into()])
}

pub(super) fn head(db: &dyn Sql) -> Result<Option<Head>, StoreError> {
    db.rows("SELECT n, hash FROM #head", &[])?.first().map(Head::read).transpose()
}
