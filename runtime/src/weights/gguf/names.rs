//! Hugging Face tensor names → the names a GGUF file uses. Source: the name table of the Python package `gguf`.

use super::architecture::Architecture;

/// What the file calls the tensor `name`; None if no tensor of this architecture is called so.
pub(super) fn stored(architecture: &Architecture, name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".to_owned()),
        "model.norm.weight" => return Some("output_norm.weight".to_owned()),
        "lm_head.weight" => return Some("output.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (module, part) = rest.rsplit_once('.')?;
    let stored = in_layer(architecture, module)?;
    Some(format!("blk.{layer}.{stored}.{part}"))
}

fn in_layer(architecture: &Architecture, module: &str) -> Option<&'static str> {
    Some(match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.qkv_proj" => "attn_qkv",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        // The same name stands before the MLP in some families and after attention in others.
        "post_attention_layernorm" if architecture.post_norms => "post_attention_norm",
        "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    })
}

/// Which matrices of a layer come with a bias.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Biases {
    pub qkv: bool,
    pub attention_out: bool,
    pub mlp: bool,
}

impl Biases {
    /// As the first layer has them. `has`: whether the file holds a tensor.
    pub fn found(architecture: &Architecture, has: impl Fn(&str) -> bool) -> Biases {
        let any = |modules: &[&str]| modules.iter().any(|module| has(&format!("blk.0.{module}.bias")));
        Biases {
            qkv: any(qkv(architecture)),
            attention_out: any(&ATTENTION_OUT),
            mlp: any(gate_up(architecture)) || any(&DOWN),
        }
    }
}

/// Whether the decoder of this architecture reads `stored`, or it shapes the configuration. A tensor that nobody reads
/// would change the answers of whoever made the file, and not ours.
pub(super) fn is_read(architecture: &Architecture, layers: u64, biases: Biases, stored: &str) -> bool {
    if ["token_embd.weight", "output_norm.weight", "output.weight"].contains(&stored) || is_rope(stored) {
        return true;
    }
    let Some((layer, rest)) = stored.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else { return false };
    let matrices = [
        (qkv(architecture), biases.qkv),
        (&ATTENTION_OUT, biases.attention_out),
        (gate_up(architecture), biases.mlp),
        (&DOWN, biases.mlp),
    ];
    let norms: [(&[&str], bool); 3] = [
        (&["attn_norm", "ffn_norm"], architecture.pre_norms),
        (&["post_attention_norm", "post_ffw_norm"], architecture.post_norms),
        (&["attn_q_norm", "attn_k_norm"], architecture.qk_norms),
    ];
    let is_one_of = |groups: &[(&[&str], bool)], module: &str| {
        groups.iter().any(|(modules, there)| *there && modules.contains(&module))
    };
    let is_in_layer = match rest.split_once('.') {
        Some((module, "weight")) => {
            is_one_of(&matrices.map(|(names, _)| (names, true)), module) || is_one_of(&norms, module)
        }
        Some((module, "bias")) => is_one_of(&matrices, module),
        _ => false,
    };
    is_in_layer && layer.parse::<u64>().is_ok_and(|layer| layer < layers)
}

const ATTENTION_OUT: [&str; 1] = ["attn_output"];
const DOWN: [&str; 1] = ["ffn_down"];

fn qkv(architecture: &Architecture) -> &'static [&'static str] {
    if architecture.fused { &["attn_qkv"] } else { &["attn_q", "attn_k", "attn_v"] }
}

fn gate_up(architecture: &Architecture) -> &'static [&'static str] {
    if architecture.fused { &["ffn_up"] } else { &["ffn_gate", "ffn_up"] }
}

/// Factors of rotary frequencies.
fn is_rope(stored: &str) -> bool {
    [ROPE_FREQS, ROPE_LONG, ROPE_SHORT].contains(&stored)
}

pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";
pub(super) const ROPE_LONG: &str = "rope_factors_long.weight";
pub(super) const ROPE_SHORT: &str = "rope_factors_short.weight";
