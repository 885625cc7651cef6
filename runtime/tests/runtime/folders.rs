//! A folder is never trusted: whatever is wrong with it is said clearly, names the file, and kills nobody.

use crate::support::{Temporary, ask, chat, folder, greedy, letters, llama_layer, settings};
use glassgate_runtime::{LoadError, LoadOptions, Message, Model, Runtime};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;

const WEIGHTS: &str = "model.safetensors";

/// Name, type, shape, bytes.
type Stored = (String, &'static str, Vec<usize>, Vec<u8>);

/// A tiny Llama with random weights and a tokenizer of one token a byte.
struct Tiny {
    config: Value,
    generation: Value,
    tokenizer: Value,
    tokenizer_config: Value,
    tensors: Vec<Stored>,
}

const VOCAB: usize = 260;

impl Tiny {
    fn new(kind: &'static str, tied: bool) -> Tiny {
        let (hidden, inner, kv) = (32, 48, 16);
        let mut tensors = Vec::new();
        let mut state = 1u32;
        let mut add = |name: &str, shape: &[usize]| {
            let count: usize = shape.iter().product();
            let bytes = (0..count).flat_map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let x = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
                match kind {
                    "BF16" => half::bf16::from_f32(x).to_le_bytes().to_vec(),
                    "F16" => half::f16::from_f32(x).to_le_bytes().to_vec(),
                    _ => x.to_le_bytes().to_vec(),
                }
            });
            tensors.push((name.to_owned(), kind, shape.to_vec(), bytes.collect()));
        };
        add("model.embed_tokens.weight", &[VOCAB, hidden]);
        for i in 0..2 {
            for (name, shape) in llama_layer(hidden, kv, inner) {
                add(&format!("model.layers.{i}.{name}.weight"), &shape);
            }
        }
        add("model.norm.weight", &[hidden]);
        if !tied {
            add("lm_head.weight", &[VOCAB, hidden]);
        }
        let vocab: serde_json::Map<String, Value> =
            letters().zip(0..).map(|(letter, id): (char, u32)| (letter.to_string(), id.into())).collect();
        let special = |id: usize, content: &str| json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
        Tiny {
            config: json!({
                "model_type": "llama", "vocab_size": VOCAB, "hidden_size": hidden, "intermediate_size": inner,
                "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
                "max_position_embeddings": 256, "tie_word_embeddings": tied, "eos_token_id": 257,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            }),
            generation: json!({"do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [256, 257]}),
            tokenizer: json!({
                "version": "1.0", "truncation": null, "padding": null,
                "added_tokens": [special(256, "<|start|>"), special(257, "<|end|>")],
                "normalizer": null,
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
                "post_processor": null,
                "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
                "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                    "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                    "vocab": vocab, "merges": []},
            }),
            tokenizer_config: json!({
                "eos_token": {"content": "<|end|>"},
                "chat_template": "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}<|start|>",
            }),
            tensors,
        }
    }

    /// A safetensors file of these tensors.
    fn weights(&self) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut data = Vec::new();
        for (name, dtype, shape, bytes) in &self.tensors {
            let from = data.len();
            data.extend(bytes);
            header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [from, data.len()]}));
        }
        with_header(&Value::from(header).to_string(), &data)
    }

    fn write(&self) -> Temporary {
        let folder = Temporary::new();
        folder.write("config.json", self.config.to_string());
        folder.write("generation_config.json", self.generation.to_string());
        folder.write("tokenizer.json", self.tokenizer.to_string());
        folder.write("tokenizer_config.json", self.tokenizer_config.to_string());
        folder.write(WEIGHTS, self.weights());
        folder
    }
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn runtime() -> Runtime {
    Runtime::start(settings()).expect("valid settings")
}

fn load(runtime: &Runtime, folder: &Path) -> Result<Model, LoadError> {
    runtime.load("tiny", folder, &LoadOptions::default())
}

/// The load fails, blames this file, and says this.
#[track_caller]
fn assert_blamed(folder: &Path, file: &str, says: &str) {
    let error = load(&runtime(), folder).err().unwrap_or_else(|| panic!("loaded in spite of {file}: {says}"));
    let text = error.to_string();
    let LoadError::File { file: blamed, .. } = error else { panic!("{text}") };
    assert_eq!(blamed, folder.join(file), "{text}");
    assert!(text.contains(says), "{text:?} does not say {says:?}");
}

#[tokio::test]
async fn every_number_type_and_both_heads_load_and_answer() {
    for (kind, tied) in [("F32", true), ("F16", false), ("BF16", true), ("BF16", false)] {
        let folder = Tiny::new(kind, tied).write();
        let runtime = runtime();
        let model = load(&runtime, &folder.0).expect("a valid folder");
        let defaults = model.defaults();
        assert_eq!(
            (defaults.temperature, defaults.top_p, defaults.top_k, defaults.repetition_penalty),
            (0.7, 0.8, 20, 1.1)
        );
        let prompt = chat(&model, "a\u{e9}<|end|>");
        // Between the template's own <|start|> and its <|end|><|start|> everything is one token a byte.
        let said = "user\na\u{e9}<|end|>".len();
        assert_eq!(prompt.len(), 1 + said + 2, "the caller's <|end|> is plain text");
        assert!(prompt[1..=said].iter().all(|&id| id < 256));
        let answer = ask(&model, greedy(prompt, 20)).await;
        assert!(answer.ending.is_ok() && answer.timeline.output_tokens > 0);
    }
}

#[test]
fn shards_load_like_one_file() {
    let tiny = Tiny::new("F32", true);
    let folder = tiny.write();
    let runtime = runtime();
    let whole = load(&runtime, &folder.0).expect("a valid folder");
    std::fs::remove_file(folder.0.join(WEIGHTS)).expect("removed");
    let (a, b) = tiny.tensors.split_at(7);
    let mut map = serde_json::Map::new();
    for (file, tensors) in [("a.safetensors", a), ("b.safetensors", b)] {
        let part = Tiny { tensors: tensors.to_vec(), ..Tiny::new("F32", true) };
        folder.write(file, part.weights());
        map.extend(tensors.iter().map(|tensor| (tensor.0.clone(), file.into())));
    }
    let index = |map: &Value| json!({"weight_map": map}).to_string();
    folder.write("model.safetensors.index.json", index(&map.clone().into()));
    let sharded = load(&runtime, &folder.0).expect("valid shards");
    assert_ne!(whole.digest(), sharded.digest());

    let name = "model.safetensors.index.json";
    map.insert("x".to_owned(), "../a.safetensors".into());
    folder.write(name, index(&map.into()));
    assert_blamed(&folder.0, name, "in the same folder");
    folder.write(name, "{}");
    assert_blamed(&folder.0, name, "weight_map");
    folder.write(name, index(&json!({"x": "a.safetensors"})));
    assert_blamed(&folder.0, name, "is missing");
    folder.write(name, index(&json!({"x": "c.safetensors"})));
    assert_blamed(&folder.0, "c.safetensors", "cannot be opened");
}

#[test]
fn missing_files_are_named() {
    for (name, says) in [("config.json", "is missing"), ("tokenizer.json", "is missing"), (WEIGHTS, "cannot be opened")]
    {
        let folder = Tiny::new("F32", true).write();
        std::fs::remove_file(folder.0.join(name)).expect("removed");
        assert_blamed(&folder.0, name, says);
    }
    let folder = Tiny::new("F32", true).write();
    for name in ["generation_config.json", "tokenizer_config.json"] {
        std::fs::remove_file(folder.0.join(name)).expect("removed");
    }
    let model = load(&runtime(), &folder.0).expect("these two may be missing");
    assert_eq!(model.defaults().temperature, 1.0);
    let hello = Message { role: "user".to_owned(), content: "hi".to_owned() };
    assert!(model.prompt(&[hello]).is_err());
}

#[test]
fn weights_that_lie_are_found_out() {
    let tiny = Tiny::new("BF16", true);
    let whole = tiny.weights();
    let folder = tiny.write();
    let check = |bytes: &[u8], says: &str| {
        folder.write(WEIGHTS, bytes);
        assert_blamed(&folder.0, WEIGHTS, says);
    };
    for len in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        check(&whole[..len], "truncated");
    }
    check(&[whole.as_slice(), b"x"].concat(), "data bytes");
    check(&[&u64::MAX.to_le_bytes(), &whole[8..]].concat(), "claims a header of");
    check(&with_header("not json", &[]), "header is not valid");
    check(&with_header("[]", &[]), "header is not valid");
    check(&with_header("{}", &[]), "`model.layers.0.self_attn.q_proj.weight` is missing");
    let one = |entry: &str| with_header(&format!("{{\"x\":{entry}}}"), &[0; 8]);
    check(&one(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#), "does not have 8 bytes");
    check(
        &one(r#"{"dtype":"F32","shape":[18446744073709551615,18446744073709551615],"data_offsets":[0,8]}"#),
        "does not have",
    );
    check(&one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#), "spans 8..0");
    check(&one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}"#), "spans");
    check(&one(r#"{"dtype":"Q9","shape":[2],"data_offsets":[0,8]}"#), "unknown type Q9");
    check(&one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}"#), "header is not valid");
    let twice = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    check(&with_header(&format!(r#"{{"x":{twice},"x":{twice}}}"#), &[0; 4]), "comes twice");
    let both = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    check(&with_header(&format!(r#"{{"x":{both},"y":{both}}}"#), &[0; 8]), "overlap");

    for (at, tensor) in tiny.tensors.iter().enumerate() {
        let change = |change: &dyn Fn(&mut Stored)| {
            let mut other = Tiny::new("BF16", true);
            change(&mut other.tensors[at]);
            other.weights()
        };
        check(&change(&|tensor| tensor.0 = "other".to_owned()), &format!("tensor `{}` is missing", tensor.0));
        check(&change(&|tensor| tensor.1 = "I16"), "has type I16, expected F32, F16 or BF16");
        check(&change(&|tensor| tensor.2.push(1)), "config.json asks for");
        check(&change(&|tensor| tensor.3[0..2].copy_from_slice(&half::bf16::NAN.to_le_bytes())), "not finite");
    }
}

#[test]
fn configurations_that_lie_are_found_out() {
    let cases = [
        ("model_type", json!("gpt2"), "gpt2"),
        ("model_type", json!(null), "`model_type` is missing"),
        ("hidden_size", json!(0), "hidden_size"),
        ("hidden_size", json!(33), "multiple of 16"),
        ("hidden_size", json!(1e99), "hidden_size"),
        ("hidden_size", json!(-32), "hidden_size"),
        ("hidden_size", json!("32"), "hidden_size"),
        ("num_attention_heads", json!(3), "head_dim"),
        ("num_attention_heads", json!(10_000_000), "num_attention_heads"),
        // More heads than width: a head of no dimensions.
        ("num_attention_heads", json!(64), "head_dim"),
        ("num_key_value_heads", json!(7), "evenly"),
        ("num_hidden_layers", json!(1_000_000), "num_hidden_layers"),
        ("vocab_size", json!(u64::MAX), "vocab_size"),
        ("max_position_embeddings", json!(null), "`max_position_embeddings` is missing"),
        ("rms_norm_eps", json!(-1.0), "rms_norm_eps"),
        ("tie_word_embeddings", json!("yes"), "tie_word_embeddings"),
        ("hidden_act", json!("gelu"), "hidden_act"),
        ("attention_bias", json!("yes"), "attention_bias"),
        ("quantization_config", json!({"quant_method": "awq"}), "quantization_config"),
        ("rope_parameters", json!({"rope_type": "yarn"}), "factor"),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0}), "rope_scaling"),
        ("rope_parameters", json!({"rope_theta": 0}), "rope_theta"),
        ("eos_token_id", json!(9999), "eos_token_id"),
        ("eos_token_id", json!("x"), "eos_token_id"),
    ];
    for (name, value, says) in cases {
        let mut tiny = Tiny::new("F32", true);
        tiny.config[name] = value;
        assert_blamed(&tiny.write().0, "config.json", says);
    }
    for (name, value, says) in [
        ("temperature", json!(-1.0), "temperature"),
        ("top_p", json!("x"), "top_p"),
        ("eos_token_id", json!(9999), "eos_token_id"),
    ] {
        let mut tiny = Tiny::new("F32", true);
        tiny.generation[name] = value;
        assert_blamed(&tiny.write().0, "generation_config.json", says);
    }
    // A configuration that fits itself but not the weights: the weights are where it shows.
    for (name, value) in [
        ("hidden_size", json!(64)),
        ("intermediate_size", json!(64)),
        ("num_hidden_layers", json!(3)),
        ("vocab_size", json!(300)),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
    ] {
        let mut tiny = Tiny::new("F32", true);
        tiny.config[name] = value;
        assert_blamed(&tiny.write().0, WEIGHTS, "tensor `");
    }
    let folder = Tiny::new("F32", true).write();
    folder.write("config.json", b"{\"model_type\": \"llama\",");
    assert_blamed(&folder.0, "config.json", "not valid JSON");
    folder.write("config.json", [0xFF, 0xFE]);
    assert_blamed(&folder.0, "config.json", "cannot be read as text");
    folder.write("config.json", "[]");
    assert_blamed(&folder.0, "config.json", "not a JSON object");
}

#[test]
fn tokenizers_and_templates_that_cannot_work_are_found_out() {
    let mut tiny = Tiny::new("F32", true);
    tiny.tokenizer["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    assert_blamed(&tiny.write().0, "tokenizer.json", "decoder");

    let mut tiny = Tiny::new("F32", true);
    tiny.tokenizer["model"]["vocab"]["extra"] = json!(VOCAB);
    assert_blamed(&tiny.write().0, "tokenizer.json", "vocab_size");
    for (name, value) in [
        ("model", json!({})),
        ("model", json!(null)),
        ("pre_tokenizer", json!({"type": "Nothing"})),
        ("added_tokens", json!(3)),
    ] {
        let mut tiny = Tiny::new("F32", true);
        tiny.tokenizer[name] = value;
        assert_blamed(&tiny.write().0, "tokenizer.json", "is not a valid tokenizer");
    }
    for (template, says) in [
        (json!("{% for %}"), "does not work"),
        (json!("{{ raise_exception('no users here') }}"), "no users here"),
        (json!("{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}"), "does not work"),
        (json!("{{ messages[0].content.nothing() }}"), "does not work"),
        (json!(5), "chat_template"),
        (json!([{"name": "tools", "template": "x"}]), "default"),
    ] {
        let mut tiny = Tiny::new("F32", true);
        tiny.tokenizer_config["chat_template"] = template;
        assert_blamed(&tiny.write().0, "tokenizer_config.json", says);
    }
    let folder = Tiny::new("F32", true).write();
    folder.write("chat_template.jinja", "{% if %}");
    assert_blamed(&folder.0, "chat_template.jinja", "does not work");
    folder.write("chat_template.jinja", "{{ messages[0].content }}!");
    let model = load(&runtime(), &folder.0).expect("a valid template");
    let hello = Message { role: "user".to_owned(), content: "hi".to_owned() };
    assert_eq!(model.prompt(&[hello]).as_deref(), Ok("hi!"));
}

#[tokio::test]
async fn a_bad_folder_does_not_disturb_a_model_that_serves() {
    let runtime = runtime();
    let good = runtime.load("glimmer-2", &folder("glimmer-2"), &LoadOptions::default()).expect("the bundled model");
    let bad = Tiny::new("F32", true).write();
    bad.write(WEIGHTS, b"garbage");
    assert!(load(&runtime, &bad.0).is_err());
    assert!(ask(&good, greedy(chat(&good, "hi"), 5)).await.ending.is_ok());
    assert_eq!(runtime.report().models.len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever happens to the bytes: a clear error or a model that loads, never a panic.
    #[test]
    fn damaged_files_never_panic(
        which in 0usize..4, cuts in proptest::collection::vec((0.0f64..1.0, any::<u8>()), 0..6), end in 0.5f64..1.3,
    ) {
        let name = [WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"][which];
        let folder = Tiny::new("BF16", true).write();
        let path = folder.0.join(name);
        let mut bytes = std::fs::read(&path).expect("the whole file");
        // Headers are where the lies are.
        let reach = if which == 0 { 2500 } else { bytes.len() };
        for (place, byte) in cuts {
            let at = (place * reach as f64) as usize;
            bytes[at.min(reach - 1)] = byte;
        }
        bytes.truncate((end * bytes.len() as f64) as usize);
        folder.write(name, bytes);
        if let Err(error) = load(&runtime(), &folder.0) {
            let text = error.to_string();
            prop_assert!(text.contains(name) || name == "config.json" || name == "tokenizer.json", "{}", text);
        }
    }
}
