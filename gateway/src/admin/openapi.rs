//! `GET /admin/openapi.json`: the table of routes as OpenAPI 3.1, and what bodies hold.

use serde_json::{Map, Value, json};

use super::routes::{ROUTES, Route, Says};
use crate::admission::core::rule::Down;
use crate::api::limit::{Dimension, Of, Only, Per};
use crate::ports::Scope;

pub fn document() -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for route in &ROUTES {
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method.to_ascii_lowercase()] = operation(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Glassgate, for its operators",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Changes count within a second and are recorded. An edit with `if-match` is made only of that version.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas(),
        },
    })
}

fn operation(route: &Route) -> Value {
    let (status, says) = says(route.says);
    let problem = json!({"description": "Why not", "content": {"application/json": {"schema": of("Error")}}});
    let mut operation = json!({
        "operationId": format!("{:?}", route.does),
        "summary": route.summary,
        "parameters": parameters(route),
        "responses": {status: {"description": "Done", "content": says}, "default": problem},
        "security": if route.needs_token() { json!([{"token": []}]) } else { json!([]) },
    });
    if let Some(takes) = route.takes {
        // Who rotates may leave it to the usual.
        let is_required = takes != "Rotation";
        operation["requestBody"] =
            json!({"required": is_required, "content": {"application/json": {"schema": of(takes)}}});
    }
    operation
}

fn says(says: Says) -> (&'static str, Value) {
    let json = |schema: Value| json!({"application/json": {"schema": schema}});
    match says {
        Says::Text => ("200", json!({"text/plain": {"schema": {"type": "string"}}})),
        Says::Lines => ("200", json!({"application/x-ndjson": {"schema": {"type": "string"}}})),
        Says::One(name) => ("200", json(of(name))),
        Says::Created(name) => ("201", json(of(name))),
        Says::Object => ("200", json(json!({"type": "object"}))),
        Says::List(name) => (
            "200",
            json(json!({
                "type": "object",
                "required": ["object", "data", "next"],
                "properties": {
                    "object": {"const": "list"},
                    "data": {"type": "array", "items": of(name)},
                    "next": {"type": ["string", "integer", "null"], "description": "what to say as `after` for those that follow"},
                },
            })),
        ),
    }
}

fn parameters(route: &Route) -> Value {
    let of_path = route
        .path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}));
    let of_query = route.query.iter().map(|(name, what)| {
        let is_required = what.ends_with("required");
        json!({"name": name, "in": "query", "required": is_required, "description": what, "schema": {"type": "string"}})
    });
    let if_match = route.is_edit().then(|| {
        json!({"name": "if-match", "in": "header", "description": "`etag` of the version that is meant", "schema": {"type": "string"}})
    });
    of_path.chain(of_query).chain(if_match).collect()
}

fn of(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// Of what can be set on a key.
fn settings() -> Map<String, Value> {
    let texts = |what: &str| json!({"type": ["array", "null"], "items": {"type": "string"}, "description": what});
    let number = |what: &str| json!({"type": ["integer", "null"], "minimum": 1, "description": what});
    let scopes = Scope::ALL.map(Scope::as_str);
    let settings = json!({
        "user": {"type": ["string", "null"], "description": "whose requests they are"},
        "tags": texts("words to tell keys apart by"),
        "expires": {"type": ["string", "null"], "description": "in \"30d\", or at \"2027-01-31T12:00:00Z\""},
        "scopes": {"type": ["array", "null"], "items": {"enum": scopes}, "description": "null: all"},
        "models": texts("what it may ask for as `model`; null: all"),
        "from": texts("networks it may be used from; null: anywhere"),
        "metadata": {"type": ["object", "null"], "additionalProperties": {"type": "string"}},
        "requests_per_minute": number("null: the configuration's"),
        "tokens_per_minute": number("null: the configuration's"),
        "concurrency": number("null: the configuration's"),
        "usd_per_day": {"type": ["number", "string", "null"], "description": "US dollars; null: the configuration's"},
    });
    settings.as_object().cloned().unwrap_or_default()
}

fn schemas() -> Value {
    let text = || json!({"type": "string"});
    let maybe = || json!({"type": ["string", "null"]});
    let closed = |properties: Map<String, Value>, required: Value| json!({"type": "object", "additionalProperties": false, "required": required, "properties": properties});
    let with = |mut properties: Map<String, Value>, more: Value| {
        properties.extend(more.as_object().cloned().unwrap_or_default());
        properties
    };
    let key = with(
        settings(),
        json!({
            "id": text(), "name": text(), "tenant": text(), "created": text(), "disabled": maybe(), "revoked": maybe(),
            "previous_secret_until": maybe(), "version": {"type": "integer"},
            "notes": {"type": "array", "items": text(), "description": "what may not be meant"},
        }),
    );
    let with_secret = with(
        key.clone(),
        json!({"key": {"type": "string", "description": "the key itself, told now and never again"}}),
    );
    let new = with(settings(), json!({"name": text(), "tenant": {"type": ["string", "null"], "default": "default"}}));
    let words = |all: Vec<&str>| json!({"enum": all});
    let only = Only::all().map(|only| (only.as_str().to_owned(), text()));
    let rule = json!({
        "limit": {"type": "number"}, "of": words(Of::ALL.map(Of::as_str).to_vec()), "per": words(Per::ALL.map(Per::as_str).to_vec()),
        "by": {"type": "array", "items": words(Dimension::ALL.map(Dimension::as_str).to_vec())},
        "only": {"type": "object", "additionalProperties": false, "properties": Value::from_iter(only)},
        "zone": text(), "mode": words(vec!["hard", "soft", "throttle"]), "throttle": text(), "wait": text(),
        "exact": {"type": "boolean"}, "strict": {"type": "boolean"},
        "shared": text(), "down": words(Down::ALL.map(Down::as_str).to_vec()),
    });
    let object = |value: &Value| value.as_object().cloned().unwrap_or_default();
    json!({
        "Error": {
            "type": "object", "required": ["error"],
            "properties": {"error": {
                "type": "object", "required": ["message", "type", "param", "code"],
                "properties": {"message": text(), "type": {"const": "admin_error"}, "param": maybe(), "code": text()},
            }},
        },
        "Key": closed(key, json!(["id", "name", "tenant", "version"])),
        "KeyWithSecret": closed(with_secret, json!(["id", "name", "tenant", "version", "key"])),
        "NewKey": closed(new, json!(["name"])),
        "KeyEdit": closed(settings(), json!([])),
        "Rotation": closed(object(&json!({"grace": {"type": "string", "default": "24h", "description": "how long the secret before it works"}})), json!([])),
        "Tenant": closed(
            object(&json!({
                "id": text(), "name": maybe(), "tags": {"type": "array", "items": text()}, "disabled": maybe(), "version": {"type": "integer"},
            })),
            json!(["id", "version"]),
        ),
        "TenantPut": closed(object(&json!({"name": maybe(), "tags": {"type": ["array", "null"], "items": text()}})), json!([])),
        "Rule": {
            "type": "object", "required": ["name", "origin", "replaces", "version"],
            "properties": {
                "name": text(), "origin": words(vec!["config", "store"]), "version": {"type": ["integer", "null"]},
                "replaces": {"type": "boolean", "description": "whether it stands before one of the configuration"},
            },
        },
        "RulePut": closed(object(&rule), json!(["limit", "of"])),
        "Limits": {
            "type": "object", "required": ["key", "rules", "refuses", "nearest"],
            "properties": {
                "key": {"type": "object"}, "route": maybe(), "model": maybe(),
                "rules": {"type": "array", "items": {"type": "object", "description": "`used`, `reserved` and `remaining` are null while the rule `needs` to know more"}},
                "refuses": {"type": ["object", "null"], "description": "the rule that refuses a request now"},
                "nearest": {"type": ["string", "null"], "description": "the rule with the least left of its limit"},
            },
        },
        "Spend": {"type": "object", "required": ["name", "requests", "input_tokens", "output_tokens", "billed_nano_usd", "provider_cost_nano_usd"]},
        "Entry": closed(
            object(&json!({
                "n": {"type": "integer"}, "at": text(), "actor": text(), "change": {}, "previous_hash": text(), "hash": text(),
            })),
            json!(["n", "at", "actor", "change", "previous_hash", "hash"]),
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::edit::FIELDS;

    #[test]
    fn the_document_knows_every_field_that_is_read() {
        let schemas = schemas();
        let names = |schema: &str| -> Vec<String> {
            schemas[schema]["properties"].as_object().unwrap().keys().cloned().collect()
        };
        let mut edit = names("KeyEdit");
        edit.sort();
        let mut fields = FIELDS.map(str::to_owned);
        fields.sort();
        assert_eq!(edit, fields);
        let mut put = names("TenantPut");
        put.sort();
        assert_eq!(put, super::super::tenants::FIELDS);
        for route in &ROUTES {
            let named = match route.says {
                Says::One(name) | Says::List(name) | Says::Created(name) => Some(name),
                Says::Text | Says::Lines | Says::Object => None,
            };
            for name in named.into_iter().chain(route.takes) {
                assert!(schemas[name].is_object(), "{name}");
            }
        }
    }
}
