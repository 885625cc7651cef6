//! `config.json` → [`ModelSpec`]: everything the decoder needs to know, checked. The only place that knows model
//! families by name; what a family does that we cannot do yet is refused here by key, never ignored.

use crate::kernels::cpu::Heads;
use serde_json::{Map, Value};

/// A decoder-only transformer: RMS norm, rotary positions, grouped-query attention, gated SiLU.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ModelSpec {
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    /// Positions the model was trained for.
    pub context: usize,
    pub norm_eps: f32,
    pub rope_theta: f64,
    /// The embedding table is the output matrix too.
    pub tied: bool,
    /// Tokens that end an answer.
    pub end: Vec<u32>,
}

impl ModelSpec {
    /// `Err` reads after the file's name.
    pub fn from_config(config: &Value) -> Result<ModelSpec, String> {
        let Value::Object(fields) = config else { return Err("is not a JSON object".to_owned()) };
        let fields = Fields(fields);
        match fields.text("model_type")? {
            Some("llama") => llama(&fields),
            Some(other) => Err(format!("model_type `{other}` is not supported (supported: llama)")),
            None => Err("`model_type` is missing".to_owned()),
        }
    }

    pub fn heads(&self) -> Heads {
        Heads { q: self.q_heads, kv: self.kv_heads, dim: self.head_dim }
    }

    /// `generation_config.json` may name more end tokens than `config.json`.
    pub fn add_end(&mut self, ids: Option<&Value>) -> Result<(), String> {
        let ids = token_ids(ids).ok_or("`eos_token_id` must be a token id or a list of token ids")?;
        self.check_end(&ids)?;
        self.end.extend(ids);
        self.end.sort_unstable();
        self.end.dedup();
        Ok(())
    }

    fn check_end(&self, ids: &[u32]) -> Result<(), String> {
        match ids.iter().find(|&&id| id as usize >= self.vocab) {
            Some(id) => Err(format!("`eos_token_id` {id} is outside the vocabulary of {}", self.vocab)),
            None => Ok(()),
        }
    }
}

fn llama(fields: &Fields<'_>) -> Result<ModelSpec, String> {
    fields.only("hidden_act", &Value::from("silu"))?;
    fields.only("attention_bias", &Value::from(false))?;
    fields.only("mlp_bias", &Value::from(false))?;
    let hidden = fields.count("hidden_size", 1 << 16)?;
    let q_heads = fields.count("num_attention_heads", 1 << 10)?;
    let kv_heads = fields.count_or("num_key_value_heads", 1 << 10, q_heads)?;
    let head_dim = fields.count_or("head_dim", 1 << 10, hidden / q_heads)?;
    let spec = ModelSpec {
        hidden,
        intermediate: fields.count("intermediate_size", 1 << 20)?,
        layers: fields.count("num_hidden_layers", 1 << 10)?,
        q_heads,
        kv_heads,
        head_dim,
        vocab: fields.count("vocab_size", 1 << 22)?,
        context: fields.count("max_position_embeddings", 1 << 24)?,
        norm_eps: fields.positive("rms_norm_eps", 1e-6)? as f32,
        rope_theta: rope_theta(fields)?,
        tied: fields.flag("tie_word_embeddings", false)?,
        end: fields.ids("eos_token_id")?,
    };
    if q_heads % kv_heads != 0 {
        return Err(format!("{q_heads} query heads cannot share {kv_heads} key-value heads evenly"));
    }
    for (name, width) in [("hidden_size", hidden), ("intermediate_size", spec.intermediate), ("head_dim", head_dim)] {
        if width == 0 || width % 16 != 0 {
            return Err(format!("`{name}` is {width}; the kernels need a multiple of 16"));
        }
    }
    spec.check_end(&spec.end)?;
    Ok(spec)
}

/// Older files have `rope_theta` at the top and scaling in `rope_scaling`, newer ones both in `rope_parameters`.
fn rope_theta(fields: &Fields<'_>) -> Result<f64, String> {
    let mut theta = None;
    for name in ["rope_parameters", "rope_scaling"] {
        let rope = match fields.0.get(name) {
            None | Some(Value::Null) => continue,
            Some(Value::Object(rope)) => Fields(rope),
            Some(_) => return Err(format!("`{name}` must be an object")),
        };
        let kind = rope.text("rope_type")?.or(rope.text("type")?).unwrap_or("default");
        if kind != "default" {
            return Err(format!("rotary positions of type `{kind}` are not supported (supported: default)"));
        }
        // Both objects are looked at before one is believed: a scaling must not go unseen.
        if theta.is_none() && rope.0.contains_key("rope_theta") {
            theta = Some(rope.positive("rope_theta", 1e4)?);
        }
    }
    theta.map_or_else(|| fields.positive("rope_theta", 1e4), Ok)
}

/// Reads single fields and says by name what is wrong with one.
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn count(&self, name: &str, most: usize) -> Result<usize, String> {
        let value = self.get(name).ok_or_else(|| format!("`{name}` is missing"))?;
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=most).contains(&n) => Ok(n),
            _ => Err(format!("`{name}` must be a whole number between 1 and {most}, got {value}")),
        }
    }

    pub(super) fn count_or(&self, name: &str, most: usize, default: usize) -> Result<usize, String> {
        if self.get(name).is_some() { self.count(name, most) } else { Ok(default) }
    }

    pub(super) fn positive(&self, name: &str, default: f64) -> Result<f64, String> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => match value.as_f64() {
                Some(x) if x > 0.0 && x.is_finite() => Ok(x),
                _ => Err(format!("`{name}` must be a positive number, got {value}")),
            },
        }
    }

    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool, String> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| format!("`{name}` must be true or false, got {value}")),
        }
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, String> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| format!("`{name}` must be a string, got {value}")),
        }
    }

    /// A token id or a list of them.
    pub(super) fn ids(&self, name: &str) -> Result<Vec<u32>, String> {
        token_ids(self.get(name)).ok_or_else(|| format!("`{name}` must be a token id or a list of token ids"))
    }

    pub(super) fn only(&self, name: &str, supported: &Value) -> Result<(), String> {
        match self.get(name) {
            Some(value) if value != supported => {
                Err(format!("`{name}` {value} is not supported (supported: {supported})"))
            }
            _ => Ok(()),
        }
    }
}

/// `None` if it is neither absent, nor an id, nor a list of ids.
fn token_ids(value: Option<&Value>) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        Some(value) => Some(vec![id(value)?]),
    }
}
