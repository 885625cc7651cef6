//! From files to owned numbers. A file is read, never trusted: whatever it claims is checked before it is believed.

pub(crate) mod folder;
pub(crate) mod gguf;
pub(crate) mod quantize;
pub(crate) mod safetensors;

use crate::kernels::cpu::{Kind, Raw};
use candle_core::Tensor;
use std::path::{Path, PathBuf};

/// The tensors of a model, by their Hugging Face names, whatever kind of file they lie in.
pub(crate) trait Tensors {
    /// The kind in which the file stores a matrix and the one in which [`Tensors::matrix`] gives it. From the header alone.
    fn kinds(&self, name: &str, rows: usize, columns: usize) -> Result<[Kind; 2], WeightError>;
    /// The matrix `[rows, columns]` as stored. Every number in it is finite.
    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Raw, WeightError>;
    /// A vector of `len` numbers, in f32.
    fn vector(&self, name: &str, len: usize) -> Result<Tensor, WeightError>;
    /// The files that hold the weights.
    fn files(&self) -> Vec<PathBuf>;
}

/// What is wrong with which file.
#[derive(Debug)]
pub(crate) struct WeightError {
    pub file: PathBuf,
    /// Reads after the file's name.
    pub why: String,
}

impl WeightError {
    pub fn new(file: &Path, why: impl Into<String>) -> WeightError {
        WeightError { file: file.to_owned(), why: why.into() }
    }
}

impl From<candle_core::Error> for WeightError {
    /// Packing fails only on shapes that were checked before, so no file is to blame.
    fn from(error: candle_core::Error) -> WeightError {
        WeightError { file: PathBuf::new(), why: error.to_string() }
    }
}
