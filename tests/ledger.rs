//! The ledger as operators meet it: durability on a real disk, `ledger verify` and `ledger export`.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::evidence::ledger;
use crate::support::gateway::{Setup, TestGateway, append, chat, chat_with};

#[test]
fn a_ledger_is_whole_beside_the_gateway_that_writes_it_and_after_its_end() {
    let mut gateway = TestGateway::start();
    for _ in 0..3 {
        gateway.ask("What is Glassgate?");
    }
    let said = gateway.cli(&["ledger", "verify"]);
    assert_eq!(said.matches("ok   ").count(), 8, "{said}");
    assert!(said.contains("metrics: 3 requests since the gateway's start"), "{said}");
    let metrics = gateway.data_dir().join("last.prom");
    std::fs::write(&metrics, gateway.metrics()).unwrap();
    gateway.stop();
    let said = gateway.cli(&["ledger", "verify"]);
    assert!(said.contains("metrics: nobody to ask"), "{said}");
    let with_metrics = ["ledger", "verify", "--metrics", metrics.to_str().unwrap()];
    assert!(gateway.cli(&with_metrics).contains("ok   metrics: 3 requests"));

    let db = rusqlite::Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    db.execute("UPDATE ledger SET billed_nano_usd = billed_nano_usd - 1", []).unwrap();
    let red = gateway.run(&with_metrics);
    let said = String::from_utf8(red.stdout).unwrap();
    assert!(!red.status.success());
    assert_eq!(said.matches("billed_nano_usd is ").count(), 3, "each row is named: {said}");
    for leg in ["rows of the log", "hourly sums", "control totals", "metrics"] {
        assert!(said.contains(&format!("BAD  {leg}")), "{leg}: {said}");
    }
}

#[test]
fn rows_are_exported_with_their_columns_in_every_format() {
    let gateway = TestGateway::start();
    gateway.ask("What is Glassgate?");
    gateway.ask("12 + 34 = ?");
    eventually("both rows", || (ledger(&gateway).len() == 2).then_some(()));
    let csv = gateway.cli(&["ledger", "export"]);
    let mut lines = csv.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let head = lines.next().unwrap();
    assert_eq!((head[0], head.len(), lines.clone().count()), ("request_id", 34, 2));
    let json = gateway.cli(&["ledger", "export", "--format", "ndjson", "--since", "1h"]);
    let rows: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 2);
    for (fields, row) in lines.zip(&rows) {
        for (name, field) in head.iter().zip(fields) {
            let told = &row[*name];
            let text = told.as_str().map_or_else(|| told.to_string().replace("null", ""), str::to_owned);
            assert_eq!(text, field, "{name}");
        }
    }
    let file = gateway.run(&["ledger", "export", "--format", "parquet"]).stdout;
    let file = SerializedFileReader::new(bytes::Bytes::from(file)).unwrap();
    let told: Vec<Value> = file.get_row_iter(None).unwrap().map(|row| parquet_row(&row.unwrap())).collect();
    assert_eq!(told, rows, "the same rows, columns and kinds");
    assert!(rows.is_sorted_by_key(|row| row["started_ns"].as_i64().unwrap()));
    assert_eq!(gateway.cli(&["ledger", "export", "--until", "2026-01-01"]).lines().count(), 1, "the head alone");
    let bad = gateway.run(&["ledger", "export", "--since", "yesterday"]);
    assert!(String::from_utf8(bad.stderr).unwrap().contains("`yesterday` is no time"));
}

fn parquet_row(row: &parquet::record::Row) -> Value {
    let value = |field: &Field| match field {
        Field::Str(text) => json!(text),
        Field::Long(number) => json!(number),
        Field::Null => Value::Null,
        other => panic!("{other:?}"),
    };
    Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect())
}

#[test]
fn spending_is_told_by_several_things_at_once_and_by_the_days_of_a_zone() {
    let gateway = TestGateway::start();
    gateway.ask("What is Glassgate?");
    eventually("the row", || (ledger(&gateway).len() == 1).then_some(()));
    let spend = |args: &[&str]| -> Value {
        let args: Vec<&str> = ["spend", "--json"].iter().chain(args).copied().collect();
        serde_json::from_str(&gateway.cli(&args)).unwrap()
    };
    let line = &spend(&["--by", "tenant,route,day", "--since", "2d", "--zone", "Asia/Kolkata"])[0];
    assert_eq!(
        (&line["tenant"], &line["route"], &line["requests"]),
        (&json!("default"), &json!("assistant"), &json!(1))
    );
    let row = &ledger(&gateway)[0];
    assert_eq!(line["billed_nano_usd"], row.billed);
    assert_eq!(line["day"].as_str().unwrap().len(), "2026-11-21".len());
    assert_eq!(spend(&["--by", "day", "--until", "2026-01-01"]), json!([]));
    let table = gateway.cli(&["spend", "--by", "model,day"]);
    assert!(table.starts_with("model") && table.lines().count() == 2, "{table}");
    for bad in [["--zone", "Mars"], ["--since", "soon"], ["--until", "1970-01-01"]] {
        let since = if bad[0] == "--since" { &[][..] } else { &["--since", "1h"] };
        let args = [&["spend"], since, &bad].concat();
        assert!(!gateway.run(&args).status.success(), "{args:?}");
    }
}

/// Whether strace may look into another process here.
fn can_trace() -> bool {
    let trace = Command::new("strace").args(["-f", "-o", "/dev/null", "true"]).stderr(Stdio::null()).status();
    trace.is_ok_and(|status| status.success())
}

/// A gateway with this durability under strace, and where its calls are written; `None` where that is not allowed.
fn traced(durability: &str, watch: &[&str]) -> Option<(TestGateway, PathBuf)> {
    if !can_trace() {
        eprintln!("SKIPPED: strace cannot trace here, so what the gateway asks of the disk is not shown");
        return None;
    }
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "durability = \"process\"", &format!("durability = \"{durability}\""));
    let (folder, calls) = (setup.0.path().canonicalize().unwrap(), setup.0.path().join("calls"));
    let log = folder.join("data/wal/000000000000.wal");
    let watch = watch.iter().map(|word| if *word == "LOG" { log.to_str().unwrap() } else { word });
    // The tracer is not the parent: the gateway has the pid that it would have.
    let strace = ["strace", "-D", "-f", "-y", "-s", "64", "-o", calls.to_str().unwrap()];
    let words: Vec<&str> = strace.into_iter().chain(watch).collect();
    Some((setup.start_under(&words), calls))
}

/// In which order the log was written, synced, and the answer sent.
fn order(calls: &str) -> Vec<&'static str> {
    let kind = |line: &str| {
        let is_log = line.contains(".wal>");
        if is_log && line.contains("fdatasync(") {
            Some("sync")
        } else if is_log && line.contains("write(") {
            Some("log")
        } else if line.contains("HTTP/1.1 200 OK") || line.contains("\"object\":\"chat.completion\"") {
            Some("answer")
        } else {
            None
        }
    };
    calls.lines().filter_map(kind).collect()
}

#[test]
fn with_power_durability_the_disk_confirms_the_row_before_the_answer_leaves() {
    for (durability, expected) in [("power", true), ("process", false)] {
        let Some((mut gateway, calls)) = traced(durability, &["-e", "trace=write,writev,sendto,fdatasync"]) else {
            return;
        };
        gateway.ask("What is Glassgate?");
        gateway.stop();
        let order = order(&std::fs::read_to_string(calls).unwrap());
        // Probes were answered before.
        let answer = order.iter().rposition(|call| *call == "answer").expect("an answer left");
        // The intent and the end of the request are in the log by then.
        let logged = order[..answer].iter().rposition(|call| *call == "log").expect("its row is written first");
        let is_synced = order[logged..answer].contains(&"sync");
        assert_eq!(is_synced, expected, "{durability}: {order:?}");
    }
}

#[test]
fn a_disk_that_fails_to_sync_gives_no_answer_and_no_bill_and_lets_nobody_in_any_more() {
    let inject = ["-P", "LOG", "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO"];
    let Some((mut gateway, _)) = traced("power", &inject) else { return };
    let refused = gateway.post(&chat("What is Glassgate?"));
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str().unwrap()), (503, "ledger_full"));
    assert_eq!(gateway.admin_get("/readyz").status, 503, "balancers send nobody");
    assert_eq!(gateway.post(&chat("What is Glassgate?")).status, 503);
    let row = eventually("the row", || ledger(&gateway).pop());
    assert_eq!((row.outcome.as_str(), row.billed), ("failed", 0));
    gateway.stop();
}

#[test]
fn a_route_may_ask_for_more_than_the_rest() {
    let setup = Setup::shipped();
    append(&setup.path("routes.toml"), "\n[routes.kept]\nsplit = { glimmer-1 = 1 }\ndurability = \"power\"\n");
    let mut gateway = setup.start();
    for stream in [false, true] {
        let body = chat_with("What is Glassgate?", json!({"model": "kept", "stream": stream}));
        assert_eq!(gateway.post(&body).status, 200);
    }
    gateway.stop();
    let rows = ledger(&gateway);
    assert!(rows.len() == 2 && rows.iter().all(|row| row.route == "kept" && row.outcome == "answered"), "{rows:?}");
}

#[test]
fn a_full_disk_refuses_new_requests_and_loses_none_that_it_took() {
    let probe = ["--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"];
    let can = Command::new("unshare").args(probe).stderr(Stdio::null()).status();
    if !can.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: no mounts of one's own here, so no small disk");
        return;
    }
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "durability = \"process\"", "durability = \"process\"\nwal_max = \"64KiB\"");
    let data = setup.0.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("outside"), "").unwrap();
    let mount = format!("mount -t tmpfs -o size=2m none {} && exec \"$0\" \"$@\"", data.display());
    let mut gateway =
        setup.start_under(&["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount.as_str()]);
    let ask = |gateway: &TestGateway| gateway.post(&chat("12 + 34 = ?"));
    assert_eq!(ask(&gateway).status, 200);
    // Somebody else takes what is left: neither the store nor the log's next segment finds room.
    let hog = gateway.data_dir().join("hog");
    std::fs::write(&hog, vec![0; 2 << 20]).unwrap_err();
    let mut answered = 1;
    let refused = loop {
        match ask(&gateway) {
            response if response.status == 200 => answered += 1,
            response => break response,
        }
        assert!(answered < 1000, "the log finds room where there is none");
    };
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str().unwrap()), (503, "ledger_full"));
    assert!(answered > 1, "the room that was claimed before is there");
    std::fs::remove_file(&hog).unwrap();
    eventually("room again", || (ask(&gateway).status == 200).then_some(()));
    answered += 1;
    eventually("all rows", || (gateway.metric("gateway_ledger_queue_rows", &[]) == 0.0).then_some(()));
    // SQLite would look for the file under its path outside.
    let copy = tempfile::tempdir().unwrap();
    for name in ["ledger.sqlite", "ledger.sqlite-wal"] {
        std::fs::copy(gateway.data_dir().join(name), copy.path().join(name)).unwrap();
    }
    let db = rusqlite::Connection::open(copy.path().join("ledger.sqlite")).unwrap();
    let count = |sql| db.query_row(sql, [], |row| row.get::<_, u32>(0)).unwrap() as usize;
    assert_eq!(count("SELECT COUNT(*) FROM ledger WHERE outcome = 'answered'"), answered);
    assert_eq!(count("SELECT COUNT(*) FROM ledger"), answered);
    gateway.stop();
}
