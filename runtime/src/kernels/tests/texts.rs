//! What encoders of texts are made of.

use super::{assert_close, flat, numbers, tensor};
use crate::kernels::{
    cpu::{self, Gelu},
    reference,
    texts::TextBatch,
};
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use std::sync::Arc;

fn batch(lengths: &[usize]) -> Arc<TextBatch> {
    let texts: Vec<Vec<u32>> = lengths.iter().map(|&length| vec![0; length]).collect();
    Arc::new(TextBatch::new(texts.iter().map(Vec::as_slice)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn attention_within_texts_equals_the_reference(
        lengths in proptest::collection::vec(1usize..70, 1..6), heads in 1usize..5, dim in 1usize..5, seed: u64,
    ) {
        let (batch, hidden) = (batch(&lengths), heads * 16 * dim);
        let qkv = (tensor(seed, batch.tokens(), 3 * hidden) * 3.0).expect("qkv");
        let bias = tensor(seed ^ 1, 2, hidden);
        let got = cpu::text_attention(&qkv, &bias, heads, &batch).expect("mixed");
        // The reference adds a bias to the keys too, which changes nothing.
        let keys = tensor(seed ^ 2, 1, hidden);
        let full = Tensor::cat(&[&bias.narrow(0, 0, 1).expect("q"), &keys, &bias.narrow(0, 1, 1).expect("v")], 1);
        let want = reference::text_attention(&qkv, &full.expect("a bias"), heads, &batch).expect("mixed");
        assert_close(&got, &want, 1e-5);
    }

    #[test]
    fn norm_and_gelu_equal_the_reference(rows in 1usize..40, width in 1usize..20, seed: u64) {
        let width = 16 * width;
        let x = (tensor(seed, rows, width) * 5.0).expect("x");
        let (residual, params) = (tensor(seed ^ 1, rows, width), tensor(seed ^ 2, 3, width));
        let got = cpu::add_layer_norm(&x, &residual, &params, 1e-6).expect("normed");
        assert_close(&got, &reference::add_layer_norm(&x, &residual, &params, 1e-6).expect("normed"), 1e-5);
        let bias = tensor(seed ^ 3, 1, width).squeeze(0).expect("a vector");
        for gelu in [Gelu::Erf, Gelu::Tanh] {
            let got = x.copy().expect("a copy");
            cpu::bias_gelu(&got, &bias, gelu).expect("activated");
            assert_close(&got, &reference::bias_gelu(&x, &bias, gelu).expect("activated"), 1e-6);
        }
    }

    #[test]
    fn a_text_has_the_same_bits_in_any_batch(lengths in proptest::collection::vec(1usize..50, 2..6), seed: u64) {
        let (together, heads, hidden) = (batch(&lengths), 3, 96);
        let (qkv, bias) = (tensor(seed, together.tokens(), 3 * hidden), tensor(seed ^ 1, 2, hidden));
        let all = flat(&cpu::text_attention(&qkv, &bias, heads, &together).expect("mixed"));
        for (text, &length) in lengths.iter().enumerate() {
            let start = together.starts[text];
            let rows = qkv.narrow(0, start, length).and_then(|rows| rows.force_contiguous()).expect("rows");
            let alone = flat(&cpu::text_attention(&rows, &bias, heads, &batch(&[length])).expect("mixed"));
            prop_assert_eq!(&alone[..], &all[start * hidden..][..length * hidden]);
        }
    }
}

#[test]
fn all_instruction_sets_agree_on_texts() {
    for (count, dim) in [(1, 16), (5, 32), (37, 64), (64, 48)] {
        let (qkv, bias) = (numbers(8, count * 3 * 3 * dim), numbers(9, 2 * 3 * dim));
        let mut results = cpu::text_attention_on_each(&qkv, &bias, dim);
        let (_, want) = results.remove(0);
        for (name, got) in results {
            for (x, y) in got.iter().zip(&want) {
                assert!((x - y).abs() < 1e-5, "{name}: {x}, expected {y}");
            }
        }
    }
    let (x, residual, params) = (numbers(1, 96), numbers(2, 96), numbers(3, 3 * 96));
    let mut results = cpu::encoder_on_each(&x, &residual, &params);
    let (_, want) = results.remove(0);
    for (name, got) in results {
        for (x, y) in got.iter().zip(&want) {
            assert!((x - y).abs() < 1e-5, "{name}: {x}, expected {y}");
        }
    }
}

#[test]
fn texts_that_do_not_fit_are_errors_and_not_panics() {
    let (qkv, bias) = (tensor(1, 4, 96), tensor(2, 2, 32));
    assert!(cpu::text_attention(&qkv, &bias, 2, &batch(&[1, 3])).is_ok());
    assert!(cpu::text_attention(&qkv, &bias, 2, &batch(&[1, 2])).is_err());
    assert!(cpu::text_attention(&qkv, &bias, 3, &batch(&[1, 3])).is_err());
    assert!(cpu::text_attention(&qkv, &bias, 0, &batch(&[1, 3])).is_err());
    assert!(cpu::text_attention(&qkv.t().expect("a view"), &bias, 2, &batch(&[1, 3])).is_err());
    assert!(cpu::add_layer_norm(&tensor(1, 2, 32), &tensor(1, 3, 32), &tensor(1, 3, 32), 1e-5).is_err());
    assert!(cpu::add_layer_norm(&tensor(1, 2, 24), &tensor(1, 2, 24), &tensor(1, 3, 24), 1e-5).is_err());
    let bias = Tensor::zeros(31, DType::F32, &Device::Cpu).expect("a bias");
    assert!(cpu::bias_gelu(&tensor(1, 2, 32), &bias, Gelu::Erf).is_err());
}

/// A number that is none must reach the vector, where it is noticed.
#[test]
fn not_a_number_in_a_text_is_never_swallowed() {
    let batch = batch(&[3, 2]);
    let mut row = numbers(1, 5 * 3 * 16);
    row[16] = f32::NAN;
    let qkv = Tensor::from_vec(row, (5, 48), &Device::Cpu).expect("qkv");
    let out = flat(&cpu::text_attention(&qkv, &tensor(2, 2, 16), 1, &batch).expect("mixed"));
    assert!(out[..3 * 16].iter().all(|x| x.is_nan()), "a key that is none spoils its own text");
    assert!(out[3 * 16..].iter().all(|x| x.is_finite()), "and no other");
}
