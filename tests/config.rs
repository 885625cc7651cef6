//! Configuration: checked, explained, and reloaded all or nothing.

use std::collections::BTreeSet;

use glassgate::config::{Config, Limits, Overrides};
use serde_json::{Value, json};

use crate::support::gateway::{Setup, TestGateway, append, chat, chat_with, replace};
use crate::support::{eventually, root};

fn variant(gateway: &TestGateway, session: &str) -> String {
    let body = chat_with("12 + 34 = ?", json!({"max_tokens": 1}));
    let response = gateway.send(&gateway.chat_bytes(&body, &[("x-session-id", session)]));
    response.header("x-glassgate-variant").unwrap().to_owned()
}

#[test]
fn the_split_sticks_to_the_session_and_explain_tells_the_same() {
    let gateway = TestGateway::start();
    let mut both = BTreeSet::new();
    for i in 0..30 {
        let session = format!("s{i}");
        let got = variant(&gateway, &session);
        assert_eq!(variant(&gateway, &session), got, "a session keeps its variant");
        both.insert(got);
    }
    assert_eq!(both.len(), 2, "30 sessions at 90/10 reach both variants");
    for session in ["s0", "s1", "s2"] {
        let explained: Value = serde_json::from_str(&gateway.cli(&[
            "routes",
            "explain",
            "--route",
            "assistant",
            "--session",
            session,
            "--json",
        ]))
        .unwrap();
        assert_eq!(explained["chosen"], variant(&gateway, session));
        assert_eq!(explained["unit"], format!("header:x-session-id={session}"));
    }
    let unknown = gateway.run(&["routes", "explain", "--route", "nothing"]);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("assistant"), "an unknown route lists the known ones");
}

#[test]
fn an_edited_split_counts_after_saving_and_a_broken_edit_changes_nothing() {
    let gateway = TestGateway::start();
    let hash =
        |gateway: &TestGateway| gateway.post(&chat("Hello!")).header("x-glassgate-config-hash").unwrap().to_owned();
    let before = hash(&gateway);
    replace(&gateway.config("routes.toml"), "glimmer-1 = 90, glimmer-2 = 10", "glimmer-1 = 0, glimmer-2 = 100");
    let after = eventually("the new split to count", || {
        let now = hash(&gateway);
        (now != before).then_some(now)
    });
    for i in 0..10 {
        assert_eq!(variant(&gateway, &format!("s{i}")), "glimmer-2");
    }
    assert_eq!(gateway.metric("gateway_config_reloads_total", &["applied"]), 1.0);
    assert_eq!(gateway.metric("gateway_config_info", &[&after]), 1.0);

    replace(&gateway.config("prices.toml"), "output = 0.12", "output = -1");
    eventually("the broken file to be rejected", || {
        (gateway.metric("gateway_config_reloads_total", &["rejected"]) >= 1.0).then_some(())
    });
    assert_eq!(hash(&gateway), after, "the old configuration keeps serving");
    let shown = gateway.admin("GET", "/admin/config").json();
    assert!(shown["rejected"].as_str().unwrap().contains("prices.toml:"), "{shown}");
    let reload = gateway.admin("POST", "/admin/reload");
    assert_eq!(reload.status, 422);
    replace(&gateway.config("prices.toml"), "output = -1", "output = 0.24");
    assert_eq!(gateway.admin("POST", "/admin/reload").status, 200);
    assert_ne!(hash(&gateway), after);
}

#[test]
fn an_edited_limit_counts_after_saving_without_giving_anybody_a_fresh_minute() {
    let gateway = TestGateway::start();
    let ask = || gateway.post(&chat_with("Hello!", json!({"max_tokens": 1})));
    assert_eq!(ask().header("x-ratelimit-limit-requests"), Some("600"));
    replace(&gateway.config("prices.toml"), "2026-11-01", "2026-11-02");
    eventually("the new prices", || (ask().json()["glassgate"]["price_version"] == "2026-11-02").then_some(()));
    let left: u32 = ask().header("x-ratelimit-remaining-requests").unwrap().parse().unwrap();
    assert!(left < 598, "a reload must not forgive: {left}");
    replace(&gateway.config("gateway.toml"), "requests_per_minute = 600", "requests_per_minute = 60");
    let left: u32 = eventually("the new limit", || {
        let response = ask();
        (response.header("x-ratelimit-limit-requests") == Some("60"))
            .then(|| response.header("x-ratelimit-remaining-requests").unwrap().parse().unwrap())
    });
    assert!(left < 58, "a reload must not forgive: {left}");
}

#[test]
fn admin_needs_its_token() {
    let gateway = TestGateway::start();
    assert_eq!(gateway.admin_get("/admin/config").status, 401);
    assert_eq!(gateway.admin("GET", "/admin/config").status, 200);
    assert_eq!(gateway.admin("GET", "/admin/nothing").status, 404);
}

/// A broken file and what must be said of it.
#[test]
fn every_mistake_is_reported_with_file_line_and_a_suggestion() {
    let mistakes: &[(&str, &str, &str, &[&str])] = &[
        (
            "gateway.toml",
            "requests_per_minute = 600",
            "requests_per_minit = 600",
            &["gateway.toml:19:", "unknown key `limits.requests_per_minit`", "Did you mean `requests_per_minute`?"],
        ),
        (
            "gateway.toml",
            "usd_per_day = 1_000_000",
            "usd_per_day = -1",
            &["gateway.toml:22:", "`limits.usd_per_day` must be a number of US dollars from 0"],
        ),
        ("gateway.toml", "concurrency = 10000", "concurrency = 0", &["gateway.toml:21:", "`limits.concurrency`"]),
        ("gateway.toml", "pre_drain = \"0s\"", "pre_drain = \"-1s\"", &["gateway.toml:9:", "from \"0s\" to \"24h\""]),
        (
            "gateway.toml",
            "pre_drain = \"0s\"",
            "connections_max = 5\nconnections_per_ip = 6",
            &["`listen.connections_per_ip` is larger than"],
        ),
        (
            "gateway.toml",
            "pre_drain = \"0s\"",
            "trusted_proxies = [\"10.0.0.1/8\"]",
            &["gateway.toml:9:", "`listen.trusted_proxies`", "first address"],
        ),
        ("gateway.toml", "\"127.0.0.1:8080\"", "\"here\"", &["gateway.toml:7:", "127.0.0.1:8080"]),
        (
            "gateway.toml",
            "durability = \"process\"",
            "durability = \"fast\"",
            &["gateway.toml:12:", "must be \"process\""],
        ),
        (
            "gateway.toml",
            "durability = \"process\"",
            "database = \"postgres://gg:pepper@db.example/ledger\"",
            &["gateway.toml:12:", "`storage.database` holds a password", "env:DATABASE_URL"],
        ),
        (
            "gateway.toml",
            "durability = \"process\"",
            "database = \"ledger.sqlite\"",
            &["gateway.toml:12:", "`storage.database`", "postgres://user@host:5432/database"],
        ),
        (
            "gateway.toml",
            "durability = \"process\"",
            "retain = \"30 days\"",
            &["gateway.toml:12:", "`storage.retain` must be from \"2 months\"", "\"13 months\""],
        ),
        (
            "gateway.toml",
            "failures_per_minute = 0",
            "pepper = \"00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\"",
            &["`auth.pepper`", "env:GLASSGATE_PEPPER"],
        ),
        (
            "gateway.toml",
            "durability = \"process\"",
            "database_ca = \"ca.pem\"",
            &["gateway.toml:12:", "`storage.database_ca`", "there is none"],
        ),
        (
            "routes.toml",
            "glimmer-1 = 90, glimmer-2 = 10",
            "glimmer-1 = -90, glimmer-2 = 10",
            &["routes.toml:10:", "weight of `glimmer-1`"],
        ),
        (
            "routes.toml",
            "glimmer-1 = 90, glimmer-2 = 10",
            "glimer-1 = 90, glimmer-2 = 10",
            &["routes.toml:10:", "Did you mean `glimmer-1`?"],
        ),
        (
            "routes.toml",
            "glimmer-1 = 90, glimmer-2 = 10",
            "glimmer-1 = 0",
            &["routes.toml:", "at least one weight must be above 0"],
        ),
        (
            "routes.toml",
            "source = \"glimmer-2\"",
            "source = \"glimmer-3\"",
            &["routes.toml:7:", "there is no model \"glimmer-3\"", "Did you mean"],
        ),
        (
            "routes.toml",
            "source = \"glimmer-2\"",
            "source = \"../glimmer-2\"",
            &["routes.toml:7:", "inside a model root"],
        ),
        ("routes.toml", "first_token = \"60s\"", "first_token = 5", &["routes.toml:12:", "must be a string"]),
        (
            "gateway.toml",
            "[models]",
            "[models]\nitl_traget = \"20ms\"",
            &["unknown key `models.itl_traget`", "Did you mean `itl_target`?"],
        ),
        ("gateway.toml", "[models]", "[models]\nitl_target = \"0ms\"", &["`models.itl_target`", "from \"1ms\""]),
        (
            "routes.toml",
            "[routes.assistant]",
            "[routes.assistant]\npriority = \"bach\"",
            &["must be \"interactive\" or \"batch\"", "Did you mean `batch`?"],
        ),
        (
            "routes.toml",
            "first_token = \"60s\"",
            "first_token = \"60s\", queue = \"60s\"",
            &["routes.toml:12:", "`routes.assistant.timeouts.queue` is not shorter than"],
        ),
        (
            "prices.toml",
            "input = 0.02",
            "input = 0.02\n[models.glimmer-1.service.flexx]\ninput = 0.01",
            &["prices.toml:6:", "`models.glimmer-1.service` has no `flexx`. Did you mean `flex`?"],
        ),
        (
            "prices.toml",
            "input = 0.02",
            "input = 0.02\n[[models.glimmer-1.tier]]\nabove = 9\n[[models.glimmer-1.tier]]\nabove = 9",
            &["prices.toml:8:", "`models.glimmer-1.tier.above` is not higher"],
        ),
        (
            "prices.toml",
            "input = 0.02",
            "input = 0.02\n[[models.glimmer-1.change]]\nfrom = \"soon\"",
            &["prices.toml:6:", "`models.glimmer-1.change.from` must say since when"],
        ),
        (
            "gateway.toml",
            "[telemetry]",
            "[admin]\ntoken = \"in-the-file-for-everybody-to-read\"\n[telemetry]",
            &["gateway.toml:", "`admin.token` is read from the environment"],
        ),
        ("gateway.toml", "[telemetry]", "[admin]\ntoken = \"env:HOME\"\n[telemetry]", &["at least 32 bytes"]),
        ("prices.toml", "input = 0.02", "input = 0.000_000_02", &["prices.toml:5:", "finer than"]),
        ("prices.toml", "[models.glimmer-2]", "[models.glimmer-9]", &["prices.toml:9:", "no model `glimmer-9`"]),
        ("prices.toml", "version = \"2026-11-01\"", "", &["prices.toml:", "`version` is missing"]),
        ("routes.toml", "[routes.assistant]", "[routes.assistant", &["routes.toml:9:", "not valid TOML"]),
    ];
    for (file, from, to, expected) in mistakes {
        let setup = Setup::shipped();
        setup.replace(file, from, to);
        let output = setup.run(&["check"]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{to:?} was accepted");
        for text in *expected {
            assert!(said.contains(text), "{to:?}: {text:?} is missing in:\n{said}");
        }
        assert!(
            !setup.run(&["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]).status.success(),
            "serve accepts what check refuses"
        );
    }
}

#[test]
fn all_problems_of_all_files_are_reported_at_once() {
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "requests_per_minute = 600", "requests_per_minute = 0");
    setup.replace("routes.toml", "idle = \"60s\"", "idle = \"soon\"");
    setup.replace("prices.toml", "output = 0.12", "output = \"free\"");
    let said = String::from_utf8(setup.run(&["check"]).stderr).unwrap();
    for text in ["gateway.toml:19:", "routes.toml:12:", "prices.toml:11:"] {
        assert!(said.contains(text), "{said}");
    }
}

#[test]
fn the_shipped_configuration_is_sound_and_the_reference_names_every_key() {
    let setup = Setup::shipped();
    assert!(setup.run(&["check"]).status.success());
    let (_, mut known) = Config::load_with_keys(&setup.path("gateway.toml"), &Overrides::default()).unwrap();
    // Keys that only some kinds have.
    append(
        &setup.path("gateway.toml"),
        "[[auth.jwt]]\nname = \"a\"\nissuer = \"a\"\naudience = [\"a\"]\nalgorithms = [\"RS256\"]\njwks = \"https://a/b\"\nclaims = {}\n",
    );
    setup.replace(
        "gateway.toml",
        "[[telemetry.traces]]",
        "[[telemetry.traces]]\nkind = \"langfuse\"\nendpoint = \"http://a\"\npublic_key = \"a\"\nsecret_key = \"env:PATH\"\n\
         [[telemetry.traces]]",
    );
    append(
        &setup.path("gateway.toml"),
        "\n[[limits.rules]]\nname = \"r\"\nlimit = 1\nof = \"requests\"\nper = \"day\"\n",
    );
    append(&setup.path("gateway.toml"), "\n[admin]\nhosts = []\n");
    known.extend(Config::load_with_keys(&setup.path("gateway.toml"), &Overrides::default()).unwrap().1);
    let reference = root().join("configs/reference.toml");
    let read = Config::load(&reference, &Overrides::default()).expect("the reference is itself a gateway.toml");
    assert_eq!(read.gateway.limits, Limits::default(), "the reference shows the defaults");
    let text = std::fs::read_to_string(reference).unwrap();
    for key in known {
        let last = key.rsplit('.').next().unwrap();
        // `key = …` at the beginning of a line or comment, or `[key]`, `[[…key]]`.
        let explained = text.lines().map(|line| line.trim_start_matches("# ")).any(|line| {
            line.starts_with(&format!("{last} ="))
                || line.starts_with('[') && line.split([']', '[', '.']).any(|part| part == last)
        });
        assert!(last == "*" || explained, "configs/reference.toml does not explain `{key}`");
    }
}

#[test]
fn a_broken_model_is_named_and_the_other_serves() {
    let setup = Setup::shipped();
    let models = setup.0.path().join("models");
    copy(&root().join("models/glimmer-1"), &models.join("glimmer-1"));
    copy(&root().join("models/glimmer-2"), &models.join("glimmer-2"));
    let original = root().join("models").canonicalize().unwrap();
    setup.replace("gateway.toml", original.to_str().unwrap(), models.to_str().unwrap());
    let weights = models.join("glimmer-1/model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();

    let output = setup.run(&["check"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("glimmer-1/model.safetensors"), "{said}");

    let gateway = setup.start();
    assert!(gateway.stderr().contains("glimmer-1/model.safetensors"), "{}", gateway.stderr());
    for i in 0..10 {
        assert_eq!(variant(&gateway, &format!("s{i}")), "glimmer-2", "who would get the broken one gets the other");
    }
    assert_eq!(gateway.metric("runtime_model_state", &["model=\"glimmer-1\"", "state=\"failed\""]), 1.0);
    // Mended, it comes back with a reload.
    std::fs::write(&weights, &bytes).unwrap();
    assert_eq!(gateway.admin("POST", "/admin/reload").status, 200, "the same files, a mended model");
    eventually("the mended model to serve", || (variant(&gateway, "s0") == "glimmer-1").then_some(()));
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
