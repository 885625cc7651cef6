//! The tokenizers of well-known families beside transformers: `tests/tokenizers/make.py` writes what this compares with.

use crate::support::{Temporary, fixture, settings};
use glassgate_runtime::{LoadOptions, Runtime};
use serde_json::Value;

#[test]
fn a_tokenizer_of_any_family_gives_the_ids_of_transformers_and_they_give_the_text() {
    let path = [env!("CARGO_MANIFEST_DIR"), "/tests/tokenizers/cases.json"].concat();
    let whole: Value = serde_json::from_slice(&std::fs::read(path).expect("cases.json")).expect("valid JSON");
    let twin: Value = serde_json::from_slice(&std::fs::read(fixture("twin.json")).expect("twin.json")).expect("JSON");
    let weights = std::fs::read(fixture("twin.safetensors")).expect("twin.safetensors");
    let runtime = Runtime::start(settings()).expect("valid settings");
    for (name, case) in whole["cases"].as_object().expect("by family") {
        let folder = Temporary::new();
        folder.write("config.json", twin["config"].to_string());
        folder.write("tokenizer.json", case["tokenizer"].to_string());
        folder.write("model.safetensors", &weights);
        let model = runtime.load(name, &folder.0, &LoadOptions::default()).expect("a valid folder");
        let (texts, ids) = (whole["texts"].as_array().expect("texts"), case["ids"].as_array().expect("lists of ids"));
        assert_eq!(texts.len(), ids.len());
        for (text, ids) in texts.iter().zip(ids) {
            let text = text.as_str().expect("a text");
            let ids: Vec<u32> = serde_json::from_value(ids.clone()).expect("ids");
            assert_eq!(model.tokenize(text).as_ref(), Ok(&ids), "{name}: {text:?}");
            // The others put a space in front, compose what can be composed, or drop space behind a mark.
            if ["gpt-2", "smollm", "llama-3", "gemma"].contains(&name.as_str()) {
                let bytes = |&id: &u32| model.control_token(id).map_or(model.token_bytes(id), str::as_bytes).to_vec();
                let said: Vec<u8> = ids.iter().flat_map(bytes).collect();
                // (▁ is a space to those who write spaces so.)
                let text = if name == "gemma" { text.replace('\u{2581}', " ") } else { text.to_owned() };
                assert_eq!(String::from_utf8_lossy(&said), text, "{name}");
            }
        }
    }
}
