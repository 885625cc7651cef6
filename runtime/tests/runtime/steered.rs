//! Answers that are told with their probabilities, or kept to a form, by a real model.

use crate::support::{Answer, ask, chat, collect, endless, glimmer, greedy, settled};
use glassgate_runtime::{Constraint, FinishReason, Logprobs, Model, Refusal, Request, SamplingParams};

fn hot(model: &Model, constraint: &Constraint, seed: u64) -> Request {
    let grammar = Some(model.grammar(constraint).expect("a grammar"));
    let params = SamplingParams { temperature: 1.5, seed, grammar, ..SamplingParams::default() };
    Request { params, ..greedy(chat(model, "Extract name, age and city as JSON: I am Mina."), 120) }
}

fn schema() -> Constraint {
    Constraint::JsonSchema(
        r#"{"type":"object","properties":{"name":{"type":"string","maxLength":12},"age":{"type":"integer","minimum":0,"maximum":150},"tags":{"type":"array","items":{"enum":["a","b"]},"maxItems":2}},"required":["name","age","tags"],"additionalProperties":false}"#
            .to_owned(),
    )
}

fn check(text: &str) {
    let value: serde_json::Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    let fields = value.as_object().expect("an object");
    assert_eq!(fields.len(), 3, "{text}");
    assert!(value["name"].as_str().is_some_and(|name| name.chars().count() <= 12), "{text}");
    assert!(value["age"].as_u64().is_some_and(|age| age <= 150), "{text}");
    let tags = value["tags"].as_array().expect("a list");
    assert!(tags.len() <= 2 && tags.iter().all(|tag| tag == "a" || tag == "b"), "{text}");
}

/// Many at a time, each with a seed of its own.
async fn answers(model: &Model, constraint: &Constraint, seeds: u64) -> Vec<Answer> {
    let generations: Vec<_> =
        (0..seeds).map(|seed| model.generate(hot(model, constraint, seed)).expect("accepted")).collect();
    let mut answers = Vec::new();
    for generation in generations {
        answers.push(collect(generation).await);
    }
    answers
}

#[tokio::test]
async fn constrained_answers_keep_to_their_form_however_wild_the_model() {
    let (runtime, model) = glimmer();
    for answer in answers(&model, &schema(), 50).await {
        assert_eq!(answer.ending, Ok(FinishReason::Stop), "{}", answer.text);
        check(&answer.text);
    }
    for answer in answers(&model, &Constraint::Regex("[A-Z][a-z]{1,9}, [1-9][0-9]?".to_owned()), 50).await {
        assert_eq!(answer.ending, Ok(FinishReason::Stop), "{}", answer.text);
        let (name, age) = answer.text.split_once(", ").expect("two parts");
        assert!((2..=10).contains(&name.len()) && name.bytes().skip(1).all(|b| b.is_ascii_lowercase()), "{name}");
        assert!(age.parse::<u32>().is_ok_and(|age| (1..100).contains(&age)), "{age}");
    }
    let choices = ["긍정", "부정", "not \"sure\""];
    for answer in answers(&model, &Constraint::Choice(choices.map(str::to_owned).to_vec()), 50).await {
        assert_eq!(answer.ending, Ok(FinishReason::Stop), "{}", answer.text);
        assert!(choices.contains(&answer.text.as_str()), "{}", answer.text);
    }
    settled(&runtime).await;
}

/// A form says what is not possible; among the rest the model's own order stays.
#[tokio::test]
async fn a_form_that_allows_everything_changes_nothing() {
    let (_runtime, model) = glimmer();
    for question in ["What is Glassgate?", "이 영화 정말 재미있어요!"] {
        let free = greedy(chat(&model, question), 40);
        let mut formed = free.clone();
        formed.params.grammar = Some(model.grammar(&Constraint::Regex("(?s:.*)".to_owned())).expect("a grammar"));
        let (free, formed) = (ask(&model, free).await, ask(&model, formed).await);
        assert_eq!((free.text, free.tokens, free.ending), (formed.text, formed.tokens, formed.ending));
    }
}

#[tokio::test]
async fn a_form_that_is_not_finished_in_time_ends_for_its_length_and_one_that_is_ends_at_once() {
    let (_runtime, model) = glimmer();
    let long = Request { max_tokens: 5, ..hot(&model, &Constraint::Regex("[a-z]{500}".to_owned()), 1) };
    let answer = ask(&model, long).await;
    assert_eq!(answer.ending, Ok(FinishReason::Length));
    assert!(answer.text.bytes().all(|byte| byte.is_ascii_lowercase()));
    // Who wants to go on past the end has nothing to go on with.
    let ended = Request { ignore_eos: true, ..hot(&model, &Constraint::Choice(vec!["yes".to_owned()]), 1) };
    let answer = ask(&model, ended).await;
    assert_eq!((answer.text.as_str(), answer.ending), ("yes", Ok(FinishReason::Stop)));
}

/// Every token once, but the end token, and of the same tokens that are sampled without.
#[tokio::test]
async fn log_probabilities_come_with_their_tokens_and_change_none() {
    let (_runtime, model) = glimmer();
    for stop in [vec![], vec!["a".to_owned()], vec!["Glassgate is not".to_owned()]] {
        let plain = Request { stop, ..greedy(chat(&model, "What is Glassgate?"), 40) };
        let mut told = plain.clone();
        told.params.logprobs = Some(3);
        let (plain, told) = (ask(&model, plain).await, ask(&model, told).await);
        assert_eq!((&plain.text, &plain.tokens, &plain.ending), (&told.text, &told.tokens, &told.ending));
        assert!(plain.logprobs.concat().is_empty());
        for (tokens, logprobs) in told.tokens.iter().zip(&told.logprobs) {
            let ids: Vec<u32> = logprobs.iter().map(|told| told.id).collect();
            let shown: Vec<u32> = tokens.iter().copied().filter(|&id| model.control_token(id).is_none()).collect();
            assert_eq!(ids, shown);
        }
        for place in told.logprobs.concat() {
            assert_eq!(place.top.len(), 3);
            // Greedy: the chosen one is the likeliest.
            assert_eq!(place.top[0], (place.id, place.logprob));
            assert!(place.logprob <= 0.0 && place.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        }
    }
}

#[test]
fn a_bias_of_no_token_is_refused_by_its_number() {
    let (_runtime, model) = glimmer();
    let params = SamplingParams { logit_bias: vec![(5, 1.0), (1_000_000, 1.0)], ..SamplingParams::default() };
    let refused = model.generate(Request { params, ..greedy(vec![5], 5) }).expect_err("no such token");
    assert!(matches!(refused, Refusal::UnknownBias { id: 1_000_000, .. }), "{refused:?}");
}

fn numbers(value: &serde_json::Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect()
}

fn ids(value: &serde_json::Value) -> Vec<u32> {
    numbers(value).into_iter().map(|id| id as u32).collect()
}

#[tokio::test]
async fn scores_and_perplexities_are_those_of_transformers() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("../golden/scored.json")).expect("valid JSON");
    for name in crate::support::MODELS {
        let (runtime, model) = crate::support::serve(crate::support::settings(), name);
        for case in golden[name].as_array().expect("cases") {
            let all = ids(&case["ids"]);
            assert_eq!(model.tokenize(case["text"].as_str().expect("text")), Ok(all.clone()));
            let (prompt, continuation) = all.split_at(case["prompt_tokens"].as_u64().expect("a count") as usize);
            let scores = model.score(prompt, continuation, 1, 0).await.expect("scores");
            assert_eq!(scores.iter().map(|score| score.id).collect::<Vec<_>>(), continuation);
            for (score, want) in scores.iter().zip(numbers(&case["logprobs"])) {
                assert!((f64::from(score.logprob) - want).abs() < 1e-3, "{score:?}, not {want}");
            }
            let top: Vec<u32> = scores.iter().map(|score| score.top[0].0).collect();
            assert_eq!(top, ids(&case["top"]));
            let mean = scores.iter().map(|score| f64::from(score.logprob)).sum::<f64>() / scores.len() as f64;
            let (perplexity, want) = ((-mean).exp(), case["perplexity"].as_f64().expect("a number"));
            assert!((perplexity / want - 1.0).abs() < 1e-3, "{perplexity}, not {want}");
        }
        settled(&runtime).await;
    }
}

/// In chunks of any size, beside whoever else is there, and as often as one likes: the same bits.
#[tokio::test]
async fn scores_are_the_same_however_they_are_computed() {
    let text = "Count: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20, and then 21 22 23 24 25. Tom is 24.";
    let scores = async |prefill_chunk: usize, crowd: usize| -> Vec<Logprobs> {
        let settings = glassgate_runtime::Settings { prefill_chunk, ..crate::support::settings() };
        let (_runtime, model) = crate::support::serve(settings, "glimmer-2");
        let all = model.tokenize(text).expect("ids");
        let others: Vec<_> =
            (0..crowd).map(|_| model.generate(endless(chat(&model, "hi"), 60)).expect("accepted")).collect();
        let (first, second) =
            tokio::join!(model.score(&all[..1], &all[1..], 1, 0), model.score(&all[..9], &all[9..], 1, 1));
        drop(others);
        let (first, second) = (first.expect("scores"), second.expect("scores"));
        assert_eq!(first[8..], second);
        first
    };
    let want = scores(128, 0).await;
    for (chunk, crowd) in [(1, 0), (7, 3), (32, 8)] {
        assert_eq!(scores(chunk, crowd).await, want, "chunks of {chunk}, {crowd} beside");
    }
}

/// Nor does what is found in the cache change them, and what others left there stays.
#[tokio::test]
async fn scores_are_apart_from_the_prefix_cache() {
    // Sixteen blocks of 32 tokens.
    let settings = glassgate_runtime::Settings { kv_bytes: 16 * 65_536, ..crate::support::settings() };
    let (runtime, model) = crate::support::serve(settings, "glimmer-2");
    let prompt = vec![5; 129];
    let want = model.score(&prompt, &[7, 8, 9], 1, 0).await.expect("scores");
    assert_eq!(runtime.report().models[0].kv_blocks_cached, 0);
    ask(&model, greedy(prompt.clone(), 1)).await;
    for n in 0..10 {
        assert_eq!(model.score(&prompt, &[7, 8, 9], 1, 0).await.expect("scores"), want);
        model.score(&[20 + n; 100], &[7], 1, 1).await.expect("a score");
    }
    assert_eq!(ask(&model, greedy(prompt, 1)).await.timeline.cached_tokens, 128);
    settled(&runtime).await;
}

#[tokio::test]
async fn what_cannot_be_scored_is_refused() {
    let (_runtime, model) = glimmer();
    let refused = async |prompt: &[u32], continuation: &[u32]| {
        model.score(prompt, continuation, 1, 0).await.expect_err("a refusal").to_string()
    };
    assert!(refused(&[], &[1]).await.contains("empty"));
    assert!(refused(&[1], &[1_000_000]).await.contains("1000000"));
    assert!(refused(&[1, 1_000_000], &[1]).await.contains("1000000"));
    let context = model.context() as usize;
    assert!(refused(&[5], &vec![5; context]).await.contains("context"));
    assert_eq!(model.score(&[1], &[], 1, 0).await, Ok(Vec::new()));
    assert_eq!(model.score(&[5], &vec![5; context - 1], 1, 0).await.map(|scores| scores.len()), Ok(context - 1));
}
