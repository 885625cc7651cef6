//! `glassgate models`: what the hub has, brought here.

use clap::Subcommand;

use super::{Outcome, Place};
use crate::models::hub::{Hub, Reference, human};

#[derive(Subcommand)]
pub enum ModelsCommand {
    /// Download a model; what is here already is not asked for again
    Pull {
        /// hf://org/name@revision, or hf://org/name@revision/file.gguf
        #[arg(value_parser = Reference::parse)]
        model: Reference,
    },
    /// List the models that are here
    List,
}

pub fn run(place: &Place, command: ModelsCommand) -> Outcome {
    let hub = Hub::from_environment(place.data_dir()?.hub());
    match command {
        ModelsCommand::Pull { model } => println!("{}", hub.pull(&model)?.display()),
        ModelsCommand::List => {
            for kept in hub.list()? {
                println!("{:>10}  {}@{}  {}", human(kept.bytes), kept.repository, kept.commit, kept.path.display());
            }
        }
    }
    Ok(())
}
