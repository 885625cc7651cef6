//! `[models.NAME]` of `routes.toml`: what a model is made from, or who has it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::problem::did_you_mean;
use super::reader::{At, Section};
use super::upstreams::UpstreamConfig;
use crate::models::hub::{Reference, SCHEME};

/// Tokens a request may produce when nobody says otherwise.
const OUTPUT_MAX: u32 = 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// The folder or `.gguf` file, found in one of the model roots.
    Local(PathBuf),
    /// Downloaded when it is first needed.
    Hub(Reference),
    Upstream {
        upstream: String,
        /// What the model is called there.
        name: String,
        context: Option<u64>,
    },
}

impl ModelSource {
    /// Whether the embedded runtime serves it.
    pub fn is_embedded(&self) -> bool {
        !matches!(self, ModelSource::Upstream { .. })
    }
}

impl std::fmt::Display for ModelSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ModelSource::Local(path) => write!(f, "{}", path.display()),
            ModelSource::Hub(reference) => write!(f, "{reference}"),
            ModelSource::Upstream { upstream, name, .. } => write!(f, "{name} at {upstream}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Quantize {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_k")]
    Q4K,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelConfig {
    pub source: ModelSource,
    /// What the embedded runtime makes of the weights while it reads them.
    pub quantize: Option<Quantize>,
    /// Whether clients may ask for it by its own name.
    pub public: bool,
    pub output_max: u32,
}

pub(super) fn model(
    section: &Section<'_, '_>,
    name: &str,
    upstreams: &BTreeMap<String, Arc<UpstreamConfig>>,
    roots: &[PathBuf],
) -> ModelConfig {
    let source = model_source(section, name, upstreams, roots);
    ModelConfig {
        quantize: quantize(section, &source),
        source,
        public: section.boolean("public").unwrap_or(false),
        output_max: section.integer("output_max", 1..=1_000_000).map_or(OUTPUT_MAX, |n| n as u32),
    }
}

fn model_source(
    section: &Section<'_, '_>,
    name: &str,
    upstreams: &BTreeMap<String, Arc<UpstreamConfig>>,
    model_roots: &[PathBuf],
) -> ModelSource {
    let (source, upstream) = (section.string("source"), section.string("upstream"));
    let there = section.string("name");
    let context = section.integer("context", 1..=100_000_000);
    if let Some(upstream) = upstream {
        if !upstreams.contains_key(&upstream.value) {
            let hint = did_you_mean(&upstream.value, upstreams.keys().map(String::as_str));
            section.problem_at(
                upstream.at,
                format!("`{}.upstream` names `{}`, which is no upstream here{hint}", section.name(), upstream.value),
            );
        }
        if let Some(source) = source {
            section.problem_at(source.at, format!("`{}` has both a `source` and an `upstream`", section.name()));
        }
        let name = there.map_or(name.to_owned(), |name| name.value);
        return ModelSource::Upstream { upstream: upstream.value, name, context };
    }
    if there.is_some() || context.is_some() {
        section.problem(format!("`{}`: `name` and `context` belong to a model of an `upstream`", section.name()));
    }
    match source {
        Some(source) if source.value.starts_with(SCHEME) => match Reference::parse(&source.value) {
            Ok(reference) => ModelSource::Hub(reference),
            Err(why) => {
                section.problem_at(source.at, format!("`{}.source`: {why}", section.name()));
                ModelSource::Local(PathBuf::new())
            }
        },
        Some(source) => ModelSource::Local(find_model(section, &source, model_roots).unwrap_or_default()),
        None => {
            section.problem(format!(
                "`{}` needs a `source` (a folder or .gguf file in one of the model roots, or hf://…) or an `upstream`",
                section.name()
            ));
            ModelSource::Local(PathBuf::new())
        }
    }
}

/// `quantize`, or the names that Hugging Face libraries have for the same.
fn quantize(section: &Section<'_, '_>, source: &ModelSource) -> Option<Quantize> {
    let word = section.word("quantize", &["q8_0", "q4_k"]).map(|word| match word {
        "q4_k" => Quantize::Q4K,
        _ => Quantize::Q8_0,
    });
    let eight = section.boolean("load_in_8bit").unwrap_or(false).then_some(Quantize::Q8_0);
    let four = section.boolean("load_in_4bit").unwrap_or(false).then_some(Quantize::Q4K);
    let asked: Vec<Quantize> = [word, eight, four].into_iter().flatten().collect();
    if asked.iter().any(|other| *other != asked[0]) {
        section.problem(format!("`{}` asks for 8 bits and for 4: keep one of them", section.name()));
    }
    if !asked.is_empty() && !source.is_embedded() {
        section.problem(format!("`{}`: only a model with a `source` can be quantised here", section.name()));
    }
    asked.first().copied()
}

/// A folder in Hugging Face layout, or a GGUF file.
fn is_model(path: &Path) -> bool {
    path.join("config.json").is_file()
        || path.extension().is_some_and(|extension| extension == "gguf") && path.is_file()
}

/// Finds a model below the roots, and nowhere else.
fn find_model(section: &Section<'_, '_>, source: &At<String>, roots: &[PathBuf]) -> Option<PathBuf> {
    let relative = Path::new(&source.value);
    if relative.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
        section.problem_at(
            source.at,
            format!(
                "`{}.source` must be the name of a folder or .gguf file inside a model root, not \"{}\"",
                section.name(),
                source.value
            ),
        );
        return None;
    }
    let found = roots.iter().map(|root| root.join(relative)).find(|path| is_model(path));
    if found.is_none() {
        let known: Vec<String> = roots
            .iter()
            .flat_map(|root| std::fs::read_dir(root).into_iter().flatten())
            .filter_map(|entry| entry.ok().filter(|entry| is_model(&entry.path()))?.file_name().into_string().ok())
            .collect();
        let roots = roots.iter().map(|root| root.display().to_string()).collect::<Vec<_>>().join(", ");
        section.problem_at(
            source.at,
            format!(
                "there is no model \"{}\" (a folder with a config.json) in {roots}{}",
                source.value,
                did_you_mean(&source.value, known.iter().map(String::as_str))
            ),
        );
    }
    found
}
