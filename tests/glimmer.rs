//! The bundled models as a client meets them: the tokens of transformers, and the accuracy that their card claims.

use std::collections::BTreeMap;
use std::thread;

use serde_json::{Value, json};

use crate::support::gateway::{Setup, TestGateway};
use crate::support::http::Response;
use crate::support::root;

const MODELS: [&str; 2] = ["glimmer-1", "glimmer-2"];
/// Requests under way at a time, so that the engine has batches to make.
const CLIENTS: usize = 8;

/// The shipped configuration, with both versions to be asked by their own names, as often as one likes.
fn gateway() -> TestGateway {
    let setup = Setup::shipped();
    for model in MODELS {
        let source = format!("source = \"{model}\"");
        setup.replace("routes.toml", &source, &format!("public = true\n{source}"));
    }
    setup.replace("gateway.toml", "requests_per_minute = 600", "requests_per_minute = 1_000_000");
    setup.start()
}

/// Asks for each item, `CLIENTS` at a time, and gives the answers in their order.
fn ask_all<T: Sync>(gateway: &TestGateway, items: &[T], request: impl Fn(usize, &T) -> Value + Sync) -> Vec<Response> {
    let ask = |client: usize| {
        let of_client = items.iter().enumerate().skip(client).step_by(CLIENTS);
        of_client.map(|(index, item)| (index, gateway.post(&request(index, item)))).collect::<Vec<_>>()
    };
    let mut answers: Vec<(usize, Response)> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|client| scope.spawn(move || ask(client))).collect();
        clients.into_iter().flat_map(|client| client.join().expect("no client fails")).collect()
    });
    answers.sort_by_key(|(index, _)| *index);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

/// The ids that an answer tells of its prompt and of itself.
fn ids(answer: &Response, is_stream: bool) -> (Value, Vec<Value>) {
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    if !is_stream {
        let body = answer.json();
        let tokens = body["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default();
        return (body["prompt_token_ids"].clone(), tokens);
    }
    let chunks = answer.chunks();
    let pieces = chunks.iter().filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array());
    (chunks[0]["prompt_token_ids"].clone(), pieces.flatten().cloned().collect())
}

/// What `python -m models.train goldens` wrote.
#[test]
fn greedy_answers_through_v1_have_the_tokens_of_transformers() {
    let path = root().join("runtime/tests/golden/served.json");
    let golden: BTreeMap<String, Vec<Value>> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(golden.keys().collect::<Vec<_>>(), MODELS.iter().collect::<Vec<_>>());
    let gateway = gateway();
    for (model, cases) in &golden {
        assert_eq!(cases.len(), 100);
        let is_stream = |index: usize| index % 2 == 1;
        let answers = ask_all(&gateway, cases, |index, case| {
            json!({"model": model, "messages": case["messages"], "temperature": 0, "max_tokens": 48,
                   "return_token_ids": true, "stream": is_stream(index)})
        });
        for (index, (case, answer)) in cases.iter().zip(&answers).enumerate() {
            let (prompt, tokens) = ids(answer, is_stream(index));
            assert_eq!(prompt, case["prompt_token_ids"], "{model}: {}", case["messages"]);
            assert_eq!(json!(tokens), case["token_ids"], "{model}: {}", case["messages"]);
        }
        let label = format!("model=\"{model}\"");
        let steps = |batch: &str| gateway.metric("runtime_batch_size_bucket", &[&label, batch]);
        assert!(steps("le=\"+Inf\"") > steps("le=\"1\""), "nothing was batched");
    }
}

/// Right answers of all, by (family, language), with "all" for either.
type Scores = BTreeMap<(String, String), (u32, u32)>;

fn percent(scores: &Scores, family: &str, language: &str) -> f64 {
    let (right, all) = scores[&(family.to_owned(), language.to_owned())];
    100.0 * f64::from(right) / f64::from(all)
}

fn score(gateway: &TestGateway, model: &str, cases: &[Value]) -> Scores {
    let answers = ask_all(
        gateway,
        cases,
        |_, case| json!({"model": model, "messages": case["messages"], "temperature": 0, "max_tokens": 64}),
    );
    let mut scores = Scores::new();
    for (case, answer) in cases.iter().zip(&answers) {
        assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
        let is_right = answer.json()["choices"][0]["message"]["content"] == case["answer"];
        for family in [&case["family"], &json!("all")] {
            for language in [&case["lang"], &json!("all")] {
                let name = |value: &Value| value.as_str().unwrap().to_owned();
                let (right, all) = scores.entry((name(family), name(language))).or_default();
                *right += u32::from(is_right);
                *all += 1;
            }
        }
    }
    scores
}

/// The card's table: the percentages of a family, by column.
fn card(family: &str) -> BTreeMap<String, f64> {
    let text = std::fs::read_to_string(root().join("models/README.md")).unwrap();
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let table: Vec<Vec<String>> =
        text.lines().skip_while(|line| !line.starts_with("| family | glimmer-1 en")).map(cells).collect();
    let row = table.iter().find(|row| row.get(1).is_some_and(|name| name == family)).expect("a row of the card");
    let columns = table[0].iter().zip(row).skip(2);
    columns.filter_map(|(column, cell)| Some((column.clone(), cell.strip_suffix(" %")?.parse().ok()?))).collect()
}

#[test]
fn the_versions_are_as_accurate_through_v1_as_their_card_says() {
    let text = std::fs::read_to_string(root().join("models/eval.jsonl")).unwrap();
    let cases: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(cases.len(), 800);
    let gateway = gateway();
    for model in MODELS {
        let scores = score(&gateway, model, &cases);
        assert_eq!(scores.len(), 9 * 3, "eight families and all, in two languages and both");
        for ((family, language), (right, all)) in &scores {
            let claimed = card(family)[&format!("{model} {language}")] / 100.0 * f64::from(*all);
            println!("{model} {family:<10} {language:<3} {right} of {all}, claimed {claimed:.1}");
            let is_near = (f64::from(*right) - claimed.round()).abs() <= 1.0;
            assert!(is_near, "{model} {family} {language}: {right} of {all} are right, and the card says {claimed:.1}");
        }
        let overall = percent(&scores, "all", "all");
        if model == "glimmer-1" {
            assert!((60.0..=75.0).contains(&overall), "{overall} %: clearly the weaker version, and not a silly one");
        } else {
            assert!(overall >= 93.0, "{overall} %");
            for (family, _) in scores.keys() {
                assert!(percent(&scores, family, "all") >= 80.0, "{family}");
            }
        }
    }
}
