//! A panic of our own code, at every moment of a request: one record, a right row, nothing held, and the next is served.
//!
//! The real proxy on a real socket, in this process, with a clock that panics at its n-th look: every stage looks at
//! the clock, so every stage gets its turn.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use glassgate::cli::serve::build;
use glassgate::config::{Config, Overrides};
use glassgate::data_dir::DataDir;
use glassgate::ports::{Clock, SystemClock};
use glassgate::proxy::Gateway;
use pingora_core::apps::ServerApp;
use pingora_core::protocols::l4::stream::Stream;
use pingora_core::server::configuration::ServerConf;
use serde_json::json;

use crate::canary::{Secret, Told};
use crate::support::gateway::{Setup, append, chat_with, metric};
use crate::support::upstream::Upstream;
use crate::support::{eventually, http};

/// Counts looks at the clock and panics at one of them, once.
struct Fused {
    looks: AtomicU64,
    panic_at: AtomicU64,
}

impl Clock for Fused {
    fn now_ns(&self) -> i64 {
        SystemClock.now_ns()
    }

    fn instant(&self) -> Instant {
        let look = self.looks.fetch_add(1, Ordering::SeqCst) + 1;
        if look == self.panic_at.load(Ordering::SeqCst) {
            std::panic::resume_unwind(Box::new("injected"));
        }
        Instant::now()
    }
}

#[test]
fn a_panic_at_any_moment_leaves_one_record_one_right_row_and_a_gateway_that_serves() {
    let upstream = Upstream::start();
    let setup = Setup::upstream(&upstream, "");
    setup.add_upstream("gone", "http://127.0.0.1:1/v1", "gone-model");
    let stands_in = "\n[routes.stands-in]\nsplit = { gone-model = 1 }\nfallback = [\"glimmer-2\"]\n";
    append(&setup.path("routes.toml"), stands_in);
    setup.replace("gateway.toml", "access_log = \"stdout\"", "access_log = \"off\"");
    let made = setup.run(&["keys", "create", "tester"]);
    let key = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    let path = setup.path("gateway.toml");
    let program = env!("CARGO_BIN_EXE_glassgate").into();
    let overrides = Overrides { data_dir: Some(setup.0.path().join("data")), program, ..Overrides::default() };
    let config = Config::load(&path, &overrides).unwrap();
    let data_dir = DataDir::open(&config.gateway.data_dir).unwrap();
    glassgate_runtime::set_threads(1);
    let clock = Arc::new(Fused { looks: AtomicU64::new(0), panic_at: AtomicU64::new(0) });
    let app = build(config, overrides, &path, &data_dir, clock.clone()).unwrap();

    let executor = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = executor.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let proxy = Arc::new(pingora_proxy::http_proxy(&Arc::new(ServerConf::default()), Gateway { app: app.clone() }));
    let (_stop, stopped) = tokio::sync::watch::channel(false);
    executor.spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (proxy, stopped) = (proxy.clone(), stopped.clone());
            tokio::spawn(async move { proxy.process_new(Box::new(Stream::from(tcp)), &stopped).await });
        }
    });

    let ask = |route: &str, stream: bool| {
        let mut body = chat_with("Hello!", json!({"max_tokens": 12, "ignore_eos": true, "stream": stream}));
        body["model"] = route.into();
        let bytes =
            http::post("/v1/chat/completions", Some(&key), &[("connection", "close")], body.to_string().as_bytes());
        http::raw(address, &bytes).map(http::Open::finish)
    };
    let quiet = || {
        eventually("the request to end everywhere, and nothing to be held", || {
            app.models.observe();
            let text = app.metrics.encode();
            let idle = metric(&text, "gateway_in_flight_requests", &[]) == 0.0
                && metric(&text, "runtime_requests", &[]) == 0.0
                && metric(&text, "runtime_kv_blocks", &["state=\"used\""]) == 0.0
                && metric(&text, "gateway_ledger_queue_rows", &[]) == 0.0;
            idle.then_some(())
        });
        // Families are gathered one after the other: what counts is a look that began when all was quiet.
        app.metrics.encode()
    };

    let (mut panics, mut requests) = (0, 0);
    for (route, stream) in
        ["assistant", "remote", "stands-in"].into_iter().flat_map(|route| [(route, false), (route, true)])
    {
        // As many looks as a whole answer takes; the first is before there is a request.
        clock.looks.store(0, Ordering::SeqCst);
        assert!(ask(route, stream).unwrap().complete);
        requests += 1;
        quiet();
        let looks = clock.looks.load(Ordering::SeqCst);
        assert!(looks > 8, "only {looks} looks: the stages no longer mark their time");
        for look in 2..=looks {
            clock.looks.store(0, Ordering::SeqCst);
            clock.panic_at.store(look, Ordering::SeqCst);
            // A panic closes the connection, at whatever point; what the client then reads is not the question here.
            let _ = ask(route, stream);
            requests += 1;
            let text = quiet();
            // Answers come in slightly varying chunks: the last looks are not always reached.
            panics += u64::from(clock.looks.load(Ordering::SeqCst) >= look);
            clock.panic_at.store(0, Ordering::SeqCst);
            assert_eq!(
                metric(&text, "gateway_requests_total", &[]),
                f64::from(requests),
                "{route}, look {look}: one record"
            );
            assert_eq!(metric(&text, "gateway_panics_total", &[]), panics as f64, "{route}, look {look}");
            for held in ["gateway_reserved_tokens", "gateway_reserved_usd"] {
                assert_eq!(metric(&text, held, &[]), 0.0, "{route}, look {look}: nothing is held");
            }
        }
    }
    assert!(ask("assistant", true).unwrap().complete, "the gateway still serves");
    let text = quiet();
    app.ledger.shut_down();
    let mut told = Told::default();
    told.add("metrics", text.clone());
    told.folder(data_dir.path(), "");
    assert_eq!(
        told.leaks(&[Secret::key("the key", &key, &[])]),
        [""; 0],
        "nothing of a request's secrets is left behind"
    );

    let db = rusqlite::Connection::open(data_dir.ledger()).unwrap();
    let one = |sql: &str| db.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    let ends = "SELECT COUNT(*) FROM ledger WHERE outcome != 'failed_over'";
    assert_eq!(one(ends), one("SELECT COUNT(DISTINCT request_id) FROM ledger"));
    assert_eq!(one("SELECT SUM(billed_nano_usd) FROM ledger WHERE outcome = 'failed_over'"), 0);
    let panicked = one("SELECT COUNT(*) FROM ledger WHERE outcome = 'panicked'");
    assert!(panicked > 5, "only {panicked} rows ended in the panic: it came too early to show anything");
    assert_eq!(
        metric(&text, "gateway_tokens_total", &[]) as i64,
        one("SELECT SUM(input_tokens + cache_read_tokens + output_tokens + reasoning_tokens) FROM ledger")
    );
    println!("{panics} panics, {panicked} of them after admission");
}
