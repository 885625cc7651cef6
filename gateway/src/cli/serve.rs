//! `glassgate serve`: everything from files to a listening process, in order.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::beginning::Beginning;
use super::{Outcome, Place, text};
use crate::accounting::ledger::Ledger;
use crate::admission::Admission;
use crate::admission::before::Before;
use crate::admission::counts::{Counts, Time};
use crate::admission::local::Local;
use crate::admission::rules::Defaults;
use crate::admission::shared::Shared;
use crate::app::{App, Phase, Snapshot};
use crate::auth::Auth;
use crate::auth::api_key::generate;
use crate::auth::store::{KeyStore, Location};
use crate::cache::Cache;
use crate::config::{AccessLogTo, Config, GatewayConfig, Overrides};
use crate::control::{Change, Control, Denied};
use crate::data_dir::{DataDir, Run, write_secret};
use crate::dispatch::upstream::Upstreams;
use crate::exchange::Observer;
use crate::models::hub::Hub;
use crate::models::{Downloads, Intake, Models};
use crate::observe::access_log::AccessLog;
use crate::observe::metrics::Metrics;
use crate::observe::spans::Origin;
use crate::observe::traces::Sink;
use crate::observe::{Observe, ObserveShadows};
use crate::ports::{Clock, SystemClock};
use crate::server;
use crate::shadow::Shadows;

pub(super) fn run(place: &Place, listen: Option<SocketAddr>, admin: Option<SocketAddr>) -> Outcome {
    let overrides = Overrides { listen, admin, ..place.overrides() };
    let config = Config::load(&place.config, &overrides)
        .map_err(|problems| format!("the configuration cannot be used:\n{problems}"))?;
    // Before any other thread exists: candle reads its thread counts from the environment, once.
    glassgate_runtime::set_threads(config.gateway.engine.threads);
    server::log_to_stderr();

    let data_dir = DataDir::open(&config.gateway.data_dir).map_err(text)?;
    let _lock = data_dir.lock().map_err(text)?;
    let bind =
        |address: SocketAddr| server::bind(address).map_err(|error| format!("cannot listen on {address}: {error}"));
    let (data, admin) = (bind(config.gateway.data)?, bind(config.gateway.admin)?);
    let token = admin_token(&data_dir)?;
    let key = quickstart(&control(&config.gateway, &data_dir))?;

    let app = build(config, overrides, &place.config, &data_dir, Arc::new(SystemClock))?;
    let run = Run { pid: std::process::id(), data: data.1, admin: admin.1 };
    let addresses = (data.1, admin.1);
    let outcome = server::run(&app, data, admin, token, || {
        if let Err(error) = data_dir.write_run(&run) {
            tracing::warn!(%error, "other commands will not find this gateway");
        }
        greet(&app, addresses.0, addresses.1, key.as_deref(), &data_dir);
    });
    data_dir.remove_run();
    app.admission.close();
    app.ledger.shut_down();
    app.observe.shut_down();
    outcome.map_err(text)
}

/// Everything that serves, short of a listener.
///
/// # Errors
/// The first thing that keeps it from serving, in words for the operator.
pub fn build(
    config: Config,
    overrides: Overrides,
    path: &Path,
    data_dir: &DataDir,
    clock: Arc<dyn Clock>,
) -> Result<Arc<App>, String> {
    let metrics = Arc::new(Metrics::new());
    let gateway = &config.gateway;
    let store = gateway.store();
    let ledger = Ledger::open(data_dir.path(), &store, gateway.ledger, metrics.clone());
    let ledger = Arc::new(ledger.map_err(text)?);
    let control = control(gateway, data_dir);
    let (pepper, copy) = (control.pepper().map_err(text)?, data_dir.keys_copy());
    let auth = Auth::open(control.location(), &copy, pepper, clock.clone(), metrics.clone()).map_err(text)?;
    auth.bind(&gateway.rules, gateway.common);
    let beginning = Beginning {
        ledger: ledger.clone(),
        store,
        defaults: Defaults::new(gateway.limits_shared),
        directory: auth.directory().clone(),
        now_ns: clock.now_ns(),
        metrics: metrics.clone(),
    };
    let (before, late) = beginning.read()?;
    let time = Arc::new(Time::new(clock.clone()));
    let before = Arc::new(before);
    let local: Arc<Local> = Arc::new(Local::new(time.clone(), before.clone()));
    type Remember = Box<dyn Fn(Arc<Before>) + Send>;
    let (counts, remember): (Arc<dyn Counts>, Remember) = match &gateway.redis {
        Some(redis) => {
            let replica = data_dir.replica().map_err(text)?;
            let shared = Shared::start(redis, replica, local, before, time.clone(), metrics.clone())?;
            let shared = Arc::new(shared);
            (shared.clone(), Box::new(move |before| shared.remember(&before)))
        }
        None => (local.clone(), Box::new(move |before| local.remember(before))),
    };
    if let Some(late) = late {
        late.catch_up(remember).map_err(text)?;
    }

    let hub = Hub::from_environment(data_dir.hub());
    let intake = Intake { hub, downloads: Downloads::Allowed, program: overrides.program.clone() };
    let models = Models::start(&config.gateway.engine, intake, metrics.clone())?;
    let loaded = models.load(&config.models);
    if loaded.values().all(Result::is_err) && config.upstreams.is_empty() {
        let why: Vec<String> = loaded
            .iter()
            .filter_map(|(name, outcome)| Some(format!("model `{name}`: {}", outcome.as_ref().err()?)))
            .collect();
        return Err(format!("no model can be loaded:\n{}", why.join("\n")));
    }

    auth.trust(auth.open_issuers(&config.gateway.auth.jwt)?);
    let log = match config.gateway.access_log {
        AccessLogTo::Stdout => Some(AccessLog::to(std::io::stdout(), metrics.clone()).map_err(text)?),
        AccessLogTo::Off => None,
    };
    let origin = Origin { environment: config.gateway.environment.clone() };
    let traces = config.gateway.traces.iter();
    let sinks = traces.map(|sink| Sink::start(sink, origin.clone(), &data_dir.traces(), metrics.clone()));
    let sinks = sinks.collect::<Result<Vec<_>, _>>()?;
    let observe = Arc::new(Observe::new(metrics.clone(), log, sinks));
    let watching: Arc<dyn Observer> = Arc::new(ObserveShadows(observe.clone()));
    let shadows = Shadows::new(config.gateway.shadow.clone(), ledger.clone(), watching, clock.clone(), metrics.clone());
    let cache = Cache::new(config.gateway.cache_bytes_max, metrics.clone());
    let admission = Admission::new(ledger.clone(), counts, time, metrics.clone());
    admission.share(config.gateway.limits_shared);
    let upstreams = Upstreams::default();
    let servers = upstreams.open(&config.upstreams)?;
    models.show(&loaded);
    let snapshot = Snapshot::build(config, &loaded, &servers, clock.now_ns() / 1_000_000_000);
    snapshot.show(&metrics);
    upstreams.retain(servers);
    Ok(Arc::new(App {
        snapshot: ArcSwap::from_pointee(snapshot),
        auth,
        admission,
        observe,
        metrics,
        cache,
        shadows,
        models,
        upstreams,
        ledger,
        control,
        clock,
        phase: tokio::sync::watch::Sender::new(Phase::Serving),
        config_path: path.to_owned(),
        overrides,
        reloading: parking_lot::Mutex::default(),
        rejected: parking_lot::Mutex::default(),
    }))
}

/// A token for /admin, made anew at every start.
fn admin_token(data_dir: &DataDir) -> Result<String, String> {
    let token = generate().map_err(text)?;
    write_secret(&data_dir.admin_token(), &token).map_err(text)?;
    Ok(token)
}

/// Who changes what is kept where a configuration says.
pub fn control(gateway: &GatewayConfig, data_dir: &DataDir) -> Control {
    Control::new(data_dir.clone(), gateway.key_store(data_dir), gateway.auth.pepper.clone())
}

/// The first start makes a key, so that the first curl works. Returns it as long as its file is there.
///
/// # Errors
/// When the folder cannot be read or written, in words for the operator.
pub fn quickstart(control: &Control) -> Result<Option<String>, String> {
    let data_dir = control.data_dir();
    let path: PathBuf = data_dir.quickstart_key();
    let is_shared = matches!(control.location(), Location::Postgres(_));
    // What was seen of a database before says as much, and is at hand.
    let is_known = is_shared && has_keys(&data_dir.keys_copy());
    let is_empty = !is_known
        && match control.store().and_then(|store| Ok(store.page("", 1)?.is_empty())) {
            // What a start makes of a database that is away is said where keys are read.
            Err(_) if is_shared => false,
            is_empty => is_empty.map_err(text)?,
        };
    if is_empty && is_shared && has_keys(&data_dir.keys()) {
        tracing::warn!(
            "this data folder has keys of its own, and the database has none: nobody can call. To take them there, run `glassgate config export --local > keys.toml`, then `glassgate config import keys.toml`; to begin anew, `glassgate keys create NAME`"
        );
    } else if is_empty {
        // The file first: a key that nobody was shown would be no use.
        let key = generate().map_err(text)?;
        write_secret(&path, &key).map_err(text)?;
        let (tenant, name) = ("default".to_owned(), "quickstart".to_owned());
        let change = Change::CreateKey { token: key, tenant, name, edit: Box::default() };
        match control.apply("gateway", change, None) {
            // Another gateway was quicker.
            Err(Denied::Conflict(_)) if is_shared => std::fs::remove_file(&path).map_err(text)?,
            done => drop(done.map_err(text)?),
        }
    }
    Ok(std::fs::read_to_string(path).ok().map(|key| key.trim().to_owned()))
}

/// Whether a data folder has a key store with keys in it.
fn has_keys(path: &Path) -> bool {
    let first = || KeyStore::open(&Location::File(path.to_owned())).ok()?.page("", 1).ok()?.pop();
    path.exists() && first().is_some()
}

/// What a newcomer needs to see, on stderr: stdout belongs to the access log.
fn greet(app: &App, data: SocketAddr, admin: SocketAddr, key: Option<&str>, data_dir: &DataDir) {
    let snapshot = app.snapshot.load();
    let model = snapshot.routing.names().next().unwrap_or("MODEL");
    let key = key.unwrap_or("YOUR-KEY");
    let scheme = if snapshot.config.gateway.tls.is_some() { "https" } else { "http" };
    eprintln!(
        "
Glassgate {version} serves {models} at {scheme}://{data}/v1   (metrics: http://{admin}/metrics, data: {folder})

Try it:

  curl -N {scheme}://{data}/v1/chat/completions \\
    -H 'authorization: Bearer {key}' \\
    -H 'content-type: application/json' \\
    -d '{{\"model\":\"{model}\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"What is Glassgate?\"}}]}}'
",
        version = env!("CARGO_PKG_VERSION"),
        models = snapshot.routing.names().collect::<Vec<_>>().join(", "),
        folder = data_dir.path().display(),
    );
}
