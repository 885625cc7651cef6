//! A folder's configuration → [`BertSpec`]: everything the encoder needs to know, checked. What a model does that we
//! cannot do is refused here by key, never ignored.

use crate::{
    kernels::cpu::Gelu,
    model::fields::Fields,
    weights::{WeightError, folder},
};
use serde_json::{Map, Value};
use std::path::{Component, Path, PathBuf};

/// An encoder: learned positions and token types, attention both ways, norms after their sums.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BertSpec {
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub vocab: usize,
    /// Rows of the position table.
    pub positions: usize,
    /// Which of them the first token has.
    pub position_offset: usize,
    /// Rows of the table of token types.
    pub types: usize,
    pub norm_eps: f32,
    pub gelu: Gelu,
    pub head: Head,
}

/// What follows the last layer, and how texts are read: what sentence-transformers keeps in files of its own.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Head {
    pub pooling: Pooling,
    /// Vectors of length 1.
    pub normalize: bool,
    /// Tokens that one text may have, those that the tokenizer adds included.
    pub limit: usize,
    /// Texts are read in lower case.
    pub lower: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pooling {
    Cls,
    Mean,
    Last,
}

/// The families, and whether their positions begin after the padding's id (an inheritance of fairseq).
const FAMILIES: [(&str, bool); 3] = [("bert", false), ("roberta", true), ("xlm-roberta", true)];

const MODULES: &str = "modules.json";
const SENTENCE: &str = "sentence_bert_config.json";
const PROMPTS: &str = "config_sentence_transformers.json";
const TOKENIZER: &str = "tokenizer_config.json";

/// Whether a `config.json` is one of an encoder's.
pub(crate) fn is_encoder(config: &Value) -> bool {
    let model_type = config.get("model_type").and_then(Value::as_str);
    FAMILIES.iter().any(|(family, _)| model_type == Some(family))
}

impl BertSpec {
    /// The files that shape an embedding, beside weights and tokenizer.
    pub fn files(folder: &Path) -> Vec<PathBuf> {
        let pooling = pooling_file(folder).ok().flatten();
        let own = ["config.json", MODULES, SENTENCE, PROMPTS, TOKENIZER].map(|name| folder.join(name));
        own.into_iter().chain(pooling).collect()
    }

    pub fn read(folder: &Path) -> Result<BertSpec, WeightError> {
        let path = folder.join("config.json");
        let config = folder::require_json(&path)?;
        let mut spec = from_config(&config).map_err(|why| WeightError::new(&path, why))?;
        spec.head = Head::read(folder, spec.positions - spec.position_offset)?;
        Ok(spec)
    }
}

/// `Err` reads after the file's name.
fn from_config(config: &Value) -> Result<BertSpec, String> {
    let Value::Object(fields) = config else { return Err("is not a JSON object".to_owned()) };
    let fields = Fields::new(fields);
    let model_type = fields.text("model_type")?.ok_or("`model_type` is missing")?;
    let Some((_, is_offset)) = FAMILIES.iter().find(|(family, _)| *family == model_type) else {
        return Err(format!("model_type `{model_type}` is not one of an encoder (bert, roberta, xlm-roberta)"));
    };
    fields.only("position_embedding_type", &Value::from("absolute"))?;
    fields.only("is_decoder", &Value::from(false))?;
    fields.only("add_cross_attention", &Value::from(false))?;
    let (hidden, heads) = (fields.count("hidden_size", 1 << 16)?, fields.count("num_attention_heads", 1 << 10)?);
    let positions = fields.count("max_position_embeddings", 1 << 24)?;
    let padding = fields.ids("pad_token_id")?.first().map_or(1, |&id| id as usize);
    let position_offset = if *is_offset { padding + 1 } else { 0 };
    let spec = BertSpec {
        hidden,
        intermediate: fields.count("intermediate_size", 1 << 20)?,
        layers: fields.count("num_hidden_layers", 1 << 10)?,
        heads,
        vocab: fields.count("vocab_size", 1 << 22)?,
        positions,
        position_offset,
        types: fields.count_or("type_vocab_size", 1 << 10, 2)?,
        norm_eps: fields.positive_or("layer_norm_eps", 1e-12)? as f32,
        gelu: match fields.text("hidden_act")?.unwrap_or("gelu") {
            "gelu" => Gelu::Erf,
            "gelu_new" | "gelu_pytorch_tanh" => Gelu::Tanh,
            other => return Err(format!("`hidden_act` \"{other}\" is not supported (supported: gelu, gelu_new)")),
        },
        // What the folder's other files say comes next.
        head: Head { pooling: Pooling::Mean, normalize: false, limit: positions, lower: false },
    };
    if position_offset >= positions {
        return Err(format!("`max_position_embeddings` {positions} leaves no place for a text"));
    }
    if !hidden.is_multiple_of(heads) || !(hidden / heads).is_multiple_of(16) {
        return Err(format!("{heads} heads of {hidden} numbers in all: the kernels need a multiple of 16 for each"));
    }
    if !spec.intermediate.is_multiple_of(16) {
        return Err(format!("`intermediate_size` is {}; the kernels need a multiple of 16", spec.intermediate));
    }
    Ok(spec)
}

impl Head {
    /// A folder that is no sentence-transformers one is pooled by the mean, as they do. `positions`: the longest text
    /// that the model has positions for.
    fn read(folder: &Path, positions: usize) -> Result<Head, WeightError> {
        let in_file = |name: &str| {
            let path = folder.join(name);
            move |why: String| WeightError::new(&path, why)
        };
        let mut normalize = false;
        for name in modules(folder)? {
            match name.as_str() {
                "Transformer" | "Pooling" => {}
                "Normalize" => normalize = true,
                other => {
                    let why = format!("module `{other}` is not supported (supported: Transformer, Pooling, Normalize)");
                    return Err(in_file(MODULES)(why));
                }
            }
        }
        let pooling = match pooling_file(folder)? {
            None => Pooling::Mean,
            Some(path) => pooling(&folder::require_json(&path)?).map_err(|why| WeightError::new(&path, why))?,
        };
        let object = |name: &str| match folder::read_json(&folder.join(name))? {
            None => Ok(Map::new()),
            Some(Value::Object(fields)) => Ok(fields),
            Some(_) => Err(in_file(name)("is not a JSON object".to_owned())),
        };
        let prompts = object(PROMPTS)?;
        if let Some(name) = Fields::new(&prompts).text("default_prompt_name").map_err(in_file(PROMPTS))? {
            return Err(in_file(PROMPTS)(format!("`default_prompt_name` \"{name}\" is not supported")));
        }
        let (sentence, tokenizer) = (object(SENTENCE)?, object(TOKENIZER)?);
        let sentence = Fields::new(&sentence);
        let limit = match sentence.get("max_seq_length") {
            Some(_) => sentence.count("max_seq_length", 1 << 24).map_err(in_file(SENTENCE))?,
            // Some say "as long as you like" with a number of thirty digits.
            None => tokenizer.get("model_max_length").and_then(Value::as_u64).map_or(positions, |n| n as usize),
        };
        let lower = sentence.flag("do_lower_case", false).map_err(in_file(SENTENCE))?;
        Ok(Head { pooling, normalize, limit: limit.clamp(1, positions), lower })
    }
}

/// The classes of a folder's modules, without the paths of their packages.
fn modules(folder: &Path) -> Result<Vec<String>, WeightError> {
    let class = |module: &Value| {
        let name = module.get("type")?.as_str()?.rsplit('.').next()?;
        Some(name.to_owned())
    };
    listed(folder, class)
}

/// The file that says how a folder pools, if it is a sentence-transformers one.
fn pooling_file(folder: &Path) -> Result<Option<PathBuf>, WeightError> {
    let place = |module: &Value| {
        let is_pooling = module.get("type")?.as_str()?.ends_with(".Pooling");
        let place = module.get("path")?.as_str()?;
        Some(is_pooling.then(|| place.to_owned()))
    };
    let Some(place) = listed(folder, place)?.into_iter().flatten().next() else { return Ok(None) };
    if !Path::new(&place).components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(WeightError::new(&folder.join(MODULES), format!("names a module outside its folder: {place:?}")));
    }
    Ok(Some(folder.join(place).join("config.json")))
}

/// What `read` finds in each entry of the list of modules.
fn listed<T>(folder: &Path, read: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>, WeightError> {
    let path = folder.join(MODULES);
    let Some(list) = folder::read_json(&path)? else { return Ok(Vec::new()) };
    let found = list.as_array().and_then(|modules| modules.iter().map(read).collect());
    found.ok_or_else(|| WeightError::new(&path, "must be a list of modules, each with its `type` and `path`"))
}

/// Newer files name one way of pooling, older ones say true or false for each.
fn pooling(config: &Value) -> Result<Pooling, String> {
    let Value::Object(fields) = config else { return Err("is not a JSON object".to_owned()) };
    let by_name = |name: &str| match name {
        "cls" => Ok(Pooling::Cls),
        "mean" => Ok(Pooling::Mean),
        "lasttoken" => Ok(Pooling::Last),
        other => Err(format!("pooling `{other}` is not supported (supported: cls, mean, lasttoken)")),
    };
    if let Some(name) = Fields::new(fields).text("pooling_mode")? {
        return by_name(name);
    }
    let modes = fields.iter().filter(|(_, value)| **value == Value::Bool(true));
    let names: Vec<&str> = modes.filter_map(|(name, _)| name.strip_prefix("pooling_mode_")).collect();
    match names.as_slice() {
        ["cls_token"] => Ok(Pooling::Cls),
        ["mean_tokens"] => Ok(Pooling::Mean),
        [one] => by_name(one),
        several => Err(format!("must pool in one way, not in {}", several.len())),
    }
}
