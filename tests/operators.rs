//! Who may ask the admin API what, and what it says of itself.

use std::io::Write;

use crate::admin::{audit, ok};
use crate::callers::code;
use crate::support::gateway::{Setup, TestGateway, append, connect, replace};
use crate::support::{http, root};

/// Every route of the document as method and path.
fn documented(gateway: &TestGateway) -> Vec<(String, String, bool)> {
    let document = ok(gateway.admin("GET", "/admin/openapi.json"));
    let paths = document["paths"].as_object().unwrap().clone();
    let operations = paths.iter().flat_map(|(path, operations)| {
        operations.as_object().unwrap().iter().map(|(method, operation)| {
            let is_open = operation["security"].as_array().unwrap().is_empty();
            (method.to_uppercase(), path.replace("{id}", "x").replace("{name}", "x"), is_open)
        })
    });
    operations.collect()
}

#[test]
fn only_who_has_the_token_is_heard_and_only_by_a_name_of_this_listener() {
    let setup = Setup::shipped();
    setup.env("ADMIN_TOKEN", "an-admin-token-of-at-least-32-bytes");
    append(&setup.path("gateway.toml"), "\n[admin]\ntoken = \"env:ADMIN_TOKEN\"\nhosts = [\"ops.example\"]\n");
    let gateway = setup.start();
    let before = audit(&gateway);
    let token = std::fs::read_to_string(gateway.data_dir().join("admin.token")).unwrap();
    let send = |method: &str, path: &str, host: &str, head: &str| {
        let request = format!("{method} {path} HTTP/1.1\r\nhost: {host}\r\n{head}content-length: 0\r\n\r\n");
        http::raw(gateway.admin, request.as_bytes()).unwrap().finish()
    };
    let bearer = |token: &str| format!("authorization: Bearer {token}\r\n");
    let routes = documented(&gateway);
    assert!(routes.len() >= 31, "{}", routes.len());
    for (method, path, is_open) in &routes {
        let strangers = [
            String::new(),
            bearer("wrong"),
            bearer(&gateway.key),
            bearer(&token[..token.len() - 1]),
            bearer(&format!("{token}x")),
            format!("authorization: Basic {token}\r\n"),
            format!("x-api-key: {token}\r\n"),
            format!("cookie: token={token}\r\n"),
        ];
        for head in strangers {
            let response = send(method, path, "localhost", &head);
            assert_eq!(response.status == 401, !is_open, "{method} {path} {head}: {}", response.status);
        }
        let rebound = send(method, path, "evil.example:8081", &bearer(&token));
        let is_probe = ["/livez", "/readyz", "/startupz"].contains(&path.as_str());
        assert_eq!(rebound.status == 403, !is_probe, "{method} {path}: {}", rebound.status);
        assert_eq!(send(method, &format!("{path}?token={token}"), "localhost", "").status == 401, !is_open, "{path}");
    }
    assert_eq!(send("GET", "/admin/nothing", "localhost", "").status, 401, "what there is, strangers are not told");
    assert_eq!(audit(&gateway), before, "and nothing has changed");
    for (host, head) in [
        ("127.0.0.1", bearer(&token)),
        ("ops.example:8081", bearer(&token)),
        ("localhost", bearer("an-admin-token-of-at-least-32-bytes")),
    ] {
        assert_eq!(send("GET", "/admin/keys", host, &head).status, 200, "{host}");
    }
    let made = http::raw(
        gateway.admin,
        format!(
            "PUT /admin/tenants/t HTTP/1.1\r\nhost: localhost\r\n{}content-length: 2\r\n\r\n{{}}",
            bearer("an-admin-token-of-at-least-32-bytes")
        )
        .as_bytes(),
    );
    assert_eq!(made.unwrap().finish().status, 200);
    assert_eq!(audit(&gateway).last().unwrap()["actor"], "api, the token of the configuration");
    let origin = format!("{}origin: http://evil.example\r\n", bearer(&token));
    for (method, host) in [("GET", "localhost"), ("OPTIONS", "localhost"), ("GET", "evil.example")] {
        let response = send(method, "/admin/keys", host, &origin);
        let shares = |(name, _): &(String, String)| name.starts_with("access-control-");
        assert!(!response.headers.iter().any(shares), "no page of anybody else may read this");
        assert_eq!(response.header("cache-control"), Some("no-store"));
    }
    // Names and the token are those of the file that serves.
    replace(&gateway.config("gateway.toml"), "[\"ops.example\"]", "[]");
    replace(&gateway.config("gateway.toml"), "token = \"env:ADMIN_TOKEN\"\n", "");
    assert_eq!(gateway.admin("POST", "/admin/reload").status, 200);
    assert_eq!(send("GET", "/admin/keys", "ops.example", &bearer(&token)).status, 403);
    assert_eq!(send("GET", "/admin/keys", "localhost", &bearer("an-admin-token-of-at-least-32-bytes")).status, 401);
}

#[test]
fn who_guesses_admin_tokens_is_not_listened_to_for_a_while_and_others_are() {
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "failures_per_minute = 0", "failures_per_minute = 5");
    setup.replace("gateway.toml", "[listen]", "[listen]\ntrusted_proxies = [\"127.0.0.1\"]");
    let gateway = setup.start();
    let token = std::fs::read_to_string(gateway.data_dir().join("admin.token")).unwrap();
    let ask = |from: &str, head: &str| {
        let request = format!("GET /admin/keys HTTP/1.1\r\nhost: localhost\r\nx-forwarded-for: {from}\r\n{head}\r\n");
        http::raw(gateway.admin, request.as_bytes()).unwrap().finish()
    };
    let bearer = |token: &str| format!("authorization: Bearer {token}\r\n");
    for number in 0..5 {
        let response = ask("203.0.113.1", &bearer(&format!("guess-{number}")));
        assert_eq!((response.status, code(&response)), (401, "invalid_admin_token".to_owned()));
    }
    for sent in ["wrong", &token] {
        let refused = ask("203.0.113.1", &bearer(sent));
        assert_eq!((refused.status, code(&refused)), (429, "too_many_failures".to_owned()), "right or wrong");
        let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=12).contains(&wait), "{wait}");
    }
    assert_eq!(ask("203.0.113.2", &bearer(&token)).status, 200, "a neighbour is not to blame");
    for _ in 0..20 {
        assert_eq!(ask("203.0.113.3", "").status, 401);
    }
    assert_eq!(ask("203.0.113.3", &bearer(&token)).status, 200, "to send nothing is no guess");
    // Whoever guesses here is heard as a client, and the other way round.
    let models = http::get("/v1/models", Some(&gateway.key));
    let models = [&models[..models.len() - 2], b"x-forwarded-for: 203.0.113.1\r\n\r\n"].concat();
    assert_eq!(gateway.send(&models).status, 200);
    let counted = |result: &str| gateway.metric("gateway_auth_total", &["method=\"admin\"", &format!("\"{result}\"")]);
    assert_eq!((counted("accepted"), counted("invalid_admin_token"), counted("too_many_failures")), (2.0, 25.0, 2.0));
}

#[test]
fn nothing_that_a_client_sends_reaches_the_admin_api() {
    let gateway = TestGateway::start();
    let token = std::fs::read_to_string(gateway.data_dir().join("admin.token")).unwrap();
    let paths: Vec<String> = documented(&gateway).into_iter().map(|(_, path, _)| path).collect();
    let spell = |path: &str| -> Vec<String> {
        let hex = |text: &str| text.bytes().map(|byte| format!("%{byte:02x}")).collect::<String>();
        let mut all = vec![
            path.to_owned(),
            path.to_uppercase(),
            format!("/{path}"),
            format!("{path}/"),
            format!("{path}?x=1"),
            format!("{path};x"),
            format!("{path}%00"),
            format!("{path}%20"),
            format!("{path}."),
            format!("/.{path}"),
            format!("/v1{path}"),
            format!("/v1/..{path}"),
            format!("/v1/%2e%2e{path}"),
            format!("/v1/models/..{path}"),
            format!("/health/..{path}"),
            format!("/%2f{}", &path[1..]),
            path.replace("admin", "%61dmin"),
            path.replace("admin", "Admin"),
            path.replace('/', "//"),
            path.replace('/', "/./"),
            path.replace('/', "%2f"),
            path.replace('/', "\\"),
            hex(path),
        ];
        all.extend((1..path.len()).map(|at| format!("{}{}{}", &path[..at], hex(&path[at..=at]), &path[at + 1..])));
        all
    };
    let hosts = [gateway.data.to_string(), gateway.admin.to_string(), "localhost".to_owned()];
    let (mut tried, mut refused) = (0, 0);
    let (mut stream, mut reader) = connect(gateway.data);
    for path in &paths {
        for (turn, spelling) in spell(path).into_iter().enumerate() {
            for method in ["GET", "POST"] {
                let host = &hosts[turn % hosts.len()];
                let absolute =
                    if turn % 7 == 3 { format!("http://{}{spelling}", gateway.admin) } else { spelling.clone() };
                let request = format!(
                    "{method} {absolute} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\nx-forwarded-host: localhost\r\nx-original-url: {path}\r\ncontent-length: 0\r\n\r\n"
                );
                if stream.write_all(request.as_bytes()).is_err() {
                    (stream, reader) = connect(gateway.data);
                    stream.write_all(request.as_bytes()).unwrap();
                }
                let Ok(open) = http::read_head(reader) else {
                    // What the guard has closed: once more, alone.
                    (stream, reader) = connect(gateway.data);
                    let open = http::raw(gateway.data, request.as_bytes()).unwrap();
                    assert!(matches!(open.status, 400 | 401 | 404), "{method} {absolute}: {}", open.status);
                    tried += 1;
                    continue;
                };
                // A path below /v1/models is a model's name, and asks for a key.
                let expected = matches!(open.status, 400 | 401 | 404);
                assert!(expected, "{method} {absolute}: {}", open.status);
                refused += usize::from(open.status == 404);
                let closes = open.header("connection") == Some("close");
                let (response, rest) = open.finish_and_keep();
                let body = String::from_utf8_lossy(&response.body).into_owned();
                assert!(!body.contains("admin_error") && !body.contains("openapi\":"), "{body}");
                reader = rest;
                if closes {
                    (stream, reader) = connect(gateway.data);
                }
                tried += 1;
            }
        }
    }
    assert!(tried > 2_000 && refused > 1_000, "{tried} tried, {refused} were 404");
    assert_eq!(audit(&gateway).len(), 1);
}

#[test]
fn the_openapi_document_is_valid_and_holds_every_answer() {
    let venv = std::env::var("GLASSGATE_CLIENTS")
        .expect("GLASSGATE_CLIENTS names the venv; `make test` makes it and sets this");
    let gateway = TestGateway::start();
    gateway.cli(&["tenants", "put", "acme", "--tag", "blue"]);
    gateway.cli(&["limits", "put", "r", "--limit", "10", "--of", "requests", "--per", "day", "--only", "tag=blue"]);
    let output = std::process::Command::new(format!("{venv}/bin/python"))
        .arg(root().join("tests/clients/openapi.py"))
        .env("ADMIN", format!("http://{}", gateway.admin))
        .env("ADMIN_TOKEN", std::fs::read_to_string(gateway.data_dir().join("admin.token")).unwrap())
        .output()
        .expect("the venv has a python");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}\n{stderr}");
    assert!(stdout.trim_end().ends_with("31 operations are as they are documented"), "{stdout}");
}

#[test]
#[ignore = "takes a minute, and an environment that `make test-long` makes"]
fn whatever_its_document_allows_or_forbids_is_answered_as_it_says() {
    let venv = std::env::var("GLASSGATE_FUZZ").expect("GLASSGATE_FUZZ names the venv; `make test-long` sets this");
    let gateway = TestGateway::start();
    let token = std::fs::read_to_string(gateway.data_dir().join("admin.token")).unwrap();
    let folder = root().join("tests/clients/fuzz").canonicalize().unwrap();
    let output = std::process::Command::new(format!("{venv}/bin/schemathesis"))
        // Where it may leave its notes.
        .current_dir(gateway.data_dir())
        .env("SCHEMATHESIS_HOOKS", folder.join("formats.py"))
        .arg("--config-file")
        .arg(folder.join("schemathesis.toml"))
        .args(["run", "--no-color", "--header", &format!("Authorization: Bearer {token}")])
        .arg(format!("http://{}/admin/openapi.json", gateway.admin))
        .output()
        .expect("the venv has a schemathesis");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    // All but the document itself.
    assert!(said.contains(&format!("Tested: {}\n", documented(&gateway).len() - 1)), "{said}");
    let bad = gateway.stderr();
    assert!(!bad.contains("panicked"), "{bad}");
}
