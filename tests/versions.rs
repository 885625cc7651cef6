//! Model versions come and go while the gateway serves; what cannot fit is refused before it is read.

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::gateway::{Setup, TestGateway, chat_with, long, replace};

/// Both models by their own names, with long answers. `keys`: under `[models]`.
fn gateway(keys: &str) -> TestGateway {
    let setup = Setup::shipped();
    setup.replace("gateway.toml", "device = \"auto\"", &format!("device = \"auto\"\nthreads = 1\n{keys}"));
    for model in ["glimmer-1", "glimmer-2"] {
        let source = format!("source = \"{model}\"");
        setup.replace("routes.toml", &source, &format!("{source}\npublic = true\noutput_max = 2000"));
    }
    setup.start()
}

fn of(model: &str, mut request: Value) -> Value {
    request["model"] = model.into();
    request
}

/// What `glassgate models status --json` says of each model: name, state, digest.
fn status(gateway: &TestGateway) -> Vec<(String, String, String)> {
    let told: Value = serde_json::from_str(&gateway.cli(&["models", "status", "--json"])).unwrap();
    let word = |model: &Value, name: &str| model[name].as_str().unwrap().to_owned();
    let models = told["models"].as_array().unwrap().iter();
    models.map(|model| (word(model, "name"), word(model, "state"), word(model, "digest"))).collect()
}

/// The name glimmer-1 now means the other model's files.
fn swap(gateway: &TestGateway) {
    replace(&gateway.config("routes.toml"), "source = \"glimmer-1\"", "source = \"glimmer-2\"");
    assert_eq!(gateway.admin("POST", "/admin/reload").status, 200);
}

#[test]
fn a_new_version_takes_over_at_a_reload_and_the_old_one_finishes_its_streams() {
    let gateway = gateway("");
    let before = status(&gateway);
    assert!(before.iter().all(|(_, state, digest)| state == "ready" && digest.len() == 64), "{before:?}");
    let mut stream = gateway.open(&gateway.chat_bytes(&of("glimmer-1", long(1500)), &[]));
    stream.chunk().unwrap();
    swap(&gateway);
    let now = status(&gateway);
    let of_name = |name: &str| now.iter().filter(|model| model.0 == name).cloned().collect::<Vec<_>>();
    let [old, new] = of_name("glimmer-1").try_into().expect("two versions at once");
    assert_eq!((old.1.as_str(), &old.2), ("draining", &before.iter().find(|model| model.0 == "glimmer-1").unwrap().2));
    assert_eq!((new.1.as_str(), &new.2), ("ready", &of_name("glimmer-2")[0].2));
    let state =
        |state: &str| gateway.metric("runtime_model_state", &["model=\"glimmer-1\"", &format!("state=\"{state}\"")]);
    assert_eq!((state("draining"), state("ready")), (1.0, 1.0));
    let weights =
        |name: &str| gateway.metric("runtime_model_memory_bytes", &[&format!("model=\"{name}\""), "part=\"weights\""]);
    assert_eq!(weights("glimmer-1"), 2.0 * weights("glimmer-2"), "memory is counted until it is free");

    // New requests meet the new version, which can do this sum.
    let answer = gateway.post(&of("glimmer-1", chat_with("What is 47 plus 38?", json!({}))));
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "85");
    let whole = stream.finish();
    let chunks = whole.chunks();
    let reasons: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).collect();
    assert!(reasons.contains(&&json!("length")), "the old version says all it had to: {:?}", chunks.last());
    eventually("the old version to be unloaded", || (status(&gateway).len() == 2).then_some(()));
    assert_eq!((state("draining"), state("ready")), (0.0, 1.0));
}

#[test]
fn a_stream_that_outlives_the_drain_of_its_model_is_cut_with_words() {
    let gateway = gateway("drain = \"50ms\"\n");
    let mut stream = gateway.open(&gateway.chat_bytes(&of("glimmer-1", long(1900)), &[]));
    stream.chunk().unwrap();
    swap(&gateway);
    let events = stream.finish().events();
    let error = events.iter().find(|event| event.contains("\"error\"")).expect("an error in the stream");
    assert!(error.contains("glimmer-1"), "{error}");
    eventually("the old version to be unloaded", || (status(&gateway).len() == 2).then_some(()));
}

#[test]
fn a_model_that_cannot_fit_rejects_the_reload_and_what_serves_goes_on() {
    // Two of about 45 MiB each, and no third.
    let gateway = gateway("memory_max = \"110MiB\"\n");
    let before = status(&gateway);
    let routes = gateway.config("routes.toml");
    replace(&routes, "[models.glimmer-2]", "[models.third]\nsource = \"glimmer-2\"\n\n[models.glimmer-2]");
    let reload = gateway.admin("POST", "/admin/reload");
    assert_eq!(reload.status, 422);
    let said = reload.json()["problems"].to_string();
    assert!(
        said.contains("model `third`") && said.contains("of the 110.0 MiB that models may take are free"),
        "{said}"
    );
    assert_eq!(status(&gateway), before, "nothing else has changed");
    assert_eq!(gateway.post(&of("glimmer-1", chat_with("12 + 34 = ?", json!({})))).status, 200);
    assert!(gateway.cli(&["models", "status"]).contains("of 110.0 MiB that models may take"));
}
