//! `glassgate models verify`: may this version take the place of that one?

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::{Outcome, Place, text};
use crate::config::{Config, ModelSource, Quantize};
use crate::models::Models;
use crate::models::hub::{Reference, SCHEME, human};
use crate::models::verify::{Comparison, Score, Version, cases, verify};
use crate::observe::metrics::Metrics;

#[derive(Args)]
pub struct Options {
    /// The original: a model of routes.toml, a folder or .gguf file, or hf://…
    a: String,
    /// What is to take its place, likewise
    b: String,
    /// One JSON object a line: {"messages": […] or "prompt": "…", "answer": "…"}
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Only the first so many cases
    #[arg(long, value_name = "COUNT")]
    limit: Option<usize>,
    /// Quantise A while it loads, instead of what routes.toml says
    #[arg(long, value_enum, value_name = "KIND")]
    quantize_a: Option<Quantize>,
    /// Quantise B while it loads, instead of what routes.toml says
    #[arg(long, value_enum, value_name = "KIND")]
    quantize_b: Option<Quantize>,
    /// Fail when B answers fewer right by more percentage points
    #[arg(long, value_name = "POINTS")]
    max_accuracy_drop: Option<f64>,
    /// Fail when B's perplexity is higher by more percent
    #[arg(long, value_name = "PERCENT")]
    max_perplexity_rise: Option<f64>,
    /// Fail when the mean divergence of B from A is more
    #[arg(long, value_name = "NATS")]
    max_kl: Option<f64>,
    /// Fail when both find the same token the likeliest in a smaller share of places
    #[arg(long, value_name = "PERCENT")]
    min_agreement: Option<f64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(place: &Place, options: &Options) -> Outcome {
    let config = place.config()?;
    let in_data = |why: String| format!("{}: {why}", options.data.display());
    let data = std::fs::read_to_string(&options.data).map_err(|error| in_data(error.to_string()))?;
    let mut cases = cases(&data).map_err(in_data)?;
    cases.truncate(options.limit.unwrap_or(usize::MAX).max(1));
    let a = version(&config, &options.a, options.quantize_a)?;
    let b = version(&config, &options.b, options.quantize_b)?;

    glassgate_runtime::set_threads(config.gateway.engine.threads);
    let models = Models::start(&config.gateway.engine, place.intake(&config), Arc::new(Metrics::new()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(text)?;
    let moves = std::io::stderr().is_terminal();
    let progress = |done: usize| {
        if moves {
            // Progress that cannot be shown is no reason to stop.
            let _ = write!(std::io::stderr(), "\r{done} of {} cases\x1b[K", cases.len());
        }
    };
    let outcome = runtime.block_on(verify(&models, [&a, &b], &cases, progress));
    if moves {
        eprint!("\r\x1b[K");
    }
    let comparison = outcome?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&comparison).map_err(text)?);
    } else {
        table(&comparison);
    }
    let broken = broken(options, &comparison);
    if broken.is_empty() { Ok(()) } else { Err(broken.join("\n")) }
}

/// A name of routes.toml goes before a file of the same name.
fn version(config: &Config, asked: &str, quantize: Option<Quantize>) -> Result<Version, String> {
    if let Some(model) = config.models.get(asked) {
        return Ok(Version { source: model.source.clone(), quantize: quantize.or(model.quantize) });
    }
    if asked.starts_with(SCHEME) {
        return Ok(Version { source: ModelSource::Hub(Reference::parse(asked)?), quantize });
    }
    let here = std::iter::once(PathBuf::from(asked));
    let mut paths = here.chain(config.gateway.model_roots.iter().map(|root| root.join(asked)));
    match paths.find(|path| path.exists()) {
        Some(path) => Ok(Version { source: ModelSource::Local(path), quantize }),
        None => Err(format!("`{asked}` is neither a model of routes.toml, nor a folder or .gguf file, nor hf://…")),
    }
}

fn table(Comparison { cases, answer_tokens, a, b, distance }: &Comparison) {
    let row = |name: &str, a: String, b: String, change: String| println!("{name:16} {a:>16} {b:>16} {change:>16}");
    let percent = |change: f64| format!("{change:+.2} %");
    println!("A  {}\nB  {}\n", a.source, b.source);
    row("", "A".to_owned(), "B".to_owned(), "B against A".to_owned());
    row("weights", a.weights.clone(), b.weights.clone(), String::new());
    let accuracy = |score: &Score| format!("{:.2} %", 100.0 * score.accuracy);
    row("accuracy", accuracy(a), accuracy(b), format!("{:+.2} points", 100.0 * (b.accuracy - a.accuracy)));
    let perplexity = |score: &Score| format!("{:.4}", score.perplexity);
    row("perplexity", perplexity(a), perplexity(b), percent(rise(a.perplexity, b.perplexity)));
    let speed = |score: &Score| format!("{:.0}", score.tokens_per_second);
    row("tokens a second", speed(a), speed(b), percent(rise(a.tokens_per_second, b.tokens_per_second)));
    let memory = |score: &Score| human(score.memory_bytes);
    row("memory", memory(a), memory(b), percent(rise(a.memory_bytes as f64, b.memory_bytes as f64)));
    match distance {
        Some(distance) => println!(
            "\nmean KL(A‖B) {:.6} nats a token, the same likeliest token in {:.2} % of places",
            distance.kl,
            100.0 * distance.agreement
        ),
        None => println!("\nThe two read text in different tokens: their distributions cannot be compared."),
    }
    println!("({cases} cases, {answer_tokens} tokens of right answers)");
}

/// In percent of `from`.
fn rise(from: f64, to: f64) -> f64 {
    100.0 * (to / from - 1.0)
}

/// The bounds that are not kept, in words.
fn broken(options: &Options, Comparison { a, b, distance, .. }: &Comparison) -> Vec<String> {
    let mut broken = Vec::new();
    let mut hold = |what: &str, bound: Option<f64>, got: f64, is_fine: fn(f64, f64) -> bool| {
        if let Some(bound) = bound.filter(|bound| !is_fine(got, *bound)) {
            broken.push(format!("{what} is {got:.6}, the bound {bound}"));
        }
    };
    let at_most = |got, bound| got <= bound;
    let at_least = |got, bound| got >= bound;
    hold("the drop of accuracy", options.max_accuracy_drop, 100.0 * (a.accuracy - b.accuracy), at_most);
    hold("the rise of perplexity", options.max_perplexity_rise, rise(a.perplexity, b.perplexity), at_most);
    // What cannot be compared keeps no bound.
    let (kl, agreement) = distance.map_or((f64::NAN, f64::NAN), |distance| (distance.kl, distance.agreement));
    hold("the divergence", options.max_kl, kl, at_most);
    hold("the agreement", options.min_agreement, 100.0 * agreement, at_least);
    broken
}
