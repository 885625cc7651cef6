//! `[auth]` of `gateway.toml`: how callers are known.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderName, Uri};

use super::reader::{At, Section};
use crate::auth::api_key::Pepper;
use crate::auth::jwt::core::{Claims, Rules, Tenant};
use crate::auth::jwt::keys::{self, Algorithm, Key, SECRET_BYTES_MIN};
use crate::network::Network;

/// Issuers; each may have a thread that follows its keys.
const ISSUERS_MAX: usize = 16;
const LEEWAY_MAX: Duration = Duration::from_secs(300);

/// How callers are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthConfig {
    /// Proxies of ours: whom they say they heard counts as the client.
    pub trusted_proxies: Vec<Network>,
    /// Wrong credentials from one host; 0: any number.
    pub failures_per_minute: u32,
    /// What keys are hashed with; `None`: what is in the data folder.
    pub pepper: Option<Pepper>,
    pub jwt: Vec<JwtConfig>,
}

impl Default for AuthConfig {
    fn default() -> Self {
        AuthConfig { trusted_proxies: Vec::new(), failures_per_minute: 20, pepper: None, jwt: Vec::new() }
    }
}

/// Whose tokens are taken, where they stand, and what proves them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtConfig {
    pub rules: Rules,
    pub header: HeaderName,
    pub keys: JwtKeys,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JwtKeys {
    Fixed(Key),
    /// A published set.
    At(Uri),
}

/// `read` reads a file that is then watched.
pub(super) fn auth(root: &Section<'_, '_>, folder: &Path, read: &mut impl FnMut(PathBuf) -> String) -> AuthConfig {
    let mut config = AuthConfig::default();
    let Some(auth) = root.section("auth") else { return config };
    let failures = auth.integer("failures_per_minute", 0..=1_000_000);
    config.failures_per_minute = failures.map_or(config.failures_per_minute, |n| n as u32);
    config.pepper = pepper(&auth);
    let issuers = auth.list("jwt");
    if issuers.len() > ISSUERS_MAX {
        auth.problem(format!("there can be at most {ISSUERS_MAX} of `[[auth.jwt]]`"));
    }
    config.jwt = issuers.into_iter().filter_map(|section| issuer(section, folder, read)).collect();
    for (index, jwt) in config.jwt.iter().enumerate() {
        let earlier = &config.jwt[..index];
        if earlier.iter().any(|other| other.rules.name == jwt.rules.name || other.rules.issuer == jwt.rules.issuer) {
            auth.problem(format!(
                "`{}` is not the only one of `[[auth.jwt]]` with its name or its issuer",
                jwt.rules.name
            ));
        }
    }
    auth.finish();
    config
}

pub(super) fn pepper(auth: &Section<'_, '_>) -> Option<Pepper> {
    let text = auth.string("pepper")?;
    if !text.value.starts_with("env:") {
        let what = "`auth.pepper` is read from the environment, as \"env:GLASSGATE_PEPPER\": files are shared";
        auth.problem_at(text.at, what);
        return None;
    }
    let secret = auth.resolve(&text)?;
    let pepper = Pepper::parse(secret.expose());
    if pepper.is_none() {
        let what = "`auth.pepper` must have 64 hexadecimal digits: those of a new one by `openssl rand -hex 32`, or of a data folder's file `pepper` by `od -An -v -tx1 pepper | tr -d ' \\n'`";
        auth.problem_at(text.at, what);
    }
    pepper
}

fn issuer(section: Section<'_, '_>, folder: &Path, read: &mut impl FnMut(PathBuf) -> String) -> Option<JwtConfig> {
    let required = |key: &str| {
        let found = section.string(key).filter(|text| !text.value.is_empty());
        if found.is_none() {
            section.problem(format!("`auth.jwt.{key}` is missing"));
        }
        found.map(|text| text.value)
    };
    let (name, issuer) = (required("name"), required("issuer"));
    if let Some(name) = name.as_ref().filter(|name| name.len() > 64 || name.chars().any(char::is_control)) {
        section.problem(format!("`auth.jwt.name` must have at most 64 bytes and no control characters, not {name:?}"));
    }
    let audience: Vec<String> =
        section.strings("audience").unwrap_or_default().into_iter().map(|text| text.value).collect();
    if audience.is_empty() {
        section.problem("`auth.jwt.audience` is missing: a token for somebody else must not be one for us");
    }
    let keys = keys(&section, folder, read);
    let algorithms = algorithms(&section, keys.as_ref());
    let leeway = section.duration_or_none("leeway").unwrap_or(Duration::from_secs(30));
    if leeway > LEEWAY_MAX {
        section.problem(format!("`auth.jwt.leeway` must be at most {} s", LEEWAY_MAX.as_secs()));
    }
    let header = section.string("header").map_or(Some(http::header::AUTHORIZATION), |text| {
        let name = HeaderName::from_bytes(text.value.to_ascii_lowercase().as_bytes()).ok();
        if name.is_none() {
            section.problem_at(text.at, format!("`auth.jwt.header` is no name of a header: \"{}\"", text.value));
        }
        name
    });
    let claims = claims(&section);
    section.finish();
    let rules = Rules { name: name?, issuer: issuer?, audience, algorithms, leeway, claims };
    Some(JwtConfig { rules, header: header?, keys: keys? })
}

/// Exactly one of the three.
fn keys(section: &Section<'_, '_>, folder: &Path, read: &mut impl FnMut(PathBuf) -> String) -> Option<JwtKeys> {
    match (section.string("jwks"), section.string("pem"), section.string("secret")) {
        (Some(url), None, None) => published(section, &url),
        (None, Some(file), None) => match Key::from_pem(&read(folder.join(&file.value))) {
            Ok(key) => Some(JwtKeys::Fixed(key)),
            Err(why) => {
                section.problem_at(file.at, format!("`auth.jwt.pem`: {} {why}", file.value));
                None
            }
        },
        (None, None, Some(text)) => {
            if !text.value.starts_with("env:") {
                section
                    .problem_at(text.at, "`auth.jwt.secret` must be read from the environment, as \"env:JWT_SECRET\"");
                return None;
            }
            let secret = section.resolve(&text)?;
            if secret.expose().len() < SECRET_BYTES_MIN {
                section.problem_at(text.at, format!("`auth.jwt.secret` must have at least {SECRET_BYTES_MIN} bytes"));
                return None;
            }
            Some(JwtKeys::Fixed(Key::secret(secret.expose().as_bytes())))
        }
        _ => {
            section.problem("an issuer has exactly one of `jwks`, `pem` and `secret`");
            None
        }
    }
}

fn published(section: &Section<'_, '_>, url: &At<String>) -> Option<JwtKeys> {
    let uri: Option<Uri> = url.value.parse().ok();
    let is_safe = |uri: &Uri| match uri.scheme_str() {
        Some("https") => true,
        // Whoever is on the way could put in keys of their own; on this machine nobody is.
        Some("http") => matches!(uri.host(), Some("localhost" | "127.0.0.1" | "[::1]")),
        _ => false,
    };
    let uri = uri.filter(|uri| uri.host().is_some() && is_safe(uri));
    if uri.is_none() {
        section.problem_at(url.at, format!("`auth.jwt.jwks` must be an https:// address, not \"{}\"", url.value));
    }
    uri.map(JwtKeys::At)
}

fn algorithms(section: &Section<'_, '_>, keys: Option<&JwtKeys>) -> Vec<Algorithm> {
    let Some(words) = section.strings("algorithms").filter(|words| !words.is_empty()) else {
        section.problem("`auth.jwt.algorithms` is missing, such as [\"RS256\"]: a token must not choose for itself");
        return Vec::new();
    };
    let known: Vec<String> = keys::algorithms().map(|algorithm| format!("{algorithm:?}")).collect();
    let known = known.join(", ");
    let parse = |word: At<String>| {
        let algorithm: Option<Algorithm> = word.value.parse().ok();
        let fits = |algorithm: &Algorithm| match keys {
            Some(JwtKeys::Fixed(key)) => key.fits(*algorithm),
            Some(JwtKeys::At(_)) => !keys::is_shared(*algorithm),
            None => true,
        };
        if algorithm.is_none() {
            section.problem_at(word.at, format!("`auth.jwt.algorithms` knows {known}, not \"{}\"", word.value));
        } else if !algorithm.as_ref().is_some_and(fits) {
            section.problem_at(word.at, format!("`auth.jwt.algorithms`: {} is not for keys of this kind", word.value));
        }
        algorithm
    };
    words.into_iter().filter_map(parse).collect()
}

fn claims(section: &Section<'_, '_>) -> Claims {
    let fixed = section.string("tenant");
    let mut claims = Claims { tenant: Tenant::Fixed("default".into()), user: "/sub".into(), scopes: None, tier: None };
    if let Some(table) = section.section("claims") {
        let pointer = |key| {
            let text = table.string(key)?;
            if !text.value.starts_with('/') {
                let what = format!(
                    "`auth.jwt.claims.{key}` must be a JSON pointer such as \"/{key}\", not \"{}\"",
                    text.value
                );
                table.problem_at(text.at, what);
            }
            Some(text.value)
        };
        if let Some(at) = pointer("tenant") {
            if fixed.is_some() {
                table.problem("there is both `auth.jwt.tenant` and `auth.jwt.claims.tenant`");
            }
            claims.tenant = Tenant::At(at);
        }
        claims.user = pointer("user").unwrap_or(claims.user);
        claims.scopes = pointer("scopes");
        claims.tier = pointer("tier");
        table.finish();
    }
    if let Some(tenant) = fixed {
        let length = tenant.value.len();
        if length == 0 || length > 64 || tenant.value.chars().any(char::is_control) {
            section.problem_at(tenant.at, "`auth.jwt.tenant` must have 1 to 64 bytes and no control characters");
        }
        claims.tenant = Tenant::Fixed(tenant.value);
    }
    claims
}
