//! GGUF metadata → the `config.json` that the same model has in Hugging Face form. Only what the file says is
//! translated; whether it can be served is for the reader of configurations to decide.

use super::{TokenKind, Vocabulary, architecture::Architecture, metadata::Metadata, names::Biases, reader::Because};
use serde_json::{Map, Value, json};

/// What tensors tell about a model, beside the metadata.
pub(super) struct Evidence {
    /// Rows of the embedding table.
    pub vocab: u64,
    /// There is no output matrix beside the embedding table.
    pub tied: bool,
    pub biases: Biases,
    /// What rotary frequencies are divided by: for every context, or for short and long ones.
    pub rope: RopeFactors,
}

pub(super) enum RopeFactors {
    None,
    All(Vec<f32>),
    ByLength { short: Vec<f32>, long: Vec<f32> },
}

/// Texts of control tokens that end an answer or a turn in the models of these architectures. Files name few of theirs
/// in their metadata.
const ENDS: [&str; 10] = [
    "</s>",
    "<eos>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end_of_turn|>",
];

pub(super) fn config(
    architecture: &Architecture,
    metadata: &Metadata,
    vocabulary: &Vocabulary,
    evidence: &Evidence,
) -> Because<Value> {
    let key = |name: &str| format!("{}.{name}", architecture.name);
    let count = |name: &str| metadata.count(&key(name));
    let require = |name: &str| metadata.require_count(&key(name));
    let real = |name: &str| metadata.real(&key(name));
    if count("expert_count")?.is_some_and(|experts| experts > 0) {
        return Err("has a mixture of experts, which is not supported".to_owned());
    }
    let (hidden, layers, heads) =
        (require("embedding_length")?, require("block_count")?, require("attention.head_count")?);
    let head_dim = match count("attention.key_length")? {
        Some(dim) => dim,
        None if architecture.own_head_dim => return Err(format!("`{}` is missing", key("attention.key_length"))),
        None => hidden.checked_div(heads).ok_or_else(|| format!("`{}` is zero", key("attention.head_count")))?,
    };
    if count("attention.value_length")?.is_some_and(|value| value != head_dim) {
        return Err("has values that are wider or narrower than its keys, which is not supported".to_owned());
    }
    let biases = evidence.biases;
    let mut config = json!({
        "model_type": architecture.model_type,
        "vocab_size": evidence.vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "intermediate_size": require("feed_forward_length")?,
        "max_position_embeddings": require("context_length")?,
        "rms_norm_eps": real("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| format!("`{}` is missing", key("attention.layer_norm_rms_epsilon")))?,
        "rope_theta": real("rope.freq_base")?.unwrap_or(1e4),
        "tie_word_embeddings": evidence.tied,
        // Those of Qwen2's Q, K and V go without saying.
        "attention_bias": biases.attention_out || (biases.qkv && architecture.name != "qwen2"),
        "mlp_bias": biases.mlp,
        "eos_token_id": end_tokens(metadata, vocabulary)?,
    });
    let Value::Object(fields) = &mut config else { return Ok(config) };
    if let Some(bos) = metadata.count("tokenizer.ggml.bos_token_id")? {
        fields.insert("bos_token_id".to_owned(), bos.into());
    }
    let rotated = count("rope.dimension_count")?.unwrap_or(head_dim);
    if rotated != head_dim {
        fields.insert("partial_rotary_factor".to_owned(), json!(rotated as f64 / head_dim as f64));
    }
    let mut add = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            fields.insert(name.to_owned(), value);
        }
    };
    let windows = ["llama", "phi3", "gemma2", "gemma3"].contains(&architecture.name);
    let patterns = ["gemma2", "gemma3"].contains(&architecture.name);
    for (name, known) in [("attention.sliding_window", windows), ("attention.sliding_window_pattern", patterns)] {
        if !known && metadata.has(&key(name)) && count(name)? != Some(0) {
            return Err(format!("sets `{}`, which is not supported for this architecture", key(name)));
        }
    }
    let window = count("attention.sliding_window")?.filter(|&window| window > 0);
    match architecture.name {
        "llama" => {
            // Mistral goes by this name too, and differs in its window.
            if let Some(window) = window {
                add("model_type", Some("mistral".into()));
                add("sliding_window", Some(window.into()));
            }
        }
        "smollm3" => add("no_rope_layer_interval", Some(4.into())),
        "granite" => {
            add("embedding_multiplier", real("embedding_scale")?.map(Value::from));
            add("residual_multiplier", real("residual_scale")?.map(Value::from));
            // Without it llama.cpp scales as others do, transformers by 1.
            let scale = real("attention.scale")?.filter(|&scale| scale != 0.0);
            add("attention_multiplier", Some(scale.unwrap_or((head_dim as f64).powf(-0.5)).into()));
            add("logits_scaling", real("logit_scale")?.map(Value::from));
        }
        "phi3" => {
            add("sliding_window", window.map(Value::from));
            add("original_max_position_embeddings", count("rope.scaling.original_context_length")?.map(Value::from));
        }
        "gemma" => add("hidden_activation", Some("gelu_pytorch_tanh".into())),
        "gemma2" | "gemma3" => {
            add("hidden_activation", Some("gelu_pytorch_tanh".into()));
            add("attn_logit_softcapping", real("attn_logit_softcapping")?.map(Value::from));
            add("final_logit_softcapping", real("final_logit_softcapping")?.map(Value::from));
            add("sliding_window", Some(window.unwrap_or(4096).into()));
            // The file does not say; the two 27B models are the only ones that scale by the width of the model.
            let is_27b = (architecture.name, layers) == ("gemma2", 46) || (architecture.name, layers) == ("gemma3", 62);
            let scale_by = if is_27b { hidden.checked_div(heads).unwrap_or(head_dim) } else { head_dim };
            add("query_pre_attn_scalar", Some(scale_by.into()));
        }
        _ => {}
    }
    add("sliding_window_pattern", count("attention.sliding_window_pattern")?.filter(|&n| n > 0).map(Value::from));
    if architecture.name == "gemma3" {
        add("rope_local_base_freq", Some(real("rope.freq_base_swa")?.unwrap_or(1e4).into()));
    }
    add("rope_scaling", rope_scaling(metadata, &key, &evidence.rope)?);
    Ok(config)
}

/// Every token that ends an answer or a turn: those that the metadata names, and those that are known by their text.
fn end_tokens(metadata: &Metadata, vocabulary: &Vocabulary) -> Because<Vec<u64>> {
    let ends = |(token, kind): (&String, &TokenKind)| {
        matches!(kind, TokenKind::Control | TokenKind::UserDefined) && ENDS.contains(&token.as_str())
    };
    let tokens = (0..).zip(vocabulary.tokens.iter().zip(&vocabulary.kinds));
    let mut ids: Vec<u64> = tokens.filter(|&(_, token)| ends(token)).map(|(id, _)| id).collect();
    for name in ["eos", "eot", "eom"] {
        ids.extend(metadata.count(&format!("tokenizer.ggml.{name}_token_id"))?);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn rope_scaling(metadata: &Metadata, key: &dyn Fn(&str) -> String, factors: &RopeFactors) -> Because<Option<Value>> {
    let original = metadata.count(&key("rope.scaling.original_context_length"))?;
    let stored = match metadata.real(&key("rope.scaling.factor"))? {
        Some(factor) => Some(factor),
        None => metadata.real(&key("rope.scale_linear"))?,
    };
    // Files say 0 or 1 for no factor, and leave the type out where they mean the linear one.
    let factor = stored.filter(|&factor| factor != 0.0 && factor != 1.0);
    let usual = if factor.is_some() { "linear" } else { "none" };
    let kind = metadata.text(&key("rope.scaling.type"))?.unwrap_or(usual);
    let attention = metadata.real(&key("rope.scaling.attn_factor"))?;
    let mut scaling = Map::new();
    let mut add = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            scaling.insert(name.to_owned(), value);
        }
    };
    match (factors, kind) {
        (_, "none") if factor.is_some() => {
            return Err("has a factor for its rotary positions and says that they are not scaled".to_owned());
        }
        (RopeFactors::None, "none") => return Ok(None),
        (RopeFactors::None, "linear") if factor.is_none() => return Ok(None),
        (RopeFactors::None, "linear" | "yarn") => {
            add("rope_type", Some(kind.into()));
            add("factor", Some(stored.ok_or_else(|| format!("`{}` is missing", key("rope.scaling.factor")))?.into()));
            if kind == "yarn" {
                add("original_max_position_embeddings", original.map(Value::from));
                for (name, stored) in [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")] {
                    add(name, metadata.real(&key(&format!("rope.scaling.{stored}")))?.map(Value::from));
                }
            }
        }
        // A list of divisors without a rule, as Llama 3 has it, is the rule of longrope with the same list twice.
        (RopeFactors::All(factors), "none" | "linear") if factor.is_none() => {
            add("rope_type", Some("longrope".into()));
            add("short_factor", Some(json!(factors)));
            add("long_factor", Some(json!(factors)));
            add("factor", Some(1.0.into()));
            add("attention_factor", Some(1.0.into()));
            add("original_max_position_embeddings", metadata.count(&key("context_length"))?.map(Value::from));
        }
        (RopeFactors::ByLength { short, long }, "none" | "longrope") if factor.is_none() => {
            add("rope_type", Some("longrope".into()));
            add("short_factor", Some(json!(short)));
            add("long_factor", Some(json!(long)));
            add("attention_factor", attention.map(Value::from));
            add("original_max_position_embeddings", original.map(Value::from));
        }
        (_, other) => return Err(format!("scales rotary positions in a way that is not supported: `{other}`")),
    }
    Ok(Some(Value::Object(scaling)))
}

#[cfg(test)]
mod tests;
