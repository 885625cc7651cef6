//! The same numbers as a GGUF file and as a folder, in architectures that differ in what stands in a layer and how: every
//! probability is the same.

use crate::{
    gguf_file::{File, Stored, number, real, text},
    support::{Temporary, ask, greedy, letters, settings},
};
use glassgate_runtime::{LoadOptions, Request, Runtime, SamplingParams};
use serde_json::{Map, Value, json};

const HIDDEN: u64 = 64;
const INNER: u64 = 96;
const Q: u64 = 128;
const KV: u64 = 64;
const HEAD: u64 = 32;
const VOCAB: u64 = 256;

struct Twin {
    architecture: &'static str,
    /// Beside the sizes that all have.
    config: Value,
    metadata: Vec<(&'static str, Vec<u8>)>,
    /// In a folder's layer, in the file's, rows (0: it is a vector), columns.
    more: Vec<(&'static str, &'static str, u64, u64)>,
    /// The file holds norms with one added.
    plus_one: bool,
}

fn twins() -> [Twin; 4] {
    let before = [("input_layernorm", "attn_norm", 0, HIDDEN), ("post_attention_layernorm", "ffn_norm", 0, HIDDEN)];
    let heads = [("self_attn.q_norm", "attn_q_norm", 0, HEAD), ("self_attn.k_norm", "attn_k_norm", 0, HEAD)];
    let around = [
        ("input_layernorm", "attn_norm", 0, HIDDEN),
        ("post_attention_layernorm", "post_attention_norm", 0, HIDDEN),
        ("pre_feedforward_layernorm", "ffn_norm", 0, HIDDEN),
        ("post_feedforward_layernorm", "post_ffw_norm", 0, HIDDEN),
    ];
    let separate = [
        ("self_attn.q_proj", "attn_q", Q, HIDDEN),
        ("self_attn.k_proj", "attn_k", KV, HIDDEN),
        ("self_attn.v_proj", "attn_v", KV, HIDDEN),
        ("mlp.gate_proj", "ffn_gate", INNER, HIDDEN),
        ("mlp.up_proj", "ffn_up", INNER, HIDDEN),
    ];
    let fused =
        [("self_attn.qkv_proj", "attn_qkv", Q + 2 * KV, HIDDEN), ("mlp.gate_up_proj", "ffn_up", 2 * INNER, HIDDEN)];
    [
        Twin {
            architecture: "qwen2",
            config: json!({"model_type": "qwen2"}),
            metadata: vec![],
            more: [&before[..], &separate].concat(),
            plus_one: false,
        },
        Twin {
            architecture: "qwen3",
            config: json!({"model_type": "qwen3", "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
            metadata: vec![("rope.scaling.factor", real(4.0))],
            more: [&before[..], &heads, &separate].concat(),
            plus_one: false,
        },
        Twin {
            architecture: "phi3",
            config: json!({"model_type": "phi3", "sliding_window": 5}),
            metadata: vec![("attention.sliding_window", number(5))],
            more: [&before[..], &fused].concat(),
            plus_one: false,
        },
        Twin {
            architecture: "gemma2",
            config: json!({"model_type": "gemma2", "sliding_window": 5, "query_pre_attn_scalar": HEAD,
                "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
            metadata: vec![
                ("attention.sliding_window", number(5)),
                ("attn_logit_softcapping", real(2.0)),
                ("final_logit_softcapping", real(3.0)),
            ],
            more: [&around[..], &separate].concat(),
            plus_one: true,
        },
    ]
}

impl Twin {
    /// (in the folder, in the file, rows, columns) of every tensor; rows 0: a vector.
    fn tensors(&self) -> Vec<(String, String, u64, u64)> {
        let mut all = vec![
            ("model.embed_tokens.weight".to_owned(), "token_embd.weight".to_owned(), VOCAB, HIDDEN),
            ("model.norm.weight".to_owned(), "output_norm.weight".to_owned(), 0, HIDDEN),
        ];
        let ends = [("self_attn.o_proj", "attn_output", HIDDEN, Q), ("mlp.down_proj", "ffn_down", HIDDEN, INNER)];
        for layer in 0..2 {
            for &(folder, file, rows, columns) in self.more.iter().chain(&ends) {
                let (folder, file) = (format!("model.layers.{layer}.{folder}"), format!("blk.{layer}.{file}"));
                all.push((format!("{folder}.weight"), format!("{file}.weight"), rows, columns));
                if self.architecture == "qwen2" && ["attn_q", "attn_k", "attn_v"].iter().any(|m| file.ends_with(m)) {
                    all.push((format!("{folder}.bias"), format!("{file}.bias"), 0, rows));
                }
            }
        }
        all
    }

    fn folder(&self) -> Temporary {
        let mut config = json!({
            "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD, "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "eos_token_id": 1,
        });
        config.as_object_mut().expect("an object").extend(self.config.as_object().expect("an object").clone());
        let vocab: Map<String, Value> = letters().zip(0..256).map(|(c, id)| (c.to_string(), id.into())).collect();
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [], "pre_tokenizer": bytes, "decoder": bytes,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        let (mut header, mut data) = (Map::new(), Vec::new());
        for (name, _, rows, columns) in self.tensors() {
            let from = data.len();
            data.extend(self.numbers(&name, rows, columns).iter().flat_map(|x| x.to_le_bytes()));
            let shape = if rows == 0 { json!([columns]) } else { json!([rows, columns]) };
            header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [from, data.len()]}));
        }
        let header = Value::from(header).to_string();
        let folder = Temporary::new();
        folder.write("config.json", config.to_string());
        folder.write("tokenizer.json", tokenizer.to_string());
        let weights = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
        folder.write("model.safetensors", weights);
        folder
    }

    fn file(&self) -> Vec<u8> {
        let mut file = File::of_bytes();
        file.pairs.retain(|(key, _)| !key.starts_with("llama."));
        file.tensors.clear();
        file.set("general.architecture", text(self.architecture));
        let sizes = [
            ("context_length", 128),
            ("embedding_length", HIDDEN),
            ("block_count", 2),
            ("feed_forward_length", INNER),
            ("attention.head_count", 4),
            ("attention.head_count_kv", 2),
            ("attention.key_length", HEAD),
        ];
        let sizes = sizes.map(|(key, n)| (key, number(n as u32)));
        let epsilon = [("attention.layer_norm_rms_epsilon", real(1e-5))];
        for (key, value) in sizes.iter().chain(&epsilon).chain(&self.metadata) {
            file.set(&format!("{}.{key}", self.architecture), value.clone());
        }
        for (in_folder, name, rows, columns) in self.tensors() {
            let one = if self.plus_one && name.ends_with("norm.weight") { 1.0 } else { 0.0 };
            let numbers = self.numbers(&in_folder, rows, columns);
            let bytes = numbers.iter().flat_map(|x| (x + one).to_le_bytes()).collect();
            let shape = if rows == 0 { vec![columns] } else { vec![columns, rows] };
            file.tensors.push(Stored { name, shape, kind: 0, offset: None, bytes });
        }
        file.bytes()
    }

    /// Different for every name; norms as the folder's family stores them.
    fn numbers(&self, name: &str, rows: u64, columns: u64) -> Vec<f32> {
        let mut state = name.bytes().fold(7u32, |state, byte| state.wrapping_mul(31).wrapping_add(byte.into()));
        let centre = if name.ends_with("norm.weight") && !self.plus_one { 1.0 } else { 0.0 };
        let scale = if rows == 0 { 0.5 } else { (12.0 / columns as f32).sqrt() };
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            centre + scale * ((state >> 8) as f32 / (1 << 24) as f32 - 0.5)
        };
        (0..rows.max(1) * columns).map(|_| next()).collect()
    }
}

#[tokio::test]
async fn files_of_other_architectures_have_the_probabilities_of_their_twins_to_the_bit() {
    for twin in twins() {
        let runtime = Runtime::start(settings()).expect("valid settings");
        let (folder, place) = (twin.folder(), Temporary::new());
        place.write("model.gguf", twin.file());
        let a = runtime.load("folder", &folder.0, &LoadOptions::default()).expect("a valid folder");
        let b = runtime.load("file", &place.0.join("model.gguf"), &LoadOptions::default()).expect("a valid file");
        let ids = a.tokenize("The same numbers under other names.").expect("ids");
        assert_eq!(b.tokenize("The same numbers under other names.").as_ref(), Ok(&ids));
        let params = SamplingParams { temperature: 0.0, logprobs: Some(20), ..SamplingParams::default() };
        let request = Request { params, ignore_eos: true, ..greedy(ids, 30) };
        let (a, b) = (ask(&a, request.clone()).await, ask(&b, request).await);
        assert!(a.logprobs.iter().flatten().count() == 30 && a.ending.is_ok());
        assert_eq!((a.tokens, a.logprobs), (b.tokens, b.logprobs), "{}", twin.architecture);
    }
}
