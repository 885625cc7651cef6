//! Keys that an issuer publishes: fetched seldom, kept for an hour, and no request's doing.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use super::tests::{HEADER, NOW_NS, SECRET, ask, ask_at, encode, rs_issuer, rs256, set, with};
use super::*;

/// An issuer's server: what it says next, and how often it was asked.
struct Published {
    address: SocketAddr,
    says: Arc<Mutex<String>>,
    asked: Arc<AtomicUsize>,
}

impl Published {
    fn start(set: &Value) -> Published {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let says = Arc::new(Mutex::new(answer(200, &set.to_string())));
        let asked = Arc::new(AtomicUsize::new(0));
        let (text, count) = (says.clone(), asked.clone());
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.read(&mut [0; 4096]);
                count.fetch_add(1, Ordering::SeqCst);
                let text = text.lock().unwrap().clone();
                let _ = stream.write_all(text.as_bytes());
            }
        });
        Published { address, says, asked }
    }

    fn says(&self, status: u16, body: &str) {
        *self.says.lock().unwrap() = answer(status, body);
    }

    fn open(&self, pace: Pace) -> Issuers {
        let url = format!("http://{}/keys", self.address).parse().unwrap();
        let config = JwtConfig { keys: JwtKeys::At(url), ..rs_issuer() };
        Issuers::default().open_at(&[config], pace).unwrap()
    }
}

fn answer(status: u16, body: &str) -> String {
    format!(
        "HTTP/1.1 {status} X\r\nlocation: /elsewhere\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn named(id: &str) -> String {
    rs256(&format!(r#"{{"alg":"RS256","kid":"{id}"}}"#), &with(json!({})))
}

#[test]
fn the_key_that_a_token_names_proves_it_and_a_crowd_of_unknown_names_is_one_look() {
    let issuer = Published::start(&set(&["a", "b"]));
    let issuers = issuer.open(PACE);
    assert!(ask(&issuers, &named("a")).is_ok() && ask(&issuers, &named("b")).is_ok());
    assert_eq!(
        ask(&issuers, &rs256(HEADER, &with(json!({})))).unwrap_err(),
        "jwt_unknown_key",
        "without a name, which?"
    );
    let parts = named("a");
    let (body, mark) = parts.split_once('.').unwrap().1.split_once('.').unwrap();
    let began = Instant::now();
    for number in 0..10_000 {
        let token = format!("{}.{body}.{mark}", encode(format!(r#"{{"alg":"RS256","kid":"{number}"}}"#)));
        assert_eq!(ask(&issuers, &token).unwrap_err(), "jwt_unknown_key");
    }
    assert!(began.elapsed() < PACE.at_least, "nobody waited for a look that is not due");
    assert_eq!(issuer.asked.load(Ordering::SeqCst), 1);
    assert!(ask(&issuers, &named("a")).is_ok());
}

#[test]
fn a_new_key_is_found_when_a_token_names_it_and_one_that_is_gone_proves_nothing_any_more() {
    let issuer = Published::start(&set(&["old"]));
    let pace = Pace { at_least: Duration::ZERO, patience: Duration::from_secs(20), ..PACE };
    let issuers = issuer.open(pace);
    let old = named("old");
    assert!(ask(&issuers, &old).is_ok());
    issuer.says(200, &set(&["new"]).to_string());
    assert!(ask(&issuers, &named("new")).is_ok(), "its request waits for the look");
    assert_eq!(ask(&issuers, &old).unwrap_err(), "jwt_unknown_key", "although it is remembered");
}

#[test]
fn a_set_that_cannot_be_fetched_anew_counts_for_an_hour() {
    let issuer = Published::start(&set(&["a"]));
    let pace = Pace { every: Duration::from_millis(1), at_least: Duration::from_millis(1), ..PACE };
    let issuers = issuer.open(pace);
    let token = named("a");
    assert!(ask(&issuers, &token).is_ok());
    for broken in [
        (500, set(&["a"]).to_string()),
        (302, set(&["a"]).to_string()),
        (200, "{}".to_owned()),
        (200, "{\"keys\":[]}".to_owned()),
        (200, format!("{{\"keys\":[],\"more\":\"{}\"}}", "x".repeat(300 << 10))),
        (200, json!({"keys": vec![json!({"kty": "RSA"}); 65]}).to_string()),
        (200, json!({"keys": [{"kty": "oct", "k": encode(SECRET), "kid": "a"}]}).to_string()),
    ] {
        issuer.says(broken.0, &broken.1);
        let before = issuer.asked.load(Ordering::SeqCst);
        while issuer.asked.load(Ordering::SeqCst) < before + 3 {
            std::thread::yield_now();
        }
        assert!(ask(&issuers, &token).is_ok(), "{broken:?}");
    }
    let minutes = |minutes: u64| Instant::now() + Duration::from_secs(60 * minutes);
    assert!(ask_at(&issuers, &token, NOW_NS, minutes(59)).is_ok());
    assert_eq!(
        ask_at(&issuers, &token, NOW_NS, minutes(61)).unwrap_err(),
        "jwt_keys_unavailable",
        "also what is remembered"
    );
    issuer.says(200, &set(&["a"]).to_string());
    let age = || issuers.ages(Instant::now()).next().unwrap().1.unwrap();
    let before = age();
    while age() > before {
        std::thread::yield_now();
    }
    assert!(ask(&issuers, &token).is_ok());
}

#[test]
fn without_any_keys_tokens_are_refused_for_now_and_not_for_ever() {
    let issuer = Published::start(&json!({}));
    let issuers = issuer.open(Pace { at_least: Duration::from_millis(1), ..PACE });
    assert_eq!(ask(&issuers, &named("a")).unwrap_err(), "jwt_keys_unavailable");
    issuer.says(200, &set(&["a"]).to_string());
    while issuers.ages(Instant::now()).next().unwrap().1.is_none() {
        std::thread::yield_now();
    }
    assert!(ask(&issuers, &named("a")).is_ok());
}
