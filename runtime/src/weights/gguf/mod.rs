//! A model in one GGUF file, shown in Hugging Face terms: its metadata as a `config.json`, its tensors under Hugging
//! Face names and in Hugging Face's order of rows. The header is checked in full before any number is read.

mod architecture;
mod config;
mod metadata;
mod names;
mod reader;
mod table;
mod vocabulary;

pub(crate) use vocabulary::{TokenKind, Vocabulary, VocabularyModel};

use super::{Tensors, WeightError};
use crate::kernels::cpu::{Kind, Raw};
use architecture::Architecture;
use candle_core::{Device, Tensor};
use config::{Evidence, RopeFactors};
use names::Biases;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};
use table::{Entry, Header};

/// An open file and positions in it, no numbers.
#[derive(Debug)]
pub(crate) struct Gguf {
    path: PathBuf,
    file: File,
    architecture: &'static Architecture,
    tensors: BTreeMap<String, Entry>,
    /// Heads of Q and of K, to put their rows in order.
    heads: (usize, usize),
}

/// What a file holds besides numbers.
pub(crate) struct Opened {
    pub weights: Gguf,
    /// As `config.json` would say it.
    pub config: Value,
    pub vocabulary: Vocabulary,
}

impl Gguf {
    pub fn open(path: &Path) -> Result<Opened, WeightError> {
        let bad = |why: String| WeightError::new(path, why);
        let file = File::open(path).map_err(|error| bad(format!("cannot be opened: {error}")))?;
        let Header { metadata, tensors } = table::read(&file).map_err(bad)?;
        if metadata.has("split.count") {
            return Err(bad("is one of several parts; merge them into one file first".to_owned()));
        }
        let name = metadata.text("general.architecture").map_err(bad)?;
        let name = name.ok_or_else(|| bad("`general.architecture` is missing".to_owned()))?;
        let architecture = architecture::find(name).map_err(bad)?;
        let heads = |key: &str| {
            let count = metadata.count(&format!("{}.attention.{key}", architecture.name)).map_err(bad)?;
            Ok::<_, WeightError>(count.and_then(|count| usize::try_from(count).ok()))
        };
        let q_heads = heads("head_count")?.unwrap_or(0);
        let heads = (q_heads, heads("head_count_kv")?.unwrap_or(q_heads));
        let vocabulary = vocabulary::vocabulary(&metadata, architecture.name).map_err(bad)?;
        let weights = Gguf { path: path.to_owned(), file, architecture, tensors, heads };
        let evidence = weights.evidence()?;
        let config = config::config(architecture, &metadata, &vocabulary, &evidence).map_err(bad)?;
        let layers = config["num_hidden_layers"].as_u64().unwrap_or(0);
        let is_stranger = |name: &&String| !names::is_read(architecture, layers, evidence.biases, name);
        if let Some(stranger) = weights.tensors.keys().find(is_stranger) {
            return Err(bad(format!("has the tensor `{stranger}`, which is not known of `{}`", architecture.name)));
        }
        Ok(Opened { weights, config, vocabulary })
    }

    fn evidence(&self) -> Result<Evidence, WeightError> {
        let rows = |name: &str| self.tensors.get(name).map(|entry| entry.rows);
        let vocab = rows("token_embd.weight")
            .ok_or_else(|| WeightError::new(&self.path, "tensor `token_embd.weight` is missing"))?;
        let factors =
            |name: &str| self.tensors.get(name).map(|entry| self.numbers(name, entry.columns as usize)).transpose();
        let rope = match (factors(names::ROPE_FREQS)?, factors(names::ROPE_SHORT)?, factors(names::ROPE_LONG)?) {
            (None, None, None) => RopeFactors::None,
            (Some(all), None, None) => RopeFactors::All(all),
            (None, Some(short), Some(long)) => RopeFactors::ByLength { short, long },
            _ => {
                return Err(WeightError::new(&self.path, "has factors of rotary frequencies that do not fit together"));
            }
        };
        let tied = rows("output.weight").is_none();
        let biases = Biases::found(self.architecture, |name| self.tensors.contains_key(name));
        Ok(Evidence { vocab, tied, biases, rope })
    }

    fn find(&self, stored: &str, rows: usize, columns: usize) -> Result<&Entry, WeightError> {
        let bad = |why: String| WeightError::new(&self.path, why);
        let Some(entry) = self.tensors.get(stored) else {
            return Err(bad(format!("tensor `{stored}` is missing")));
        };
        if (entry.rows, entry.columns) != (rows as u64, columns as u64) {
            let (has_rows, has_columns) = (entry.rows, entry.columns);
            return Err(bad(format!(
                "tensor `{stored}` has shape [{has_rows}, {has_columns}], its metadata asks for [{rows}, {columns}]"
            )));
        }
        Ok(entry)
    }

    /// The tensor that the file calls `stored`, as it lies there. `name`: what it is called in messages.
    fn read(&self, name: &str, stored: &str, rows: usize, columns: usize) -> Result<Raw, WeightError> {
        let bad = |why: String| WeightError::new(&self.path, why);
        let entry = self.find(stored, rows, columns)?;
        // Both the shape and the length were checked against the file, so this is no more than the file holds.
        let mut bytes = vec![0; entry.len as usize];
        self.file
            .read_exact_at(&mut bytes, entry.start)
            .map_err(|error| bad(format!("tensor `{stored}` cannot be read: {error}")))?;
        if !entry.kind.all_finite(&bytes) {
            return Err(bad(format!("tensor `{stored}` holds numbers that are not finite")));
        }
        let bytes = self.in_halves(name, rows, bytes).map_err(bad)?;
        Ok(Raw { kind: entry.kind, rows, columns, bytes })
    }

    /// Undoes the pairing of Q's and K's rows, so that one kind of rotary position serves all families. Blocks run along
    /// columns, so whole rows can be moved whatever they are made of.
    fn in_halves(&self, name: &str, rows: usize, bytes: Vec<u8>) -> Result<Vec<u8>, String> {
        let heads = match name.rsplit('.').nth(1) {
            Some("q_proj") => self.heads.0,
            Some("k_proj") => self.heads.1,
            _ => return Ok(bytes),
        };
        if !self.architecture.pairs {
            return Ok(bytes);
        }
        let half = rows.checked_div(heads).unwrap_or(0) / 2;
        if half == 0 || half * 2 * heads != rows {
            return Err(format!("tensor `{name}` of {rows} rows cannot be shared by {heads} heads"));
        }
        let row_bytes = bytes.len() / rows;
        let mut ordered = Vec::with_capacity(bytes.len());
        for row in 0..rows {
            let (head, part, at) = (row / (2 * half), row / half % 2, row % half);
            let from = (head * 2 * half + 2 * at + part) * row_bytes;
            ordered.extend_from_slice(&bytes[from..from + row_bytes]);
        }
        Ok(ordered)
    }

    /// A vector in f32, under the file's own name.
    fn numbers(&self, stored: &str, len: usize) -> Result<Vec<f32>, WeightError> {
        let raw = self.read(stored, stored, 1, len)?;
        Ok(widened(&raw))
    }

    fn stored(&self, name: &str) -> Result<String, WeightError> {
        names::stored(self.architecture, name).ok_or_else(|| {
            let why = format!("cannot hold `{name}`: its architecture is `{}`", self.architecture.name);
            WeightError::new(&self.path, why)
        })
    }
}

fn widened(raw: &Raw) -> Vec<f32> {
    let mut numbers = vec![0.0; raw.rows * raw.columns];
    raw.kind.widen(&raw.bytes, &mut numbers);
    numbers
}

impl Tensors for Gguf {
    fn kinds(&self, name: &str, rows: usize, columns: usize) -> Result<[Kind; 2], WeightError> {
        Ok([self.find(&self.stored(name)?, rows, columns)?.kind; 2])
    }

    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Raw, WeightError> {
        self.read(name, &self.stored(name)?, rows, columns)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor, WeightError> {
        let stored = self.stored(name)?;
        let is_norm = name.ends_with("norm.weight");
        let mut numbers = if name.ends_with(".bias") {
            // A bias is ordered as the rows it belongs to.
            let raw = self.read(&stored, &stored, 1, len)?;
            let bytes = self.in_halves(name, len, widened(&raw).iter().flat_map(|x| x.to_le_bytes()).collect());
            let bytes = bytes.map_err(|why| WeightError::new(&self.path, why))?;
            bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
        } else {
            self.numbers(&stored, len)?
        };
        if is_norm && self.architecture.plus_one {
            // Exact from one half on (Sterbenz), and whoever adds one again gets the stored number back.
            numbers.iter_mut().for_each(|x| *x -= 1.0);
        }
        Ok(Tensor::from_vec(numbers, len, &Device::Cpu)?)
    }

    fn files(&self) -> Vec<PathBuf> {
        vec![self.path.clone()]
    }
}
