//! From a candle operand to a plain slice, or a clear error. The kernels take contiguous operands only.

use candle_core::{CpuStorage, Layout, Result, bail};
use half::bf16;

fn range(layout: &Layout, name: &str) -> Result<std::ops::Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("{name}: operand is not contiguous"),
    }
}

pub(crate) fn f32s<'a>(storage: &'a CpuStorage, layout: &Layout, name: &str) -> Result<&'a [f32]> {
    match storage {
        CpuStorage::F32(data) => Ok(&data[range(layout, name)?]),
        _ => bail!("{name}: operand is not f32"),
    }
}

/// The rows of a whole f32 matrix that a kernel works on in place, and their width.
pub(crate) fn rows_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout, name: &str) -> Result<(&'a mut [f32], usize)> {
    let (rows, width) = layout.shape().dims2()?;
    let CpuStorage::F32(data) = storage else { bail!("{name}: operand is not f32") };
    if !layout.is_contiguous() || layout.start_offset() != 0 || width == 0 {
        bail!("{name}: {:?} cannot be worked on in place", layout.dims());
    }
    Ok((&mut data[..rows * width], width))
}

/// Weights or cached keys and values: stored in one of two types, always computed on as f32.
pub(crate) enum Stored<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

pub(crate) fn stored<'a>(storage: &'a CpuStorage, layout: &Layout, name: &str) -> Result<Stored<'a>> {
    match storage {
        CpuStorage::F32(data) => Ok(Stored::F32(&data[range(layout, name)?])),
        CpuStorage::BF16(data) => Ok(Stored::Bf16(&data[range(layout, name)?])),
        _ => bail!("{name}: operand is neither f32 nor bf16"),
    }
}
