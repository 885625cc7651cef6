//! `[[telemetry.traces]]`: where spans go.

use std::time::Duration;

use base64::Engine as _;
use http::{HeaderName, HeaderValue, Uri};

use super::reader::{At, Section};
use super::secret::Secret;

/// One place that spans go to.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceSink {
    /// Its kind, with a number if there are several; the label in metrics.
    pub name: String,
    pub kind: SinkKind,
    /// The share of traces that it keeps, 0 to 1.
    pub sample: f64,
}

#[derive(Clone, Debug, PartialEq)]
pub enum SinkKind {
    /// `<data_dir>/traces.jsonl`
    File,
    /// Any OTLP backend; Langfuse is one with headers of its own.
    Otlp(OtlpConfig),
}

#[derive(Clone, Debug, PartialEq)]
pub struct OtlpConfig {
    pub endpoint: String,
    /// Valid header names and values.
    pub headers: Vec<(String, Secret)>,
    /// For one try, the answer's body included.
    pub timeout: Duration,
    /// How long one batch is tried again.
    pub retry_for: Duration,
    /// Requests whose spans are not yet sent.
    pub queue_max: usize,
}

/// Each has a thread and a queue.
const SINKS_MAX: usize = 8;
/// Where Langfuse takes OTLP, below its host.
const LANGFUSE_PATH: &str = "/api/public/otel";
const LANGFUSE_VERSION: &str = "4";

pub fn traces(telemetry: &Section<'_, '_>) -> Vec<TraceSink> {
    let mut sinks: Vec<TraceSink> = Vec::new();
    for section in telemetry.list("traces") {
        let Some(kind) = section.word("kind", &["file", "otlp", "langfuse"]) else {
            // Without it nobody knows which keys it may have.
            section.problem("a `[[telemetry.traces]]` needs a `kind`: \"file\", \"otlp\" or \"langfuse\"");
            continue;
        };
        let before = sinks.iter().filter(|sink| sink.name.split('-').next() == Some(kind)).count();
        let name = if before == 0 { kind.to_owned() } else { format!("{kind}-{}", before + 1) };
        let sample = sample(&section);
        let kind = match kind {
            "file" => {
                if before > 0 {
                    section.problem("there is a file for traces already; two would write over each other");
                }
                Some(SinkKind::File)
            }
            kind => otlp(&section, kind == "langfuse").map(SinkKind::Otlp),
        };
        section.finish();
        sinks.extend(kind.map(|kind| TraceSink { name, kind, sample }));
    }
    if sinks.len() > SINKS_MAX {
        telemetry.problem(format!("there are more than {SINKS_MAX} `[[telemetry.traces]]`"));
    }
    sinks
}

fn sample(section: &Section<'_, '_>) -> f64 {
    let Some(share) = section.number("sample") else { return 1.0 };
    if !(0.0..=1.0).contains(&share.value) {
        section.problem_at(share.at, format!("`{}.sample` must be a share from 0 to 1", section.name()));
    }
    share.value
}

/// `None` when something is missing; then it is among the problems.
fn otlp(section: &Section<'_, '_>, langfuse: bool) -> Option<OtlpConfig> {
    let endpoint = endpoint(section, langfuse);
    let mut headers = headers(section, langfuse);
    let authorization = if langfuse { langfuse_authorization(section, &mut headers) } else { Some(()) };
    let timeout = section.duration("timeout").unwrap_or(Duration::from_secs(30));
    let retry_for = section.duration("retry_for").unwrap_or(Duration::from_secs(30));
    let queue_max = section.integer("queue_max", 1..=1_000_000).map_or(4096, |n| n as usize);
    authorization?;
    Some(OtlpConfig { endpoint: endpoint?, headers, timeout, retry_for, queue_max })
}

fn endpoint(section: &Section<'_, '_>, langfuse: bool) -> Option<String> {
    let example = if langfuse { "https://cloud.langfuse.com" } else { "http://127.0.0.1:4318/v1/traces" };
    let Some(At { value: url, at }) = section.string("endpoint") else {
        section.problem(format!("`{}` needs an `endpoint`, such as \"{example}\"", section.name()));
        return None;
    };
    let uri = url.parse::<Uri>().ok().filter(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https"))
            && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
    });
    if uri.is_none() {
        // Not repeated: who wrote a password into it must not find it in a log.
        section.problem_at(
            at,
            format!(
                "`{}.endpoint` must be an http or https URL without a password, such as \"{example}\"",
                section.name()
            ),
        );
        return None;
    }
    if !langfuse {
        return Some(url);
    }
    if url.contains(LANGFUSE_PATH) || url.contains('?') {
        section.problem_at(at, format!("`{}.endpoint` is the host of Langfuse, such as \"{example}\"", section.name()));
        return None;
    }
    Some(format!("{}{LANGFUSE_PATH}/v1/traces", url.trim_end_matches('/')))
}

fn headers(section: &Section<'_, '_>, langfuse: bool) -> Vec<(String, Secret)> {
    let mut headers = Vec::new();
    let ours = ["content-type", "content-encoding", "content-length", "transfer-encoding", "host"];
    let langfuses = ["authorization", "x-langfuse-ingestion-version"];
    for (name, value) in section.texts("headers").unwrap_or_default() {
        let lower = name.value.to_ascii_lowercase();
        let taken = ours.contains(&lower.as_str()) || langfuse && langfuses.contains(&lower.as_str());
        if taken || HeaderName::from_bytes(lower.as_bytes()).is_err() {
            section.problem_at(name.at, format!("`{}` cannot be set here, or is no header at all", name.value));
            continue;
        }
        let Some(secret) = section.resolve(&value) else { continue };
        if HeaderValue::from_str(secret.expose()).is_err() {
            section.problem_at(value.at, format!("the value of `{}` cannot be sent in a header", name.value));
            continue;
        }
        headers.push((lower, secret));
    }
    headers
}

/// Basic authentication from the two keys, and the version that makes Langfuse show spans at once.
fn langfuse_authorization(section: &Section<'_, '_>, headers: &mut Vec<(String, Secret)>) -> Option<()> {
    let key = |name: &str, example: &str| {
        let text = section.string(name);
        if text.is_none() {
            section.problem(format!("`{}` needs a `{name}`, such as \"{example}\"", section.name()));
        }
        text
    };
    let (public, secret) = (key("public_key", "pk-lf-…"), key("secret_key", "env:LANGFUSE_SECRET_KEY"));
    let secret = secret.filter(|text| {
        let named = text.value.starts_with("env:");
        if !named {
            let what = "must be \"env:NAME\": files are shown and shared, the environment is not";
            section.problem_at(text.at, format!("`{}.secret_key` {what}", section.name()));
        }
        named
    });
    let (public, secret) = (section.resolve(&public?), section.resolve(&secret?));
    let (public, secret) = (public?, secret?);
    let pair = base64::engine::general_purpose::STANDARD.encode(format!("{}:{}", public.expose(), secret.expose()));
    headers.push(("authorization".into(), Secret::new(format!("Basic {pair}"))));
    headers.push(("x-langfuse-ingestion-version".into(), Secret::new(LANGFUSE_VERSION)));
    Some(())
}
