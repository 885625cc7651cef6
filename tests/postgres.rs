//! Several gateways on one Postgres, which is down, frozen, slow, cut off, and not theirs alone. Whatever becomes of it,
//! requests are served, and in the end every row is there once.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use glassgate::accounting::ledger::disk::RealDisk;
use glassgate::accounting::ledger::store::months::Month;
use glassgate::accounting::ledger::store::postgres::Target;
use glassgate::accounting::ledger::store::{Database, Fate};
use glassgate::accounting::ledger::verify::verify;
use glassgate::accounting::ledger::{Ledger, Settings};
use glassgate::accounting::settlement::{Durability, Journal as _};
use glassgate::observe::metrics::Metrics;
use serde_json::{Value, json};

use crate::stores::{database, row};
use crate::support::eventually;
use crate::support::fault::{FaultProxy, Faults};
use crate::support::gateway::{Setup, TestGateway, chat, chat_with};
use crate::support::http::Response;
use crate::support::postgres::Postgres;

const LONG: Duration = Duration::from_secs(60);

fn open(folder: &Path, database: &Database) -> Ledger {
    Ledger::open(folder, database, Settings::default(), Arc::new(Metrics::new())).unwrap()
}

/// A request from its beginning to its end.
fn serve(ledger: &Ledger, id: &str) {
    let row = row(id);
    let slot = ledger.open(&row).expect("a store that does not answer is nobody's trouble");
    ledger.close(slot, row, Durability::Process).unwrap();
}

fn assert_whole(folder: &Path, database: &Database) {
    let legs = verify(&RealDisk::new(folder.join("wal")), || database.books(), None).unwrap();
    assert!(legs.iter().all(|leg| leg.is_whole()), "{legs:?}");
}

fn rows(postgres: &Postgres) -> usize {
    postgres.ask("SELECT COUNT(*) FROM ledger").parse().unwrap()
}

#[test]
fn ten_gateways_that_start_at_once_make_one_set_of_tables_and_count_their_own_rows() {
    const WRITERS: usize = 10;
    const ROWS: usize = 700;
    let postgres = Postgres::start();
    let (database, together) = (database(&postgres), Barrier::new(WRITERS));
    let folders: Vec<_> = (0..WRITERS).map(|_| tempfile::tempdir().unwrap()).collect();
    thread::scope(|scope| {
        for (writer, folder) in folders.iter().enumerate() {
            let (database, together) = (&database, &together);
            scope.spawn(move || {
                together.wait();
                let ledger = open(folder.path(), database);
                for i in 0..ROWS {
                    // All of one hour and one group, and of one month whose partition nobody has made yet.
                    serve(&ledger, &format!("019a1b2c3d4e7abc{writer:08x}{i:08x}"));
                }
                ledger.recovered(LONG).unwrap();
                ledger.shut_down();
            });
        }
    });
    assert_eq!(rows(&postgres), WRITERS * ROWS);
    assert_eq!(postgres.ask("SELECT COUNT(*) FROM ledger_version"), "1");
    assert_eq!(postgres.ask("SELECT COUNT(*) FROM ledger_2025_10"), (WRITERS * ROWS).to_string());
    assert_eq!(
        postgres.ask("SELECT COUNT(DISTINCT log), SUM(requests) FROM spend_hour"),
        format!("10|{}", WRITERS * ROWS)
    );
    for folder in &folders {
        assert_whole(folder.path(), &database);
    }
    // A row of one of them is changed: its own count says so, and no other's.
    postgres.ask("UPDATE ledger SET billed_nano_usd = 0 WHERE request_id = '019a1b2c3d4e7abc0000000300000000'");
    let legs = |folder: &Path| verify(&RealDisk::new(folder.join("wal")), || database.books(), None).unwrap();
    let red = |folder: &Path| {
        let legs = legs(folder).into_iter().filter(|leg| !leg.is_whole());
        legs.map(|leg| leg.name).collect::<Vec<_>>()
    };
    assert!(red(folders[3].path()).contains(&"control totals"));
    assert!(!red(folders[4].path()).contains(&"control totals"));
}

/// Requests that are served, one after the other, until it is told to stop.
struct Traffic<'l> {
    ledger: &'l Ledger,
    served: AtomicUsize,
    stop: AtomicBool,
}

impl Traffic<'_> {
    fn run(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            serve(self.ledger, &format!("r{}", self.served.fetch_add(1, Ordering::Relaxed)));
            // The log has room for minutes of this.
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits until so many more are served.
    fn more(&self, count: usize) {
        let until = self.served.load(Ordering::Relaxed) + count;
        eventually("requests are served", || (self.served.load(Ordering::Relaxed) >= until).then_some(()));
    }
}

/// Lets `trouble` come over a database behind a faulty network while requests are served, and looks at what is left.
fn through(trouble: impl FnOnce(&mut Postgres, &FaultProxy, &Traffic<'_>)) {
    let mut postgres = Postgres::start();
    let proxy = FaultProxy::start(([127, 0, 0, 1], postgres.server.port).into(), 1);
    let url = format!("postgres://glassgate@{}/postgres", proxy.address);
    let database = Database::Postgres(Arc::new(Target::parse(&url, None).unwrap()));
    let folder = tempfile::tempdir().unwrap();
    let ledger = open(folder.path(), &database);
    ledger.recovered(LONG).unwrap();
    let traffic = Traffic { ledger: &ledger, served: AtomicUsize::new(0), stop: AtomicBool::new(false) };
    thread::scope(|scope| {
        scope.spawn(|| traffic.run());
        traffic.more(100);
        trouble(&mut postgres, &proxy, &traffic);
        traffic.more(100);
        proxy.heal();
        traffic.stop.store(true, Ordering::Relaxed);
    });
    ledger.shut_down();
    // What it could not ship before its end its next life does.
    let ledger = open(folder.path(), &database);
    ledger.recovered(LONG).unwrap();
    ledger.shut_down();
    let served = traffic.served.load(Ordering::Relaxed);
    assert_eq!(rows(&postgres), served);
    assert_eq!(postgres.ask("SELECT SUM(requests) FROM spend_hour"), served.to_string());
    assert_whole(folder.path(), &database);
}

#[test]
fn a_database_that_is_killed_and_comes_back_has_every_row_once() {
    through(|postgres, _, traffic| {
        for _ in 0..3 {
            postgres.server.kill();
            traffic.more(200);
            postgres.server.restart();
            traffic.more(100);
        }
    });
}

#[test]
fn a_database_that_freezes_is_waited_for_by_nobody_and_has_every_row_once() {
    through(|postgres, _, traffic| {
        for _ in 0..3 {
            postgres.server.freeze();
            traffic.more(500);
            postgres.server.thaw();
            traffic.more(100);
        }
    });
}

#[test]
fn connections_that_break_anywhere_also_in_a_commit_double_nothing() {
    through(|_, proxy, traffic| {
        // Each time after a few more bytes: also between a commit and its confirmation.
        for bytes in (1..4000).step_by(157) {
            proxy.to_client(Faults { reset_after: Some(bytes), ..Faults::default() });
            traffic.more(20);
            proxy.to_server(Faults { reset_after: Some(bytes * 16), ..Faults::default() });
            traffic.more(20);
            proxy.heal();
        }
    });
}

#[test]
fn a_slow_database_is_shipped_to_in_its_own_time() {
    through(|_, proxy, traffic| {
        proxy.both(Faults { latency: Duration::from_millis(150), slice_bytes: Some(700), ..Faults::default() });
        traffic.more(2_000);
    });
}

#[test]
fn what_becomes_of_a_commit_that_the_network_swallowed_is_found_out() {
    through(|postgres, proxy, traffic| {
        // The server commits, and nobody is told.
        let before = rows(postgres);
        proxy.to_client(Faults { blackhole: true, ..Faults::default() });
        traffic.more(100);
        proxy.to_client(Faults { reset_after: Some(0), ..Faults::default() });
        eventually("rows", || (rows(postgres) >= before).then_some(()));
        traffic.more(100);
    });
}

/// The shipped configuration with its ledger, and its keys, in the database of this address.
pub fn on(url: &str) -> Setup {
    let setup = Setup::shipped();
    setup.env("DATABASE_URL", url);
    setup.replace(
        "gateway.toml",
        "durability = \"process\"",
        "durability = \"process\"\ndatabase = \"env:DATABASE_URL\"",
    );
    setup
}

fn wait_for_rows(postgres: &Postgres, count: usize) {
    eventually("all rows", || (rows(postgres) == count).then_some(()));
}

#[test]
fn commands_read_the_ledger_where_the_gateway_keeps_it() {
    let postgres = Postgres::start();
    let mut gateway = on(&postgres.url()).start();
    for _ in 0..3 {
        gateway.ask("What is Glassgate?");
    }
    wait_for_rows(&postgres, 3);
    let said = gateway.cli(&["ledger", "verify"]);
    assert_eq!(said.matches("ok   ").count(), 8, "{said}");
    let spend: Value = serde_json::from_str(&gateway.cli(&["spend", "--by", "route,day", "--json"])).unwrap();
    assert_eq!((&spend[0]["route"], &spend[0]["requests"]), (&json!("assistant"), &json!(3)));
    let csv = gateway.cli(&["ledger", "export"]);
    assert_eq!((csv.lines().count(), csv.lines().next().unwrap().split(',').count()), (4, 34));
    let id = csv.lines().nth(1).unwrap().split(',').nth(3).unwrap().to_owned();
    let judged = json!({"response_id": id, "name": "correct", "value": true});
    let body = judged.to_string();
    let head = format!(
        "POST /v1/feedback HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        gateway.key,
        body.len()
    );
    assert_eq!(gateway.send(head.as_bytes()).status, 200);
    assert!(gateway.cli(&["feedback"]).contains("correct"));
    assert!(!gateway.data_dir().join("ledger.sqlite").exists(), "there is one ledger");
    // A life that is cut off, and another folder's commands, which find no log.
    gateway.kill_and_restart();
    assert!(gateway.run(&["ledger", "verify"]).status.success());
    postgres.ask("UPDATE ledger SET billed_nano_usd = billed_nano_usd - 1");
    let red = gateway.run(&["ledger", "verify"]);
    assert!(!red.status.success() && String::from_utf8(red.stdout).unwrap().contains("BAD  control totals"));
    gateway.stop();
}

#[test]
fn a_gateway_starts_without_its_database_and_tells_it_everything_when_it_is_there() {
    let mut postgres = Postgres::start();
    let setup = on(&postgres.url());
    let rule = "\n[[limits.rules]]\nname = \"few\"\nby = [\"key\"]\nof = \"requests\"\nper = \"day\"\nlimit = 4\n";
    crate::support::gateway::append(&setup.path("gateway.toml"), rule);
    let mut gateway = setup.start();
    gateway.ask("What is Glassgate?");
    gateway.ask("What is Glassgate?");
    gateway.stop();
    postgres.server.kill();
    gateway.restart();
    assert_eq!(gateway.admin_get("/readyz").status, 200);
    assert_eq!(gateway.metric("gateway_store_up", &["ledger"]), 0.0);
    gateway.ask("What is Glassgate?");
    let refused = gateway.run(&["spend"]);
    assert!(String::from_utf8(refused.stderr).unwrap().contains("the ledger's store"), "a clear word, and no hang");
    postgres.server.restart();
    wait_for_rows(&postgres, 3);
    eventually("what was spent before", || gateway.stderr().contains("budgets know what was spent").then_some(()));
    assert_eq!(gateway.metric("gateway_store_up", &["ledger"]), 1.0);
    gateway.ask("What is Glassgate?");
    assert_eq!(gateway.post(&chat("What is Glassgate?")).status, 429, "two before, two since");
    gateway.stop();
    assert!(gateway.run(&["ledger", "verify"]).status.success());
}

/// Serves while a database takes nothing, until the gateway's own log is full; how many were answered, once the database
/// takes rows again and has them all.
fn fills_up(
    postgres: &mut Postgres,
    fail: impl FnOnce(&mut Postgres),
    mend: impl FnOnce(&mut Postgres),
) -> (TestGateway, usize) {
    let setup = on(&postgres.url());
    setup.replace("gateway.toml", "durability = \"process\"", "durability = \"process\"\nwal_max = \"32KiB\"");
    let gateway = setup.start();
    assert_eq!(ask_little(&gateway).status, 200);
    wait_for_rows(postgres, 1);
    fail(postgres);
    let mut answered = 1;
    let refused = loop {
        match ask_little(&gateway) {
            response if response.status == 200 => answered += 1,
            response => break response,
        }
        assert!(answered < 1000, "the bound does not hold");
    };
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str().unwrap()), (503, "ledger_full"));
    assert!(answered > 4, "{answered}");
    let is_up = |up: f64| {
        eventually("the gauge to say so", || (gateway.metric("gateway_store_up", &["ledger"]) == up).then_some(()));
    };
    is_up(0.0);
    mend(postgres);
    eventually("room again", || (ask_little(&gateway).status == 200).then_some(()));
    answered += 1;
    wait_for_rows(postgres, answered);
    is_up(1.0);
    (gateway, answered)
}

fn ask_little(gateway: &TestGateway) -> Response {
    gateway.post(&chat_with("12 + 34 = ?", json!({"max_tokens": 1})))
}

#[test]
fn a_log_that_fills_up_while_the_database_is_down_refuses_with_503_and_loses_nothing() {
    let mut postgres = Postgres::start();
    let (mut gateway, answered) =
        fills_up(&mut postgres, |postgres| postgres.server.kill(), |postgres| postgres.server.restart());
    // A frozen one does not keep it from ending, either: what is not shipped the next start ships.
    postgres.server.freeze();
    assert_eq!(ask_little(&gateway).status, 200);
    gateway.stop();
    postgres.server.thaw();
    gateway.restart();
    wait_for_rows(&postgres, answered + 1);
    gateway.stop();
    assert!(gateway.run(&["ledger", "verify"]).status.success());
}

#[test]
fn a_database_that_takes_no_writes_or_whose_disk_is_full_loses_nothing_and_needs_nobody_to_begin_again() {
    // As after a failover, when what was the first is a copy.
    let read_only = |is: &'static str| {
        move |postgres: &mut Postgres| {
            postgres.ask(&format!("ALTER SYSTEM SET default_transaction_read_only = {is}"));
            postgres.ask("SELECT pg_reload_conf()");
            let setting = "SELECT current_setting('default_transaction_read_only')";
            eventually("the setting", || (postgres.ask(setting) == is).then_some(()));
        }
    };
    let (mut copy, mut small) = (Postgres::start(), Postgres::start_on_small_disk());
    let gateways = [
        fills_up(&mut copy, read_only("on"), read_only("off")).0,
        fills_up(&mut small, |postgres| postgres.fill(), |postgres| postgres.clear()).0,
    ];
    for (mut gateway, why) in gateways.into_iter().zip(["read-only transaction", "No space left on device"]) {
        gateway.stop();
        assert!(gateway.stderr().contains(why), "{}", gateway.stderr());
        assert!(gateway.run(&["ledger", "verify"]).status.success());
    }
}

#[test]
fn a_database_over_a_network_is_spoken_to_in_tls_and_only_if_it_is_the_right_one() {
    let certificate = |name: &str| rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
    let (ours, theirs) = (certificate("127.0.0.1"), certificate("127.0.0.1"));
    let elsewhere = certificate("db.example");
    let plain = Postgres::start();
    let secured = |made: &rcgen::CertifiedKey<rcgen::KeyPair>| {
        Postgres::start_tls(&made.cert.pem(), &made.signing_key.serialize_pem())
    };
    let open = |postgres: &Postgres, ca: &str| {
        let url = format!("{}?sslmode=require", postgres.url());
        let database = Database::Postgres(Arc::new(Target::parse(&url, Some(ca)).unwrap()));
        (database.opener(1))().map_err(|error| error.to_string())
    };
    let postgres = secured(&ours);
    let store = open(&postgres, &ours.cert.pem());
    let ask =
        "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'glassgate'";
    assert_eq!((store.is_ok(), postgres.ask(ask).as_str()), (true, "t"));
    let why = |opened: Result<_, String>| opened.map(drop).unwrap_err();
    assert!(why(open(&postgres, &theirs.cert.pem())).contains("certificate"), "signed by somebody else");
    assert!(why(open(&secured(&elsewhere), &elsewhere.cert.pem())).contains("certificate"), "another's certificate");
    assert!(why(open(&plain, &ours.cert.pem())).contains("TLS"), "nothing is said in the clear instead");
}

#[test]
fn a_role_that_may_not_make_tables_is_told_so_and_serves_those_that_are_there() {
    let postgres = Postgres::start();
    postgres.ask("CREATE ROLE writer LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC");
    let url = postgres.url().replace("glassgate@", "writer@");
    let theirs = Database::Postgres(Arc::new(Target::parse(&url, None).unwrap()));
    let why = (theirs.opener(1))().map(drop).unwrap_err().to_string();
    assert!(why.contains("permission denied for schema public"), "{why}");
    drop((database(&postgres).opener(1))().unwrap());
    postgres.ask(
        "GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO writer; GRANT DELETE ON ledger_count TO writer",
    );
    let mut store = (theirs.opener(1))().unwrap();
    store.ship(&[&row("theirs")], &[]).unwrap();
    let names: BTreeSet<_> = postgres.ask("SELECT request_id FROM ledger").lines().map(str::to_owned).collect();
    assert_eq!(names, BTreeSet::from(["theirs".to_owned()]));
}

#[test]
fn who_reads_for_a_long_time_keeps_no_new_month_waiting_and_no_old_one_longer_than_that() {
    let postgres = Postgres::start();
    let database = database(&postgres);
    let mut store = (database.opener(1))().unwrap();
    // November and December of 2026.
    let (old, new) = (row("01a1b2c3d4e57abc0000000000000001"), row("01a24e5f8a007abc0000000000000001"));
    store.ship(&[&old], &[]).unwrap();
    let reader = database.books().unwrap();
    assert_eq!(reader.sums_of(1, i64::MIN).unwrap().rows, 1);
    store.ship(&[&new], &[]).expect("it is attached beside who reads");
    let kept = Month::of(&new.request_id).unwrap();
    assert_ne!(Month::of(&old.request_id), Some(kept), "months apart");
    let why = store.keep_from(kept).unwrap_err().to_string();
    assert!(why.contains("lock timeout"), "{why}");
    assert_eq!(reader.sums_of(1, i64::MIN).unwrap().rows, 1, "one moment");
    drop(reader);
    assert!(!store.keep_from(kept).unwrap());
    assert_eq!(rows(&postgres), 1);
}

#[test]
fn gateways_that_let_go_of_a_month_at_once_agree_on_what_is_kept() {
    let postgres = Postgres::start();
    let (database, together) = (database(&postgres), Barrier::new(6));
    // Of November and December of 2026.
    let (old, new) = (row("01a1b2c3d4e57abc0000000000000001"), row("01a24e5f8a007abc0000000000000001"));
    (database.opener(9))().unwrap().ship(&[&old], &[]).unwrap();
    let (early, late) = (Month::of(&old.request_id).unwrap(), Month::of(&new.request_id).unwrap());
    thread::scope(|scope| {
        for log in 1..=6 {
            let (database, together) = (&database, &together);
            scope.spawn(move || {
                let mut store = (database.opener(log))().unwrap();
                together.wait();
                // One has to wait for the others, and may have to try again.
                let mut keep = || store.keep_from(if log % 2 == 0 { early } else { late }).ok();
                eventually("the month to go", &mut keep);
            });
        }
    });
    assert_eq!(postgres.ask("SELECT first_id FROM ledger_kept"), late.first_id());
    let shipped = (database.opener(9))().unwrap().ship(&[&old, &new], &[]).unwrap();
    assert_eq!(shipped.fates, [Fate::There, Fate::New]);
    assert_eq!(rows(&postgres), 1);
}
