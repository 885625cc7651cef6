//! `[upstreams.NAME]` of `routes.toml`: servers that others run.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::reader::{At, Section};
use super::secret::Secret;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A server that speaks OpenAI's dialect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamConfig {
    pub name: String,
    pub tls: bool,
    pub host: String,
    pub port: u16,
    /// The path that every call begins with, without a slash at its end.
    pub base: String,
    pub api_key: Option<Secret>,
    /// Certificates (PEM) to trust instead of the system's.
    pub ca: Option<PathBuf>,
    /// HTTP/2: negotiated over TLS, presumed without.
    pub http2: bool,
    pub connect: Duration,
}

impl UpstreamConfig {
    pub fn url(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}:{}{}", self.host, self.port, self.base)
    }
}

pub(super) fn upstream(section: &Section<'_, '_>, name: &str, folder: &Path) -> Option<UpstreamConfig> {
    let key = section.string("api_key");
    let ca = section.string("ca").map(|ca| folder.join(ca.value));
    let http2 = section.boolean("http2").unwrap_or(false);
    let connect = section.duration("connect_timeout").unwrap_or(CONNECT_TIMEOUT);
    let api_key = key.and_then(|key| secret(section, "api_key", key));
    let Some(url) = section.string("url") else {
        section.problem(format!("`{}` needs a `url` such as \"https://api.openai.com/v1\"", section.name()));
        return None;
    };
    let parsed = url.value.parse::<http::Uri>().ok().filter(|uri| uri.query().is_none());
    let scheme = parsed.as_ref().and_then(http::Uri::scheme_str);
    let (Some(uri), Some(tls)) = (
        &parsed,
        scheme.and_then(|scheme| match scheme {
            "https" => Some(true),
            "http" => Some(false),
            _ => None,
        }),
    ) else {
        section.problem_at(
            url.at,
            format!(
                "`{}.url` must be a URL such as \"https://api.openai.com/v1\", not \"{}\"",
                section.name(),
                url.value
            ),
        );
        return None;
    };
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        section.problem_at(url.at, format!("`{}.url` must not hold a password; use `api_key`", section.name()));
    }
    Some(UpstreamConfig {
        name: name.to_owned(),
        tls,
        host: uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned(),
        port: uri.port_u16().unwrap_or(if tls { 443 } else { 80 }),
        base: uri.path().trim_end_matches('/').to_owned(),
        api_key,
        ca,
        http2,
        connect,
    })
}

/// Secrets are named, not written down: files end up in git and in pictures.
fn secret(section: &Section<'_, '_>, key: &str, named: At<String>) -> Option<Secret> {
    let name = format!("{}.{key}", section.name());
    if !named.value.starts_with("env:") {
        section.problem_at(named.at, format!("`{name}` must name where the secret is, such as \"env:OPENAI_API_KEY\""));
        return None;
    }
    section.resolve(&named)
}
