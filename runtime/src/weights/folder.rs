//! A model folder in Hugging Face layout: small JSON files, and one digest over everything that shapes an answer.

use super::WeightError;
use serde_json::Value;
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// No configuration or tokenizer we know of comes near this; a larger one is a mistake or an attack.
const JSON_BYTES_MAX: u64 = 256 << 20;

/// The whole file as text, or None if it does not exist.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>, WeightError> {
    let bad = |why: String| WeightError::new(path, why);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(bad(format!("cannot be opened: {error}"))),
    };
    let mut text = String::new();
    // One byte more than allowed, to notice a file that is larger.
    file.take(JSON_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|error| bad(format!("cannot be read as text: {error}")))?;
    if text.len() as u64 > JSON_BYTES_MAX {
        return Err(bad(format!("is larger than {JSON_BYTES_MAX} bytes")));
    }
    Ok(Some(text))
}

/// The file as JSON, or None if it does not exist.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>, WeightError> {
    let Some(text) = read_text(path)? else { return Ok(None) };
    serde_json::from_str(&text).map(Some).map_err(|error| WeightError::new(path, format!("is not valid JSON: {error}")))
}

/// Like [`read_json`], for a file that must exist.
pub(crate) fn require_json(path: &Path) -> Result<Value, WeightError> {
    read_json(path)?.ok_or_else(|| WeightError::new(path, "is missing"))
}

/// Hex blake3 over name, length and bytes of each file that exists, in the given order.
pub(crate) fn digest(files: &[PathBuf]) -> Result<String, WeightError> {
    let mut hasher = blake3::Hasher::new();
    for path in files {
        let bad = |error: std::io::Error| WeightError::new(path, format!("cannot be read: {error}"));
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(bad(error)),
        };
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name);
        let before = hasher.count();
        hasher.update_reader(file).map_err(bad)?;
        let len = hasher.count() - before;
        hasher.update(&len.to_le_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}
