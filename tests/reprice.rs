//! Rows that are priced again: in both stores, twice at once, cut off in the middle, and by people.

use std::collections::BTreeMap;

use glassgate::accounting::core::{NanoUsd, PicoPerToken};
use glassgate::accounting::ledger::store::adjust::{Cursor, Run};
use glassgate::accounting::ledger::store::months::Month;
use glassgate::accounting::ledger::store::{By, Database, Period, StoreError};
use glassgate::accounting::price::{Price, Prices, Rates, Tariff};
use glassgate::accounting::reprice::{Booked, Report, Repricer, Standing, Which};
use glassgate::accounting::row::{Outcome, Role, Row, Service};
use serde_json::{Value, json};

use crate::admin::audit;
use crate::stores::{HOUR, database, each, id_at, many, open, row, ship};
use crate::support::eventually;
use crate::support::gateway::{Setup, TestGateway, append, remote, replace};
use crate::support::postgres::Postgres;
use crate::support::upstream::Upstream;

const NONE: [String; 0] = [];

/// So many pico-dollars for every token, and a nano-dollar for every image.
fn priced(pico: u64) -> BTreeMap<String, Prices> {
    let [input, output] = [PicoPerToken(pico), PicoPerToken(pico * 4)];
    let rates = Rates { input, cache_read: input, cache_write: input, output, reasoning: output };
    let standard = Tariff { rates, image: NanoUsd(1), ..Tariff::default() };
    let flex = Tariff { image: NanoUsd(0), ..standard.clone() };
    let price = Price { standard, services: [(Service::Flex, flex)].into(), ..Price::default() };
    [("glimmer-1".to_owned(), price.into())].into()
}

/// Prices everything again, at most so many pages of it.
fn reprice(database: &Database, version: &str, pico: u64, which: Which, pages: usize) -> Result<Report, StoreError> {
    let prices = priced(pico);
    let mut repricer = Repricer { which, prices: &prices, version, report: Report::default() };
    let run = Run { at_ns: 7, reason: "a test", past_ns: i64::MAX };
    let (mut adjuster, mut cursor) = (database.adjuster()?, Some(Cursor::before(0)));
    for _ in 0..pages {
        let Some(from) = cursor else { break };
        cursor = adjuster.page(&from, &run, &mut |booked| repricer.judge(booked))?;
    }
    Ok(repricer.report)
}

fn all(database: &Database, version: &str, pico: u64) -> Report {
    reprice(database, version, pico, Which::default(), usize::MAX).unwrap()
}

fn booked(database: &Database) -> Vec<Booked> {
    let mut rows = Vec::new();
    let mut each = |booked| {
        rows.push(booked);
        true
    };
    database.books().unwrap().rows(i64::MIN, i64::MAX, &mut each).unwrap();
    rows
}

/// What each row counts as.
fn standing(database: &Database) -> BTreeMap<(String, u32), Standing> {
    booked(database).into_iter().map(|one| ((one.row.request_id, one.row.attempt), one.standing)).collect()
}

/// Every sum of the store is that of what its rows count as, wherever an hour is cut.
fn sums_are_rows_and_adjustments(database: &Database) {
    let (rows, books) = (booked(database), database.books().unwrap());
    for (first_ns, past_ns) in [(0, 300 * HOUR), (HOUR / 3, 100 * HOUR + 17), (HOUR / 3, HOUR / 2)] {
        let mut expected: BTreeMap<(String, String), [u64; 2]> = BTreeMap::new();
        for Booked { row, standing, .. } in rows.iter().filter(|one| (first_ns..past_ns).contains(&one.row.started_ns))
        {
            let sums = expected.entry((row.key_id.clone(), row.user_id.clone().unwrap_or_default())).or_default();
            *sums = [sums[0] + standing.billed.0, sums[1] + standing.provider_cost.0];
        }
        let period = [Period { name: String::new(), first_ns, past_ns }];
        let spend = books.spend(&[By::Key, By::User], &period).unwrap();
        let found =
            spend.iter().map(|line| ((line.by[0].clone(), line.by[1].clone()), [line.billed.0, line.provider_cost.0]));
        assert_eq!(found.collect::<BTreeMap<_, _>>(), expected);
    }
    assert_eq!(books.uneven_adjustments(9).unwrap(), NONE);
    assert_eq!(books.uneven_hours(9).unwrap(), NONE, "what rows say, hours still say");
}

/// Rows of ours and of upstreams, with images and services, all without a price.
fn unpriced() -> Vec<Row> {
    let row = |(i, row): (usize, Row)| Row {
        billed: NanoUsd(0),
        provider_cost: NanoUsd(0),
        provider: ["glassgate", "mock"][i % 2].into(),
        images: i as u64 % 3,
        service_tier: (i % 5 == 0).then_some(Service::Flex),
        ..row
    };
    many().into_iter().enumerate().map(row).collect()
}

#[test]
fn prices_there_and_back_leave_no_difference_and_every_sum_is_that_of_rows_and_adjustments() {
    each(|database| {
        let rows = unpriced();
        ship(&mut *open(database, 1), &rows);
        let limits = || {
            let mut sums = database.books().unwrap().spent_between(0, i64::MAX, None).unwrap();
            sums.sort_by_key(|sum| (sum.key_id.clone(), sum.user.clone()));
            sums
        };
        let counted = limits();
        let first = all(database, "a", 1_000_000);
        assert_eq!((first.seen, first.total().rows), (600, 600), "{first:?}");
        sums_are_rows_and_adjustments(database);
        let at_a = standing(database);
        let again = all(database, "a", 1_000_000);
        assert_eq!((again.seen, again.total().rows), (600, 0), "what is priced so already is left alone");

        let there = all(database, "b", 3_000_000);
        assert!(there.total().after[0] > there.total().before[0], "{there:?}");
        sums_are_rows_and_adjustments(database);
        let back = all(database, "a", 1_000_000);
        sums_are_rows_and_adjustments(database);
        assert_eq!((back.total().before, back.total().after), (there.total().after, there.total().before));
        let amounts =
            |of: &BTreeMap<_, Standing>| -> Vec<_> { of.values().map(|one| (one.billed, one.provider_cost)).collect() };
        assert_eq!(amounts(&standing(database)), amounts(&at_a));

        assert_eq!(booked(database).into_iter().map(|one| one.row).collect::<Vec<_>>(), rows, "no row was edited");
        assert_eq!(limits(), counted, "limits counted what was billed then");
        let same = all(database, "a", 9_000_000);
        assert!(same.same_version > 0 && same.total().rows == 0, "one version is one price: {same:?}");
    });
}

#[test]
fn a_row_costs_what_its_images_its_service_and_its_end_say() {
    each(|database| {
        let upstream = |id: &str| Row { provider: "mock".into(), unpriced: false, ..row(id) };
        let rows = [
            Row { images: 5, ..upstream("images") },
            Row { images: 5, service_tier: Some(Service::Flex), ..upstream("flex") },
            // What was asked for is not known: it stands at the most that it could be.
            Row { images: 5, outcome: Outcome::Killed, provider_cost: NanoUsd(0), ..upstream("killed") },
            Row { role: Role::Shadow, billed: NanoUsd(0), ..upstream("shadow") },
            Row { cache: "hit".into(), billed: NanoUsd(0), provider_cost: NanoUsd(0), ..upstream("hit") },
            // A strict budget had reserved no more.
            Row { billed: NanoUsd(3), provider_cost: NanoUsd(9), ..upstream("capped") },
            Row { provider_cost: NanoUsd(44), ..row("ours") },
            Row { model: "another".into(), ..upstream("priceless") },
        ];
        ship(&mut *open(database, 1), &rows);
        let report = all(database, "new", 1_000);
        // Ten tokens of prompt and seven of an answer, at a nano-dollar and at four.
        let expected = [
            ("images", [43, 43]),
            ("flex", [38, 38]),
            ("killed", [43, 0]),
            ("shadow", [0, 38]),
            ("hit", [0, 0]),
            ("capped", [3, 38]),
            ("ours", [38, 44]),
            ("priceless", [9, 1]),
        ];
        let found = standing(database);
        for (id, amounts) in expected {
            let Standing { billed, provider_cost, .. } = &found[&(id.to_owned(), 0)];
            assert_eq!([billed.0, provider_cost.0], amounts, "{id}");
        }
        assert_eq!((report.of_device, report.priceless), (1, [("another".to_owned(), 1)].into()));
    });
}

#[test]
fn only_what_is_asked_for_is_priced_again() {
    each(|database| {
        let of = |id: &str, route: &str, tenant: &str, unpriced: bool| Row {
            route: route.into(),
            tenant: tenant.into(),
            unpriced,
            ..row(id)
        };
        let rows = [of("a", "one", "x", true), of("b", "one", "y", false), of("c", "two", "x", false)];
        ship(&mut *open(database, 1), &rows);
        let mut version = 0;
        let mut changed = |which: Which| {
            version += 1;
            let before = standing(database);
            reprice(database, &format!("v{version}"), 1_000 * version, which, usize::MAX).unwrap();
            let after = standing(database).into_iter().filter(|(id, now)| before[id] != *now);
            after.map(|((id, _), _)| id).collect::<String>()
        };
        let some = |word: &str| Some(word.to_owned());
        assert_eq!(changed(Which { model: some("another"), ..Which::default() }), "");
        assert_eq!(changed(Which { only_unpriced: true, ..Which::default() }), "a");
        assert_eq!(changed(Which { only_unpriced: true, ..Which::default() }), "", "it has a price by now");
        assert_eq!(changed(Which { route: some("one"), ..Which::default() }), "ab");
        assert_eq!(changed(Which { route: some("one"), tenant: some("y"), ..Which::default() }), "b");
        assert_eq!(changed(Which { model: some("glimmer-1"), tenant: some("x"), ..Which::default() }), "ac");
    });
}

/// More rows than three pages hold.
fn pages() -> Vec<Row> {
    let row = |i: usize| Row { started_ns: 1 + i as i64 / 3, ..row(&format!("r{i:05}")) };
    (0..3_300).map(row).collect()
}

#[test]
fn whoever_is_cut_off_between_two_pages_and_runs_again_ends_as_one_run_does() {
    for cut in [1, 3] {
        each(|database| {
            ship(&mut *open(database, 1), &pages());
            let before = reprice(database, "new", 1_000, Which::default(), cut).unwrap().total().rows;
            assert_eq!(before, (cut as u64 * 1_000).min(3_300));
            assert_eq!(all(database, "new", 1_000).total().rows, 3_300 - before);
            let rows = booked(database);
            assert!(rows.iter().all(|one| one.adjustments == 1 && one.standing.billed == NanoUsd(38)));
            sums_are_rows_and_adjustments(database);
        });
    }
}

#[test]
fn two_who_do_it_at_once_adjust_every_row_once() {
    each(|database| {
        ship(&mut *open(database, 1), &pages());
        ship(&mut *open(database, 2), &[row("of another log")]);
        let rows: u64 = std::thread::scope(|scope| {
            let both = [0, 1].map(|_| scope.spawn(|| all(database, "new", 1_000).total().rows));
            both.map(|one| one.join().unwrap()).into_iter().sum()
        });
        assert_eq!(rows, 3_301);
        assert!(booked(database).iter().all(|one| one.adjustments == 1));
        sums_are_rows_and_adjustments(database);
    });
}

#[test]
fn adjustments_go_with_their_rows_and_their_sums_stay() {
    each(|database| {
        let month = |number: i64| 1_790_000_000_000_000_000 + number * 31 * 24 * HOUR;
        let of = |ns: i64| Row { started_ns: ns, ..row(&id_at(ns, 1)) };
        let mut store = open(database, 1);
        ship(&mut *store, &[of(month(0)), of(month(3))]);
        all(database, "new", 1_000);
        let spent = || {
            let period = [Period { name: String::new(), first_ns: 0, past_ns: month(4) }];
            database.books().unwrap().spend(&[By::Tenant], &period).unwrap()[0].billed
        };
        assert_eq!(spent(), NanoUsd(76));
        while store.keep_from(Month::at(month(2)).unwrap()).unwrap() {}
        assert_eq!((spent(), booked(database).len()), (NanoUsd(76), 1));
        assert_eq!(database.books().unwrap().uneven_adjustments(9).unwrap(), NONE);
        assert_eq!(all(database, "newer", 2_000).total().rows, 1);
        assert_eq!(spent(), NanoUsd(38 + 76));
    });
}

fn table(gateway: &TestGateway, query: &str) -> Vec<String> {
    let db = rusqlite::Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let mut query = db.prepare(query).unwrap();
    let rows = query.query_map([], |row| row.get::<_, String>(0)).unwrap();
    rows.collect::<rusqlite::Result<_>>().unwrap()
}

fn billed(lines: &Value) -> u64 {
    lines.as_array().unwrap().iter().map(|line| line["billed_nano_usd"].as_u64().unwrap()).sum()
}

#[test]
fn what_had_no_price_is_given_one_later_and_everything_that_tells_of_money_tells_it() {
    let upstream = Upstream::start();
    let setup = Setup::upstream(&upstream, "");
    let prices = "[models.remote-model]\ninput = 0.03\ncache_read = 0.01\noutput = 0.12\n";
    setup.replace("prices.toml", prices, "");
    let gateway = setup.start();
    for _ in 0..2 {
        assert_eq!(gateway.post(&remote(json!({}))).status, 200);
    }
    gateway.ask("2+2?");
    eventually("every row", || (gateway.metric("gateway_ledger_queue_rows", &[]) == 0.0).then_some(()));
    let of_remote = |extra: &[&str]| gateway.cli(&[&["ledger", "reprice", "--model", "remote-model"], extra].concat());
    let said = of_remote(&[]);
    assert!(said.contains("2 rows of `remote-model`, which has no price, stay as they are"), "{said}");

    append(&gateway.config("prices.toml"), prices);
    replace(&gateway.config("prices.toml"), "2026-11-01", "2026-12-01");
    let spend = || -> Value { serde_json::from_str(&gateway.cli(&["spend", "--by", "model", "--json"])).unwrap() };
    let before = billed(&spend());
    let dry = of_remote(&["--only-unpriced"]);
    assert!(dry.contains("2 rows were looked at, 2 cost something else by prices 2026-12-01"), "{dry}");
    assert!(dry.contains("0.000000000        0.000001260        +0.000001260"), "{dry}");
    assert!(dry.contains("nothing was changed; --apply --reason TEXT does it"), "{dry}");
    assert_eq!((billed(&spend()), table(&gateway, "SELECT reason FROM adjustment").len()), (before, 0));
    assert!(!gateway.run(&["ledger", "reprice", "--apply"]).status.success(), "it needs a reason");
    assert!(!gateway.run(&["ledger", "reprice", "--apply", "--reason", "a\nb"]).status.success());

    let applied = of_remote(&["--only-unpriced", "--apply", "--reason", "the price came late"]);
    assert!(applied.ends_with("2 rows were adjusted\n"), "{applied}");
    assert_eq!(billed(&spend()), before + 1260);
    let told = gateway.admin("GET", "/admin/spend?by=model").json();
    assert_eq!(billed(&told["data"]), before + 1260);
    assert_eq!(table(&gateway, "SELECT reason FROM adjustment"), ["the price came late"; 2]);
    assert_eq!(table(&gateway, "SELECT DISTINCT price_version FROM ledger"), ["2026-11-01"]);
    let rows: Vec<Value> = gateway
        .cli(&["ledger", "export", "--format", "ndjson"])
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for row in rows.iter().filter(|row| row["model"] == "remote-model") {
        let now = ["billed_nano_usd", "billed_now_nano_usd", "provider_cost_now_nano_usd"]
            .map(|name| row[name].as_u64().unwrap());
        assert_eq!(
            (now, &row["price_version"], &row["price_version_now"]),
            ([0, 630, 630], &json!("2026-11-01"), &json!("2026-12-01"))
        );
    }
    let answers = gateway.cli(&["feedback", "--by", "model", "--json"]);
    assert!(answers.contains("\"cost_usd_per_answer\": \"0.000000630\""), "{answers}");
    let again = of_remote(&["--apply", "--reason", "again"]);
    assert!(again.contains("2 rows were looked at, 0 cost something else"), "{again}");
    assert!(gateway.cli(&["ledger", "verify"]).contains("ok   adjustments"));

    let changes = audit(&gateway);
    let last = &changes.last().unwrap()["change"];
    assert_eq!((&last["change"], &last["after"]["reason"]), (&json!("reprice"), &json!("the price came late")));
    assert_eq!((&last["after"]["rows"], &last["after"]["now"]["billed_usd"]), (&json!(2), &json!("0.000001260")));
    assert!(gateway.cli(&["audit", "list"]).contains("the price came late"));

    let db = rusqlite::Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    db.execute(
        "UPDATE adjustment SET billed_after_nano_usd = billed_after_nano_usd + 1, billed_before_nano_usd = 1",
        [],
    )
    .unwrap();
    let red = gateway.run(&["ledger", "verify"]);
    let said = String::from_utf8(red.stdout).unwrap();
    assert!(!red.status.success() && said.contains("BAD  adjustments"), "{said}");
    assert!(said.contains("adjustment 0 of request "), "{said}");
}

#[test]
fn a_command_that_is_killed_in_the_middle_is_run_again_and_all_is_done_once() {
    let setup = Setup::shipped();
    let folder = setup.0.path().join("data");
    std::fs::create_dir(&folder).unwrap();
    let database = Database::of(&folder);
    let rows: Vec<Row> = (0..20_000).map(|i| Row { unpriced: false, ..row(&format!("r{i:05}")) }).collect();
    let mut store = open(&database, 1);
    for some in rows.chunks(5_000) {
        ship(&mut *store, some);
    }
    let args = ["ledger", "reprice", "--apply", "--reason", "killed"];
    let mut child = setup.spawn(&args);
    eventually("the first page", || booked_one(&database).then_some(()));
    // It may be done by then; either way the second finds what the first one left.
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(setup.run(&args).status.success());
    assert!(booked(&database).iter().all(|one| one.adjustments == 1));
    sums_are_rows_and_adjustments(&database);
}

/// Whether the first row was adjusted.
fn booked_one(database: &Database) -> bool {
    let mut is_adjusted = false;
    let mut each = |booked: Booked| {
        is_adjusted = booked.adjustments > 0;
        false
    };
    database.books().unwrap().rows(i64::MIN, i64::MAX, &mut each).unwrap();
    is_adjusted
}

#[test]
fn a_database_from_before_there_were_adjustments_is_brought_up_to_date_with_all_that_is_in_it() {
    let postgres = Postgres::start();
    let database = database(&postgres);
    let began = 1_790_000_000_000_000_000;
    ship(&mut *open(&database, 1), &[Row { started_ns: began, ..row(&id_at(began, 1)) }]);
    postgres.ask(
        "DROP TABLE adjustment; ALTER TABLE ledger DROP COLUMN service_tier, DROP COLUMN images;
         ALTER TABLE spend_hour DROP COLUMN billed_adjusted_nano_usd, DROP COLUMN provider_cost_adjusted_nano_usd;
         UPDATE ledger_version SET version = 1",
    );
    let why = database.adjuster().err().unwrap().to_string();
    assert!(why.contains("older glassgate"), "{why}");
    let later = began + 40 * 24 * HOUR;
    ship(&mut *open(&database, 1), &[Row { started_ns: later, images: 2, ..row(&id_at(later, 2)) }]);
    assert_eq!(all(&database, "new", 1_000).total().rows, 2);
    let billed: Vec<u64> = booked(&database).iter().map(|one| one.standing.billed.0).collect();
    assert_eq!(billed, [38, 40]);
    assert_eq!(database.books().unwrap().uneven_adjustments(9).unwrap(), NONE);
}
