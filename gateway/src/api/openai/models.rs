//! `GET /v1/models`.

use serde::Serialize;

#[derive(Serialize)]
pub struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: i64,
    owned_by: &'static str,
}

#[derive(Serialize)]
pub struct List<'a> {
    object: &'static str,
    data: Vec<Model<'a>>,
}

/// `created` is when this gateway started to serve it, in Unix seconds.
pub fn model(id: &str, created: i64) -> Model<'_> {
    Model { id, object: "model", created, owned_by: "glassgate" }
}

pub fn list<'a>(ids: impl IntoIterator<Item = &'a str>, created: i64) -> List<'a> {
    List { object: "list", data: ids.into_iter().map(|id| model(id, created)).collect() }
}
