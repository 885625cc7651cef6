//! A GGUF file's vocabulary → the `tokenizer.json` that the same model has in Hugging Face form, so that there is one
//! tokenizer for both.

use crate::weights::gguf::{TokenKind, Vocabulary, VocabularyModel};
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// SentencePiece's stand-in for a space.
const SPACE: &str = "\u{2581}";

const GPT2: Words = Words { cuts: &[], digits: false, byte_words: true, whole_words: false, nfc: false };
const LLAMA3: Words = Words { cuts: &[LLAMA3_CUT], digits: false, byte_words: false, whole_words: true, nfc: false };

const LLAMA3_CUT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_CUT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN_CUT: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O_CUT: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How text is cut into the words that merging stays within.
struct Words {
    /// Regular expressions, applied one after another.
    cuts: &'static [&'static str],
    /// Every digit is a word.
    digits: bool,
    /// GPT-2's own expression is applied too.
    byte_words: bool,
    /// A word that is a token is one, whatever the merges say.
    whole_words: bool,
    /// Text is composed first (Unicode NFC).
    nfc: bool,
}

/// The rules by the names that `tokenizer.ggml.pre` gives them. Facts: the models' own tokenizer.json files.
fn words(pre: &str) -> Result<Words, String> {
    Ok(match pre {
        "gpt-2" | "olmo" | "granite-docling" => GPT2,
        "smollm" | "starcoder" | "refact" => Words { digits: true, ..GPT2 },
        "llama-bpe" | "llama3" | "llama-v3" => LLAMA3,
        "smaug-bpe" | "dbrx" => Words { whole_words: false, ..LLAMA3 },
        "qwen2" => Words { cuts: &[QWEN2_CUT], whole_words: false, nfc: true, ..LLAMA3 },
        "tekken" => Words { cuts: &[TEKKEN_CUT], ..LLAMA3 },
        "gpt-4o" => Words { cuts: &[GPT4O_CUT], whole_words: false, ..LLAMA3 },
        other => {
            let known = "gpt-2, olmo, granite-docling, smollm, starcoder, refact, llama-bpe, smaug-bpe, dbrx, qwen2, tekken, gpt-4o";
            return Err(format!("cuts text by the rule `{other}`, which is not known (known: {known})"));
        }
    })
}

/// `Err` reads after the file's name.
pub(super) fn tokenizer_json(vocabulary: &Vocabulary) -> Result<String, String> {
    let mut vocab = Map::new();
    let mut added = Vec::new();
    for (id, (token, &kind)) in vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate() {
        if kind == TokenKind::Unused {
            continue;
        }
        if vocab.insert(token.clone(), id.into()).is_some() {
            return Err(format!("has the token {token:?} twice"));
        }
        let special = matches!(kind, TokenKind::Control | TokenKind::Unknown);
        if special || kind == TokenKind::UserDefined {
            let rstrip = vocabulary.control_eats_space
                && special
                && !["<unk>", "<s>", "<|endoftext|>"].contains(&token.as_str());
            added.push(json!({
                "id": id, "content": token, "special": special,
                "single_word": false, "lstrip": false, "rstrip": rstrip, "normalized": false,
            }));
        }
    }
    let (normalizer, pre_tokenizer, decoder, model) = match &vocabulary.model {
        VocabularyModel::Bytes { pre, merges } => bytes(&words(pre)?, vocab, merges)?,
        VocabularyModel::Scored { scores, space_before } => scored(vocabulary, vocab, scores, *space_before),
    };
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": decoder, "model": model,
    });
    Ok(json.to_string())
}

fn bytes(words: &Words, vocab: Map<String, Value>, merges: &[String]) -> Result<(Value, Value, Value, Value), String> {
    // Checked here, where the message can say more.
    if let Some(bad) = merges.iter().find(|merge| merge.split(' ').filter(|part| !part.is_empty()).count() != 2) {
        return Err(format!("has the merge {bad:?}, expected two tokens with a space between"));
    }
    let byte_level = |use_regex| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let cuts = words
        .cuts
        .iter()
        .map(|cut| json!({"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": false}));
    let digits = words.digits.then(|| json!({"type": "Digits", "individual_digits": true}));
    let steps: Vec<Value> = digits.into_iter().chain(cuts).chain([byte_level(words.byte_words)]).collect();
    let normalizer = if words.nfc { json!({"type": "NFC"}) } else { Value::Null };
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": words.whole_words,
        "vocab": vocab, "merges": merges,
    });
    Ok((normalizer, json!({"type": "Sequence", "pretokenizers": steps}), byte_level(true), model))
}

fn scored(
    vocabulary: &Vocabulary,
    vocab: Map<String, Value>,
    scores: &[f32],
    space_before: bool,
) -> (Value, Value, Value, Value) {
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let before = space_before.then(|| json!({"type": "Prepend", "prepend": SPACE}));
    let normalizers: Vec<Value> = before.into_iter().chain([spaces]).collect();
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]});
    let unknown = vocabulary.kinds.iter().position(|&kind| kind == TokenKind::Unknown).map(|id| &vocabulary.tokens[id]);
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
        "vocab": vocab, "merges": merges_of(vocabulary, scores),
    });
    (json!({"type": "Sequence", "normalizers": normalizers}), Value::Null, decoder, model)
}

/// The merges that lead to the same tokens as SentencePiece's rule "merge the pair whose whole has the best score":
/// every way to put a token together from two others, best score first.
fn merges_of(vocabulary: &Vocabulary, scores: &[f32]) -> Vec<[String; 2]> {
    let is_text = |id: usize| matches!(vocabulary.kinds[id], TokenKind::Normal | TokenKind::UserDefined);
    let ids: HashMap<&str, usize> = vocabulary
        .tokens
        .iter()
        .enumerate()
        .filter(|&(id, _)| is_text(id))
        .map(|(id, token)| (token.as_str(), id))
        .collect();
    let mut merges: Vec<(f32, &str, &str)> = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate().filter(|&(id, _)| is_text(id)) {
        let mut ways: Vec<(usize, usize, &str, &str)> = token
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = token.split_at(at);
                Some((*ids.get(left)?, *ids.get(right)?, left, right))
            })
            .collect();
        ways.sort_unstable();
        merges.extend(ways.into_iter().map(|(_, _, left, right)| (scores[id], left, right)));
    }
    let len = |text: &str| text.chars().count();
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(len(b.1).cmp(&len(a.1))).then(len(b.2).cmp(&len(a.2))));
    merges.into_iter().map(|(_, left, right)| [left.to_owned(), right.to_owned()]).collect()
}
