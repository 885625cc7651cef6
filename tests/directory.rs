//! Gateways that share one Postgres have one directory of keys, tenants, rules, and one record of their changes. What is decided
//! at one counts at all; while the database is away they go on with what they know.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::admin::{ask, audit, is, ok, send, soon, told};
use crate::callers::code;
use crate::postgres::on;
use crate::support::fault::{FaultProxy, Faults};
use crate::support::gateway::{Setup, TestGateway, replace};
use crate::support::postgres::Postgres;
use crate::support::{SOON, eventually};

const PEPPER: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// The shipped configuration with its directory in a database, and a pepper.
fn member(url: &str, pepper: &str) -> Setup {
    let setup = on(url);
    setup.env("GLASSGATE_PEPPER", pepper);
    setup.replace("gateway.toml", "[auth]\n", "[auth]\npepper = \"env:GLASSGATE_PEPPER\"\n");
    setup
}

/// All started at once; one of them makes the first key.
fn members(count: usize, postgres: &Postgres) -> Vec<TestGateway> {
    thread::scope(|scope| {
        let starting: Vec<_> = (0..count).map(|_| scope.spawn(|| member(&postgres.url(), PEPPER).start())).collect();
        starting.into_iter().map(|starting| starting.join().unwrap()).collect()
    })
}

fn create(gateway: &TestGateway, body: Value) -> (String, String) {
    let made = ok(send(gateway, "POST", "/admin/keys", &body));
    let text = |name: &str| made[name].as_str().unwrap().to_owned();
    (text("key"), text("id"))
}

fn at_all(gateways: &[TestGateway], key: &str, expected: &str) {
    soon(expected, || gateways.iter().all(|gateway| told(gateway, key) == expected).then_some(()));
}

/// What is told to a key at each gateway, asked all the time until the end of `change`: the last time that it was let in must be
/// less than a second after that.
fn under_traffic(gateways: &[TestGateway], key: &str, refused: &str, change: impl FnOnce()) {
    let (stop, began) = (AtomicBool::new(false), Instant::now());
    let let_in = Mutex::new(vec![(Duration::ZERO, 0); gateways.len()]);
    let changed = thread::scope(|scope| {
        for (at, gateway) in gateways.iter().enumerate() {
            let (stop, let_in) = (&stop, &let_in);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match told(gateway, key).as_str() {
                        "known" => {
                            let mut let_in = let_in.lock().unwrap();
                            let_in[at] = (began.elapsed(), let_in[at].1 + 1);
                        }
                        other => assert_eq!(other, refused),
                    }
                }
            });
        }
        eventually("traffic", || let_in.lock().unwrap().iter().all(|(_, count)| *count > 5).then_some(()));
        change();
        let changed = began.elapsed();
        eventually("all to know", || gateways.iter().all(|gateway| told(gateway, key) == refused).then_some(()));
        stop.store(true, Ordering::Relaxed);
        changed
    });
    for (last, _) in let_in.into_inner().unwrap() {
        assert!(last < changed + SOON, "{refused} took {:?}", last.saturating_sub(changed));
    }
}

#[test]
fn what_is_decided_at_one_gateway_counts_at_all_within_a_second() {
    let postgres = Postgres::start();
    let gateways = members(3, &postgres);
    let often = json!({"name": "alice", "tenant": "acme", "tags": ["blue"], "requests_per_minute": 60_000});
    let (key, id) = create(&gateways[0], often);
    at_all(&gateways, &key, "known");
    under_traffic(&gateways, &key, "disabled_tenant", || {
        ok(send(&gateways[2], "POST", "/admin/tenants/acme/disable", &json!({})));
    });
    gateways[1].cli(&["tenants", "enable", "acme"]);
    at_all(&gateways, &key, "known");
    let rule = json!({"limit": 1, "of": "requests", "per": "day", "only": {"tag": "blue"}});
    ok(send(&gateways[1], "PUT", "/admin/rules/one", &rule));
    soon("the rule", || {
        let binds =
            |gateway: &TestGateway| ok(gateway.admin("GET", "/admin/limits?key=alice"))["rules"][4]["name"] == "one";
        gateways.iter().all(binds).then_some(())
    });
    for gateway in &gateways {
        assert_eq!((ask(gateway, &key).status, code(&ask(gateway, &key))), (200, "rate_limit_exceeded".to_owned()));
    }
    // Who looked at one and edits at another edits what they have seen.
    let path = format!("/admin/keys/{id}");
    let seen = gateways[0].admin("GET", &path).header("etag").unwrap().to_owned();
    let edit = |gateway: &TestGateway, user: &str| {
        gateway.operate("PATCH", &path, &format!("if-match: {seen}\r\n"), &json!({"user": user}).to_string()).status
    };
    assert_eq!((edit(&gateways[1], "bob"), edit(&gateways[2], "eve")), (200, 412));
    under_traffic(&gateways, &key, "revoked_api_key", || {
        ok(gateways[1].admin("DELETE", &path));
    });
    let lists: BTreeSet<String> = gateways.iter().map(|gateway| gateway.cli(&["keys", "list"])).collect();
    assert!(lists.len() == 1 && lists.first().unwrap().contains("alice"), "{lists:?}");
    assert_eq!(audit(&gateways[0]), audit(&gateways[2]));
    assert!(!gateways[0].data_dir().join("keys.sqlite").exists(), "there is one directory");
    let tables = ["keys", "tenants", "rules", "audit", "head"];
    for table in tables {
        let all = postgres.ask(&format!("SELECT t FROM glassgate_{table} t")).to_lowercase();
        assert!(!all.is_empty() && !all.contains(PEPPER) && !all.contains(key.rsplit('-').next().unwrap()), "{table}");
    }
}

#[test]
fn two_hundred_changes_that_race_at_three_gateways_are_one_chain_and_none_is_lost() {
    const AT_ONCE: usize = 4;
    const EACH: usize = 17;
    let postgres = Postgres::start();
    let gateways = members(3, &postgres);
    let (_, id) = create(&gateways[0], json!({"name": "shared"}));
    thread::scope(|scope| {
        for (at, gateway) in gateways.iter().enumerate() {
            for thread in 0..AT_ONCE {
                let path = format!("/admin/keys/{id}");
                scope.spawn(move || {
                    for n in 0..EACH {
                        let name = format!("{at}-{thread}-{n}");
                        let response = match n % 2 {
                            0 => send(gateway, "PATCH", &path, &json!({"user": name})),
                            _ => send(gateway, "POST", "/admin/keys", &json!({"name": name})),
                        };
                        ok(response);
                    }
                });
            }
        }
    });
    let all = 3 * AT_ONCE * EACH;
    // The first start makes a key, too.
    let said = gateways[1].cli(&["audit", "verify"]);
    assert!(said.contains(&format!("{} entries, all as they were written", all + 2)), "{said}");
    let keys: Value = serde_json::from_str(&gateways[2].cli(&["keys", "list", "--json"])).unwrap();
    assert_eq!(keys.as_array().unwrap().len(), 2 + 3 * AT_ONCE * (EACH / 2));
    let entries = audit(&gateways[0]);
    let edits: Vec<&Value> =
        entries.iter().map(|entry| &entry["change"]).filter(|change| change["change"] == "edit_key").collect();
    assert_eq!(edits.len(), 3 * AT_ONCE * EACH.div_ceil(2));
    assert!(edits.windows(2).all(|pair| pair[0]["after"]["user"] == pair[1]["before"]["user"]), "{edits:?}");
}

#[test]
fn while_the_database_is_down_what_is_known_counts_and_nothing_is_changed() {
    let mut postgres = Postgres::start();
    let mut gateways = members(2, &postgres);
    let (kept, _) = create(&gateways[0], json!({"name": "kept"}));
    let (late, _) = create(&gateways[0], json!({"name": "late"}));
    let (gone, _) = create(&gateways[0], json!({"name": "gone"}));
    gateways[0].cli(&["keys", "revoke", "gone"]);
    for (key, expected) in [(&kept, "known"), (&late, "known"), (&gone, "revoked_api_key")] {
        at_all(&gateways, key, expected);
    }
    // Revoked while the first does not run, so that its copy does not know it.
    gateways[0].stop();
    gateways[1].cli(&["keys", "revoke", "late"]);
    is(&gateways[1], &late, "revoked_api_key");
    postgres.server.kill();
    let up = |gateway: &TestGateway, is: f64| {
        let shown = || (gateway.metric("gateway_store_up", &["store=\"keys\""]) == is).then_some(());
        eventually("the metric", shown);
    };
    up(&gateways[1], 0.0);
    assert_eq!((told(&gateways[1], &kept), told(&gateways[1], &gone)), ("known".into(), "revoked_api_key".into()));
    assert_eq!(ask(&gateways[1], &kept).status, 200);
    let refused = send(&gateways[1], "POST", "/admin/keys", &json!({"name": "new"}));
    assert_eq!((refused.status, code(&refused)), (503, "store_failed".to_owned()));
    let refused = gateways[1].run(&["keys", "create", "new"]);
    assert!(
        !refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("the database"),
        "{refused:?}"
    );

    let copy = gateways[0].data_dir().join("keys-copy.sqlite");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&copy).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    gateways[0].restart();
    up(&gateways[0], 0.0);
    assert!(gateways[0].stderr().contains("age_seconds"), "{}", gateways[0].stderr());
    let knows = |key: &String| told(&gateways[0], key);
    assert_eq!(
        [&kept, &gone, &late].map(knows),
        ["known", "revoked_api_key", "known"],
        "as it was when it was seen last"
    );
    // One that has never seen it knows nobody, and says so.
    let mut fresh = member(&postgres.url(), PEPPER).start_unready();
    assert_eq!(fresh.admin_get("/readyz").status, 503);
    assert_eq!(told(&fresh, &kept), "keys_unavailable");

    postgres.server.restart();
    fresh.wait_ready();
    eventually("the truth", || (told(&gateways[0], &late) == "revoked_api_key").then_some(()));
    gateways.push(fresh);
    gateways.iter().for_each(|gateway| up(gateway, 1.0));
    assert_eq!((told(&gateways[2], &kept), told(&gateways[2], &late)), ("known".into(), "revoked_api_key".into()));
    let (new, _) = create(&gateways[0], json!({"name": "new"}));
    at_all(&gateways, &new, "known");
    gateways[2].cli(&["audit", "verify"]);
}

#[test]
fn a_gateway_with_another_pepper_does_not_start_and_changes_nothing() {
    let mut postgres = Postgres::start();
    let first = member(&postgres.url(), PEPPER).start();
    let serve = ["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    let refused = |setup: &Setup, args: &[&str]| {
        let output = setup.run(args);
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let other = member(&postgres.url(), &PEPPER.replace('0', "1"));
    for args in [&serve[..], &["keys", "create", "a"], &["audit", "verify"]] {
        let why = refused(&other, args);
        assert!(why.contains("another pepper") && why.contains("`auth.pepper`"), "{why}");
    }
    // Nor with one that its data folder has made.
    assert!(refused(&on(&postgres.url()), &serve).contains("another pepper"));
    assert!(refused(&member(&postgres.url(), "short"), &serve).contains("64 hexadecimal digits"));
    assert_eq!(audit(&first).len(), 1);
    // The first one's file does as well as a word in the environment.
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let own = on(&postgres.url());
    let bytes: Vec<u8> = (0..32).map(|at| u8::from_str_radix(&PEPPER[2 * at..2 * at + 2], 16).unwrap()).collect();
    assert_eq!(hex(&bytes), PEPPER);
    std::fs::create_dir(own.0.path().join("data")).unwrap();
    std::fs::write(own.0.path().join("data/pepper"), bytes).unwrap();
    let mut second = own.start();
    is(&second, &first.key, "known");
    // Its copy is of this pepper as well.
    second.stop();
    std::fs::write(second.data_dir().join("pepper"), [7; 32]).unwrap();
    postgres.server.kill();
    let refused = second.run(&serve);
    assert!(String::from_utf8(refused.stderr).unwrap().contains("another pepper"));
}

#[test]
fn nobody_waits_for_a_database_that_has_frozen() {
    let postgres = Postgres::start();
    let proxy = FaultProxy::start(([127, 0, 0, 1], postgres.server.port).into(), 1);
    let gateway = member(&format!("postgres://glassgate@{}/postgres", proxy.address), PEPPER).start();
    let (key, _) = create(&gateway, json!({"name": "alice"}));
    is(&gateway, &key, "known");
    proxy.both(Faults { latency: Duration::from_millis(30), ..Faults::default() });
    let (slow, _) = create(&gateway, json!({"name": "slow"}));
    eventually("a change that comes slowly", || (told(&gateway, &slow) == "known").then_some(()));
    proxy.both(Faults { blackhole: true, ..Faults::default() });
    thread::scope(|scope| {
        let change = scope.spawn(|| send(&gateway, "POST", "/admin/keys", &json!({"name": "never"})));
        let mut answered = 0;
        while !change.is_finished() {
            let asked = Instant::now();
            assert_eq!((told(&gateway, &key).as_str(), ask(&gateway, &key).status), ("known", 200));
            assert!(asked.elapsed() < Duration::from_secs(5), "it waited: {:?}", asked.elapsed());
            answered += 1;
            // A key may ask so often.
            thread::sleep(Duration::from_millis(50));
        }
        let refused = change.join().unwrap();
        assert_eq!((refused.status, code(&refused), answered > 5), (503, "store_failed".to_owned(), true));
    });
    proxy.heal();
    eventually("it to be back", || (gateway.metric("gateway_store_up", &["store=\"keys\""]) == 1.0).then_some(()));
    let (new, _) = create(&gateway, json!({"name": "new"}));
    is(&gateway, &new, "known");
}

#[test]
fn a_data_folders_keys_are_taken_to_an_empty_database_when_somebody_says_so() {
    let postgres = Postgres::start();
    let setup = Setup::shipped();
    setup.env("DATABASE_URL", &postgres.url());
    let mut gateway = setup.start();
    let key = gateway.cli(&["keys", "create", "alice", "--tenant", "acme"]).trim().to_owned();
    let off = gateway.cli(&["keys", "create", "off", "--tenant", "beta"]).trim().to_owned();
    gateway.cli(&["tenants", "disable", "beta"]);
    gateway.cli(&["limits", "put", "r", "--limit", "10", "--of", "requests", "--per", "day"]);
    gateway.stop();
    let storage = "durability = \"process\"";
    replace(&gateway.config("gateway.toml"), storage, &format!("{storage}\ndatabase = \"env:DATABASE_URL\""));
    gateway.restart();
    assert!(gateway.stderr().contains("glassgate config export --local"), "{}", gateway.stderr());
    assert_eq!(told(&gateway, &key), "invalid_api_key", "nothing is taken there silently");
    // While it runs.
    let local = gateway.cli(&["config", "export", "--local"]);
    let file = gateway.data_dir().join("keys.toml");
    std::fs::write(&file, &local).unwrap();
    gateway.cli(&["config", "import", file.to_str().unwrap()]);
    is(&gateway, &key, "known");
    assert_eq!(told(&gateway, &off), "disabled_tenant");
    assert_eq!(gateway.cli(&["config", "export"]), local);
    assert!(gateway.cli(&["limits", "list"]).contains("store"));
    let again = gateway.run(&["config", "import", file.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("import into an empty"), "{again:?}");
    gateway.stop();
    gateway.restart();
    is(&gateway, &key, "known");
    assert!(!gateway.stderr().contains("--local"), "it is said as long as it matters");
}
