//! The one forward pass. A step is a flat run of tokens over any mix of sequences; read [`Decoder::forward`] first.

use super::{kv_pools::KvPools, rope, spec::ModelSpec};
use crate::{
    kernels::{
        batch::StepBatch,
        cpu::{
            Heads, Kind, Packed, Part, Raw, embed, kv_write, linear, paged_attention, rms_norm, rope as turn, silu_mul,
        },
    },
    weights::{Tensors, WeightError},
};
use candle_core::{Device, Result, Tensor};
use std::{collections::BTreeMap, sync::Arc};

pub(crate) struct Decoder {
    heads: Heads,
    norm_eps: f32,
    embed: Arc<Packed>,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Arc<Packed>,
    cos: Tensor,
    sin: Tensor,
}

struct Layer {
    attention_norm: Tensor,
    qkv: Packed,
    attention_out: Packed,
    mlp_norm: Tensor,
    gate_up: Packed,
    down: Packed,
}

impl Decoder {
    /// Logits `[R, vocab]` in f32 for the rows in `batch.sel`. Writes the new tokens' keys and values into `kv`.
    pub fn forward(&self, batch: &Arc<StepBatch>, kv: &KvPools) -> Result<Tensor> {
        let mut h = embed(Arc::from(batch.ids.as_slice()), &self.embed)?;
        for (layer, (keys, values)) in self.layers.iter().zip(&kv.layers) {
            let x = rms_norm(&h, &layer.attention_norm, self.norm_eps)?;
            let qkv = linear(&x, &layer.qkv)?;
            turn(&qkv, self.heads.q + self.heads.kv, &self.cos, &self.sin, batch)?;
            kv_write(keys, &qkv, Part::Key, self.heads, batch)?;
            kv_write(values, &qkv, Part::Value, self.heads, batch)?;
            let mixed = paged_attention(&qkv, keys, values, self.heads, batch)?;
            h = (h + linear(&mixed, &layer.attention_out)?)?;

            let x = rms_norm(&h, &layer.mlp_norm, self.norm_eps)?;
            let gated = silu_mul(&linear(&x, &layer.gate_up)?)?;
            h = (h + linear(&gated, &layer.down)?)?;
        }
        let wanted = Tensor::new(batch.sel.as_slice(), &Device::Cpu)?;
        let last = rms_norm(&h.index_select(&wanted, 0)?, &self.norm, self.norm_eps)?;
        linear(&last, &self.head)
    }

    /// Reads and packs the weights. `positions`: how far the rotary tables reach.
    pub fn load(
        spec: &ModelSpec,
        checkpoint: &dyn Tensors,
        positions: usize,
    ) -> std::result::Result<Decoder, WeightError> {
        let (hidden, inner) = (spec.hidden, spec.intermediate);
        let (q, kv) = (spec.q_heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let pack = |parts: &[Raw]| Packed::stack(parts).map_err(WeightError::from);
        let norm = |name: &str| checkpoint.vector(name, hidden);
        let layers = (0..spec.layers).map(|i| {
            let at = |name: &str| format!("model.layers.{i}.{name}.weight");
            let matrix = |name: &str, rows, columns| checkpoint.matrix(&at(name), rows, columns);
            Ok(Layer {
                attention_norm: norm(&at("input_layernorm"))?,
                qkv: pack(&[
                    matrix("self_attn.q_proj", q, hidden)?,
                    matrix("self_attn.k_proj", kv, hidden)?,
                    matrix("self_attn.v_proj", kv, hidden)?,
                ])?,
                attention_out: pack(&[matrix("self_attn.o_proj", hidden, q)?])?,
                mlp_norm: norm(&at("post_attention_layernorm"))?,
                gate_up: pack(&[matrix("mlp.gate_proj", inner, hidden)?, matrix("mlp.up_proj", inner, hidden)?])?,
                down: pack(&[matrix("mlp.down_proj", hidden, inner)?])?,
            })
        });
        let layers = layers.collect::<std::result::Result<_, WeightError>>()?;
        let embed = Arc::new(pack(&[checkpoint.matrix("model.embed_tokens.weight", spec.vocab, hidden)?])?);
        let head = if spec.tied {
            Arc::clone(&embed)
        } else {
            Arc::new(pack(&[checkpoint.matrix("lm_head.weight", spec.vocab, hidden)?])?)
        };
        let (cos, sin) = rope::tables(positions, spec.head_dim, spec.rope_theta)?;
        Ok(Decoder {
            heads: spec.heads(),
            norm_eps: spec.norm_eps,
            embed,
            layers,
            norm: norm("model.norm.weight")?,
            head,
            cos,
            sin,
        })
    }

    /// Bytes of weights and tables held in memory.
    pub fn bytes(&self) -> usize {
        let tensor = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        let norms = |l: &Layer| tensor(&l.attention_norm) + tensor(&l.mlp_norm);
        let tables = tensor(&self.cos) + tensor(&self.sin) + tensor(&self.norm);
        self.kinds().values().sum::<usize>() + self.layers.iter().map(norms).sum::<usize>() + tables
    }

    /// Bytes of the matrices, by the kind in which they are kept.
    pub fn kinds(&self) -> BTreeMap<Kind, usize> {
        let layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.attention_out, &l.gate_up, &l.down]);
        let head = (!Arc::ptr_eq(&self.embed, &self.head)).then_some(&*self.head);
        let mut kinds = BTreeMap::new();
        for band in layers.chain([&*self.embed]).chain(head).flat_map(|matrix| &matrix.bands) {
            *kinds.entry(band.kind()).or_default() += band.bytes();
        }
        kinds
    }
}
