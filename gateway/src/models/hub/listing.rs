//! What the hub says of a revision, of which we believe as much as we check, and which of its files a model needs.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::checksum::Checksum;
use super::download::Listed;
use super::reference::{Reference, is_name};

/// What a folder may hold besides weights, and what its modules keep in folders of their own.
const SMALL: [&str; 8] = [
    "chat_template.jinja",
    "config.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    MODULES,
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
];
const MODULES: &str = "modules.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The largest index known has a few MiB.
const NAMES_BYTES_MAX: u64 = 32 << 20;

/// What `/api/models/…/revision/…` says.
#[derive(Deserialize)]
pub(super) struct Revision {
    pub sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

impl Revision {
    /// The files that are fetched first: the one that was asked for, or the small ones of a folder.
    pub fn first(&self, reference: &Reference) -> Result<Vec<Listed>, String> {
        if let Some(file) = &reference.file {
            return Ok(vec![self.listed(file).ok_or_else(|| {
                let known: Vec<&str> = self.names().filter(|name| name.ends_with(".gguf")).collect();
                format!("has no file `{file}` (it has: {})", known.join(", "))
            })?]);
        }
        let has = |name: &str| self.names().any(|known| known == name);
        if !has("config.json") || !(has(SINGLE) || has(INDEX)) {
            return Err(format!(
                "has no config.json with {SINGLE} or {INDEX} beside it; name the .gguf file that you want"
            ));
        }
        let index = (!has(SINGLE)).then_some(INDEX);
        Ok(SMALL.into_iter().chain(index).filter_map(|name| self.listed(name)).collect())
    }

    /// The files that those of a folder name: configurations of modules, and weights.
    pub fn named(&self, folder: &Path) -> Result<Vec<Listed>, String> {
        let modules = read(&folder.join(MODULES))?;
        let paths = modules.as_array().into_iter().flatten().filter_map(|module| module.get("path")?.as_str());
        // Nothing that leads elsewhere is fetched; whoever loads the model says what is wrong with it.
        let plain = paths.filter(|path| path.split('/').all(is_name)).map(|path| format!("{path}/config.json"));
        let mut files: Vec<Listed> = plain.filter_map(|name| self.listed(&name)).collect();
        if let Some(single) = self.listed(SINGLE) {
            files.push(single);
            return Ok(files);
        }
        let index = read(&folder.join(INDEX))?;
        let shards = index.get("weight_map").and_then(Value::as_object);
        let shards: Option<BTreeSet<&str>> = shards.and_then(|map| map.values().map(Value::as_str).collect());
        for name in shards.ok_or_else(|| format!("{INDEX} has no `weight_map` of file names"))? {
            let listed = self.listed(name).filter(|_| is_name(name) && name.ends_with(".safetensors"));
            files.push(listed.ok_or_else(|| format!("{INDEX} names {name:?}, which is no file of weights beside it"))?);
        }
        Ok(files)
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.siblings.iter().map(|file| file.rfilename.as_str())
    }

    fn listed(&self, name: &str) -> Option<Listed> {
        let file = self.siblings.iter().find(|file| file.rfilename == name)?;
        let checksum = match (&file.lfs, &file.blob) {
            (Some(lfs), _) => Checksum::from_etag(&lfs.sha256),
            (None, blob) => blob.as_deref().and_then(Checksum::from_etag),
        };
        Some(Listed { name: name.to_owned(), bytes: file.size, checksum })
    }
}

/// A file's JSON; null if it does not exist.
fn read(path: &Path) -> Result<Value, String> {
    let wrong = |why: String| format!("{}: {why}", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Value::Null),
        file => file.map_err(|error| wrong(error.to_string()))?,
    };
    let mut text = Vec::new();
    file.take(NAMES_BYTES_MAX).read_to_end(&mut text).map_err(|error| wrong(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| wrong(format!("is not valid JSON: {error}")))
}
