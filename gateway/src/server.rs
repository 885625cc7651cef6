//! Listeners, signals, and the end: what turns an `App` into a process that serves.

use std::collections::HashSet;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::IntoRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use notify::Watcher;
use parking_lot::Mutex;
use pingora_core::apps::ServerApp;
use pingora_core::apps::http_app::HttpServer;
use pingora_core::listeners::{L4BufferSettings, ListenerConfig};
use pingora_core::server::Fds;
use pingora_core::server::configuration::ServerConf;
use pingora_core::services::Service as _;
use pingora_core::services::listening::Service;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

use crate::admin::Admin;
use crate::app::{App, Phase};
use crate::guard::Guard;

/// A connection reads into 8 KiB and writes from 16 KiB: pingora's 64 KiB would be resident for every idle stream, and a
/// head with a small JSON body leaves in one write.
const READ_BUFFER: usize = 8 << 10;
const WRITE_BUFFER: usize = 16 << 10;
/// What is cut has this long to say so, to its client and to the ledger.
const CUT_MAX: Duration = Duration::from_secs(2);
const DRAIN_LOOK: Duration = Duration::from_millis(20);
/// Editors write a file in several steps; reading waits until they are done.
const SETTLE: Duration = Duration::from_millis(300);
/// … but not for ever: a busy folder must not keep a change from counting.
const SETTLE_MAX: Duration = Duration::from_secs(2);
/// Long prompts are tokenised beside the proxy's threads, so many at a time.
const TOKENIZING_MAX: usize = 2;

/// What the process says of itself, on stderr: stdout belongs to the access log. pingora reports every hang-up as an
/// error; those are in the records.
pub fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("GLASSGATE_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,pingora_core=off,pingora_proxy=off"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
}

/// Binds now, so that a taken port is an error here and not a panic later, and port 0 is known.
///
/// # Errors
/// When the address is taken or not ours.
pub fn bind(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let bound = listener.local_addr()?;
    Ok((listener, bound))
}

/// Serves until a signal, then lets running requests finish.
///
/// # Errors
/// When a runtime or a signal handler cannot be made.
pub fn run(
    app: &Arc<App>,
    data: (TcpListener, SocketAddr),
    admin: (TcpListener, SocketAddr),
    token: String,
    ready: impl FnOnce(),
) -> io::Result<()> {
    let threads = app.snapshot.load().config.gateway.threads;
    let data_runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .max_blocking_threads(TOKENIZING_MAX)
        .thread_name("proxy")
        .enable_all()
        .build()?;
    // Probes and metrics have a thread of their own: they answer when the proxy is busy.
    let admin_runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("admin").enable_all().build()?;
    let (stop, stopped) = watch::channel(false);
    let (leave, leaving) = watch::channel(false);

    let conf = Arc::new(ServerConf::default());
    let guard = Guard::new(app.clone(), &conf, &app.snapshot.load().config.gateway.listen, leaving);
    listen(&data_runtime, Service::new("data".to_owned(), guard), data, stopped.clone());
    let console = Service::new("admin".to_owned(), HttpServer::new_app(Admin::new(app.clone(), token)));
    listen(&admin_runtime, console, admin, stopped);
    watch_files(app);

    admin_runtime.block_on(async {
        let mut end = Signals::new()?;
        let mut hangup = signal(SignalKind::hangup())?;
        // Only now: whoever knows that we are here may also tell us to go.
        ready();
        let end_of_life = loop {
            tokio::select! {
                why = end.recv() => break why,
                _ = hangup.recv() => {
                    let app = app.clone();
                    tokio::task::spawn_blocking(move || app.reload());
                }
            }
        };
        drain(app, &leave, &mut end, end_of_life).await;
        io::Result::Ok(())
    })?;
    // Nobody is waiting any more; what the drop of a stream settles still reaches the ledger.
    let _ = stop.send(true);
    data_runtime.shutdown_timeout(Duration::from_secs(1));
    admin_runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(())
}

/// The end in its phases. A second signal goes straight to the cut.
async fn drain(app: &App, leave: &watch::Sender<bool>, end: &mut Signals, why: Signal) {
    let (before, running) = {
        let gateway = &app.snapshot.load().config.gateway;
        (gateway.pre_drain, gateway.drain)
    };
    app.phase.send_replace(Phase::Leaving);
    app.shadows.stop();
    leave.send_replace(true);
    let in_flight = || app.metrics.requests_in_flight();
    tracing::info!(in_flight = in_flight(), "shutting down; a second signal ends it now");
    // Who presses Ctrl-C has no load balancer that must hear of it first.
    let hurried = why == Signal::Terminate && {
        tokio::select! {
            () = tokio::time::sleep(before) => false,
            _ = end.recv() => true,
        }
    };
    if !hurried {
        app.phase.send_replace(Phase::Draining);
        until_idle(app, running, end).await;
    }
    app.phase.send_replace(Phase::Cut);
    if in_flight() > 0 {
        tracing::warn!(in_flight = in_flight(), "cutting what still runs");
        until_idle(app, CUT_MAX, end).await;
    }
}

/// Waits until nobody is in flight, but no longer than `most`, nor beyond another signal.
async fn until_idle(app: &App, most: Duration, end: &mut Signals) {
    let deadline = Instant::now() + most;
    while app.metrics.requests_in_flight() > 0 && Instant::now() < deadline {
        tokio::select! {
            () = tokio::time::sleep(DRAIN_LOOK) => {}
            _ = end.recv() => break,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Signal {
    Terminate,
    Interrupt,
}

/// SIGTERM or SIGINT, whichever comes.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn recv(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::Terminate,
            _ = self.interrupt.recv() => Signal::Interrupt,
        }
    }
}

/// Hands a bound listener to pingora as it would hand over one from another process.
fn listen<A: ServerApp + Send + Sync + 'static>(
    runtime: &tokio::runtime::Runtime,
    mut service: Service<A>,
    (listener, address): (TcpListener, SocketAddr),
    stopped: watch::Receiver<bool>,
) {
    let name = address.to_string();
    service.add_listener(ListenerConfig::tcp(&name).l4_buffer(L4BufferSettings::new(READ_BUFFER, WRITE_BUFFER)));
    let mut fds = Fds::new();
    fds.add(name, listener.into_raw_fd());
    let fds = Arc::new(Mutex::new(fds));
    runtime.spawn(async move { service.start_service(Some(fds), stopped, 1).await });
}

/// Reads the configuration again when one of its files changes. Folders are watched, because editors replace files
/// instead of writing to them, and ConfigMaps replace the `..data` link beside them.
fn watch_files(app: &Arc<App>) {
    let (changed, changes) = channel();
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if let Ok(event) = event
            && !event.kind.is_access()
        {
            let _ = changed.send(event.paths);
        }
    });
    let mut watcher = match watcher {
        Ok(watcher) => watcher,
        Err(error) => {
            tracing::warn!(%error, "configuration files are not watched; use SIGHUP or POST /admin/reload");
            return;
        }
    };
    let mut files = app.snapshot.load().config.files.clone();
    let mut watched = HashSet::new();
    watch_folders(&mut watcher, &files, &mut watched);
    // The thread must not keep the gateway alive.
    let app = Arc::downgrade(app);
    let follow = move || {
        while let Ok(paths) = changes.recv() {
            let ours = |path: &PathBuf| {
                let name = path.file_name();
                name.is_some_and(|name| name == "..data") || files.iter().any(|file| file.file_name() == name)
            };
            if !paths.iter().any(ours) {
                continue;
            }
            let enough = Instant::now() + SETTLE_MAX;
            while Instant::now() < enough && changes.recv_timeout(SETTLE).is_ok() {}
            let Some(app) = app.upgrade() else { return };
            // The outcome is logged and counted there.
            let _ = app.reload();
            // It may name other files now.
            files.clone_from(&app.snapshot.load().config.files);
            watch_folders(&mut watcher, &files, &mut watched);
        }
    };
    if let Err(error) = std::thread::Builder::new().name("config".into()).spawn(follow) {
        tracing::warn!(%error, "configuration files are not watched");
    }
}

fn watch_folders(watcher: &mut notify::RecommendedWatcher, files: &[PathBuf], watched: &mut HashSet<PathBuf>) {
    for file in files {
        let folder = match file.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        if !watched.insert(folder.to_owned()) {
            continue;
        }
        if let Err(error) = watcher.watch(folder, notify::RecursiveMode::NonRecursive) {
            tracing::warn!(%error, folder = %folder.display(), "this folder is not watched; use SIGHUP or POST /admin/reload");
        }
    }
}
