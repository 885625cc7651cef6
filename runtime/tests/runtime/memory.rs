//! The ledger against the machine's own account of this process.

use crate::support::{MODELS, Temporary, ask, endless, folder, llama_layer, settings};
use glassgate_runtime::{LoadError, LoadOptions, Memory, Model, ModelState, Runtime, Settings};
use serde_json::json;
use std::path::Path;

/// Bytes that this process holds.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("a line");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).expect("KiB") * 1024.0
}

/// A Llama of 206 MB in bf16 with Glimmer's tokenizer.
fn two_hundred_megabytes() -> Temporary {
    let (hidden, inner, kv, layers, vocab) = (1024, 4096, 256, 7, 1280);
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    for i in 0..layers {
        let layer =
            llama_layer(hidden, kv, inner).map(|(name, shape)| (format!("model.layers.{i}.{name}.weight"), shape));
        tensors.extend(layer);
    }
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in &tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = serde_json::to_vec(&header).expect("JSON");
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    let mut state = 1u64;
    // Numbers of ±0.01 to ±0.04.
    bytes.extend((0..end / 2).flat_map(|_| {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        [(state >> 32) as u8, 0x3C | (state >> 40) as u8 & 0x80]
    }));
    let there = Temporary::new();
    there.write("model.safetensors", bytes);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": true,
        "eos_token_id": 2, "hidden_act": "silu",
    });
    there.write("config.json", config.to_string());
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        there.write(name, std::fs::read(folder("glimmer-2").join(name)).expect("the bundled model"));
    }
    there
}

/// Writes to every block of the pool.
async fn fill(model: &Model, blocks: u32) {
    let context = model.context();
    for prompt in 0..(blocks * 32).div_ceil(context) {
        let prompt: Vec<u32> = (0..context - 1).map(|at| 3 + (at * 7 + prompt * 31) % 1000).collect();
        assert!(ask(model, endless(prompt, 1)).await.ending.is_ok());
    }
}

/// Loads, fills and unloads a model in a process that has served another before.
async fn agrees(runtime: &Runtime, path: &Path) {
    let before = resident();
    let model = runtime.load("measured", path, &LoadOptions::default()).expect("a model");
    let report = runtime.report().models.pop().expect("it is the last");
    assert_eq!((report.name.as_str(), report.state), ("measured", ModelState::Ready));
    fill(&model, report.kv_blocks_total).await;
    let (taken, Memory { weights, tables, kv, .. }) = (resident() - before, report.memory);
    let planned = (weights + tables + kv) as f64;
    println!("{}: {:.1} MB taken, {}", path.display(), taken / 1e6, report.memory);
    assert!((taken / planned - 1.0).abs() < 0.15, "{taken} bytes taken, {planned} planned: {}", report.memory);
    drop(model);
    while runtime.report().models.len() > 1 {
        tokio::task::yield_now().await;
    }
    // glibc, the allocator here and not in the product, keeps freed pieces of up to 32 MiB that lie between others.
    let left = resident() - before;
    assert!(left < 0.5 * planned, "{left} bytes of {planned} are not given back");
}

#[tokio::test]
#[cfg(target_os = "linux")]
async fn the_ledger_agrees_with_the_process_and_unloading_gives_most_of_the_memory_back() {
    let runtime = Runtime::start(Settings { kv_bytes: 16 << 20, ..settings() }).expect("valid settings");
    // Threads, the allocator's own and what is made once are not a model's.
    let first = runtime.load("first", &folder("glimmer-1"), &LoadOptions::default()).expect("the bundled model");
    fill(&first, runtime.report().models[0].kv_blocks_total).await;
    agrees(&runtime, &folder("glimmer-2")).await;
    let large = two_hundred_megabytes();
    agrees(&runtime, &large.0).await;
}

#[test]
fn what_cannot_fit_is_refused_before_it_is_read() {
    let options = LoadOptions::default();
    let alone = Runtime::start(settings()).expect("valid settings");
    let _model = alone.load("one", &folder(MODELS[0]), &options).expect("the bundled model");
    let needs = alone.report().models[0].memory.peak();

    let runtime = Runtime::start(Settings { memory_max: Some(2 * needs - 1), ..settings() }).expect("valid settings");
    let one = runtime.load("one", &folder(MODELS[0]), &options).expect("room for one");
    let refused = runtime.load("two", &folder(MODELS[1]), &options).err().expect("no room for two");
    assert!(matches!(refused, LoadError::NoRoom { .. }));
    let said = refused.to_string();
    assert!(said.contains("glimmer-2: needs") && said.contains("KV pool") && said.contains("are free"), "{said}");
    let report = runtime.report();
    assert_eq!((report.models.len(), report.memory_max), (1, 2 * needs - 1), "nothing is set aside for it");

    drop(one);
    while !runtime.report().models.is_empty() {
        std::thread::yield_now();
    }
    runtime.load("two", &folder(MODELS[1]), &options).expect("room again");
}

/// A load that fails gives back what was set aside for it.
#[test]
fn a_failed_load_takes_nothing() {
    let broken = Temporary::new();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        let mut bytes = std::fs::read(folder("glimmer-1").join(name)).expect("the bundled model");
        if name == "model.safetensors" {
            // The last number is none.
            let end = bytes.len();
            bytes[end - 2..].copy_from_slice(&[0xC0, 0x7F]);
        }
        broken.write(name, bytes);
    }
    let runtime = Runtime::start(settings()).expect("valid settings");
    let error = runtime.load("broken", &broken.0, &LoadOptions::default()).err().expect("a broken model");
    assert!(error.to_string().contains("not finite"), "{error}");
    assert!(runtime.report().models.is_empty());
}
