use std::collections::BTreeMap;
use std::sync::Arc;

use rusqlite::Connection;

use super::*;
use crate::accounting::core::NanoUsd;
use crate::auth::identity::Identity;

fn row(id: &str, tenant: &str, name: &str) -> KeyRow {
    let who = Identity { key_id: id.into(), tenant: tenant.into(), key_name: name.into(), ..Identity::default() };
    KeyRow {
        who: Arc::new(who),
        hash: [7; 32],
        previous: None,
        created_ns: 1,
        expires_ns: None,
        disabled_ns: None,
        revoked_ns: None,
        metadata: BTreeMap::new(),
    }
}

impl KeyStore {
    /// Adds a key and tells nobody why; `false` if its tenant has one of this name.
    pub fn add(&self, key: &KeyRow) -> Result<bool, StoreError> {
        self.by(|writing| writing.add_key(key))
    }

    pub fn change(&self, id: &str, change: impl FnOnce(&mut KeyRow)) -> KeyRow {
        let (mut row, _) = self.key(id).unwrap().unwrap();
        change(&mut row);
        self.by(|writing| writing.put_key(&row)).unwrap();
        row
    }

    pub fn put(&self, tenant: &Tenant) {
        self.by(|writing| writing.put_tenant(tenant)).unwrap();
    }

    fn by<T>(&self, change: impl FnOnce(&Writing<'_>) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut writing = self.write()?;
        let done = change(&writing)?;
        writing.record(&ChainKey([7; 32]), 7, "test", "{}".into())?;
        writing.commit()?;
        Ok(done)
    }
}

fn open(path: &std::path::Path) -> Result<KeyStore, OpenError> {
    KeyStore::open(&Location::File(path.to_owned()))
}

fn store() -> (tempfile::TempDir, KeyStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("keys.sqlite")).unwrap();
    (folder, store)
}

/// Both that ever were: as the first version made it, and with the columns that came without a version.
#[test]
fn a_store_of_an_earlier_version_keeps_its_keys_and_learns_what_is_new() {
    let added =
        "ALTER TABLE keys ADD COLUMN tokens_per_minute INTEGER; ALTER TABLE keys ADD COLUMN concurrency INTEGER;
                 ALTER TABLE keys ADD COLUMN nano_usd_per_day INTEGER;
                 UPDATE keys SET tokens_per_minute = 70, concurrency = 2, nano_usd_per_day = 1500000000;";
    for (later, limits) in [
        ("", OwnLimits { requests_per_minute: Some(7), ..OwnLimits::default() }),
        (
            added,
            OwnLimits {
                requests_per_minute: Some(7),
                tokens_per_minute: Some(70),
                concurrency: Some(2),
                per_day: Some(NanoUsd(1_500_000_000)),
            },
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.sqlite");
        Connection::open(&path)
            .unwrap()
            .execute_batch(&format!(
                "PRAGMA journal_mode = WAL;
                 CREATE TABLE keys (id TEXT PRIMARY KEY NOT NULL, name TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
                                    hash BLOB NOT NULL, created_ns INTEGER NOT NULL, revoked_ns INTEGER,
                                    requests_per_minute INTEGER) WITHOUT ROWID;
                 INSERT INTO keys VALUES ('a', 'alice', 'acme', zeroblob(32), 1, NULL, 7), ('b', 'bob', 'acme', zeroblob(32), 2, 5, 7);
                 {later}"
            ))
            .unwrap();
        let store = open(&path).unwrap();
        let mut alice = row("a", "acme", "alice");
        alice.hash = [0; 32];
        Arc::make_mut(&mut alice.who).limits = limits;
        let found = store.list().unwrap();
        assert_eq!((&found[0], found[1].revoked_ns, found.len()), (&alice, Some(5), 2));
        assert_eq!(open(&path).unwrap().list().unwrap(), found, "a second open changes nothing");
        assert!(store.add(&row("c", "other", "alice")).unwrap(), "names are a tenant's own now");
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
        let newer = open(&path).err().unwrap().to_string();
        assert!(newer.contains("newer glassgate"), "{newer}");
    }
}

#[test]
fn of_many_who_bring_a_store_up_to_date_at_once_one_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.sqlite");
    let old = include_str!("migrations/0000_begin.sql");
    let add = "INSERT INTO keys VALUES ('a', 'alice', 'acme', zeroblob(32), 1, NULL, 7);";
    Connection::open(&path).unwrap().execute_batch(&format!("PRAGMA journal_mode = WAL; {old} {add}")).unwrap();
    let together = std::sync::Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                together.wait();
                assert_eq!(open(&path).unwrap().list().unwrap().len(), 1);
            });
        }
    });
}

#[test]
fn a_list_that_cannot_be_read_is_an_error_and_not_a_shorter_list() {
    for (column, value) in
        [("scopes", "[\"everything\"]"), ("networks", "[\"10.0.0.1/8\"]"), ("models", "{}"), ("tags", "nope")]
    {
        let (folder, store) = store();
        assert!(store.add(&row("a", "acme", "alice")).unwrap());
        let db = Connection::open(folder.path().join("keys.sqlite")).unwrap();
        db.execute(&format!("UPDATE keys SET {column} = ?1"), [value]).unwrap();
        assert!(store.list().unwrap_err().to_string().contains(column), "{column}");
    }
}

/// A record of four changes, what is wrong with it after `harm`, and what with its seals.
fn broken(harm: &str) -> Vec<Broken> {
    let (folder, store) = store();
    for id in ["a", "b", "c", "d"] {
        assert!(store.add(&row(id, "acme", id)).unwrap());
    }
    Connection::open(folder.path().join("keys.sqlite")).unwrap().execute_batch(harm).unwrap();
    let key = ChainKey([7; 32]);
    let mut verifier = Verifier::new(&key);
    store.audit(0, 100).unwrap().iter().for_each(|entry| verifier.read(entry));
    verifier.end(store.head().unwrap())
}

#[test]
fn whatever_is_changed_in_the_record_is_named() {
    assert_eq!(broken(""), []);
    for (harm, named) in [
        ("UPDATE audit SET change = '{ }' WHERE n = 2", vec![Broken::Changed { n: 2 }]),
        ("UPDATE audit SET actor = 'tess' WHERE n = 1", vec![Broken::Changed { n: 1 }]),
        ("UPDATE audit SET at_ns = at_ns + 1 WHERE n = 4", vec![Broken::Changed { n: 4 }]),
        (
            "UPDATE audit SET hash = zeroblob(32) WHERE n = 4",
            vec![Broken::Changed { n: 4 }, Broken::Unchained { n: 4 }],
        ),
        ("DELETE FROM audit WHERE n = 1", vec![Broken::Missing { from: 1, to: 1 }]),
        ("DELETE FROM audit WHERE n IN (2, 3)", vec![Broken::Missing { from: 2, to: 3 }]),
        ("DELETE FROM audit WHERE n > 2", vec![Broken::Missing { from: 3, to: 4 }]),
        ("DELETE FROM audit", vec![Broken::Missing { from: 4, to: 4 }]),
        ("DELETE FROM head", vec![Broken::Missing { from: 5, to: 5 }]),
        (
            "UPDATE audit SET n = 9 WHERE n = 2; UPDATE audit SET n = 2 WHERE n = 3; UPDATE audit SET n = 3 WHERE n = 9",
            vec![
                Broken::Changed { n: 2 },
                Broken::Unchained { n: 2 },
                Broken::Changed { n: 3 },
                Broken::Unchained { n: 3 },
                Broken::Unchained { n: 4 },
            ],
        ),
    ] {
        assert_eq!(broken(harm), named, "{harm}");
    }
    // Sealed again by somebody who does not have the pepper.
    let resealed = |n: i64| {
        let (folder, store) = store();
        for id in ["a", "b"] {
            assert!(store.add(&row(id, "acme", id)).unwrap());
        }
        let other = ChainKey([1; 32]);
        let entry = store.audit(n - 1, 1).unwrap().remove(0);
        let forged = Head { n: n - 1, hash: entry.previous_hash }.next(&other, 7, "nobody", "{}".into());
        let db = Connection::open(folder.path().join("keys.sqlite")).unwrap();
        db.execute("UPDATE audit SET actor = 'nobody', hash = ?1 WHERE n = ?2", (forged.hash, n)).unwrap();
        let key = ChainKey([7; 32]);
        let mut verifier = Verifier::new(&key);
        store.audit(0, 100).unwrap().iter().for_each(|entry| verifier.read(entry));
        verifier.end(store.head().unwrap())
    };
    assert!(resealed(2).contains(&Broken::Changed { n: 2 }));
}

#[test]
fn a_record_that_begins_in_an_older_store_begins_after_its_changes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.sqlite");
    let old = concat!(include_str!("migrations/0000_begin.sql"), include_str!("migrations/0001_callers.sql"));
    // The columns that came without a version.
    let old = old.replace(
        "ALTER TABLE keys RENAME",
        "ALTER TABLE keys ADD COLUMN tokens_per_minute INTEGER; ALTER TABLE keys ADD COLUMN concurrency INTEGER;
         ALTER TABLE keys ADD COLUMN nano_usd_per_day INTEGER; ALTER TABLE keys RENAME",
    );
    let add = "INSERT INTO keys (id, tenant, name, hash, created_ns, changed_seq) VALUES ('a', 'acme', 'a', zeroblob(32), 1, 7);
               PRAGMA user_version = 1;";
    Connection::open(&path).unwrap().execute_batch(&format!("{old} {add}")).unwrap();
    let store = open(&path).unwrap();
    let seen = store.news(None).unwrap().head.n;
    store.change("a", |row| row.disabled_ns = Some(1));
    let news = store.news(Some(seen)).unwrap();
    assert_eq!((seen, news.head.n, news.keys.len()), (7, 8, 1), "who follows sees it");
    let key = ChainKey([7; 32]);
    let mut verifier = Verifier::new(&key);
    store.audit(0, 100).unwrap().iter().for_each(|entry| verifier.read(entry));
    assert_eq!(verifier.end(store.head().unwrap()), []);
}
