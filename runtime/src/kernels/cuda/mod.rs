//! Our kernels on a CUDA device, and the device itself. The only place that names cudarc.
//!
//! `kernels.cu` says what they compute; `build.rs` makes PTX of it, which the driver compiles for its device at first use.

#![allow(unsafe_code)] // A launch is a promise about pointers that no compiler can check.

mod uploaded;

use super::{
    batch::StepBatch,
    cpu::{Activation, Heads, Scores},
    ops::Pool,
};
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp1, CustomOp3, DType, Device, InplaceOp2, Layout, Result, Shape,
    Tensor,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        CudaDType, WrapErr,
        cudarc::driver::{CudaView, LaunchConfig, PushKernelArg, result, sys},
    },
};
use std::sync::Arc;
pub(super) use uploaded::Uploaded;
use uploaded::{Batch, Tiling};

const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));
const MODULE: &str = "glassgate";

/// As in `kernels.cu`.
const SPLIT_KEYS: u32 = 512;
const ATTEND_THREADS: u32 = 128;

const ROW_THREADS: u32 = 256;

/// The first CUDA device, with one stream of its own.
pub(crate) fn open() -> Result<Device> {
    let device = CudaDevice::new_with_stream(0)?;
    let context = device.cuda_stream().context().clone();
    // SAFETY: there is one stream, so nothing has to wait for another; the pool is the device's own and the attribute's
    // value a u64.
    unsafe {
        // Two events a tensor cost more than small kernels.
        device.disable_event_tracking();
        // Without this every wait gives freed memory back to the system.
        let pool = result::device::get_default_mem_pool(context.cu_device()).w()?;
        let mut keep = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut keep).cast()).result().w()?;
    }
    Ok(Device::Cuda(device))
}

/// The numbers of a tensor that lies in one piece.
fn piece<'a, T: CudaDType>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("a CUDA kernel needs its input in one piece") };
    Ok(storage.as_cuda_slice::<T>()?.slice(start..end))
}

fn rows_of(blocks: usize) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (ROW_THREADS, 1, 1), shared_mem_bytes: 0 }
}

fn only_cuda<T>() -> Result<T> {
    bail!("this kernel is for CUDA devices")
}

pub(super) fn kv_write(pool: &Pool, qkv: &Tensor, heads: Heads, batch: &Arc<Batch>) -> Result<()> {
    let from = heads.q * heads.dim;
    pool.keys.inplace_op2(qkv, &KvWrite { from, heads, batch: Arc::clone(batch) })?;
    pool.values.inplace_op2(qkv, &KvWrite { from: from + heads.kv * heads.dim, heads, batch: Arc::clone(batch) })
}

struct KvWrite {
    from: usize,
    heads: Heads,
    batch: Arc<Batch>,
}

impl KvWrite {
    fn launch<K: CudaDType>(&self, name: &str, pool: &mut CudaStorage, qkv: CudaView<'_, f32>) -> Result<()> {
        let device = pool.device().clone();
        let function = device.get_or_load_custom_func(name, MODULE, PTX)?;
        let mut launch = function.builder();
        let width = (self.heads.kv * self.heads.dim) as i32;
        let (row_width, from) = (self.heads.width() as i32, self.from as i32);
        launch.arg(&qkv).arg(&self.batch.slot).arg(pool.as_cuda_slice_mut::<K>()?);
        launch.arg(&row_width).arg(&from).arg(&width);
        // SAFETY: the arguments are those of the kernel; every slot lies in the pool (the scheduler's tables name no other).
        unsafe { launch.launch(rows_of(self.batch.rows)) }.w()?;
        Ok(())
    }
}

impl InplaceOp2 for KvWrite {
    fn name(&self) -> &'static str {
        "kv_write"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<()> {
        only_cuda()
    }

    fn cuda_fwd(&self, pool: &mut CudaStorage, pl: &Layout, qkv: &CudaStorage, ql: &Layout) -> Result<()> {
        if pl.start_offset() != 0 || !pl.is_contiguous() || ql.dims() != [self.batch.rows, self.heads.width()] {
            bail!("kv_write: {:?} into {:?}", ql.dims(), pl.dims());
        }
        let qkv = piece::<f32>(qkv, ql)?;
        match pool.dtype() {
            DType::F32 => self.launch::<f32>("kv_write_f32", pool, qkv),
            DType::BF16 => self.launch::<half::bf16>("kv_write_bf16", pool, qkv),
            other => bail!("kv_write: a pool of {other:?}"),
        }
    }
}

pub(super) fn attention(qkv: &Tensor, pool: &Pool, heads: Heads, scores: Scores, batch: &Arc<Batch>) -> Result<Tensor> {
    qkv.apply_op3_no_bwd(&pool.keys, &pool.values, &Attention { heads, scores, batch: Arc::clone(batch) })
}

struct Attention {
    heads: Heads,
    scores: Scores,
    batch: Arc<Batch>,
}

impl Attention {
    fn launch<K: CudaDType>(
        &self,
        kind: &str,
        qkv: CudaView<'_, f32>,
        keys: CudaView<'_, K>,
        values: CudaView<'_, K>,
        device: &CudaDevice,
    ) -> Result<CudaStorage> {
        let Heads { q, kv, dim } = self.heads;
        let Tiling { per_lane, queries, parts, .. } = Tiling::of(self.heads)?;
        let rows = self.batch.rows;
        let splits = self.batch.longest.div_ceil(SPLIT_KEYS).max(1);
        // SAFETY: `attend` leaves a part for every split up to its row's own, and `join` reads no other.
        let mut partial = unsafe { device.alloc::<f32>(rows * q * splits as usize * (dim + 2)) }?;
        // SAFETY: `join` writes every number.
        let mut out = unsafe { device.alloc::<f32>(rows * q * dim) }?;

        let window = self.scores.window.map_or(0, |window| window.min(i32::MAX as usize)) as i32;
        let (scale, softcap) = (self.scores.scale, self.scores.softcap.unwrap_or(0.0));
        let [q_heads, kv_heads, width, parts_arg] = [q, kv, dim, parts].map(|n| n as i32);
        let name = format!("attend_{kind}_{per_lane}_{queries}");
        let function = device.get_or_load_custom_func(&name, MODULE, PTX)?;
        let mut launch = function.builder();
        launch.arg(&qkv).arg(&keys).arg(&values).arg(&self.batch.pos).arg(&self.batch.tiles).arg(&self.batch.tables);
        launch.arg(&mut partial).arg(&q_heads).arg(&kv_heads).arg(&width).arg(&window).arg(&scale).arg(&softcap);
        launch.arg(&parts_arg);
        let grid = (self.batch.tile_count, (kv * parts) as u32, splits);
        // SAFETY: the arguments are those of the kernel; tables name blocks of the pool, tiles rows of the batch.
        unsafe {
            launch.launch(LaunchConfig { grid_dim: grid, block_dim: (ATTEND_THREADS, 1, 1), shared_mem_bytes: 0 })
        }
        .w()?;

        let splits = splits as i32;
        let function = device.get_or_load_custom_func("join", MODULE, PTX)?;
        let mut launch = function.builder();
        launch.arg(&partial).arg(&self.batch.pos).arg(&mut out).arg(&width).arg(&splits);
        let grid = (rows as u32, q as u32, 1);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            launch.launch(LaunchConfig { grid_dim: grid, block_dim: (ATTEND_THREADS, 1, 1), shared_mem_bytes: 0 })
        }
        .w()?;
        Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "paged_attention"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        only_cuda()
    }

    fn cuda_fwd(
        &self,
        qkv: &CudaStorage,
        ql: &Layout,
        keys: &CudaStorage,
        kl: &Layout,
        values: &CudaStorage,
        vl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        if ql.dims() != [self.batch.rows, self.heads.width()] {
            bail!("paged_attention: {:?} for {} rows", ql.dims(), self.batch.rows);
        }
        let (device, rows) = (qkv.device(), piece::<f32>(qkv, ql)?);
        let out = match keys.dtype() {
            DType::F32 => self.launch::<f32>("f32", rows, piece(keys, kl)?, piece(values, vl)?, device),
            DType::BF16 => self.launch::<half::bf16>("bf16", rows, piece(keys, kl)?, piece(values, vl)?, device),
            other => bail!("paged_attention: a pool of {other:?}"),
        };
        Ok((out?, (self.batch.rows, self.heads.q * self.heads.dim).into()))
    }
}

pub(super) fn gate_mul(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    gate_up.contiguous()?.apply_op1_no_bwd(&Gate(activation))
}

struct Gate(Activation);

impl CustomOp1 for Gate {
    fn name(&self) -> &'static str {
        "gate_mul"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        only_cuda()
    }

    fn cuda_fwd(&self, gate_up: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (rows, inner) = (layout.dims()[0], layout.dims()[1] / 2);
        let (device, count) = (gate_up.device(), rows * inner);
        let name = match self.0 {
            Activation::Silu => "silu_mul",
            Activation::GeluTanh => "gelu_tanh_mul",
        };
        // SAFETY: the kernel writes every number.
        let mut out = unsafe { device.alloc::<f32>(count) }?;
        let (gate_up, width) = (piece::<f32>(gate_up, layout)?, inner as i32);
        let function = device.get_or_load_custom_func(name, MODULE, PTX)?;
        let mut launch = function.builder();
        launch.arg(&gate_up).arg(&mut out).arg(&width).arg(&count);
        // SAFETY: the arguments are those of the kernel, `size_t` is a usize.
        unsafe { launch.launch(rows_of(count.div_ceil(ROW_THREADS as usize))) }.w()?;
        Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), (rows, inner).into()))
    }
}

/// h + scale · y, and its norm by `weight`.
pub(super) fn add_rms_norm(h: &Tensor, y: &Tensor, scale: f32, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let both = h.contiguous()?.apply_op3_no_bwd(&y.contiguous()?, weight, &AddRmsNorm { scale, eps })?;
    Ok((both.narrow(0, 0, 1)?.squeeze(0)?, both.narrow(0, 1, 1)?.squeeze(0)?))
}

struct AddRmsNorm {
    scale: f32,
    eps: f32,
}

impl CustomOp3 for AddRmsNorm {
    fn name(&self) -> &'static str {
        "add_rms_norm"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        only_cuda()
    }

    fn cuda_fwd(
        &self,
        h: &CudaStorage,
        hl: &Layout,
        y: &CudaStorage,
        yl: &Layout,
        weight: &CudaStorage,
        wl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (rows, width) = (hl.dims()[0], hl.dims()[1]);
        if yl.dims() != hl.dims() || wl.dims() != [width] {
            bail!("add_rms_norm: {:?} and {:?} by {:?}", hl.dims(), yl.dims(), wl.dims());
        }
        let device = h.device();
        // SAFETY: the kernel writes every number.
        let mut out = unsafe { device.alloc::<f32>(2 * rows * width) }?;
        let (h, y, weight) = (piece::<f32>(h, hl)?, piece::<f32>(y, yl)?, piece::<f32>(weight, wl)?);
        let count = width as i32;
        let function = device.get_or_load_custom_func("add_rms_norm", MODULE, PTX)?;
        let mut launch = function.builder();
        launch.arg(&h).arg(&y).arg(&self.scale).arg(&weight).arg(&mut out).arg(&count).arg(&self.eps);
        // SAFETY: the arguments are those of the kernel.
        unsafe { launch.launch(rows_of(rows)) }.w()?;
        Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), (2, rows, width).into()))
    }
}
