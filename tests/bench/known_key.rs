//! The work of knowing a key, for whoever counts instructions.
//!
//! `known-key FOLDER make COUNT` makes a store of so many keys; `known-key FOLDER ask COUNT` asks so often whose the last
//! of them is.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use glassgate::auth::api_key::{ApiKey, Pepper, generate};
use glassgate::auth::store::{KeyRow, KeyStore, Location};
use glassgate::auth::{Auth, Identity};
use glassgate::config::AuthConfig;
use glassgate::observe::metrics::Metrics;
use glassgate::ports::SystemClock;

pub fn run() {
    let args: Vec<String> = std::env::args().skip(2).collect();
    let [folder, what, count] = &args[..] else { panic!("FOLDER make|ask COUNT") };
    let (folder, count) = (Path::new(folder), count.parse().unwrap());
    let pepper = Pepper::load(&folder.join("pepper")).unwrap();
    match what.as_str() {
        "make" => make(folder, &pepper, count),
        "ask" => ask(folder, pepper, count),
        other => panic!("make or ask, not {other}"),
    }
}

fn make(folder: &Path, pepper: &Pepper, count: usize) {
    let store = KeyStore::open(&Location::File(folder.join("keys.sqlite"))).unwrap();
    // At once, and without what a change says of itself: nobody looks for that here.
    let writing = store.write().unwrap();
    for number in 0..count {
        let token = generate().unwrap();
        let key = ApiKey::parse(&token).unwrap();
        let who = Identity {
            tenant: "default".to_owned(),
            key_id: key.id().to_owned(),
            key_name: format!("key-{number}"),
            ..Identity::default()
        };
        let row = KeyRow {
            who: Arc::new(who),
            hash: key.hash(pepper),
            previous: None,
            created_ns: 0,
            expires_ns: None,
            disabled_ns: None,
            revoked_ns: None,
            metadata: Default::default(),
        };
        assert!(writing.add_key(&row).unwrap());
        std::fs::write(folder.join("token"), &token).unwrap();
    }
    writing.commit().unwrap();
}

fn ask(folder: &Path, pepper: Pepper, count: usize) {
    let token = std::fs::read_to_string(folder.join("token")).unwrap();
    let metrics = Arc::new(Metrics::new());
    let (keys, copy) = (Location::File(folder.join("keys.sqlite")), folder.join("keys-copy.sqlite"));
    let auth = Auth::open(&keys, &copy, pepper, Arc::new(SystemClock), metrics).unwrap();
    let mut headers = http::HeaderMap::new();
    headers.insert(http::header::AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
    let (config, ip) = (AuthConfig::default(), IpAddr::from([127, 0, 0, 1]));
    let executor = tokio::runtime::Builder::new_current_thread().build().unwrap();
    executor.block_on(async {
        for _ in 0..count {
            let known = auth.identify(&config, &headers, ip).await;
            assert!(known.is_ok(), "{:?}", known.err());
        }
    });
}
