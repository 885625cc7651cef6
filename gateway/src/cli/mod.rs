//! The commands. Each is a file and a line here.

mod audit;
mod beginning;
mod check;
mod client;
mod config;
mod demo;
mod feedback;
mod keys;
mod ledger;
mod limits;
mod models;
mod parquet;
mod prices;
mod reprice;
mod routes;
pub mod serve;
mod spend;
mod tenants;
mod trace;
mod verify;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::accounting::ledger::store::{Books, Database};
use crate::auth::store::Location;
use crate::config::{Config, Overrides, database_of, pepper_of};
use crate::control::Control;
use crate::data_dir::DataDir;
use crate::database::postgres::Target;
use crate::models::hub::Hub;
use crate::models::{Downloads, Intake, templates, vet};
use crate::ports::{Clock as _, SystemClock};
use crate::when;

/// A serving gateway for language models that shows everything it does.
#[derive(Parser)]
#[command(
    name = "glassgate",
    version,
    about,
    after_help = "\
First steps:
  glassgate serve                          serve; the first start makes a key and prints a curl line
  glassgate keys create alice              make a key for somebody
  glassgate routes explain --route assistant --session 42
  glassgate limits explain --key alice     which limits bind them, and how each stands
  glassgate spend --by key                 who spent what
  glassgate ledger verify                  whether every row is there, once, as it was written
  glassgate feedback                       which version answers better
  glassgate demo                           fill dashboards with traffic whose answers are checked
  glassgate trace REQUEST-ID               where one request's time went

Clients send requests to http://127.0.0.1:8080/v1, metrics are at http://127.0.0.1:8081/metrics."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Options that every command takes.
#[derive(Args, Clone, Debug)]
struct Place {
    /// The configuration to work from; it names its siblings (routes, prices)
    #[arg(long, global = true, default_value = "configs/gateway.toml", env = "GLASSGATE_CONFIG", value_name = "FILE")]
    config: PathBuf,
    /// Where ledger, keys and traces are kept, instead of the configuration's `storage.data_dir`
    #[arg(long, global = true, env = "GLASSGATE_DATA_DIR", value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
    /// More folders in which models are looked for, before those of the configuration; separated by ':'
    #[arg(long, global = true, env = "MODEL_PATH", value_name = "FOLDERS", value_delimiter = ':')]
    model_path: Vec<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until SIGTERM; configuration files are read again when they change
    Serve {
        #[command(flatten)]
        place: Place,
        /// Address for clients, instead of the configuration's (port 0 picks a free one)
        #[arg(long, value_name = "ADDR")]
        listen: Option<SocketAddr>,
        /// Address for metrics, probes and /admin, instead of the configuration's
        #[arg(long, value_name = "ADDR")]
        admin: Option<SocketAddr>,
    },
    /// Validate the configuration with the code that serves, models included; says every problem at once
    Check {
        #[command(flatten)]
        place: Place,
    },
    /// Make, change, rotate, list and revoke API keys; a running gateway sees it within a second
    Keys {
        #[command(flatten)]
        place: Place,
        #[command(subcommand)]
        command: keys::KeysCommand,
    },
    /// Say what tenants are called, tag them, and shut them out
    Tenants {
        #[command(flatten)]
        place: Place,
        #[command(subcommand)]
        command: tenants::TenantsCommand,
    },
    /// Put and delete limit rules, and see which bind a key and how they stand
    Limits {
        #[command(flatten)]
        place: Place,
        #[command(subcommand)]
        command: limits::LimitsCommand,
    },
    /// Take keys, tenants and rules from one data folder to another, or to a database that gateways share
    Config {
        #[command(flatten)]
        place: Place,
        #[command(subcommand)]
        command: config::ConfigCommand,
    },
    /// Read the record of changes, and check that nobody has tampered with it
    Audit {
        #[command(flatten)]
        place: Place,
        #[command(subcommand)]
        command: audit::AuditCommand,
    },
    /// Look at how requests are routed
    Routes {
        #[command(flatten)]
        place: Place,
        #[command(subcommand)]
        command: routes::RoutesCommand,
    },
    /// Download, list, watch and compare models
    Models {
        #[command(flatten)]
        place: Place,
        #[command(subcommand)]
        command: models::ModelsCommand,
    },
    /// Show what models cost, and import public price lists
    Prices {
        #[command(flatten)]
        place: Place,
        #[command(subcommand)]
        command: prices::PricesCommand,
    },
    /// Show what was spent, from the ledger
    Spend {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        options: spend::Options,
    },
    /// Check the ledger, export it, or price its rows again
    Ledger {
        #[command(flatten)]
        place: Place,
        #[command(subcommand)]
        command: ledger::LedgerCommand,
    },
    /// Play the evaluation's prompts against the running gateway as real clients do, and check and judge every answer
    Demo {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        options: demo::Options,
    },
    /// Show what clients said of answers, by version: which one is better, and what it costs
    Feedback {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        options: feedback::Options,
    },
    /// Show one of the last 1,000 requests of the running gateway: what was decided, where the time went, what it cost
    Trace {
        #[command(flatten)]
        place: Place,
        /// A request id (header x-request-id), response id (chatcmpl-…) or trace id
        id: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Read a model's tokenizer and chat template under limits on memory and time, for the process that starts this one
    #[command(name = vet::COMMAND, hide = true)]
    VetModel { path: PathBuf },
    /// Render a model's chat template under limits, for the process that starts this one
    #[command(name = templates::COMMAND, hide = true)]
    RenderChats,
    /// Print completions for a shell, to be sourced
    Completions { shell: clap_complete::Shell },
}

/// Why a command failed, in words for its user.
type Outcome = Result<(), String>;

/// Runs the command line.
pub fn run() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Serve { place, listen, admin } => serve::run(&place, listen, admin),
        Command::Check { place } => check::run(&place),
        Command::Keys { place, command } => keys::run(&place, command),
        Command::Tenants { place, command } => tenants::run(&place, command),
        Command::Limits { place, command } => limits::run(&place, command),
        Command::Config { place, command } => config::run(&place, command),
        Command::Audit { place, command } => audit::run(&place, command),
        Command::Routes { place, command } => routes::run(&place, command),
        Command::Models { place, command } => models::run(&place, command),
        Command::Prices { place, command } => prices::run(&place, command),
        Command::Spend { place, options } => spend::run(&place, &options),
        Command::Ledger { place, command } => ledger::run(&place, command),
        Command::Demo { place, options } => demo::run(&place, &options),
        Command::Feedback { place, options } => feedback::run(&place, &options),
        Command::Trace { place, id, json } => trace::run(&place, &id, json),
        Command::VetModel { path } => vet::limited(&path),
        Command::RenderChats => templates::serve(),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "glassgate", &mut std::io::stdout());
            Ok(())
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("glassgate: {message}");
            ExitCode::FAILURE
        }
    }
}

impl Place {
    fn overrides(&self) -> Overrides {
        let data_dir = self.data_dir.clone();
        // An empty variable is as good as none.
        let model_roots = self.model_path.iter().filter(|folder| !folder.as_os_str().is_empty()).cloned().collect();
        Overrides { data_dir, model_roots, program: program(), ..Overrides::default() }
    }

    fn config(&self) -> Result<Config, String> {
        Config::load(&self.config, &self.overrides())
            .map_err(|problems| format!("the configuration cannot be used:\n{problems}"))
    }

    /// For commands that look at models and download none.
    fn intake(&self, config: &Config) -> Intake {
        let hub = Hub::from_environment(config.gateway.data_dir.join("hub"));
        Intake { hub, downloads: Downloads::Refused, program: self.overrides().program }
    }

    fn data_dir(&self) -> Result<DataDir, String> {
        let path = match &self.data_dir {
            Some(path) => path.clone(),
            None => self.config()?.gateway.data_dir,
        };
        DataDir::open(&path).map_err(|error| error.to_string())
    }

    /// Where the ledger of a data folder is kept. Without a configuration, in the folder.
    fn store(&self, data_dir: &DataDir) -> Result<Database, String> {
        Ok(self.database()?.map_or_else(|| Database::of(data_dir.path()), Database::Postgres))
    }

    /// Where the keys of a data folder are kept; likewise.
    fn key_store(&self, data_dir: &DataDir) -> Result<Location, String> {
        Ok(self.database()?.map_or_else(|| Location::File(data_dir.keys()), Location::Postgres))
    }

    fn database(&self) -> Result<Option<Arc<Target>>, String> {
        if self.config.exists() { database_of(&self.config) } else { Ok(None) }
    }

    /// Who changes what is kept there.
    fn control(&self) -> Result<Control, String> {
        let data_dir = self.data_dir()?;
        let location = self.key_store(&data_dir)?;
        self.control_of(data_dir, location)
    }

    fn control_of(&self, data_dir: DataDir, location: Location) -> Result<Control, String> {
        let pepper = if self.config.exists() { pepper_of(&self.config)? } else { None };
        Ok(Control::new(data_dir, location, pepper))
    }
}

/// The ledger, to be read beside a gateway that may run.
fn ledger(store: &Database) -> Result<Box<dyn Books>, String> {
    if let Database::Sqlite(path) = store
        && !path.exists()
    {
        let path = path.display();
        return Err(format!("there is no ledger at {path}; it begins with the first start of `glassgate serve`"));
    }
    store.books().map_err(|error| format!("the ledger's store: {error}"))
}

/// This program, whatever became of its file since it started.
fn program() -> PathBuf {
    if cfg!(target_os = "linux") { "/proc/self/exe".into() } else { std::env::current_exe().unwrap_or_default() }
}

/// So many hours ago in Unix nanoseconds; without a number, since ever.
fn since(hours: Option<u32>) -> i64 {
    const HOUR_NS: i64 = 3_600_000_000_000;
    hours.map_or(0, |hours| SystemClock.now_ns().saturating_sub(HOUR_NS.saturating_mul(i64::from(hours))))
}

/// Who the record of changes says it was.
fn actor() -> String {
    format!("cli uid {}", rustix::process::getuid().as_raw())
}

/// A failure as text: every command ends in one line.
fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
