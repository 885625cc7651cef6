//! Where models come from, and what they may bring: with the real program, whose child looks at them first.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::gateway::Setup;
use crate::support::root;

/// A copy of a bundled model, to be changed.
pub fn copy(setup: &Setup, name: &str) -> PathBuf {
    let folder = setup.0.path().join("more").join(name);
    std::fs::create_dir_all(&folder).unwrap();
    for entry in std::fs::read_dir(root().join("models/glimmer-2")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    folder
}

pub fn with_template(folder: &Path, template: &str) {
    let path = folder.join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["chat_template"] = template.into();
    std::fs::write(path, config.to_string()).unwrap();
}

fn check(setup: &Setup) -> (bool, String) {
    let output = setup.run(&["check"]);
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

/// Doubling a string a hundred times takes few instructions and no machine's memory. One that waits for a talk of another
/// kind than those is not found.
#[test]
fn a_template_that_asks_for_all_memory_in_a_talk_of_up_to_five_turns_ends_a_child_and_not_the_gateway() {
    let doubling =
        "{% set s = namespace(x='xxxxxxxx') %}{% for i in range(100) %}{% set s.x = s.x ~ s.x %}{% endfor %}";
    let only_in_long_talks = format!("{{% if messages | length > 3 %}}{doubling}{{% endif %}}x");
    for template in [doubling, only_in_long_talks.as_str()] {
        let setup = Setup::shipped();
        let folder = copy(&setup, "bomb");
        with_template(&folder, template);
        setup.env("MODEL_PATH", setup.0.path().join("more").to_str().unwrap());
        setup.replace("routes.toml", "source = \"glimmer-2\"", "source = \"bomb\"");
        let began = Instant::now();
        let (fine, said) = check(&setup);
        assert!(!fine && said.contains("bomb") && said.contains("GiB of memory"), "{said}");
        assert!(said.contains("model glimmer-1: ready"), "{said}");
        assert!(began.elapsed() < Duration::from_secs(60));
    }
}

#[test]
fn a_template_that_multiplies_or_never_ends_is_refused_in_words() {
    for (template, says) in [
        ("{{ 'x' * 10 ** 9 }}", "too large"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "does not work"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "does not work"),
        (
            "{{ [[1] * 99999] * 99999 | length }}{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
            "does not work",
        ),
    ] {
        let setup = Setup::shipped();
        with_template(&copy(&setup, "odd"), template);
        setup.env("MODEL_PATH", setup.0.path().join("more").to_str().unwrap());
        setup.replace("routes.toml", "source = \"glimmer-2\"", "source = \"odd\"");
        let (fine, said) = check(&setup);
        assert!(!fine && said.contains("tokenizer_config.json") && said.contains(says), "{template}: {said}");
    }
}

#[test]
fn a_gguf_file_in_a_folder_of_model_path_serves() {
    let setup = Setup::shipped();
    let more = setup.0.path().join("more");
    std::fs::create_dir(&more).unwrap();
    std::fs::copy(root().join("runtime/tests/formats/bytes.gguf"), more.join("tiny.gguf")).unwrap();
    setup.env("MODEL_PATH", &format!("{}:{}", setup.0.path().join("none").display(), more.display()));
    setup.replace("routes.toml", "source = \"glimmer-2\"", "source = \"tiny.gguf\"");
    let (fine, said) = check(&setup);
    assert!(fine && said.contains("model glimmer-2: ready"), "{said}");
}

#[test]
fn a_source_on_the_hub_is_checked_without_a_download() {
    let setup = Setup::shipped();
    setup.env("HF_ENDPOINT", "http://127.0.0.1:9");
    setup.replace("routes.toml", "source = \"glimmer-2\"", "source = \"hf://org/name@main\"");
    let (fine, said) = check(&setup);
    assert!(!fine && said.contains("glassgate models pull hf://org/name@main"), "{said}");
    setup.replace("routes.toml", "hf://org/name@main", "hf://org/../name");
    let (fine, said) = check(&setup);
    assert!(!fine && said.contains("routes.toml:7") && said.contains("is no model on the hub"), "{said}");
}
