//! A text's rows → its one vector.

use super::spec::{Head, Pooling};

/// `rows`: `[n, hidden]` of one text, n ≥ 1.
pub(super) fn pool(rows: &[f32], hidden: usize, head: &Head) -> Vec<f32> {
    let mut vector = match head.pooling {
        Pooling::Cls => rows[..hidden].to_vec(),
        Pooling::Last => rows[rows.len() - hidden..].to_vec(),
        Pooling::Mean => mean(rows, hidden),
    };
    if head.normalize {
        // In f64: rounding once keeps the length at 1 to the last bit.
        let length = vector.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt().max(1e-12);
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    vector
}

fn mean(rows: &[f32], hidden: usize) -> Vec<f32> {
    let mut sums = vec![0f32; hidden];
    for row in rows.chunks_exact(hidden) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
    let count = (rows.len() / hidden) as f32;
    sums.iter_mut().for_each(|sum| *sum /= count);
    sums
}
