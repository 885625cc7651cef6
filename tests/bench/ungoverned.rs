//! What governing is held against: the gateway with limits that count nothing and a journal that forgets, otherwise built
//! and set up as it is.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use glassgate::accounting::row::Row;
use glassgate::accounting::settlement::{Durability, Held, Journal, JournalClosed, Slot};
use glassgate::admission::Admission;
use glassgate::admission::core::State;
use glassgate::admission::core::rule::Rule;
use glassgate::admission::counts::{Ask, Counts, Denied, Grant, Time};
use glassgate::config::{Config, Overrides};
use glassgate::data_dir::{DataDir, Run};
use glassgate::ports::SystemClock;
use glassgate::{cli, server};

#[derive(Parser)]
struct Args {
    /// The word that brought us here.
    _ungoverned: String,
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    admin: SocketAddr,
    #[arg(long)]
    config: PathBuf,
    #[arg(long)]
    data_dir: PathBuf,
}

/// Nothing is ever short, and nothing is counted.
struct Unbounded;

#[async_trait::async_trait]
impl Counts for Unbounded {
    fn peek(&self, _asks: &[Ask]) -> Result<(), Denied> {
        Ok(())
    }
    async fn reserve(&self, _asks: &[Ask]) -> Result<Box<dyn Grant>, Denied> {
        Ok(Box::new(Unbounded))
    }
    fn state(&self, ask: &Ask) -> State {
        State { limit: ask.limit, used: 0, held: 0, remaining: ask.limit, reset: Duration::ZERO }
    }
}

impl Grant for Unbounded {
    fn settle(self: Box<Self>, _used: &dyn Fn(&Rule) -> u64) {}
}

/// A journal that nobody reads.
struct Forgets;

impl Journal for Forgets {
    fn open(&self, _row: &Row) -> Result<Slot, JournalClosed> {
        Ok(Slot { segment: 0, bytes: 0 })
    }
    fn close(&self, _slot: Slot, _row: Row, _durability: Durability) -> Result<Option<Box<Held>>, Box<Row>> {
        Ok(None)
    }
    fn durable(&self, _sequence: u64) -> Pin<Box<dyn Future<Output = bool> + Send>> {
        Box::pin(std::future::ready(true))
    }
    fn ship(&self, _held: Held) {}
    fn amend(&self, _held: Option<Held>, _row: Row) {}
}

/// Serves until a signal.
pub fn serve() {
    let args = Args::parse();
    let overrides = Overrides {
        listen: Some(args.listen),
        admin: Some(args.admin),
        data_dir: Some(args.data_dir),
        ..Overrides::default()
    };
    let config = Config::load(&args.config, &overrides).unwrap_or_else(|problems| panic!("{problems}"));
    let data_dir = DataDir::open(&config.gateway.data_dir).unwrap();
    let (data, admin) = (server::bind(args.listen).unwrap(), server::bind(args.admin).unwrap());
    cli::serve::quickstart(&cli::serve::control(&config.gateway, &data_dir)).unwrap();
    let clock = Arc::new(SystemClock);
    let mut app = cli::serve::build(config, overrides, &args.config, &data_dir, clock.clone()).unwrap();
    let inner = Arc::get_mut(&mut app).expect("nobody else has it yet");
    let time = Arc::new(Time::new(clock));
    inner.admission = Admission::new(Arc::new(Forgets), Arc::new(Unbounded), time, inner.metrics.clone());
    let run = Run { pid: std::process::id(), data: data.1, admin: admin.1 };
    server::run(&app, data, admin, "unknown".to_owned(), || data_dir.write_run(&run).unwrap()).unwrap();
}
