use serde_json::json;

use super::*;
use crate::auth::api_key::generate;
use crate::auth::store::Verifier;

fn control() -> (tempfile::TempDir, Control) {
    let folder = tempfile::tempdir().unwrap();
    let control = Control::new(DataDir::open(folder.path()).unwrap());
    (folder, control)
}

fn create(control: &Control, name: &str) -> String {
    let change = Change::CreateKey {
        token: generate().unwrap(),
        tenant: "acme".into(),
        name: name.into(),
        edit: Box::default(),
    };
    match control.apply("test", change, None).unwrap().done {
        Done::Key(key) => key.who.key_id.clone(),
        Done::Tenant(_) | Done::Rule(_) | Done::Gone => panic!("it was about a key"),
    }
}

fn is_sound(control: &Control) -> usize {
    let (store, key) = (control.store().unwrap(), control.chain_key().unwrap());
    let entries = store.audit(0, 10_000).unwrap();
    let mut verifier = Verifier::new(&key);
    entries.iter().for_each(|entry| verifier.read(entry));
    assert_eq!(verifier.end(store.head().unwrap()), []);
    entries.len()
}

#[test]
fn changes_of_many_at_once_are_one_chain_and_none_is_lost() {
    let (_folder, control) = control();
    let id = create(&control, "shared");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (control, id) = (&control, &id);
            scope.spawn(move || {
                for n in 0..10 {
                    let user = Some(Some(format!("{thread}-{n}")));
                    let edit = Box::new(KeyEdit { user, ..KeyEdit::default() });
                    control.apply("test", Change::EditKey { id: id.clone(), edit }, None).unwrap();
                    create(control, &format!("{thread}-{n}"));
                }
            });
        }
    });
    assert_eq!((is_sound(&control), control.store().unwrap().list().unwrap().len()), (81, 41));
    // Each edit began with what the one before had left.
    let store = control.store().unwrap();
    let changes: Vec<Value> =
        store.audit(0, 100).unwrap().iter().map(|entry| serde_json::from_str(&entry.change).unwrap()).collect();
    let edits: Vec<&Value> = changes.iter().filter(|change| change["change"] == "edit_key").collect();
    assert!(edits.windows(2).all(|pair| pair[0]["after"]["user"] == pair[1]["before"]["user"]), "{edits:?}");
}

#[test]
fn what_is_denied_leaves_neither_row_nor_entry() {
    let (_folder, control) = control();
    let id = create(&control, "a");
    control.apply("test", Change::RevokeKey { id: id.clone() }, None).unwrap();
    let before = control.store().unwrap().list().unwrap();
    let name = |name: &str| Change::CreateKey {
        token: generate().unwrap(),
        tenant: "acme".into(),
        name: name.into(),
        edit: Box::default(),
    };
    let denied = |change, expected| control.apply("test", change, expected).err().unwrap();
    assert!(matches!(denied(name("a"), None), Denied::Conflict(_)), "the name is taken");
    assert!(matches!(denied(name(""), None), Denied::Invalid { .. }));
    assert!(matches!(denied(Change::EnableKey { id: id.clone() }, None), Denied::Conflict(_)), "revoked is for ever");
    assert!(matches!(denied(Change::RevokeKey { id }, Some(1)), Denied::Stale { expected: 1, found: 2 }));
    assert!(matches!(denied(Change::EnableTenant { id: "acme".into() }, None), Denied::NotFound(_)));
    assert!(matches!(denied(Change::DeleteRule { name: "r".into() }, None), Denied::NotFound(_)));
    let tags = vec!["t".to_owned(); 17];
    assert!(matches!(denied(Change::PutTenant { id: "acme".into(), name: None, tags }, None), Denied::Invalid { .. }));
    assert_eq!((is_sound(&control), control.store().unwrap().list().unwrap()), (2, before));
}

#[test]
fn the_record_says_what_was_and_what_is_and_no_hash() {
    let (_folder, control) = control();
    let id = create(&control, "a");
    let token = crate::auth::api_key::renew(&id).unwrap();
    control.apply("test", Change::RotateKey { id: id.clone(), token, grace: When::At(7_000) }, None).unwrap();
    control
        .apply("test", Change::PutTenant { id: "acme".into(), name: Some("Acme".into()), tags: vec![] }, None)
        .unwrap();
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
}
