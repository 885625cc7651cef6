//! `GET /debug/steps?model=NAME&last=N`: what the engine did in its last steps, a JSON object a line.

use http::StatusCode;

use super::asked::Asked;
use super::reply::{Answer, Problem, Reply};
use crate::models::Models;

pub fn answer(models: &Models, asked: &Asked) -> Answer {
    let last = match asked.said("last").map(str::parse::<usize>) {
        None => usize::MAX,
        Some(Ok(last)) => last,
        Some(Err(_)) => return Err(Problem::invalid("last", "`last` must be a number of steps, as in last=100")),
    };
    let steps = models.steps(asked.said("model").unwrap_or("")).map_err(|names| {
        let there = names.join(", ");
        Problem::not_found(format!("say which model of the engine, as in /debug/steps?model=NAME; there are: {there}"))
    })?;
    let skipped = steps.len().saturating_sub(last);
    let lines: String = steps[skipped..].iter().map(|step| format!("{step}\n")).collect();
    Ok(Reply::text(StatusCode::OK, "application/x-ndjson", lines))
}
