//! What a client says who it is with: exactly one credential, or none. Nothing here knows whether it is true.

use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName, HeaderValue};

use super::api_key::ApiKey;
use crate::config::JwtConfig;
use crate::refusal::Refusal;

/// Anthropic's header for keys.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// A credential, by its form.
#[derive(Debug)]
pub enum Presented<'h> {
    Key(ApiKey<'h>),
    /// Three parts with dots between them, where an issuer's tokens stand.
    Token(&'h str),
    /// Something else.
    Unknown,
}

impl Presented<'_> {
    /// For the metric.
    pub fn method(&self) -> &'static str {
        match self {
            Presented::Key(_) => "key",
            Presented::Token(_) => "jwt",
            Presented::Unknown => "unknown",
        }
    }
}

/// Reads the credential out of a head. Where two say different things, nobody guesses which one is meant: another server
/// on the way may have looked at the other.
///
/// # Errors
/// `MissingKey` without one, `AmbiguousCredentials` with several.
pub fn presented<'h>(headers: &'h HeaderMap, issuers: &[JwtConfig]) -> Result<Presented<'h>, Refusal> {
    let own = issuers.iter().map(|issuer| &issuer.header).filter(|name| **name != AUTHORIZATION && **name != X_API_KEY);
    let mut names: Vec<&HeaderName> = own.collect();
    names.sort_unstable_by_key(|name| name.as_str());
    names.dedup();
    let standard = [AUTHORIZATION, X_API_KEY];
    let (mut found, mut place) = (None, None);
    for name in standard.iter().chain(names) {
        let mut values = headers.get_all(name).iter();
        let Some(value) = values.next() else { continue };
        let credential = credential(name, value);
        if values.next().is_some() || found.replace(credential).is_some_and(|other| other != credential) {
            return Err(Refusal::AmbiguousCredentials);
        }
        place = Some(name);
    }
    let credential = found.flatten().ok_or(Refusal::MissingKey)?;
    if let Some(key) = ApiKey::parse(credential) {
        return Ok(Presented::Key(key));
    }
    let is_token = credential.matches('.').count() == 2 && issuers.iter().any(|issuer| Some(&issuer.header) == place);
    Ok(if is_token { Presented::Token(credential) } else { Presented::Unknown })
}

/// What a header holds: nothing, if it is empty or `authorization` in another scheme than Bearer's. What is no text is no
/// credential of ours, and still something.
fn credential<'h>(name: &HeaderName, value: &'h HeaderValue) -> Option<&'h str> {
    let text = value.to_str().unwrap_or("?").trim();
    let text = if *name == AUTHORIZATION {
        let (scheme, token) = text.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())?
    } else {
        text
    };
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "gg-aaaaaaaaaaaa-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "gg-bbbbbbbbbbbb-bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    type Fields<'a> = &'a [(&'a str, &'a str)];

    fn code(fields: Fields<'_>) -> String {
        code_with(fields, &[])
    }

    /// With an issuer whose tokens stand in each of these headers.
    fn code_with(fields: Fields<'_>, issuers: &[&str]) -> String {
        let issuers: Vec<JwtConfig> = issuers.iter().map(|header| crate::auth::jwt::tests::issuer_at(header)).collect();
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            headers.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        match presented(&headers, &issuers) {
            Ok(Presented::Key(key)) => key.id()[..1].to_owned(),
            Ok(Presented::Token(token)) => token.to_owned(),
            Ok(Presented::Unknown) => "unknown".to_owned(),
            Err(refusal) => refusal.describe().code.to_owned(),
        }
    }

    #[test]
    fn exactly_one_credential_is_taken() {
        let bearer = |key: &str| format!("Bearer {key}");
        let (a, b) = (bearer(A), bearer(B));
        let table: &[(Fields<'_>, &str)] = &[
            (&[("authorization", &a)], "a"),
            (&[("authorization", &format!("bEARER   {A} "))], "a"),
            (&[("x-api-key", A)], "a"),
            (&[("x-api-key", &format!(" {A}\t"))], "a"),
            (&[("x-api-key", A), ("authorization", &a)], "a"),
            // Nothing that we know.
            (&[], "missing_api_key"),
            (&[("authorization", "")], "missing_api_key"),
            (&[("authorization", A)], "missing_api_key"),
            (&[("authorization", "Bearer")], "missing_api_key"),
            (&[("authorization", "Bearer  ")], "missing_api_key"),
            (&[("authorization", "Basic dXNlcjpwYXNz")], "missing_api_key"),
            (&[("x-api-key", "")], "missing_api_key"),
            (&[("cookie", &a)], "missing_api_key"),
            (&[("authorization", "Bearer sk-123")], "unknown"),
            (&[("authorization", "\u{e9}")], "missing_api_key"),
            (&[("x-api-key", "\u{e9}")], "unknown"),
            (&[("x-api-key", &a)], "unknown"),
            (&[("authorization", &format!("{a}, {b}"))], "unknown"),
            // Two.
            (&[("authorization", &a), ("authorization", &b)], "ambiguous_credentials"),
            (&[("authorization", &a), ("authorization", &a)], "ambiguous_credentials"),
            (&[("x-api-key", A), ("x-api-key", A)], "ambiguous_credentials"),
            (&[("authorization", &a), ("x-api-key", B)], "ambiguous_credentials"),
            (&[("authorization", "Basic dXNlcjpwYXNz"), ("x-api-key", A)], "ambiguous_credentials"),
            (&[("authorization", &a), ("x-api-key", "")], "ambiguous_credentials"),
        ];
        for (fields, expected) in table {
            assert_eq!(code(fields), *expected, "{fields:?}");
        }
    }

    #[test]
    fn a_token_is_taken_where_an_issuers_tokens_stand_and_nowhere_else() {
        let table: &[(Fields<'_>, &[&str], &str)] = &[
            (&[("authorization", "Bearer a.b.c")], &["authorization"], "a.b.c"),
            (&[("authorization", "Bearer a.b.c")], &[], "unknown"),
            (&[("authorization", "Bearer a.b.c")], &["x-jwt"], "unknown"),
            (&[("authorization", "Bearer a.b.c.d")], &["authorization"], "unknown"),
            (&[("x-jwt", "a.b.c")], &["x-jwt", "authorization"], "a.b.c"),
            (&[("x-jwt", "Bearer a.b.c")], &["x-jwt"], "Bearer a.b.c"),
            (&[("x-jwt", "a.b.c")], &["authorization"], "missing_api_key"),
            (&[("x-jwt", "a.b.c"), ("x-jwt", "a.b.c")], &["x-jwt"], "ambiguous_credentials"),
            (&[("x-jwt", "a.b.c"), ("authorization", &format!("Bearer {A}"))], &["x-jwt"], "ambiguous_credentials"),
            (&[("x-api-key", "a.b.c")], &["authorization"], "unknown"),
            (&[("authorization", &format!("Bearer {A}"))], &["authorization"], "a"),
        ];
        for (fields, issuers, expected) in table {
            assert_eq!(code_with(fields, issuers), *expected, "{fields:?} {issuers:?}");
        }
    }
}
