//! Models whose weights are made smaller while they are read.

use crate::support::{ask, folder, greedy, messages, serve_as, settings};
use glassgate_runtime::{FinishReason, LoadOptions, Quantize};
use serde_json::Value;

/// Every eighth task of the evaluation set, and the share (per cent) of them that is answered exactly.
async fn accuracy(quantize: Option<Quantize>) -> u32 {
    let (_runtime, model) = serve_as(settings(), "glimmer-2", LoadOptions { quantize, ..LoadOptions::default() });
    let tasks = std::fs::read_to_string(folder("eval.jsonl")).expect("the evaluation set");
    let (mut asked, mut right) = (0, 0);
    for task in tasks.lines().step_by(8) {
        let task: Value = serde_json::from_str(task).expect("valid JSON");
        let prompt = model.prompt(&messages(&task["messages"])).expect("a prompt");
        let answer = ask(&model, greedy(model.tokenize(&prompt).expect("ids"), 96)).await;
        asked += 1;
        right +=
            u32::from(answer.ending == Ok(FinishReason::Stop) && answer.text == task["answer"].as_str().unwrap_or(""));
    }
    100 * right / asked
}

#[tokio::test]
async fn glimmer_answers_as_well_in_8_bits_and_nearly_as_well_in_4() {
    let plain = accuracy(None).await;
    let (eight, four) = (accuracy(Some(Quantize::Q8_0)).await, accuracy(Some(Quantize::Q4K)).await);
    assert!(plain >= 90, "plain: {plain} %");
    assert!(eight + 1 >= plain, "q8_0: {eight} %, plain: {plain} %");
    assert!(four + 6 >= plain, "q4_k: {four} %, plain: {plain} %");
}

#[test]
fn the_report_says_what_became_of_the_weights() {
    let kinds = |name, quantize| {
        let (runtime, model) = serve_as(settings(), name, LoadOptions { quantize, ..LoadOptions::default() });
        let report = runtime.report().models.remove(0);
        assert_eq!(model.digest(), report.digest);
        let kinds: Vec<&str> = report.weights.iter().map(|weights| weights.kind).collect();
        assert!(report.weights.iter().map(|weights| weights.bytes).sum::<u64>() < report.memory.weights);
        (kinds, report.exceptions, report.memory.weights, report.digest)
    };
    let (plain, _, bytes, digest) = kinds("glimmer-2", None);
    assert_eq!(plain, ["bf16"]);
    let (eight, exceptions, eight_bytes, eight_digest) = kinds("glimmer-2", Some(Quantize::Q8_0));
    assert_eq!((eight, exceptions), (vec!["q8_0"], vec![]));
    let (four, exceptions, four_bytes, four_digest) = kinds("glimmer-2", Some(Quantize::Q4K));
    assert_eq!((four, exceptions), (vec!["q8_0", "q4_k"], vec![]));
    assert!(four_bytes < eight_bytes && eight_bytes < bytes * 6 / 10, "{four_bytes}, {eight_bytes}, {bytes}");
    assert!(digest != eight_digest && eight_digest != four_digest && four_digest != digest);
}
