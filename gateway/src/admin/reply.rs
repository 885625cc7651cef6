//! What the admin listener answers, and how it says no.

use http::StatusCode;
use serde_json::{Value, json};

use crate::control::Denied;
use crate::database::StoreError;
use crate::refusal::Refusal;

pub struct Reply {
    pub status: StatusCode,
    pub kind: &'static str,
    pub body: Vec<u8>,
    /// Beyond those that every answer has.
    pub headers: Vec<(&'static str, String)>,
}

impl Reply {
    pub fn json(status: StatusCode, value: &Value) -> Reply {
        Reply::new(status, "application/json", value.to_string())
    }

    pub fn ok(value: &Value) -> Reply {
        Reply::json(StatusCode::OK, value)
    }

    pub fn text(status: StatusCode, kind: &'static str, text: String) -> Reply {
        Reply::new(status, kind, text)
    }

    fn new(status: StatusCode, kind: &'static str, text: String) -> Reply {
        Reply { status, kind, body: text.into_bytes(), headers: Vec::new() }
    }

    /// Told as `etag`, for `if-match`.
    pub fn version(mut self, version: i64) -> Reply {
        self.headers.push(("etag", format!("\"{version}\"")));
        self
    }

    /// A part of a list; whoever wants to go on asks for what comes after `next`.
    pub fn list(data: Vec<Value>, next: Option<Value>) -> Reply {
        Reply::ok(&json!({"object": "list", "data": data, "next": next}))
    }
}

pub type Answer = Result<Reply, Problem>;

/// Why not, in the form of all errors.
#[derive(Debug)]
pub struct Problem {
    pub status: StatusCode,
    pub code: &'static str,
    pub param: Option<String>,
    pub message: String,
    pub headers: Vec<(&'static str, String)>,
}

impl Problem {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Problem {
        Problem { status, code, param: None, message: message.into(), headers: Vec::new() }
    }

    pub fn invalid(param: &str, message: &str) -> Problem {
        Problem { param: Some(param.to_owned()), ..Problem::new(StatusCode::BAD_REQUEST, "invalid_parameter", message) }
    }

    pub fn not_found(message: impl Into<String>) -> Problem {
        Problem::new(StatusCode::NOT_FOUND, "not_found", message)
    }
}

impl From<Denied> for Problem {
    fn from(denied: Denied) -> Problem {
        let message = denied.to_string();
        match denied {
            Denied::Invalid { param, .. } => {
                Problem { param, ..Problem::new(StatusCode::BAD_REQUEST, "invalid_parameter", message) }
            }
            Denied::NotFound(_) => Problem::not_found(message),
            Denied::Conflict(_) => Problem::new(StatusCode::CONFLICT, "conflict", message),
            Denied::Stale { .. } => Problem::new(StatusCode::PRECONDITION_FAILED, "changed_meanwhile", message),
            Denied::Store(_) => Problem::new(StatusCode::SERVICE_UNAVAILABLE, "store_failed", message),
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Problem {
        Denied::from(error).into()
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Problem {
        let described = refusal.describe();
        Problem {
            status: StatusCode::from_u16(described.status).unwrap_or(StatusCode::BAD_REQUEST),
            code: described.code,
            param: refusal.param().map(str::to_owned),
            message: refusal.message(),
            headers: refusal.headers(),
        }
    }
}

impl From<Problem> for Reply {
    fn from(problem: Problem) -> Reply {
        let Problem { status, code, param, message, headers } = problem;
        let error = json!({"message": message, "type": "admin_error", "param": param, "code": code});
        Reply { headers, ..Reply::json(status, &json!({"error": error})) }
    }
}
