//! The encoder against what sentence-transformers gives for the same folders (made by `tests/golden/bert.py`), and the
//! promise that a text's bits do not depend on its neighbours.

use super::{Bert, spec::BertSpec};
use crate::{
    kernels::{cpu::use_threads, texts::TextBatch},
    text::encoder::TextEncoder,
    weights::{folder, safetensors::Checkpoint},
};
use serde_json::Value;
use std::{path::PathBuf, sync::Arc};

const FOLDERS: [&str; 3] = ["mean", "cls", "roberta"];

fn golden(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "golden", "bert", name].iter().collect()
}

fn load(name: &str) -> (Bert, TextEncoder) {
    let folder = golden(name);
    let spec = BertSpec::read(&folder).expect("a supported model");
    let tokenizer = std::fs::read_to_string(folder.join("tokenizer.json")).expect("a tokenizer");
    let encoder = TextEncoder::new(&tokenizer, spec.vocab, spec.head.lower).expect("a tokenizer");
    let checkpoint = Checkpoint::open(&folder).expect("weights");
    let planned = Bert::memory(&spec, &checkpoint, 1).expect("a plan");
    let bert = Bert::load(spec, &checkpoint).expect("an encoder");
    assert_eq!(planned.weights, bert.bytes() as u64, "known before it loads");
    (bert, encoder)
}

fn cases(name: &str) -> Vec<(String, Vec<f32>)> {
    let cases = folder::require_json(&golden(name).join("embeddings.json")).expect("cases");
    let case = |case: &Value| {
        let vector = case["embedding"].as_array()?.iter().map(|x| Some(x.as_f64()? as f32)).collect::<Option<_>>()?;
        Some((case["text"].as_str()?.to_owned(), vector))
    };
    cases.as_array().and_then(|cases| cases.iter().map(case).collect()).expect("texts with their vectors")
}

fn embed(bert: &Bert, texts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let batch = Arc::new(TextBatch::new(texts.iter().map(Vec::as_slice)));
    let mut h = bert.begin(&batch).expect("a beginning");
    for number in 0..bert.spec().layers {
        h = bert.layer(number, &h, &batch).expect("a layer");
    }
    bert.finish(&h, &batch).expect("vectors")
}

#[test]
fn embeddings_are_those_of_sentence_transformers() {
    for name in FOLDERS {
        let (bert, encoder) = load(name);
        let cases = cases(name);
        let texts = cases.iter().map(|(text, _)| {
            let mut ids = encoder.encode(text).expect("ids");
            encoder.cut(&mut ids, bert.spec().head.limit);
            ids
        });
        let texts: Vec<Vec<u32>> = texts.collect();
        assert!(texts.iter().any(|ids| ids.len() == bert.spec().head.limit), "one of them is too long");
        for ((text, want), got) in cases.iter().zip(embed(&bert, &texts)) {
            assert_eq!(want.len(), got.len());
            let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
            let error = want.iter().zip(&got).fold(0f32, |most, (x, y)| most.max((x - y).abs()));
            assert!(error <= 2e-5 * largest.max(1.0), "{name}: {text:?} is off by {error}");
        }
    }
}

#[test]
fn a_text_has_the_same_bits_alone_and_among_others_on_any_number_of_threads() {
    for name in FOLDERS {
        let (bert, _) = load(name);
        let texts: Vec<Vec<u32>> =
            (1..40).map(|n| (0..1 + n * 7 % 24).map(|i| ((n * 13 + i * 5) % 90) as u32).collect()).collect();
        use_threads(1).expect("one thread");
        let alone: Vec<Vec<f32>> = texts.iter().flat_map(|text| embed(&bert, std::slice::from_ref(text))).collect();
        for threads in [1, 2, 5] {
            use_threads(threads).expect("threads");
            assert_eq!(embed(&bert, &texts), alone, "{name}, {threads} threads");
        }
    }
}
