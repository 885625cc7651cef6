//! GGUF files that lie: each is refused with a clear error that names the file, in little time and memory.

use crate::{
    gguf_file::{File, Stored, i32_list, number, real, text, text_list},
    support::{Temporary, settings},
};
use glassgate_runtime::{LoadError, LoadOptions, Runtime};
use proptest::prelude::*;
use std::time::{Duration, Instant};

fn load(bytes: &[u8]) -> Result<(), LoadError> {
    let folder = Temporary::new();
    folder.write("model.gguf", bytes);
    let runtime = Runtime::start(settings()).expect("valid settings");
    runtime.load("tiny", &folder.0.join("model.gguf"), &LoadOptions::default()).map(drop)
}

/// Generous: a loaded machine is slow, and what would not end takes for ever.
const PATIENCE: Duration = Duration::from_secs(10);

#[track_caller]
fn assert_refused(bytes: &[u8], says: &str) {
    let began = Instant::now();
    let error = load(bytes).err().unwrap_or_else(|| panic!("loaded, expected: {says}"));
    assert!(began.elapsed() < PATIENCE, "{says}");
    let message = error.to_string();
    let LoadError::File { file, why } = error else { panic!("{message}") };
    assert!(file.ends_with("model.gguf"), "{message}");
    assert!(why.contains(says), "{why:?} does not say {says:?}");
}

fn changed(change: impl FnOnce(&mut File)) -> Vec<u8> {
    let mut file = File::of_bytes();
    change(&mut file);
    file.bytes()
}

const Q: &str = "blk.0.attn_q.weight";
const EMBED: &str = "token_embd.weight";

#[test]
fn the_unchanged_file_loads() {
    load(&File::of_bytes().bytes()).expect("a valid file");
    let version_2 = changed(|file| file.version = 2);
    load(&version_2).expect("version 2 is the same");
}

#[test]
fn headers_that_lie_are_found_out() {
    let whole = File::of_bytes().bytes();
    for len in [4, 8, 12, 15, 1000, 4000] {
        assert_refused(&whole[..len], "is truncated or damaged");
    }
    for len in [16, 23, 24, 30, 100, 300] {
        assert_refused(&whole[..len], "tensors, more than it can hold");
    }
    assert_refused(&whole[..3], "is truncated");
    assert_refused(&whole[..whole.len() / 2], "of the data, the file has");
    assert_refused(b"", "is truncated");
    assert_refused(&[b"GGML", &whole[4..]].concat(), "not a GGUF file");
    for (version, says) in [(0u32, "version 0"), (1, "version 1"), (4, "version 4"), (0x0300_0000, "big endian")] {
        assert_refused(&changed(|file| file.version = version), says);
    }
    let file = File::of_bytes();
    let (tensors, pairs) = (file.tensors.len() as u64, file.pairs.len() as u64);
    for absurd in [1 << 20, 1 << 32, 1 << 62, u64::MAX] {
        assert_refused(&file.with_counts(absurd, pairs), "tensors, more than it can hold");
        assert_refused(&file.with_counts(tensors, absurd), "metadata pairs, more than it can hold");
    }
    // One too many reads on into what follows.
    assert_refused(&file.with_counts(tensors + 1, pairs), "tensor");
    assert_refused(&file.with_counts(tensors, pairs + 1), "claims");
}

#[test]
fn metadata_that_lies_is_found_out() {
    let pair = |key: &'static str, value: Vec<u8>| changed(|file| file.set(key, value));
    let raw = |kind: u32, bytes: &[u8]| [&kind.to_le_bytes(), bytes].concat();
    let max = u64::MAX.to_le_bytes();
    let cases = [
        (pair("x", raw(8, &max)), "claims 18446744073709551615 bytes of text"),
        (pair("x", raw(8, &(1u64 << 40).to_le_bytes())), "bytes of text"),
        (pair("x", raw(8, &[&2u64.to_le_bytes()[..], &[0xFF, 0xFE]].concat())), "is not UTF-8"),
        (pair("x", raw(9, &[&0u32.to_le_bytes()[..], &max].concat())), "items of `x`"),
        (pair("x", raw(9, &[&8u32.to_le_bytes()[..], &(1u64 << 33).to_le_bytes()].concat())), "items of `x`"),
        (pair("x", raw(9, &[&12u32.to_le_bytes()[..], &(1u64 << 61).to_le_bytes()].concat())), "items of `x`"),
        (pair("x", raw(9, &[&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat())), "array of arrays"),
        (pair("x", raw(9, &[&99u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat())), "unknown type 99"),
        (pair("x", raw(13, &[])), "unknown type 13"),
        (pair("x", raw(7, &[2])), "neither true nor false"),
        (pair("general.alignment", number(0)), "power of two"),
        (pair("general.alignment", number(7)), "power of two"),
        (pair("general.alignment", number(48)), "power of two"),
        (pair("general.alignment", number(1 << 31)), "power of two"),
        (pair("general.alignment", text("32")), "must be a whole number"),
        (pair("general.architecture", text("mamba")), "has the architecture `mamba` (supported: llama"),
        (pair("general.architecture", number(1)), "must be a string"),
        (pair("split.count", number(3)), "one of several parts"),
        (pair("llama.expert_count", number(8)), "mixture of experts"),
        (pair("llama.embedding_length", number(0)), "hidden_size"),
        (pair("llama.embedding_length", number(u32::MAX)), "hidden_size"),
        (pair("llama.attention.head_count", number(0)), "is zero"),
        (pair("llama.attention.head_count", i32_list(&[2])), "must be a whole number"),
        (pair("llama.attention.value_length", number(64)), "values that are wider"),
        (pair("llama.block_count", number(2)), "tensor `blk.1.attn_q.weight` is missing"),
        (pair("llama.attention.layer_norm_rms_epsilon", real(f32::NAN)), "finite"),
        (pair("llama.rope.scaling.type", text("spiral")), "`spiral`"),
        (pair("tokenizer.ggml.model", text("rwkv")), "of the kind `rwkv` (supported: gpt2, llama)"),
        (pair("tokenizer.ggml.pre", text("nonsense")), "by the rule `nonsense`"),
        (pair("tokenizer.ggml.merges", text_list(&["a b c".to_owned()])), "has the merge \"a b c\""),
        (pair("tokenizer.ggml.merges", text_list(&["zz yy".to_owned()])), "is not a valid tokenizer"),
        (pair("tokenizer.ggml.tokens", text_list(&["a".to_owned(), "a".to_owned()])), "twice"),
        (pair("tokenizer.ggml.tokens", text_list(&["x".repeat(5000)])), "has 5000 bytes"),
        (pair("tokenizer.ggml.tokens", text_list(&[])), "is not one of 0 tokens"),
        (pair("tokenizer.ggml.token_type", i32_list(&[1; 3])), "has 3 items for 256 tokens"),
        (pair("tokenizer.ggml.token_type", i32_list(&[77; 256])), "unknown type 77"),
        (pair("tokenizer.ggml.eos_token_id", number(9999)), "is not one of 256 tokens"),
        (pair("tokenizer.chat_template", text("{% for %}")), "chat template does not work"),
    ];
    for (bytes, says) in cases {
        assert_refused(&bytes, says);
    }
    for key in [
        "general.architecture",
        "llama.embedding_length",
        "llama.context_length",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.pre",
    ] {
        assert_refused(&changed(|file| file.remove(key)), &format!("`{key}` is missing"));
    }
    assert_refused(&changed(|file| file.pairs.push(("general.architecture".to_owned(), text("llama")))), "comes twice");
    assert_refused(&changed(|file| file.pairs.push(("k".repeat(2000), number(1)))), "of 2000 bytes");
}

#[test]
fn tensor_tables_that_lie_are_found_out() {
    let tensor = |name: &'static str, change: &dyn Fn(&mut Stored)| changed(|file| change(file.tensor(name)));
    let with = |name: &str, len: u64| {
        let bytes = vec![0; 4 * len as usize];
        changed(|file| {
            file.tensors.push(Stored { name: name.to_owned(), shape: vec![len], kind: 0, offset: None, bytes })
        })
    };
    let cases = [
        (tensor(Q, &|t| t.shape = vec![1 << 33, 1 << 31]), "is larger than any file"),
        (tensor(Q, &|t| t.shape = vec![u64::MAX, u64::MAX]), "is larger than any file"),
        (tensor(Q, &|t| t.shape = vec![1 << 40, 1]), "of the data, the file has"),
        (tensor(Q, &|t| t.shape = vec![0, 32]), "does not consist of blocks"),
        (tensor(Q, &|t| t.shape = vec![]), "has 0 dimensions"),
        (tensor(Q, &|t| t.shape = vec![1; 5]), "has 5 dimensions"),
        (tensor(Q, &|t| t.shape = vec![8, 2, 2, 32]), "neither a vector nor a matrix"),
        (tensor(Q, &|t| t.shape = vec![16, 64]), "its metadata asks for [32, 32]"),
        (tensor(EMBED, &|t| t.shape = vec![64, 128]), "vocab_size"),
        (tensor(Q, &|t| t.kind = 12), "does not consist of blocks of 256"),
        (tensor(Q, &|t| t.kind = 10), "has type Q2_K (supported: F32"),
        (tensor(Q, &|t| t.kind = 20), "has type IQ4_NL"),
        (tensor(Q, &|t| t.kind = 4), "has the unknown type 4"),
        (tensor(Q, &|t| t.kind = u32::MAX), "has the unknown type"),
        (tensor(Q, &|t| t.offset = Some(u64::MAX - 31)), "of the data, the file has"),
        (tensor(Q, &|t| t.offset = Some(1 << 40)), "of the data, the file has"),
        (tensor(Q, &|t| t.offset = Some(33)), "is not aligned to 32"),
        (tensor(Q, &|t| t.offset = Some(0)), "overlap"),
        (tensor(Q, &|t| t.name = "blk.0.attn_k.weight".to_owned()), "comes twice"),
        (tensor(Q, &|t| t.name = "blk.0.ssm_a.weight".to_owned()), "not known of `llama`"),
        (with("blk.0.attn_q_norm.weight", 16), "`blk.0.attn_q_norm.weight`, which is not known of `llama`"),
        (with("blk.0.attn_norm.bias", 32), "`blk.0.attn_norm.bias`, which is not known of `llama`"),
        (with("blk.1.attn_norm.weight", 32), "`blk.1.attn_norm.weight`, which is not known of `llama`"),
        (with("blk.0.ffn_up.bias", 48), "tensor `blk.0.ffn_gate.bias` is missing"),
        (with("blk.0.attn_v.bias", 16), "tensor `blk.0.attn_q.bias` is missing"),
        (tensor(Q, &|t| t.name = "x".repeat(3000)), "tensor name of 3000 bytes"),
        (tensor(Q, &|t| t.name = "output.weight".to_owned()), "tensor `blk.0.attn_q.weight` is missing"),
        (tensor(EMBED, &|t| t.name = "output.weight".to_owned()), "tensor `token_embd.weight` is missing"),
        (tensor(Q, &|t| t.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes())), "not finite"),
        (tensor(Q, &|t| t.bytes[8..12].copy_from_slice(&f32::INFINITY.to_le_bytes())), "not finite"),
    ];
    for (bytes, says) in cases {
        assert_refused(&bytes, says);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever happens to the bytes: a clear error or a model that loads, never a panic.
    #[test]
    fn damaged_gguf_files_never_panic(
        cuts in proptest::collection::vec((0.0f64..1.0, any::<u8>()), 0..6), end in 0.5f64..1.3,
    ) {
        let mut bytes = File::of_bytes().bytes();
        let reach = 5000.min(bytes.len());
        for (place, byte) in cuts {
            bytes[(place * reach as f64) as usize] = byte;
        }
        bytes.truncate((end * bytes.len() as f64) as usize);
        if let Err(error) = load(&bytes) {
            prop_assert!(error.to_string().contains("model.gguf"), "{}", error);
        }
    }
}
