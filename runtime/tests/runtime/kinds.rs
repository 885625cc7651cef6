//! Every block type of GGUF, from the file to the probabilities: beside what transformers says with the same blocks as the
//! package `gguf` reads them. `tests/formats/kinds.py` writes what this compares with, and says where its bounds are from.

use crate::{
    gguf_file::{File, Stored, number, real, text},
    support::{Temporary, fixture, settings},
};
use glassgate_runtime::{LoadOptions, Runtime};
use std::ops::Range;

const HIDDEN: u64 = 256;
const INNER: u64 = 512;
const KV: u64 = 128;
const HEAD: u64 = 64;
const LAYERS: u64 = 2;
const VOCAB: usize = 256;
const TEXT: &[u8] = b"Blocks of numbers, end to end: 0123456789";
const POSITIONS: [usize; 4] = [0, 7, 19, 39];

/// A type of numbers as files know it.
struct Kind {
    name: &'static str,
    id: u32,
    /// Numbers and bytes of a block.
    block: (usize, usize),
    /// Where its f16 scales are, and their exponent.
    scales: &'static [(usize, u8)],
    /// Where the nibbles of scales are (for plain numbers: of the numbers) that the second test misreads, and their bits.
    nibbles: (Range<usize>, u8),
}

/// In the order of the file.
const KINDS: [Kind; 7] = [
    Kind { name: "F32", id: 0, block: (1, 4), scales: &[], nibbles: (2..3, 0x78) },
    Kind { name: "F16", id: 1, block: (1, 2), scales: &[], nibbles: (1..2, 0x03) },
    Kind { name: "Q8_0", id: 8, block: (32, 34), scales: &[(0, 4)], nibbles: (1..2, 0x03) },
    Kind { name: "Q4_0", id: 2, block: (32, 18), scales: &[(0, 8)], nibbles: (1..2, 0x03) },
    // Of the 12 bytes of packed scales the last four hold what is low of the second half of them.
    Kind { name: "Q4_K", id: 12, block: (256, 144), scales: &[(0, 2), (2, 5)], nibbles: (12..16, 0x0F) },
    Kind { name: "Q5_K", id: 13, block: (256, 176), scales: &[(0, 1), (2, 5)], nibbles: (12..16, 0x0F) },
    Kind { name: "Q6_K", id: 14, block: (256, 210), scales: &[(208, 0)], nibbles: (192..200, 0xF0) },
];

/// splitmix64 from the name's FNV-1a hash.
fn stream(name: &str, count: usize) -> Vec<u8> {
    let mut state = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325, |state: u64, byte| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3));
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    });
    words.flat_map(u64::to_le_bytes).take(count).collect()
}

impl Kind {
    fn matrix(&self, name: &str, rows: u64, columns: u64) -> Vec<u8> {
        let (numbers, bytes) = self.block;
        let mut blocks = stream(&format!("{} {name}", self.name), (rows * columns) as usize / numbers * bytes);
        for block in blocks.chunks_exact_mut(bytes) {
            match self.name {
                "F32" => {
                    let bits = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
                    block.copy_from_slice(&(bits & 0x807F_FFFF | (127 - 5) << 23).to_le_bytes());
                }
                "F16" => {
                    let bits = u16::from_le_bytes([block[0], block[1]]);
                    block.copy_from_slice(&(bits & 0x83FF | (15 - 5) << 10).to_le_bytes());
                }
                _ => {
                    self.scales.iter().for_each(|&(at, exponent)| block[at + 1] = block[at + 1] & 3 | exponent << 2);
                }
            }
        }
        blocks
    }

    fn file(&self) -> File {
        let mut file = File::of_bytes();
        file.pairs.retain(|(key, _)| !key.starts_with("llama."));
        file.tensors.clear();
        file.set("general.architecture", text("qwen3"));
        for (key, n) in [
            ("context_length", 128),
            ("embedding_length", HIDDEN),
            ("block_count", LAYERS),
            ("feed_forward_length", INNER),
            ("attention.head_count", 4),
            ("attention.head_count_kv", 2),
            ("attention.key_length", HEAD),
        ] {
            file.set(&format!("qwen3.{key}"), number(n as u32));
        }
        file.set("qwen3.attention.layer_norm_rms_epsilon", real(1e-5));
        self.add(&mut file, "model.embed_tokens", "token_embd", [VOCAB as u64, HIDDEN]);
        self.add(&mut file, "lm_head", "output", [VOCAB as u64, HIDDEN]);
        add_norm(&mut file, "model.norm", "output_norm", HIDDEN);
        for layer in 0..LAYERS {
            for (folder, stored, shape) in [
                ("self_attn.q_proj", "attn_q", [HIDDEN, HIDDEN]),
                ("self_attn.k_proj", "attn_k", [KV, HIDDEN]),
                ("self_attn.v_proj", "attn_v", [KV, HIDDEN]),
                ("self_attn.o_proj", "attn_output", [HIDDEN, HIDDEN]),
                ("mlp.gate_proj", "ffn_gate", [INNER, HIDDEN]),
                ("mlp.up_proj", "ffn_up", [INNER, HIDDEN]),
                ("mlp.down_proj", "ffn_down", [HIDDEN, INNER]),
            ] {
                let (folder, stored) = (format!("model.layers.{layer}.{folder}"), format!("blk.{layer}.{stored}"));
                self.add(&mut file, &folder, &stored, shape);
            }
            for (folder, stored, len) in [
                ("input_layernorm", "attn_norm", HIDDEN),
                ("post_attention_layernorm", "ffn_norm", HIDDEN),
                ("self_attn.q_norm", "attn_q_norm", HEAD),
                ("self_attn.k_norm", "attn_k_norm", HEAD),
            ] {
                let (folder, stored) = (format!("model.layers.{layer}.{folder}"), format!("blk.{layer}.{stored}"));
                add_norm(&mut file, &folder, &stored, len);
            }
        }
        file
    }

    fn add(&self, file: &mut File, folder: &str, stored: &str, [rows, columns]: [u64; 2]) {
        let bytes = self.matrix(&format!("{folder}.weight"), rows, columns);
        let (name, shape) = (format!("{stored}.weight"), vec![columns, rows]);
        file.tensors.push(Stored { name, shape, kind: self.id, offset: None, bytes });
    }

    /// (root mean square error of the log-probabilities, its bound) at each position.
    async fn errors(&self, file: &File) -> Vec<(f64, f64)> {
        let folder = Temporary::new();
        folder.write("model.gguf", file.bytes());
        let runtime = Runtime::start(settings()).expect("valid settings");
        let path = folder.0.join("model.gguf");
        let model = runtime.load(self.name, &path, &LoadOptions::default()).expect("a valid file");
        let ids: Vec<u32> = TEXT.iter().map(|&byte| byte.into()).collect();
        let told = model.score(&ids[..1], &ids[1..], VOCAB as u32, 0).await.expect("scores");
        let position = |(position, expected): (usize, &[f32])| {
            let (expected, bound) = (&expected[..VOCAB], expected[VOCAB]);
            let top = &told[position].top;
            assert_eq!(top.len(), VOCAB);
            let squares = top.iter().map(|&(id, logprob)| f64::from(logprob - expected[id as usize]).powi(2));
            ((squares.sum::<f64>() / VOCAB as f64).sqrt(), bound.into())
        };
        POSITIONS.into_iter().zip(self.expected().chunks_exact(VOCAB + 1)).map(position).collect()
    }

    /// For each position the log-probabilities and the bound.
    fn expected(&self) -> Vec<f32> {
        let bytes = std::fs::read(fixture("kinds.bin")).expect("kinds.bin");
        let numbers: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let length = POSITIONS.len() * (VOCAB + 1);
        assert_eq!(numbers.len(), KINDS.len() * length);
        let which = KINDS.iter().position(|kind| kind.id == self.id).expect("one of them");
        numbers[which * length..][..length].to_vec()
    }
}

/// From 1 to 1.25.
fn add_norm(file: &mut File, folder: &str, stored: &str, len: u64) {
    let mut bytes = stream(&format!("{folder}.weight"), 4 * len as usize);
    for bytes in bytes.as_chunks_mut().0 {
        *bytes = (u32::from_le_bytes(*bytes) & 0x1F_FFFF | 0x3F80_0000).to_le_bytes();
    }
    file.tensors.push(Stored { name: format!("{stored}.weight"), shape: vec![len], kind: 0, offset: None, bytes });
}

#[tokio::test]
async fn every_kind_of_block_says_what_its_numbers_say_but_for_rounded_inputs() {
    for kind in &KINDS {
        for (error, bound) in kind.errors(&kind.file()).await {
            assert!(error <= bound, "{}: {error} of at most {bound}", kind.name);
        }
    }
}

/// In one matrix of fourteen.
#[tokio::test]
async fn a_wrong_nibble_of_its_scales_is_out_of_bounds() {
    for kind in &KINDS {
        let mut file = kind.file();
        let (_, block_bytes) = kind.block;
        let (places, bits) = kind.nibbles.clone();
        for block in file.tensor("blk.1.ffn_down.weight").bytes.chunks_exact_mut(block_bytes) {
            block[places.clone()].iter_mut().for_each(|byte| *byte ^= bits);
        }
        let errors = kind.errors(&file).await;
        assert!(errors.iter().all(|(error, bound)| error > bound), "{}: {errors:?}", kind.name);
    }
}
