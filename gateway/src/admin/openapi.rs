//! `GET /admin/openapi.json`: the table of routes as OpenAPI 3.1, and what bodies hold.

use clap::ValueEnum as _;
use serde_json::{Map, Value, json};

use super::routes::{Does, ROUTES, Route, Says};
use super::spend::head;
use crate::accounting::ledger::store::By;
use crate::admission::core::rule::Down;
use crate::api::limit::{Dimension, Of, Only, Per};
use crate::config::{CONCURRENCY_MAX, REQUESTS_PER_MINUTE_MAX, TOKENS_PER_MINUTE_MAX};
use crate::control::edit::{METADATA_MAX, MODELS_MAX, NETWORKS_MAX, TAGS_MAX};
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
            "description": "Changes count within a second and are recorded. An edit with `if-match` is made only of that version. \
                Formats of our own are `moment`, such as \"30d\" or \"2027-01-31T12:00:00Z\"; `moment-or-age`, \"24h\" ago or \
                \"2026-11-01T14:30\"; `network`, \"10.0.0.0/8\"; `time-zone`, \"Europe/Berlin\"; `span`, \"250ms\"; `pace`, \
                \"10/minute\"; `share`, \"no\", \"strict\" or \"5%\".",
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
    let problem = |(status, why): (&str, &str)| {
        let content = if route.is_probe() && status == "503" {
            json!({"text/plain": {"schema": {"type": "string"}}})
        } else {
            json!({"application/json": {"schema": of("Error")}})
        };
        (status.to_owned(), json!({"description": why, "content": content}))
    };
    let mut responses: Map<String, Value> = problems(route).map(problem).collect();
    responses.insert(status.to_owned(), json!({"description": "Done", "content": says}));
    let mut operation = json!({
        "operationId": format!("{:?}", route.does),
        "summary": route.summary,
        "parameters": parameters(route),
        "responses": responses,
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

/// Every status beside that of success, and when.
fn problems(route: &Route) -> impl Iterator<Item = (&'static str, &'static str)> {
    let is_named = route.path.contains('{');
    let (is_open, asks_limits) = (!route.needs_token(), route.does == Does::Limits);
    let all = [
        ("400", "What was sent is not what it must be; `param` says where", true),
        ("401", "The token is missing or wrong", !is_open),
        ("403", "The listener was called by somebody else's name", !route.is_probe()),
        ("404", "There is none of this name", is_named || asks_limits || route.does == Does::Steps),
        ("409", "Others have it, or it is over", is_named || asks_limits || route.does == Does::CreateKey),
        ("412", "It has changed since the version of `if-match`", route.is_edit()),
        ("413", "The body is too large", true),
        ("422", "The files have problems; what served serves on", route.does == Does::Reload),
        ("429", "Too many wrong tokens came from this address", !is_open),
        ("500", "A store failed", !is_open),
        ("503", "Not now", matches!(route.does, Does::Startupz | Does::Readyz)),
    ];
    all.into_iter().filter(|(.., happens)| *happens).map(|(status, why, _)| (status, why))
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
    let path = route
        .path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": of_path(route, name)}));
    let of_query = route.query.iter().map(|(name, what)| {
        json!({"name": name, "in": "query", "required": false, "description": what, "schema": of_query(route, name)})
    });
    let if_match = route.is_edit().then(|| {
        let schema = json!({"type": "string", "pattern": r#"^(\*|[0-9]{1,18}|"[0-9]{1,18}")$"#});
        json!({"name": "if-match", "in": "header", "description": "`etag` of the version that is meant", "schema": schema})
    });
    path.chain(of_query).chain(if_match).collect()
}

fn of_path(route: &Route, name: &str) -> Value {
    match name {
        "name" => json!({"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}),
        _ if route.path.starts_with("/admin/tenants/") => word(64),
        // A key may be called tenant/name.
        _ => word(129),
    }
}

fn of_query(route: &Route, name: &str) -> Value {
    match name {
        "limit" => json!({"type": "integer", "minimum": 1, "maximum": 1_000}),
        "last" => json!({"type": "integer", "minimum": 0, "maximum": i64::MAX}),
        "after" if route.does == Does::Audit => json!({"type": "integer", "minimum": 0, "maximum": i64::MAX}),
        "by" => {
            let all: Vec<String> = By::value_variants().iter().map(|by| head(*by)).collect();
            let one = format!("({})", all.join("|"));
            json!({"type": "string", "pattern": format!("^{one}(,{one})*$")})
        }
        "ip" => json!({"type": "string", "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]}),
        "zone" => json!({"type": "string", "format": "time-zone"}),
        "since" | "until" => json!({"type": "string", "format": "moment-or-age"}),
        _ => json!({"type": "string"}),
    }
}

/// What operators call something.
fn word(chars_max: usize) -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": chars_max, "pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$"})
}

/// The same, or nothing.
fn maybe_word(chars_max: usize) -> Value {
    let mut word = word(chars_max);
    word["type"] = json!(["string", "null"]);
    word
}

fn of(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// Of what can be set on a key.
fn settings() -> Map<String, Value> {
    let list = |most: usize, items: Value, what: &str| json!({"type": ["array", "null"], "maxItems": most, "items": items, "description": what});
    let number = |most: u32| json!({"type": ["integer", "null"], "minimum": 1, "maximum": most, "description": "null: the configuration's"});
    let mut user = maybe_word(256);
    user["description"] = "whose requests they are".into();
    let settings = json!({
        "user": user,
        "tags": list(TAGS_MAX, word(64), "words to tell keys apart by"),
        "expires": {"type": ["string", "null"], "format": "moment", "description": "in \"30d\", or at \"2027-01-31T12:00:00Z\""},
        "scopes": {"type": ["array", "null"], "items": {"enum": Scope::ALL.map(Scope::as_str)}, "description": "null: all"},
        "models": list(MODELS_MAX, word(64), "what it may ask for as `model`; null: all"),
        "from": list(NETWORKS_MAX, json!({"type": "string", "format": "network"}), "networks it may be used from, as \"10.0.0.0/8\"; null: anywhere"),
        "metadata": {"type": ["object", "null"], "maxProperties": METADATA_MAX, "propertyNames": word(64), "additionalProperties": word(256)},
        "requests_per_minute": number(REQUESTS_PER_MINUTE_MAX),
        "tokens_per_minute": number(TOKENS_PER_MINUTE_MAX),
        "concurrency": number(CONCURRENCY_MAX),
        "usd_per_day": {
            "type": ["number", "string", "null"], "minimum": 0, "maximum": 1_000_000, "pattern": r"^([0-9]{1,6}(\.[0-9]{1,9})?|1000000(\.0{1,9})?)$",
            "description": "US dollars; null: the configuration's",
        },
    });
    settings.as_object().cloned().unwrap_or_default()
}

fn schemas() -> Value {
    let text = || json!({"type": "string"});
    let own = |format: &str| json!({"type": "string", "format": format});
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
    let new = with(settings(), json!({"name": word(64), "tenant": maybe_word(64)}));
    let words = |all: Vec<&str>| json!({"enum": all});
    let only = Only::all().map(|only| (only.as_str().to_owned(), text()));
    let rule = json!({
        "limit": {"type": "number", "minimum": 0}, "of": words(Of::ALL.map(Of::as_str).to_vec()), "per": words(Per::ALL.map(Per::as_str).to_vec()),
        "by": {"type": "array", "items": words(Dimension::ALL.map(Dimension::as_str).to_vec())},
        "only": {"type": "object", "additionalProperties": false, "properties": Value::from_iter(only)},
        "zone": own("time-zone"), "mode": words(vec!["hard", "soft", "throttle"]), "throttle": own("pace"), "wait": own("span"),
        "exact": {"type": "boolean"}, "strict": {"type": "boolean"},
        "shared": own("share"), "down": words(Down::ALL.map(Down::as_str).to_vec()),
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
        "Rotation": closed(object(&json!({"grace": {"type": "string", "format": "moment", "default": "24h", "description": "how long the secret before it works"}})), json!([])),
        "Tenant": closed(
            object(&json!({
                "id": text(), "name": maybe(), "tags": {"type": "array", "items": text()}, "disabled": maybe(), "version": {"type": "integer"},
            })),
            json!(["id", "version"]),
        ),
        "TenantPut": closed(object(&json!({"name": maybe_word(256), "tags": {"type": ["array", "null"], "maxItems": TAGS_MAX, "items": word(64)}})), json!([])),
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
