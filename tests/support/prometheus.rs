//! A Prometheus of a test's own: the real program, a free port, the shipped configuration at a quicker pace.

use std::fs::File;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tempfile::TempDir;

use super::{eventually, http, root};

pub struct Prometheus {
    folder: TempDir,
    child: Child,
    address: SocketAddr,
}

impl Prometheus {
    /// Scrapes `target` and evaluates the shipped rules every second.
    pub fn start(target: SocketAddr) -> Prometheus {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let shipped = std::fs::read_to_string(root().join("deploy/prometheus.yml")).unwrap();
        for part in ["127.0.0.1:8081", "scrape_interval: 5s", "evaluation_interval: 5s"] {
            assert!(shipped.contains(part), "prometheus.yml has no {part:?}");
        }
        let config = shipped.replace("127.0.0.1:8081", &target.to_string()).replace("_interval: 5s", "_interval: 1s");
        // Nobody is to be told of what a test breaks.
        let alerting = config.find("alerting:").unwrap()..config.find("scrape_configs:").unwrap();
        let config = [&config[..alerting.start], &config[alerting.end..]].concat();
        std::fs::write(folder.path().join("prometheus.yml"), config).unwrap();
        // What spans days is evaluated less often, but not too rarely for a test.
        let rules = std::fs::read_to_string(root().join("deploy/rules.yml")).unwrap();
        assert!(rules.contains(" interval: 1m\n"));
        std::fs::write(folder.path().join("rules.yml"), rules.replace(" interval: 1m\n", " interval: 1s\n")).unwrap();
        let log = folder.path().join("log");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", folder.path().join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg("--web.listen-address=127.0.0.1:0")
            .stdout(Stdio::null())
            .stderr(Stdio::from(File::create(&log).unwrap()))
            .stdin(Stdio::null())
            .spawn()
            .expect("prometheus is installed; `tools/setup.sh test` does that");
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut prometheus = Prometheus { folder, child, address: nowhere };
        prometheus.address = eventually("Prometheus to listen", || {
            let log = std::fs::read_to_string(prometheus.folder.path().join("log")).ok()?;
            if let Some(status) = prometheus.child.try_wait().unwrap() {
                panic!("Prometheus ended with {status}:\n{log}");
            }
            log.lines()
                .find(|line| line.contains("Listening on"))?
                .rsplit_once("address=")?
                .1
                .trim_matches('"')
                .parse()
                .ok()
        });
        eventually("a first scrape", || (!prometheus.instant("up == 1", now()).ok()?.is_empty()).then_some(()));
        prometheus
    }

    /// The series of a query from one moment to another, as Prometheus gives them.
    ///
    /// # Errors
    /// What it says is wrong with the query.
    pub fn range(&self, query: &str, start: f64, end: f64, step: f64) -> Result<Vec<Value>, String> {
        self.ask(
            "query_range",
            &[("query", query), ("start", &start.to_string()), ("end", &end.to_string()), ("step", &step.to_string())],
        )
    }

    /// The same at one moment.
    ///
    /// # Errors
    /// What it says is wrong with the query.
    pub fn instant(&self, query: &str, at: f64) -> Result<Vec<Value>, String> {
        self.ask("query", &[("query", query), ("time", &at.to_string())])
    }

    /// The values that a label has.
    pub fn label_values(&self, label: &str, selector: &str) -> Vec<String> {
        let found = self.ask(&format!("label/{label}/values"), &[("match[]", selector)]).unwrap();
        found.iter().map(|value| value.as_str().unwrap().to_owned()).collect()
    }

    fn ask(&self, path: &str, fields: &[(&str, &str)]) -> Result<Vec<Value>, String> {
        let fields: Vec<String> =
            fields.iter().map(|(name, value)| format!("{}={}", escape(name), escape(value))).collect();
        let request = http::get(&format!("/api/v1/{path}?{}", fields.join("&")), None);
        let answer = http::raw(self.address, &request).map_err(|error| error.to_string())?.finish();
        // It listens before it has read what it knows.
        if answer.status == 503 {
            return Err("it is not ready".into());
        }
        let answer = answer.json();
        if answer["status"] != "success" {
            return Err(answer["error"].to_string());
        }
        let data = &answer["data"];
        Ok(data["result"].as_array().or(data.as_array()).cloned().unwrap_or_default())
    }
}

/// Unix seconds.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

fn escape(text: &str) -> String {
    let keep = |byte: &u8| byte.is_ascii_alphanumeric();
    text.bytes().map(|byte| if keep(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
