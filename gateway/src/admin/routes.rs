//! Everything that the admin listener answers: one table, from which requests are dispatched and the OpenAPI document is made.

use super::asked::decoded;

/// One thing that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Does {
    Metrics,
    Steps,
    Livez,
    Startupz,
    Readyz,
    Reload,
    Config,
    Models,
    Request,
    ListKeys,
    CreateKey,
    ShowKey,
    EditKey,
    RevokeKey,
    RotateKey,
    EnableKey,
    DisableKey,
    ListTenants,
    ShowTenant,
    PutTenant,
    EnableTenant,
    DisableTenant,
    ListRules,
    ShowRule,
    PutRule,
    DeleteRule,
    Limits,
    Spend,
    Audit,
    Export,
    OpenApi,
}

/// What an answer holds, by the names in the OpenAPI document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    Text,
    Lines,
    One(&'static str),
    List(&'static str),
    Created(&'static str),
    Object,
}

/// Of the query: the name, and what it says.
pub type Query = (&'static str, &'static str);

pub struct Route {
    pub method: &'static str,
    /// Parts in braces stand for names.
    pub path: &'static str,
    pub does: Does,
    pub summary: &'static str,
    pub query: &'static [Query],
    /// The body, by its name in the OpenAPI document.
    pub takes: Option<&'static str>,
    pub says: Says,
}

impl Route {
    /// Whether it changes one thing, of which there are versions.
    pub fn is_edit(&self) -> bool {
        use Does::{DeleteRule, DisableKey, DisableTenant, EditKey, EnableKey, EnableTenant};
        use Does::{PutRule, PutTenant, RevokeKey, RotateKey};
        matches!(
            self.does,
            EditKey
                | RevokeKey
                | RotateKey
                | EnableKey
                | DisableKey
                | PutTenant
                | EnableTenant
                | DisableTenant
                | PutRule
                | DeleteRule
        )
    }

    pub fn needs_token(&self) -> bool {
        self.path.starts_with("/admin/")
    }

    /// Probes come from whoever starts and stops us, by whatever name, and are told nothing else.
    pub fn is_probe(&self) -> bool {
        matches!(self.does, Does::Livez | Does::Startupz | Does::Readyz)
    }
}

const fn get(path: &'static str, does: Does, says: Says, summary: &'static str) -> Route {
    Route { method: "GET", path, does, summary, query: &[], takes: None, says }
}

const fn list(path: &'static str, does: Does, of: &'static str, summary: &'static str) -> Route {
    Route { query: &PAGE, ..get(path, does, Says::List(of), summary) }
}

const fn change(method: &'static str, path: &'static str, does: Does, says: Says, summary: &'static str) -> Route {
    Route { method, path, does, summary, query: &[], takes: None, says }
}

const PAGE: [Query; 2] = [
    ("limit", "how many at the most, up to 1000; 100 if not said"),
    ("after", "those after this one: `next` of the list before"),
];

pub static ROUTES: [Route; 31] = [
    get("/metrics", Does::Metrics, Says::Text, "Metrics for Prometheus"),
    Route {
        query: &[("model", "the name of a model of the engine"), ("last", "only so many steps")],
        ..get("/debug/steps", Does::Steps, Says::Lines, "What the engine did in its last steps")
    },
    get("/livez", Does::Livez, Says::Text, "Whether the process can answer"),
    get("/startupz", Does::Startupz, Says::Text, "Whether it has started"),
    get("/readyz", Does::Readyz, Says::Text, "Whether it should get traffic"),
    change("POST", "/admin/reload", Does::Reload, Says::Object, "Read the configuration files again"),
    get("/admin/config", Does::Config, Says::Object, "What serves"),
    get("/admin/models", Does::Models, Says::Object, "Models, their memory and speed"),
    get("/admin/requests/{id}", Does::Request, Says::Object, "One of the last 1,000 requests"),
    list("/admin/keys", Does::ListKeys, "Key", "List keys, by id"),
    Route {
        takes: Some("NewKey"),
        ..change(
            "POST",
            "/admin/keys",
            Does::CreateKey,
            Says::Created("KeyWithSecret"),
            "Make a key; its secret is told once",
        )
    },
    get("/admin/keys/{id}", Does::ShowKey, Says::One("Key"), "Show a key, by id, name or tenant/name"),
    Route {
        takes: Some("KeyEdit"),
        ..change(
            "PATCH",
            "/admin/keys/{id}",
            Does::EditKey,
            Says::One("Key"),
            "Change a key: null takes back, what is missing stays",
        )
    },
    change("DELETE", "/admin/keys/{id}", Does::RevokeKey, Says::One("Key"), "Revoke a key, for ever"),
    Route {
        takes: Some("Rotation"),
        ..change(
            "POST",
            "/admin/keys/{id}/rotate",
            Does::RotateKey,
            Says::One("KeyWithSecret"),
            "Make a new secret; it is told once",
        )
    },
    change("POST", "/admin/keys/{id}/enable", Does::EnableKey, Says::One("Key"), "Let a disabled key in again"),
    change("POST", "/admin/keys/{id}/disable", Does::DisableKey, Says::One("Key"), "Refuse a key until it is enabled"),
    list("/admin/tenants", Does::ListTenants, "Tenant", "List tenants that were put or disabled, by id"),
    get("/admin/tenants/{id}", Does::ShowTenant, Says::One("Tenant"), "Show a tenant"),
    Route {
        takes: Some("TenantPut"),
        ..change(
            "PUT",
            "/admin/tenants/{id}",
            Does::PutTenant,
            Says::One("Tenant"),
            "Say what a tenant is called and its tags",
        )
    },
    change(
        "POST",
        "/admin/tenants/{id}/enable",
        Does::EnableTenant,
        Says::One("Tenant"),
        "Let a disabled tenant in again",
    ),
    change(
        "POST",
        "/admin/tenants/{id}/disable",
        Does::DisableTenant,
        Says::One("Tenant"),
        "Refuse all keys and tokens of a tenant until it is enabled",
    ),
    list("/admin/rules", Does::ListRules, "Rule", "List the limit rules that bind, by name, and where each is from"),
    get("/admin/rules/{name}", Does::ShowRule, Says::One("Rule"), "Show a limit rule"),
    Route {
        takes: Some("RulePut"),
        ..change(
            "PUT",
            "/admin/rules/{name}",
            Does::PutRule,
            Says::One("Rule"),
            "Put a limit rule, before one of the configuration with its name",
        )
    },
    change("DELETE", "/admin/rules/{name}", Does::DeleteRule, Says::Object, "Delete a limit rule that was put"),
    Route {
        query: &[
            ("key", "id, name or tenant/name of a key; or, of who has a token, `user` and what else it says"),
            ("issuer", "of a token: the name of its `[[auth.jwt]]`, where there are several"),
            ("tenant", "of a token, where it says one"),
            ("tier", "of a token, likewise"),
            ("route", "what it asks for as `model`"),
            ("model", "the model that answers"),
            ("user", "whose requests they are: as the token says, or where the key does not"),
            ("ip", "where they come from"),
        ],
        ..get(
            "/admin/limits",
            Does::Limits,
            Says::One("Limits"),
            "Which limits bind a key or who has a token, how each stands, and which says no first",
        )
    },
    Route {
        query: &[
            ("by", "key, tenant, user, route, model, variant, outcome, day; several with commas; key if not said"),
            ("since", "24h, 7d, 2026-11-01, 2026-11-01T14:30"),
            ("until", "likewise"),
            ("zone", "of days and times, such as Europe/Berlin"),
        ],
        ..get("/admin/spend", Does::Spend, Says::List("Spend"), "What was spent, from the ledger")
    },
    list("/admin/audit", Does::Audit, "Entry", "The record of changes, oldest first"),
    get(
        "/admin/export",
        Does::Export,
        Says::Object,
        "Keys without secrets, tenants and rules, for `glassgate config import`",
    ),
    get("/admin/openapi.json", Does::OpenApi, Says::Object, "This document"),
];

/// What a method and a path ask for.
pub enum Found {
    Route(&'static Route, Vec<String>),
    /// There is something, for other methods.
    Allowed(Vec<&'static str>),
    Nothing,
}

pub fn find(method: &str, path: &str) -> Found {
    let mut allowed = Vec::new();
    for route in &ROUTES {
        let Some(parts) = matched(route.path, path) else { continue };
        if route.method == method {
            return Found::Route(route, parts);
        }
        allowed.push(route.method);
    }
    if allowed.is_empty() { Found::Nothing } else { Found::Allowed(allowed) }
}

/// What stands for the braces, if the path fits. A name may have slashes in it, if they are escaped.
fn matched(pattern: &str, path: &str) -> Option<Vec<String>> {
    let (mut pattern, mut path) = (pattern.split('/'), path.split('/'));
    let mut parts = Vec::new();
    loop {
        match (pattern.next(), path.next()) {
            (None, None) => return Some(parts),
            (Some(name), Some(part)) if name.starts_with('{') && !part.is_empty() => parts.push(decoded(part)),
            (Some(word), Some(part)) if word == part => {}
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_found_by_its_own_path_and_by_no_other() {
        for route in &ROUTES {
            let path = route.path.replace("{id}", "x%2Fy").replace("{name}", "x%2Fy");
            let Found::Route(found, parts) = find(route.method, &path) else { panic!("{path}") };
            assert_eq!((found.does, parts.iter().all(|part| part == "x/y")), (route.does, true));
            for other in [format!("{path}/"), format!("/{path}"), path.to_uppercase(), format!("{path}/x")] {
                let found = find(route.method, &other);
                assert!(!matches!(found, Found::Route(found, _) if found.does == route.does), "{other}");
            }
        }
        assert!(matches!(find("PUT", "/admin/keys"), Found::Allowed(methods) if methods == ["GET", "POST"]));
        assert!(matches!(find("GET", "/admin/keys/"), Found::Nothing));
    }
}
