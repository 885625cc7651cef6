//! Every kernel against the reference, on random shapes; and the promise that a row's bits do not depend on its batch.

mod texts;

use super::{
    batch::{BLOCK_TOKENS, StepBatch},
    cpu::{self, Heads, Kind, Packed, Part, Raw},
    reference,
};
use candle_core::{DType, Device, Tensor};
use half::bf16;
use proptest::prelude::*;
use std::sync::Arc;

/// Numbers around zero, the same for the same seed.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn tensor(seed: u64, rows: usize, columns: usize) -> Tensor {
    Tensor::from_vec(numbers(seed, rows * columns), (rows, columns), &Device::Cpu).expect("a tensor")
}

fn raw(seed: u64, kind: Kind, rows: usize, columns: usize) -> Raw {
    let bytes = numbers(seed, rows * columns).into_iter().flat_map(|x| match kind {
        Kind::F32 => x.to_le_bytes().to_vec(),
        Kind::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
        Kind::Bf16 => bf16::from_f32(x).to_le_bytes().to_vec(),
    });
    Raw { kind, rows, columns, bytes: bytes.collect() }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1()).expect("numbers")
}

#[track_caller]
fn assert_close(got: &Tensor, want: &Tensor, share: f32) {
    assert_eq!(got.dims(), want.dims());
    let (got, want) = (flat(got), flat(want));
    let largest = want.iter().fold(1e-3f32, |a, b| a.max(b.abs()));
    for (at, (x, y)) in got.iter().zip(&want).enumerate() {
        assert!((x - y).abs() <= share * largest, "at {at}: {x}, expected {y}");
    }
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::F32), Just(Kind::F16), Just(Kind::Bf16)]
}

/// Sequences of different lengths, each with some new tokens at its end, over scattered blocks.
fn batches() -> impl Strategy<Value = StepBatch> {
    proptest::collection::vec((0usize..100, 1usize..40), 1..5).prop_map(|sequences| {
        let mut batch = StepBatch::default();
        let mut next = 0;
        for (first, count) in sequences {
            // 97 is prime: every block number below it comes once.
            let blocks = (first + count).div_ceil(BLOCK_TOKENS);
            let table: Vec<u32> = (next..next + blocks).map(|block| (block * 31 % 97) as u32).collect();
            next += blocks;
            batch.push(&vec![0; count], first, &table, true);
        }
        batch
    })
}

const POOL_BLOCKS: usize = 97;

fn heads() -> impl Strategy<Value = Heads> {
    (1usize..4, 1usize..6, 1usize..5).prop_map(|(kv, group, dim)| Heads { q: kv * group, kv, dim: 16 * dim })
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::BF16)]
}

/// Pools that hold random keys and values for every position, and the same as the reference wants them.
fn filled_pools(heads: Heads, dtype: DType) -> ([Tensor; 2], [Tensor; 2]) {
    let pools =
        cpu::pool_shapes(POOL_BLOCKS, heads).map(|shape| Tensor::zeros(&shape, dtype, &Device::Cpu).expect("a pool"));
    let slots = POOL_BLOCKS * BLOCK_TOKENS;
    let everything = StepBatch {
        ids: vec![0; slots],
        pos: vec![0; slots],
        slot: (0..slots as u32).collect(),
        seq: vec![0; slots],
        table_start: vec![0, 0],
        tables: Vec::new(),
        sel: Vec::new(),
    };
    let qkv = tensor(3, slots, heads.width());
    let batch = Arc::new(everything);
    cpu::kv_write(&pools[0], &qkv, Part::Key, heads, &batch).expect("keys");
    cpu::kv_write(&pools[1], &qkv, Part::Value, heads, &batch).expect("values");
    let token = heads.kv * heads.dim;
    let plain = [heads.q * heads.dim, heads.q * heads.dim + token].map(|from| {
        let part = qkv.narrow(1, from, token).and_then(|part| part.to_dtype(dtype)?.to_dtype(DType::F32));
        part.and_then(|part| part.reshape((slots, heads.kv, heads.dim))).expect("a plain pool")
    });
    (pools, plain)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn linear_and_embed_equal_the_reference(
        rows in 1usize..40, inputs in 1usize..20, outputs in 1usize..300, kind in kinds(), seed: u64,
    ) {
        let inputs = 16 * inputs;
        let x = tensor(seed, rows, inputs);
        let split = outputs / 3;
        let parts = [raw(seed ^ 1, kind, split, inputs), raw(seed ^ 2, kind, outputs - split, inputs)];
        let packed = Packed::stack(&parts).expect("packed");
        let plain = packed.unpacked().expect("unpacked");
        let kept = if kind == Kind::Bf16 { DType::BF16 } else { DType::F32 };
        prop_assert_eq!(packed.data.dtype(), kept);
        let direct: Vec<f32> = parts.iter()
            .flat_map(|part| part.bytes.chunks(part.kind.bytes()).map(|b| part.kind.widen(b)).collect::<Vec<_>>())
            .collect();
        prop_assert_eq!(flat(&plain), direct);
        assert_close(&cpu::linear(&x, &packed).expect("y"), &reference::linear(&x, &plain).expect("y"), 1e-5);
        let ids: Vec<u32> = (0..rows).map(|row| (row * 7 % outputs) as u32).collect();
        let want = reference::embed(&ids, &plain).expect("rows");
        prop_assert_eq!(flat(&cpu::embed(Arc::from(ids), &packed).expect("rows")), flat(&want));
    }

    #[test]
    fn a_row_of_linear_has_the_same_bits_in_any_batch(
        rows in 2usize..20, inputs in 1usize..20, outputs in 1usize..300, kind in kinds(), seed: u64,
    ) {
        let x = tensor(seed, rows, 16 * inputs);
        let packed = Packed::stack(&[raw(seed ^ 1, kind, outputs, 16 * inputs)]).expect("packed");
        let together = flat(&cpu::linear(&x, &packed).expect("y"));
        for row in 0..rows {
            let alone = flat(&cpu::linear(&x.narrow(0, row, 1).and_then(|x| x.force_contiguous()).expect("a row"), &packed).expect("y"));
            prop_assert_eq!(&alone[..], &together[row * outputs..][..outputs]);
        }
    }

    #[test]
    fn attention_equals_the_reference(heads in heads(), dtype in dtypes(), batch in batches(), seed: u64) {
        let (pools, plain) = filled_pools(heads, dtype);
        let batch = Arc::new(batch);
        let qkv = (tensor(seed, batch.tokens(), heads.width()) * 4.0).expect("q");
        let got = cpu::paged_attention(&qkv, &pools[0], &pools[1], heads, &batch).expect("mixed");
        let want = reference::paged_attention(&qkv, &plain[0], &plain[1], heads, &batch).expect("mixed");
        assert_close(&got, &want, 1e-5);
    }

    #[test]
    fn the_rest_equals_the_reference(heads in heads(), batch in batches(), seed: u64) {
        let rows = batch.tokens();
        let x = tensor(seed, rows, heads.width());
        let weight = tensor(seed ^ 1, 1, heads.width()).squeeze(0).expect("a vector");
        let got = cpu::rms_norm(&x, &weight, 1e-5).expect("normed");
        assert_close(&got, &reference::rms_norm(&x, &weight, 1e-5).expect("normed"), 1e-6);

        let gate_up = (tensor(seed ^ 2, rows, 2 * heads.width()) * 20.0).expect("gate_up");
        let got = cpu::silu_mul(&gate_up).expect("gated");
        assert_close(&got, &reference::silu_mul(&gate_up).expect("gated"), 1e-6);

        let (cos, sin) = (tensor(seed ^ 3, 140, heads.dim / 2), tensor(seed ^ 4, 140, heads.dim / 2));
        let turned = heads.q + heads.kv;
        let want = reference::rope(&x, turned, &cos, &sin, &batch).expect("turned");
        cpu::rope(&x, turned, &cos, &sin, &Arc::new(batch)).expect("turned");
        assert_close(&x, &want, 1e-6);
    }
}

/// Every instruction set that this machine has gives the same numbers up to rounding, not only the one it would choose.
#[test]
fn all_instruction_sets_agree() {
    for (rows, outputs) in [(1, 200), (2, 33), (3, 64), (9, 17)] {
        let x = numbers(5, rows * 64);
        for kind in [Kind::F32, Kind::Bf16] {
            let packed = Packed::stack(&[raw(6, kind, outputs, 64)]).expect("packed");
            let want = flat(&cpu::linear(&tensor(5, rows, 64), &packed).expect("y"));
            for (name, got) in cpu::linear_on_each(&x, &packed).expect("y") {
                for (x, y) in got.iter().zip(&want) {
                    assert!((x - y).abs() < 1e-4, "{name}: {x}, expected {y}");
                }
            }
        }
    }
    let query = numbers(7, 4 * 32);
    let mut results = cpu::attend_on_each(&query, 32);
    let (_, want) = results.remove(0);
    for (name, got) in results {
        for (x, y) in got.iter().zip(&want) {
            assert!((x - y).abs() < 1e-5, "{name}: {x}, expected {y}");
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_errors_and_not_panics() {
    let packed = Packed::stack(&[raw(1, Kind::F32, 20, 32)]).expect("packed");
    assert!(cpu::linear(&tensor(1, 3, 16), &packed).is_err());
    assert!(cpu::linear(&tensor(1, 3, 32).to_dtype(DType::F64).expect("f64"), &packed).is_err());
    assert!(cpu::linear(&tensor(1, 32, 3).t().expect("a view"), &packed).is_err());
    assert!(cpu::embed(Arc::from([20]), &packed).is_err());
    assert!(Packed::stack(&[]).is_err());
    assert!(Packed::stack(&[raw(1, Kind::F32, 4, 3)]).is_err());
    let heads = Heads { q: 2, kv: 1, dim: 16 };
    let (pools, _) = filled_pools(heads, DType::F32);
    let mut batch = StepBatch::default();
    batch.push(&[0], 0, &[POOL_BLOCKS as u32], true);
    let batch = Arc::new(batch);
    let qkv = tensor(1, 1, heads.width());
    assert!(cpu::kv_write(&pools[0], &qkv, Part::Key, heads, &batch).is_err());
    assert!(cpu::paged_attention(&qkv, &pools[0], &pools[1], heads, &batch).is_err());
    assert!(cpu::paged_attention(&qkv, &pools[1], &pools[0], heads, &batch).is_err());
    assert!(cpu::rms_norm(&qkv, &Tensor::zeros(10, DType::F32, &Device::Cpu).expect("w"), 1e-5).is_err());
}

/// A number that is none must reach the logits, where it is noticed.
#[test]
fn not_a_number_is_never_swallowed() {
    let heads = Heads { q: 4, kv: 1, dim: 16 };
    let (pools, _) = filled_pools(heads, DType::F32);
    let mut batch = StepBatch::default();
    batch.push(&[0; 3], 40, &[1, 2], true);
    let batch = Arc::new(batch);
    let mut row = numbers(1, 3 * heads.width());
    row[heads.width()] = f32::NAN;
    let qkv = Tensor::from_vec(row, (3, heads.width()), &Device::Cpu).expect("qkv");
    let out = flat(&cpu::paged_attention(&qkv, &pools[0], &pools[1], heads, &batch).expect("mixed"));
    let width = heads.q * heads.dim;
    assert!(out[..width].iter().chain(&out[2 * width..]).all(|x| x.is_finite()));
    assert!(out[width..width + heads.dim].iter().all(|x| x.is_nan()));
    let gated = cpu::silu_mul(&Tensor::new(&[[f32::NAN, 1.0]], &Device::Cpu).expect("x")).expect("gated");
    assert!(flat(&gated)[0].is_nan());
}
