//! The admin listener: metrics, probes and the engine's steps, open on loopback; everything under `/admin` needs the token.

mod steps;

use std::sync::Arc;

use async_trait::async_trait;
use http::{Method, Response, StatusCode};
use pingora_core::apps::http_app::ServeHttp;
use pingora_core::protocols::http::ServerSession;
use serde_json::{Value, json};
use subtle::ConstantTimeEq;

use crate::accounting::core::NanoUsd;
use crate::admission::core::rule::Rule;
use crate::api::limit::{Of, Per, scope};
use crate::app::App;
use crate::config::{Config, Limits, SinkKind, TraceSink};
use crate::observe::access_log;
use crate::observe::spans::Origin;
use crate::observe::stages;

pub struct Admin {
    pub app: Arc<App>,
    pub token: String,
}

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let (method, path) = (session.req_header().method.clone(), session.req_header().uri.path().to_owned());
        let (status, kind, body) = match (&method, path.as_str()) {
            (&Method::GET, "/metrics") => {
                self.app.models.observe();
                self.app.auth.observe();
                self.app.admission.observe();
                self.app.ledger.observe();
                self.app.metrics.cache_bytes(self.app.cache.bytes());
                (StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", self.app.metrics.encode().into_bytes())
            }
            (&Method::GET, "/debug/steps") => {
                steps::answer(&self.app.models, session.req_header().uri.query().unwrap_or(""))
            }
            // Alive: the process can answer. Nothing that others do makes it dead.
            (&Method::GET, "/livez") => probe(None),
            (&Method::GET, "/startupz" | "/readyz") => probe(self.app.unready()),
            (_, path) if path.starts_with("/admin/") => {
                if !self.is_operator(session) {
                    error(
                        StatusCode::UNAUTHORIZED,
                        "the admin token is missing or wrong; it is in <data_dir>/admin.token",
                    )
                } else {
                    self.admin(&method, path).await
                }
            }
            _ => error(
                StatusCode::NOT_FOUND,
                "there is nothing here; try /metrics, /debug/steps, /livez, /readyz or /startupz",
            ),
        };
        let response =
            Response::builder().status(status).header("content-type", kind).header("content-length", body.len());
        response.body(body).unwrap_or_default()
    }
}

type Reply = (StatusCode, &'static str, Vec<u8>);

impl Admin {
    fn is_operator(&self, session: &ServerSession) -> bool {
        let sent = session.get_header_bytes("authorization");
        let token = sent.strip_prefix(b"Bearer ").unwrap_or(b"");
        token.ct_eq(self.token.as_bytes()).into()
    }

    async fn admin(&self, method: &Method, path: &str) -> Reply {
        match (method, path) {
            (&Method::POST, "/admin/reload") => {
                let app = self.app.clone();
                // Loading a model takes as long as it takes; probes go on meanwhile.
                match tokio::task::spawn_blocking(move || app.reload().map_err(|error| error.to_string())).await {
                    Ok(Ok(hash)) => json(StatusCode::OK, &json!({"applied": true, "config_hash": hash})),
                    Ok(Err(problems)) => json(
                        StatusCode::UNPROCESSABLE_ENTITY,
                        &json!({"applied": false, "problems": problems.lines().collect::<Vec<_>>()}),
                    ),
                    Err(_) => error(StatusCode::INTERNAL_SERVER_ERROR, "the reload failed inside the gateway"),
                }
            }
            (&Method::GET, "/admin/config") => {
                let snapshot = self.app.snapshot.load();
                json(StatusCode::OK, &config(&snapshot.config, self.app.rejected.lock().as_deref()))
            }
            (&Method::GET, "/admin/models") => json(StatusCode::OK, &self.app.models.told()),
            (&Method::GET, _) if path.starts_with("/admin/requests/") => {
                let id = path.trim_start_matches("/admin/requests/");
                match self.app.observe.find(id) {
                    Some(record) => {
                        let line: Value = serde_json::from_slice(&access_log::line(&record)).unwrap_or_default();
                        let spans: Vec<Value> = Origin::default()
                            .spans(&record)
                            .iter()
                            .map(|span| {
                                let since = |at: std::time::SystemTime| {
                                    at.duration_since(std::time::UNIX_EPOCH).map_or(0, |at| at.as_nanos() as i64 - record.started_ns)
                                };
                                json!({"name": span.name, "span_id": span.span_context.span_id().to_string(), "parent_span_id": span.parent_span_id.to_string(),
                                       "start_ns": since(span.start_time), "end_ns": since(span.end_time)})
                            })
                            .collect();
                        json(
                            StatusCode::OK,
                            &json!({"record": line, "spans": spans, "stages": stages::stages(&record)}),
                        )
                    }
                    None => error(
                        StatusCode::NOT_FOUND,
                        "this request is not among the last 1,000; traces.jsonl goes back further",
                    ),
                }
            }
            _ => error(
                StatusCode::NOT_FOUND,
                "try POST /admin/reload, GET /admin/config, GET /admin/models or GET /admin/requests/{id}",
            ),
        }
    }
}

/// What serves, for people. Secrets print as `***`.
fn config(config: &Config, rejected: Option<&str>) -> Value {
    json!({
        "config_hash": config.hash,
        "rejected": rejected,
        "files": config.files,
        "price_version": config.prices.version,
        "listen": {"data": config.gateway.data, "admin": config.gateway.admin},
        "data_dir": config.gateway.data_dir,
        "telemetry": {
            "environment": config.gateway.environment,
            "traces": config.gateway.traces.iter().map(trace_sink).collect::<Vec<_>>(),
        },
        "limits": limits(&config.gateway.limits),
        "rules": config.gateway.rules.iter().map(|rule| self::rule(rule)).collect::<Vec<_>>(),
        "models": config.models.iter().map(|(name, model)| (name.clone(), json!({"source": model.source.to_string(), "public": model.public, "output_max": model.output_max}))).collect::<serde_json::Map<_, _>>(),
        "upstreams": config.upstreams.values().map(|upstream| (upstream.name.clone(), json!({
            "host": upstream.host, "port": upstream.port, "tls": upstream.tls, "http2": upstream.http2,
            "api_key": upstream.api_key,
        }))).collect::<serde_json::Map<_, _>>(),
        "routes": config.routes.iter().map(|route| json!({
            "name": route.name,
            "split": route.split.iter().map(|(name, weight)| (name.clone(), json!(weight))).collect::<serde_json::Map<_, _>>(),
            "fallback": route.fallback,
            "priority": route.priority.as_str(),
            "shadow": route.shadow.as_ref().map(|rule| json!({"variant": rule.variant, "sample": rule.sample})),
            "cache": route.cache.map(|rule| json!({"ttl_seconds": rule.ttl.as_secs_f64(), "sampled": rule.sampled})),
        })).collect::<Vec<_>>(),
    })
}

fn rule(rule: &Rule) -> Value {
    let limit = match rule.of {
        Of::Usd => json!(NanoUsd(rule.limit).to_string()),
        _ => json!(rule.limit),
    };
    json!({
        "name": rule.name, "limit": limit, "of": rule.of.as_str(), "per": rule.per.map(Per::as_str),
        "scope": scope(&rule.by), "mode": rule.mode.as_str(),
    })
}

/// What a key may do that has no limits of its own; `glassgate keys list` shows those.
fn limits(limits: &Limits) -> Value {
    json!({
        "requests_per_minute": limits.requests_per_minute,
        "tokens_per_minute": limits.tokens_per_minute,
        "concurrency": limits.concurrency,
        "usd_per_day": limits.per_day.to_string(),
    })
}

fn trace_sink(sink: &TraceSink) -> Value {
    match &sink.kind {
        SinkKind::File => json!({"name": sink.name, "sample": sink.sample}),
        SinkKind::Otlp(to) => json!({
            "name": sink.name,
            "sample": sink.sample,
            // A query may hold a key.
            "endpoint": to.endpoint.split_once('?').map_or(to.endpoint.clone(), |(url, _)| format!("{url}?***")),
            "headers": to.headers.iter().map(|(name, value)| (name.clone(), json!(value))).collect::<serde_json::Map<_, _>>(),
        }),
    }
}

fn probe(unready: Option<&str>) -> Reply {
    match unready {
        None => (StatusCode::OK, "text/plain", b"ok\n".to_vec()),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{why}\n").into_bytes()),
    }
}

fn json(status: StatusCode, value: &Value) -> Reply {
    (status, "application/json", value.to_string().into_bytes())
}

fn error(status: StatusCode, message: &str) -> Reply {
    json(
        status,
        &json!({"error": {"message": message, "type": "admin_error", "param": null, "code": status.as_u16().to_string()}}),
    )
}
