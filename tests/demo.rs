//! The demo does what it says: by the ledger and the metrics, not by its own account.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use rusqlite::Connection;
use serde_json::Value;

use crate::support::eventually;
use crate::support::gateway::{Setup, TestGateway};

/// Counts that one query gives.
fn count(db: &Connection, question: &str) -> u64 {
    db.query_row(question, [], |row| row.get::<_, i64>(0)).unwrap().unsigned_abs()
}

/// The first number that stands before some words.
fn said(summary: &str, before: &str) -> u64 {
    let end = summary.find(before).unwrap_or_else(|| panic!("{before:?} is missing in:\n{summary}"));
    summary[..end]
        .split_whitespace()
        .last()
        .and_then(|word| word.trim_matches(|c: char| !c.is_ascii_digit()).parse().ok())
        .unwrap()
}

#[test]
fn everything_that_the_demo_claims_happened_is_in_the_ledger_and_in_the_metrics() {
    let gateway = Setup::with_cache_and_shadow().start();
    let summary = gateway.cli(&["demo", "--minutes", "0.2", "--rps", "15"]);
    println!("{summary}");
    eventually("everything to be counted and shipped", || {
        let text = gateway.metrics();
        let zero = |family: &str| crate::support::gateway::metric(&text, family, &[]) == 0.0;
        (zero("gateway_in_flight_requests") && zero("gateway_ledger_queue_rows")).then_some(())
    });
    let db = Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let answered = count(&db, "SELECT COUNT(*) FROM ledger WHERE role <> 'shadow' AND outcome = 'answered'");
    assert_eq!(said(&summary, " answered ("), answered);
    let streamed = "SELECT COUNT(*) FROM ledger WHERE role <> 'shadow' AND outcome = 'answered' AND stream";
    assert_eq!(said(&summary, " streamed)"), count(&db, streamed));
    assert!((20..answered).contains(&count(&db, streamed)), "both ways of answering");
    let left = count(&db, "SELECT COUNT(*) FROM ledger WHERE outcome = 'aborted' AND role <> 'shadow'");
    assert_eq!(said(&summary, " left in the middle"), left);
    assert!(left >= 3, "{left} left");
    assert!(count(&db, "SELECT COUNT(*) FROM ledger WHERE cache = 'hit'") >= 3, "repeats are hits");
    assert!(count(&db, "SELECT COUNT(*) FROM ledger WHERE role = 'shadow'") >= 3, "some are mirrored");
    assert_eq!(count(&db, "SELECT COUNT(DISTINCT tenant) FROM ledger"), 3);

    // Every answer, and nothing else, was judged.
    assert_eq!(count(&db, "SELECT COUNT(*) FROM feedback WHERE name = 'correct'"), answered);
    assert_eq!(said(&summary, " answers judged"), answered);
    let joined = "SELECT COUNT(*) FROM feedback JOIN ledger USING (request_id, key_id, variant)
                  WHERE role <> 'shadow' AND outcome = 'answered'";
    assert_eq!(count(&db, joined), answered);
    assert_eq!(gateway.metric("gateway_feedback_total", &["name=\"correct\""]) as u64, answered);
    let correct = gateway.metric("gateway_feedback_total", &["value=\"true\""]) as u64;
    assert_eq!(count(&db, "SELECT COUNT(*) FROM feedback WHERE number = 1"), correct);
    assert!(correct > answered / 4, "{correct} of {answered} are correct");

    // Each kind of refusal was told as often as it was counted.
    let told: BTreeMap<&str, u64> = summary
        .lines()
        .filter_map(|line| line.strip_prefix("  refused ")?.split_once(": "))
        .map(|(code, count)| (code, count.parse().unwrap()))
        .collect();
    let kinds = ["insufficient_quota", "invalid_api_key", "invalid_json", "model_not_found", "rate_limit_exceeded"];
    assert_eq!(told.keys().copied().collect::<Vec<_>>(), kinds, "{summary}");
    for (code, told) in &told {
        let reason = format!("reason=\"{code}\"");
        let counted = gateway.metric("gateway_rejections_total", &[&reason]) as u64;
        // Strangers are also who asked with a key that the gateway had not seen yet.
        assert!(counted == *told || (*code == "invalid_api_key" && counted > *told), "{code}: {counted}, told {told}");
    }

    let lines: Value = serde_json::from_str(&gateway.cli(&["feedback", "--json"])).unwrap();
    let judged: u64 = lines.as_array().unwrap().iter().map(|line| line["judged"].as_u64().unwrap()).sum();
    assert_eq!(judged, answered);

    // The keys of the last time will do.
    let keys = || gateway.cli(&["keys", "list"]).lines().count();
    let before = keys();
    gateway.cli(&["demo", "--minutes", "0.02", "--rps", "20", "--seed", "2"]);
    assert_eq!(keys(), before);
}

#[test]
fn one_key_is_enough_and_ctrl_c_ends_the_demo_with_its_summary() {
    let gateway = TestGateway::start();
    let child = Command::new(env!("CARGO_BIN_EXE_glassgate"))
        .args(["demo", "--minutes", "60", "--rps", "30", "--url", &format!("http://{}/v1", gateway.data), "--key"])
        .arg(gateway.key.trim())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("some answers", || (gateway.metric("gateway_feedback_total", &[]) >= 10.0).then_some(()));
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let summary = String::from_utf8(output.stdout).unwrap();
    assert!(said(&summary, " answers judged") >= 10, "{summary}");
    assert_eq!(gateway.cli(&["keys", "list"]).lines().count(), 2, "no keys are made where one was given");
}

#[test]
fn without_a_gateway_the_demo_says_how_to_start_one() {
    let setup = Setup::shipped();
    for args in [["demo", "--minutes=1"].as_slice(), &["demo", "--url=http://127.0.0.1:1", "--key=gg-x"]] {
        let output = setup.run(args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains("make run"), "{said}");
    }
}
