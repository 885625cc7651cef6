//! Encoders of the BERT family: a flat run of whole texts in, one vector a text out. Read [`Bert::begin`], `layer` and
//! `finish` first: between layers others may have the device.

mod pooling;
pub(crate) mod spec;
#[cfg(test)]
mod tests;

use crate::{
    kernels::{
        cpu::{Inputs, Kind, Packed, Raw, add_layer_norm, bias_gelu, linear, text_attention},
        texts::TextBatch,
    },
    memory::Memory,
    weights::{Tensors, WeightError},
};
use candle_core::{Device, Result, Tensor};
use spec::BertSpec;
use std::sync::Arc;

pub(crate) struct Bert {
    spec: BertSpec,
    /// `[vocab, H]`
    words: Tensor,
    /// `[positions, H]`
    positions: Tensor,
    /// `[3, H]`: the one token type that single texts have, and the norm's weight and shift.
    norm: Tensor,
    layers: Vec<Layer>,
}

struct Layer {
    qkv: Packed,
    /// `[2, H]`: queries' and values'.
    qv_bias: Tensor,
    attention_out: Packed,
    /// `[3, H]`: the product's bias, the norm's weight and shift.
    attention_norm: Tensor,
    up: Packed,
    up_bias: Tensor,
    down: Packed,
    /// `[3, H]`, likewise.
    output_norm: Tensor,
}

impl Bert {
    pub fn spec(&self) -> &BertSpec {
        &self.spec
    }

    /// What the first layer reads: `[T, H]`.
    pub fn begin(&self, batch: &TextBatch) -> Result<Tensor> {
        let ids = Tensor::new(batch.ids.as_slice(), &Device::Cpu)?;
        let places: Vec<u32> = batch.positions().map(|at| at + self.spec.position_offset as u32).collect();
        let words = self.words.index_select(&ids, 0)?;
        let positions = self.positions.index_select(&Tensor::new(places, &Device::Cpu)?, 0)?;
        add_layer_norm(&words, &positions, &self.norm, self.spec.norm_eps)
    }

    /// One of `spec.layers` layers: `[T, H]` → `[T, H]`.
    pub fn layer(&self, number: usize, h: &Tensor, batch: &Arc<TextBatch>) -> Result<Tensor> {
        let (layer, eps) = (&self.layers[number], self.spec.norm_eps);
        let mixed = text_attention(&linear(h, &layer.qkv)?, &layer.qv_bias, self.spec.heads, batch)?;
        let h = add_layer_norm(&linear(&mixed, &layer.attention_out)?, h, &layer.attention_norm, eps)?;
        let up = linear(&h, &layer.up)?;
        bias_gelu(&up, &layer.up_bias, self.spec.gelu)?;
        add_layer_norm(&linear(&up, &layer.down)?, &h, &layer.output_norm, eps)
    }

    /// The texts' vectors, of what the last layer gave.
    pub fn finish(&self, h: &Tensor, batch: &TextBatch) -> Result<Vec<Vec<f32>>> {
        let rows: Vec<f32> = h.flatten_all()?.to_vec1()?;
        let texts = batch.starts.windows(2).map(|text| &rows[text[0] * self.spec.hidden..text[1] * self.spec.hidden]);
        Ok(texts.map(|rows| pooling::pool(rows, self.spec.hidden, &self.spec.head)).collect())
    }

    /// Reads and packs the weights.
    pub fn load(spec: BertSpec, checkpoint: &dyn Tensors) -> std::result::Result<Bert, WeightError> {
        let (hidden, inner) = (spec.hidden, spec.intermediate);
        let pack = |parts: &[Raw]| Packed::stack(parts, Inputs::F32).map_err(WeightError::from);
        let vector = |name: &str, len| checkpoint.vector(name, len);
        let table = |name: &str, rows| plain(&checkpoint.matrix(name, rows, hidden)?).map_err(WeightError::from);
        let rows = |vectors: &[Tensor]| Tensor::stack(vectors, 0).map_err(WeightError::from);
        let norm = |bias: Tensor, name: &str| {
            let at = |part: &str| vector(&format!("{name}.LayerNorm.{part}"), hidden);
            rows(&[bias, at("weight")?, at("bias")?])
        };
        let types = table("embeddings.token_type_embeddings.weight", spec.types)?;
        let layers = (0..spec.layers).map(|i| {
            let at = |name: &str| format!("encoder.layer.{i}.{name}");
            let matrix = |name: &str, rows, columns| checkpoint.matrix(&at(&format!("{name}.weight")), rows, columns);
            let bias = |name: &str, len| vector(&at(&format!("{name}.bias")), len);
            let qkv = ["attention.self.query", "attention.self.key", "attention.self.value"];
            Ok(Layer {
                qkv: pack(&[
                    matrix(qkv[0], hidden, hidden)?,
                    matrix(qkv[1], hidden, hidden)?,
                    matrix(qkv[2], hidden, hidden)?,
                ])?,
                qv_bias: rows(&[bias(qkv[0], hidden)?, bias(qkv[2], hidden)?])?,
                attention_out: pack(&[matrix("attention.output.dense", hidden, hidden)?])?,
                attention_norm: norm(bias("attention.output.dense", hidden)?, &at("attention.output"))?,
                up: pack(&[matrix("intermediate.dense", inner, hidden)?])?,
                up_bias: bias("intermediate.dense", inner)?,
                down: pack(&[matrix("output.dense", hidden, inner)?])?,
                output_norm: norm(bias("output.dense", hidden)?, &at("output"))?,
            })
        });
        let layers = layers.collect::<std::result::Result<_, WeightError>>()?;
        Ok(Bert {
            words: table("embeddings.word_embeddings.weight", spec.vocab)?,
            positions: table("embeddings.position_embeddings.weight", spec.positions)?,
            norm: norm(types.get(0)?, "embeddings")?,
            layers,
            spec,
        })
    }

    /// What an encoder will take, with batches of up to `batch_tokens`.
    pub fn memory(
        spec: &BertSpec,
        checkpoint: &dyn Tensors,
        batch_tokens: usize,
    ) -> std::result::Result<Memory, WeightError> {
        let (hidden, inner, f32) = (spec.hidden, spec.intermediate, size_of::<f32>());
        let (mut weights, mut staging) = ((spec.vocab + spec.positions + 3) * hidden * f32, 0);
        for layer in 0..spec.layers {
            let kind = |name: &str, rows: usize, columns: usize| -> std::result::Result<(Kind, usize), WeightError> {
                let name = format!("encoder.layer.{layer}.{name}.weight");
                Ok((checkpoint.kinds(&name, rows, columns)?[1], rows))
            };
            let parts = ["query", "key", "value"].map(|part| kind(&format!("attention.self.{part}"), hidden, hidden));
            let stacks = [
                (parts.into_iter().collect::<std::result::Result<Vec<_>, _>>()?, hidden),
                (vec![kind("attention.output.dense", hidden, hidden)?], hidden),
                (vec![kind("intermediate.dense", inner, hidden)?], hidden),
                (vec![kind("output.dense", hidden, inner)?], inner),
            ];
            for (parts, inputs) in stacks {
                weights += Packed::stacked_bytes(&parts, inputs);
                let bytes = |&(kind, rows): &(Kind, usize)| kind.row_bytes(inputs).map_or(0, |row| row * rows);
                staging = staging.max(parts.iter().map(bytes).sum());
            }
            weights += (2 + 3 + 3) * hidden * f32 + inner * f32;
        }
        let [words, _] = checkpoint.kinds("embeddings.word_embeddings.weight", spec.vocab, hidden)?;
        staging = staging.max(words.row_bytes(hidden).map_or(0, |row| row * spec.vocab));
        // What goes through a layer, and either of its halves: queries, keys, values and their mix, or the MLP's middle.
        let workspace = batch_tokens * (3 * hidden + inner.max(4 * hidden)) * f32;
        let [weights, workspace, staging] = [weights, workspace, staging].map(|bytes| bytes as u64);
        Ok(Memory { weights, workspace, staging, ..Memory::default() })
    }

    /// Bytes of weights held in memory.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        let tensor = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        let layer = |l: &Layer| {
            let matrices = [&l.qkv, &l.attention_out, &l.up, &l.down].into_iter().map(Packed::bytes).sum::<usize>();
            let vectors = [&l.qv_bias, &l.attention_norm, &l.up_bias, &l.output_norm];
            matrices + vectors.map(tensor).iter().sum::<usize>()
        };
        [&self.words, &self.positions, &self.norm].map(tensor).iter().sum::<usize>()
            + self.layers.iter().map(layer).sum::<usize>()
    }
}

/// A table as it is, in f32: its rows are looked up and never multiplied.
fn plain(raw: &Raw) -> Result<Tensor> {
    let mut numbers = vec![0f32; raw.rows * raw.columns];
    raw.kind.widen(&raw.bytes, &mut numbers);
    Tensor::from_vec(numbers, (raw.rows, raw.columns), &Device::Cpu)
}
