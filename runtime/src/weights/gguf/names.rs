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

/// Whether `stored` is a tensor that [`stored`] can give, or one that shapes the configuration: of any other we would
/// not know what it does.
pub(super) fn is_known(stored: &str) -> bool {
    if ["token_embd.weight", "output_norm.weight", "output.weight"].contains(&stored) || is_rope(stored) {
        return true;
    }
    let Some((layer, rest)) = stored.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else { return false };
    let Some((module, part)) = rest.split_once('.') else { return false };
    let modules = [
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_qkv",
        "attn_output",
        "attn_q_norm",
        "attn_k_norm",
        "post_attention_norm",
        "ffn_norm",
        "post_ffw_norm",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ];
    layer.parse::<u32>().is_ok() && modules.contains(&module) && ["weight", "bias"].contains(&part)
}

/// Factors of rotary frequencies.
pub(super) fn is_rope(stored: &str) -> bool {
    [ROPE_FREQS, ROPE_LONG, ROPE_SHORT].contains(&stored)
}

pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";
pub(super) const ROPE_LONG: &str = "rope_factors_long.weight";
pub(super) const ROPE_SHORT: &str = "rope_factors_short.weight";
