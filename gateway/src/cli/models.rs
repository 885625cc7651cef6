//! `glassgate models`: what the hub has, brought here; what serves; whether one may replace another.

use clap::Subcommand;
use serde_json::Value;

use super::{Outcome, Place, client, text, verify};
use crate::models::hub::{Hub, Reference, human};

#[derive(Subcommand)]
pub enum ModelsCommand {
    /// Download a model from the Hugging Face hub (HF_TOKEN, HF_ENDPOINT); what is here already is not asked for again
    Pull {
        /// hf://org/name@revision, or hf://org/name@revision/file.gguf
        #[arg(value_parser = Reference::parse)]
        model: Reference,
    },
    /// List the downloaded models that are here
    List,
    /// Show the models that the running gateway holds: state, memory, tokens a second
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Compare two models, or a model and its quantised self, on questions with right answers
    Verify {
        #[command(flatten)]
        options: verify::Options,
    },
}

pub fn run(place: &Place, command: ModelsCommand) -> Outcome {
    let hub = || Ok::<_, String>(Hub::from_environment(place.data_dir()?.hub()));
    match command {
        ModelsCommand::Pull { model } => println!("{}", hub()?.pull(&model)?.display()),
        ModelsCommand::List => {
            for kept in hub()?.list()? {
                println!("{:>10}  {}@{}  {}", human(kept.bytes), kept.repository, kept.commit, kept.path.display());
            }
        }
        ModelsCommand::Status { json } => status(place, json)?,
        ModelsCommand::Verify { options } => verify::run(place, &options)?,
    }
    Ok(())
}

fn status(place: &Place, json: bool) -> Outcome {
    let (status, body) = client::get(&place.data_dir()?, "/admin/models")?;
    let told: Value = serde_json::from_slice(&body).map_err(text)?;
    if status != 200 {
        return Err(told["error"]["message"].as_str().unwrap_or("the gateway refused").to_owned());
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&told).map_err(text)?);
        return Ok(());
    }
    let bytes = |value: &Value| human(value.as_u64().unwrap_or(0));
    println!(
        "{:24} {:9} {:>10} {:>10} {:>10} {:>10} {:>9}  {:12} weights",
        "model", "state", "memory", "weights", "KV pool", "workspace", "tokens/s", "digest"
    );
    for model in told["models"].as_array().into_iter().flatten() {
        let (memory, word) = (&model["memory_bytes"], |name: &str| model[name].as_str().unwrap_or_default());
        println!(
            "{:24} {:9} {:>10} {:>10} {:>10} {:>10} {:>9.0}  {:12.12} {}",
            word("name"),
            word("state"),
            bytes(&memory["total"]),
            bytes(&memory["weights"]),
            bytes(&memory["kv"]),
            bytes(&memory["workspace"]),
            model["tokens_per_second"].as_f64().unwrap_or(0.0),
            word("digest"),
            word("kinds")
        );
    }
    println!("of {} that models may take", bytes(&told["memory_max_bytes"]));
    Ok(())
}
