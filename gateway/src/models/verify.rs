//! Two models on the same questions: how often each is right, how well it foresees the right answers, and how far the
//! second has moved from the first. A quantised or new version is compared with the original before it serves.

use std::time::Duration;

use glassgate_runtime as runtime;
use serde::{Deserialize, Serialize};

use super::Models;
use crate::config::{ModelSource, Quantize};

/// Whole distributions in memory at a time: 32 of 128 Ki tokens are 32 MiB for each of the two models.
const WINDOW_TOKENS: usize = 32;
/// An answer that is longer than the right one by this much is wrong however it goes on.
const EXTRA_TOKENS: u32 = 16;

/// A line of the data file: a conversation or a plain text, and the answer that is right.
#[derive(Debug, Deserialize)]
pub struct Case {
    #[serde(default)]
    messages: Vec<Turn>,
    prompt: Option<String>,
    answer: String,
}

#[derive(Debug, Deserialize)]
struct Turn {
    role: String,
    content: String,
}

/// One JSON object a line; other fields are nobody's business here.
///
/// # Errors
/// The first line that is no case.
pub fn cases(text: &str) -> Result<Vec<Case>, String> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let cases = lines.map(|(number, line)| {
        let bad = |why: &str| format!("line {}: {why}", number + 1);
        let case: Case = serde_json::from_str(line).map_err(|error| bad(&error.to_string()))?;
        match (case.messages.is_empty(), &case.prompt) {
            _ if case.answer.is_empty() => Err(bad("`answer` is empty")),
            (false, None) | (true, Some(_)) => Ok(case),
            _ => Err(bad("needs either `messages` or a `prompt`")),
        }
    });
    let cases = cases.collect::<Result<Vec<_>, String>>()?;
    if cases.is_empty() { Err("holds no cases".to_owned()) } else { Ok(cases) }
}

/// What is compared.
#[derive(Clone, Debug)]
pub struct Version {
    pub source: ModelSource,
    pub quantize: Option<Quantize>,
}

/// How one model did.
#[derive(Clone, Debug, Serialize)]
pub struct Score {
    pub source: String,
    /// Kinds of the weights, as in `bf16` or `q8_0, q4_k`.
    pub weights: String,
    pub digest: String,
    /// The share of answers that are the right one, to the letter, when it answers greedily.
    pub accuracy: f64,
    /// exp(−mean ln p) over the tokens of the right answers.
    pub perplexity: f64,
    /// Sampled one after the other, alone.
    pub tokens_per_second: f64,
    pub memory_bytes: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    pub cases: usize,
    /// Of the right answers, as the first model reads them.
    pub answer_tokens: u64,
    pub a: Score,
    pub b: Score,
    /// Nothing where the two read text in different tokens.
    pub distance: Option<Distance>,
}

/// How far apart two distributions are over the tokens of the right answers.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Distance {
    /// Mean Kullback–Leibler divergence of the second from the first, Σ p_a · ln(p_a / p_b), in nats a token.
    pub kl: f64,
    /// The share of places where both find the same token the likeliest.
    pub agreement: f64,
}

struct Side {
    model: runtime::Model,
    right: usize,
    log_probability: f64,
    scored: u64,
    sampled: u64,
    decoding: Duration,
}

/// A question and its answer in one model's tokens.
struct Tokens {
    prompt: Vec<u32>,
    answer: Vec<u32>,
}

/// Loads both and asks both. `progress` hears how many cases are done.
///
/// # Errors
/// What keeps a model from loading, or from reading or answering a case.
pub async fn verify(
    models: &Models,
    [a, b]: [&Version; 2],
    cases: &[Case],
    mut progress: impl FnMut(usize),
) -> Result<Comparison, String> {
    let mut a_side = Side::open(models, "A", a)?;
    let mut b_side = Side::open(models, "B", b)?;
    let mut apart = Some(Distance { kl: 0.0, agreement: 0.0 });
    for (done, case) in cases.iter().enumerate() {
        let of_case = |why: String| format!("case {}: {why}", done + 1);
        let (in_a, in_b) = (a_side.tokens(case).map_err(of_case)?, b_side.tokens(case).map_err(of_case)?);
        a_side.answer(case, &in_a).await.map_err(of_case)?;
        b_side.answer(case, &in_b).await.map_err(of_case)?;
        let same = in_a.prompt == in_b.prompt && in_a.answer == in_b.answer && a_side.vocab() == b_side.vocab();
        apart = apart.filter(|_| same);
        match &mut apart {
            Some(distance) => compare(&mut a_side, &mut b_side, &in_a, distance).await.map_err(of_case)?,
            None => {
                a_side.score(&in_a, 0..in_a.answer.len(), 1).await.map_err(of_case)?;
                b_side.score(&in_b, 0..in_b.answer.len(), 1).await.map_err(of_case)?;
            }
        }
        progress(done + 1);
    }
    let places = a_side.scored as f64;
    Ok(Comparison {
        cases: cases.len(),
        answer_tokens: a_side.scored,
        a: a_side.result(models, a, cases.len()),
        b: b_side.result(models, b, cases.len()),
        distance: apart.map(|sum| Distance { kl: sum.kl / places, agreement: sum.agreement / places }),
    })
}

/// Adds one answer's places to the sums, a window of them at a time.
async fn compare(a: &mut Side, b: &mut Side, tokens: &Tokens, sum: &mut Distance) -> Result<(), String> {
    let vocab = a.vocab();
    for start in (0..tokens.answer.len()).step_by(WINDOW_TOKENS) {
        let window = start..tokens.answer.len().min(start + WINDOW_TOKENS);
        let of_a = a.score(tokens, window.clone(), vocab).await?;
        let of_b = b.score(tokens, window, vocab).await?;
        for (place_a, place_b) in of_a.iter().zip(&of_b) {
            sum.kl += divergence(&place_a.top, &place_b.top);
            let best = |place: &runtime::Logprobs| place.top.first().map(|(id, _)| *id);
            sum.agreement += f64::from(u8::from(best(place_a) == best(place_b)));
        }
    }
    Ok(())
}

/// Σ p · (ln p − ln q) over whole distributions given as (id, ln p), in any order.
fn divergence(p: &[(u32, f32)], q: &[(u32, f32)]) -> f64 {
    let mut of_q = vec![f32::NEG_INFINITY; q.len()];
    for &(id, logprob) in q {
        of_q[id as usize] = logprob;
    }
    let terms = p.iter().map(|&(id, logprob)| {
        let (p, q) = (f64::from(logprob), f64::from(of_q[id as usize]));
        if p.exp() == 0.0 { 0.0 } else { p.exp() * (p - q) }
    });
    terms.sum()
}

impl Side {
    fn open(models: &Models, name: &str, version: &Version) -> Result<Side, String> {
        let model = models.open(name, &version.source, version.quantize)?;
        let decoding = Duration::ZERO;
        Ok(Side { model, right: 0, log_probability: 0.0, scored: 0, sampled: 0, decoding })
    }

    fn vocab(&self) -> u32 {
        self.model.vocab()
    }

    fn tokens(&self, case: &Case) -> Result<Tokens, String> {
        let text = match &case.prompt {
            Some(text) => text.clone(),
            None => {
                let turn = |turn: &Turn| runtime::Message { role: turn.role.clone(), content: turn.content.clone() };
                let turns: Vec<_> = case.messages.iter().map(turn).collect();
                self.model.prompt(&turns).map_err(|error| error.to_string())?
            }
        };
        let ids = |text: &str| self.model.tokenize(text).map_err(|error| error.to_string());
        Ok(Tokens { prompt: ids(&text)?, answer: ids(&case.answer)? })
    }

    /// Greedily, up to where it can no longer be right.
    async fn answer(&mut self, case: &Case, tokens: &Tokens) -> Result<(), String> {
        let request = runtime::Request {
            prompt: tokens.prompt.clone(),
            max_tokens: tokens.answer.len() as u32 + EXTRA_TOKENS,
            params: runtime::SamplingParams { temperature: 0.0, ..self.model.defaults().clone() },
            stop: Vec::new(),
            ignore_eos: false,
            tenant: 0,
            salt: [0; 16],
            class: runtime::Class::Interactive,
            deadline: None,
        };
        let mut generation = self.model.generate(request).map_err(|refusal| refusal.to_string())?;
        let mut said = String::new();
        while let Some(event) = generation.next().await {
            match event {
                runtime::Event::Text { text, .. } => said.push_str(&text),
                runtime::Event::Finished { timeline, .. } => {
                    // The first token ends the prompt's time, not the answer's.
                    self.sampled += u64::from(timeline.output_tokens.saturating_sub(1));
                    self.decoding += timeline.decode().unwrap_or_default();
                }
                runtime::Event::Failed { failure, .. } => return Err(failure.to_string()),
            }
        }
        self.right += usize::from(said == case.answer);
        Ok(())
    }

    /// Of a part of the right answer, given what is before it.
    async fn score(
        &mut self,
        tokens: &Tokens,
        part: std::ops::Range<usize>,
        top: u32,
    ) -> Result<Vec<runtime::Logprobs>, String> {
        let before = [&tokens.prompt[..], &tokens.answer[..part.start]].concat();
        let scores =
            self.model.score(&before, &tokens.answer[part], top, 0).await.map_err(|error| error.to_string())?;
        self.scored += scores.len() as u64;
        self.log_probability += scores.iter().map(|score| f64::from(score.logprob)).sum::<f64>();
        Ok(scores)
    }

    fn result(&self, models: &Models, version: &Version, cases: usize) -> Score {
        let report = models.report().models.into_iter().find(|report| report.name == self.model.name());
        let kinds = report.iter().flat_map(|report| &report.weights).map(|weights| weights.kind);
        Score {
            source: version.source.to_string(),
            weights: kinds.collect::<Vec<_>>().join(", "),
            digest: self.model.digest().to_owned(),
            accuracy: self.right as f64 / cases as f64,
            perplexity: (-self.log_probability / self.scored as f64).exp(),
            tokens_per_second: self.sampled as f64 / self.decoding.as_secs_f64().max(f64::MIN_POSITIVE),
            memory_bytes: report.map_or(0, |report| report.memory.held()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_the_textbook_sum() {
        let log = |p: f64| p.ln() as f32;
        let p = [(1, log(0.5)), (0, log(0.25)), (2, log(0.25))];
        let q = [(0, log(0.5)), (2, log(0.25)), (1, log(0.25))];
        // 0.5 ln(0.5/0.25) + 0.25 ln(0.25/0.5) + 0
        assert!((divergence(&p, &q) - 0.25 * 2f64.ln()).abs() < 1e-7);
        assert_eq!(divergence(&p, &p), 0.0);
        let never = [(0, 0.0), (1, f32::NEG_INFINITY), (2, f32::NEG_INFINITY)];
        assert_eq!(divergence(&never, &never), 0.0);
    }

    #[test]
    fn a_line_that_is_no_case_is_named() {
        let fine = r#"{"prompt": "a", "answer": "b", "family": "x"}"#;
        assert_eq!(cases(&format!("{fine}\n\n{fine}")).unwrap().len(), 2);
        for (line, why) in [
            (r#"{"prompt": "a"}"#, "missing field `answer`"),
            (r#"{"answer": "b"}"#, "either `messages` or a `prompt`"),
            (r#"{"prompt": "a", "messages": [{"role": "user", "content": "a"}], "answer": "b"}"#, "either"),
            (r#"{"prompt": "a", "answer": ""}"#, "`answer` is empty"),
        ] {
            let said = cases(&format!("{fine}\n{line}")).unwrap_err();
            assert!(said.starts_with("line 2: ") && said.contains(why), "{said}");
        }
        assert_eq!(cases("\n").unwrap_err(), "holds no cases");
    }
}
