//! `glassgate models verify`: whether one model may take another's place.

use serde_json::Value;

use crate::support::gateway::Setup;
use crate::support::root;

/// Every tenth question of the evaluation: ten of each family.
fn data(setup: &Setup) -> String {
    let all = std::fs::read_to_string(root().join("models/eval.jsonl")).unwrap();
    let some: String = all.lines().step_by(10).map(|line| format!("{line}\n")).collect();
    let path = setup.0.path().join("data.jsonl");
    std::fs::write(&path, some).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Whether it passed, what it found, what it said.
fn verify(setup: &Setup, models: [&str; 2], more: &[&str]) -> (bool, Value, String) {
    verify_on(setup, &data(setup), models, more)
}

fn verify_on(setup: &Setup, data: &str, models: [&str; 2], more: &[&str]) -> (bool, Value, String) {
    let args = [&["models", "verify"], &models[..], &["--data", data, "--json"], more].concat();
    let output = setup.run(&args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), serde_json::from_slice(&output.stdout).unwrap_or_default(), said)
}

fn number(of: &Value, name: &str) -> f64 {
    of[name].as_f64().unwrap_or_else(|| panic!("{name} in {of}"))
}

#[test]
fn a_quantised_model_is_near_its_original_and_smaller() {
    let setup = Setup::shipped();
    let quantised = ["--quantize-b", "q8_0", "--max-accuracy-drop", "3", "--max-kl", "0.01", "--min-agreement", "98"];
    let (passed, found, said) = verify(&setup, ["glimmer-2", "glimmer-2"], &quantised);
    assert!(passed, "{said}");
    let (a, b, distance) = (&found["a"], &found["b"], &found["distance"]);
    assert_eq!((&found["cases"], &a["weights"], &b["weights"]), (&80.into(), &"bf16".into(), &"q8_0".into()));
    assert!(number(a, "accuracy") >= 0.97, "{found}");
    assert!(number(distance, "kl") > 0.0, "eight bits are not sixteen: {found}");
    assert!((1.0..1.1).contains(&number(a, "perplexity")), "it knows the answers: {found}");
    assert!((number(a, "perplexity") / number(b, "perplexity") - 1.0).abs() < 0.01, "{found}");
    assert!(number(b, "memory_bytes") < number(a, "memory_bytes"));
    assert!(number(a, "tokens_per_second") > 1.0 && a["digest"] != b["digest"]);
}

#[test]
fn the_weaker_version_is_found_out() {
    let setup = Setup::shipped();
    let (passed, found, said) = verify(&setup, ["glimmer-2", "glimmer-1"], &["--max-accuracy-drop", "10"]);
    assert!(!passed && said.contains("the drop of accuracy is"), "{said}");
    assert!(number(&found["a"], "accuracy") - number(&found["b"], "accuracy") > 0.1, "{found}");
    assert!(number(&found["b"], "perplexity") > number(&found["a"], "perplexity"), "{found}");
    assert!(number(&found["distance"], "kl") > 0.01 && number(&found["distance"], "agreement") < 0.99, "{found}");
}

#[test]
fn a_model_is_itself_whatever_it_is_called() {
    let setup = Setup::shipped();
    let folder = root().join("models/glimmer-1").canonicalize().unwrap();
    let models = ["glimmer-1", folder.to_str().unwrap()];
    let (passed, found, said) = verify(&setup, models, &["--limit", "8", "--max-kl", "0", "--min-agreement", "100"]);
    assert!(passed, "{said}");
    assert_eq!(number(&found["distance"], "kl"), 0.0);
    assert_eq!((&found["cases"], &found["a"]["digest"]), (&8.into(), &found["b"]["digest"]));
    assert_eq!(found["a"]["perplexity"], found["b"]["perplexity"], "the same bits");
}

#[test]
fn what_cannot_be_compared_is_said() {
    let setup = Setup::shipped();
    let (passed, _, said) = verify(&setup, ["glimmer-2", "glimmer-9"], &[]);
    assert!(!passed && said.contains("`glimmer-9` is neither a model of routes.toml"), "{said}");
    // Another tokenizer: each is judged for itself, and no bound on their distance is kept.
    let other = root().join("runtime/tests/formats/bytes.gguf").canonicalize().unwrap();
    let models = ["glimmer-2", other.to_str().unwrap()];
    let short = setup.0.path().join("short.jsonl");
    std::fs::write(&short, "{\"prompt\": \"Once upon\", \"answer\": \" a time\"}\n").unwrap();
    let (passed, found, said) = verify_on(&setup, short.to_str().unwrap(), models, &["--max-kl", "100"]);
    assert!(!passed && found["distance"].is_null() && said.contains("the divergence is NaN"), "{found} {said}");
    let path = setup.0.path().join("bad.jsonl");
    std::fs::write(&path, "{\"prompt\": \"a\"}\n").unwrap();
    let output = setup.run(&["models", "verify", "glimmer-1", "glimmer-2", "--data", path.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("bad.jsonl: line 1: missing field `answer`"), "{said}");
}
