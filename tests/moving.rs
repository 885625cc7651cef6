//! What operators decided, taken to another folder; and the record of it, tampered with.

use serde_json::{Value, json};

use crate::admin::{ask, is, ok, soon, told};
use crate::callers::code;
use crate::support::gateway::{Setup, TestGateway};
use crate::support::{eventually, http};

#[test]
fn what_is_exported_decides_the_same_in_an_empty_folder() {
    let setup = Setup::shipped();
    let gateway = setup.start();
    let create = |name: &str, more: &[&str]| gateway.cli(&[&["keys", "create", name], more].concat()).trim().to_owned();
    let keys = [
        create("plain", &[]),
        create(
            "bound",
            &[
                "--model",
                "glimmer-1",
                "--scope",
                "models",
                "--user",
                "u",
                "--meta",
                "owner=a",
                "--expires",
                "30d",
                "--usd-per-day",
                "0.5",
            ],
        ),
        create("far", &["--from", "203.0.113.0/24"]),
        create("ended", &["--expires", "2020-01-01"]),
        create("off", &["--tenant", "beta"]),
        create("gone", &[]),
        create("shut", &["--tenant", "acme", "--tag", "blue"]),
        create("late", &["--rpm", "2", "--tag", "blue"]),
        create("turned", &[]),
        gateway.key.clone(),
    ];
    gateway.cli(&["keys", "disable", "off"]);
    gateway.cli(&["keys", "revoke", "gone"]);
    let renewed = gateway.cli(&["keys", "rotate", "turned"]).trim().to_owned();
    gateway.cli(&["tenants", "put", "acme", "--name", "Acme", "--tag", "red"]);
    gateway.cli(&["tenants", "disable", "acme"]);
    gateway.cli(&[
        "limits", "put", "blue", "--limit", "3", "--of", "requests", "--per", "day", "--by", "key", "--only",
        "tag=blue",
    ]);
    gateway.cli(&[
        "limits",
        "put",
        "money",
        "--limit",
        "0.25",
        "--of",
        "usd",
        "--per",
        "month",
        "--mode",
        "throttle",
        "--throttle",
        "10/minute",
    ]);
    is(&gateway, &renewed, "known");
    eventually("the last change", || (told(&gateway, &keys[6]) == "disabled_tenant").then_some(()));
    soon("the rules", || {
        (ok(gateway.admin("GET", "/admin/limits?key=plain"))["rules"].as_array().unwrap().len() == 5).then_some(())
    });
    let decide = |gateway: &TestGateway| -> Vec<(String, String)> {
        let one = |key: &String| {
            let asked = ask(gateway, key);
            let told = asked.header("x-ratelimit-limit-requests").unwrap_or_default().to_owned();
            let answer = if asked.status == 200 { format!("200 of {told}") } else { code(&asked) };
            (told_models(gateway, key), answer)
        };
        keys.iter().chain([&renewed]).map(one).collect()
    };
    let document = gateway.cli(&["config", "export"]);
    let as_json: Value = serde_json::from_str(&gateway.cli(&["config", "export", "--format", "json"])).unwrap();
    assert_eq!(ok(gateway.admin("GET", "/admin/export")), as_json);
    for key in keys.iter().chain([&renewed]) {
        assert!(!document.contains(key.rsplit('-').next().unwrap()), "an export has no secrets");
    }
    let decided = decide(&gateway);
    let other = Setup::shipped();
    let file = other.path("export.toml");
    std::fs::write(&file, &document).unwrap();
    let import = |setup: &Setup| setup.run(&["config", "import", file.to_str().unwrap()]);
    let stranger = import(&other);
    assert!(String::from_utf8_lossy(&stranger.stderr).contains("put the file `pepper`"), "{stranger:?}");
    std::fs::copy(gateway.data_dir().join("pepper"), other.0.path().join("data/pepper")).unwrap();
    let imported = import(&other);
    assert!(imported.status.success(), "{}", String::from_utf8_lossy(&imported.stderr));
    assert!(String::from_utf8_lossy(&import(&other).stderr).contains("import into an empty folder"));
    // Nobody was made a key of their own: there are some.
    std::fs::write(other.0.path().join("data/quickstart.key"), &gateway.key).unwrap();
    let twin = other.start();
    assert_eq!(decide(&twin), decided);
    assert_eq!(twin.cli(&["config", "export"]), document, "and exports the same");
    assert!(twin.cli(&["audit", "list"]).contains("import"));
    let explained = |gateway: &TestGateway| ok(gateway.admin("GET", "/admin/limits?key=bound"))["rules"].clone();
    let still = |rules: Value| -> Vec<Value> {
        rules
            .as_array()
            .unwrap()
            .iter()
            .map(|rule| {
                json!([
                    rule["name"],
                    rule["limit"],
                    rule["of"],
                    rule["by"],
                    rule["only"],
                    rule["mode"],
                    rule["throttle"]
                ])
            })
            .collect()
    };
    assert_eq!(still(explained(&twin)), still(explained(&gateway)));
}

fn told_models(gateway: &TestGateway, key: &str) -> String {
    let response = gateway.send(&http::get("/v1/models", Some(key)));
    if response.status != 200 {
        return code(&response);
    }
    let models = response.json()["data"].clone();
    models
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["id"].as_str().unwrap().to_owned())
        .collect::<Vec<_>>()
        .join(",")
}

#[test]
fn whoever_changes_the_record_is_found_out() {
    let mut gateway = TestGateway::start();
    for name in ["a", "b", "c"] {
        gateway.cli(&["keys", "create", name]);
    }
    let seal = gateway.cli(&["audit", "verify"]);
    let seal = seal.trim().rsplit(' ').next().unwrap().to_owned();
    gateway.cli(&["keys", "disable", "a"]);
    gateway.cli(&["audit", "verify", "--expect", &seal]);
    gateway.stop();
    let harm = |sql: &str| {
        let code = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.executescript(sys.argv[2]); c.commit()";
        let path = gateway.data_dir().join("keys.sqlite");
        let status = std::process::Command::new("python3").args(["-c", code]).arg(path).arg(sql).status().unwrap();
        assert!(status.success());
        let verified = gateway.run(&["audit", "verify"]);
        assert!(!verified.status.success(), "{sql}");
        String::from_utf8_lossy(&verified.stderr).into_owned()
    };
    assert!(
        harm("UPDATE audit SET change = replace(change, 'disable', 'ENABLED') WHERE n = 5")
            .contains("entry 5 was changed")
    );
    assert!(harm("DELETE FROM audit WHERE n = 5").contains("entry 5 is missing"));
    assert!(
        harm("UPDATE head SET n = 4, hash = (SELECT hash FROM audit WHERE n = 4); DELETE FROM audit WHERE n = 2")
            .contains("entry 2 is missing")
    );
    // An end that is cut off together with its head: who noted the seal sees it.
    let unseen = gateway.run(&["audit", "verify", "--expect", "5:00112233445566778899aabbccddeeff"]);
    assert!(String::from_utf8_lossy(&unseen.stderr).contains("no entry has the seal"));
}
