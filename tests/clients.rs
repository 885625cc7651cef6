//! The official OpenAI client for Python, against the real gateway.

use std::process::Command;

use crate::embeddings;
use crate::support::gateway::append;
use crate::support::root;
use crate::support::upstream::Upstream;

#[test]
fn the_official_python_client_streams_asks_and_reads_errors() {
    let venv = std::env::var("GLASSGATE_CLIENTS")
        .expect("GLASSGATE_CLIENTS names the venv; `make test` makes it and sets this");
    let (upstream, setup) = (Upstream::start(), embeddings::setup());
    setup.add_upstream("mock", &upstream.url(), "remote-model");
    append(&setup.path("routes.toml"), "\n[routes.remote]\nsplit = { remote-model = 1 }\n");
    let gateway = setup.start();
    let limited = gateway.cli(&["keys", "create", "limited", "--rpm", "1"]);
    let patient = gateway.cli(&["keys", "create", "patient", "--rpm", "30"]);
    let broke = gateway.cli(&["keys", "create", "broke", "--usd-per-day", "0"]);
    let output = Command::new(format!("{venv}/bin/python"))
        .arg(root().join("tests/clients/openai_client.py"))
        .env("OPENAI_BASE_URL", format!("http://{}/v1", gateway.data))
        .env("OPENAI_API_KEY", &gateway.key)
        .env("LIMITED_KEY", limited.trim())
        .env("PATIENT_KEY", patient.trim())
        .env("BROKE_KEY", broke.trim())
        .output()
        .expect("the venv has a python");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}\n{stderr}");
    assert!(stdout.trim_end().ends_with("20 checks passed"), "{stdout}");
    let denied = gateway.metric("gateway_limit_decisions_total", &["kind=\"budget\"", "decision=\"denied\""]);
    assert_eq!(denied, 1.0, "it took `x-should-retry: false` at its word");
}
