//! A ledger that is whole is green; whatever is done to it, the leg that is about it is red and says what.

use std::path::Path;

use rusqlite::Connection;

use super::super::core::Usage;
use super::super::row::Outcome;
use super::super::settlement::{Durability, Journal as _};
use super::disk::RealDisk;
use super::tests::opened;
use super::verify::{Leg, Scrape, verify};
use super::wal::tests::row;
use super::*;

const REQUESTS: usize = 40;

fn open(folder: &Path) -> Ledger {
    let metrics = Arc::new(Metrics::new());
    let settings = Settings { bytes_max: 16_000, commit_every: Duration::ZERO, ..Settings::default() };
    let ledger = Ledger::open(folder, &Database::of(folder), settings, metrics).unwrap();
    let found = ledger.recovered(Duration::from_secs(60)).unwrap();
    assert!(!found.is_alarming(), "nothing happened to it: {found:?}");
    ledger
}

/// A folder after some lives: most of what it logged is only in the store by now.
fn lived() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let open = || open(folder.path());
    let mut ledger = open();
    for i in 0..REQUESTS {
        if i % 15 == 14 {
            // It never ends in this life.
            opened(&ledger, &format!("cut off {i}"));
            ledger.shut_down();
            ledger = open();
        }
        let id = format!("r{i}");
        let slot = opened(&ledger, &id);
        let (usage, started_ns) = (Usage::tokens(7, i as u64), i as i64 * 600_000_000_000);
        let row = Row { outcome: Outcome::Answered, usage, started_ns, ..row(&id) };
        ledger.close(slot, row, Durability::Process).unwrap();
    }
    ledger.shut_down();
    folder
}

fn look(folder: &Path, scrape: Option<Scrape>) -> Vec<Leg> {
    let disk = RealDisk::new(folder.join("wal"));
    verify(&disk, || Database::of(folder).books(), scrape).unwrap()
}

/// The legs that differ, with what they say.
fn red(folder: &Path) -> Vec<(&'static str, String)> {
    let legs = look(folder, None).into_iter().filter(|leg| !leg.is_whole());
    legs.map(|leg| (leg.name, leg.differences.join("\n"))).collect()
}

fn said<'l>(legs: &'l [(&'static str, String)], name: &str) -> &'l str {
    legs.iter().find(|(leg, _)| *leg == name).map_or("", |(_, said)| said)
}

#[test]
fn a_ledger_that_lived_is_whole() {
    let folder = lived();
    assert_eq!(red(folder.path()), []);
    let legs = look(folder.path(), None);
    assert!(legs.iter().any(|leg| leg.name == "control totals" && leg.told.starts_with("42 rows")), "{legs:?}");
    let log = RealDisk::new(folder.path().join("wal")).list().unwrap();
    assert!(log[0] > 2, "most of the log is gone by now: {log:?}");
}

#[test]
fn a_row_that_was_changed_dropped_or_added_is_found_also_when_the_log_has_forgotten_it() {
    let hours = "hourly sums";
    for (change, name, what) in [
        ("UPDATE ledger SET billed_nano_usd = 10 WHERE request_id = 'r1'", hours, "-1 billed_nano_usd"),
        ("DELETE FROM ledger WHERE request_id = 'r1'", hours, "+1 requests"),
        (
            "CREATE TEMP TABLE t AS SELECT * FROM ledger WHERE request_id = 'r1'; UPDATE t SET attempt = 1; INSERT INTO ledger SELECT * FROM t",
            "one end a request",
            "request r1 has 2 rows that end it",
        ),
    ] {
        let folder = lived();
        Connection::open(folder.path().join("ledger.sqlite")).unwrap().execute_batch(change).unwrap();
        let legs = red(folder.path());
        assert!(said(&legs, name).contains(what), "{change}: {legs:?}");
        assert!(said(&legs, hours).contains("1970-01-01 00:00 UTC default k assistant"), "{change}: {legs:?}");
        assert!(said(&legs, "control totals").contains("the log counted"), "{change}: {legs:?}");
    }
}

#[test]
fn a_row_that_was_changed_is_named_while_the_log_has_it() {
    let folder = lived();
    let change = "UPDATE ledger SET output_tokens = 4 WHERE request_id = 'r39'";
    Connection::open(folder.path().join("ledger.sqlite")).unwrap().execute_batch(change).unwrap();
    let legs = red(folder.path());
    assert_eq!(said(&legs, "rows of the log"), "request r39 attempt 0 primary: output_tokens is 4, and 39 in the log");
}

#[test]
fn rows_and_sums_that_were_changed_together_do_not_match_what_the_log_counted() {
    let folder = lived();
    let change = "UPDATE ledger SET billed_nano_usd = 0; UPDATE spend_hour SET billed_nano_usd = 0";
    Connection::open(folder.path().join("ledger.sqlite")).unwrap().execute_batch(change).unwrap();
    let legs = red(folder.path());
    assert_eq!(said(&legs, "control totals"), "billed_nano_usd: the log counted 378, the ledger holds 0");
    assert_eq!(said(&legs, "hourly sums"), "");
}

#[test]
fn a_segment_that_was_removed_or_damaged_is_named() {
    let folder = lived();
    // Segments may have stayed for want of room to say that they go; a life without requests has it.
    open(folder.path()).shut_down();
    let disk = RealDisk::new(folder.path().join("wal"));
    let [number] = disk.list().unwrap()[..] else { panic!("one segment, and what was before it is in the store") };
    let path = disk.path(number);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let legs = red(folder.path());
    assert!(said(&legs, "sequence of the log").contains("there is no log at all"), "{legs:?}");

    // Another one after it, which knows that it must be there.
    let mut head = Vec::new();
    let last = wal::scan(&bytes);
    let (_, totals) = last.totals.last().unwrap().clone();
    let segments = vec![number, number + 1];
    let at = last.sequences().last().unwrap() + 1;
    wal::encode_totals(at, &totals::Totals { segments, ..totals }, &mut head);
    std::fs::write(disk.path(number + 1), head).unwrap();
    let legs = red(folder.path());
    let what = format!("segment {number} is missing, and the log says that it must be there");
    assert_eq!(said(&legs, "sequence of the log"), what);

    let mut damaged = bytes.clone();
    // In the first of its records.
    damaged[30] ^= 0xff;
    std::fs::write(&path, damaged).unwrap();
    assert!(said(&red(folder.path()), "frames of the log").starts_with(&format!("segment {number}: ")));
}

#[test]
fn metrics_must_not_have_told_more_than_the_ledger_holds() {
    let folder = lived();
    let text = |requests: u64, usd: &str| {
        format!(
            "process_start_time_seconds 0\n\
             gateway_settled_requests_total{{route=\"a\",outcome=\"answered\"}} {requests}\n\
             gateway_tokens_total{{kind=\"input\"}} 294\n\
             gateway_tokens_total{{kind=\"output\"}} 700\ngateway_tokens_total{{kind=\"output\"}} 208\n\
             gateway_cost_usd_total{{route=\"a\"}} {usd}\n"
        )
    };
    let leg = |text: &str| look(folder.path(), Some(Scrape::parse(text).unwrap())).pop().unwrap();
    assert!(leg(&text(42, "0.000000378")).is_whole());
    assert!(leg(&text(12, "0")).is_whole(), "an old scrape is a lower bound");
    assert_eq!(leg(&text(43, "0")).differences, ["rows: metrics counted 43, the ledger holds 42"]);
    let dear = leg(&text(42, "0.000000379"));
    assert_eq!(dear.differences, ["billed_nano_usd: metrics counted 379, the ledger holds 378"]);
    assert!(Scrape::parse("up 1").is_err());
}
