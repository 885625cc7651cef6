//! The one forward pass. A step is a flat run of tokens over any mix of sequences; read [`Decoder::forward`] first.

use super::{
    dense::Dense,
    kv_pools::KvPools,
    layout::{EMBED, HEAD, Stack, qk_norm_widths, stacks},
    spec::{LayerSpec, ModelSpec},
};
use crate::{
    kernels::{
        batch::StepBatch,
        cpu::{
            Activation, Heads, Kind, Packed, Part, Raw, add, add_normed, embed, gate_mul, kv_write, linear,
            paged_attention, qk_norm, rms_norm, rope, softcap,
        },
    },
    weights::{Tensors, WeightError},
};
use candle_core::{Device, Result, Tensor};
use std::{collections::BTreeMap, sync::Arc};

pub(crate) struct Decoder {
    heads: Heads,
    activation: Activation,
    norm_eps: f32,
    embed_scale: f32,
    residual_scale: f32,
    logit_scale: f32,
    logit_softcap: Option<f32>,
    embed: Arc<Packed>,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Arc<Packed>,
    /// cos and sin, `[positions, turned / 2]` each.
    ropes: Vec<(Tensor, Tensor)>,
}

struct Layer {
    spec: LayerSpec,
    attention_in: Option<Tensor>,
    qkv: Dense,
    /// Weights for queries and for keys.
    qk_norm: Option<(Tensor, Tensor)>,
    attention_out: Dense,
    attention_out_norm: Option<Tensor>,
    mlp_in: Option<Tensor>,
    gate_up: Dense,
    down: Dense,
    mlp_out_norm: Option<Tensor>,
}

impl Decoder {
    /// Logits `[R, vocab]` in f32 for the rows in `batch.sel`. Writes the new tokens' keys and values into `kv`.
    pub fn forward(&self, batch: &Arc<StepBatch>, kv: &KvPools) -> Result<Tensor> {
        let h = scaled(embed(Arc::from(batch.ids.as_slice()), &self.embed)?, self.embed_scale)?;
        for (layer, (keys, values)) in self.layers.iter().zip(&kv.layers) {
            let qkv = layer.qkv.forward(&self.normed(&h, layer.attention_in.as_ref())?)?;
            if let Some((q, k)) = &layer.qk_norm {
                let widths = [self.heads.q * self.heads.dim, self.heads.kv * self.heads.dim];
                qk_norm(&qkv, q, k, widths, self.norm_eps)?;
            }
            if let Some(table) = layer.spec.rope {
                let (cos, sin) = &self.ropes[table];
                rope(&qkv, self.heads.q + self.heads.kv, self.heads.dim, (cos, sin), batch)?;
            }
            kv_write(keys, &qkv, Part::Key, self.heads, batch)?;
            kv_write(values, &qkv, Part::Value, self.heads, batch)?;
            let mixed = paged_attention(&qkv, keys, values, self.heads, layer.spec.scores, batch)?;
            self.add(&h, &layer.attention_out.forward(&mixed)?, layer.attention_out_norm.as_ref())?;

            let gate_up = layer.gate_up.forward(&self.normed(&h, layer.mlp_in.as_ref())?)?;
            let gated = gate_mul(&gate_up, self.activation)?;
            self.add(&h, &layer.down.forward(&gated)?, layer.mlp_out_norm.as_ref())?;
        }
        let wanted = Tensor::new(batch.sel.as_slice(), &Device::Cpu)?;
        let last = rms_norm(&h.index_select(&wanted, 0)?, &self.norm, self.norm_eps)?;
        let logits = scaled(linear(&last, &self.head)?, self.logit_scale)?;
        if let Some(cap) = self.logit_softcap {
            softcap(&logits, cap)?;
        }
        Ok(logits)
    }

    fn normed(&self, h: &Tensor, weight: Option<&Tensor>) -> Result<Tensor> {
        weight.map_or_else(|| Ok(h.clone()), |weight| rms_norm(h, weight, self.norm_eps))
    }

    /// Adds to the residual stream `h`, in place.
    fn add(&self, h: &Tensor, y: &Tensor, norm: Option<&Tensor>) -> Result<()> {
        match norm {
            Some(weight) => add_normed(h, y, weight, self.norm_eps, self.residual_scale),
            None => add(h, y, self.residual_scale),
        }
    }

    /// Reads and packs the weights. `positions`: how far the rotary tables reach.
    pub fn load(
        spec: &ModelSpec,
        checkpoint: &dyn Tensors,
        positions: usize,
    ) -> std::result::Result<Decoder, WeightError> {
        let source = Source { spec, checkpoint };
        let pack = |parts: &[Raw]| Packed::stack(parts).map_err(WeightError::from);
        let layers = spec.layers.iter().enumerate().map(|(i, layer)| source.layer(i, layer));
        let layers = layers.collect::<std::result::Result<_, WeightError>>()?;
        let embed = Arc::new(pack(&[checkpoint.matrix(EMBED, spec.vocab, spec.hidden)?])?);
        let head = if spec.tied {
            Arc::clone(&embed)
        } else {
            Arc::new(pack(&[checkpoint.matrix(HEAD, spec.vocab, spec.hidden)?])?)
        };
        Ok(Decoder {
            heads: spec.heads(),
            activation: spec.activation,
            norm_eps: spec.norm_eps,
            embed_scale: spec.embed_scale,
            residual_scale: spec.residual_scale,
            logit_scale: spec.logit_scale,
            logit_softcap: spec.logit_softcap,
            embed,
            layers,
            norm: source.norm("model.norm", spec.hidden)?,
            head,
            ropes: spec.ropes.iter().map(|rope| rope.tables(positions)).collect::<Result<_>>()?,
        })
    }

    /// Bytes of weights and tables held in memory.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        let matrices: usize = self.kinds().values().sum();
        let ropes: usize = self.ropes.iter().map(|(cos, sin)| tensor_bytes(cos) + tensor_bytes(sin)).sum();
        let vectors: usize = self.layers.iter().map(Layer::vector_bytes).sum();
        matrices + vectors + ropes + tensor_bytes(&self.norm)
    }

    /// Bytes of the matrices, by the kind in which they are kept.
    pub fn kinds(&self) -> BTreeMap<Kind, usize> {
        let layers = self.layers.iter().flat_map(Layer::matrices).map(|dense| &dense.weights);
        let head = (!Arc::ptr_eq(&self.embed, &self.head)).then_some(&*self.head);
        let mut kinds = BTreeMap::new();
        for band in layers.chain([&*self.embed]).chain(head).flat_map(|matrix| &matrix.bands) {
            *kinds.entry(band.kind()).or_default() += band.bytes();
        }
        kinds
    }
}

/// A new tensor only where there is something to scale.
fn scaled(x: Tensor, scale: f32) -> Result<Tensor> {
    if scale == 1.0 { Ok(x) } else { x.affine(f64::from(scale), 0.0) }
}

#[cfg(test)]
fn tensor_bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

impl Layer {
    /// Norms and biases.
    #[cfg(test)]
    fn vector_bytes(&self) -> usize {
        let norms = [&self.attention_in, &self.attention_out_norm, &self.mlp_in, &self.mlp_out_norm];
        let qk_norms = self.qk_norm.iter().flat_map(|(q, k)| [q, k]);
        let biases = self.matrices().into_iter().flat_map(|dense| &dense.bias);
        norms.into_iter().flatten().chain(qk_norms).chain(biases).map(tensor_bytes).sum()
    }

    fn matrices(&self) -> [&Dense; 4] {
        [&self.qkv, &self.attention_out, &self.gate_up, &self.down]
    }
}

/// The tensors of a checkpoint, as a spec wants them.
struct Source<'a> {
    spec: &'a ModelSpec,
    checkpoint: &'a dyn Tensors,
}

impl Source<'_> {
    fn layer(&self, i: usize, layer: &LayerSpec) -> std::result::Result<Layer, WeightError> {
        let spec = self.spec;
        let at = |name: &str| format!("model.layers.{i}.{name}");
        let norm = |name: Option<&str>| name.map(|name| self.norm(&at(name), spec.hidden)).transpose();
        let [qkv, attention_out, gate_up, down] = stacks(spec);
        let qk_norm = match qk_norm_widths(spec) {
            None => None,
            Some([q, k]) => Some((self.norm(&at("self_attn.q_norm"), q)?, self.norm(&at("self_attn.k_norm"), k)?)),
        };
        Ok(Layer {
            spec: layer.clone(),
            attention_in: norm(spec.norms.attention_in)?,
            qkv: self.dense(i, &qkv)?,
            qk_norm,
            attention_out: self.dense(i, &attention_out)?,
            attention_out_norm: norm(spec.norms.attention_out)?,
            mlp_in: norm(spec.norms.mlp_in)?,
            gate_up: self.dense(i, &gate_up)?,
            down: self.dense(i, &down)?,
            mlp_out_norm: norm(spec.norms.mlp_out)?,
        })
    }

    fn norm(&self, name: &str, width: usize) -> std::result::Result<Tensor, WeightError> {
        let weight = self.checkpoint.vector(&format!("{name}.weight"), width)?;
        if self.spec.norm_offset == 0.0 { Ok(weight) } else { Ok((weight + f64::from(self.spec.norm_offset))?) }
    }

    fn dense(&self, i: usize, stack: &Stack) -> std::result::Result<Dense, WeightError> {
        let at = |name: &str, of: &str| format!("model.layers.{i}.{name}.{of}");
        let parts = || stack.parts.iter();
        let raw = parts().map(|(name, outputs)| self.checkpoint.matrix(&at(name, "weight"), *outputs, stack.inputs));
        let weights = Packed::stack(&raw.collect::<std::result::Result<Vec<_>, _>>()?)?;
        let biases = parts().filter(|_| stack.bias);
        let biases = biases.map(|(name, outputs)| self.checkpoint.vector(&at(name, "bias"), *outputs));
        let biases = biases.collect::<std::result::Result<Vec<_>, _>>()?;
        let bias = if stack.bias { Some(Tensor::cat(&biases, 0)?) } else { None };
        Ok(Dense { weights, bias })
    }
}
