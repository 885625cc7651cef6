//! Changes through the admin API: what they do, when they count, and where they are written down.

use std::time::Instant;

use serde_json::{Value, json};

use crate::callers::code;
use crate::support::gateway::{Setup, TestGateway, append, chat, replace};
use crate::support::http::{self, Response};
use crate::support::{SOON, eventually};
use crate::tokens::{SECRET, claims, token};

pub fn send(gateway: &TestGateway, method: &str, path: &str, body: &Value) -> Response {
    gateway.operate(method, path, "", &body.to_string())
}

pub fn ok(response: Response) -> Value {
    assert!(matches!(response.status, 200 | 201), "{}: {}", response.status, String::from_utf8_lossy(&response.body));
    response.json()
}

/// What somebody with a key is told at `/v1/models`: "known", or why not.
pub fn told(gateway: &TestGateway, key: &str) -> String {
    let response = gateway.send(&http::get("/v1/models", Some(key)));
    if response.status == 200 { "known".to_owned() } else { code(&response) }
}

/// Waits until a change counts, which must be within a second.
pub fn soon<T>(what: &str, counts: impl FnMut() -> Option<T>) -> T {
    let changed = Instant::now();
    let found = eventually(what, counts);
    assert!(changed.elapsed() < SOON, "{what} took {:?}", changed.elapsed());
    found
}

pub fn is(gateway: &TestGateway, key: &str, expected: &str) {
    soon(expected, || (told(gateway, key) == expected).then_some(()));
}

pub fn ask(gateway: &TestGateway, key: &str) -> Response {
    gateway.send(&http::post("/v1/chat/completions", Some(key), &[], chat("12 + 34 = ?").to_string().as_bytes()))
}

pub fn audit(gateway: &TestGateway) -> Vec<Value> {
    ok(gateway.admin("GET", "/admin/audit?limit=1000"))["data"].as_array().unwrap().clone()
}

#[test]
fn a_key_is_made_changed_rotated_and_revoked_while_the_gateway_runs_and_every_change_is_recorded() {
    let mut gateway = TestGateway::start();
    let made = send(
        &gateway,
        "POST",
        "/admin/keys",
        &json!({"name": "alice", "tenant": "acme", "tags": ["blue"], "models": ["assistant"], "requests_per_minute": 50, "usd_per_day": 1.5}),
    );
    assert_eq!(made.status, 201);
    let made = made.json();
    let (key, id) = (made["key"].as_str().unwrap().to_owned(), made["id"].as_str().unwrap().to_owned());
    assert_eq!((&made["tenant"], &made["usd_per_day"]), (&json!("acme"), &json!("1.500000000")));
    let path = format!("/admin/keys/{id}");
    is(&gateway, &key, "known");
    let limit = |response: &Response| response.header("x-ratelimit-limit-requests").map(str::to_owned);
    assert_eq!(limit(&ask(&gateway, &key)).as_deref(), Some("50"));
    ok(send(&gateway, "PATCH", &path, &json!({"requests_per_minute": 70, "tags": null})));
    soon("the edit", || (limit(&ask(&gateway, &key)).as_deref() == Some("70")).then_some(()));
    let shown = ok(gateway.admin("GET", &path));
    assert_eq!((&shown["tags"], &shown["models"], &shown["key"]), (&json!([]), &json!(["assistant"]), &Value::Null));
    ok(send(&gateway, "POST", &format!("{path}/disable"), &json!({})));
    is(&gateway, &key, "disabled_api_key");
    ok(send(&gateway, "POST", &format!("{path}/enable"), &json!({})));
    is(&gateway, &key, "known");
    let renewed = ok(send(&gateway, "POST", &format!("{path}/rotate"), &json!({"grace": "0s"})));
    let renewed = renewed["key"].as_str().unwrap().to_owned();
    is(&gateway, &renewed, "known");
    is(&gateway, &key, "expired_api_key");

    gateway.stop();
    gateway.restart();
    assert_eq!(limit(&ask(&gateway, &renewed)).as_deref(), Some("70"), "what was changed survives");
    ok(gateway.admin("DELETE", &path));
    is(&gateway, &renewed, "revoked_api_key");
    let late = send(&gateway, "PATCH", &path, &json!({"user": "bob"}));
    assert_eq!((late.status, code(&late)), (409, "conflict".to_owned()));
    assert_eq!(gateway.admin("DELETE", &path).status, 200, "revoking twice keeps the first time");

    let entries = audit(&gateway);
    let changes: Vec<&str> = entries.iter().map(|entry| entry["change"]["change"].as_str().unwrap()).collect();
    let expected =
        ["create_key", "create_key", "edit_key", "disable_key", "enable_key", "rotate_key", "revoke_key", "revoke_key"];
    assert_eq!(changes, expected);
    assert_eq!(
        (&entries[0]["actor"], &entries[1]["actor"]),
        (&json!("gateway"), &json!("api, the token of the data folder"))
    );
    let edit = &entries[2]["change"];
    assert_eq!(edit["before"], json!({"requests_per_minute": 50, "tags": ["blue"]}));
    assert_eq!(edit["after"], json!({"requests_per_minute": 70, "tags": []}));
    let text = serde_json::to_string(&entries).unwrap();
    for secret in [&key, &renewed] {
        assert!(!text.contains(secret.rsplit('-').next().unwrap()));
    }
    assert!(gateway.cli(&["audit", "verify"]).contains("8 entries, all as they were written"));
}

#[test]
fn bad_input_names_its_field_and_changes_nothing() {
    let gateway = TestGateway::start();
    let before = audit(&gateway);
    let key = gateway.cli(&["keys", "list", "--json"]);
    let key: Value = serde_json::from_str(&key).unwrap();
    let path = format!("/admin/keys/{}", key[0]["id"].as_str().unwrap());
    let put = |name: &str| format!("/admin/rules/{name}");
    // Method, path, body; status, which field is to blame, and words of the message.
    type Case<'c> = (&'c str, &'c str, &'c str, u16, Option<&'c str>, &'c str);
    let cases: &[Case<'_>] = &[
        ("POST", "/admin/keys", r#"{"name": "a", "speling": 1}"#, 400, Some("speling"), "is not known here"),
        ("POST", "/admin/keys", r#"{"tenant": "a"}"#, 400, Some("name"), "is missing"),
        ("POST", "/admin/keys", r#"{"name": "a", "name": "b"}"#, 400, None, "comes twice"),
        ("POST", "/admin/keys", r#"{"name": "#, 400, None, "not valid JSON"),
        ("POST", "/admin/keys", "[]", 400, Some("body"), "must be a JSON object"),
        ("POST", "/admin/keys", r#"{"name": "quickstart"}"#, 409, None, "already"),
        (
            "POST",
            "/admin/keys",
            r#"{"name": "a", "metadata": {"b": [1]}}"#,
            400,
            Some("metadata.b"),
            "must be a string",
        ),
        ("PATCH", &path, r#"{"from": ["10.0.0.0/8", "here"]}"#, 400, Some("from[1]"), "`from[1]`"),
        ("PATCH", &path, r#"{"name": "other"}"#, 400, Some("name"), "is not known here"),
        ("PATCH", "/admin/keys/nobody", "{}", 404, None, "no key"),
        ("POST", &format!("{path}/rotate"), r#"{"grace": "soon"}"#, 400, Some("grace"), "must be a time"),
        ("PUT", "/admin/tenants/acme", r#"{"tags": [7]}"#, 400, Some("tags[0]"), "must be a string"),
        ("POST", "/admin/tenants/acme/enable", "", 404, None, "nobody has put"),
        (
            "PUT",
            &put("r"),
            r#"{"limit": 1, "of": "requests", "per": "day", "onyl": {}}"#,
            400,
            None,
            "unknown key `rule.onyl`. Did you mean `only`?",
        ),
        (
            "PUT",
            &put("r"),
            r#"{"limit": 1, "of": "requests", "per": "day", "only": {"route": "asistant"}}"#,
            400,
            None,
            "Did you mean `assistant`?",
        ),
        (
            "PUT",
            &put("r"),
            r#"{"limit": 0, "of": "requests", "per": "day"}"#,
            400,
            None,
            "`rule.limit` must be a whole number",
        ),
        ("PUT", &put("r"), r#"{"limit": 1, "of": "requests"}"#, 400, None, "needs `per`"),
        ("PUT", &put("r"), r#"{"name": "s", "limit": 1, "of": "requests", "per": "day"}"#, 400, None, "rule.name"),
        ("PUT", &put("usd_per_day"), r#"{"limit": 1, "of": "usd", "per": "day"}"#, 400, None, "every key"),
        ("PUT", &put("no%20spaces"), r#"{"limit": 1, "of": "usd", "per": "day"}"#, 400, None, "cannot name a rule"),
        ("DELETE", &put("r"), "", 404, None, "no rule `r`"),
        ("GET", "/admin/limits", "", 400, Some("key"), "whose limits"),
        ("GET", "/admin/spend?by=colour", "", 400, Some("by"), "colour"),
        ("GET", "/admin/keys?limit=0", "", 400, Some("limit"), "from 1 to 1000"),
        ("PATCH", "/admin/keys", "{}", 405, None, "GET or POST"),
        ("GET", "/admin/nothing", "", 404, None, "openapi.json"),
    ];
    for (method, path, body, status, param, says) in cases {
        let response = gateway.operate(method, path, "", body);
        let error = response.json()["error"].clone();
        let message = error["message"].as_str().unwrap();
        assert_eq!((response.status, error["param"].as_str()), (*status, *param), "{method} {path} {body}: {error}");
        assert!(
            message.contains(says) && error["type"] == "admin_error" && error["code"].is_string(),
            "{body}: {error}"
        );
    }
    let large = "x".repeat(300 << 10);
    assert_eq!(gateway.operate("POST", "/admin/keys", "", &large).status, 413);
    assert_eq!(audit(&gateway), before);
}

#[test]
fn who_edits_what_has_changed_meanwhile_is_told() {
    let gateway = TestGateway::start();
    let made = ok(send(&gateway, "POST", "/admin/keys", &json!({"name": "alice"})));
    let path = format!("/admin/keys/{}", made["id"].as_str().unwrap());
    let seen = gateway.admin("GET", &path).header("etag").unwrap().to_owned();
    assert_eq!(seen, format!("\"{}\"", made["version"]));
    let edit = |path: &str, version: &str, body: &str, method: &str| {
        gateway.operate(method, path, &format!("if-match: {version}\r\n"), body)
    };
    let edited = edit(&path, &seen, r#"{"user": "a"}"#, "PATCH");
    assert_eq!(edited.status, 200);
    let stale = edit(&path, &seen, r#"{"user": "b"}"#, "PATCH");
    assert_eq!((stale.status, code(&stale)), (412, "changed_meanwhile".to_owned()));
    assert_eq!(edit(&path, edited.header("etag").unwrap(), r#"{"user": "c"}"#, "PATCH").status, 200);
    assert_eq!(edit(&path, "*", r#"{"user": "d"}"#, "PATCH").status, 200);
    assert_eq!(edit(&path, "W/\"7\"", "{}", "PATCH").status, 400);
    let rule = r#"{"limit": 1000, "of": "requests", "per": "day"}"#;
    assert_eq!(edit("/admin/rules/r", "\"0\"", rule, "PUT").status, 200, "version 0 is none yet");
    assert_eq!(edit("/admin/rules/r", "\"0\"", rule, "PUT").status, 412);
    assert_eq!(edit("/admin/rules/r", &seen, "", "DELETE").status, 412);
    assert_eq!(edit("/admin/tenants/acme", "\"0\"", "{}", "PUT").status, 200);
    assert_eq!(edit("/admin/tenants/acme", "\"0\"", "{}", "PUT").status, 412);
}

#[test]
fn of_many_who_edit_the_same_version_one_does() {
    let gateway = TestGateway::start();
    let made = ok(send(&gateway, "POST", "/admin/keys", &json!({"name": "alice"})));
    let path = format!("/admin/keys/{}", made["id"].as_str().unwrap());
    let head = format!("if-match: \"{}\"\r\n", made["version"]);
    let edits = std::thread::scope(|scope| {
        let edit =
            |n: usize| gateway.operate("PATCH", &path, &head, &json!({"user": n.to_string()}).to_string()).status;
        let edits: Vec<_> = (0..8).map(|n| scope.spawn(move || edit(n))).collect();
        edits.into_iter().map(|edit| edit.join().unwrap()).collect::<Vec<u16>>()
    });
    assert_eq!(
        (edits.iter().filter(|status| **status == 200).count(), edits.iter().filter(|status| **status == 412).count()),
        (1, 7)
    );
}

#[test]
fn a_disabled_tenants_keys_are_refused_until_it_is_enabled() {
    let mut gateway = TestGateway::start();
    let key = |name: &str, tenant: &str| {
        let made = ok(send(&gateway, "POST", "/admin/keys", &json!({"name": name, "tenant": tenant})));
        made["key"].as_str().unwrap().to_owned()
    };
    let (one, two, other) = (key("one", "acme & co"), key("two", "acme & co"), key("three", "beta"));
    is(&gateway, &two, "known");
    ok(send(&gateway, "PUT", "/admin/tenants/acme%20%26%20co", &json!({"name": "Acme", "tags": ["blue"]})));
    ok(send(&gateway, "POST", "/admin/tenants/acme%20%26%20co/disable", &json!({})));
    is(&gateway, &one, "disabled_tenant");
    assert_eq!((told(&gateway, &two), told(&gateway, &other)), ("disabled_tenant".into(), "known".into()));
    gateway.kill_and_restart();
    assert_eq!(told(&gateway, &one), "disabled_tenant");
    let tenants = ok(gateway.admin("GET", "/admin/tenants"));
    assert_eq!((&tenants["data"][0]["id"], &tenants["data"][0]["tags"]), (&json!("acme & co"), &json!(["blue"])));
    gateway.cli(&["tenants", "enable", "acme & co"]);
    is(&gateway, &one, "known");
    assert!(gateway.cli(&["tenants", "list"]).contains("Acme"));
    gateway.cli(&["tenants", "disable", "beta"]);
    is(&gateway, &other, "disabled_tenant");
}

fn limit(response: &Response) -> Value {
    assert_eq!(response.status, 429, "{}", String::from_utf8_lossy(&response.body));
    response.json()["error"]["limit"].clone()
}

#[test]
fn a_rule_that_is_put_binds_at_once_stands_before_the_files_and_leaves_it_again() {
    let setup = Setup::shipped();
    append(
        &setup.path("gateway.toml"),
        "\n[[limits.rules]]\nname = \"all\"\nlimit = 1000\nof = \"requests\"\nper = \"day\"\n",
    );
    let mut gateway = setup.start();
    let path = "/admin/rules/all";
    let shown = ok(gateway.admin("GET", path));
    assert_eq!((&shown["origin"], &shown["limit"], &shown["version"]), (&json!("config"), &json!(1000), &Value::Null));
    let rule = json!({"limit": 1, "of": "requests", "per": "day", "by": ["tenant"], "only": {"tag": "blue"}});
    ok(send(&gateway, "PUT", path, &rule));
    let shown = ok(gateway.admin("GET", path));
    assert_eq!(
        (&shown["origin"], &shown["replaces"], &shown["only"]),
        (&json!("store"), &json!(true), &json!({"tag": "blue"}))
    );
    let blue = gateway.cli(&["keys", "create", "blue", "--tenant", "acme", "--tag", "blue"]).trim().to_owned();
    let red = gateway.cli(&["keys", "create", "red", "--tenant", "acme"]).trim().to_owned();
    is(&gateway, &red, "known");
    assert_eq!(ask(&gateway, &blue).status, 200);
    assert_eq!(limit(&ask(&gateway, &blue))["rule"], "all");
    assert_eq!(ask(&gateway, &red).status, 200, "it has no such tag");
    gateway.kill_and_restart();
    assert_eq!(limit(&ask(&gateway, &blue))["used"], 1, "neither the rule nor what was used is forgotten");
    ok(send(&gateway, "PUT", "/admin/tenants/acme", &json!({"tags": ["blue"]})));
    soon("the tenant's tag", || (ask(&gateway, &red).status == 429).then_some(()));
    // A reload of the file leaves it where it is.
    replace(&gateway.config("gateway.toml"), "limit = 1000", "limit = 999");
    assert_eq!(gateway.admin("POST", "/admin/reload").status, 200);
    assert_eq!(ask(&gateway, &blue).status, 429);
    ok(gateway.admin("DELETE", path));
    soon("the file's rule", || (ask(&gateway, &blue).status == 200).then_some(()));
    assert_eq!(ok(gateway.admin("GET", path))["limit"], 999);
    let changes: Vec<Value> = audit(&gateway).iter().map(|entry| entry["change"]["change"].clone()).collect();
    assert!(changes.contains(&json!("put_rule")) && changes.contains(&json!("delete_rule")), "{changes:?}");
}

#[test]
fn limits_are_explained_as_they_stand() {
    let gateway = TestGateway::start();
    let key = gateway.cli(&["keys", "create", "alice", "--tenant", "acme", "--rpm", "50"]).trim().to_owned();
    gateway.cli(&[
        "limits",
        "put",
        "acme-day",
        "--limit",
        "2",
        "--of",
        "requests",
        "--per",
        "day",
        "--by",
        "tenant",
        "--only",
        "tenant=acme",
    ]);
    gateway.cli(&[
        "limits",
        "put",
        "by-model",
        "--limit",
        "1.5",
        "--of",
        "usd",
        "--per",
        "month",
        "--by",
        "tenant,model",
        "--zone",
        "Europe/Berlin",
    ]);
    gateway.cli(&["limits", "put", "others", "--limit", "1", "--of", "concurrency", "--only", "tenant=beta"]);
    is(&gateway, &key, "known");
    let explain = || ok(gateway.admin("GET", "/admin/limits?key=alice&route=assistant"));
    soon("the last rule", || (explain()["rules"].as_array().unwrap().len() == 6).then_some(()));
    assert_eq!(ask(&gateway, &key).status, 200);
    let explained = explain();

    let names: Vec<&str> =
        explained["rules"].as_array().unwrap().iter().map(|rule| rule["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        ["concurrency", "requests_per_minute", "tokens_per_minute", "usd_per_day", "acme-day", "by-model"]
    );
    let of =
        |name: &str| explained["rules"].as_array().unwrap().iter().find(|rule| rule["name"] == name).unwrap().clone();
    assert_eq!(
        (&of("requests_per_minute")["limit"], &of("requests_per_minute")["origin"]),
        (&json!(50), &json!("key"))
    );
    assert_eq!(of("usd_per_day")["origin"], "config");
    let acme = of("acme-day");
    assert_eq!(
        [&acme["used"], &acme["remaining"], &acme["origin"], &acme["scope"]],
        [&json!(1), &json!(1), &json!("store"), &json!("tenant")]
    );
    assert!(acme["resets_at"].as_str().unwrap().contains("T00:00:00"), "{acme}");
    assert_eq!((&of("by-model")["used"], &of("by-model")["needs"]), (&Value::Null, &json!(["model"])));
    assert_eq!((&explained["refuses"], &explained["nearest"]), (&Value::Null, &json!("acme-day")));
    assert_eq!(ask(&gateway, &key).status, 200);
    let explained = ok(gateway.admin("GET", "/admin/limits?key=acme/alice&route=assistant&model=glimmer-1"));
    assert_eq!(explained["refuses"]["rule"], "acme-day");
    assert!(explained["refuses"]["retry_after_ms"].as_u64().unwrap() > 0);
    let said = gateway.cli(&["limits", "explain", "--key", "alice", "--route", "assistant", "--model", "glimmer-1"]);
    assert!(said.contains("`acme-day` refuses requests now") && said.contains("by-model"), "{said}");
    assert_eq!(limit(&ask(&gateway, &key))["rule"], "acme-day", "as it was said");
    let listed = gateway.cli(&["limits", "list"]);
    assert!(listed.contains("others") && listed.contains("store"), "{listed}");
    gateway.cli(&["limits", "delete", "acme-day"]);
    soon("the rule to be gone", || (ask(&gateway, &key).status == 200).then_some(()));
    let unknown = gateway.run(&[
        "limits",
        "put",
        "x",
        "--limit",
        "1",
        "--of",
        "requests",
        "--per",
        "day",
        "--only",
        "route=nothing",
    ]);
    assert!(!unknown.status.success() && String::from_utf8_lossy(&unknown.stderr).contains("no route `nothing`"));
}

#[test]
fn spending_is_told_as_the_command_tells_it() {
    let gateway = TestGateway::start();
    gateway.ask("12 + 34 = ?");
    let spend = eventually("the row", || {
        let told = ok(gateway.admin("GET", "/admin/spend?by=key,model&since=1h"));
        told["data"][0]["requests"].as_u64().filter(|requests| *requests == 1).map(|_| told["data"].clone())
    });
    let said: Value = serde_json::from_str(&gateway.cli(&["spend", "--by", "key,model", "--json"])).unwrap();
    assert_eq!(spend, said);
}

#[test]
fn the_store_holds_as_many_rules_as_every_request_may_ask() {
    let gateway = TestGateway::start();
    let put = |n: usize| {
        send(&gateway, "PUT", &format!("/admin/rules/r{n}"), &json!({"limit": 9000, "of": "requests", "per": "day"}))
    };
    for n in 0..64 {
        ok(put(n));
    }
    let full = put(64);
    assert_eq!((full.status, code(&full)), (409, "conflict".to_owned()));
    ok(put(63));
    assert_eq!(ask(&gateway, &gateway.key).status, 200);
}

#[test]
fn lists_come_in_pages() {
    let gateway = TestGateway::start();
    for n in 0..5 {
        ok(send(&gateway, "POST", "/admin/keys", &json!({"name": format!("k{n}")})));
        ok(send(&gateway, "PUT", &format!("/admin/tenants/t{n}"), &json!({})));
        ok(send(&gateway, "PUT", &format!("/admin/rules/r{n}"), &json!({"limit": 9, "of": "requests", "per": "day"})));
    }
    for (path, all, id) in [("keys", 6, "id"), ("tenants", 5, "id"), ("rules", 5, "name"), ("audit", 16, "n")] {
        let (mut seen, mut after) = (Vec::new(), String::new());
        loop {
            let page = ok(gateway.admin("GET", &format!("/admin/{path}?limit=2&after={after}")));
            let items = page["data"].as_array().unwrap();
            assert!(items.len() <= 2);
            seen.extend(items.iter().map(|item| item[id].to_string()));
            match &page["next"] {
                Value::Null => break,
                next => after = next.as_str().map_or_else(|| next.to_string(), str::to_owned),
            }
        }
        let mut once = seen.clone();
        once.dedup();
        assert_eq!((seen.len(), once), (all, seen.clone()), "{path}");
    }
}

/// Tokens of an issuer have no key: their tenant may be shut out, and their plan limited, all the same.
#[test]
fn rules_and_tenants_bind_who_has_a_token_too() {
    let setup = Setup::shipped();
    setup.env("JWT_SECRET", SECRET);
    append(
        &setup.path("gateway.toml"),
        "\n[[auth.jwt]]\nname = \"corp\"\nissuer = \"https://login.example\"\naudience = [\"gateway\"]\nalgorithms = [\"HS256\"]\n\
         secret = \"env:JWT_SECRET\"\nclaims = { tenant = \"/org/id\", user = \"/email\", tier = \"/plan\" }\n\
         [[limits.rules]]\nname = \"free\"\nlimit = 1\nof = \"requests\"\nper = \"day\"\nby = [\"user\"]\nonly = { tier = \"free\" }\n",
    );
    let mut gateway = setup.start();
    let token = |user: &str, plan: &str| token(&claims(json!({"email": user, "plan": plan})));
    let (free, paid) = (token("u1", "free"), token("u2", "paid"));
    assert_eq!(ask(&gateway, &free).status, 200);
    assert_eq!(limit(&ask(&gateway, &free))["rule"], "free");
    for _ in 0..2 {
        assert_eq!(ask(&gateway, &paid).status, 200);
    }
    gateway.kill_and_restart();
    assert_eq!(ask(&gateway, &free).status, 429, "a restart forgives nothing to a user of a plan");
    assert_eq!(ask(&gateway, &paid).status, 200);
    gateway.cli(&["tenants", "disable", "acme"]);
    is(&gateway, &paid, "disabled_tenant");
}
