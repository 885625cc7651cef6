//! What operators' decisions ask of a key store, asked of each that there is: the file of one gateway, and a real Postgres.

use std::sync::Arc;
use std::time::{Duration, Instant};

use glassgate::accounting::core::NanoUsd;
use glassgate::auth::Identity;
use glassgate::auth::api_key::{Pepper, generate, renew};
use glassgate::auth::directory::Directory;
use glassgate::auth::store::{
    ChainKey, Head, KeyRow, KeyStore, Location, OwnLimits, StoreError, StoredRule, Tenant, Verifier, Writing,
};
use glassgate::control::edit::{KeyEdit, When};
use glassgate::control::{Change, Control, Denied, Done};
use glassgate::data_dir::DataDir;
use glassgate::database::postgres::Target;
use glassgate::observe::metrics::Metrics;
use glassgate::ports::Scope;
use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::postgres::Postgres;

/// Plays a test on an empty store of each kind, which may also be opened a second time.
fn each(test: impl Fn(&Control)) {
    let postgres = Postgres::start();
    let shared = Location::Postgres(Arc::new(Target::parse(&postgres.url(), None).unwrap()));
    for shared in [None, Some(shared)] {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = DataDir::open(folder.path()).unwrap();
        let location = shared.unwrap_or_else(|| Location::File(data_dir.keys()));
        test(&Control::new(data_dir, location, None));
    }
}

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
        metadata: [].into(),
    }
}

const SEAL: ChainKey = ChainKey([7; 32]);

/// Changes rows and tells nobody why.
fn by<T>(store: &KeyStore, change: impl FnOnce(&Writing<'_>) -> Result<T, StoreError>) -> T {
    let mut writing = store.write().unwrap();
    let done = change(&writing).unwrap();
    writing.record(&SEAL, 7, "test", "{}".into()).unwrap();
    writing.commit().unwrap();
    done
}

fn add(store: &KeyStore, key: &KeyRow) -> bool {
    by(store, |writing| writing.add_key(key))
}

#[test]
fn everything_that_is_decided_is_read_as_it_was_written() {
    each(|control| {
        let store = control.store().unwrap();
        let mut key = row("a", "acme", "alice");
        key.previous = Some(([9; 32], 4));
        (key.expires_ns, key.disabled_ns, key.revoked_ns) = (Some(5), Some(6), Some(i64::MAX));
        key.metadata = [("owner".to_owned(), "o\"'; DROP TABLE keys".to_owned())].into();
        let limits = OwnLimits { concurrency: Some(3), per_day: Some(NanoUsd(7)), ..OwnLimits::default() };
        *Arc::make_mut(&mut key.who) = Identity {
            user: Some("bob".into()),
            tags: vec!["blue".into(), "\u{1f600}?1#keys\0".into()],
            scopes: Some(Scope::ALL.into()),
            models: Some(["assistant".to_owned()].into()),
            networks: Some(vec!["10.0.0.0/8".parse().unwrap(), "::1".parse().unwrap()]),
            limits,
            ..(*key.who).clone()
        };
        assert!(add(&store, &key) && !add(&store, &key));
        assert_eq!(control.store().unwrap().list().unwrap(), [key.clone()]);
        let changed = KeyRow { expires_ns: None, previous: None, ..key };
        by(&store, |writing| writing.put_key(&changed));
        assert_eq!((store.list().unwrap(), store.key("b").unwrap()), (vec![changed], None));

        let tenant =
            Tenant { id: "acme".into(), name: Some("Acme".into()), disabled_ns: Some(7), seq: 1, tags: vec![] };
        let words = json!({"limit": 1.5, "only": {"tag": "blue"}});
        let rule = StoredRule { name: "r".into(), words: words.as_object().unwrap().clone(), seq: 2 };
        for _ in 0..2 {
            by(&store, |writing| writing.put_tenant(&tenant));
            by(&store, |writing| writing.put_rule(&rule));
        }
        assert_eq!((store.tenants().unwrap(), store.rules().unwrap()), (vec![tenant.clone()], vec![rule]));
        assert_eq!((store.tenant("acme").unwrap(), store.tenant("beta").unwrap()), (Some(tenant), None));
        by(&store, |writing| writing.delete_rule("r"));
        assert!(store.rules().unwrap().is_empty() && !store.write().unwrap().is_empty().unwrap());
    });
}

#[test]
fn a_key_is_found_by_what_it_is_called_and_in_pages_by_its_id() {
    each(|control| {
        let store = control.store().unwrap();
        for (id, tenant, name) in [("c", "beta", "test"), ("a", "acme", "prod"), ("b", "beta", "prod")] {
            assert!(add(&store, &row(id, tenant, name)));
        }
        let found = |called: &str| -> Vec<String> {
            store.find(called).unwrap().iter().map(|(row, _)| row.who.key_id.clone()).collect()
        };
        assert_eq!(
            ["prod", "beta/prod", "test", "a", "acme/test", "nul\0"].map(|called| found(called).join(" ")),
            ["a b", "b", "c", "a", "", ""]
        );
        let page = |after: &str| -> Vec<(String, i64)> {
            store.page(after, 2).unwrap().into_iter().map(|(row, seq)| (row.who.key_id.clone(), seq)).collect()
        };
        assert_eq!(
            (page(""), page("b"), page("c")),
            (vec![("a".to_owned(), 2), ("b".to_owned(), 3)], vec![("c".to_owned(), 1)], vec![])
        );
    });
}

#[test]
fn who_follows_reads_what_changed_and_a_copy_is_the_same_as_what_it_is_of() {
    each(|control| {
        let store = control.store().unwrap();
        for id in ["a", "b", "c"] {
            assert!(add(&store, &row(id, "acme", id)));
        }
        by(&store, |writing| writing.put_tenant(&Tenant { id: "t".into(), seq: 4, ..Tenant::default() }));
        let folder = tempfile::tempdir().unwrap();
        let copy = KeyStore::open(&Location::File(folder.path().join("copy"))).unwrap();
        let same = |seen: i64| {
            copy.take(&store.news(Some(seen)).unwrap()).unwrap();
            assert_eq!(
                (copy.list().unwrap(), copy.tenants().unwrap()),
                (store.list().unwrap(), store.tenants().unwrap())
            );
            assert_eq!(
                (copy.head().unwrap(), copy.pepper().unwrap()),
                (store.head().unwrap(), store.pepper().unwrap())
            );
        };
        let seen = |news: &glassgate::auth::store::News| (news.keys.len(), news.head.n, news.is_all);
        assert_eq!(seen(&store.news(None).unwrap()), (3, 4, true));
        assert_eq!(seen(&store.news(Some(9)).unwrap()), (3, 4, true), "it is another store than it was");
        assert_eq!(seen(&store.news(Some(4)).unwrap()), (0, 4, false));
        same(9);
        for id in ["b", "a"] {
            by(&store, |writing| {
                let (row, _) = writing.key(id)?.unwrap();
                writing.put_key(&KeyRow { disabled_ns: Some(1), ..row })
            });
        }
        let ids: Vec<_> = store.news(Some(4)).unwrap().keys.iter().map(|(key, _)| key.who.key_id.clone()).collect();
        assert_eq!(ids, ["b", "a"]);
        same(4);
        // More than are read at once, all of one change.
        by(&store, |writing| {
            (0..10_007).try_for_each(|n| writing.add_key(&row(&format!("k{n}"), "many", &format!("{n}"))).map(drop))
        });
        assert_eq!(seen(&store.news(Some(6)).unwrap()), (10_007, 7, false));
        assert_eq!(seen(&store.news(None).unwrap()), (10_010, 7, true));
    });
}

#[test]
fn a_change_that_is_not_committed_leaves_nothing_and_keeps_nobody_waiting() {
    each(|control| {
        let store = control.store().unwrap();
        let mut writing = store.write().unwrap();
        assert!(writing.claim("mark").unwrap() && writing.add_key(&row("a", "acme", "a")).unwrap());
        writing.record(&SEAL, 7, "test", "{}".into()).unwrap();
        drop(writing);
        assert!(store.list().unwrap().is_empty() && store.audit(0, 9).unwrap().is_empty());
        assert_eq!((store.head().unwrap(), store.pepper().unwrap()), (Some(Head { n: 0, hash: [0; 32] }), None));
        // Also while the one who began it is still there.
        assert!(add(&control.store().unwrap(), &row("a", "acme", "a")));
        assert_eq!(store.list().unwrap().len(), 1);
    });
}

fn create(control: &Control, name: &str) -> Result<String, Denied> {
    let change = Change::CreateKey {
        token: generate().unwrap(),
        tenant: "acme".into(),
        name: name.into(),
        edit: Box::default(),
    };
    match control.apply("test", change, None)?.done {
        Done::Key(key) => Ok(key.who.key_id.clone()),
        Done::Tenant(_) | Done::Rule(_) | Done::Gone => panic!("it was about a key"),
    }
}

/// How many entries the record has, which are all as they were written.
fn sound(control: &Control) -> usize {
    let store = control.store().unwrap();
    let key = control.chain_key(&store).unwrap();
    let entries = store.audit(0, 10_000).unwrap();
    let mut verifier = Verifier::new(&key);
    entries.iter().for_each(|entry| verifier.read(entry));
    assert_eq!(verifier.end(store.head().unwrap()), []);
    entries.len()
}

#[test]
fn changes_of_many_at_once_are_one_chain_and_none_is_lost() {
    each(|control| {
        let id = create(control, "shared").unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let id = &id;
                scope.spawn(move || {
                    for n in 0..10 {
                        let user = Some(Some(format!("{thread}-{n}")));
                        let edit = Box::new(KeyEdit { user, ..KeyEdit::default() });
                        control.apply("test", Change::EditKey { id: id.clone(), edit }, None).unwrap();
                        create(control, &format!("{thread}-{n}")).unwrap();
                    }
                });
            }
        });
        let store = control.store().unwrap();
        assert_eq!((sound(control), store.list().unwrap().len()), (81, 41));
        // Each edit began with what the one before had left.
        let changes = store.audit(0, 100).unwrap();
        let changes: Vec<Value> = changes.iter().map(|entry| serde_json::from_str(&entry.change).unwrap()).collect();
        let edits: Vec<&Value> = changes.iter().filter(|change| change["change"] == "edit_key").collect();
        assert!(edits.windows(2).all(|pair| pair[0]["after"]["user"] == pair[1]["before"]["user"]), "{edits:?}");
    });
}

#[test]
fn what_is_denied_leaves_neither_row_nor_entry() {
    each(|control| {
        let id = create(control, "a").unwrap();
        control.apply("test", Change::RevokeKey { id: id.clone() }, None).unwrap();
        let before = control.store().unwrap().list().unwrap();
        let denied = |change, expected| control.apply("test", change, expected).err().unwrap();
        assert!(matches!(create(control, "a"), Err(Denied::Conflict(_))), "the name is taken");
        assert!(matches!(create(control, ""), Err(Denied::Invalid { .. })));
        assert!(
            matches!(denied(Change::EnableKey { id: id.clone() }, None), Denied::Conflict(_)),
            "revoked is for ever"
        );
        assert!(matches!(denied(Change::RevokeKey { id }, Some(1)), Denied::Stale { expected: 1, found: 2 }));
        assert!(matches!(denied(Change::EnableTenant { id: "acme".into() }, None), Denied::NotFound(_)));
        assert!(matches!(denied(Change::DeleteRule { name: "r".into() }, None), Denied::NotFound(_)));
        let tags = vec!["t".to_owned(); 17];
        assert!(matches!(
            denied(Change::PutTenant { id: "acme".into(), name: None, tags }, None),
            Denied::Invalid { .. }
        ));
        let other =
            Control::new(control.data_dir().clone(), control.location().clone(), Pepper::parse(&"ab".repeat(32)));
        let why = create(&other, "b").unwrap_err().to_string();
        assert!(why.contains("another pepper"), "{why}");
        assert!(other.chain_key(&other.store().unwrap()).is_err(), "nor is the record checked by it");
        assert_eq!((sound(control), control.store().unwrap().list().unwrap()), (2, before));
    });
}

#[test]
fn the_record_says_what_was_and_what_is_and_no_hash() {
    each(|control| {
        let id = create(control, "a").unwrap();
        let token = renew(&id).unwrap();
        control.apply("test", Change::RotateKey { id: id.clone(), token, grace: When::At(7_000) }, None).unwrap();
        let put = Change::PutTenant { id: "acme".into(), name: Some("Acme".into()), tags: vec![] };
        control.apply("test", put, None).unwrap();
        let entries = control.store().unwrap().audit(1, 9).unwrap();
        let told: Vec<Value> = entries.iter().map(|entry| serde_json::from_str(&entry.change).unwrap()).collect();
        let rotated = json!({
            "change": "rotate_key", "key": id, "tenant": "acme", "name": "a",
            "before": {"previous_secret_until": null}, "after": {"previous_secret_until": "1970-01-01T00:00:00.000007Z"},
        });
        let put = json!({
            "change": "put_tenant", "tenant": "acme", "before": {},
            "after": {"id": "acme", "name": "Acme", "tags": [], "disabled": null},
        });
        assert_eq!(told, [rotated, put]);
    });
}

#[test]
#[ignore = "measures time: make test-long"]
fn among_a_hundred_thousand_keys_a_change_is_seen_within_a_second() {
    const KEYS: usize = 100_000;
    each(|control| {
        let store = control.store().unwrap();
        by(&store, |writing| {
            (0..KEYS).try_for_each(|n| writing.add_key(&row(&format!("k{n}"), "many", &format!("{n}"))).map(drop))
        });
        let (began, mark) = (Instant::now(), control.pepper().unwrap().mark());
        let copy = control.data_dir().keys_copy();
        let open = || Directory::open(control.location(), &copy, mark.clone(), Arc::new(Metrics::new())).unwrap();
        drop(open());
        let (first, began) = (began.elapsed(), Instant::now());
        let directory = open();
        let again = began.elapsed();
        by(&store, |writing| writing.put_key(&KeyRow { disabled_ns: Some(1), ..row("k7", "many", "7") }));
        let began = Instant::now();
        eventually("the change", || directory.keys()["k7"].disabled_ns);
        println!("first start {first:?}, next start {again:?}, a change {:?}", began.elapsed());
        assert!(directory.keys().len() == KEYS && began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    });
}
