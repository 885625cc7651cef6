//! `config.json` → [`ModelSpec`]: everything the decoder needs to know, checked. The only place that knows model
//! families by name; what a family does that we cannot do yet is refused here by key, never ignored.

mod families;
mod positions;

use super::{
    fields::{Fields, token_ids},
    rope::RopeSpec,
};
use crate::kernels::cpu::{Activation, Heads, Scores};
use families::{FAMILIES, Family, Softcap, Windows};
use serde_json::Value;

const LAYERS_MAX: usize = 1 << 10;
const CONTEXT_MAX: usize = 1 << 24;

/// A decoder-only transformer: RMS norm, rotary positions, grouped-query attention, gated MLP.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ModelSpec {
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: Vec<LayerSpec>,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    /// Positions the model was trained for, or stretched to.
    pub context: usize,
    pub norms: Norms,
    pub norm_eps: f32,
    /// Added to every norm's weights.
    pub norm_offset: f32,
    pub qk_norm: Option<QkNorm>,
    pub biases: Biases,
    /// The file holds q, k, v as one matrix, and gate, up as another.
    pub fused: bool,
    pub activation: Activation,
    pub embed_scale: f32,
    /// Of what attention and MLP add to the residual stream.
    pub residual_scale: f32,
    pub logit_scale: f32,
    /// After the scale: cap · tanh(logit / cap).
    pub logit_softcap: Option<f32>,
    /// The tables that layers choose from.
    pub ropes: Vec<RopeSpec>,
    /// The embedding table is the output matrix too.
    pub tied: bool,
    /// Tokens that end an answer.
    pub end: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LayerSpec {
    pub scores: Scores,
    /// Which of the model's rotary tables; None: the layer knows no positions.
    pub rope: Option<usize>,
}

/// Where a layer's norms are, by their names in the file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Norms {
    pub attention_in: Option<&'static str>,
    pub attention_out: Option<&'static str>,
    pub mlp_in: Option<&'static str>,
    pub mlp_out: Option<&'static str>,
}

impl Norms {
    const BEFORE: Norms = Norms {
        attention_in: Some("input_layernorm"),
        attention_out: None,
        mlp_in: Some("post_attention_layernorm"),
        mlp_out: None,
    };
    const AFTER: Norms = Norms {
        attention_in: None,
        attention_out: Some("post_attention_layernorm"),
        mlp_in: None,
        mlp_out: Some("post_feedforward_layernorm"),
    };
    const AROUND: Norms = Norms {
        attention_in: Some("input_layernorm"),
        attention_out: Some("post_attention_layernorm"),
        mlp_in: Some("pre_feedforward_layernorm"),
        mlp_out: Some("post_feedforward_layernorm"),
    };
}

/// What a norm of queries and keys is taken over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum QkNorm {
    Head,
    /// All heads of a row together.
    Whole,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Biases {
    pub qkv: bool,
    pub attention_out: bool,
    pub mlp: bool,
}

impl ModelSpec {
    /// `Err` reads after the file's name.
    pub fn from_config(config: &Value) -> Result<ModelSpec, String> {
        let Value::Object(fields) = config else { return Err("is not a JSON object".to_owned()) };
        let fields = Fields::new(fields);
        let asked = fields.text("model_type")?.ok_or("`model_type` is missing")?;
        let family = FAMILIES.iter().find(|family| family.model_type == asked).ok_or_else(|| {
            let known: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
            format!("model_type `{asked}` is not supported (supported: {})", known.join(", "))
        })?;
        let spec = read(&fields, family)?;
        fields.refuse_unread()?;
        spec.check()?;
        Ok(spec)
    }

    pub fn heads(&self) -> Heads {
        Heads { q: self.q_heads, kv: self.kv_heads, dim: self.head_dim }
    }

    /// `generation_config.json` may name more end tokens than `config.json`.
    pub fn add_end(&mut self, ids: Option<&Value>) -> Result<(), String> {
        let ids = token_ids(ids).ok_or("`eos_token_id` must be a token id or a list of token ids")?;
        self.check_end(&ids)?;
        self.end.extend(ids);
        self.end.sort_unstable();
        self.end.dedup();
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        let (q, kv) = (self.q_heads, self.kv_heads);
        if !q.is_multiple_of(kv) {
            return Err(format!("{q} query heads cannot share {kv} key-value heads evenly"));
        }
        let widths =
            [("hidden_size", self.hidden), ("intermediate_size", self.intermediate), ("head_dim", self.head_dim)];
        match widths.iter().find(|(_, width)| *width == 0 || !width.is_multiple_of(16)) {
            Some((name, width)) => Err(format!("`{name}` is {width}; the kernels need a multiple of 16")),
            None => self.check_end(&self.end),
        }
    }

    fn check_end(&self, ids: &[u32]) -> Result<(), String> {
        match ids.iter().find(|&&id| id as usize >= self.vocab) {
            Some(id) => Err(format!("`eos_token_id` {id} is outside the vocabulary of {}", self.vocab)),
            None => Ok(()),
        }
    }
}

fn read(fields: &Fields<'_>, family: &Family) -> Result<ModelSpec, String> {
    let hidden = fields.count("hidden_size", 1 << 16)?;
    let q_heads = fields.count("num_attention_heads", 1 << 10)?;
    let head_dim = fields.count_or("head_dim", 1 << 10, family.head_dim.unwrap_or(hidden / q_heads))?;
    let context = fields.count("max_position_embeddings", CONTEXT_MAX)?;
    let attention_bias = fields.flag("attention_bias", false)?;
    let multiplier = |name| if family.multipliers { fields.positive(name) } else { Ok(None) };
    let [attention_softcap, logit_softcap] = softcaps(fields, family)?;
    let query_scale = match family.query_scalar {
        Some(default) => fields.positive_or("query_pre_attn_scalar", default)?.powf(-0.5),
        // Who multiplies does so by 1 unless the file says otherwise: a head's width is not looked at.
        None if family.multipliers => fields.positive_or("attention_multiplier", 1.0)?,
        None => (head_dim as f64).powf(-0.5),
    };
    let scores = Scores { scale: query_scale as f32, softcap: attention_softcap, window: None };
    let positions = positions::positions(fields, family, head_dim, context)?;
    let embed_scale = if family.embeds_by_root { (hidden as f64).sqrt() } else { 1.0 };
    Ok(ModelSpec {
        hidden,
        intermediate: fields.count("intermediate_size", 1 << 20)?,
        layers: layers(fields, family, scores, positions.ropes.len() - 1)?,
        q_heads,
        kv_heads: fields.count_or("num_key_value_heads", 1 << 10, q_heads)?,
        head_dim,
        vocab: fields.count("vocab_size", 1 << 22)?,
        context: positions.context,
        norms: family.norms,
        norm_eps: fields.positive_or("rms_norm_eps", family.norm_eps)? as f32,
        norm_offset: if family.norms_from_one { 1.0 } else { 0.0 },
        qk_norm: family.qk_norm,
        biases: Biases {
            qkv: attention_bias || family.qkv_bias,
            attention_out: attention_bias,
            mlp: fields.flag("mlp_bias", false)?,
        },
        fused: family.fused,
        activation: activation(fields, family)?,
        embed_scale: multiplier("embedding_multiplier")?.unwrap_or(embed_scale) as f32,
        residual_scale: multiplier("residual_multiplier")?.unwrap_or(1.0) as f32,
        logit_scale: (1.0 / multiplier("logits_scaling")?.unwrap_or(1.0)) as f32,
        logit_softcap,
        ropes: positions.ropes,
        tied: fields.flag("tie_word_embeddings", family.tied)?,
        end: fields.ids("eos_token_id")?,
    })
}

fn activation(fields: &Fields<'_>, family: &Family) -> Result<Activation, String> {
    // Of the two names the longer one is the newer and counts.
    let (newer, older) = (fields.text("hidden_activation")?, fields.text("hidden_act")?);
    match newer.or(older) {
        None => Ok(family.activation),
        Some("silu") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some("gelu") if family.activation == Activation::GeluTanh => Ok(Activation::GeluTanh),
        Some(other) => Err(format!("`hidden_act` \"{other}\" is not supported (supported: silu, gelu_pytorch_tanh)")),
    }
}

fn softcaps(fields: &Fields<'_>, family: &Family) -> Result<[Option<f32>; 2], String> {
    let cap = |name, softcap| match softcap {
        Softcap::Never => Ok(None),
        Softcap::Usual(default) if fields.is_silent(name) => Ok(Some(default as f32)),
        Softcap::Asked | Softcap::Usual(_) => fields.positive(name).map(|cap| cap.map(|cap| cap as f32)),
    };
    let [attention, logits] = family.softcaps;
    Ok([cap("attn_logit_softcapping", attention)?, cap("final_logit_softcapping", logits)?])
}

/// `local_rope`: the rotary table of layers with a window.
fn layers(fields: &Fields<'_>, family: &Family, scores: Scores, local_rope: usize) -> Result<Vec<LayerSpec>, String> {
    let count = fields.count("num_hidden_layers", LAYERS_MAX)?;
    let turned = turned_layers(fields, family, count)?;
    let (window, windowed) = windowed_layers(fields, family, &turned)?;
    let layer = |(turns, windowed): (bool, bool)| LayerSpec {
        scores: Scores { window: window.filter(|_| windowed), ..scores },
        rope: turns.then_some(if windowed { local_rope } else { 0 }),
    };
    Ok(turned.into_iter().zip(windowed).map(layer).collect())
}

/// Which layers have rotary positions.
fn turned_layers(fields: &Fields<'_>, family: &Family, count: usize) -> Result<Vec<bool>, String> {
    let Some(interval) = family.no_rope_interval else { return Ok(vec![true; count]) };
    let interval = fields.count_or("no_rope_layer_interval", LAYERS_MAX, interval)?;
    let Some(list) = fields.get("no_rope_layers") else {
        return Ok((0..count).map(|layer| !(layer + 1).is_multiple_of(interval)).collect());
    };
    let bits: Option<Vec<bool>> = list.as_array().and_then(|list| {
        let bit = |value: &Value| value.as_u64().filter(|&bit| bit <= 1).map(|bit| bit == 1);
        list.iter().map(bit).collect()
    });
    bits.filter(|bits| bits.len() == count)
        .ok_or_else(|| format!("`no_rope_layers` must be a list of {count} numbers, each 0 or 1"))
}

/// The window, and which layers have one.
fn windowed_layers(
    fields: &Fields<'_>,
    family: &Family,
    turned: &[bool],
) -> Result<(Option<usize>, Vec<bool>), String> {
    let count = turned.len();
    let usual: Vec<bool> = match family.windows {
        Windows::Never => vec![false; count],
        Windows::Always => vec![true; count],
        Windows::AllButOneIn(default) => {
            let pattern = fields.count_or("sliding_window_pattern", LAYERS_MAX, default)?;
            (0..count).map(|layer| !(layer + 1).is_multiple_of(pattern)).collect()
        }
        Windows::FromLayer(default) => {
            let first = fields.get("max_window_layers").map_or(Some(default as u64), Value::as_u64);
            let first = first.ok_or("`max_window_layers` must be a whole number")?;
            (0..count).map(|layer| layer as u64 >= first).collect()
        }
        Windows::WithoutRope => turned.iter().map(|turned| !turned).collect(),
    };
    let named: Option<Vec<bool>> = match fields.get("layer_types") {
        None => None,
        Some(types) => {
            let kinds = types.as_array().filter(|types| types.len() == count);
            let kinds = kinds.and_then(|types| {
                let windowed = |kind: &Value| match kind.as_str() {
                    Some("full_attention") => Some(false),
                    Some("sliding_attention") if family.windows != Windows::Never => Some(true),
                    _ => None,
                };
                types.iter().map(windowed).collect()
            });
            Some(kinds.ok_or_else(|| format!("`layer_types` {types} is not supported for this model_type"))?)
        }
    };
    if family.windows == Windows::Always && named.is_some() {
        return Err("`layer_types` is not supported for this model_type".to_owned());
    }
    let asked = match family.windows {
        Windows::Never => false,
        Windows::Always | Windows::AllButOneIn(_) => true,
        Windows::FromLayer(_) | Windows::WithoutRope => fields.flag("use_sliding_window", false)?,
    };
    let window = if !asked {
        // Files carry a window even where none is used.
        if family.windows != Windows::Never {
            fields.get("sliding_window");
        }
        None
    } else if fields.is_silent("sliding_window") {
        family.window
    } else if fields.get("sliding_window").is_some() {
        Some(fields.count("sliding_window", CONTEXT_MAX)?)
    } else {
        None
    };
    Ok((window, named.unwrap_or(usual)))
}
