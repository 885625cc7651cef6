//! Where a model is read from: a folder in Hugging Face layout or one GGUF file. Whoever reads on sees no difference.

use crate::{
    model::spec::ModelSpec,
    registry::{
        LoadError,
        embedder::{is_embedder, read_text_side},
    },
    settings::Renders,
    text::{Message, folder::TextSide},
    weights::{
        Tensors, WeightError, folder,
        gguf::{Gguf, Opened},
        safetensors::Checkpoint,
    },
};
use serde_json::Value;
use std::path::{Path, PathBuf};

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";

pub(crate) enum Source {
    Folder(PathBuf),
    Gguf { path: PathBuf, opened: Box<Opened> },
}

impl Source {
    /// A path that ends in `.gguf` is a GGUF file, any other a folder.
    pub fn open(path: &Path) -> Result<Source, WeightError> {
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            return Ok(Source::Gguf { path: path.to_owned(), opened: Box::new(Gguf::open(path)?) });
        }
        Ok(Source::Folder(path.to_owned()))
    }

    /// The model's shape as `config.json` says it, and the file that it is from.
    pub fn config(&self) -> Result<(PathBuf, Value), WeightError> {
        match self {
            Source::Folder(folder) => {
                let path = folder.join(CONFIG);
                folder::require_json(&path).map(|json| (path, json))
            }
            Source::Gguf { path, opened } => Ok((path.clone(), opened.config.clone())),
        }
    }

    /// `generation_config.json`, if the model brings one.
    pub fn generation(&self) -> Result<Option<(PathBuf, Value)>, WeightError> {
        match self {
            Source::Folder(folder) => {
                let path = folder.join(GENERATION);
                Ok(folder::read_json(&path)?.map(|json| (path, json)))
            }
            Source::Gguf { .. } => Ok(None),
        }
    }

    /// `vocab`: how many ids the model knows.
    pub fn text(&self, vocab: usize, renders: Renders) -> Result<TextSide, WeightError> {
        match self {
            Source::Folder(folder) => TextSide::read(folder, vocab, renders),
            Source::Gguf { path, opened } => TextSide::from_vocabulary(path, &opened.vocabulary, vocab, renders),
        }
    }

    /// The tensors, and all files that shape an answer.
    pub fn weights(self) -> Result<(Box<dyn Tensors>, Vec<PathBuf>), WeightError> {
        match self {
            Source::Folder(folder) => {
                let checkpoint = Checkpoint::open(&folder)?;
                let mut files: Vec<PathBuf> = [CONFIG, GENERATION].map(|name| folder.join(name)).into();
                files.extend(TextSide::files(&folder));
                files.extend(checkpoint.files());
                Ok((Box::new(checkpoint), files))
            }
            Source::Gguf { opened, .. } => {
                let files = opened.weights.files();
                Ok((Box::new(opened.weights), files))
            }
        }
    }
}

/// Reads tokenizer and chat template as [`crate::Runtime::load`] and [`crate::Runtime::load_embedder`] will, and no
/// weights. Hostile ones may take all memory or time there is, so this is best called in a process of its own that may not
/// have them.
pub fn check_text(path: &Path) -> Result<(), LoadError> {
    if is_embedder(path)? {
        return Ok(read_text_side(path).map(drop)?);
    }
    let source = Source::open(path)?;
    let (file, config) = source.config()?;
    let spec = ModelSpec::from_config(&config).map_err(|why| WeightError::new(&file, why))?;
    let text = source.text(spec.vocab, Renders::Here)?;
    for roles in [&["system", "user"][..], &["user", "assistant", "user", "assistant", "user"]] {
        let turns = roles.iter().map(|role| Message { role: (*role).to_owned(), content: "Hello, there!".to_owned() });
        // Some templates refuse some conversations; what counts here is that they come to an end.
        let _ = text.prompt(&turns.collect::<Vec<_>>());
    }
    Ok(())
}
