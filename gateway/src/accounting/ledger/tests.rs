//! The ledger on a real disk: crashes, a full log, a store that comes and goes.

use super::super::core::Usage;
use super::super::feedback::{Of, Score};
use super::super::row::Outcome;
use super::wal::tests::row;
use super::*;

fn open(folder: &Path) -> (Ledger, Recovery) {
    Ledger::open(folder, 64 << 20, Arc::new(Metrics::new())).expect("the ledger opens")
}

fn rows(folder: &Path) -> Vec<(String, String)> {
    let db = sqlite::open_readonly(&folder.join("ledger.sqlite")).unwrap();
    let mut query = db.prepare("SELECT request_id, outcome FROM ledger ORDER BY 1").unwrap();
    let found = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    found.collect::<rusqlite::Result<_>>().unwrap()
}

fn settled(id: &str) -> Row {
    Row { outcome: Outcome::Answered, usage: Usage::tokens(7, 3), ..row(id) }
}

#[test]
fn a_row_closed_is_in_the_store_after_a_clean_end() {
    let folder = tempfile::tempdir().unwrap();
    let (ledger, _) = open(folder.path());
    for id in ["a", "b"] {
        let slot = ledger.open(&row(id)).unwrap();
        ledger.close(slot, settled(id)).unwrap();
    }
    ledger.shut_down();
    assert_eq!(rows(folder.path()), [("a".into(), "answered".into()), ("b".into(), "answered".into())]);
}

#[test]
fn a_start_after_a_kill_ships_what_was_settled_and_marks_what_was_running() {
    let folder = tempfile::tempdir().unwrap();
    let (ledger, _) = open(folder.path());
    let slot = ledger.open(&row("settled")).unwrap();
    let _running = ledger.open(&row("running")).unwrap();
    ledger.close(slot, settled("settled")).unwrap();
    // A copy of the folder without the store is what a kill before the first shipment leaves.
    let crashed = tempfile::tempdir().unwrap();
    std::fs::create_dir(crashed.path().join("wal")).unwrap();
    for (_, path) in segment_files(&folder.path().join("wal")).unwrap() {
        std::fs::copy(&path, crashed.path().join("wal").join(path.file_name().unwrap())).unwrap();
    }
    let (second, recovery) = open(crashed.path());
    assert_eq!(recovery, Recovery { shipped: 1, killed: vec!["running".into()], damaged_bytes: 0 });
    drop(second);
    assert_eq!(rows(crashed.path()), [("running".into(), "killed".into()), ("settled".into(), "answered".into())]);
    // Starting once more finds nothing to do: nothing is written twice.
    let (_third, recovery) = open(crashed.path());
    assert_eq!(recovery, Recovery::default());
}

#[test]
fn a_full_log_refuses_the_next_request_and_takes_the_end_of_the_admitted() {
    let folder = tempfile::tempdir().unwrap();
    let (ledger, _) = Ledger::open(folder.path(), 8_000, Arc::new(Metrics::new())).unwrap();
    let mut slots = Vec::new();
    while let Ok(slot) = ledger.open(&row(&format!("r{}", slots.len()))) {
        slots.push(slot);
        assert!(slots.len() < 100, "the bound does not hold");
    }
    assert!(!slots.is_empty());
    let count = slots.len();
    for (i, slot) in slots.into_iter().enumerate() {
        ledger.close(slot, settled(&format!("r{i}"))).expect("an admitted request has room");
    }
    // What is in the store gives its room back: a bound is a wait, not an end.
    let deadline = Instant::now() + Duration::from_secs(10);
    for i in 0..200 {
        let id = format!("later{i}");
        let slot = loop {
            match ledger.open(&row(&id)) {
                Ok(slot) => break slot,
                Err(_) => assert!(Instant::now() < deadline, "the log never has room again"),
            }
        };
        ledger.close(slot, settled(&id)).unwrap();
    }
    ledger.shut_down();
    assert_eq!(rows(folder.path()).len(), count + 200);
}

#[test]
fn segments_are_deleted_once_all_they_hold_is_in_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let (ledger, _) = open(folder.path());
    for i in 0..20_000 {
        let id = format!("r{i}");
        let slot = ledger.open(&row(&id)).unwrap();
        ledger.close(slot, settled(&id)).unwrap();
    }
    ledger.shut_down();
    assert_eq!(rows(folder.path()).len(), 20_000);
    assert_eq!(segment_files(&folder.path().join("wal")).unwrap().len(), 1, "only the current segment stays");
}

#[test]
fn a_damaged_log_is_reported_and_kept_as_evidence() {
    let folder = tempfile::tempdir().unwrap();
    let wal_folder = folder.path().join("wal");
    std::fs::create_dir(&wal_folder).unwrap();
    let mut bytes = Vec::new();
    for (i, id) in ["a", "b", "c"].iter().enumerate() {
        wal::encode(i as u64, wal::Kind::Terminal, &settled(id), &mut bytes);
    }
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(wal_folder.join("000000000000.wal"), bytes).unwrap();
    let (ledger, recovery) = open(folder.path());
    assert_eq!(recovery.shipped, 2);
    assert!(recovery.damaged_bytes > 0);
    drop(ledger);
    assert!(wal_folder.join("000000000000.damaged").exists());
}

#[test]
fn serving_goes_on_while_the_store_is_locked_and_rows_that_wait_are_shown_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let metrics = Arc::new(Metrics::new());
    let (ledger, _) = Ledger::open(folder.path(), 64 << 20, metrics.clone()).unwrap();
    let blocker = rusqlite::Connection::open(folder.path().join("ledger.sqlite")).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    let slot = ledger.open(&row("waiting")).unwrap();
    ledger.close(slot, settled("waiting")).expect("a row is durable in the log before the store has it");
    ledger.observe();
    assert!(metrics.encode().contains("\ngateway_ledger_queue_rows 1\n"));
    assert!(rows(folder.path()).is_empty());
    blocker.execute_batch("ROLLBACK").unwrap();
    ledger.shut_down();
    assert_eq!(rows(folder.path()).len(), 1);
}

fn judgement(of: Of, name: &str) -> Arc<Judgement> {
    let row = settled("");
    let (score, comment) = (Score::Boolean(true), None);
    Arc::new(Judgement { of, name: name.into(), score, comment, tenant: row.tenant, key_id: row.key_id, at_ns: 1 })
}

fn is_taken(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Taken { .. })
}

/// A ledger with one answer that can be judged.
fn open_answered(folder: &Path, metrics: &Arc<Metrics>) -> (Ledger, Of) {
    let (ledger, _) = Ledger::open(folder, 64 << 20, metrics.clone()).unwrap();
    let row = Row { request_id: "0123".into(), response_id: "chatcmpl-0123".into(), ..settled("0123") };
    let slot = ledger.open(&row).unwrap();
    ledger.close(slot, row).unwrap();
    (ledger, Of::Response("chatcmpl-0123".into()))
}

#[test]
fn a_judgement_that_the_store_did_not_take_is_tried_again_and_one_that_nobody_waits_for_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let metrics = Arc::new(Metrics::new());
    let (ledger, of) = open_answered(folder.path(), &metrics);
    assert!(is_taken(&ledger.judge(judgement(of.clone(), "first")).unwrap().blocking_recv().unwrap()));
    let blocker = rusqlite::Connection::open(folder.path().join("ledger.sqlite")).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    let waiting = ledger.judge(judgement(of.clone(), "again")).unwrap();
    drop(ledger.judge(judgement(of, "forsaken")));
    let failed = || !metrics.encode().contains("gateway_ledger_failures_total 0");
    let deadline = Instant::now() + Duration::from_secs(30);
    while !failed() {
        assert!(Instant::now() < deadline, "the store took it though it is locked");
        std::thread::sleep(Duration::from_millis(5));
    }
    blocker.execute_batch("ROLLBACK").unwrap();
    assert!(is_taken(&waiting.blocking_recv().unwrap()));
    ledger.shut_down();
    let names: Vec<String> = blocker
        .prepare("SELECT name FROM feedback ORDER BY 1")
        .unwrap()
        .query_map([], |row| row.get(0))
        .unwrap()
        .flatten()
        .collect();
    assert_eq!(names, ["again", "first"]);
}

#[test]
fn judgements_beyond_the_bound_are_refused_and_those_that_wait_are_answered_before_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let (ledger, of) = open_answered(folder.path(), &Arc::new(Metrics::new()));
    let blocker = rusqlite::Connection::open(folder.path().join("ledger.sqlite")).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut waiting = Vec::new();
    while let Some(verdict) = ledger.judge(judgement(of.clone(), "correct")) {
        waiting.push(verdict);
        assert!(waiting.len() <= JUDGEMENTS_MAX + shipper::BATCH_ROWS, "the bound does not hold");
    }
    assert!(waiting.len() >= JUDGEMENTS_MAX);
    blocker.execute_batch("ROLLBACK").unwrap();
    ledger.shut_down();
    assert!(waiting.into_iter().all(|verdict| is_taken(&verdict.blocking_recv().unwrap())));
    assert!(ledger.judge(judgement(of, "late")).is_none());
}

#[test]
fn one_trace_for_everything_is_found_to_be_ambiguous_without_reading_it_all() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()));
    let db = sqlite::open_readonly(&folder.path().join("ledger.sqlite")).unwrap();
    let steps: Vec<String> = db
        .prepare(&format!("EXPLAIN QUERY PLAN {}", feedback::trace_query()))
        .unwrap()
        .query_map(["", "", ""], |row| row.get(3))
        .unwrap()
        .flatten()
        .collect();
    let plan = steps.join("\n");
    assert!(plan.contains("ledger_by_foreign_trace (tenant=? AND trace_id=?)"), "{plan}");
    assert!(plan.contains("PRIMARY KEY (request_id>? AND request_id<?)"), "{plan}");
    assert!(!plan.contains("TEMP B-TREE") && !plan.contains("SCAN"), "{plan}");
}
