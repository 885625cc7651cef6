//! Vectors for texts: the same bits whatever happens around them, and nobody disturbed.

use crate::support::{ask, chat, collect, endless, folder, greedy, settings};
use glassgate_runtime::{
    Embedder, Failure, LoadError, LoadOptions, Refusal, Runtime, Settings, check_text, is_embedder,
};
use std::path::{Path, PathBuf};

fn tiny(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "golden", "bert", name].iter().collect()
}

fn serve(settings: Settings) -> (Runtime, Embedder) {
    let runtime = Runtime::start(settings).expect("valid settings");
    let embedder = runtime.load_embedder("tiny", &tiny("mean")).expect("the tiny encoder");
    (runtime, embedder)
}

fn texts(embedder: &Embedder) -> Vec<Vec<u32>> {
    let words = ["hello world", "", "the quick brown fox", "word word word word word word", "🙂", "안녕"];
    (0..40)
        .map(|n| {
            let mut ids = embedder.tokenize(&words[n % 6].repeat(1 + n / 6)).expect("ids");
            embedder.truncate(&mut ids);
            ids
        })
        .collect()
}

async fn alone(settings: Settings) -> Vec<Vec<f32>> {
    let (_runtime, embedder) = serve(settings);
    let mut vectors = Vec::new();
    for text in texts(&embedder) {
        let embedded = embedder.embed(vec![text], 0, None).expect("accepted").await;
        vectors.extend(embedded.vectors.expect("vectors"));
    }
    vectors
}

#[tokio::test]
async fn vectors_are_identical_alone_together_among_strangers_and_on_more_threads() {
    let want = alone(settings()).await;
    for threads in [1, 2] {
        let (runtime, embedder) = serve(Settings { threads, ..settings() });
        let writer = runtime.load("writer", &folder("glimmer-1"), &LoadOptions::default()).expect("the bundled model");
        let want_text = ask(&writer, greedy(chat(&writer, "Count down from 20 to 9"), 60)).await.text;
        let strangers = writer.generate(endless(chat(&writer, "go"), 400)).expect("accepted");
        let text = writer.generate(greedy(chat(&writer, "Count down from 20 to 9"), 60)).expect("accepted");
        let texts = texts(&embedder);
        let single: Vec<_> =
            texts.iter().map(|text| embedder.embed(vec![text.clone()], 0, None).expect("accepted")).collect();
        let whole = embedder.embed(texts, 0, None).expect("accepted").await;
        assert_eq!(whole.vectors.as_ref(), Ok(&want));
        assert!(whole.timeline.batches >= 1 && whole.timeline.texts_max > 1 && !whole.timeline.compute.is_zero());
        for (embedding, want) in single.into_iter().zip(&want) {
            assert_eq!(embedding.await.vectors, Ok(vec![want.clone()]));
        }
        assert_eq!(collect(text).await.text, want_text, "and who writes is not disturbed");
        drop(strangers);
    }
}

#[tokio::test]
async fn what_can_never_be_answered_is_refused_at_the_door() {
    let (runtime, embedder) = serve(settings());
    assert_eq!((embedder.dimensions(), embedder.context()), (32, 24));
    let refusal = |texts: Vec<Vec<u32>>| embedder.embed(texts, 0, None).err();
    assert_eq!(refusal(Vec::new()), Some(Refusal::EmptyPrompt));
    assert_eq!(refusal(vec![vec![1], Vec::new()]), Some(Refusal::EmptyPrompt));
    assert_eq!(refusal(vec![vec![1, 91]]), Some(Refusal::UnknownToken { id: 91, vocab: 91 }));
    assert_eq!(refusal(vec![vec![1; 25]]), Some(Refusal::OverContext { prompt: 25, max_tokens: 0, context: 24 }));
    assert!(embedder.embed(vec![vec![1; 24]], 0, None).expect("accepted").await.vectors.is_ok());
    let report = runtime.report().models.remove(0);
    assert_eq!((report.name.as_str(), report.prompt_tokens, report.running, report.waiting), ("tiny", 24, 0, 0));
    assert!(report.memory.weights > 50_000 && report.digest == embedder.digest());
}

#[tokio::test]
async fn the_queue_is_bounded_and_whoever_leaves_gives_up_a_place() {
    let (runtime, embedder) = serve(Settings { waiting_max: 4, ..settings() });
    let mut refused = 0;
    let mut under_way = Vec::new();
    for _ in 0..200 {
        match embedder.embed(vec![vec![1; 24]; 500], 0, None) {
            Ok(embedding) => under_way.push(embedding),
            Err(Refusal::Overloaded { .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(refused > 0, "two hundred found a place at once");
    drop(under_way);
    while runtime.report().models[0].running + runtime.report().models[0].waiting > 0 {
        tokio::task::yield_now().await;
    }
    assert!(embedder.embed(vec![vec![1]], 0, None).expect("accepted").await.vectors.is_ok());
    assert_eq!(runtime.report().models[0].failures, 0);
}

/// What is being computed counts too.
#[tokio::test]
async fn what_is_held_is_bounded_and_no_tenant_holds_all_of_it() {
    let (_runtime, embedder) = serve(Settings { waiting_max: 10_000, ..settings() });
    // 56 numbers for each text of 24 tokens.
    let large = || vec![vec![1; 24]; 30_000];
    let mut held = Vec::new();
    let refusal = loop {
        match embedder.embed(large(), 1, None) {
            Ok(embedding) => held.push(embedding),
            Err(refusal) => break refusal,
        }
        assert!(held.len() < 30, "there is no bound");
    };
    assert!(matches!(refusal, Refusal::Overloaded { .. }), "{refusal}");
    assert!(embedder.embed(vec![vec![1]], 2, None).expect("room for another tenant").await.vectors.is_ok());
}

#[tokio::test]
async fn a_model_that_is_dropped_answers_first_and_a_runtime_that_stops_says_so() {
    let (runtime, embedder) = serve(settings());
    let under_way = embedder.embed(vec![vec![1; 24]; 600], 0, None).expect("accepted");
    drop(embedder);
    assert_eq!(under_way.await.vectors.expect("vectors").len(), 600);
    while !runtime.report().models.is_empty() {
        tokio::task::yield_now().await;
    }
    let (runtime, embedder) = serve(settings());
    let cut = embedder.embed(vec![vec![1; 24]; 2000], 0, None).expect("accepted");
    drop(runtime);
    assert_eq!(cut.await.vectors, Err(Failure::EngineStopped));
    assert_eq!(embedder.embed(vec![vec![1]], 0, None).err(), Some(Refusal::Draining));
}

#[test]
fn a_folder_says_which_kind_of_model_it_holds() {
    assert!(is_embedder(&tiny("mean")).expect("a folder") && is_embedder(&tiny("roberta")).expect("a folder"));
    assert!(!is_embedder(&folder("glimmer-1")).expect("a folder"));
    assert!(!is_embedder(&folder("nothing-here")).expect("nothing"));
}

/// A copy of the tiny encoder's folder with one file changed.
fn changed(file: &str, from: &str, to: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a folder");
    for name in ["config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json", "tokenizer_config.json"] {
        let mut text = std::fs::read_to_string(tiny("mean").join(name)).expect("a file");
        if name == file {
            assert!(text.contains(from), "{file} has no {from}");
            text = text.replace(from, to);
        }
        let path = copy.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        std::fs::write(path, text).expect("written");
    }
    std::fs::copy(tiny("mean").join("model.safetensors"), copy.path().join("model.safetensors")).expect("copied");
    copy
}

/// What loading says of a folder that is changed so.
fn complaint(file: &str, from: &str, to: &str) -> String {
    let copy = changed(file, from, to);
    let runtime = Runtime::start(settings()).expect("valid settings");
    match runtime.load_embedder("odd", copy.path()) {
        Ok(_) => "nothing".to_owned(),
        Err(LoadError::File { file: blamed, why }) => {
            assert_eq!(blamed, copy.path().join(file), "{why}");
            why
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn the_text_side_of_an_encoder_is_checked_as_its_load_would() {
    for name in ["mean", "cls", "roberta"] {
        check_text(&tiny(name)).expect("a valid folder");
    }
    let broken = changed("tokenizer.json", "\"version\"", "\"verse\"");
    let why = check_text(broken.path()).expect_err("no tokenizer").to_string();
    assert!(why.contains("tokenizer.json") && why.contains("not a valid tokenizer"), "{why}");
}

#[test]
fn whatever_shapes_a_vector_is_in_the_digest() {
    let runtime = Runtime::start(settings()).expect("valid settings");
    let digest = |folder: &Path| runtime.load_embedder("tiny", folder).expect("valid").digest().to_owned();
    let as_it_is = digest(changed("config.json", "{", "{").path());
    let other_limit = changed("tokenizer_config.json", "{", "{ ");
    assert_ne!(digest(other_limit.path()), as_it_is, "model_max_length cuts texts");
}

#[test]
fn what_an_encoder_asks_for_and_we_cannot_do_is_refused_by_key() {
    for (file, from, to, said) in [
        ("config.json", "\"is_decoder\": false", "\"is_decoder\": true", "is_decoder"),
        ("config.json", "\"hidden_act\": \"gelu\"", "\"hidden_act\": \"relu\"", "hidden_act"),
        ("config.json", "\"use_cache\": false", "\"position_embedding_type\": \"relative_key\"", "relative_key"),
        ("config.json", "\"num_attention_heads\": 2", "\"num_attention_heads\": 4", "multiple of 16"),
        ("config.json", "\"vocab_size\": 91", "\"vocab_size\": 0", "vocab_size"),
        ("config.json", "\"model_type\": \"bert\"", "\"model_type\": \"electra\"", "electra"),
        ("modules.json", "normalize.Normalize", "dense.Dense", "Dense"),
        ("modules.json", "\"type\"", "\"kind\"", "list of modules"),
        ("modules.json", "\"1_Pooling\"", "\"../1_Pooling\"", "outside its folder"),
        ("modules.json", "\"1_Pooling\"", "\"/1_Pooling\"", "outside its folder"),
        ("1_Pooling/config.json", "\"mean\"", "\"max\"", "max"),
        ("tokenizer.json", "\"version\"", "\"verse\"", "not a valid tokenizer"),
    ] {
        let why = complaint(file, from, to);
        assert!(why.contains(said), "{file}, {to}: {why}");
    }
    assert_eq!(complaint("config.json", "\"use_cache\": false", "\"use_cache\": true"), "nothing");
}
