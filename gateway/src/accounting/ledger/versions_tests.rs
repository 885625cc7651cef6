//! What another version wrote.

use super::super::row::{COLUMNS, Outcome};
use super::tests::{disk, open, start};
use super::*;

pub(super) const WAL_V1: &[u8] = include_bytes!("../../../../tests/golden/wal_v1.bin");
/// A dump of the first version's tables, with three rows that its log has, too.
const LEDGER_V1: &str = include_str!("../../../../tests/golden/ledger_v1.sql");

#[test]
fn what_the_first_version_wrote_is_read_for_ever() {
    let found = wal::scan(WAL_V1);
    assert_eq!((found.records.len(), found.damaged_bytes, found.torn_bytes), (7, 0, 0));
    let rows = wal::standing(found.records);
    let told = rows.iter().map(|(_, _, row)| (row.outcome, row.usage.total(), row.billed.0, row.user_id.clone()));
    assert_eq!(
        told.collect::<Vec<_>>(),
        [
            (Outcome::Answered, 33, 1920, None),
            (Outcome::FailedOver, 0, 0, None),
            (Outcome::Answered, 14, 520, None),
            (Outcome::Killed, 209, 16_180, None),
        ]
    );
}

#[test]
fn a_folder_of_the_first_version_opens_and_keeps_its_rows() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("wal")).unwrap();
    std::fs::write(disk(folder.path()).path(0), WAL_V1).unwrap();
    let db = rusqlite::Connection::open(folder.path().join("ledger.sqlite")).unwrap();
    db.execute_batch(LEDGER_V1).unwrap();
    let all = "SELECT * FROM ledger WHERE outcome <> 'killed' ORDER BY started_ns";
    let text = |db: &rusqlite::Connection| -> Vec<String> {
        let mut query = db.prepare(all).unwrap();
        query
            .query_map([], |row| Ok(format!("{:?}", (0..27).map(|at| row.get_ref(at)).collect::<Vec<_>>())))
            .unwrap()
            .flatten()
            .collect()
    };
    let before = text(&db);
    assert_eq!(before.len(), 3);
    let (ledger, recovery) = open(folder.path());
    assert_eq!((recovery.shipped, recovery.killed.len(), recovery.damaged_bytes), (0, 1, 0));
    drop(ledger);
    assert_eq!(text(&db), before);
    let books = Database::of(folder.path()).books().unwrap();
    assert_eq!(books.sums_of(0, i64::MIN).unwrap().rows, 4);
    assert_eq!(books.uneven_hours(9).unwrap(), Vec::<String>::new(), "its rows are in the hourly sums");
    let mut columns =
        db.prepare("SELECT name, type || iif(\"notnull\", ' NOT NULL', '') FROM pragma_table_info('ledger')").unwrap();
    let columns = columns.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    let contract = COLUMNS.map(|(name, kind)| (name.to_owned(), kind.to_owned()));
    assert_eq!(columns.collect::<rusqlite::Result<Vec<(String, String)>>>().unwrap(), contract);
}

#[test]
fn a_folder_of_a_newer_version_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()));
    let db = rusqlite::Connection::open(folder.path().join("ledger.sqlite")).unwrap();
    db.execute_batch("PRAGMA user_version = 99").unwrap();
    let ledger = start(folder.path(), 64 << 20, &Arc::new(Metrics::new()));
    let why = ledger.recovered(Duration::from_millis(300)).unwrap_err();
    assert!(why.contains("newer glassgate"), "{why}");
    assert!(Database::of(folder.path()).books().err().unwrap().to_string().contains("newer glassgate"));
}

#[test]
fn a_log_that_is_cut_anywhere_and_read_twice_counts_once() {
    for cut in (0..WAL_V1.len()).step_by(311) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("wal")).unwrap();
        let life = || {
            std::fs::write(disk(folder.path()).path(0), &WAL_V1[..cut]).unwrap();
            drop(open(folder.path()));
            let books = Database::of(folder.path()).books().unwrap();
            assert_eq!(books.uneven_hours(9).unwrap(), Vec::<String>::new());
            let mut rows = Vec::new();
            books
                .rows(i64::MIN, i64::MAX, &mut |booked| {
                    rows.push(booked.row);
                    true
                })
                .unwrap();
            rows
        };
        let once = life();
        let requests = wal::standing(wal::scan(&WAL_V1[..cut]).records).len();
        assert_eq!(once.len(), requests, "cut at {cut}");
        assert_eq!(life(), once, "cut at {cut}");
    }
}
