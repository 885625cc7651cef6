//! Who operates this gateway: whoever has one of two tokens. Who keeps guessing them is not listened to for a while.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Instant;

use http::StatusCode;
use http::header::AUTHORIZATION;
use pingora_core::protocols::http::ServerSession;
use subtle::ConstantTimeEq;

use super::reply::Problem;
use crate::app::App;
use crate::auth::failures::Failures;
use crate::network;
use crate::ports::Clock;
use crate::refusal::Refusal;

pub struct Operators {
    /// The one of this start; the configuration may have another beside it.
    token: String,
    /// Apart from those of clients: they must not lock out an operator.
    failures: Failures,
    began: Instant,
}

impl Operators {
    pub fn new(token: String, clock: &dyn Clock) -> Operators {
        Operators { token, failures: Failures::default(), began: clock.instant() }
    }

    /// Who has a token, by which one it is.
    ///
    /// # Errors
    /// 401, or 429 to whoever has guessed too often, whatever they send.
    pub fn identify(&self, app: &App, session: &ServerSession) -> Result<&'static str, Problem> {
        let identified = self.guarded(app, session);
        let result = identified.as_ref().map_or_else(|problem| problem.code, |_| "accepted");
        app.metrics.authenticated("admin", result);
        identified
    }

    fn guarded(&self, app: &App, session: &ServerSession) -> Result<&'static str, Problem> {
        let headers = &session.req_header().headers;
        let wrong = || {
            Problem::new(
                StatusCode::UNAUTHORIZED,
                "invalid_admin_token",
                "the admin token is missing or wrong; it is in <data_dir>/admin.token, or where `admin.token` in gateway.toml says",
            )
        };
        // To send nothing is no guess.
        let sent = headers.get(AUTHORIZATION).ok_or_else(wrong)?.as_bytes();
        let config = &app.snapshot.load().config.gateway;
        let peer = session.client_addr().and_then(|peer| peer.as_inet());
        let peer = peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), SocketAddr::ip);
        let client = network::client(peer, headers, &config.auth.trusted_proxies);
        let (limit, now) = (config.auth.failures_per_minute, app.clock.instant() - self.began);
        let may = self.failures.may_try(client, limit, now);
        may.map_err(|retry_after| Refusal::TooManyFailures { limit, retry_after })?;
        let sent = sent.strip_prefix(b"Bearer ").unwrap_or(b"");
        let is = |token: &str| bool::from(sent.ct_eq(token.as_bytes()));
        let of_config = config.admin_token.as_ref();
        match (is(&self.token), of_config.is_some_and(|token| is(token.expose()))) {
            (true, _) => Ok("api, the token of the data folder"),
            (_, true) => Ok("api, the token of the configuration"),
            (false, false) => {
                self.failures.failed(client, limit, now);
                Err(wrong())
            }
        }
    }
}
