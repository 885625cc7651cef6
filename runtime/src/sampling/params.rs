//! How a caller wants tokens chosen. Ranges are checked here, once, before a request is queued.

use crate::grammar::Grammar;
use serde_json::Value;

/// Temperature 0 chooses the most likely token; everything else then only shifts which one that is.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    pub temperature: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the most likely tokens that together reach this probability; 1 keeps all.
    pub top_p: f32,
    /// Drop what is less likely than this share of the most likely token; 0 drops none.
    pub min_p: f32,
    /// Divides (positive) or multiplies (negative) the logits of tokens seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once per earlier occurrence in the output.
    pub frequency_penalty: f32,
    /// Subtracted once if the token occurs in the output.
    pub presence_penalty: f32,
    /// Token → what is added to its logit. Not used up by one answer: it holds at every step.
    pub logit_bias: Vec<(u32, f32)>,
    /// Some: tell how likely every token was, and this many of the most likely ones beside it. Changes no token.
    pub logprobs: Option<u32>,
    /// What the answer must look like. It then ends where the grammar does.
    pub grammar: Option<Grammar>,
    pub seed: u64,
}

/// The most likely tokens that can be told of each place.
const TOP_LOGPROBS_MAX: u32 = 20;

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            logprobs: None,
            grammar: None,
            seed: 0,
        }
    }
}

/// A parameter outside its range, by name.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{name} must lie {range}, got {got}")]
pub struct BadParam {
    pub name: &'static str,
    /// Reads after "must lie".
    pub range: &'static str,
    pub got: f32,
}

impl SamplingParams {
    pub fn validate(&self) -> Result<(), BadParam> {
        let checks = [
            ("temperature", self.temperature, (0.0..=100.0).contains(&self.temperature), "between 0 and 100"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "between 0 and 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                (0.01..=10.0).contains(&self.repetition_penalty),
                "between 0.01 and 10",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                (-2.0..=2.0).contains(&self.frequency_penalty),
                "between -2 and 2",
            ),
            (
                "presence_penalty",
                self.presence_penalty,
                (-2.0..=2.0).contains(&self.presence_penalty),
                "between -2 and 2",
            ),
        ];
        if let Some((name, got, _, range)) = checks.into_iter().find(|(_, _, fine, _)| !fine) {
            return Err(BadParam { name, range, got });
        }
        if let Some(&(_, got)) = self.logit_bias.iter().find(|(_, bias)| !(-100.0..=100.0).contains(bias)) {
            return Err(BadParam { name: "logit_bias", range: "between -100 and 100", got });
        }
        match self.logprobs {
            Some(count) if count > TOP_LOGPROBS_MAX => {
                Err(BadParam { name: "top_logprobs", range: "between 0 and 20", got: count as f32 })
            }
            _ => Ok(()),
        }
    }
}

impl SamplingParams {
    /// What a folder's `generation_config.json` asks for. `Err` reads after the file's name.
    pub(crate) fn from_generation_config(config: &Value) -> Result<SamplingParams, String> {
        let number = |name: &str, default: f32| match config.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => {
                value.as_f64().map(|x| x as f32).ok_or_else(|| format!("`{name}` must be a number, got {value}"))
            }
        };
        // Files leave out what equals the format's default, and that is not to sample.
        let samples = config.get("do_sample").and_then(Value::as_bool).unwrap_or(false);
        let params = SamplingParams {
            temperature: if samples { number("temperature", 1.0)? } else { 0.0 },
            top_k: number("top_k", 0.0)? as u32,
            top_p: number("top_p", 1.0)?,
            min_p: number("min_p", 0.0)?,
            repetition_penalty: number("repetition_penalty", 1.0)?,
            ..SamplingParams::default()
        };
        params.validate().map_err(|bad| bad.to_string())?;
        Ok(params)
    }
}
