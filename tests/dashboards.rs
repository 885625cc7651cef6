//! The dashboards: well formed, about metrics that exist, and showing what happens, on a real Prometheus.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use glassgate::observe::metrics::Metrics;
use serde_json::{Value, json};

use crate::support::gateway::{Setup, TestGateway, append, chat};
use crate::support::prometheus::{Prometheus, now};
use crate::support::upstream::{Asked, Script, Upstream, response, words};
use crate::support::{eventually, http, root};

const FILES: [&str; 3] = ["overview.json", "cost.json", "engine.json"];

/// Families that no panel and no rule shows, and why.
const UNSHOWN: [(&str, &str); 20] = [
    ("gateway_inter_token_latency_seconds", "every gap of every stream, for a closer look at time per output token"),
    ("gateway_rejections_total", "the refusals among gateway_requests_total by error_type"),
    (
        "gateway_auth_total",
        "those who were refused are there too; the rest tells keys from tokens, and old secrets from new",
    ),
    ("gateway_jwks_age_seconds", "of the few who take tokens: their alert on it knows how long they can do without"),
    (
        "gateway_tls_handshakes_total",
        "of those who have no load balancer that does TLS; who fails is on the other side",
    ),
    ("gateway_reserved_tokens", "what limits hold at the moment, for debugging them"),
    ("gateway_reserved_usd", "likewise"),
    ("gateway_budget_exceeded_total", "rules that warn or throttle are an operator's own: so are the alerts on them"),
    ("gateway_unbilled_usd_total", "zero but for servers that report more than can be true; the log names them"),
    ("gateway_redis_calls_total", "of those who share counters: the alert on gateway_store_up says when they cannot"),
    ("gateway_unpriced_service_tiers_total", "zero but for upstreams that serve in ways nobody priced; rows name them"),
    ("gateway_cache_bytes", "the cache evicts by itself"),
    ("gateway_ledger_lag_seconds", "the queue of rows says the same in rows"),
    ("gateway_ledger_wal_bytes", "likewise in bytes"),
    ("gateway_ledger_recovered_rows_total", "the start logs it"),
    ("gateway_feedback_score", "for those who judge in numbers; the demo says right or wrong"),
    ("gateway_shadow_requests_total", "for a dashboard of experiments"),
    ("gateway_telemetry_export_seconds", "for a dashboard of telemetry"),
    ("runtime_model_memory_bytes", "what each model holds, for planning: glassgate models status tells it too"),
    ("gateway_config_info", "names the configuration, for joins"),
];

/// Panels with nothing to show for one value of a variable, or, where that is empty, with nothing of what one of their
/// queries asks for.
const EMPTY: [(&str, &str, &str); 2] = [
    ("Engine", "remote-model", "it runs on somebody else's server, which tells us nothing of its engine"),
    ("Gateways down", "", "the gateway is up; another test ends it"),
];

fn dashboard(file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(root().join("dashboards").join(file)).unwrap()).unwrap()
}

fn text<'v>(value: &'v Value, name: &str) -> &'v str {
    value[name].as_str().unwrap_or_default()
}

/// Panels that ask something.
fn panels(dashboard: &Value) -> Vec<Value> {
    let panels = dashboard["panels"].as_array().expect("panels").iter();
    panels.filter(|panel| panel["type"] != "row").cloned().collect()
}

fn queries(panel: &Value) -> Vec<(&str, bool)> {
    let targets = panel["targets"].as_array().expect("targets").iter();
    targets.map(|target| (text(target, "expr"), target["instant"] == true)).collect()
}

fn variables(dashboard: &Value) -> Vec<Value> {
    let variables = dashboard["templating"]["list"].as_array().expect("variables").iter();
    variables.filter(|variable| variable["type"] == "query").cloned().collect()
}

#[test]
fn the_dashboards_are_what_their_source_says() {
    let output = Command::new("python3").arg(root().join("dashboards/make.py")).arg("--check").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn grafana_s_own_schema_knows_everything_that_the_dashboards_say() {
    let venv = std::env::var("GLASSGATE_CLIENTS")
        .expect("GLASSGATE_CLIENTS names the venv; `make test` makes it and sets this");
    let output = Command::new(format!("{venv}/bin/python"))
        .arg(root().join("tests/clients/dashboard_schema.py"))
        .args(FILES.map(|file| root().join("dashboards").join(file)))
        .output()
        .expect("the venv has a python");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The rules of Grafana's dashboard linter.
#[test]
fn the_dashboards_are_such_as_grafana_takes_and_its_linter_likes() {
    const UNITS: [&str; 6] = ["short", "s", "percentunit", "currencyUSD", "reqps", "cpm"];
    let mut uids = BTreeSet::new();
    for file in FILES {
        let dashboard = dashboard(file);
        assert!(dashboard["schemaVersion"].as_u64().is_some_and(|version| (39..=42).contains(&version)), "{file}");
        assert_eq!(dashboard["editable"], false, "{file}");
        assert_eq!(dashboard["tags"], json!(["llm-gateway"]), "{file}");
        assert!(text(&dashboard, "uid").starts_with("gw-") && uids.insert(text(&dashboard, "uid").to_owned()));
        let link = &dashboard["links"][0];
        assert_eq!([&link["type"], &link["tags"][0]], ["dashboards", "llm-gateway"], "{file}");
        assert!(link["includeVars"] == true && link["keepTime"] == true, "{file}");
        let source = &dashboard["templating"]["list"][0];
        assert_eq!([text(source, "type"), text(source, "query")], ["datasource", "prometheus"], "{file}");
        let names: BTreeSet<String> = variables(&dashboard).iter().map(|it| text(it, "name").to_owned()).collect();
        // The engine knows models, and nothing of who asks for them.
        let of_requests = if file == "engine.json" { &[][..] } else { &["route", "variant"] };
        for name in ["job", "instance", "model"].iter().chain(of_requests) {
            assert!(names.contains(*name), "{file} has no variable {name}");
        }
        for variable in variables(&dashboard) {
            let query = text(&variable["query"], "query");
            assert!(
                query.starts_with("label_values(") && query.ends_with(&format!(", {})", text(&variable, "name"))),
                "{query}"
            );
            assert!(
                variable["multi"] == true && variable["includeAll"] == true && variable["allValue"] == ".+",
                "{query}"
            );
            assert_eq!(variable["refresh"], 2, "{query}: a new value must show when the time changes");
        }
        let mut ids = BTreeSet::new();
        let mut taken = BTreeMap::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            let title = text(panel, "title");
            assert!(ids.insert(panel["id"].as_u64().expect("an id")), "{file}: {title}");
            let [x, y, w, h] = ["x", "y", "w", "h"].map(|name| panel["gridPos"][name].as_u64().expect("a place"));
            assert!(x + w <= 24 && w > 0 && h > 0, "{file}: {title}");
            for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
                assert_eq!(taken.insert(cell, title), None, "{file}: {title} lies on another panel");
            }
            if panel["type"] == "row" {
                continue;
            }
            assert!(!title.is_empty() && text(panel, "description").len() > 40, "{file}: {title} says too little");
            let says_which =
                text(panel, "description").contains("gateway") || text(panel, "description").contains("runtime_");
            assert!(
                says_which || title == "Budget at midnight, forecast" || title == "Correct answers over time",
                "{file}: {title} names no metric"
            );
            let unit = text(&panel["fieldConfig"]["defaults"], "unit");
            let unit = if panel["type"] == "heatmap" { text(&panel["options"]["yAxis"], "unit") } else { unit };
            assert!(UNITS.contains(&unit) || unit.starts_with("suffix:"), "{file}: {title} has the unit {unit:?}");
            assert_eq!(panel["datasource"]["uid"], "$datasource", "{file}: {title}");
            assert!(!queries(panel).is_empty(), "{file}: {title}");
            for (query, _) in queries(panel) {
                lint(file, title, query);
            }
        }
    }
}

fn lint(file: &str, title: &str, query: &str) {
    for (name, matchers) in selectors(query) {
        assert!(matchers.contains("job=~\"$job\""), "{file}: {title}: {name} is not of the chosen job");
        // What is recorded is of a job, whatever its instances.
        assert!(name.contains(':') || matchers.contains("instance=~\"$instance\""), "{file}: {title}: {name}");
        let is_counter = ["_total", "_bucket", "_sum", "_count"].iter().any(|end| name.ends_with(end));
        let is_rate = ["rate(", "increase("].iter().any(|function| query.contains(&format!("{function}{name}{{")));
        assert!(is_rate || !is_counter, "{file}: {title}: the counter {name} is not rated");
    }
    for window in query.split('[').skip(1).map(|rest| rest.split(']').next().unwrap()) {
        let is_gauge = query.contains("deriv(") && window == "30m";
        let is_pace = query.starts_with("3600 * ") && window == "5m";
        assert!(
            matches!(window, "$__rate_interval" | "$__range") || is_gauge || is_pace,
            "{file}: {title}: [{window}]"
        );
    }
}

/// Metric names of a query with the matchers in their braces, if they have any.
fn selectors(query: &str) -> Vec<(String, String)> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut found = Vec::new();
    let mut rest = query;
    while let Some(at) = rest.find(is_name) {
        // What is quoted is no name.
        if let Some(quote) = rest[..at].find('"') {
            let after = &rest[quote + 1..];
            rest = &after[after.find('"').map_or(after.len(), |end| end + 1)..];
            continue;
        }
        let name: String = rest[at..].chars().take_while(|c| is_name(*c)).collect();
        let after = &rest[at + name.len()..];
        rest = after;
        let is_metric = ["gateway_", "gateway:", "runtime_", "process_"].iter().any(|start| name.starts_with(start))
            || name == "up";
        if is_metric {
            let matchers =
                after.strip_prefix('{').and_then(|inner| inner.split_once('}')).map_or("", |(inner, _)| inner);
            found.push((name, matchers.to_owned()));
        }
    }
    found
}

/// Labels that matchers and groupings of a query name.
fn labels(query: &str, matchers: &str) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = BTreeSet::new();
    for matcher in matchers.split("\",").filter(|matcher| !matcher.is_empty()) {
        names.insert(matcher.split(['=', '!']).next().unwrap().trim().to_owned());
    }
    for grouping in ["by (", "on (", "ignoring ("] {
        for list in query.split(grouping).skip(1) {
            let list = list.split(')').next().unwrap();
            names.extend(list.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()));
        }
    }
    names
}

/// Every query of panels and rules, with where it is.
fn asked() -> Vec<(String, String)> {
    let mut asked = Vec::new();
    for file in FILES {
        let dashboard = dashboard(file);
        for panel in panels(&dashboard) {
            asked.extend(
                queries(&panel)
                    .iter()
                    .map(|(query, _)| (format!("{file}: {}", text(&panel, "title")), (*query).to_owned())),
            );
        }
        for variable in variables(&dashboard) {
            let query = text(&variable["query"], "query");
            asked.push((format!("{file}: ${}", text(&variable, "name")), query.rsplit_once(',').unwrap().0.to_owned()));
        }
    }
    for rule in rules() {
        let name = [text(&rule, "record"), text(&rule, "alert")].concat();
        asked.push((format!("rules.yml: {name}"), text(&rule, "expr").to_owned()));
    }
    asked
}

fn rules() -> Vec<Value> {
    let rules: Value = serde_yaml_ng::from_slice(&std::fs::read(root().join("deploy/rules.yml")).unwrap()).unwrap();
    let groups = rules["groups"].as_array().unwrap().iter();
    groups.flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
}

#[test]
fn panels_and_rules_ask_for_what_there_is_and_everything_that_there_is_is_shown_or_excused() {
    let metrics = Metrics::new();
    let families: BTreeMap<&str, &[&str]> =
        metrics.families().iter().map(|family| (family.name, family.labels)).collect();
    let recorded: BTreeSet<String> = rules().iter().map(|rule| text(rule, "record").to_owned()).collect();
    let mut shown = BTreeSet::new();
    for (place, query) in asked() {
        let mut known: BTreeSet<&str> = ["job", "instance", "le"].into();
        let mut used = BTreeSet::new();
        for (name, matchers) in selectors(&query) {
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
            used.extend(labels(&query, &matchers));
            match families.get(name.as_str()).or_else(|| families.get(base)) {
                Some(labels) => known.extend(*labels),
                None => assert!(recorded.contains(&name) || name == "up", "{place}: there is no {name}"),
            }
            shown.extend([name.clone(), base.to_owned()]);
        }
        let unknown: Vec<&String> = used.iter().filter(|label| !known.contains(label.as_str())).collect();
        assert!(unknown.is_empty(), "{place}: nothing has the labels {unknown:?}");
    }
    let excused: BTreeSet<&str> = UNSHOWN.iter().map(|(name, _)| *name).collect();
    for name in families.keys() {
        assert_ne!(shown.contains(*name), excused.contains(name), "{name} is neither shown nor excused, or both");
    }
    for name in &recorded {
        let is_read =
            name.is_empty() || asked().iter().any(|(_, query)| selectors(query).iter().any(|(used, _)| used == name));
        assert!(is_read, "nobody reads {name}");
    }
}

// ---------------------------------------------------------------------------------------------- live

/// Long enough for a few rate intervals; `RATE` is what Grafana would choose for a scrape a second, and more than it needs.
const RUN: Duration = Duration::from_secs(36);
const RATE: u64 = 12;

struct World {
    gateway: TestGateway,
    tenants: [String; 2],
    turns: AtomicUsize,
    _mock: Upstream,
}

impl World {
    /// The shipped routes for the demo, and what it cannot have: a remote server that may break, with and without somebody
    /// who stands in.
    fn start() -> World {
        let mock = Upstream::start();
        mock.decides(|asked: &Asked| match asked.text().contains("500") {
            true => Script::Raw(response("500 Internal Server Error", &[], "{}")),
            false => Script::Answer(words("The answer comes from upstream, in some words.")),
        });
        let setup = Setup::with_cache_and_shadow();
        setup.add_upstream("mock", &mock.url(), "remote-model");
        append(
            &setup.path("routes.toml"),
            "\n[routes.remote]\nsplit = { remote-model = 1 }\n\
             [routes.guarded]\nsplit = { remote-model = 1 }\nfallback = [\"glimmer-1\"]\ncache = { ttl = \"10m\" }\n",
        );
        let gateway = setup.start();
        let tenants = ["acme", "globex"].map(|tenant| {
            let options = ["keys", "create", tenant, "--tenant", tenant, "--rpm", "100000", "--usd-per-day", "0.05"];
            gateway.cli(&options).trim().to_owned()
        });
        World { gateway, tenants, turns: AtomicUsize::new(0), _mock: mock }
    }

    /// One thing that a client of the remote server does.
    fn turn(&self) {
        let turn = self.turns.fetch_add(1, Ordering::Relaxed);
        let key = &self.tenants[turn % 2];
        let (route, text) = match turn % 8 {
            0..=2 => ("remote", format!("Hello number {turn}")),
            3 => ("remote", "500".to_owned()),
            4 => ("guarded", format!("500 and then somebody else, number {turn}")),
            5 => ("guarded", format!("Hello number {turn}")),
            _ => ("guarded", "Hello once more".to_owned()),
        };
        let body = json!({"model": route, "temperature": 0, "max_tokens": 24, "stream": turn % 16 < 8,
                          "messages": [{"role": "user", "content": text}]});
        let session = format!("session-{turn}");
        let request =
            http::post("/v1/chat/completions", Some(key), &[("x-session-id", &session)], body.to_string().as_bytes());
        let answer = self.gateway.open(&request).finish();
        if answer.status == 200 && turn % 16 >= 8 {
            let id = answer.json()["id"].clone();
            let judged = json!({"response_id": id, "name": "correct", "value": !turn.is_multiple_of(3)}).to_string();
            self.gateway.open(&http::post("/v1/feedback", Some(key), &[], judged.as_bytes())).finish();
        }
    }
}

/// The demo, and beside it two clients of the remote server.
fn play(world: &World) {
    let end = Instant::now() + RUN;
    thread::scope(|scope| {
        let minutes = (RUN.as_secs_f64() / 60.0).to_string();
        scope.spawn(move || world.gateway.cli(&["demo", "--minutes", &minutes, "--rps", "12"]));
        for _ in 0..2 {
            scope.spawn(|| {
                while Instant::now() < end {
                    world.turn();
                    // The pace of the traffic; nothing is waited for.
                    thread::sleep(Duration::from_millis(60));
                }
            });
        }
    });
}

/// A choice of values, as Grafana would put it into a query.
fn substituted(query: &str, chosen: Option<(&str, &str)>, names: &[String]) -> String {
    let mut query = query
        .replace("$__rate_interval", &format!("{RATE}s"))
        .replace("$__range", &format!("{}s", RUN.as_secs()))
        // A key that is known for long enough, where a run is short.
        .replace("offset 10m", "offset 10s");
    for name in names {
        let value = match chosen {
            Some((of, value)) if of == name => value.replace('.', "\\\\."),
            _ => ".+".to_owned(),
        };
        query = query.replace(&format!("${name}"), &value);
    }
    assert!(!query.contains('$'), "{query}");
    query
}

#[test]
fn every_panel_shows_what_happens_for_all_and_for_each_value_of_each_variable() {
    let world = World::start();
    let prometheus = Prometheus::start(world.gateway.admin);
    let began = now();
    play(&world);
    let ended = now();

    let (mut wrong, mut excused, mut asked) = (Vec::new(), BTreeSet::new(), 0);
    let (mut moving, mut all) = (Vec::new(), 0);
    for file in FILES {
        let dashboard = dashboard(file);
        let variables = variables(&dashboard);
        let names: Vec<String> = variables.iter().map(|variable| text(variable, "name").to_owned()).collect();
        let mut choices: Vec<Option<(String, String)>> = vec![None];
        for (variable, name) in variables.iter().zip(&names) {
            let query = text(&variable["query"], "query").strip_prefix("label_values(").unwrap();
            let values = prometheus.label_values(name, &substituted(query.rsplit_once(',').unwrap().0, None, &names));
            assert!(
                values.len() >= if matches!(name.as_str(), "job" | "instance") { 1 } else { 2 },
                "{name}: {values:?}"
            );
            choices.extend(values.into_iter().map(|value| Some((name.clone(), value))));
        }
        for panel in panels(&dashboard) {
            let title = text(&panel, "title");
            all += 1;
            let is_share = panel["fieldConfig"]["defaults"]["unit"] == "percentunit"
                && panel["fieldConfig"]["defaults"]["max"] == 1;
            for choice in &choices {
                let chosen = choice.as_ref().map(|(name, value)| (name.as_str(), value.as_str()));
                let mut series = Vec::new();
                for (query, is_instant) in queries(&panel) {
                    asked += 1;
                    let query = substituted(query, chosen, &names);
                    let ask = |query: &str| match is_instant {
                        true => prometheus.instant(query, ended),
                        false => prometheus.range(query, began + RATE as f64, ended, 1.0),
                    };
                    match ask(&query) {
                        Ok(found) => series.extend(found),
                        Err(error) => wrong.push(format!("{title} for {chosen:?}: {error}\n  {query}")),
                    }
                    // What stands in for nothing must not hide that there is nothing.
                    if chosen.is_none() && ask(without_stand_in(&query)).is_ok_and(|found| found.is_empty()) {
                        match EMPTY.iter().find(|(of, value, _)| *of == title && value.is_empty()) {
                            Some(excuse) => drop(excused.insert(excuse)),
                            None => wrong.push(format!("{title}: nothing is behind\n  {query}")),
                        }
                    }
                }
                let values: Vec<Vec<&str>> = series.iter().map(points).collect();
                if values.iter().flatten().any(|value| matches!(*value, "NaN" | "+Inf" | "-Inf")) {
                    wrong.push(format!("{title} for {chosen:?}: what it shows is no number"));
                }
                if is_share && values.iter().flatten().any(|value| value.parse::<f64>().unwrap() > 1.0) {
                    wrong.push(format!("{title} for {chosen:?}: more than all of it"));
                }
                let excuse =
                    EMPTY.iter().find(|(of, value, _)| *of == title && chosen.is_some_and(|(_, is)| is == *value));
                match (values.is_empty(), excuse) {
                    (true, None) => wrong.push(format!("{title} for {chosen:?}: it is empty")),
                    (true, Some(excuse)) => drop(excused.insert(excuse)),
                    (false, _) => {}
                }
                if chosen.is_none() {
                    let is_moving = values.iter().any(|points| points.iter().any(|point| point != &points[0]));
                    let is_instant = queries(&panel).iter().all(|(_, is_instant)| *is_instant);
                    let is_something = is_instant && values.iter().flatten().any(|value| *value != "0");
                    moving.extend((is_moving || is_something).then(|| title.to_owned()));
                }
            }
        }
    }
    println!("{asked} queries of {all} panels, {} of which moved", moving.len());
    assert!(wrong.is_empty(), "{} of {asked}:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(excused.len(), EMPTY.len(), "an excuse that nothing needs: {excused:?}");
    // Panels of trouble rest at zero in a healthy run, gauges between two looks: three quarters move all the same.
    assert!(moving.len() * 4 >= all * 3, "only {} of {all} panels moved: {moving:?}", moving.len());
}

/// A query less the zero that is shown where there is nothing.
fn without_stand_in(query: &str) -> &str {
    query.split(" or on () ").next().unwrap_or(query)
}

#[test]
fn a_gateway_that_is_gone_is_down_and_not_what_it_was() {
    let gateway = TestGateway::start();
    let prometheus = Prometheus::start(gateway.admin);
    let dashboard = dashboard("overview.json");
    let names: Vec<String> = variables(&dashboard).iter().map(|it| text(it, "name").to_owned()).collect();
    let panels = panels(&dashboard);
    let shown = |title: &str, at: f64| {
        let panel = panels.iter().find(|panel| text(panel, "title") == title).expect(title);
        let (query, is_instant) = queries(panel)[0];
        assert!(is_instant, "{title} is asked of a range, and shows its last value whatever came after it");
        let found = prometheus.instant(&substituted(query, None, &names), at).unwrap();
        found.first().map(|series| points(series)[0].to_owned())
    };
    const NOW: [&str; 5] = ["Requests", "Errors", "Duration p95", "Output", "Telemetry lost"];
    eventually("numbers", || {
        gateway.post(&chat("What is Glassgate?"));
        NOW.iter().all(|title| shown(title, now()).is_some()).then_some(())
    });
    assert_eq!(shown("Gateways down", now()).as_deref(), Some("0"));
    drop(gateway);
    eventually("a scrape that fails", || (shown("Gateways down", now()).as_deref() == Some("1")).then_some(()));
    // As it will be when what was scraped before has left the window.
    let later = now() + RATE as f64;
    for title in NOW {
        assert_eq!(shown(title, later), None, "{title}");
    }
}

/// The values of one series, whether it was asked for at one moment or over a time.
fn points(series: &Value) -> Vec<&str> {
    let values = series["values"].as_array();
    let points = values.map_or_else(|| vec![&series["value"]], |values| values.iter().collect());
    points.into_iter().map(|point| point[1].as_str().expect("a value")).collect()
}
