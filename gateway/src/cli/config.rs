//! `glassgate config`: keys, tenants and rules from one store to another.

use std::io::Read as _;
use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use serde_json::Value;

use super::{Outcome, Place, actor, text};
use crate::auth::store::Location;
use crate::control::Change;
use crate::control::export::{Import, export};

#[derive(Clone, Copy, ValueEnum)]
pub enum Format {
    Toml,
    Json,
}

#[derive(Subcommand)]
pub enum ConfigCommand {
    /// Print keys (hashes instead of secrets), tenants and limit rules. Copy the data folder's file `pepper` too, or have the same
    /// `auth.pepper`: without it the hashes say nothing, and keys do not work elsewhere
    Export {
        /// Those of the data folder, whatever `storage.database` says
        #[arg(long)]
        local: bool,
        #[arg(long, value_enum, default_value = "toml")]
        format: Format,
    },
    /// Take what `export` printed into an empty data folder or database
    Import {
        /// TOML or JSON; `-` is stdin
        file: PathBuf,
    },
}

pub fn run(place: &Place, command: ConfigCommand) -> Outcome {
    match command {
        ConfigCommand::Export { local, format } => {
            let data_dir = place.data_dir()?;
            let location = if local { Location::File(data_dir.keys()) } else { place.key_store(&data_dir)? };
            let control = place.control_of(data_dir, location)?;
            let document = export(&control).map_err(text)?;
            match format {
                Format::Json => println!("{document:#}"),
                Format::Toml => print!("{}", toml::to_string_pretty(&document).map_err(text)?),
            }
            Ok(())
        }
        ConfigCommand::Import { file } => {
            let document = read(&file)?;
            let import = Import::read(&document, &place.config()?).map_err(text)?;
            place.control()?.apply(&actor(), Change::Import(import), None).map(drop).map_err(text)
        }
    }
}

fn read(file: &PathBuf) -> Result<Value, String> {
    let mut document = String::new();
    let read = match file.to_str() {
        Some("-") => std::io::stdin().read_to_string(&mut document),
        _ => std::fs::File::open(file).and_then(|mut file| file.read_to_string(&mut document)),
    };
    read.map_err(|error| format!("{}: {error}", file.display()))?;
    if document.trim_start().starts_with('{') {
        return serde_json::from_str(&document).map_err(text);
    }
    toml::from_str(&document).map_err(text)
}
