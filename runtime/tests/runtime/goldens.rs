//! Text in, text out, as transformers does it.

use crate::support::{MODELS, ask, golden_text, greedy, messages, serve, settings};
use glassgate_runtime::{FinishReason, Settings};

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[test]
fn the_tokenizer_gives_the_ids_of_transformers() {
    for name in MODELS {
        let (_runtime, model) = serve(settings(), name);
        let golden = golden_text();
        for case in golden["tokens"].as_array().expect("cases") {
            let text = case["text"].as_str().expect("text");
            assert_eq!(model.tokenize(text), Ok(ids(&case["ids"])), "{text:?}");
        }
    }
}

#[test]
fn chat_prompts_and_their_ids_are_those_of_transformers() {
    for name in MODELS {
        let (_runtime, model) = serve(settings(), name);
        for case in golden_text()["chats"].as_array().expect("cases") {
            let prompt = model.prompt(&messages(&case["messages"])).expect("a prompt");
            assert_eq!(prompt, case["prompt"].as_str().expect("prompt"));
            assert_eq!(model.tokenize(&prompt), Ok(ids(&case["ids"])), "{prompt:?}");
        }
    }
}

/// In the configuration that is served by default.
#[tokio::test]
async fn greedy_answers_are_those_of_transformers() {
    for name in MODELS {
        let (_runtime, model) = serve(Settings::default(), name);
        for case in golden_text()["greedy"][name].as_array().expect("cases") {
            let prompt = model.tokenize(&model.prompt(&messages(&case["messages"])).expect("a prompt")).expect("ids");
            let want = ids(&case["ids"]);
            let answer = ask(&model, greedy(prompt, 48)).await;
            assert_eq!(answer.text, case["text"].as_str().expect("text"));
            assert_eq!(answer.tokens.concat(), want);
            let reason = if want.len() == 48 { FinishReason::Length } else { FinishReason::Stop };
            assert_eq!(answer.ending, Ok(reason));
        }
    }
}
