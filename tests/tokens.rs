//! Tokens of an identity provider, through the whole gateway. Forgeries of every kind are `auth::jwt`'s own tests.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::callers::{code, models};
use crate::support::eventually;
use crate::support::evidence::ledger;
use crate::support::gateway::{Setup, append, chat, replace};

/// An issuer whose tokens are signed with a secret that both sides have.
const ISSUER: &str = r#"
[[auth.jwt]]
name = "corp"
issuer = "https://login.example"
audience = ["gateway"]
algorithms = ["HS256"]
secret = "env:JWT_SECRET"
header = "x-identity-token"
claims = { tenant = "/org/id", user = "/email", scopes = "/scope" }
"#;
pub const SECRET: &str = "a secret of thirty-two bytes and";

pub fn token(claims: &Value) -> String {
    let encode = |text: &[u8]| URL_SAFE_NO_PAD.encode(text);
    let signed = format!("{}.{}", encode(br#"{"alg":"HS256","typ":"JWT"}"#), encode(claims.to_string().as_bytes()));
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, SECRET.as_bytes());
    format!("{signed}.{}", encode(ring::hmac::sign(&key, signed.as_bytes()).as_ref()))
}

pub fn claims(more: Value) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let mut claims = json!({"iss": "https://login.example", "aud": "gateway", "exp": now + 600, "email": "a@acme.example",
                            "org": {"id": "acme"}, "scope": "inference openid"});
    for (name, value) in more.as_object().unwrap() {
        claims[name] = value.clone();
    }
    claims
}

#[test]
fn a_token_of_a_trusted_issuer_is_as_good_as_a_key_and_is_written_nowhere() {
    let setup = Setup::shipped();
    append(&setup.path("gateway.toml"), ISSUER);
    setup.env("JWT_SECRET", SECRET);
    let mut gateway = setup.start();
    let good = token(&claims(json!({})));
    let send = |token: &str, more: &str| {
        let body = chat("12 + 34 = ?").to_string();
        let length = body.len();
        let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\n";
        gateway
            .send(format!("{head}content-length: {length}\r\nx-identity-token: {token}\r\n{more}\r\n{body}").as_bytes())
    };
    let answered = send(&good, "");
    assert_eq!(answered.status, 200, "{}", answered.json());
    let told = |token: &str| (send(token, "").status, code(&send(token, "")));
    let refused = |status: u16, code: &str| (status, code.to_owned());
    assert_eq!(told(&token(&claims(json!({"exp": 1})))), refused(401, "jwt_expired"));
    assert_eq!(told(&token(&claims(json!({"aud": "other"})))), refused(401, "jwt_audience"));
    assert_eq!(told(&token(&claims(json!({"scope": "models"})))), refused(403, "scope_missing"));
    let (signed, other) = (good.rsplit_once('.').unwrap().0, token(&claims(json!({"jti": "other"}))));
    let swapped = format!("{signed}.{}", other.rsplit('.').next().unwrap());
    assert_eq!(told(&swapped), refused(401, "jwt_signature"));
    let both = send(&good, &format!("authorization: Bearer {}\r\n", gateway.key));
    assert_eq!((both.status, code(&both)), refused(400, "ambiguous_credentials"));
    assert_eq!(models(&gateway, &format!("authorization: Bearer {good}\r\n")).status, 401, "it stands elsewhere");
    let models = models(&gateway, &format!("x-identity-token: {good}\r\n"));
    assert_eq!((models.status, code(&models)), refused(403, "scope_missing"));

    let id = answered.header("x-request-id").unwrap().to_owned();
    let line =
        eventually("the log line", || gateway.stdout().lines().find(|line| line.contains(&id)).map(str::to_owned));
    let line: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&line["tenant"], &line["key_id"], &line["key_name"]),
        (&json!("acme"), &json!("jwt:corp/acme"), &json!("corp"))
    );
    let row = eventually("its row", || ledger(&gateway).into_iter().find(|row| row.request_id == id));
    assert_eq!(row.tenant, "acme");
    assert_eq!(gateway.metric("gateway_auth_total", &["method=\"jwt\"", "result=\"jwt_expired\""]), 2.0);

    // What is trusted is read again with everything else.
    replace(&gateway.config("gateway.toml"), "audience = [\"gateway\"]", "audience = [\"another\"]");
    assert_eq!(gateway.admin("POST", "/admin/reload").status, 200);
    assert_eq!(told(&good), refused(401, "jwt_audience"), "also a token that was good before");
    gateway.stop();
    let mark = good.rsplit('.').next().unwrap();
    for told in
        [gateway.stdout(), gateway.stderr(), std::fs::read_to_string(gateway.data_dir().join("traces.jsonl")).unwrap()]
    {
        assert!(!told.contains(mark) && !told.contains(SECRET));
    }
}

#[test]
fn an_issuer_that_could_not_be_trusted_is_a_mistake_with_its_line() {
    let mistakes: &[(&str, &str, &str)] = &[
        ("name = \"corp\"", "", "`auth.jwt.name` is missing"),
        ("issuer = \"https://login.example\"", "", "`auth.jwt.issuer` is missing"),
        ("audience = [\"gateway\"]", "audience = []", "`auth.jwt.audience` is missing"),
        ("algorithms = [\"HS256\"]", "", "`auth.jwt.algorithms` is missing"),
        ("[\"HS256\"]", "[\"none\"]", "knows HS256"),
        ("[\"HS256\"]", "[\"RS256\"]", "RS256 is not for keys of this kind"),
        ("secret = \"env:JWT_SECRET\"", "", "exactly one of `jwks`, `pem` and `secret`"),
        ("secret =", "jwks = \"https://a/k\"\nsecret =", "exactly one of"),
        ("secret = \"env:JWT_SECRET\"", "secret = \"hush\"", "must be read from the environment"),
        ("env:JWT_SECRET", "env:SHORT", "at least 32 bytes"),
        ("env:JWT_SECRET", "env:NOT_THERE", "`NOT_THERE` is not set"),
        ("secret = \"env:JWT_SECRET\"", "jwks = \"http://login.example/keys\"", "must be an https:// address"),
        ("secret = \"env:JWT_SECRET\"", "jwks = \"https://a/k\"", "HS256 is not for keys of this kind"),
        ("secret = \"env:JWT_SECRET\"", "pem = \"routes.toml\"", "BEGIN PUBLIC KEY"),
        ("secret = \"env:JWT_SECRET\"", "pem = \"nothing.pem\"", "nothing.pem: cannot be read"),
        ("tenant = \"/org/id\"", "tenant = \"org\"", "must be a JSON pointer such as \"/tenant\""),
        ("header =", "tenant = \"acme\"\nheader =", "both `auth.jwt.tenant` and `auth.jwt.claims.tenant`"),
        ("x-identity-token", "no header", "no name of a header"),
        ("header =", "leeway = \"1h\"\nheader =", "at most 300 s"),
        ("header =", "audiense = 1\nheader =", "Did you mean `audience`?"),
        ("[[auth.jwt]]", &format!("{}[[auth.jwt]]", ISSUER.trim_start()), "is not the only one"),
    ];
    for (from, to, hint) in mistakes {
        let setup = Setup::shipped();
        setup.env("JWT_SECRET", SECRET);
        setup.env("SHORT", "too short to be one");
        let text = ISSUER.replacen(from, to, 1);
        assert_ne!(text, ISSUER);
        append(&setup.path("gateway.toml"), &text);
        let output = setup.run(&["check"]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && said.contains(hint) && said.contains(":"),
            "{to:?}: {hint:?} is not in:\n{said}"
        );
    }
}

#[test]
fn limits_are_explained_for_who_has_a_token_as_they_stand_for_them() {
    let setup = Setup::shipped();
    append(&setup.path("gateway.toml"), &ISSUER.replace("user = \"/email\"", "user = \"/email\", tier = \"/plan\""));
    let rule = |name: &str, limit: u32, by: &str, only: &str| {
        let what = format!("name = \"{name}\"\nlimit = {limit}\nof = \"requests\"\nper = \"day\"");
        append(
            &setup.path("gateway.toml"),
            &format!("\n[[limits.rules]]\n{what}\nby = [\"{by}\"]\nonly = {{ {only} }}\n"),
        );
    };
    rule("free-day", 1, "user", "tier = \"free\"");
    rule("acme-day", 5, "tenant", "tenant = \"acme\"");
    setup.env("JWT_SECRET", SECRET);
    let gateway = setup.start();
    let free = token(&claims(json!({"plan": "free"})));
    let ask = || {
        let (body, head) = (chat("12 + 34 = ?").to_string(), "POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\n");
        let (length, json) = (body.len(), "content-type: application/json\r\n");
        gateway
            .send(format!("{head}{json}content-length: {length}\r\nx-identity-token: {free}\r\n\r\n{body}").as_bytes())
    };
    assert_eq!(ask().status, 200);
    let explain = |who: &str| -> Value {
        let words: Vec<&str> = who.split(' ').collect();
        let told = gateway.cli(&[&["limits", "explain", "--route", "assistant", "--json"][..], &words].concat());
        serde_json::from_str(&told).unwrap()
    };
    let used = |told: &Value, name: &str| -> Value {
        let rules = told["rules"].as_array().unwrap();
        rules.iter().find(|rule| rule["name"] == name).map_or(Value::Null, |rule| rule["used"].clone())
    };
    let told = explain("--tenant acme --user a@acme.example --tier free");
    assert_eq!(told["key"], json!({"id": "jwt:corp/acme", "name": "corp", "tenant": "acme"}));
    assert_eq!((used(&told, "free-day"), used(&told, "acme-day")), (json!(1), json!(1)));
    assert_eq!(told["refuses"]["rule"], "free-day");
    assert_eq!((ask().status, code(&ask())), (429, "rate_limit_exceeded".to_owned()), "as it was said");
    let told = explain("--issuer corp --tenant acme --user b@acme.example --tier gold");
    assert_eq!((used(&told, "free-day"), used(&told, "acme-day")), (Value::Null, json!(1)), "free is for others");
    assert_eq!(used(&explain("--tenant beta --user b --tier free"), "free-day"), 0, "each user has a counter");
    for (query, param, said) in [
        ("", "key", "whose limits"),
        ("user=a", "tenant", "tokens of `corp` say it"),
        ("user=a&tenant=acme&issuer=nobody", "issuer", "one of corp"),
        ("key=quickstart&tenant=acme", "tenant", "leave it out beside `key`"),
    ] {
        let refused = gateway.admin("GET", &format!("/admin/limits?{query}"));
        let error = &refused.json()["error"];
        assert_eq!((refused.status, &error["param"]), (400, &json!(param)), "{query}");
        assert!(error["message"].as_str().unwrap().contains(said), "{error}");
    }
}
