//! `glassgate config`: keys, tenants and rules from one data folder to another.

use std::io::Read as _;
use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use serde_json::Value;

use super::{Outcome, Place, actor, text};
use crate::control::export::{Import, export};
use crate::control::{Change, Control};

#[derive(Clone, Copy, ValueEnum)]
pub enum Format {
    Toml,
    Json,
}

#[derive(Subcommand)]
pub enum ConfigCommand {
    /// Print keys (hashes instead of secrets), tenants and limit rules of this data folder. Copy its file `pepper` too: without
    /// it the hashes say nothing, and keys do not work elsewhere
    Export {
        #[arg(long, value_enum, default_value = "toml")]
        format: Format,
    },
    /// Take what `export` printed into an empty data folder
    Import {
        /// TOML or JSON; `-` is stdin
        file: PathBuf,
    },
}

pub fn run(place: &Place, command: ConfigCommand) -> Outcome {
    let control = Control::new(place.data_dir()?);
    match command {
        ConfigCommand::Export { format } => {
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
            control.apply(&actor(), Change::Import(import), None).map(drop).map_err(text)
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
