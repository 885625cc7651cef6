//! Which device models run on, and what a model is made of there.

use super::{LoadError, StartError};
use crate::{
    engine::forward::{Forward, Llm},
    kernels::{
        cpu::{Kind, kernel_name},
        ops::{Cpu, Ops},
    },
    model::{decoder::Decoder, spec::ModelSpec},
    settings::{Activations, Device},
    weights::{Tensors, WeightError},
};
use std::collections::BTreeMap;

pub(super) enum Placement {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(candle_core::Device),
}

/// A model on its device.
pub(super) struct Placed {
    pub forward: Box<dyn Forward>,
    /// Bytes of the matrices, by the kind in which they are kept.
    pub kinds: BTreeMap<Kind, usize>,
}

/// What a model is to become.
pub(super) struct Shape<'a> {
    pub spec: ModelSpec,
    pub tensors: &'a dyn Tensors,
    /// How far the rotary tables reach.
    pub positions: usize,
    pub activations: Activations,
    pub blocks: usize,
}

impl Placement {
    #[cfg(not(feature = "cuda"))]
    pub fn choose(wanted: Device) -> Result<Placement, StartError> {
        match wanted {
            Device::Auto | Device::Cpu => Ok(Placement::Cpu),
            Device::Cuda => {
                let why = "cannot be cuda: this binary was built without it (make cuda builds one with it)";
                Err(StartError::BadSetting { name: "device", why: why.to_owned() })
            }
        }
    }

    #[cfg(feature = "cuda")]
    pub fn choose(wanted: Device) -> Result<Placement, StartError> {
        if wanted == Device::Cpu {
            return Ok(Placement::Cpu);
        }
        match crate::kernels::cuda::open() {
            Ok(device) => Ok(Placement::Cuda(device)),
            Err(error) if wanted == Device::Auto => {
                tracing::info!(%error, "no CUDA device: models run on the processor");
                Ok(Placement::Cpu)
            }
            Err(error) => Err(StartError::BadSetting { name: "device", why: format!("cannot be cuda: {error}") }),
        }
    }

    /// The instructions that the kernels are made of.
    pub fn kernel_name(&self) -> &'static str {
        match self {
            Placement::Cpu => kernel_name(),
            #[cfg(feature = "cuda")]
            Placement::Cuda(_) => "cuda",
        }
    }

    pub fn place(&self, shape: Shape<'_>) -> Result<Placed, LoadError> {
        match self {
            Placement::Cpu => {
                let ops = Cpu(shape.activations);
                shape.on(ops)
            }
            #[cfg(feature = "cuda")]
            Placement::Cuda(device) => {
                shape.on(crate::kernels::plain::Plain::new(device.clone(), candle_core::DType::BF16))
            }
        }
    }
}

impl Shape<'_> {
    fn on<O: Ops + 'static>(self, ops: O) -> Result<Placed, LoadError>
    where
        O::Matrix: 'static,
    {
        let decoder = Decoder::load(ops, &self.spec, self.tensors, self.positions)?;
        let kinds = decoder.kinds();
        let llm = Llm::new(self.spec, decoder, self.activations, self.blocks).map_err(WeightError::from)?;
        Ok(Placed { forward: Box::new(llm), kinds })
    }
}
