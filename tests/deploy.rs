//! `deploy/` holds together: what refers to a file, a port or a name refers to one that is there.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::root;

fn yaml(path: &str) -> Value {
    let text = std::fs::read(root().join("deploy").join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    serde_yaml_ng::from_slice(&text).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn list(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

fn succeeds(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).current_dir(root()).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; `tools/setup.sh test` installs it"));
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{program} {args:?}:\n{}", String::from_utf8_lossy(&said));
}

#[test]
fn prometheus_and_alertmanager_take_their_configuration() {
    succeeds("promtool", &["check", "config", "deploy/prometheus.yml"]);
    succeeds("amtool", &["check-config", "deploy/alertmanager.yml"]);
}

#[test]
fn every_alert_fires_when_it_should_and_is_silent_when_it_should_be() {
    succeeds("promtool", &["test", "rules", "deploy/rules_test.yml", "deploy/rules_weeks_test.yml"]);
    let rules = yaml("rules.yml");
    let groups = rules["groups"].as_array().unwrap().iter();
    let rules: Vec<&Value> = groups.flat_map(|group| group["rules"].as_array().unwrap()).collect();
    let alerts: BTreeSet<&str> = rules.iter().filter_map(|rule| rule["alert"].as_str()).collect();
    let (tests, weeks) = (yaml("rules_test.yml"), yaml("rules_weeks_test.yml"));
    let (good, bad) = tests["tests"].as_array().unwrap().split_first().unwrap();
    let fired: BTreeSet<String> = bad
        .iter()
        .chain(weeks["tests"].as_array().unwrap())
        .flat_map(|test| test["promql_expr_test"].as_array().unwrap())
        .flat_map(|check| check["exp_samples"].as_array().unwrap())
        .filter_map(|sample| sample["labels"].as_str().unwrap().strip_prefix("{alertname=\""))
        .map(|rest| rest.split('"').next().unwrap().to_owned())
        .collect();
    assert_eq!(fired.iter().map(String::as_str).collect::<BTreeSet<_>>(), alerts, "each alert is seen to fire");
    // Silence means something only where there is what an alert looks at.
    let there = good["input_series"].to_string();
    for rule in rules.iter().filter(|rule| rule["alert"].is_string()) {
        let expr = rule["expr"].as_str().unwrap();
        let is_name = |c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':');
        let names = expr.split(is_name).filter(|name| name.starts_with("gateway_") || name.starts_with("runtime_"));
        for name in names {
            assert!(there.contains(name), "{}: the good day has no {name}", rule["alert"]);
        }
        for name in ["summary", "do"] {
            assert!(rule["annotations"][name].is_string(), "{} does not say {name}", rule["alert"]);
        }
    }
}

#[test]
fn what_compose_starts_finds_its_files_its_ports_and_each_other() {
    let compose = yaml("compose.yaml");
    let services = compose["services"].as_object().unwrap();
    assert_eq!(services.keys().collect::<Vec<_>>(), ["network", "glassgate", "prometheus", "alertmanager", "grafana"]);
    let volumes: BTreeSet<&String> = compose["volumes"].as_object().unwrap().keys().collect();
    for (name, service) in services {
        assert_eq!(service["restart"], "unless-stopped", "{name}");
        for mount in list(&service["volumes"]) {
            let from = mount.split(':').next().unwrap();
            let is_there = from.starts_with('.') && root().join("deploy").join(from).exists();
            assert!(is_there || volumes.contains(&from.to_owned()), "{name}: {mount}");
        }
        for (other, _) in service["depends_on"].as_object().into_iter().flatten() {
            assert!(services.contains_key(other), "{name} waits for {other}");
        }
        if let Some(image) = service["image"].as_str() {
            let version = image.split_once(':').map(|(_, version)| version.trim_start_matches('v')).unwrap_or_default();
            assert_eq!(
                version.split('.').filter(|part| part.parse::<u32>().is_ok()).count(),
                3,
                "{image} is not pinned"
            );
        }
        // The one that owns the network has nothing that could fail, and whoever else ends takes nobody along.
        if name != "network" {
            assert!(service["healthcheck"]["test"].is_array(), "{name} has no health check");
            assert_eq!(service["network_mode"], "service:network", "{name} is not where /metrics can be read");
            assert!(service["depends_on"]["glassgate"].is_null(), "{name} must show that the gateway does not start");
        }
    }
    assert_eq!(list(&services["network"]["command"]), ["sleep", "infinity"]);
    let build = &compose["services"]["glassgate"]["build"];
    assert!(
        root()
            .join("deploy")
            .join(build["context"].as_str().unwrap())
            .join(build["dockerfile"].as_str().unwrap())
            .exists()
    );

    // Each listens where the next one looks, and what is published is for this machine.
    let ports: Vec<&str> = list(&compose["services"]["network"]["ports"]);
    assert!(ports.iter().all(|port| port.starts_with("127.0.0.1:")), "{ports:?}");
    let is_published = |port: &str| ports.contains(&format!("127.0.0.1:{port}:{port}").as_str());
    let prometheus = yaml("prometheus.yml");
    let datasource = &yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"][0];
    let gateway: toml::Table = std::fs::read_to_string(root().join("configs/gateway.toml")).unwrap().parse().unwrap();
    let target = prometheus["scrape_configs"][0]["static_configs"][0]["targets"][0].as_str();
    assert_eq!(target, gateway["listen"]["admin"].as_str(), "Prometheus scrapes the admin listener");
    assert_eq!(prometheus["scrape_configs"][0]["job_name"], "glassgate");
    assert!(!is_published("8081"), "the admin listener is nobody else's");
    let command = |name: &str| list(&compose["services"][name]["command"]).join(" ");
    let alertmanager = prometheus["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"][0].as_str().unwrap();
    // Compose and the demo tell Grafana the same: where Prometheus is, and which folder holds the dashboards.
    let demo = std::fs::read_to_string(root().join("tools/demo.sh")).unwrap();
    let told = |named: &Value| {
        let variable = named.as_str().unwrap().trim_start_matches('$');
        assert!(demo.contains(&format!("{variable}=")), "tools/demo.sh does not set {variable}");
        compose["services"]["grafana"]["environment"][variable].as_str().unwrap()
    };
    let asked = told(&datasource["url"]).trim_start_matches("http://");
    for (name, address) in [("prometheus", asked), ("alertmanager", alertmanager)] {
        let (host, port) = address.split_once(':').unwrap();
        assert_eq!(host, "127.0.0.1");
        assert!(
            command(name).contains(&format!("--web.listen-address=0.0.0.0:{port}")) && is_published(port),
            "{name}"
        );
    }
    assert!(is_published("3000") && is_published("8080"));
    let interval = datasource["jsonData"]["timeInterval"].as_str();
    assert_eq!(interval, prometheus["global"]["scrape_interval"].as_str(), "$__rate_interval is chosen by it");

    // The folder holds nothing else that looks like a dashboard.
    let provider = &yaml("grafana/provisioning/dashboards/glassgate.yaml")["providers"][0];
    let folder = told(&provider["options"]["path"]);
    let mount = format!("../dashboards:{folder}:ro");
    assert!(list(&compose["services"]["grafana"]["volumes"]).contains(&mount.as_str()), "{mount}");
    assert_eq!(
        json_files(&root().join("dashboards")),
        ["cost.json", "engine.json", "overview.json"].map(str::to_owned).into()
    );
    assert_eq!(provider["allowUiUpdates"], false);
}

fn json_files(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found = BTreeSet::new();
    for path in entries {
        if path.is_dir() {
            found.extend(json_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "json") {
            found.insert(path.file_name().unwrap().to_string_lossy().into_owned());
        }
    }
    found
}

#[test]
fn the_image_copies_what_is_there_and_starts_what_there_is() {
    let text = std::fs::read_to_string(root().join("deploy/Dockerfile")).unwrap();
    let copied = text.lines().filter_map(|line| line.strip_prefix("COPY ")).filter(|line| !line.starts_with("--from"));
    for from in copied.map(|line| line.split(' ').next().unwrap()) {
        assert!(root().join(from).exists(), "{from}");
    }
    let built: Vec<&str> = text.lines().filter(|line| line.starts_with("FROM rust:")).collect();
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let version = manifest.split("rust-version = \"").nth(1).unwrap().split('"').next().unwrap();
    assert_eq!(built, [format!("FROM rust:{version}-bookworm AS build")]);
    assert!(text.contains("\"--config\", \"configs/gateway.toml\""));
}
