//! What an operator asks for: the parts of a request to `/admin`, understood.

use http::HeaderMap;
use http::header::{HOST, IF_MATCH};
use serde_json::{Map, Value};

use super::reply::Problem;
use crate::api::openai::fields::Fields;
use crate::control::edit::known;

/// Larger than any rule or key.
pub const BODY_BYTES_MAX: usize = 256 << 10;
const PAGE: u32 = 100;
const PAGE_MAX: u32 = 1_000;

pub struct Asked {
    /// What stands for the braces in the path, in its order.
    pub parts: Vec<String>,
    pub query: Vec<(String, String)>,
    /// The version that is to be changed.
    pub if_match: Option<i64>,
    pub body: Vec<u8>,
    /// Who the record of changes says it was.
    pub actor: &'static str,
}

impl Asked {
    /// The first part of the path that is not fixed; tables have one in every path that is read so.
    pub fn name(&self) -> &str {
        self.parts.first().map_or("", String::as_str)
    }

    pub fn said(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// How many items of a list, and after which.
    pub fn page(&self) -> Result<(u32, &str), Problem> {
        let limit = match self.said("limit") {
            None => PAGE,
            Some(text) => text.parse().ok().filter(|limit| (1..=PAGE_MAX).contains(limit)).ok_or_else(|| {
                Problem::invalid("limit", &format!("`limit` must be a whole number from 1 to {PAGE_MAX}"))
            })?,
        };
        Ok((limit, self.said("after").unwrap_or("")))
    }

    /// The body as an object that has no other fields than these.
    pub fn fields(&self, names: &[&str]) -> Result<Map<String, Value>, Problem> {
        let fields = self.object()?;
        known(&fields, names)?;
        Ok(fields)
    }

    pub fn object(&self) -> Result<Map<String, Value>, Problem> {
        Ok(Fields::parse(&self.body)?.0)
    }
}

/// Names and values of a query.
pub fn query(text: &str) -> Vec<(String, String)> {
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(&name.replace('+', " ")), decoded(&value.replace('+', " ")))
    };
    text.split('&').filter(|text| !text.is_empty()).map(pair).collect()
}

/// `%41` → `A`. What is no escape stays as it is; what is no text then is nobody's name.
pub fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, more)) = rest.split_first() {
        let escape = more.get(..2).filter(|_| byte == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        match escape.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(escaped) => {
                bytes.push(escaped);
                rest = &more[2..];
            }
            None => {
                bytes.push(byte);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `If-Match: "7"`, or without quotes, which shells would take away; `*` is any.
pub fn if_match(headers: &HeaderMap) -> Result<Option<i64>, Problem> {
    let Some(value) = headers.get(IF_MATCH) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    if text == "*" {
        return Ok(None);
    }
    let bare = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    let version = bare.parse().ok().filter(|_| bare.bytes().all(|byte| byte.is_ascii_digit()));
    let wrong = || Problem::invalid("if-match", "`if-match` must be one `etag` as it was told, such as \"7\"");
    version.map(Some).ok_or_else(wrong)
}

/// Whether the request was meant for this listener. A page in somebody's browser may have a name of its own that leads here;
/// the browser then says that name.
pub fn is_for_us(headers: &HeaderMap, hosts: &[String]) -> bool {
    let Some(host) = headers.get(HOST).and_then(|host| host.to_str().ok()) else { return false };
    let name = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()));
    let name = name.map_or(host, |(name, _)| name);
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    address.is_ok_and(|address| address.is_loopback())
        || name.eq_ignore_ascii_case("localhost")
        || hosts.iter().any(|host| host.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_loopback_is_called_so_or_by_a_name_that_is_listed() {
        let hosts = ["gate.example".to_owned()];
        for (host, ours) in [
            ("127.0.0.1:8081", true),
            ("127.0.0.1", true),
            ("127.8.8.8:1", true),
            ("localhost:8081", true),
            ("LOCALHOST", true),
            ("[::1]:8081", true),
            ("[::1]", true),
            ("Gate.Example:443", true),
            ("evil.example", false),
            ("127.0.0.1.evil.example", false),
            ("localhost.evil.example:8081", false),
            ("evil.example:127.0.0.1", false),
            ("10.0.0.1:8081", false),
            ("gate.example.", false),
            ("", false),
        ] {
            let headers = HeaderMap::from_iter([(HOST, host.parse().unwrap())]);
            assert_eq!(is_for_us(&headers, &hosts), ours, "{host}");
        }
        assert!(!is_for_us(&HeaderMap::new(), &hosts));
    }

    #[test]
    fn names_are_read_out_of_paths_and_queries() {
        assert_eq!(
            query("a=1&b=x%2Fy+z&&c"),
            [("a".into(), "1".into()), ("b".into(), "x/y z".into()), ("c".into(), String::new())]
        );
        assert_eq!(decoded("%C3%A9%41%zz%4"), "éA%zz%4");
        assert_eq!(decoded("%ff%fe"), "\u{fffd}\u{fffd}");
    }
}
