//! Every family and rotary variant against transformers: tiny models whose weights both sides make from tensor names.
//! `tests/families/make.py` computes what is committed beside it.

use super::{decoder::Decoder, layout, spec::ModelSpec};
use crate::{
    engine::forward::{Forward, Llm},
    kernels::{
        batch::{BLOCK_TOKENS, StepBatch},
        cpu::{Kind, Raw, use_threads},
        ops::{Cpu, Ops},
        plain::Plain,
    },
    settings::{Activations, Quantize},
    weights::{Tensors, WeightError, quantize::Quantized},
};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};

const BLOCKS: usize = 16;

/// Weights made from their names: nothing is read, nothing is missing.
struct Made;

impl Tensors for Made {
    fn kinds(&self, _: &str, _: usize, _: usize) -> Result<[Kind; 2], WeightError> {
        Ok([Kind::F32; 2])
    }

    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Raw, WeightError> {
        let scale = (3.0 / columns as f64).sqrt() as f32;
        let bytes = uniform(name, rows * columns).flat_map(|x| (x * scale).to_le_bytes()).collect();
        Ok(Raw { kind: Kind::F32, rows, columns, bytes })
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor, WeightError> {
        let centre = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let numbers: Vec<f32> = uniform(name, len).map(|x| centre + x * 0.25).collect();
        Ok(Tensor::from_vec(numbers, len, &Device::Cpu)?)
    }

    fn files(&self) -> Vec<PathBuf> {
        Vec::new()
    }
}

/// splitmix64 from the name's FNV-1a hash; the upper 24 bits of each number, as a number in [-1, 1).
fn uniform(name: &str, count: usize) -> impl Iterator<Item = f32> {
    let mut state = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325, |state: u64, byte| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3));
    std::iter::repeat_with(move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let x = x ^ (x >> 31);
        (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    })
    .take(count)
}

struct Case {
    name: String,
    config: Value,
    ids: Vec<u32>,
    /// `[tokens, vocab]`
    logits: Vec<f32>,
}

fn cases() -> Vec<Case> {
    let file = |name: &str| -> PathBuf { [env!("CARGO_MANIFEST_DIR"), "tests", "families", name].iter().collect() };
    let json = std::fs::read_to_string(file("cases.json")).expect("cases.json");
    let json: BTreeMap<String, Value> = serde_json::from_str(&json).expect("valid JSON");
    let logits: HashMap<String, Tensor> =
        candle_core::safetensors::load(file("logits.safetensors"), &Device::Cpu).expect("logits.safetensors");
    let case = |(name, case): (String, Value)| Case {
        config: case["config"].clone(),
        ids: serde_json::from_value(case["ids"].clone()).expect("ids"),
        logits: logits[&name].flatten_all().and_then(|t| t.to_vec1()).expect("logits"),
        name,
    };
    json.into_iter().map(case).collect()
}

fn load<O: Ops>(ops: O, case: &Case, kv: Activations) -> Llm<O> {
    let spec = ModelSpec::from_config(&case.config).unwrap_or_else(|why| panic!("{}: {why}", case.name));
    let decoder = Decoder::load(ops, &spec, &Made, case.ids.len()).expect("decoder");
    Llm::new(spec, decoder, kv, BLOCKS).expect("pools")
}

/// Pushes a sequence's next tokens, every one with logits; its blocks are `first_block` and every third after it.
fn push(batch: &mut StepBatch, ids: &[u32], from: usize, first_block: usize) {
    let blocks = (from + ids.len()).div_ceil(BLOCK_TOKENS);
    let table: Vec<u32> = (0..blocks).map(|block| ((first_block + 3 * block) % BLOCKS) as u32).collect();
    batch.push(ids, from, &table, false);
    batch.sel = (0..batch.tokens() as u32).collect();
}

fn logits<O: Ops>(model: &mut Llm<O>, ids: &[u32], chunk: usize) -> Vec<f32> {
    let mut all = Vec::new();
    for (n, part) in ids.chunks(chunk).enumerate() {
        let mut batch = StepBatch::default();
        push(&mut batch, part, n * chunk, 5);
        all.extend(model.forward(batch).expect("forward"));
    }
    all
}

#[test]
fn what_a_decoder_takes_of_memory_is_known_before_it_loads() {
    for case in cases() {
        let spec = ModelSpec::from_config(&case.config).expect("a supported model");
        let quantized = [Quantize::Q8_0, Quantize::Q4K].map(|to| Quantized::new(&Made, to));
        for tensors in [&Made as &dyn Tensors, &quantized[0], &quantized[1]] {
            let planned = layout::memory(&spec, tensors, 64, &layout::Step { tokens: 1, rows: 1 }).expect("a plan");
            let decoder = Decoder::load(Cpu(Activations::Bf16), &spec, tensors, 64).expect("decoder");
            assert_eq!(planned.weights + planned.tables, decoder.bytes() as u64, "{}", case.name);
        }
    }
}

#[test]
fn every_family_gives_the_logits_of_transformers_at_every_position() {
    gives_the_logits_of_transformers(|| Cpu(Activations::F32));
}

/// The path of devices that have no kernels of ours.
#[test]
fn so_do_candles_own_operations() {
    gives_the_logits_of_transformers(|| Plain::new(Device::Cpu, DType::F32));
}

fn gives_the_logits_of_transformers<O: Ops>(ops: impl Fn() -> O) {
    let cases = cases();
    assert!(cases.len() >= 20, "cases are missing");
    let mut failed = Vec::new();
    for case in &cases {
        let mut model = load(ops(), case, Activations::F32);
        let got = logits(&mut model, &case.ids, usize::MAX);
        assert_eq!(got.len(), case.logits.len(), "{}", case.name);
        let largest = case.logits.iter().fold(0f32, |a, b| a.max(b.abs()));
        let error =
            got.iter().zip(&case.logits).map(|(x, y)| (x - y).abs()).fold(0f32, |a, b| if b > a { b } else { a });
        println!("{}: max|Δ| = {:.1e} · max|logit|", case.name, error / largest);
        if !(error <= 1e-4 * largest && got.iter().all(|x| x.is_finite())) {
            failed.push(format!("{}: {:.1e}", case.name, error / largest));
        }
        for (got, want) in got.chunks(model.vocab()).zip(case.logits.chunks(model.vocab())) {
            let best = |row: &[f32]| (0..row.len()).fold(0, |best, id| if row[id] > row[best] { id } else { best });
            let runner_up =
                want.iter().enumerate().filter(|(id, _)| *id != best(want)).fold(f32::MIN, |a, (_, b)| a.max(*b));
            if want[best(want)] - runner_up > 1e-3 && best(got) != best(want) {
                failed.push(format!("{}: another greedy token", case.name));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

/// Windows, softcaps, norms of queries and keys, norms around and after, scaled positions, biases: for each the bits
/// of a row do not depend on chunks, neighbours or threads.
#[test]
fn every_family_gives_the_same_bits_in_any_chunks_among_strangers_and_with_more_threads() {
    for case in cases() {
        for kv in [Activations::F32, Activations::Bf16] {
            let mut model = load(Cpu(kv), &case, kv);
            let want = logits(&mut model, &case.ids, usize::MAX);
            for chunk in [1, 7, 32] {
                assert_eq!(logits(&mut model, &case.ids, chunk), want, "{}, {kv:?}, chunks of {chunk}", case.name);
            }
            let stranger: Vec<u32> = case.ids.iter().rev().copied().collect();
            let mut crowd = StepBatch::default();
            push(&mut crowd, &stranger[..7], 0, 1);
            push(&mut crowd, &case.ids, 0, 6);
            push(&mut crowd, &stranger[..3], 0, 2);
            let vocab = model.vocab();
            let together = model.forward(crowd).expect("forward");
            assert_eq!(together[7 * vocab..][..want.len()], want[..], "{}, {kv:?}, among strangers", case.name);
        }
    }
    use_threads(3).expect("threads");
    for case in cases() {
        let with_threads = logits(&mut load(Cpu(Activations::F32), &case, Activations::F32), &case.ids, usize::MAX);
        use_threads(1).expect("threads");
        assert_eq!(
            logits(&mut load(Cpu(Activations::F32), &case, Activations::F32), &case.ids, usize::MAX),
            with_threads,
            "{}",
            case.name
        );
        use_threads(3).expect("threads");
    }
}

#[test]
fn every_family_has_a_golden_and_a_row_in_the_docs() {
    let unknown = ModelSpec::from_config(&serde_json::json!({"model_type": "gpt2"})).expect_err("an unknown family");
    let known = unknown.split_once("supported: ").expect("a list").1.trim_end_matches(')');
    let docs: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", "docs", "models.md"].iter().collect();
    let docs = std::fs::read_to_string(docs).expect("docs/models.md");
    for family in known.split(", ") {
        assert!(cases().iter().any(|case| case.config["model_type"] == family), "{family} has no golden");
        assert!(docs.contains(&format!("`{family}`")), "{family} is not in docs/models.md");
    }
}

fn refusal(model_type: &str, key: &str, value: Value) -> String {
    let case = cases().into_iter().find(|case| case.config["model_type"] == model_type).expect("a case");
    let mut config = case.config;
    config[key] = value;
    ModelSpec::from_config(&config).err().unwrap_or_else(|| panic!("{model_type} with {key} was accepted"))
}

#[test]
fn what_a_family_has_that_we_do_not_support_is_refused_by_key() {
    use serde_json::json;
    for (model_type, key, value) in [
        ("llama", "quantization_config", json!({"quant_method": "gptq"})),
        ("llama", "sliding_window", json!(8)),
        ("llama", "layer_types", json!(["sliding_attention", "full_attention"])),
        ("llama", "partial_rotary_factor", json!(0.5)),
        ("llama", "attn_logit_softcapping", json!(50.0)),
        ("llama", "logits_scaling", json!(2.0)),
        ("llama", "no_rope_layers", json!([1, 0])),
        ("llama", "hidden_activation", json!("gelu")),
        ("mistral", "layer_types", json!(["full_attention", "full_attention"])),
        ("mistral", "sliding_window", json!(0)),
        ("qwen3", "layer_types", json!(["full_attention"])),
        ("gemma2", "attn_logit_softcapping", json!(-1.0)),
        ("gemma2", "query_pre_attn_scalar", json!(0)),
        ("gemma3_text", "attn_logit_softcapping", json!(50.0)),
        ("gemma3_text", "use_bidirectional_attention", json!(true)),
        ("olmo2", "clip_qkv", json!(8.0)),
        ("smollm3", "no_rope_layers", json!([1, 2])),
        ("phi3", "partial_rotary_factor", json!(1.5)),
    ] {
        let why = refusal(model_type, key, value);
        let named = if key == "hidden_activation" { "hidden_act" } else { key };
        assert!(why.contains(&format!("`{named}`")), "{model_type}, {key}: {why}");
    }
}

#[test]
fn rotary_positions_that_cannot_work_are_refused_by_key() {
    use serde_json::json;
    for (rope, says) in [
        (json!({"rope_type": "proportional"}), "`proportional`"),
        (json!({"rope_type": "linear"}), "`factor` is missing"),
        (json!({"rope_type": "linear", "factor": -2.0}), "`factor`"),
        (json!({"rope_type": "default", "mrope_section": [16, 24, 24]}), "`mrope_section`"),
        (json!({"rope_type": "dynamic", "factor": 1e12}), "`factor`"),
        (
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
            "low_freq_factor",
        ),
        (json!({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}), "`short_factor`"),
        (json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}), "`original_max_position"),
        (json!({"rope_type": 7}), "`rope_type`"),
        (json!([]), "`rope_parameters`"),
    ] {
        let why = refusal("llama", "rope_parameters", rope.clone());
        assert!(why.contains(says), "{rope}: {why}");
    }
}

#[test]
fn a_granite_that_names_no_multipliers_multiplies_by_one() {
    let case = cases().into_iter().find(|case| case.config["model_type"] == "granite").expect("a case");
    let mut config = case.config;
    for name in ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"] {
        config[name] = Value::Null;
    }
    let spec = ModelSpec::from_config(&config).expect("a spec");
    let multipliers = [spec.embed_scale, spec.layers[0].scores.scale, spec.residual_scale, spec.logit_scale];
    assert_eq!(multipliers, [1.0; 4]);
}
