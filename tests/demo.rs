//! The demo does what it says: by the ledger and the metrics, not by its own account.

use std::collections::BTreeMap;
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use serde_json::Value;

use crate::support::eventually;
use crate::support::gateway::{Setup, TestGateway};
use crate::support::upstream::{Script, Upstream, words};

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
    let db = Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let (answered, left) = (said(&summary, " answered ("), said(&summary, " left in the middle"));
    // Who left may have been told everything by then.
    let served = "SELECT COUNT(*) FROM ledger WHERE role <> 'shadow' AND outcome IN ('answered', 'aborted')";
    eventually("everything to be counted and shipped", || {
        let is_idle = gateway.metric("gateway_in_flight_requests", &[]) == 0.0;
        (is_idle && count(&db, served) >= answered + left).then_some(())
    });
    assert_eq!(count(&db, served), answered + left);
    assert!(count(&db, &format!("{served} AND outcome = 'aborted'")) <= left);
    let streamed = said(&summary, " streamed)");
    assert_eq!(count(&db, &format!("{served} AND stream")), streamed + left);
    assert!((20..answered).contains(&streamed), "both ways of answering");
    assert!(left >= 3, "{left} left");
    assert_eq!((said(&summary, " failed"), said(&summary, " unfinished")), (0, 0));
    assert!(count(&db, "SELECT COUNT(*) FROM ledger WHERE cache = 'hit'") >= 3, "repeats are hits");
    assert!(count(&db, "SELECT COUNT(*) FROM ledger WHERE role = 'shadow'") >= 3, "some are mirrored");
    assert_eq!(count(&db, "SELECT COUNT(DISTINCT tenant) FROM ledger"), 3);

    // Every answer, and nothing else, was judged.
    assert_eq!(count(&db, "SELECT COUNT(*) FROM feedback WHERE name = 'correct'"), answered);
    assert_eq!(said(&summary, " answers judged"), answered);
    let joined = "SELECT COUNT(*) FROM feedback JOIN ledger USING (request_id, key_id)
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
    let kinds = ["insufficient_quota", "invalid_json", "missing_api_key", "model_not_found", "rate_limit_exceeded"];
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

/// A demo that would go on for an hour, with one key. It does not outlive its test.
struct Demo(Child);

impl Demo {
    fn start(gateway: &TestGateway) -> Demo {
        let mut command = Command::new(env!("CARGO_BIN_EXE_glassgate"));
        command.args(["demo", "--minutes", "60", "--rps", "30", "--url", &format!("http://{}/v1", gateway.data)]);
        command.args(["--key", gateway.key.trim()]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let demo = Demo(command.spawn().unwrap());
        eventually("some answers", || (gateway.metric("gateway_feedback_total", &[]) >= 10.0).then_some(()));
        demo
    }

    fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.0.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Its status, and what it wrote.
    fn ends(mut self) -> (ExitStatus, String, String) {
        let status = eventually("the demo to end", || self.0.try_wait().unwrap());
        let read = |from: &mut dyn Read| {
            let mut text = String::new();
            from.read_to_string(&mut text).unwrap();
            text
        };
        let out = read(self.0.stdout.as_mut().unwrap());
        (status, out, read(self.0.stderr.as_mut().unwrap()))
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn one_key_is_enough_and_ctrl_c_ends_the_demo_with_its_summary() {
    for signal in ["-INT", "-TERM"] {
        let gateway = TestGateway::start();
        let demo = Demo::start(&gateway);
        demo.signal(signal);
        let (status, summary, complaints) = demo.ends();
        assert!(status.success(), "{complaints}");
        assert!(said(&summary, " answers judged") >= 10, "{summary}");
        assert_eq!(said(&summary, " unfinished"), 0, "{summary}");
        assert_eq!(gateway.cli(&["keys", "list"]).lines().count(), 2, "no keys are made where one was given");
    }
}

#[test]
fn a_second_ctrl_c_waits_for_nobody() {
    let upstream = Upstream::start();
    let setup = Setup::upstream(&upstream, "");
    upstream.always(Script::Gated(words("too late")));
    setup.replace("routes.toml", "glimmer-1 = 90, glimmer-2 = 10", "glimmer-1 = 90, glimmer-2 = 10, remote-model = 20");
    let gateway = setup.start();
    let demo = Demo::start(&gateway);
    eventually("somebody to wait", || (upstream.calls() > 0).then_some(()));
    demo.signal("-INT");
    demo.signal("-TERM");
    let began = Instant::now();
    let (_, summary, _) = demo.ends();
    assert!(said(&summary, " unfinished") > 0, "{summary}");
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
}

#[test]
fn a_demo_whose_gateway_is_gone_says_so_and_ends() {
    let mut gateway = TestGateway::start();
    let demo = Demo::start(&gateway);
    gateway.stop();
    let (status, _, complaints) = demo.ends();
    assert!(!status.success() && complaints.contains("the gateway is gone"), "{complaints}");
    assert!(complaints.contains("Connection refused"), "{complaints}");
}

#[test]
fn keys_are_made_for_the_gateway_of_the_data_folder_alone_and_replaced_ones_are_revoked() {
    let (gateway, other) = (TestGateway::start(), TestGateway::start());
    let output = gateway.run(&["demo", "--minutes=0.001", &format!("--url=http://{}", other.data)]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("--key"), "{said}");
    assert_eq!(gateway.cli(&["keys", "list"]).lines().count(), 2, "no key was made");
    let play = || gateway.cli(&["demo", "--minutes=0.001", &format!("--url=http://{}/v1", gateway.data)]);
    play();
    // As if another version had made one with other limits.
    gateway.cli(&["keys", "edit", "demo-lab", "--rpm", "7"]);
    play();
    let list = gateway.cli(&["keys", "list"]);
    let line = |name: &str| list.lines().find(|line| line.split_whitespace().nth(1) == Some(name)).unwrap();
    assert!(line("demo-lab").contains("revoked") && line("demo-lab-2").contains("active"), "{list}");
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
