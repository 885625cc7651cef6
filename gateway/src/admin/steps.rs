//! `GET /debug/steps?model=NAME&last=N`: what the engine did in its last steps, a JSON object a line.

use http::StatusCode;

use super::{Reply, error};
use crate::models::Models;

pub fn answer(models: &Models, query: &str) -> Reply {
    let said = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    let last = match said("last").map(str::parse::<usize>) {
        None => usize::MAX,
        Some(Ok(last)) => last,
        Some(Err(_)) => return error(StatusCode::BAD_REQUEST, "`last` must be a number of steps, as in last=100"),
    };
    match models.steps(said("model").unwrap_or("")) {
        Ok(steps) => {
            let skipped = steps.len().saturating_sub(last);
            let lines: String = steps[skipped..].iter().map(|step| format!("{step}\n")).collect();
            (StatusCode::OK, "application/x-ndjson", lines.into_bytes())
        }
        Err(names) => error(
            StatusCode::NOT_FOUND,
            &format!("say which model of the engine, as in /debug/steps?model=NAME; there are: {}", names.join(", ")),
        ),
    }
}
