//! Which matrices a decoder's layer is made of, and what a whole decoder will take of memory, by the headers of its files.

use super::spec::{ModelSpec, QkNorm};
use crate::{
    kernels::cpu::{Kind, Packed},
    memory::Memory,
    weights::{Tensors, WeightError},
};

pub(crate) const EMBED: &str = "model.embed_tokens.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

const F32: usize = size_of::<f32>();

/// Matrices of one width that are kept on top of each other.
pub(crate) struct Stack {
    /// Name within the layer, and height.
    pub parts: Vec<(&'static str, usize)>,
    pub inputs: usize,
    pub bias: bool,
}

/// The four products of a layer: into attention, out of it, into the MLP, out of it.
pub(crate) fn stacks(spec: &ModelSpec) -> [Stack; 4] {
    let (hidden, inner) = (spec.hidden, spec.intermediate);
    let (q, kv) = (spec.q_heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    let (qkv, gate_up) = if spec.fused {
        (vec![("self_attn.qkv_proj", q + 2 * kv)], vec![("mlp.gate_up_proj", 2 * inner)])
    } else {
        (
            vec![("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
            vec![("mlp.gate_proj", inner), ("mlp.up_proj", inner)],
        )
    };
    [
        Stack { parts: qkv, inputs: hidden, bias: spec.biases.qkv },
        Stack { parts: vec![("self_attn.o_proj", hidden)], inputs: q, bias: spec.biases.attention_out },
        Stack { parts: gate_up, inputs: hidden, bias: spec.biases.mlp },
        Stack { parts: vec![("mlp.down_proj", hidden)], inputs: inner, bias: spec.biases.mlp },
    ]
}

/// Widths of the norms of queries and of keys.
pub(crate) fn qk_norm_widths(spec: &ModelSpec) -> Option<[usize; 2]> {
    spec.qk_norm.map(|norm| match norm {
        QkNorm::Head => [spec.head_dim; 2],
        QkNorm::Whole => [spec.q_heads * spec.head_dim, spec.kv_heads * spec.head_dim],
    })
}

/// The largest step.
pub(crate) struct Step {
    pub tokens: usize,
    /// Of them, those whose logits are wanted.
    pub rows: usize,
}

/// Of a decoder with rotary tables for `positions` and steps of this size, whatever its KV pool takes (0 here).
pub(crate) fn memory(
    spec: &ModelSpec,
    tensors: &dyn Tensors,
    positions: usize,
    step: &Step,
) -> Result<Memory, WeightError> {
    let stacks = stacks(spec);
    let mut sum = Sum { tensors, weights: 0, staging: 0 };
    for layer in 0..spec.layers.len() {
        for stack in &stacks {
            let parts = stack.parts.iter().map(|(name, rows)| (format!("model.layers.{layer}.{name}.weight"), *rows));
            sum.add(&parts.collect::<Vec<_>>(), stack.inputs)?;
        }
    }
    let tables = if spec.tied { &[EMBED][..] } else { &[EMBED, HEAD] };
    for name in tables {
        sum.add(&[((*name).to_owned(), spec.vocab)], spec.hidden)?;
    }

    let norms = &spec.norms;
    let norms = [norms.attention_in, norms.attention_out, norms.mlp_in, norms.mlp_out].iter().flatten().count();
    let qk_norms: usize = qk_norm_widths(spec).into_iter().flatten().sum();
    let biases: usize =
        stacks.iter().filter(|stack| stack.bias).flat_map(|stack| &stack.parts).map(|part| part.1).sum();
    let vectors = spec.layers.len() * (norms * spec.hidden + qk_norms + biases) + spec.hidden;
    let ropes: usize = spec.ropes.iter().map(|rope| positions * rope.dims).sum();

    // The residual stream, its norm and what is added to it; beside them either of a layer's halves.
    let [qkv, _, gate_up, _] = stacks.map(|stack| stack.parts.iter().map(|part| part.1).sum::<usize>());
    let attention = qkv + spec.q_heads * spec.head_dim;
    let activations = step.tokens * (3 * spec.hidden + attention.max(gate_up + spec.intermediate));
    // As the kernels leave them and as the sampler takes them.
    let logits = 2 * step.rows * spec.vocab;
    Ok(Memory {
        weights: (sum.weights + vectors * F32) as u64,
        tables: (ropes * F32) as u64,
        kv: 0,
        workspace: ((activations + logits) * F32) as u64,
        staging: sum.staging as u64,
    })
}

struct Sum<'a> {
    tensors: &'a dyn Tensors,
    weights: usize,
    staging: usize,
}

impl Sum<'_> {
    /// Parts by name and height.
    fn add(&mut self, parts: &[(String, usize)], inputs: usize) -> Result<(), WeightError> {
        let bytes = |kind: Kind, rows: usize| kind.row_bytes(inputs).map_or(0, |row| row * rows);
        let (mut given, mut all, mut one) = (Vec::new(), 0, 0);
        for (name, rows) in parts {
            let [stored, kind] = self.tensors.kinds(name, *rows, inputs)?;
            given.push((kind, *rows));
            all += bytes(kind, *rows);
            one = if stored == kind { one } else { one.max(bytes(stored, *rows)) };
        }
        self.weights += Packed::stacked_bytes(&given, inputs);
        self.staging = self.staging.max(all + one);
        Ok(())
    }
}
