//! Every kernel against the reference, on random shapes; and the promise that a row's bits do not depend on its batch.

mod texts;

use super::{
    batch::{BLOCK_TOKENS, StepBatch},
    cpu::{self, Activation, Heads, Inputs, Kind, Packed, Part, Raw, Scores},
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

/// Blocks get random bits and reasonable scales.
fn raw(seed: u64, kind: Kind, rows: usize, columns: usize) -> Raw {
    let (numbers, bits) = (numbers(seed, rows * columns), numbers(!seed, 2 * rows * columns));
    let mut bytes: Vec<u8> = match kind {
        Kind::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Kind::F16 => numbers.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Kind::Bf16 => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        _ => bits[..rows * kind.row_bytes(columns).expect("whole blocks")]
            .iter()
            .map(|x| (x * 5e6) as i32 as u8)
            .collect(),
    };
    let places: &[usize] = match kind {
        Kind::F32 | Kind::F16 | Kind::Bf16 => &[],
        Kind::Q8_0 | Kind::Q4_0 => &[0],
        Kind::Q4K | Kind::Q5K => &[0, 2],
        Kind::Q6K => &[208],
    };
    for (block, scale) in bytes.chunks_exact_mut(kind.block_bytes()).zip(&numbers) {
        for &place in places {
            block[place..place + 2].copy_from_slice(&half::f16::from_f32(scale / 100.0).to_le_bytes());
        }
    }
    Raw { kind, rows, columns, bytes }
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

const KINDS: [Kind; 8] = [Kind::F32, Kind::F16, Kind::Bf16, Kind::Q8_0, Kind::Q4_0, Kind::Q4K, Kind::Q5K, Kind::Q6K];

fn kinds() -> impl Strategy<Value = Kind> {
    proptest::sample::select(KINDS.as_slice())
}

fn inputs() -> impl Strategy<Value = Inputs> {
    prop_oneof![Just(Inputs::F32), Just(Inputs::Bf16)]
}

/// How far the products may be from the reference's, as a share of the largest: blocks meet inputs rounded to int8.
fn tolerance(kind: Kind) -> f32 {
    if kind.block_len() == 1 { 1e-5 } else { 1e-2 }
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

const PLAIN: Scores = Scores { scale: 0.25, softcap: None, window: None };

fn heads() -> impl Strategy<Value = Heads> {
    let dims = prop_oneof![4 => 1usize..5, 1 => 5usize..17];
    (1usize..4, 1usize..10, dims).prop_map(|(kv, group, dim)| Heads { q: kv * group, kv, dim: 16 * dim })
}

fn scores() -> impl Strategy<Value = Scores> {
    let window = prop_oneof![Just(None), (1usize..70).prop_map(Some)];
    (0.02f32..0.3, proptest::option::of(0.5f32..40.0), window).prop_map(|(scale, softcap, window)| Scores {
        scale,
        softcap,
        window,
    })
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
        rows in 1usize..40, blocks in 1usize..5, outputs in 1usize..300, kind in kinds(), other in kinds(),
        met in inputs(), seed: u64,
    ) {
        let inputs = blocks * kind.block_len().max(other.block_len()).max(16);
        let x = tensor(seed, rows, inputs);
        let split = outputs / 3;
        let parts = [raw(seed ^ 1, kind, split, inputs), raw(seed ^ 2, other, outputs - split, inputs)];
        let packed = Packed::stack(&parts, met).expect("packed");
        let plain = packed.unpacked().expect("unpacked");
        let direct: Vec<f32> = parts.iter()
            .flat_map(|part| {
                let mut numbers = vec![0f32; part.rows * inputs];
                part.kind.widen(&part.bytes, &mut numbers);
                numbers
            })
            .collect();
        prop_assert_eq!(flat(&plain), direct);
        let half = |first: usize, part: &Raw| {
            let rounds = part.kind == Kind::Bf16 && met == Inputs::Bf16;
            let x = if rounds { x.to_dtype(DType::BF16)?.to_dtype(DType::F32)? } else { x.clone() };
            reference::linear(&x, &plain.narrow(0, first, part.rows)?)
        };
        let halves = [half(0, &parts[0]).expect("y"), half(split, &parts[1]).expect("y")];
        let want = Tensor::cat(&halves, 1).expect("y");
        assert_close(&cpu::linear(&x, &packed).expect("y"), &want, tolerance(kind).max(tolerance(other)));
        let ids: Vec<u32> = (0..rows).map(|row| (row * 7 % outputs) as u32).collect();
        let want = reference::embed(&ids, &plain).expect("rows");
        prop_assert_eq!(flat(&cpu::embed(Arc::from(ids), &packed).expect("rows")), flat(&want));
    }

    #[test]
    fn a_row_of_linear_has_the_same_bits_in_any_batch(
        rows in 2usize..20, blocks in 1usize..5, outputs in 1usize..300, kind in kinds(), met in inputs(), seed: u64,
    ) {
        let inputs = blocks * kind.block_len().max(16);
        let x = tensor(seed, rows, inputs);
        let packed = Packed::stack(&[raw(seed ^ 1, kind, outputs, inputs)], met).expect("packed");
        let together = flat(&cpu::linear(&x, &packed).expect("y"));
        for row in 0..rows {
            let alone = flat(&cpu::linear(&x.narrow(0, row, 1).and_then(|x| x.force_contiguous()).expect("a row"), &packed).expect("y"));
            prop_assert_eq!(&alone[..], &together[row * outputs..][..outputs]);
        }
    }

    #[test]
    fn attention_equals_the_reference(
        heads in heads(), scores in scores(), dtype in dtypes(), batch in batches(), seed: u64,
    ) {
        let (pools, plain) = filled_pools(heads, dtype);
        let batch = Arc::new(batch);
        let qkv = (tensor(seed, batch.tokens(), heads.width()) * 4.0).expect("q");
        let got = cpu::paged_attention(&qkv, &pools[0], &pools[1], heads, scores, &batch).expect("mixed");
        let want = reference::paged_attention(&qkv, &plain[0], &plain[1], heads, scores, &batch).expect("mixed");
        assert_close(&got, &want, 1e-5);
    }

    #[test]
    fn a_row_of_attention_has_the_same_bits_alone(
        heads in heads(), scores in scores(), dtype in dtypes(), batch in batches(), seed: u64,
    ) {
        let (pools, _) = filled_pools(heads, dtype);
        let batch = Arc::new(batch);
        let qkv = tensor(seed, batch.tokens(), heads.width());
        let together = cpu::paged_attention(&qkv, &pools[0], &pools[1], heads, scores, &batch).expect("mixed");
        for (row, together) in flat(&together).chunks(heads.q * heads.dim).enumerate() {
            let mut alone = StepBatch::default();
            alone.push(&[0], batch.pos[row] as usize, batch.table_of(row), true);
            let qkv = qkv.narrow(0, row, 1).and_then(|row| row.force_contiguous()).expect("a row");
            let alone = cpu::paged_attention(&qkv, &pools[0], &pools[1], heads, scores, &Arc::new(alone));
            prop_assert_eq!(&flat(&alone.expect("mixed"))[..], together);
        }
    }

    #[test]
    fn the_rest_equals_the_reference(
        heads in heads(), batch in batches(), turned in 1usize..9, whole: bool, scale in 0.1f32..3.0, seed: u64,
    ) {
        let (rows, width) = (batch.tokens(), heads.width());
        let x = tensor(seed, rows, width);
        let weight = |seed, len| tensor(seed, 1, len).squeeze(0).expect("a vector");
        let norm = weight(seed ^ 1, width);
        let got = cpu::rms_norm(&x, &norm, 1e-5).expect("normed");
        let normed = reference::rms_norm(&x, &norm, 1e-5).expect("normed");
        assert_close(&got, &normed, 1e-6);

        let h = tensor(seed ^ 5, rows, width);
        let want = reference::add(&h, &normed, scale).expect("a sum");
        let sum = h.copy().expect("a copy");
        cpu::add_normed(&sum, &x, &norm, 1e-5, scale).expect("a sum");
        assert_close(&sum, &want, 1e-6);
        let want = reference::add(&h, &x, scale).expect("a sum");
        cpu::add(&h, &x, scale).expect("a sum");
        assert_close(&h, &want, 1e-6);
        let want = h.broadcast_add(&norm).expect("a sum");
        cpu::add_bias(&h, &norm).expect("a sum");
        assert_close(&h, &want, 1e-6);
        let capped = (&h * 30.0).expect("numbers");
        let want = reference::softcap(&capped, 10.0 * scale).expect("capped");
        cpu::softcap(&capped, 10.0 * scale).expect("capped");
        assert_close(&capped, &want, 1e-6);

        let gate_up = (tensor(seed ^ 2, rows, 2 * width) * 20.0).expect("gate_up");
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let got = cpu::gate_mul(&gate_up, activation).expect("gated");
            assert_close(&got, &reference::gate_mul(&gate_up, activation).expect("gated"), 1e-6);
        }

        let widths = [heads.q * heads.dim, heads.kv * heads.dim];
        let lens = if whole { widths } else { [heads.dim; 2] };
        let (q, k) = (weight(seed ^ 6, lens[0]), weight(seed ^ 7, lens[1]));
        let want = reference::qk_norm(&x, &q, &k, widths, 1e-5).expect("normed");
        cpu::qk_norm(&x, &q, &k, widths, 1e-5).expect("normed");
        assert_close(&x, &want, 1e-6);

        let half = heads.dim / 16 * turned;
        let (cos, sin) = (tensor(seed ^ 3, 140, half), tensor(seed ^ 4, 140, half));
        let turned = heads.q + heads.kv;
        let want = reference::rope(&x, turned, heads.dim, (&cos, &sin), &batch).expect("turned");
        cpu::rope(&x, turned, heads.dim, (&cos, &sin), &Arc::new(batch)).expect("turned");
        assert_close(&x, &want, 1e-6);
    }
}

/// Every instruction set that this machine has gives the same numbers, not only the one it would choose: up to rounding
/// for plain weights, bit for bit for blocks.
#[test]
fn all_instruction_sets_agree() {
    for (rows, outputs) in [(1, 200), (2, 33), (3, 64), (9, 17)] {
        let x = numbers(5, rows * 512);
        for (kind, met) in KINDS.into_iter().flat_map(|kind| [Inputs::F32, Inputs::Bf16].map(|met| (kind, met))) {
            let packed = Packed::stack(&[raw(6, kind, outputs, 512)], met).expect("packed");
            let want = flat(&cpu::linear(&tensor(5, rows, 512), &packed).expect("y"));
            for (name, got) in cpu::linear_on_each(&x, &packed).expect("y") {
                for (x, y) in got.iter().zip(&want) {
                    let exactly = match kind.block_len() {
                        1 => met == Inputs::Bf16 && kind == Kind::Bf16 && name != "Portable",
                        _ => true,
                    };
                    let same = if exactly { x.to_bits() == y.to_bits() } else { (x - y).abs() < 1e-4 };
                    assert!(same, "{kind:?}, {name}: {x}, expected {y}");
                }
            }
        }
    }
    for (group, dim) in [(1, 16), (2, 48), (3, 256)] {
        for (softcap, window) in [(None, None), (Some(2.0), Some(3)), (None, Some(33))] {
            let qkv = numbers(7, 4 * group * dim);
            let mut results = cpu::attend_on_each(&qkv, dim, Scores { scale: 0.3, softcap, window });
            let (_, want) = results.remove(0);
            for (name, got) in results {
                for (x, y) in got.iter().zip(&want) {
                    assert!((x - y).abs() < 1e-5, "{name}: {x}, expected {y}");
                }
            }
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_errors_and_not_panics() {
    let packed = Packed::stack(&[raw(1, Kind::F32, 20, 32)], Inputs::F32).expect("packed");
    assert!(cpu::linear(&tensor(1, 3, 16), &packed).is_err());
    assert!(cpu::linear(&tensor(1, 3, 32).to_dtype(DType::F64).expect("f64"), &packed).is_err());
    assert!(cpu::linear(&tensor(1, 32, 3).t().expect("a view"), &packed).is_err());
    assert!(cpu::embed(Arc::from([20]), &packed).is_err());
    assert!(Packed::stack(&[], Inputs::F32).is_err());
    assert!(Packed::stack(&[Raw { kind: Kind::Q8_0, rows: 1, columns: 48, bytes: vec![0; 51] }], Inputs::F32).is_err());
    assert!(Packed::stack(&[raw(1, Kind::F32, 4, 3)], Inputs::F32).is_err());
    let heads = Heads { q: 2, kv: 1, dim: 16 };
    let (pools, _) = filled_pools(heads, DType::F32);
    let mut batch = StepBatch::default();
    batch.push(&[0], 0, &[POOL_BLOCKS as u32], true);
    let batch = Arc::new(batch);
    let qkv = tensor(1, 1, heads.width());
    assert!(cpu::kv_write(&pools[0], &qkv, Part::Key, heads, &batch).is_err());
    assert!(cpu::paged_attention(&qkv, &pools[0], &pools[1], heads, PLAIN, &batch).is_err());
    assert!(cpu::paged_attention(&qkv, &pools[1], &pools[0], heads, PLAIN, &batch).is_err());
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
    let out = flat(&cpu::paged_attention(&qkv, &pools[0], &pools[1], heads, PLAIN, &batch).expect("mixed"));
    let width = heads.q * heads.dim;
    assert!(out[..width].iter().chain(&out[2 * width..]).all(|x| x.is_finite()));
    assert!(out[width..width + heads.dim].iter().all(|x| x.is_nan()));
    for (kind, bad) in [
        (Kind::Bf16, f32::NAN),
        (Kind::Q8_0, f32::NAN),
        (Kind::Q4K, f32::NAN),
        (Kind::Q8_0, f32::INFINITY),
        (Kind::Q6K, f32::INFINITY),
    ] {
        let mut x = numbers(3, 2 * 512);
        x[600] = bad;
        let x = Tensor::from_vec(x, (2, 512), &Device::Cpu).expect("x");
        let y =
            flat(&cpu::linear(&x, &Packed::stack(&[raw(4, kind, 20, 512)], Inputs::Bf16).expect("packed")).expect("y"));
        assert!(y[..20].iter().all(|y| y.is_finite()) && y[20..].iter().all(|y| y.is_nan()));
    }
    for activation in [Activation::Silu, Activation::GeluTanh] {
        let gate_up = Tensor::new(&[[f32::NAN, 1.0]], &Device::Cpu).expect("x");
        assert!(flat(&cpu::gate_mul(&gate_up, activation).expect("gated"))[0].is_nan());
    }
    let x = Tensor::new(&[[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]], &Device::Cpu).expect("x");
    cpu::softcap(&x, 30.0).expect("capped");
    let capped = flat(&x);
    assert!(capped[0].is_nan());
    assert_eq!(capped[1..], [30.0, -30.0]);
}

/// Scores that overflow to −∞ weigh nothing; where all do there is no answer, and none is made up.
#[test]
fn scores_of_minus_infinity_weigh_nothing() {
    let heads = Heads { q: 1, kv: 1, dim: 16 };
    let (pools, _) = filled_pools(heads, DType::F32);
    let mut batch = StepBatch::default();
    batch.push(&[0; 34], 0, &[1, 2], true);
    let batch = Arc::new(batch);
    // A block of keys that give −∞, then one that gives −∞ and one that does not.
    let mut rows = vec![0f32; 34 * heads.width()];
    for (at, row) in rows.chunks_exact_mut(heads.width()).enumerate() {
        row[0] = 1.0;
        row[heads.dim] = if at < 33 { f32::NEG_INFINITY } else { 1.0 };
        row[2 * heads.dim..].fill(at as f32);
    }
    let qkv = Tensor::from_vec(rows, (34, heads.width()), &Device::Cpu).expect("qkv");
    cpu::kv_write(&pools[0], &qkv, Part::Key, heads, &batch).expect("keys");
    cpu::kv_write(&pools[1], &qkv, Part::Value, heads, &batch).expect("values");
    let out = flat(&cpu::paged_attention(&qkv, &pools[0], &pools[1], heads, PLAIN, &batch).expect("mixed"));
    assert!(out[..33 * heads.dim].iter().all(|x| x.is_nan()));
    assert!(out[33 * heads.dim..].iter().all(|&x| x == 33.0));
}
