//! Who may import whom (DESIGN §2), read from the source. Nothing about style.

use std::path::{Path, PathBuf};

use crate::support::root;

/// Files that a rule is about, words that must not appear in their code, and a line that would break it.
struct Rule {
    name: &'static str,
    /// Whether the rule binds this file, by its path below the repository.
    binds: fn(&str) -> bool,
    forbidden: &'static [&'static str],
    violation: &'static str,
}

const STAGES: [&str; 7] = ["auth", "admission", "routing", "cache", "dispatch", "shadow", "observe"];

fn in_gateway(path: &str, names: &[&str]) -> bool {
    path.strip_prefix("gateway/src/").is_some_and(|rest| {
        names.iter().any(|name| rest == format!("{name}.rs") || rest.starts_with(&format!("{name}/")))
    })
}

fn is_leaf(path: &str) -> bool {
    in_gateway(path, &["api", "answer", "exchange", "refusal", "ports", "observe/metrics"])
}

fn is_sans_io(path: &str) -> bool {
    path.ends_with("/core.rs")
        || in_gateway(
            path,
            &[
                "admission/core",
                "accounting/price",
                "accounting/settlement",
                "accounting/row",
                "accounting/ledger/wal",
                "accounting/ledger/totals",
                "api/sse",
                "api/head",
            ],
        )
}

const RULES: &[Rule] = &[
    Rule {
        name: "only server, guard, proxy, relay, dispatch/upstream and admin name pingora",
        binds: |path| {
            path.starts_with("gateway/")
                && !in_gateway(path, &["server", "guard", "proxy", "relay", "admin", "dispatch/upstream"])
        },
        forbidden: &["pingora_core", "pingora_proxy", "pingora_http"],
        violation: "use pingora_core::Result;",
    },
    Rule {
        name: "only dispatch/embedded, models and cli name the runtime",
        binds: |path| path.starts_with("gateway/") && !in_gateway(path, &["dispatch/embedded", "models", "cli"]),
        forbidden: &["glassgate_runtime"],
        violation: "use glassgate_runtime::Model;",
    },
    Rule {
        name: "what counts money or decides access does no I/O",
        binds: is_sans_io,
        forbidden: &["tokio", "pingora", "std::fs", "std::net", "rusqlite", "SystemTime::now", "Instant::now"],
        violation: "let now = std::time::Instant::now();",
    },
    Rule {
        name: "leaves know no stage and nothing above",
        binds: is_leaf,
        forbidden: &[
            "crate::auth",
            "crate::admission",
            "crate::routing",
            "crate::dispatch",
            "crate::models",
            "crate::invoke",
            "crate::relay",
            "crate::proxy",
            "crate::server",
            "crate::admin",
            "crate::cli",
            "crate::app",
            "crate::config",
        ],
        violation: "use crate::routing::Route;",
    },
    Rule {
        name: "stages know nothing above them",
        binds: |path| in_gateway(path, &STAGES),
        forbidden: &[
            "crate::invoke",
            "crate::relay",
            "crate::proxy",
            "crate::server",
            "crate::admin::",
            "crate::cli",
            "crate::app",
            "crate::control",
        ],
        violation: "use crate::app::App;",
    },
    Rule {
        name: "stages import each other's proofs only",
        binds: |path| in_gateway(path, &["auth", "admission", "routing"]),
        forbidden: &[
            "crate::dispatch",
            "crate::models",
            "crate::auth::api_key",
            "crate::auth::store",
            "crate::admission::Admission",
            "crate::routing::Routing",
        ],
        violation: "use crate::dispatch::Backends;",
    },
    Rule {
        name: "only control writes the key store",
        binds: |path| path.starts_with("gateway/src/") && !in_gateway(path, &["control", "auth/store"]),
        forbidden: &["Writing", ".write()?", "ChainKey", "INSERT INTO keys"],
        violation: "let writing = store.write()?;",
    },
    Rule {
        name: "the request path and the relay know no console",
        binds: |path| in_gateway(path, &["invoke", "relay"]),
        forbidden: &["crate::proxy", "crate::server", "crate::admin", "crate::cli"],
        violation: "use crate::proxy::Gateway;",
    },
    Rule {
        name: "the runtime knows no HTTP, key, price or database",
        binds: |path| path.starts_with("runtime/src/"),
        forbidden: &["pingora", "glassgate::", "prometheus", "opentelemetry", "rusqlite", "hyper"],
        violation: "use prometheus::Registry;",
    },
    Rule {
        name: "scheduler and KV bookkeeping know no tensors, no executor and no clock",
        // A simulation has to begin at some instant.
        binds: |path| {
            !path.ends_with("/simulation.rs")
                && (path.starts_with("runtime/src/engine/scheduler") || path.starts_with("runtime/src/kv/"))
        },
        forbidden: &["candle", "tokio", "tokenizers", "Instant::now", "SystemTime"],
        violation: "use candle_core::Tensor;",
    },
    Rule {
        name: "model and kernels hold no request's state",
        binds: |path| path.starts_with("runtime/src/model/") || path.starts_with("runtime/src/kernels/"),
        forbidden: &["crate::engine", "crate::sampling", "crate::text", "crate::registry", "tokio"],
        violation: "use crate::engine::sequence::Sequence;",
    },
    Rule {
        name: "only grammar names llguidance",
        binds: |path| path.starts_with("runtime/src/") && path != "runtime/src/grammar.rs",
        forbidden: &["llguidance", "toktrie"],
        violation: "use llguidance::Matcher;",
    },
    Rule {
        name: "sampling, grammar and text know no tensors and no executor",
        binds: |path| {
            let folders = ["runtime/src/sampling/", "runtime/src/text/"];
            path == "runtime/src/grammar.rs" || folders.iter().any(|folder| path.starts_with(folder))
        },
        forbidden: &["candle", "tokio", "crate::engine"],
        violation: "use candle_core::Tensor;",
    },
];

/// The code of a file: without comments, and without its unit tests.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

fn breaks(rule: &Rule, path: &str, text: &str) -> Vec<String> {
    if !(rule.binds)(path) {
        return Vec::new();
    }
    let code = code(text);
    rule.forbidden
        .iter()
        .filter(|word| code.contains(**word))
        .map(|word| format!("{path}: `{word}` breaks the rule: {}", rule.name))
        .collect()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !is_test(&path) {
            found.push(path);
        }
    }
}

fn is_test(path: &Path) -> bool {
    path.file_name().is_some_and(|name| {
        name == "tests.rs" || ["_tests.rs", "_model.rs"].iter().any(|end| name.to_string_lossy().ends_with(end))
    })
}

#[test]
fn the_house_stands_as_designed() {
    let mut files = Vec::new();
    for folder in ["gateway/src", "runtime/src"] {
        sources(&root().join(folder), &mut files);
    }
    assert!(files.len() > 40, "the sources were not found");
    let mut broken = Vec::new();
    let mut bound = vec![0; RULES.len()];
    for file in &files {
        let path = file.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(file).unwrap();
        for (number, rule) in RULES.iter().enumerate() {
            bound[number] += usize::from((rule.binds)(&path));
            broken.extend(breaks(rule, &path, &text));
        }
    }
    for (rule, count) in RULES.iter().zip(bound) {
        assert!(count > 0, "no file is bound by the rule: {}", rule.name);
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// A rule that nothing can break is no rule: each is tried on a file that it binds.
#[test]
fn every_rule_notices_its_violation() {
    let paths = [
        "gateway/src/accounting/core.rs",
        "gateway/src/admission/core/bucket.rs",
        "gateway/src/api/sse.rs",
        "gateway/src/auth/mod.rs",
        "gateway/src/routing/mod.rs",
        "gateway/src/invoke.rs",
        "runtime/src/lib.rs",
        "runtime/src/engine/scheduler.rs",
        "runtime/src/model/decoder.rs",
        "runtime/src/sampling/mod.rs",
    ];
    for rule in RULES {
        let path =
            paths.iter().find(|path| (rule.binds)(path)).unwrap_or_else(|| panic!("no example for: {}", rule.name));
        assert!(!breaks(rule, path, rule.violation).is_empty(), "not noticed: {}", rule.name);
        assert!(
            breaks(rule, path, &format!("// {}", rule.violation)).is_empty(),
            "a comment is no import: {}",
            rule.name
        );
    }
}
