//! The ledger on a real disk: crashes, a full log, a store that comes and goes.

use super::super::core::Usage;
use super::super::feedback::{Of, Score};
use super::super::row::Outcome;
use super::super::settlement::{Durability, Journal as _, Slot};
use super::versions_tests::WAL_V1;
use super::wal::tests::row;
use super::*;

const LONG: Duration = Duration::from_secs(60);
const PROCESS: Durability = Durability::Process;

pub(super) fn open(folder: &Path) -> (Ledger, Recovery) {
    let ledger = start(folder, 64 << 20, &Arc::new(Metrics::new()));
    let recovery = ledger.recovered(LONG).expect("the store is there");
    (ledger, recovery)
}

pub(super) fn start(folder: &Path, bytes_max: u64, metrics: &Arc<Metrics>) -> Ledger {
    let settings = Settings { bytes_max, ..Settings::default() };
    Ledger::open(folder, &Database::of(folder), settings, metrics.clone()).expect("the ledger opens")
}

pub(super) fn disk(folder: &Path) -> RealDisk {
    RealDisk::new(folder.join("wal"))
}

fn rows(folder: &Path) -> Vec<(String, String)> {
    let db = rusqlite::Connection::open(folder.join("ledger.sqlite")).unwrap();
    let mut query = db.prepare("SELECT request_id, outcome FROM ledger ORDER BY 1").unwrap();
    let found = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    found.collect::<rusqlite::Result<_>>().unwrap()
}

/// Waits until the log has room, which comes with what the shipper does.
pub(super) fn opened(ledger: &Ledger, id: &str) -> Slot {
    let deadline = Instant::now() + LONG;
    loop {
        match ledger.open(&row(id)) {
            Ok(slot) => return slot,
            Err(_) => assert!(Instant::now() < deadline, "the log never has room again"),
        }
    }
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
        ledger.close(slot, settled(id), PROCESS).unwrap();
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
    ledger.close(slot, settled("settled"), PROCESS).unwrap();
    // A copy of the folder without the store is what a kill before the first shipment leaves.
    let crashed = tempfile::tempdir().unwrap();
    std::fs::create_dir(crashed.path().join("wal")).unwrap();
    for number in disk(folder.path()).list().unwrap() {
        std::fs::copy(disk(folder.path()).path(number), disk(crashed.path()).path(number)).unwrap();
    }
    let (second, recovery) = open(crashed.path());
    assert_eq!(recovery, Recovery { shipped: 1, killed: vec!["running".into()], ..Recovery::default() });
    drop(second);
    assert_eq!(rows(crashed.path()), [("running".into(), "killed".into()), ("settled".into(), "answered".into())]);
    // Starting once more finds nothing to do: nothing is written twice.
    let (_third, recovery) = open(crashed.path());
    assert_eq!(recovery, Recovery::default());
}

#[test]
fn a_full_log_refuses_the_next_request_and_takes_the_end_of_the_admitted() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = start(folder.path(), 16_000, &Arc::new(Metrics::new()));
    let mut slots = Vec::new();
    while let Ok(slot) = ledger.open(&row(&format!("r{}", slots.len()))) {
        slots.push(slot);
        assert!(slots.len() < 100, "the bound does not hold");
    }
    assert!(!slots.is_empty());
    let count = slots.len();
    for (i, slot) in slots.into_iter().enumerate() {
        ledger.close(slot, settled(&format!("r{i}")), PROCESS).expect("an admitted request has room");
    }
    // What is in the store gives its room back: a bound is a wait, not an end.
    for i in 0..200 {
        let id = format!("later{i}");
        let slot = opened(&ledger, &id);
        ledger.close(slot, settled(&id), PROCESS).unwrap();
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
        ledger.close(slot, settled(&id), PROCESS).unwrap();
    }
    ledger.shut_down();
    assert_eq!(rows(folder.path()).len(), 20_000);
    assert_eq!(disk(folder.path()).list().unwrap().len(), 1, "only the current segment stays");
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
    let ledger = start(folder.path(), 64 << 20, &metrics);
    ledger.recovered(LONG).unwrap();
    let blocker = rusqlite::Connection::open(folder.path().join("ledger.sqlite")).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    let slot = ledger.open(&row("waiting")).unwrap();
    ledger.close(slot, settled("waiting"), PROCESS).expect("a row is durable in the log before the store has it");
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
    let ledger = start(folder, 64 << 20, metrics);
    let row = Row { request_id: "0123".into(), response_id: "chatcmpl-0123".into(), ..settled("0123") };
    let slot = ledger.open(&row).unwrap();
    ledger.close(slot, row, PROCESS).unwrap();
    // Who locks the store from now on does not keep it from being opened.
    ledger.recovered(LONG).unwrap();
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
fn who_waits_for_a_verdict_when_the_ledger_ends_without_its_store_is_told() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()));
    let blocker = rusqlite::Connection::open(folder.path().join("ledger.sqlite")).unwrap();
    blocker.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let ledger = start(folder.path(), 64 << 20, &Arc::new(Metrics::new()));
    let verdict = ledger.judge(judgement(Of::Response("chatcmpl-0123".into()), "correct")).unwrap();
    ledger.shut_down();
    assert!(verdict.blocking_recv().is_err());
}

#[test]
fn one_trace_for_everything_is_found_to_be_ambiguous_without_reading_it_all() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()));
    let db = rusqlite::Connection::open(folder.path().join("ledger.sqlite")).unwrap();
    let steps: Vec<String> = db
        .prepare(&format!("EXPLAIN QUERY PLAN {}", store::feedback::by_trace()))
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

#[test]
fn a_start_needs_no_store_and_what_was_recovered_waits_for_it_like_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("wal")).unwrap();
    std::fs::write(disk(folder.path()).path(0), WAL_V1).unwrap();
    // Where the file should be there is something else.
    let in_the_way = folder.path().join("ledger.sqlite");
    std::fs::create_dir(&in_the_way).unwrap();
    let metrics = Arc::new(Metrics::new());
    let ledger = start(folder.path(), 64 << 20, &metrics);
    assert!(ledger.recovered(Duration::from_millis(1)).is_err());
    let slot = ledger.open(&row("living")).unwrap();
    ledger.close(slot, settled("living"), PROCESS).unwrap();
    ledger.observe();
    assert!(metrics.encode().contains("\ngateway_ledger_queue_rows 5\n"), "four of the last life, one of this");
    std::fs::remove_dir(&in_the_way).unwrap();
    let recovery = ledger.recovered(LONG).unwrap();
    assert_eq!((recovery.shipped, recovery.killed.len()), (3, 1));
    ledger.shut_down();
    assert_eq!(rows(folder.path()).len(), 5);
}

#[test]
fn a_segment_that_is_gone_is_missed() {
    let folder = tempfile::tempdir().unwrap();
    let (ledger, _) = open(folder.path());
    let blocker = rusqlite::Connection::open(folder.path().join("ledger.sqlite")).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    for i in 0..8_000 {
        let slot = ledger.open(&row(&format!("r{i}"))).unwrap();
        ledger.close(slot, settled(&format!("r{i}")), PROCESS).unwrap();
    }
    let crashed = tempfile::tempdir().unwrap();
    std::fs::create_dir(crashed.path().join("wal")).unwrap();
    let numbers = disk(folder.path()).list().unwrap();
    assert!(numbers.len() > 2, "{numbers:?}");
    for number in numbers.iter().filter(|number| **number != numbers[1]) {
        std::fs::copy(disk(folder.path()).path(*number), disk(crashed.path()).path(*number)).unwrap();
    }
    blocker.execute_batch("ROLLBACK").unwrap();
    let (_ledger, recovery) = open(crashed.path());
    assert_eq!(recovery.missing, [numbers[1]]);
    assert_eq!(recovery.damaged_bytes, 0);
}

#[test]
fn a_segment_that_leaves_while_another_begins_is_not_missed() {
    let folder = tempfile::tempdir().unwrap();
    let wal = folder.path().join("wal");
    std::fs::create_dir(&wal).unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(wal));
    let mut log = recovery::recover(disk.clone(), 64 << 20, 7).unwrap().log;
    log.begin(4_000).unwrap();
    log.count().unwrap();
    let gone = log.retirable();
    assert_eq!(gone, [0]);
    log.part_with(&gone).unwrap();
    // The shipper syncs what it has just said. Meanwhile requests fill the segment.
    log.begin(4_000).unwrap();
    log.count().unwrap();
    log.remove(&gone);
    assert_eq!(recovery::Reading::of(&*disk).unwrap().missing, [0_u64; 0]);
}

#[test]
fn a_row_that_must_survive_a_power_cut_is_confirmed_by_the_disk_and_then_shipped() {
    let folder = tempfile::tempdir().unwrap();
    let (ledger, _) = open(folder.path());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut waits = Vec::new();
    for i in 0..100 {
        let slot = ledger.open(&row(&format!("r{i}"))).unwrap();
        let held = ledger.close(slot, settled(&format!("r{i}")), Durability::Power).unwrap().unwrap();
        waits.push((ledger.durable(held.sequence), held));
    }
    assert!(rows(folder.path()).is_empty(), "nothing is shipped before it is confirmed");
    for (durable, held) in waits {
        assert!(runtime.block_on(durable));
        ledger.ship(*held);
    }
    ledger.shut_down();
    assert_eq!(rows(folder.path()).len(), 100);
}

/// A disk that fails at every sync, and says so once.
struct Forgetful(RealDisk, std::sync::atomic::AtomicUsize);

struct ForgetfulFile(Arc<dyn disk::Segment>);

impl disk::Segment for ForgetfulFile {
    fn append(&self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.append(bytes)
    }
    fn sync(&self) -> std::io::Result<()> {
        Err(std::io::ErrorKind::StorageFull.into())
    }
}

impl Disk for Forgetful {
    fn list(&self) -> std::io::Result<Vec<u64>> {
        self.0.list()
    }
    fn read(&self, number: u64) -> std::io::Result<Vec<u8>> {
        self.0.read(number)
    }
    fn create(&self, number: u64, bytes: u64) -> std::io::Result<Arc<dyn disk::Segment>> {
        self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(Arc::new(ForgetfulFile(self.0.create(number, bytes)?)))
    }
    fn unlink(&self, number: u64) -> std::io::Result<()> {
        self.0.unlink(number)
    }
    fn set_aside(&self, number: u64) -> std::io::Result<()> {
        self.0.set_aside(number)
    }
    fn sync_folder(&self) -> std::io::Result<()> {
        self.0.sync_folder()
    }
}

#[test]
fn a_sync_that_failed_is_the_end_of_the_log_and_whoever_waited_is_told() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("wal")).unwrap();
    let failing = Arc::new(Forgetful(disk(folder.path()), 0.into()));
    let metrics = Arc::new(Metrics::new());
    let shared = Arc::new(Shared::recover(failing, 64 << 20, 1, metrics.clone()).unwrap());
    let ledger = Ledger::start(shared, Database::of(folder.path()).opener(1), Settings::default()).unwrap();
    ledger.recovered(LONG).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let slot = ledger.open(&row("doubtful")).unwrap();
    let running = ledger.open(&row("running")).unwrap();
    let held = ledger.close(slot, settled("doubtful"), Durability::Power).unwrap().unwrap();
    assert!(!runtime.block_on(ledger.durable(held.sequence)), "the disk did not confirm it");
    assert!(!ledger.is_healthy() && ledger.open(&row("late")).is_err(), "nobody is let in any more");
    let failed = Row { outcome: Outcome::Failed, ..held.row.clone() };
    ledger.amend(Some(*held), failed);
    // Whoever is in cannot end where the log was; there is a place for that, too.
    let row = ledger.close(running, settled("running"), Durability::Power).unwrap_err();
    ledger.amend(None, *row);
    ledger.shut_down();
    let ended = [("doubtful".into(), "failed".into()), ("running".into(), "answered".into())];
    assert_eq!(rows(folder.path()), ended);
    // A kill before anything was shipped leaves the same: log and store say one thing.
    let store = folder.path().join("ledger.sqlite");
    for is_kept in [false, true] {
        if !is_kept {
            std::fs::remove_file(&store).unwrap();
        }
        let (ledger, recovery) = open(folder.path());
        let shipped = if is_kept { 0 } else { 2 };
        assert_eq!(recovery, Recovery { shipped, ..Recovery::default() });
        ledger.shut_down();
        assert_eq!(rows(folder.path()), ended);
        let legs = verify::verify(&disk(folder.path()), || Database::of(folder.path()).books(), None).unwrap();
        assert!(legs.iter().all(verify::Leg::is_whole), "{legs:?}");
    }
}

/// SQLite removes its log when the last one closes the file, and finds out by locks which any close of the file gives up.
#[test]
fn a_stranger_who_reads_the_ledger_beside_it_takes_nothing_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.sqlite");
    let mut store = (Database::of(folder.path()).opener(1))().unwrap();
    store.ship(&[&settled("before")], &[]).unwrap();
    store.sync().unwrap();
    // Another process: SQLite knows of all connections in its own.
    let script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('SELECT 1 FROM ledger').fetchall(); db.close()";
    let status = std::process::Command::new("python3").args(["-c", script]).arg(&path).status();
    assert!(status.expect("python3, which the tests' setup installs").success());
    store.ship(&[&settled("after")], &[]).unwrap();
    store.sync().expect("SQLite's log is where it was");
    assert_eq!(rows(folder.path()).len(), 2, "a copy of what is on the disk has both");
}
