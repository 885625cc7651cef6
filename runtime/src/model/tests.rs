//! The decoder against reference outputs computed by transformers in float32 from the same files.

use super::{decoder::Decoder, spec::ModelSpec};
use crate::{
    engine::forward::{Forward, Llm},
    kernels::batch::{BLOCK_TOKENS, StepBatch},
    kernels::cpu::{Kind, Raw},
    kernels::ops::Cpu,
    settings::{Activations, Quantize},
    weights::{Tensors, WeightError, folder, quantize::Quantized, safetensors::Checkpoint},
};
use candle_core::{Device, Tensor};
use std::{collections::HashMap, path::PathBuf};

const MODELS: [&str; 2] = ["glimmer-1", "glimmer-2"];
const BLOCKS: usize = 64;

fn model_folder(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "models", name].iter().collect()
}

fn golden(file: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "golden", file].iter().collect()
}

fn load(name: &str, kv: Activations) -> Llm<Cpu> {
    let folder = model_folder(name);
    let config = folder::require_json(&folder.join("config.json")).expect("config.json");
    let mut spec = ModelSpec::from_config(&config).expect("a supported model");
    spec.add_end(None).expect("no more end tokens");
    let checkpoint = Checkpoint::open(&folder).expect("weights");
    let decoder = Decoder::load(Cpu(kv), &spec, &checkpoint, BLOCKS * BLOCK_TOKENS).expect("decoder");
    Llm::new(spec, decoder, kv, BLOCKS).expect("pools")
}

/// Logits of every position of `ids`, computed in chunks of `chunk` tokens over scattered blocks.
fn logits(model: &mut Llm<Cpu>, ids: &[u32], chunk: usize) -> Vec<f32> {
    let table: Vec<u32> =
        (0..ids.len().div_ceil(BLOCK_TOKENS) as u32).map(|block| (block * 7 + 5) % BLOCKS as u32).collect();
    let mut all = Vec::new();
    for first in (0..ids.len()).step_by(chunk) {
        let mut batch = StepBatch::default();
        batch.push(&ids[first..ids.len().min(first + chunk)], first, &table, false);
        batch.sel = (0..batch.tokens() as u32).collect();
        all.extend(model.forward(batch).expect("forward"));
    }
    all
}

/// The largest error over all prompts and positions, as a share of the largest logit of its prompt.
fn worst_error(name: &str, kv: Activations, chunk: usize) -> f32 {
    let mut model = load(name, kv);
    let goldens = candle_core::safetensors::load(golden(&format!("{name}.safetensors")), &Device::Cpu);
    let goldens: HashMap<String, Tensor> = goldens.expect("the golden file");
    let mut worst = 0f32;
    for i in 0..20 {
        let ids: Vec<u32> =
            goldens[&format!("ids.{i}")].to_vec1::<i32>().expect("ids").into_iter().map(|id| id as u32).collect();
        let want: Vec<f32> = goldens[&format!("logits.{i}")].flatten_all().and_then(|t| t.to_vec1()).expect("logits");
        let got = logits(&mut model, &ids, chunk);
        assert_eq!(got.len(), want.len(), "{name}, prompt {i}");
        let largest = want.iter().fold(0f32, |a, b| a.max(b.abs()));
        let error = got.iter().zip(&want).fold(0f32, |a, (x, y)| a.max((x - y).abs()));
        assert!(error.is_finite() && largest > 0.0, "{name}, prompt {i}");
        worst = worst.max(error / largest);
    }
    println!("{name} {kv:?} chunk {chunk}: max|Δ| = {worst:.2e} · max|logit|");
    worst
}

#[test]
fn logits_with_f32_kv_equal_transformers_at_every_position() {
    for name in MODELS {
        assert!(worst_error(name, Activations::F32, usize::MAX) <= 1e-4, "{name}");
        assert!(worst_error(name, Activations::F32, 1) <= 1e-4, "{name}, token by token");
    }
}

/// Two bytes for each key and value cost up to 2⁻⁹ of each; what reaches the logits is the same order.
#[test]
fn logits_with_bf16_kv_stay_within_two_percent_of_transformers() {
    for name in MODELS {
        assert!(worst_error(name, Activations::Bf16, usize::MAX) <= 2e-2, "{name}");
    }
}

#[derive(serde::Deserialize)]
struct Text {
    chats: Vec<Chat>,
    greedy: HashMap<String, Vec<Continuation>>,
}

#[derive(serde::Deserialize)]
struct Chat {
    ids: Vec<u32>,
}

#[derive(serde::Deserialize)]
struct Continuation {
    ids: Vec<u32>,
}

#[test]
fn greedy_ids_equal_transformers() {
    let text = std::fs::read_to_string(golden("text.json")).expect("the golden file");
    let text: Text = serde_json::from_str(&text).expect("text.json");
    for name in MODELS {
        for kv in [Activations::F32, Activations::Bf16] {
            let mut model = load(name, kv);
            let mut differing = 0;
            for (chat, want) in text.chats.iter().zip(&text.greedy[name]) {
                let mut ids = chat.ids.clone();
                let vocab = model.vocab();
                let mut next = |ids: &[u32], known: usize| {
                    let table: Vec<u32> = (0..BLOCKS as u32).collect();
                    let mut batch = StepBatch::default();
                    batch.push(&ids[known..], known, &table, true);
                    let row = model.forward(batch).expect("forward");
                    assert_eq!(row.len(), vocab);
                    (0..vocab).fold(0, |best, id| if row[id] > row[best] { id } else { best }) as u32
                };
                let mut known = 0;
                let mut got = Vec::new();
                for _ in &want.ids {
                    let id = next(&ids, known);
                    known = ids.len();
                    ids.push(id);
                    got.push(id);
                }
                differing += usize::from(got != want.ids);
                if kv == Activations::F32 {
                    assert_eq!(got, want.ids, "{name}");
                }
            }
            println!("{name} {kv:?}: {differing} of {} continuations differ", text.chats.len());
            assert!(differing == 0, "{name} {kv:?}: {differing} continuations differ");
        }
    }
}

/// As much bf16 as is asked for, made on demand.
struct Endless;

impl Tensors for Endless {
    fn kinds(&self, _: &str, _: usize, _: usize) -> Result<[Kind; 2], WeightError> {
        Ok([Kind::Bf16; 2])
    }
    fn matrix(&self, _: &str, rows: usize, columns: usize) -> Result<Raw, WeightError> {
        let bytes = (0..2 * rows * columns).map(|i| if i % 2 == 0 { i as u8 } else { 0x3C }).collect();
        Ok(Raw { kind: Kind::Bf16, rows, columns, bytes })
    }
    fn vector(&self, _: &str, len: usize) -> Result<Tensor, WeightError> {
        Ok(Tensor::zeros(len, candle_core::DType::F32, &Device::Cpu)?)
    }
    fn files(&self) -> Vec<PathBuf> {
        Vec::new()
    }
}

/// Bytes of memory that this process has (`VmRSS`) or has had at most (`VmHWM`).
#[cfg(target_os = "linux")]
fn memory(what: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find(|line| line.starts_with(what)).expect("a line");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<usize>().ok()).expect("KiB") * 1024
}

/// A model of 100 MB in bf16. Meant for a process of its own, as nextest gives it.
#[test]
#[cfg(target_os = "linux")]
fn quantising_while_loading_needs_little_more_memory_than_its_result() {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": true,
        "eos_token_id": 2, "hidden_act": "silu",
    });
    let spec = ModelSpec::from_config(&config).expect("a supported model");
    for (to, exceptions) in [(Quantize::Q8_0, 0), (Quantize::Q4K, 0)] {
        let before = memory("VmRSS");
        let source = Quantized::new(&Endless, to);
        let decoder = Decoder::load(Cpu(Activations::Bf16), &spec, &source, 64).expect("decoder");
        assert_eq!(source.exceptions().len(), exceptions);
        let peak = memory("VmHWM") - before;
        // gate_up is stacked of two: as read, as blocks, and packed.
        let largest = 2 * 1024 * 3072 * 2;
        assert!(decoder.bytes() < 60 << 20, "{} bytes", decoder.bytes());
        assert!(peak < decoder.bytes() + 3 * largest, "{peak} bytes of memory for {} of weights", decoder.bytes());
    }
}

#[test]
fn matrices_that_cannot_be_quantised_as_asked_are_named() {
    let quantized = Quantized::new(&Endless, Quantize::Q4K);
    let kind = |name: &str, columns| quantized.matrix(name, 16, columns).expect("a matrix").kind;
    assert_eq!(kind("wide", 512), Kind::Q4K);
    assert_eq!(kind("narrow", 896), Kind::Q8_0);
    assert_eq!(kind("odd", 48), Kind::Bf16);
    assert_eq!(kind("lm_head.weight", 512), Kind::Q8_0);
    let exceptions = quantized.exceptions();
    assert_eq!(exceptions.len(), 2);
    assert!(exceptions[0].starts_with("narrow: is q8_0") && exceptions[1].starts_with("odd: stays bf16"));
}
