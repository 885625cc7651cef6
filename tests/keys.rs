//! Keys: made, used, limited, revoked, while the gateway runs.

use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use serde_json::Value;

use crate::support::gateway::{Setup, TestGateway, chat};
use crate::support::{SOON, eventually, http};

fn status(gateway: &TestGateway, key: &str) -> u16 {
    gateway.send(&http::get("/v1/models", Some(key))).status
}

#[test]
fn a_key_works_within_a_second_and_stops_within_a_second() {
    let gateway = TestGateway::start();
    let key = gateway.cli(&["keys", "create", "alice", "--tenant", "acme"]).trim().to_owned();
    let made = Instant::now();
    eventually("the new key to work", || (status(&gateway, &key) == 200).then_some(()));
    assert!(made.elapsed() < SOON, "{:?}", made.elapsed());

    gateway.cli(&["keys", "revoke", "alice"]);
    let revoked = Instant::now();
    eventually("the revoked key to stop", || (status(&gateway, &key) == 401).then_some(()));
    assert!(revoked.elapsed() < SOON, "{:?}", revoked.elapsed());
    let refusal = gateway.send(&http::get("/v1/models", Some(&key)));
    assert_eq!(refusal.json()["error"]["code"], "revoked_api_key");
}

#[test]
fn a_key_is_listed_without_its_secret_and_stored_only_as_a_hash() {
    let gateway = TestGateway::start();
    let key = gateway.cli(&["keys", "create", "bob", "--rpm", "7"]).trim().to_owned();
    let secret = key.rsplit('-').next().unwrap();
    let list = gateway.cli(&["keys", "list"]);
    assert!(list.contains("bob") && list.contains("quickstart") && !list.contains(secret));
    let json: Value = serde_json::from_str(&gateway.cli(&["keys", "list", "--json"])).unwrap();
    assert_eq!(json[1]["requests_per_minute"], 7);
    for entry in std::fs::read_dir(gateway.data_dir()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            assert!(!bytes.windows(secret.len()).any(|window| window == secret.as_bytes()), "{}", path.display());
        }
    }
    let taken = gateway.run(&["keys", "create", "bob"]);
    assert!(!taken.status.success() && String::from_utf8_lossy(&taken.stderr).contains("already"));
    let unknown = gateway.run(&["keys", "revoke", "nobody"]);
    assert!(!unknown.status.success() && String::from_utf8_lossy(&unknown.stderr).contains("keys list"));
}

#[test]
fn the_first_start_makes_one_key_that_only_its_owner_can_read_and_the_second_start_keeps_it() {
    let mut gateway = TestGateway::start();
    let path = gateway.data_dir().join("quickstart.key");
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for name in ["quickstart.key", "admin.token", "pepper"] {
        assert_eq!(mode(&gateway.data_dir().join(name)), 0o600, "{name}");
    }
    let first = std::fs::read_to_string(&path).unwrap();
    gateway.stop();
    gateway.restart();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), first);
    assert_eq!(status(&gateway, &first), 200);
}

#[test]
fn a_key_over_its_limit_is_told_which_and_when_to_return() {
    let gateway = TestGateway::start();
    let key = gateway.cli(&["keys", "create", "carol", "--rpm", "3"]).trim().to_owned();
    eventually("the key to be known", || (status(&gateway, &key) == 200).then_some(()));
    let ask = || {
        let body = chat("12 + 34 = ?").to_string();
        gateway.send(&http::post("/v1/chat/completions", Some(&key), &[], body.as_bytes()))
    };
    // A burst of the whole minute, and one every twenty seconds after that.
    for left in ["2", "1", "0"] {
        let response = ask();
        assert_eq!(response.status, 200);
        assert_eq!(response.header("x-ratelimit-limit-requests"), Some("3"));
        assert_eq!(response.header("x-ratelimit-remaining-requests"), Some(left));
    }
    let refused = ask();
    assert_eq!(refused.status, 429);
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    let wait_ms: u64 = refused.header("retry-after-ms").unwrap().parse().unwrap();
    assert!((1..=20).contains(&wait) && wait_ms <= wait * 1000, "{wait} s, {wait_ms} ms");
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("3 requests a minute"));
    assert_eq!(gateway.metric("gateway_limit_decisions_total", &["decision=\"denied\""]), 1.0);
}

#[test]
fn spend_sums_the_ledger_by_key() {
    let gateway = TestGateway::start();
    for _ in 0..3 {
        gateway.ask("12 + 34 = ?");
    }
    let spend = eventually("three rows", || {
        let spend: Value = serde_json::from_str(&gateway.cli(&["spend", "--by", "key", "--json"])).unwrap();
        (spend[0]["requests"] == 3).then_some(spend)
    });
    assert!(spend[0]["name"].as_str().unwrap().starts_with("quickstart"));
    let billed: u64 = crate::support::evidence::ledger(&gateway).iter().map(|row| row.billed).sum();
    assert_eq!(spend[0]["billed_nano_usd"], billed);
    assert!(gateway.cli(&["spend", "--by", "variant", "--hours", "1"]).contains("glimmer-"));
}

#[test]
fn a_data_folder_is_served_by_one_process() {
    let gateway = TestGateway::start();
    let second = gateway.run(&["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("in use by another glassgate"));
}

#[test]
fn a_taken_port_is_an_error_at_once() {
    let gateway = TestGateway::start();
    let other = Setup::shipped();
    let second = other.run(&["serve", "--listen", &gateway.data.to_string(), "--admin", "127.0.0.1:0"]);
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("cannot listen on"));
}
