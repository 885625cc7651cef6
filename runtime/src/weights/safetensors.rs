//! Safetensors files, one or in shards: the header is checked in full before any number is read, and numbers are read
//! into memory that we own.
//!
//! Files are read, not mapped: a mapped file that somebody truncates meanwhile kills the process, a read one is an
//! error.

use super::{Tensors, WeightError, folder::read_json};
use crate::kernels::cpu::{Kind, Raw};
use candle_core::{Device, Tensor};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use std::{
    collections::BTreeMap,
    fs::File,
    io::Read,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// The format's own bound.
const HEADER_BYTES_MAX: u64 = 100_000_000;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// All tensors of a model, by name. Holds open files and positions, no numbers.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    shards: Vec<Shard>,
    /// name → (shard, entry)
    tensors: BTreeMap<String, (usize, Entry)>,
    /// What to blame for a tensor that is nowhere.
    main: PathBuf,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
}

#[derive(Clone, Debug)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    /// From the beginning of the file.
    start: u64,
    len: u64,
}

impl Checkpoint {
    pub fn open(folder: &Path) -> Result<Checkpoint, WeightError> {
        let single = folder.join(SINGLE);
        let index = folder.join(INDEX);
        let (main, paths) = if single.exists() || !index.exists() {
            (single.clone(), vec![single])
        } else {
            let paths = shard_names(&index)?.into_iter().map(|name| folder.join(name)).collect();
            (index, paths)
        };
        let mut checkpoint = Checkpoint { shards: Vec::new(), tensors: BTreeMap::new(), main };
        for path in paths {
            checkpoint.add(path)?;
        }
        Ok(checkpoint)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), WeightError> {
        let bad = |why: String| WeightError::new(&path, why);
        let file = File::open(&path).map_err(|error| bad(format!("cannot be opened: {error}")))?;
        let entries = read_header(&file).map_err(bad)?;
        for (name, entry) in entries {
            if self.tensors.insert(name.clone(), (self.shards.len(), entry)).is_some() {
                return Err(bad(format!("tensor `{name}` is in another shard too")));
            }
        }
        self.shards.push(Shard { path, file });
        Ok(())
    }

    fn find(&self, name: &str, shape: &[u64]) -> Result<(&Shard, &Entry, Kind), WeightError> {
        let Some((shard, entry)) = self.tensors.get(name) else {
            return Err(WeightError::new(&self.main, format!("tensor `{name}` is missing")));
        };
        let shard = &self.shards[*shard];
        let bad = |why: String| WeightError::new(&shard.path, why);
        if entry.shape != shape {
            return Err(bad(format!("tensor `{name}` has shape {:?}, config.json asks for {shape:?}", entry.shape)));
        }
        let kind = match entry.dtype.as_str() {
            "F32" => Kind::F32,
            "F16" => Kind::F16,
            "BF16" => Kind::Bf16,
            other => return Err(bad(format!("tensor `{name}` has type {other}, expected F32, F16 or BF16"))),
        };
        Ok((shard, entry, kind))
    }

    fn read(&self, name: &str, shape: &[u64]) -> Result<(Kind, Vec<u8>), WeightError> {
        let (shard, entry, kind) = self.find(name, shape)?;
        let bad = |why: String| WeightError::new(&shard.path, why);
        // Both the shape and the length were checked against the file, so this is no more than the file holds.
        let mut bytes = vec![0; entry.len as usize];
        shard
            .file
            .read_exact_at(&mut bytes, entry.start)
            .map_err(|error| bad(format!("tensor `{name}` cannot be read: {error}")))?;
        if !kind.all_finite(&bytes) {
            return Err(bad(format!("tensor `{name}` holds numbers that are not finite")));
        }
        Ok((kind, bytes))
    }
}

impl Tensors for Checkpoint {
    fn kinds(&self, name: &str, rows: usize, columns: usize) -> Result<[Kind; 2], WeightError> {
        let (_, _, kind) = self.find(name, &[rows as u64, columns as u64])?;
        Ok([kind; 2])
    }

    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Raw, WeightError> {
        let (kind, bytes) = self.read(name, &[rows as u64, columns as u64])?;
        Ok(Raw { kind, rows, columns, bytes })
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor, WeightError> {
        let (kind, bytes) = self.read(name, &[len as u64])?;
        let mut numbers = vec![0f32; len];
        kind.widen(&bytes, &mut numbers);
        Ok(Tensor::from_vec(numbers, len, &Device::Cpu)?)
    }

    fn files(&self) -> Vec<PathBuf> {
        self.shards.iter().map(|shard| shard.path.clone()).collect()
    }
}

/// The shards that an index names, each once.
fn shard_names(index: &Path) -> Result<Vec<String>, WeightError> {
    let bad = |why: String| WeightError::new(index, why);
    let json = read_json(index)?.ok_or_else(|| bad("is missing".to_owned()))?;
    let map =
        json.get("weight_map").and_then(|map| map.as_object()).ok_or_else(|| bad("has no `weight_map`".to_owned()))?;
    let mut names = Vec::new();
    for value in map.values() {
        let name = value.as_str().ok_or_else(|| bad(format!("`weight_map` names {value} as a file")))?;
        // A shard lies beside its index, not somewhere else on the machine.
        if name.contains(['/', '\\']) || !name.ends_with(".safetensors") {
            return Err(bad(format!("`weight_map` names `{name}`, expected a .safetensors file in the same folder")));
        }
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

#[derive(Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The tensors of one file, with absolute positions. Afterwards every entry lies inside the file, is as long as its
/// shape and type say, and overlaps no other.
fn read_header(file: &File) -> Result<Vec<(String, Entry)>, String> {
    let metadata = file.metadata().map_err(|error| format!("cannot be read: {error}"))?;
    if !metadata.is_file() {
        return Err("is not a regular file".to_owned());
    }
    let file_len = metadata.len();
    let mut first = [0; 8];
    let mut reader = file;
    reader.read_exact(&mut first).map_err(|_| format!("is truncated: {file_len} bytes are no safetensors file"))?;
    let header_len = u64::from_le_bytes(first);
    if header_len > HEADER_BYTES_MAX {
        return Err(format!(
            "claims a header of {header_len} bytes (at most {HEADER_BYTES_MAX}): not a safetensors file?"
        ));
    }
    if header_len > file_len.saturating_sub(8) {
        return Err(format!("is truncated: its header has {header_len} bytes, the file {file_len}"));
    }
    let mut header = vec![0; header_len as usize];
    reader.read_exact(&mut header).map_err(|error| format!("its header cannot be read: {error}"))?;
    let Header(entries) =
        serde_json::from_slice(&header).map_err(|error| format!("its header is not valid: {error}"))?;

    let data_start = 8 + header_len;
    let data_len = file_len - data_start;
    let mut spans = Vec::with_capacity(entries.len());
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, HeaderEntry { dtype, shape, data_offsets: (from, to) }) in entries {
        if from > to || to > data_len {
            return Err(format!(
                "is truncated or damaged: tensor `{name}` spans {from}..{to} of {data_len} data bytes"
            ));
        }
        let bits = bits_of(&dtype).ok_or_else(|| format!("tensor `{name}` has the unknown type {dtype}"))?;
        let claimed = shape.iter().try_fold(bits, |product, &n| product.checked_mul(n));
        if claimed != (to - from).checked_mul(8) {
            return Err(format!(
                "tensor `{name}` of shape {shape:?} and type {dtype} does not have {} bytes",
                to - from
            ));
        }
        spans.push((from, to, name.clone()));
        tensors.push((name, Entry { dtype, shape, start: data_start + from, len: to - from }));
    }
    spans.sort_unstable();
    if let Some(pair) = spans.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        return Err(format!("tensors `{}` and `{}` overlap", pair[0].2, pair[1].2));
    }
    let end = spans.iter().map(|span| span.1).max().unwrap_or(0);
    if end != data_len {
        return Err(format!("has {data_len} data bytes, its tensors end at {end}"));
    }
    Ok(tensors)
}

/// Bits of one number of each type that the format knows; we load three of them, but a file may hold others too.
fn bits_of(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// A header in file order. Unlike a map it notices a name that comes twice.
struct Header(Vec<(String, HeaderEntry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else if seen.insert(name.clone()) {
                        entries.push((name, map.next_value()?));
                    } else {
                        return Err(serde::de::Error::custom(format!("tensor `{name}` comes twice")));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
