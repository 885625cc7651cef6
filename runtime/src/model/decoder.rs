//! The one forward pass. A step is a flat run of tokens over any mix of sequences; read [`Decoder::forward`] first.

use super::{
    layout::{EMBED, HEAD, Stack, qk_norm_widths, stacks},
    spec::{LayerSpec, ModelSpec},
};
use crate::{
    kernels::{
        batch::StepBatch,
        cpu::{Activation, Heads, Kind},
        ops::{Ops, Pool},
    },
    weights::{Tensors, WeightError},
};
use candle_core::{Result, Tensor};
use std::{collections::BTreeMap, sync::Arc};

pub(crate) struct Decoder<O: Ops> {
    pub ops: O,
    heads: Heads,
    activation: Activation,
    norm_eps: f32,
    embed_scale: f32,
    residual_scale: f32,
    logit_scale: f32,
    logit_softcap: Option<f32>,
    embed: O::Matrix,
    layers: Vec<Layer<O>>,
    norm: Tensor,
    /// None: the embedding table is the output matrix too.
    head: Option<O::Matrix>,
    /// cos and sin, `[positions, turned / 2]` each.
    ropes: Vec<(Tensor, Tensor)>,
}

struct Layer<O: Ops> {
    spec: LayerSpec,
    attention_in: Option<Tensor>,
    qkv: Dense<O>,
    /// Weights for queries and for keys.
    qk_norm: Option<(Tensor, Tensor)>,
    attention_out: Dense<O>,
    attention_out_norm: Option<Tensor>,
    mlp_in: Option<Tensor>,
    gate_up: Dense<O>,
    down: Dense<O>,
    mlp_out_norm: Option<Tensor>,
}

/// A matrix of weights with its bias, if it has one.
struct Dense<O: Ops> {
    weights: O::Matrix,
    /// `[outputs]` in f32.
    bias: Option<Tensor>,
}

impl<O: Ops> Decoder<O> {
    /// Logits `[R, vocab]` in f32 for the rows in `batch.sel`. Writes the new tokens' keys and values into `kv`, a pool a
    /// layer.
    pub fn forward(&self, batch: &Arc<StepBatch>, kv: &[Pool]) -> Result<Tensor> {
        let ops = &self.ops;
        let mut h = scaled(ops.embed(&batch.ids, &self.embed)?, self.embed_scale)?;
        let mut x = self.normed(&h, self.layers.first().and_then(|layer| layer.attention_in.as_ref()))?;
        for (i, (layer, pool)) in self.layers.iter().zip(kv).enumerate() {
            let mut qkv = self.dense(&x, &layer.qkv)?;
            if let Some((q, k)) = &layer.qk_norm {
                qkv = ops.qk_norm(qkv, q, k, self.heads, self.norm_eps)?;
            }
            if let Some(table) = layer.spec.rope {
                qkv = ops.rope(qkv, &self.ropes[table], self.heads, batch)?;
            }
            ops.kv_write(pool, &qkv, self.heads, batch)?;
            let mixed = ops.attention(&qkv, pool, self.heads, layer.spec.scores, batch)?;
            let y = self.dense(&mixed, &layer.attention_out)?;
            (h, x) = self.add(h, &y, layer.attention_out_norm.as_ref(), layer.mlp_in.as_ref())?;

            let gated = ops.gate_mul(&self.dense(&x, &layer.gate_up)?, self.activation)?;
            let y = self.dense(&gated, &layer.down)?;
            let next = self.layers.get(i + 1).and_then(|layer| layer.attention_in.as_ref());
            (h, x) = self.add(h, &y, layer.mlp_out_norm.as_ref(), next)?;
        }
        let last = ops.rms_norm(&ops.select(&h, &batch.sel)?, &self.norm, self.norm_eps)?;
        let logits = ops.linear(&last, self.head.as_ref().unwrap_or(&self.embed), None)?;
        let logits = scaled(logits, self.logit_scale)?;
        match self.logit_softcap {
            Some(cap) => ops.softcap(logits, cap),
            None => Ok(logits),
        }
    }

    fn dense(&self, x: &Tensor, dense: &Dense<O>) -> Result<Tensor> {
        self.ops.linear(x, &dense.weights, dense.bias.as_ref())
    }

    fn normed(&self, h: &Tensor, weight: Option<&Tensor>) -> Result<Tensor> {
        weight.map_or_else(|| Ok(h.clone()), |weight| self.ops.rms_norm(h, weight, self.norm_eps))
    }

    /// Adds to the residual stream; also gives what the next part of the model reads of it.
    fn add(&self, h: Tensor, y: &Tensor, own: Option<&Tensor>, next: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let Some(own) = own else { return self.ops.add(h, y, self.residual_scale, next, self.norm_eps) };
        let h = self.ops.add_normed(h, y, own, self.norm_eps, self.residual_scale)?;
        let x = self.normed(&h, next)?;
        Ok((h, x))
    }

    /// Reads the weights and makes them ready. `positions`: how far the rotary tables reach.
    pub fn load(
        ops: O,
        spec: &ModelSpec,
        checkpoint: &dyn Tensors,
        positions: usize,
    ) -> std::result::Result<Decoder<O>, WeightError> {
        let source = Source { ops: &ops, spec, checkpoint };
        let layers = spec.layers.iter().enumerate().map(|(i, layer)| source.layer(i, layer));
        let layers = layers.collect::<std::result::Result<_, WeightError>>()?;
        let table = |name| Ok::<_, WeightError>(ops.matrix(&[checkpoint.matrix(name, spec.vocab, spec.hidden)?])?);
        let ropes = spec.ropes.iter().map(|rope| {
            let (cos, sin) = rope.tables(positions)?;
            Ok((ops.vector(&cos)?, ops.vector(&sin)?))
        });
        Ok(Decoder {
            heads: spec.heads(),
            activation: spec.activation,
            norm_eps: spec.norm_eps,
            embed_scale: spec.embed_scale,
            residual_scale: spec.residual_scale,
            logit_scale: spec.logit_scale,
            logit_softcap: spec.logit_softcap,
            embed: table(EMBED)?,
            layers,
            norm: source.norm("model.norm", spec.hidden)?,
            head: (!spec.tied).then(|| table(HEAD)).transpose()?,
            ropes: ropes.collect::<Result<_>>()?,
            ops,
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
        let mut kinds = BTreeMap::new();
        layers.chain([&self.embed]).chain(&self.head).for_each(|matrix| O::count(matrix, &mut kinds));
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

impl<O: Ops> Layer<O> {
    /// Norms and biases.
    #[cfg(test)]
    fn vector_bytes(&self) -> usize {
        let norms = [&self.attention_in, &self.attention_out_norm, &self.mlp_in, &self.mlp_out_norm];
        let qk_norms = self.qk_norm.iter().flat_map(|(q, k)| [q, k]);
        let biases = self.matrices().into_iter().flat_map(|dense| &dense.bias);
        norms.into_iter().flatten().chain(qk_norms).chain(biases).map(tensor_bytes).sum()
    }

    fn matrices(&self) -> [&Dense<O>; 4] {
        [&self.qkv, &self.attention_out, &self.gate_up, &self.down]
    }
}

/// The tensors of a checkpoint, as a spec wants them.
struct Source<'a, O> {
    ops: &'a O,
    spec: &'a ModelSpec,
    checkpoint: &'a dyn Tensors,
}

impl<O: Ops> Source<'_, O> {
    fn layer(&self, i: usize, layer: &LayerSpec) -> std::result::Result<Layer<O>, WeightError> {
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
        let offset = f64::from(self.spec.norm_offset);
        Ok(self.ops.vector(&if offset == 0.0 { weight } else { (weight + offset)? })?)
    }

    fn dense(&self, i: usize, stack: &Stack) -> std::result::Result<Dense<O>, WeightError> {
        let at = |name: &str, of: &str| format!("model.layers.{i}.{name}.{of}");
        let parts = || stack.parts.iter();
        let raw = parts().map(|(name, outputs)| self.checkpoint.matrix(&at(name, "weight"), *outputs, stack.inputs));
        let weights = self.ops.matrix(&raw.collect::<std::result::Result<Vec<_>, _>>()?)?;
        let biases = parts().filter(|_| stack.bias);
        let biases = biases.map(|(name, outputs)| self.checkpoint.vector(&at(name, "bias"), *outputs));
        let biases = biases.collect::<std::result::Result<Vec<_>, _>>()?;
        let bias = if stack.bias { Some(self.ops.vector(&Tensor::cat(&biases, 0)?)?) } else { None };
        Ok(Dense { weights, bias })
    }
}
