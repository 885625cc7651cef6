//! A GGUF file's table of tensors. Afterwards every tensor lies inside the file, is as long as its shape and type say,
//! overlaps no other, and has a type that we can compute with.

use super::{
    metadata::Metadata,
    reader::{Because, Reader},
};
use crate::kernels::cpu::Kind;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
};

const MAGIC: [u8; 4] = *b"GGUF";
const ALIGNMENT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 20;
const DIMENSIONS_MAX: u32 = 4;

#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub kind: Kind,
    /// `[rows, columns]` of a matrix, `[1, len]` of a vector.
    pub rows: u64,
    pub columns: u64,
    /// From the beginning of the file.
    pub start: u64,
    pub len: u64,
}

#[derive(Debug)]
pub(super) struct Header {
    pub metadata: Metadata,
    /// By the names that the file uses.
    pub tensors: BTreeMap<String, Entry>,
}

/// A line of the table before the data's position is known.
struct Line {
    name: String,
    kind: Kind,
    rows: u64,
    columns: u64,
    /// From the beginning of the data.
    offset: u64,
    len: u64,
}

pub(super) fn read(file: &File) -> Because<Header> {
    let about = file.metadata().map_err(|error| format!("cannot be read: {error}"))?;
    if !about.is_file() {
        return Err("is not a regular file".to_owned());
    }
    let file_bytes = about.len();
    let mut reader = Reader::new(file, file_bytes);
    if reader.bytes("magic")? != MAGIC {
        return Err("does not begin with `GGUF`: not a GGUF file?".to_owned());
    }
    match reader.u32("version")? {
        2 | 3 => {}
        // Version 3 in the other byte order.
        0x0200_0000 | 0x0300_0000 => return Err("is big endian; convert it to little endian".to_owned()),
        other => return Err(format!("has version {other} (supported: 2 and 3)")),
    }
    // A tensor takes at least name length, dimensions, one dimension, type and offset; a pair its key, type and a byte.
    let tensors = reader.count(32, "tensors")?;
    let pairs = reader.count(13, "metadata pairs")?;
    let mut metadata = Metadata::default();
    for _ in 0..pairs {
        let key = reader.name("metadata key")?;
        let value = reader.value(&key)?;
        metadata.insert(key, value)?;
    }
    let alignment = alignment(&metadata)?;
    let mut names = BTreeSet::new();
    let mut lines = Vec::new();
    for _ in 0..tensors {
        let line = line(&mut reader)?;
        if line.offset % alignment != 0 {
            return Err(format!(
                "tensor `{}` begins at {}, which is not aligned to {alignment}",
                line.name, line.offset
            ));
        }
        if !names.insert(line.name.clone()) {
            return Err(format!("tensor `{}` comes twice", line.name));
        }
        lines.push(line);
    }
    let data_start = reader.position().next_multiple_of(alignment);
    place(lines, data_start, file_bytes).map(|tensors| Header { metadata, tensors })
}

fn alignment(metadata: &Metadata) -> Because<u64> {
    match metadata.count("general.alignment")? {
        None => Ok(ALIGNMENT),
        Some(n) if n.is_power_of_two() && (8..=ALIGNMENT_MAX).contains(&n) => Ok(n),
        Some(n) => Err(format!("`general.alignment` must be a power of two from 8 to {ALIGNMENT_MAX}, got {n}")),
    }
}

fn line(reader: &mut Reader<'_>) -> Because<Line> {
    let name = reader.name("tensor name")?;
    let dimensions = reader.u32("tensor table")?;
    if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
        return Err(format!("tensor `{name}` has {dimensions} dimensions"));
    }
    let shape = (0..dimensions).map(|_| reader.u64("tensor table")).collect::<Because<Vec<u64>>>()?;
    // The file counts from the fastest dimension.
    let (columns, rows) = match *shape.as_slice() {
        [columns] => (columns, 1),
        [columns, rows] => (columns, rows),
        _ => return Err(format!("tensor `{name}` of shape {shape:?} is neither a vector nor a matrix")),
    };
    let kind = kind(reader.u32("tensor table")?).map_err(|why| format!("tensor `{name}` {why}"))?;
    let offset = reader.u64("tensor table")?;
    let block = kind.block_len() as u64;
    if columns == 0 || rows == 0 || columns % block != 0 {
        return Err(format!("tensor `{name}` of shape {shape:?} does not consist of blocks of {block}"));
    }
    let len = (columns / block).checked_mul(kind.block_bytes() as u64).and_then(|row| row.checked_mul(rows));
    let len = len.ok_or_else(|| format!("tensor `{name}` of shape {shape:?} is larger than any file"))?;
    Ok(Line { name, kind, rows, columns, offset, len })
}

fn place(lines: Vec<Line>, data_start: u64, file_bytes: u64) -> Because<BTreeMap<String, Entry>> {
    let mut spans = Vec::with_capacity(lines.len());
    let mut tensors = BTreeMap::new();
    for Line { name, kind, rows, columns, offset, len } in lines {
        let start = data_start.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(len)).filter(|&end| end <= file_bytes);
        let (Some(start), Some(end)) = (start, end) else {
            return Err(format!(
                "is truncated or damaged: tensor `{name}` has {len} bytes at {offset} of the data, the file has {file_bytes}"
            ));
        };
        spans.push((start, end, name.clone()));
        tensors.insert(name, Entry { kind, rows, columns, start, len });
    }
    spans.sort_unstable();
    match spans.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        Some(pair) => Err(format!("tensors `{}` and `{}` overlap", pair[0].2, pair[1].2)),
        None => Ok(tensors),
    }
}

/// The type with this number in ggml's list.
fn kind(number: u32) -> Because<Kind> {
    let name = match number {
        0 => return Ok(Kind::F32),
        1 => return Ok(Kind::F16),
        2 => return Ok(Kind::Q4_0),
        8 => return Ok(Kind::Q8_0),
        12 => return Ok(Kind::Q4K),
        13 => return Ok(Kind::Q5K),
        14 => return Ok(Kind::Q6K),
        30 => return Ok(Kind::Bf16),
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        40 => "NVFP4",
        other => return Err(format!("has the unknown type {other}")),
    };
    Err(format!("has type {name} (supported: F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K, Q6_K)"))
}
