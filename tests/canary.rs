//! Secrets are used in a busy life of a real gateway, and afterwards looked for everywhere but where they belong.

use std::fmt::Write as _;
use std::fs::File;
use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use crate::support::collector::{Collector, Mood};
use crate::support::gateway::{Setup, TestGateway, append, chat_with, replace};
use crate::support::postgres::Postgres;
use crate::support::redis::Redis;
use crate::support::upstream::{Script, Upstream, response};
use crate::support::{eventually, http};
use crate::tokens::{SECRET as JWT_SECRET, claims, token};

const PROVIDER_KEY: &str = "sk-canary-of-the-provider-7d1f0c";
const ADMIN_TOKEN: &str = "canary-admin-token-that-is-long-enough";
const WRONG_ADMIN_TOKEN: &str = "canary-that-somebody-took-for-the-token";
const LANGFUSE_SECRET: &str = "sk-lf-canary-5e2b9a";
const SINK_SECRET: &str = "canary-header-of-a-collector-91c4";
const REDIS_PASSWORD: &str = "canary-of-the-counters-c08d";
const POSTGRES_PASSWORD: &str = "canary-of-the-database-4e71";
const COOKIE: &str = "canary-cookie-of-a-browser-3ab8";
/// What is asked is nobody's business but the model's.
const CONTENT: &str = "canaryoftheprompt";

/// What must not be found, and the only files that may hold it.
pub struct Secret {
    name: &'static str,
    forms: Vec<Vec<u8>>,
    belongs: &'static [&'static str],
}

impl Secret {
    fn new(name: &'static str, bytes: &[u8], belongs: &'static [&'static str]) -> Secret {
        let hex = bytes.iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        let upper = hex.to_uppercase();
        let mut forms = vec![bytes.to_vec(), hex.into_bytes(), upper.into_bytes()];
        forms.extend([STANDARD.encode(bytes), URL_SAFE_NO_PAD.encode(bytes)].map(String::into_bytes));
        Secret { name, forms, belongs }
    }

    /// Of a key everything may be known but its last part.
    pub fn key(name: &'static str, key: &str, belongs: &'static [&'static str]) -> Secret {
        Secret::new(name, key.rsplit('-').next().unwrap().as_bytes(), belongs)
    }

    fn find(&self, bytes: &[u8]) -> Option<usize> {
        self.forms.iter().find_map(|form| {
            // Of megabytes: most are passed by at the first byte.
            let last = bytes.len().checked_sub(form.len())?;
            (0..=last).find(|&at| bytes[at] == form[0] && bytes[at..].starts_with(form))
        })
    }
}

/// Everything that the gateway has said or written, by where it was.
#[derive(Default)]
pub struct Told(Vec<(String, Vec<u8>)>);

impl Told {
    pub fn add(&mut self, place: impl Into<String>, bytes: impl Into<Vec<u8>>) {
        self.0.push((place.into(), bytes.into()));
    }

    fn response(&mut self, place: impl Into<String>, response: &http::Response) {
        let head: String = response.headers.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
        self.add(place, [head.into_bytes(), response.body.clone()].concat());
    }

    pub fn folder(&mut self, folder: &Path, below: &str) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("{below}{}", path.file_name().unwrap().to_string_lossy());
            if path.is_dir() {
                self.folder(&path, &format!("{name}/"));
            } else {
                self.add(format!("file {name}"), std::fs::read(&path).unwrap());
            }
        }
    }

    /// Where a secret was found that does not belong there.
    pub fn leaks(&self, secrets: &[Secret]) -> Vec<String> {
        let mut leaks = Vec::new();
        for secret in secrets {
            for (place, bytes) in &self.0 {
                let belongs = secret.belongs.iter().any(|file| *place == format!("file {file}"));
                if let Some(at) = secret.find(bytes).filter(|_| !belongs) {
                    let around = &bytes[at.saturating_sub(200)..bytes.len().min(at + 100)];
                    leaks.push(format!("{} in {place}: {}", secret.name, String::from_utf8_lossy(around)));
                }
            }
        }
        leaks
    }
}

fn setup(upstream: &Upstream, collector: &Collector) -> Setup {
    let setup = Setup::upstream(upstream, "shadow = { variant = \"remote-model\", sample = 1.0 }");
    setup.replace("routes.toml", "connect_timeout", "api_key = \"env:PROVIDER_KEY\"\nconnect_timeout");
    append(
        &setup.path("routes.toml"),
        "\n[routes.mirrored]\nsplit = { glimmer-2 = 1 }\nshadow = { variant = \"remote-model\", sample = 1.0 }\n\
         cache = { ttl = \"10m\", sampled = true }\n\
         [routes.stands-in]\nsplit = { remote-model = 1 }\nfallback = [\"glimmer-2\"]\n",
    );
    setup.replace(
        "gateway.toml",
        "[[telemetry.traces]]",
        &format!(
            "[[telemetry.traces]]\nkind = \"langfuse\"\nendpoint = \"http://{0}\"\npublic_key = \"pk\"\n\
             secret_key = \"env:LF_SECRET\"\n[[telemetry.traces]]\nkind = \"otlp\"\nendpoint = \"http://{0}/v1/traces\"\n\
             headers = {{ x-api-key = \"env:SINK_SECRET\" }}\n[[telemetry.traces]]",
            collector.address
        ),
    );
    append(
        &setup.path("gateway.toml"),
        "\n[[auth.jwt]]\nname = \"corp\"\nissuer = \"https://login.example\"\naudience = [\"gateway\"]\n\
         algorithms = [\"HS256\"]\nsecret = \"env:JWT_SECRET\"\nclaims = { tenant = \"/org/id\", user = \"/email\" }\n\
         [admin]\ntoken = \"env:ADMIN_TOKEN\"\n",
    );
    for (name, value) in [
        ("PROVIDER_KEY", PROVIDER_KEY),
        ("LF_SECRET", LANGFUSE_SECRET),
        ("SINK_SECRET", SINK_SECRET),
        ("JWT_SECRET", JWT_SECRET),
        ("ADMIN_TOKEN", ADMIN_TOKEN),
        // Everything that our own code has to say.
        ("GLASSGATE_LOG", "glassgate=trace,glassgate_runtime=trace"),
    ] {
        setup.env(name, value);
    }
    setup
}

/// Asks every route with a credential, whole and streamed, and keeps what is said.
fn ask(gateway: &TestGateway, told: &mut Told, credential: &str) {
    for route in ["assistant", "remote", "mirrored", "stands-in"] {
        for stream in [false, true] {
            let mut body = chat_with(&format!("{CONTENT} 12 + 34 = ?"), json!({"max_tokens": 8, "stream": stream}));
            body["model"] = route.into();
            let bytes = http::post(
                "/v1/chat/completions",
                Some(credential),
                &[("cookie", &format!("s={COOKIE}")), ("x-session-id", "s-1")],
                body.to_string().as_bytes(),
            );
            told.response(format!("answer of {route}"), &gateway.open(&bytes).finish());
        }
    }
}

/// An upstream that says the key back in every way that servers fail.
fn say_it_back(upstream: &Upstream) {
    let error = json!({"error": {"message": format!("bad key {PROVIDER_KEY}"), "type": "auth", "param": PROVIDER_KEY, "code": PROVIDER_KEY}});
    let header = [("x-debug", PROVIDER_KEY), ("location", PROVIDER_KEY)];
    for status in ["401 Unauthorized", "403 Forbidden", "404 Not Found", "429 Too Many Requests", "500 Oh", "302 Found"]
    {
        upstream.plays(Script::Raw(response(status, &header, &error.to_string())));
    }
    upstream.plays(Script::Raw(format!("HTTP/1.1 200 {PROVIDER_KEY}\r\n{PROVIDER_KEY}\r\n\r\n").into_bytes()));
    upstream.plays(Script::Cut(PROVIDER_KEY.as_bytes().to_vec()));
}

/// What operators ask, with and without leave.
fn operate(gateway: &TestGateway, told: &mut Told, tokens: &[&str]) {
    let requests = [
        ("GET", "/metrics", ""),
        ("GET", "/admin/config", ""),
        ("GET", "/admin/models", ""),
        ("GET", "/admin/keys", ""),
        ("GET", "/admin/keys/quickstart", ""),
        ("GET", "/admin/tenants", ""),
        ("PUT", "/admin/rules/r", r#"{"limit": 100000, "of": "requests", "per": "day"}"#),
        ("PUT", "/admin/tenants/t", r#"{"tags": ["blue"]}"#),
        ("GET", "/admin/rules", ""),
        ("GET", "/admin/limits?key=quickstart&route=assistant", ""),
        ("GET", "/admin/spend?by=key", ""),
        ("GET", "/admin/audit", ""),
        ("GET", "/admin/export", ""),
        ("GET", "/admin/openapi.json", ""),
        ("GET", "/debug/steps?model=glimmer-1", ""),
        ("POST", "/admin/keys", r#"{"name": "x", "speling": 1}"#),
        ("PATCH", "/admin/keys/nobody", "{"),
        ("POST", "/admin/reload", ""),
    ];
    for token in tokens {
        for (method, path, body) in requests {
            let request = format!(
                "{method} {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            told.response(path, &http::raw(gateway.admin, request.as_bytes()).unwrap().finish());
        }
    }
}

/// What a life has written, without the line that shows newcomers what to try.
fn log(gateway: &TestGateway) -> String {
    let greeting = format!("    -H 'authorization: Bearer {}' \\\n", gateway.key);
    let said = gateway.stderr();
    assert!(said.contains(&greeting), "{said}");
    said.replace(&greeting, "") + &gateway.stdout()
}

#[test]
fn no_secret_is_found_where_it_does_not_belong() {
    no_secret_is_found(|_| {}, |_| {}, &[], &["file ledger.sqlite"]);
}

#[test]
fn no_secret_is_found_in_the_stores_that_gateways_share_or_on_the_way_there() {
    let postgres = Postgres::start_with(&["fsync=off", "synchronous_commit=off", "log_statement=all"]);
    let redis = Redis::start();
    // Uncompressed, or nothing could be found in it.
    redis.ask(&["config", "set", "rdbcompression", "no"]);
    redis.ask(&["acl", "setuser", "gate", "on", &format!(">{REDIS_PASSWORD}"), "~*", "+@all"]);
    let folder = tempfile::tempdir().unwrap();
    let (commands, dump) = (folder.path().join("commands"), folder.path().join("dump"));
    let mut monitor = Command::new("redis-cli");
    monitor.args(["-u", &redis.url(), "monitor"]).stdout(File::create(&commands).unwrap());
    let mut monitor = monitor.spawn().unwrap();
    eventually("the monitor", || std::fs::read_to_string(&commands).unwrap().starts_with("OK").then_some(()));
    let prepare = |setup: &Setup| {
        setup.env("REDIS_URL", &redis.url().replace("//", &format!("//gate:{REDIS_PASSWORD}@")));
        // No password is asked for there, but it is sent on and written down like one.
        setup.env("DATABASE_URL", &postgres.url().replace('@', &format!(":{POSTGRES_PASSWORD}@")));
        let stores = "[storage]\nredis = \"env:REDIS_URL\"\nredis_deadline = \"10s\"\ndatabase = \"env:DATABASE_URL\"";
        setup.replace("gateway.toml", "[storage]", stores);
        setup.replace("gateway.toml", "[limits]", "[limits]\nshared = \"5%\"\ndown = \"closed\"");
        for (name, by) in [("by-all", "\"key\", \"user\", \"tenant\", \"route\", \"model\", \"ip\""), ("all", "")] {
            let rule = "limit = 100000\nof = \"tokens\"\nper = \"day\"\nshared = \"strict\"\ndown = \"closed\"";
            let rule = format!("\n[[limits.rules]]\nname = \"{name}\"\n{rule}\nby = [{by}]\n");
            append(&setup.path("gateway.toml"), &rule);
        }
    };
    let look = |told: &mut Told| {
        let tables = "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')";
        for table in postgres.ask(tables).lines() {
            told.add(format!("table {table}"), postgres.ask(&format!("SELECT t::text FROM {table} t")));
        }
        told.add("Postgres' statements", postgres.server.log());
        redis.ask(&["--rdb", dump.to_str().unwrap()]);
        told.add("Redis' values", std::fs::read(&dump).unwrap());
        told.add("Redis' commands", std::fs::read(&commands).unwrap());
    };
    let passwords = [("Redis' password", REDIS_PASSWORD), ("Postgres' password", POSTGRES_PASSWORD)];
    no_secret_is_found(
        prepare,
        look,
        &passwords,
        &["table public.ledger", "Postgres' statements", "Redis' values", "Redis' commands"],
    );
    let commands = std::fs::read_to_string(&commands).unwrap();
    monitor.kill().unwrap();
    monitor.wait().unwrap();
    for said in ["EVALSHA", "reserve", "settle", "c:requests_per_minute:", "c:by-all:"] {
        assert!(commands.contains(said), "{said} was not listened to");
    }
}

/// A busy life of a gateway that was prepared, after which its stores are looked into too. `kinds` were looked at.
fn no_secret_is_found(
    prepare: impl FnOnce(&Setup),
    look: impl FnOnce(&mut Told),
    passwords: &[(&'static str, &str)],
    kinds: &[&str],
) {
    let (upstream, collector) = (Upstream::start(), Collector::start(&[Mood::Accept]));
    let setup = setup(&upstream, &collector);
    prepare(&setup);
    let mut gateway = setup.start();
    let mut told = Told::default();
    let create = |name: &str| gateway.cli(&["keys", "create", name, "--tenant", "acme"]).trim().to_owned();
    let (old, revoked) = (create("turned"), create("gone"));
    let new = gateway.cli(&["keys", "rotate", "turned", "--grace", "1h"]).trim().to_owned();
    let made = gateway.operate("POST", "/admin/keys", "", r#"{"name": "made"}"#).json();
    let by_api = made["key"].as_str().unwrap().to_owned();
    let jwt = token(&claims(json!({"plan": "free"})));
    eventually("the keys to be known", || {
        [&old, &new, &by_api]
            .iter()
            .all(|key| gateway.send(&http::get("/v1/models", Some(key))).status == 200)
            .then_some(())
    });
    gateway.cli(&["keys", "revoke", "gone"]);
    eventually("the key to be gone", || {
        (gateway.send(&http::get("/v1/models", Some(&revoked))).status == 401).then_some(())
    });
    let guessed = format!("gg-{}-{}", "a".repeat(12), "canary9".repeat(6)[..40].to_owned());
    let quickstart = gateway.key.clone();
    let start_token = std::fs::read_to_string(gateway.data_dir().join("admin.token")).unwrap();
    let pepper = std::fs::read(gateway.data_dir().join("pepper")).unwrap();

    say_it_back(&upstream);
    for credential in [&quickstart, &old, &new, &by_api, &revoked, &guessed, &jwt, &format!("{jwt}x")] {
        ask(&gateway, &mut told, credential);
        let head = format!("GET /v1/models?api_key={credential} HTTP/1.1\r\nhost: g\r\n");
        told.response("key in the URL", &gateway.open(format!("{head}\r\n").as_bytes()).finish());
        let twice = format!("{head}authorization: Bearer {credential}\r\nx-api-key: {guessed}\r\n\r\n");
        told.response("two keys", &gateway.open(twice.as_bytes()).finish());
        let basic = format!("GET /v1/nothing HTTP/1.1\r\nhost: g\r\nauthorization: Basic {credential}\r\n\r\n");
        told.response("no such path", &gateway.open(basic.as_bytes()).finish());
        let broken = http::post("/v1/chat/completions", Some(credential), &[], format!("{{\"{CONTENT}").as_bytes());
        told.response("broken body", &gateway.open(&broken).finish());
    }
    // Hang-ups in the middle of an answer.
    for route in ["assistant", "remote"] {
        let mut body = chat_with(CONTENT, json!({"max_tokens": 500, "ignore_eos": true, "stream": true}));
        body["model"] = route.into();
        drop(gateway.open_unread(&http::post("/v1/chat/completions", Some(&new), &[], body.to_string().as_bytes())));
    }
    operate(&gateway, &mut told, &[&start_token, ADMIN_TOKEN, WRONG_ADMIN_TOKEN, &quickstart]);
    replace(&gateway.config("routes.toml"), "env:PROVIDER_KEY", "env:PROVIDER_KEZ");
    told.response("broken reload", &gateway.admin("POST", "/admin/reload"));
    replace(&gateway.config("routes.toml"), "env:PROVIDER_KEZ", "env:PROVIDER_KEY");
    replace(&gateway.config("prices.toml"), "2026-11-01", "2026-11-02");
    told.response("reload", &gateway.admin("POST", "/admin/reload"));
    let answered = gateway.send(&http::post(
        "/v1/chat/completions",
        Some(&new),
        &[],
        chat_with(CONTENT, json!({"max_tokens": 2})).to_string().as_bytes(),
    ));
    let id = answered.header("x-request-id").unwrap().to_owned();
    eventually("the record", || {
        let record = gateway.admin("GET", &format!("/admin/requests/{id}"));
        (record.status == 200).then(|| told.response("the record of a request", &record))
    });
    let commands: [&[&str]; 10] = [
        &["keys", "list"],
        &["keys", "show", "turned", "--json"],
        &["audit", "list", "--json"],
        &["audit", "verify"],
        &["config", "export"],
        &["ledger", "export", "--format", "csv"],
        &["ledger", "export", "--format", "ndjson"],
        &["spend", "--by", "key,user", "--json"],
        &["trace", &id],
        &["limits", "list", "--json"],
    ];
    for command in commands {
        told.add(command.join(" "), gateway.cli(command));
    }
    let columnar = gateway.run(&["ledger", "export", "--format", "parquet"]).stdout;
    assert!(columnar.starts_with(b"PAR1"), "{}", String::from_utf8_lossy(&columnar));
    told.add("ledger export --format parquet", columnar);
    told.add("log of the first life", log(&gateway));
    gateway.kill_and_restart();
    let second_token = std::fs::read_to_string(gateway.data_dir().join("admin.token")).unwrap();
    assert_ne!(second_token, start_token);
    say_it_back(&upstream);
    ask(&gateway, &mut told, &new);
    operate(&gateway, &mut told, &[&second_token]);
    gateway.stop();
    told.add("log of the second life", log(&gateway));
    told.folder(&gateway.data_dir(), "");
    look(&mut told);
    for post in collector.posts() {
        told.add("spans", format!("{:?} {:?}", post.spans, post.resource));
    }

    let mut secrets = vec![
        Secret::key("the first key", &quickstart, &["quickstart.key"]),
        Secret::key("a key", &new, &[]),
        Secret::key("the key before it", &old, &[]),
        Secret::key("a key of the API", &by_api, &[]),
        Secret::key("a revoked key", &revoked, &[]),
        Secret::key("a guess", &guessed, &[]),
        Secret::new("the pepper", &pepper, &["pepper"]),
        Secret::key("an admin token", &start_token, &[]),
        Secret::key("the admin token", &second_token, &["admin.token"]),
        Secret::new("the configured admin token", ADMIN_TOKEN.as_bytes(), &[]),
        Secret::new("what somebody took for an admin token", WRONG_ADMIN_TOKEN.as_bytes(), &[]),
        Secret::new("the provider's key", PROVIDER_KEY.as_bytes(), &[]),
        Secret::new("the secret of tokens", JWT_SECRET.as_bytes(), &[]),
        Secret::new("a token", jwt.rsplit('.').next().unwrap().as_bytes(), &[]),
        Secret::new("Langfuse's secret", LANGFUSE_SECRET.as_bytes(), &[]),
        Secret::new("Langfuse's pair", format!("pk:{LANGFUSE_SECRET}").as_bytes(), &[]),
        Secret::new("a sink's header", SINK_SECRET.as_bytes(), &[]),
        Secret::new("a cookie", COOKIE.as_bytes(), &[]),
        Secret::new("what was asked", CONTENT.as_bytes(), &[]),
    ];
    secrets.extend(passwords.iter().map(|(name, password)| Secret::new(name, password.as_bytes(), &[])));
    let leaks = told.leaks(&secrets);
    assert!(leaks.is_empty(), "{}", leaks.join("\n"));
    // Whoever looks would find: what has a place of its own is in it, and what was used was used.
    let everything = |name: &str| secrets.iter().find(|secret| secret.name == name).unwrap();
    for (name, file) in
        [("the first key", "quickstart.key"), ("the pepper", "pepper"), ("the admin token", "admin.token")]
    {
        let place = format!("file {file}");
        let found = told.0.iter().any(|(at, bytes)| *at == place && everything(name).find(bytes).is_some());
        assert!(found, "{name} was not looked for");
    }
    let asked = upstream.asked();
    assert!(asked.iter().all(|asked| asked.header("authorization") == Some(&format!("Bearer {PROVIDER_KEY}"))));
    assert!(asked.iter().any(|asked| asked.text().contains(CONTENT)));
    let clients = [&quickstart, &new, &old, &by_api, &jwt].map(|key| key.rsplit(['-', '.']).next().unwrap().to_owned());
    for asked in &asked {
        let said = format!("{:?} {}", asked.headers, asked.body);
        assert!(!clients.iter().any(|secret| said.contains(secret)) && !said.contains(COOKIE), "{said}");
    }
    let posts = collector.posts();
    assert!(posts.iter().any(|post| post.headers.get("x-api-key").is_some_and(|value| value == SINK_SECRET)));
    assert!(posts.iter().any(|post| post.headers.contains_key("authorization")));
    let always = ["file keys", "file traces.jsonl", "spans", "log of the first life", "ledger export"];
    for kind in always.iter().chain(kinds) {
        assert!(
            told.0.iter().any(|(place, bytes)| place.starts_with(*kind) && bytes.len() > 100),
            "{kind} was not looked at"
        );
    }
    let audit: Vec<Value> = told
        .0
        .iter()
        .filter(|(place, _)| place == "audit list --json")
        .flat_map(|(_, bytes)| {
            String::from_utf8_lossy(bytes)
                .lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect::<Vec<Value>>()
        })
        .collect();
    assert!(audit.iter().any(|entry| entry["change"]["change"] == "rotate_key"), "{audit:?}");
}
