//! Who may call, with what, from where, and for what.

use std::time::Instant;

use serde_json::{Value, json};

use crate::support::gateway::{Setup, TestGateway, chat, remote, replace};
use crate::support::http::{self, Response};
use crate::support::upstream::Upstream;
use crate::support::{SOON, eventually, root};

pub fn code(response: &Response) -> String {
    response.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
}

/// A key with settings of its own, once the running gateway knows it. Judging nothing costs nothing.
fn key(gateway: &TestGateway, name: &str, settings: &[&str]) -> String {
    let key = gateway.cli(&[&["keys", "create", name], settings].concat()).trim().to_owned();
    eventually("the key to be known", || {
        let told = gateway.send(&http::post("/v1/feedback", Some(&key), &[], b"{}"));
        (told.status != 401).then_some(())
    });
    key
}

pub fn models(gateway: &TestGateway, fields: &str) -> Response {
    gateway.send(format!("GET /v1/models HTTP/1.1\r\nhost: g\r\n{fields}\r\n").as_bytes())
}

/// What somebody with a key is told at `/v1/models`: "known", or why not.
fn told(gateway: &TestGateway, key: &str) -> String {
    let response = gateway.send(&http::get("/v1/models", Some(key)));
    if response.status == 200 { "known".to_owned() } else { code(&response) }
}

/// Waits until a change is seen, which must be within a second.
fn soon(gateway: &TestGateway, key: &str, expected: &str) {
    let changed = Instant::now();
    eventually(expected, || (told(gateway, key) == expected).then_some(()));
    assert!(changed.elapsed() < SOON, "{expected} took {:?}", changed.elapsed());
}

#[test]
fn one_credential_is_taken_wherever_it_may_stand_and_two_are_refused() {
    let gateway = TestGateway::start();
    let key = &gateway.key;
    assert_eq!(models(&gateway, &format!("x-api-key: {key}\r\n")).status, 200);
    assert_eq!(models(&gateway, &format!("authorization: Bearer {key}\r\nx-api-key: {key}\r\n")).status, 200);
    for two in [
        format!("authorization: Bearer {key}\r\nauthorization: Bearer {key}\r\n"),
        format!("authorization: Basic dTpw\r\nx-api-key: {key}\r\n"),
        format!("authorization: Bearer gg-other\r\nx-api-key: {key}\r\n"),
    ] {
        let refused = models(&gateway, &two);
        assert_eq!((refused.status, code(&refused)), (400, "ambiguous_credentials".to_owned()), "{two}");
    }
    // Some servers read `_` as `-`.
    assert_eq!(models(&gateway, &format!("x_api_key: {key}\r\n")).status, 400);
}

#[test]
fn a_key_in_the_url_is_no_key_and_is_written_nowhere() {
    let mut gateway = TestGateway::start();
    let key = gateway.key.clone();
    for name in ["api_key", "key", "access_token", "authorization", "x-api-key"] {
        let request = format!("GET /v1/models?{name}={key} HTTP/1.1\r\nhost: g\r\n\r\n");
        let refused = gateway.send(request.as_bytes());
        assert_eq!((refused.status, code(&refused)), (401, "missing_api_key".to_owned()), "{name}");
        assert!(!String::from_utf8_lossy(&refused.body).contains(&key));
    }
    gateway.stop();
    assert!(!gateway.stdout().contains(&key) && !gateway.stderr().replace("Bearer ", "").contains("api_key="));
}

/// The gateway's word for who asked, by the request's id.
fn client_ip(gateway: &TestGateway, response: &Response) -> Value {
    let id = response.header("x-request-id").unwrap();
    eventually("the log line", || {
        let line = gateway.stdout().lines().find(|line| line.contains(id)).map(str::to_owned)?;
        Some(serde_json::from_str::<Value>(&line).unwrap()["client_ip"].clone())
    })
}

#[test]
fn the_clients_address_is_the_one_that_our_own_proxy_heard() {
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "[listen]", "[listen]\ntrusted_proxies = [\"127.0.0.1\", \"10.0.0.0/8\"]");
    let gateway = setup.start();
    let bound = key(&gateway, "bound", &["--from", "203.0.113.0/24", "--from", "2001:db8::/32"]);
    let ask = |key: &str, forwarded: &str| {
        models(&gateway, &format!("authorization: Bearer {key}\r\nx-forwarded-for: {forwarded}\r\n"))
    };
    for (forwarded, ip, allowed) in [
        ("203.0.113.9", "203.0.113.9", true),
        ("198.51.100.1, 203.0.113.9, 10.1.1.1", "203.0.113.9", true),
        ("[2001:db8::7]:443", "2001:db8::7", true),
        ("203.0.113.9, 198.51.100.1", "198.51.100.1", false),
        ("203.0.113.9, nonsense", "127.0.0.1", false),
    ] {
        let response = ask(&bound, forwarded);
        assert_eq!(client_ip(&gateway, &response), ip, "{forwarded}");
        if allowed {
            assert_eq!(response.status, 200, "{forwarded}");
        } else {
            assert_eq!((response.status, code(&response)), (403, "address_not_allowed".to_owned()), "{forwarded}");
        }
        assert_eq!(ask(&gateway.key, forwarded).status, 200, "another key may be used from anywhere");
    }
    // No proxy of ours any more: what it says is anybody's word.
    replace(&gateway.config("gateway.toml"), "\"127.0.0.1\", \"10.0.0.0/8\"", "\"10.0.0.0/8\"");
    assert_eq!(gateway.admin("POST", "/admin/reload").status, 200);
    let refused = ask(&bound, "203.0.113.9");
    assert_eq!((refused.status, client_ip(&gateway, &refused)), (403, "127.0.0.1".into()));
}

#[test]
fn a_proxy_of_ours_may_bring_more_connections_than_a_stranger() {
    let setup = Setup::shipped();
    let keys = "trusted_proxies = [\"127.0.0.1\"]\nconnections_max = 9\nconnections_per_ip = 1";
    setup.replace("gateway.toml", "[listen]", &format!("[listen]\n{keys}"));
    let gateway = setup.start();
    let held: Vec<_> = (0..5).map(|_| gateway.open_unread(b"GET /health HTTP/1.1\r\n")).collect();
    assert_eq!(gateway.send(&http::get("/health", None)).status, 200);
    drop(held);
}

#[test]
fn who_guesses_keys_is_not_listened_to_for_a_while_and_others_are() {
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "failures_per_minute = 0", "failures_per_minute = 5");
    setup.replace("gateway.toml", "[listen]", "[listen]\ntrusted_proxies = [\"127.0.0.1\"]");
    let gateway = setup.start();
    let ask = |from: &str, key: &str| {
        models(&gateway, &format!("authorization: Bearer {key}\r\nx-forwarded-for: {from}\r\n"))
    };
    let wrong = |number: usize| {
        format!("gg-aaaaaaaaaaaa-{}", number.to_string().repeat(40).chars().take(40).collect::<String>())
    };
    for number in 0..5 {
        assert_eq!(code(&ask("2001:db8::1", &wrong(number))), "invalid_api_key");
    }
    let refused = ask("2001:db8::2", &gateway.key);
    assert_eq!((refused.status, code(&refused)), (429, "too_many_failures".to_owned()), "its /64 is one host");
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=12).contains(&wait), "{wait}");
    assert_eq!(ask("2001:db8:0:1::1", &gateway.key).status, 200, "the network beside it is not to blame");
    assert_eq!(ask("203.0.113.1", &gateway.key).status, 200);
    for _ in 0..20 {
        assert_eq!(models(&gateway, "x-forwarded-for: 203.0.113.7\r\n").status, 401);
    }
    assert_eq!(ask("203.0.113.7", &gateway.key).status, 200, "to send nothing is no guess");
    assert_eq!(gateway.metric("gateway_auth_total", &["method=\"key\"", "result=\"invalid_api_key\""]), 5.0);
    assert_eq!(gateway.metric("gateway_auth_total", &["method=\"key\"", "result=\"too_many_failures\""]), 1.0);
}

#[test]
fn a_key_does_what_its_scopes_are_for_at_every_path() {
    let gateway = TestGateway::start();
    let paths = [
        ("inference", "POST", "/v1/chat/completions"),
        ("inference", "POST", "/v1/completions"),
        ("embeddings", "POST", "/v1/embeddings"),
        ("feedback", "POST", "/v1/feedback"),
        ("models", "GET", "/v1/models"),
        ("models", "GET", "/v1/models/assistant"),
    ];
    for scope in ["inference", "embeddings", "feedback", "models"] {
        let key = key(&gateway, scope, &["--scope", scope]);
        for (needed, method, path) in paths {
            for asked in ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"] {
                let request = format!(
                    "{asked} {path} HTTP/1.1\r\nhost: g\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{{}}"
                );
                let status = gateway.open(request.as_bytes()).status;
                let is_method = asked == method || (asked, method) == ("HEAD", "GET");
                // Whoever may come in is told what is wrong with the rest.
                let expected: &[u16] = match (is_method, needed == scope) {
                    (false, _) => &[405],
                    (true, false) => &[403],
                    (true, true) => &[200, 400, 404],
                };
                assert!(expected.contains(&status), "{scope}: {asked} {path}: {status}");
            }
        }
        for open in ["/health", "/"] {
            assert_eq!(gateway.send(&http::get(open, Some(&key))).status, 200);
        }
    }
    let refused = gateway
        .send(&http::get("/v1/models", Some(&key(&gateway, "both", &["--scope", "inference", "--scope", "feedback"]))));
    assert_eq!(code(&refused), "scope_missing");
    // Who is refused for what they may not do is known.
    let id = refused.header("x-request-id").unwrap();
    let line =
        eventually("the log line", || gateway.stdout().lines().find(|line| line.contains(id)).map(str::to_owned));
    assert!(line.contains("\"key_name\":\"both\"") && line.contains("\"error_type\":\"scope_missing\""), "{line}");
}

#[test]
fn a_model_that_a_key_may_not_use_does_not_exist_for_it() {
    let setup = Setup::shipped();
    setup.replace("routes.toml", "source = \"glimmer-2\"", "source = \"glimmer-2\"\npublic = true");
    let gateway = setup.start();
    let ids = |key: &str| -> Vec<String> {
        let list = gateway.send(&http::get("/v1/models", Some(key))).json();
        list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids(&gateway.key), ["assistant", "glimmer-2"]);
    let bound = key(&gateway, "bound", &["--model", "glimmer-2"]);
    assert_eq!(ids(&bound), ["glimmer-2"]);
    let ask = |key: &str, model: &str| {
        let mut body = chat("12 + 34 = ?");
        body["model"] = model.into();
        gateway.send(&http::post("/v1/chat/completions", Some(key), &[], body.to_string().as_bytes()))
    };
    assert_eq!(ask(&bound, "glimmer-2").status, 200);
    let message = |response: &Response| response.json()["error"]["message"].as_str().unwrap().to_owned();
    let (forbidden, unknown) = (ask(&bound, "assistant"), ask(&bound, "assistand"));
    assert_eq!((forbidden.status, code(&forbidden)), (404, "model_not_found".to_owned()));
    assert_eq!(message(&forbidden), message(&unknown).replace("assistand", "assistant"), "nobody can tell them apart");
    assert!(message(&forbidden).ends_with("Available: glimmer-2."));
    let one = |model: &str| gateway.send(&http::get(&format!("/v1/models/{model}"), Some(&bound))).status;
    assert_eq!((one("glimmer-2"), one("assistant")), (200, 404));
    assert_eq!(ask(&gateway.key, "assistant").status, 200);

    let misspelt = gateway.run(&["keys", "create", "typo", "--model", "asistant"]);
    assert!(
        misspelt.status.success() && String::from_utf8_lossy(&misspelt.stderr).contains("nothing called `asistant`")
    );
}

#[test]
fn a_look_at_the_models_is_bounded_and_takes_nothing_from_what_may_be_asked() {
    let gateway = TestGateway::start();
    let key = key(&gateway, "curious", &["--rpm", "2"]);
    for _ in 0..8 {
        assert_eq!(gateway.send(&http::get("/v1/models", Some(&key))).status, 200);
    }
    let refused = gateway.send(&http::get("/v1/models", Some(&key)));
    assert_eq!((refused.status, code(&refused)), (429, "lookups_limited".to_owned()));
    assert!(refused.header("retry-after").is_some());
    let answered =
        gateway.send(&http::post("/v1/chat/completions", Some(&key), &[], chat("1 + 1 = ?").to_string().as_bytes()));
    assert_eq!(answered.header("x-ratelimit-remaining-requests"), Some("1"));
}

#[test]
fn a_key_is_disabled_enabled_edited_and_ends_within_a_second() {
    let gateway = TestGateway::start();
    let alice = key(&gateway, "alice", &["--expires", "1h", "--user", "u-1", "--tag", "blue", "--meta", "owner=alice"]);
    assert!(gateway.cli(&["keys", "disable", "alice"]).starts_with("disabled "));
    soon(&gateway, &alice, "disabled_api_key");
    gateway.cli(&["keys", "enable", "alice"]);
    soon(&gateway, &alice, "known");
    gateway.cli(&["keys", "edit", "alice", "--scope", "inference", "--rpm", "7"]);
    soon(&gateway, &alice, "scope_missing");
    let shown = gateway.cli(&["keys", "edit", "alice", "--clear", "scope", "--expires", "2020-01-01"]);
    assert!(shown.contains("expired 2020-01-01T00:00:00"), "{shown}");
    soon(&gateway, &alice, "expired_api_key");
    gateway.cli(&["keys", "edit", "alice", "--clear", "expires", "--clear", "rpm"]);
    soon(&gateway, &alice, "known");
    let shown: Value = serde_json::from_str(&gateway.cli(&["keys", "show", "alice", "--json"])).unwrap();
    assert_eq!(
        (&shown["user"], &shown["tags"], &shown["metadata"], &shown["scopes"], &shown["requests_per_minute"]),
        (&json!("u-1"), &json!(["blue"]), &json!({"owner": "alice"}), &Value::Null, &Value::Null)
    );
    gateway.cli(&["keys", "revoke", "alice"]);
    soon(&gateway, &alice, "revoked_api_key");
    for again in
        [&["keys", "enable", "alice"][..], &["keys", "rotate", "alice"], &["keys", "edit", "alice", "--rpm", "1"]]
    {
        let output = gateway.run(again);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("for ever") && said.contains("keys create"), "{said}");
    }
}

#[test]
fn a_rotated_key_keeps_its_name_and_both_secrets_work_for_a_while() {
    let gateway = TestGateway::start();
    let old = key(&gateway, "alice", &[]);
    let new = gateway.cli(&["keys", "rotate", "alice"]).trim().to_owned();
    assert_eq!(new[..16], old[..16], "the id stays");
    soon(&gateway, &new, "known");
    assert_eq!(told(&gateway, &old), "known");
    assert_eq!(gateway.metric("gateway_auth_total", &["result=\"accepted_previous\""]), 1.0);
    let newer = gateway.cli(&["keys", "rotate", "alice", "--grace", "0s"]).trim().to_owned();
    soon(&gateway, &newer, "known");
    assert_eq!((told(&gateway, &new), told(&gateway, &old)), ("expired_api_key".into(), "invalid_api_key".into()));
    let list = gateway.cli(&["keys", "list"]);
    assert_eq!(list.matches("alice").count(), 1, "{list}");
}

#[test]
fn names_are_a_tenants_own() {
    let gateway = TestGateway::start();
    let acme = key(&gateway, "prod", &["--tenant", "acme"]);
    let beta = key(&gateway, "prod", &["--tenant", "beta"]);
    let taken = gateway.run(&["keys", "create", "prod", "--tenant", "acme"]);
    assert!(
        !taken.status.success() && String::from_utf8_lossy(&taken.stderr).contains("`acme` has a key named `prod`")
    );
    let which = gateway.run(&["keys", "disable", "prod"]);
    let said = String::from_utf8_lossy(&which.stderr).into_owned();
    assert!(!which.status.success() && said.contains("acme/prod") && said.contains("beta/prod"), "{said}");
    gateway.cli(&["keys", "disable", "acme/prod"]);
    soon(&gateway, &acme, "disabled_api_key");
    assert_eq!(told(&gateway, &beta), "known");
    gateway.cli(&["keys", "disable", &beta[3..15]]);
    soon(&gateway, &beta, "disabled_api_key");
}

#[test]
fn what_cannot_be_set_is_refused_with_what_can() {
    let setup = Setup::shipped();
    for (settings, hint) in [
        (&["--expires", "soon"][..], "30d"),
        (&["--scope", "admin"], "inference, embeddings, feedback, models"),
        (&["--from", "10.0.0.1/8"], "first address"),
        (&["--from", "localhost"], "10.0.0.0/8"),
        (&["--meta", "owner"], "owner=alice"),
        (&["--tag", ""], "1 to 64"),
        (&["--user", "a\u{7}b"], "control characters"),
        (&["--rpm", "0"], "1..="),
    ] {
        let output = setup.run(&[&["keys", "create", "x"], settings].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(hint), "{settings:?}: {said}");
    }
    let tags = ["--tag", "t"].repeat(17);
    let said = String::from_utf8(setup.run(&[&["keys", "create", "x"], &tags[..]].concat()).stderr).unwrap();
    assert!(said.contains("at most 16 tags"), "{said}");
}

#[test]
fn what_a_client_says_of_itself_reaches_no_upstream() {
    let upstream = Upstream::start();
    let gateway = Setup::upstream(&upstream, "").start();
    let said = [
        ("x-tenant", "victim"),
        ("x-glassgate-tenant", "victim"),
        ("x-user-id", "victim"),
        ("x-forwarded-for", "203.0.113.66"),
        ("x-forwarded-user", "victim"),
        ("x-real-ip", "203.0.113.66"),
        ("forwarded", "for=203.0.113.66"),
        ("cookie", "session=victim"),
        ("proxy-authorization", "Basic dmljdGlt"),
        ("openai-organization", "victim"),
        ("openai-project", "victim"),
        ("connection", "close, x-tenant"),
    ];
    let bytes = http::post("/v1/chat/completions", Some(&gateway.key), &said, remote(json!({})).to_string().as_bytes());
    assert_eq!(gateway.send(&bytes).status, 200);
    let asked = upstream.asked();
    assert_eq!(asked.len(), 1);
    for (name, value) in &asked[0].headers {
        let is_theirs = said.iter().any(|(theirs, _)| theirs == name && name != "connection");
        assert!(!is_theirs && !value.contains("victim") && !value.contains("203.0.113.66"), "{name}: {value}");
        assert!(!value.contains(&gateway.key), "{name} holds the client's key");
    }
    assert!(!asked[0].body.to_string().contains("victim"));
}

/// As the binary before this one made it: no version, names unique over all tenants.
#[test]
fn a_data_folder_of_the_version_before_keeps_its_keys() {
    let mut gateway = TestGateway::start();
    let token = key(&gateway, "old", &["--tenant", "acme", "--rpm", "7", "--usd-per-day", "2.5"]);
    gateway.stop();
    let path = gateway.data_dir().join("keys.sqlite");
    let db = rusqlite::Connection::open(&path).unwrap();
    let before = std::fs::read_to_string(root().join("tests/fixtures/keys_before_versions.sql")).unwrap();
    db.execute_batch(&before).unwrap();
    drop(db);
    gateway.restart();
    let answered =
        gateway.send(&http::post("/v1/chat/completions", Some(&token), &[], chat("1 + 1 = ?").to_string().as_bytes()));
    assert_eq!((answered.status, answered.header("x-ratelimit-limit-requests")), (200, Some("7")));
    let shown: Value = serde_json::from_str(&gateway.cli(&["keys", "show", "acme/old", "--json"])).unwrap();
    assert_eq!((&shown["usd_per_day"], &shown["expires"]), (&json!("2.500000000"), &Value::Null));
    let other = key(&gateway, "old", &["--tenant", "beta"]);
    assert_eq!(told(&gateway, &other), "known");
}
