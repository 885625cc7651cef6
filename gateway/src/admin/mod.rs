//! The admin listener: metrics, probes and the engine's steps, open on loopback; everything under `/admin` needs a token.

mod asked;
mod keys;
mod limits;
mod openapi;
mod operator;
mod record;
mod reply;
mod routes;
pub mod rules;
mod shown;
pub mod spend;
mod steps;
mod tenants;

use std::sync::Arc;

use async_trait::async_trait;
use http::{Response, StatusCode};
use pingora_core::apps::http_app::ServeHttp;
use pingora_core::protocols::http::ServerSession;
use serde_json::{Value, json};

use self::asked::{Asked, BODY_BYTES_MAX};
use self::operator::Operators;
pub use self::record::entry;
use self::reply::{Answer, Problem, Reply};
use self::routes::{Does, Found, Route};
use crate::app::App;
use crate::control::Change;
use crate::observe::access_log;
use crate::observe::spans::Origin;
use crate::observe::stages;

pub struct Admin {
    app: Arc<App>,
    operators: Operators,
}

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let reply = self.answer(session).await.unwrap_or_else(Reply::from);
        let mut response = Response::builder()
            .status(reply.status)
            .header("content-type", reply.kind)
            .header("content-length", reply.body.len())
            // A new key is in some of them.
            .header("cache-control", "no-store");
        for (name, value) in reply.headers {
            response = response.header(name, value);
        }
        response.body(reply.body).unwrap_or_default()
    }
}

impl Admin {
    /// `token`: the one of this start.
    pub fn new(app: Arc<App>, token: String) -> Admin {
        let operators = Operators::new(token, &*app.clock);
        Admin { app, operators }
    }

    async fn answer(&self, session: &mut ServerSession) -> Answer {
        let uri = session.req_header().uri.clone();
        let found = routes::find(session.req_header().method.as_str(), uri.path());
        if !matches!(&found, Found::Route(route, _) if route.is_probe()) {
            let hosts = &self.app.snapshot.load().config.gateway.admin_hosts;
            if !asked::is_for_us(&session.req_header().headers, hosts) {
                return Err(Problem::new(
                    StatusCode::FORBIDDEN,
                    "wrong_host",
                    "this listener is called by its loopback address; `admin.hosts` in gateway.toml lists other names",
                ));
            }
        }
        // Whoever has no token is not told what there is.
        let actor = match &found {
            Found::Route(route, _) if !route.needs_token() => "",
            _ if uri.path().starts_with("/admin/") => self.operators.identify(&self.app, session)?,
            _ => "",
        };
        let (route, parts) = match found {
            Found::Route(route, parts) => (route, parts),
            Found::Allowed(methods) => {
                let message = format!("use {} here", methods.join(" or "));
                let problem = Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message);
                return Err(Problem { headers: vec![("allow", methods.join(", "))], ..problem });
            }
            Found::Nothing => {
                return Err(Problem::not_found(
                    "there is nothing here; GET /admin/openapi.json says what there is, beside /metrics, /debug/steps, /livez, /readyz and /startupz",
                ));
            }
        };
        let asked = Asked {
            parts,
            query: asked::query(uri.query().unwrap_or("")),
            if_match: asked::if_match(&session.req_header().headers)?,
            body: body(session).await?,
            actor,
        };
        if route.is_probe() {
            // Answered whatever else goes on, and whether or not there is a thread to be had.
            return answer(&self.app, route, &asked);
        }
        let app = self.app.clone();
        // Stores block, and loading a model takes as long as it takes; probes go on meanwhile.
        let answered = tokio::task::spawn_blocking(move || answer(&app, route, &asked)).await;
        answered.unwrap_or_else(|_| {
            Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "this failed inside the gateway"))
        })
    }
}

async fn body(session: &mut ServerSession) -> Result<Vec<u8>, Problem> {
    let mut body = Vec::new();
    let cut = |_| Problem::new(StatusCode::BAD_REQUEST, "body_incomplete", "the body did not arrive whole");
    while let Some(piece) = session.read_request_body().await.map_err(cut)? {
        body.extend_from_slice(&piece);
        if body.len() > BODY_BYTES_MAX {
            let message = format!("a body has at most {BODY_BYTES_MAX} bytes here");
            return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message));
        }
    }
    Ok(body)
}

/// Every route, once. It may block.
fn answer(app: &App, route: &Route, asked: &Asked) -> Answer {
    let id = || asked.name().to_owned();
    match route.does {
        Does::Metrics => Ok(metrics(app)),
        Does::Steps => steps::answer(&app.models, asked),
        // Alive: the process can answer. Nothing that others do makes it dead.
        Does::Livez => Ok(probe(None)),
        Does::Startupz | Does::Readyz => Ok(probe(app.unready())),
        Does::Reload => reload(app),
        Does::Config => Ok(Reply::ok(&shown::config(&app.snapshot.load().config, app.rejected.lock().as_deref()))),
        Does::Models => Ok(Reply::ok(&app.models.told())),
        Does::Request => request(app, asked.name()),
        Does::ListKeys => keys::list(app, asked),
        Does::CreateKey => keys::create(app, asked),
        Does::ShowKey => keys::show(app, asked),
        Does::EditKey => keys::edit(app, asked),
        Does::RevokeKey => keys::switch(app, asked, |id| Change::RevokeKey { id }),
        Does::RotateKey => keys::rotate(app, asked),
        Does::EnableKey => keys::switch(app, asked, |id| Change::EnableKey { id }),
        Does::DisableKey => keys::switch(app, asked, |id| Change::DisableKey { id }),
        Does::ListTenants => tenants::list(app, asked),
        Does::ShowTenant => tenants::show(app, asked),
        Does::PutTenant => tenants::put(app, asked),
        Does::EnableTenant => tenants::change(app, asked, Change::EnableTenant { id: id() }),
        Does::DisableTenant => tenants::change(app, asked, Change::DisableTenant { id: id() }),
        Does::ListRules => rules::list(app, asked),
        Does::ShowRule => rules::show(app, asked),
        Does::PutRule => rules::put(app, asked),
        Does::DeleteRule => rules::delete(app, asked),
        Does::Limits => limits::answer(app, asked),
        Does::Spend => spend::answer(app, asked),
        Does::Audit => record::audit(app, asked),
        Does::Export => record::all(app),
        Does::OpenApi => Ok(Reply::ok(&openapi::document())),
    }
}

fn metrics(app: &App) -> Reply {
    app.models.observe();
    app.auth.observe();
    app.admission.observe();
    app.ledger.observe();
    app.metrics.cache_bytes(app.cache.bytes());
    Reply::text(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", app.metrics.encode())
}

fn probe(unready: Option<&str>) -> Reply {
    match unready {
        None => Reply::text(StatusCode::OK, "text/plain", "ok\n".to_owned()),
        Some(why) => Reply::text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{why}\n")),
    }
}

fn reload(app: &App) -> Answer {
    Ok(match app.reload().map_err(|error| error.to_string()) {
        Ok(hash) => Reply::ok(&json!({"applied": true, "config_hash": hash})),
        Err(problems) => Reply::json(
            StatusCode::UNPROCESSABLE_ENTITY,
            &json!({"applied": false, "problems": problems.lines().collect::<Vec<_>>()}),
        ),
    })
}

fn request(app: &App, id: &str) -> Answer {
    let found = app.observe.find(id);
    let record = found.ok_or_else(|| {
        Problem::not_found("this request is not among the last 1,000; traces.jsonl goes back further")
    })?;
    let line: Value = serde_json::from_slice(&access_log::line(&record)).unwrap_or_default();
    let since = |at: std::time::SystemTime| {
        at.duration_since(std::time::UNIX_EPOCH).map_or(0, |at| at.as_nanos() as i64 - record.started_ns)
    };
    let spans = Origin::default().spans(&record);
    let spans = spans.iter().map(|span| {
        json!({
            "name": span.name, "span_id": span.span_context.span_id().to_string(),
            "parent_span_id": span.parent_span_id.to_string(),
            "start_ns": since(span.start_time), "end_ns": since(span.end_time),
        })
    });
    let spans: Vec<Value> = spans.collect();
    Ok(Reply::ok(&json!({"record": line, "spans": spans, "stages": stages::stages(&record)})))
}
