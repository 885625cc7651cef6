//! One GGUF file is as good as a folder: the same answers as its Hugging Face twin, the same ids as the tokenizers that
//! it was made from. `tests/formats/make.py` writes what this compares with.

use crate::{
    gguf_file::{File, i32_list, text, text_list},
    support::{Temporary, ask, endless, fixture, greedy, messages, settings},
};
use glassgate_runtime::{LoadOptions, Model, Runtime};
use serde_json::{Value, json};

fn texts() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("texts.json")).expect("texts.json")).expect("valid JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().expect("texts").iter().map(|text| text.as_str().expect("a text").to_owned()).collect()
}

fn load(runtime: &Runtime, name: &str) -> Model {
    runtime.load(name, &fixture(name), &LoadOptions::default()).expect("a valid file")
}

/// The same model as `bytes.gguf`, as transformers would store it.
fn twin(runtime: &Runtime) -> Model {
    let twin: Value = serde_json::from_slice(&std::fs::read(fixture("twin.json")).expect("twin.json")).expect("JSON");
    let folder = Temporary::new();
    for name in ["config", "tokenizer", "tokenizer_config"] {
        folder.write(&format!("{name}.json"), twin[name].to_string());
    }
    folder.write("model.safetensors", std::fs::read(fixture("twin.safetensors")).expect("twin.safetensors"));
    runtime.load("twin", &folder.0, &LoadOptions::default()).expect("a valid folder")
}

#[tokio::test]
async fn a_gguf_file_answers_as_its_safetensors_twin_does() {
    let runtime = Runtime::start(settings()).expect("valid settings");
    let (file, twin) = (load(&runtime, "bytes.gguf"), twin(&runtime));
    assert_eq!(file.context(), twin.context());
    let talk = messages(&json!([{"role": "user", "content": "The hotel is 12 times <|end|> worse <tool>."}]));
    let prompt = file.prompt(&talk).expect("a prompt");
    assert_eq!(Ok(&prompt), twin.prompt(&talk).as_ref());
    for prompt in [prompt.as_str(), "x = 1", "한국어", "The coffee is really superb! My sister said the same."] {
        let ids = file.tokenize(prompt).expect("ids");
        assert_eq!(Ok(&ids), twin.tokenize(prompt).as_ref());
        // Rows of Q and K in the wrong order, or rotated in the wrong pairs, would give other tokens at once.
        let (a, b) = (ask(&file, greedy(ids.clone(), 40)).await, ask(&twin, greedy(ids, 40)).await);
        assert_eq!((a.text, a.tokens, a.ending), (b.text, b.tokens, b.ending), "{prompt:?}");
    }
}

#[test]
fn every_pre_tokenizer_gives_the_ids_of_transformers() {
    let texts = texts();
    let runtime = Runtime::start(settings()).expect("valid settings");
    for (pre, expected) in texts["bytes"].as_object().expect("by pre-tokenizer") {
        let mut file = File::tiny(&strings(&texts["tokens"]));
        file.set("tokenizer.ggml.pre", text(pre));
        file.set("tokenizer.ggml.merges", text_list(&strings(&texts["merges"])));
        let mut kinds = vec![1; file.vocab];
        kinds[file.vocab - 3..].copy_from_slice(&[3, 3, 4]);
        file.set("tokenizer.ggml.token_type", i32_list(&kinds));
        let folder = Temporary::new();
        folder.write("model.gguf", file.bytes());
        let model = runtime.load(pre, &folder.0.join("model.gguf"), &LoadOptions::default()).expect("a valid file");
        assert_ids(&model, &texts["texts"], expected, pre);
    }
}

#[test]
fn a_scored_vocabulary_gives_the_ids_of_sentencepiece() {
    let texts = texts();
    let runtime = Runtime::start(settings()).expect("valid settings");
    let model = load(&runtime, "scored.gguf");
    assert_ids(&model, &texts["texts"], &texts["scored"], "scored");
}

#[track_caller]
fn assert_ids(model: &Model, texts: &Value, expected: &Value, which: &str) {
    let texts = strings(texts);
    let expected = expected.as_array().expect("lists of ids");
    assert_eq!(texts.len(), expected.len());
    for (text, expected) in texts.iter().zip(expected) {
        assert_eq!(model.tokenize(text), Ok(ids(expected)), "{which}: {text:?}");
    }
}

/// Bytes without a token of their own come back as the characters that they are.
#[tokio::test]
async fn text_of_a_scored_vocabulary_is_text() {
    let runtime = Runtime::start(settings()).expect("valid settings");
    let model = load(&runtime, "scored.gguf");
    let prompt = model.tokenize("The coffee").expect("ids");
    let answer = ask(&model, endless(prompt, 60)).await;
    assert!(!answer.text.contains(['\u{2581}']) && !answer.text.contains("<0x"), "{:?}", answer.text);
}
