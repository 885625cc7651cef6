//! Grammars over a vocabulary of all bytes: what is drawn by them, and what strangers may try.

use super::{BadGrammar, Constraint, Grammar, Grammars};
use crate::{
    sampling::{Sampler, params::SamplingParams},
    text::detokenize::TokenBytes,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

const END: u32 = 256;
const ROWS: usize = 300;

/// Every byte, the end token, some longer tokens, and rows that no token has.
fn grammars() -> Grammars {
    let longer = ["{\"", "\":", "true", "null", " \"", "ab", "가"].map(|text| text.as_bytes().to_vec());
    let tokens = (0..=255).map(|byte| vec![byte]).chain([Vec::new()]).chain(longer);
    Grammars::new(Arc::new(TokenBytes::new(tokens)), vec![END], ROWS)
}

/// A text drawn evenly from what the grammar allows; None if it has no end within the bound.
fn draw(grammars: &Grammars, constraint: &Constraint, seed: u64) -> Option<String> {
    let grammar = grammars.compile(constraint).expect("a grammar");
    let params = SamplingParams { grammar: Some(grammar), seed, ..SamplingParams::default() };
    let mut sampler = Sampler::new(params, &[]);
    let mut bytes = Vec::new();
    for _ in 0..400 {
        let id = sampler.sample(&mut [0.0; ROWS]).expect("a token").id;
        if id == END {
            return Some(String::from_utf8(bytes).expect("whole characters"));
        }
        bytes.extend_from_slice(grammars.vocabulary.of(id));
    }
    None
}

fn json(text: &str) -> Constraint {
    Constraint::JsonSchema(text.to_owned())
}

fn regex(text: &str) -> Constraint {
    Constraint::Regex(text.to_owned())
}

fn lark(text: &str) -> Constraint {
    Constraint::Lark(text.to_owned())
}

#[test]
fn a_mask_that_was_made_beforehand_is_the_same() {
    let grammars = grammars();
    let grammar = grammars.compile(&regex("(ab|true|[0-9]{2})+x")).expect("a grammar");
    let (mut early, mut late) = (grammar.begin(), grammar.begin());
    for byte in *b"12abtrue" {
        let mut rows = [[0.0f32; ROWS]; 2];
        early.prepare();
        early.prepare();
        for (state, row) in [&mut early, &mut late].into_iter().zip(&mut rows) {
            state.mask(row).expect("a mask");
            state.accept(u32::from(byte)).expect("a token that is allowed");
        }
        assert_eq!(rows[0], rows[1]);
    }
}

#[test]
fn what_is_drawn_keeps_to_its_constraint_and_ends_where_it_does() {
    let grammars = grammars();
    let schema = json(
        r#"{"type":"object","properties":{"n":{"type":"integer","minimum":1,"maximum":12},"s":{"enum":["가","b c"]},"l":{"type":"array","items":{"type":"boolean"},"maxItems":3}},"required":["n","s","l"],"additionalProperties":false}"#,
    );
    let choices = ["yes", "no", "no \"maybe\"\n", "가나"];
    for seed in 0..100 {
        let text = draw(&grammars, &schema, seed).expect("an end");
        let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert!((1..=12).contains(&value["n"].as_i64().expect("n")), "{text}");
        assert!(value["s"] == "가" || value["s"] == "b c", "{text}");
        assert!(value["l"].as_array().expect("l").iter().all(serde_json::Value::is_boolean), "{text}");

        let text = draw(&grammars, &regex("[0-9]{3}-(ab|가){1,2}"), seed).expect("an end");
        let (number, letters) = text.split_once('-').expect("a dash");
        assert!(number.len() == 3 && number.bytes().all(|byte| byte.is_ascii_digit()), "{text}");
        assert!(["ab", "가", "abab", "가가", "ab가", "가ab"].contains(&letters), "{text}");

        let text = draw(&grammars, &Constraint::Choice(choices.map(str::to_owned).to_vec()), seed).expect("an end");
        assert!(choices.contains(&text.as_str()), "{text:?}");

        let text = draw(&grammars, &lark("start: \"x\" tail\ntail: \"y\" | \"z\" \"z\""), seed).expect("an end");
        assert!(text == "xy" || text == "xzz", "{text}");
    }
}

/// A value that no schema bounds may go on for ever; it must not do so between its parts.
#[test]
fn between_the_parts_of_a_value_there_is_one_space_at_most() {
    let grammars = grammars();
    let schema = json(
        r#"{"type":"object","properties":{"a":{"const":1},"b":{"const":[2]}},"required":["a","b"],"additionalProperties":false}"#,
    );
    for seed in 0..50 {
        let text = draw(&grammars, &schema, seed).expect("an end");
        assert!(!text.contains("  ") && !text.contains('\n'), "{text:?}");
    }
}

#[test]
fn two_answers_of_one_grammar_know_nothing_of_each_other() {
    let grammar = grammars().compile(&regex("ab|cd")).expect("a grammar");
    let (mut first, mut second) = (grammar.begin(), grammar.begin());
    first.accept(u32::from(b'a')).expect("allowed");
    second.accept(u32::from(b'c')).expect("allowed");
    for (state, next) in [(&mut first, b'b'), (&mut second, b'd')] {
        let mut row = [0.0; ROWS];
        state.mask(&mut row).expect("a mask");
        let allowed: Vec<usize> = (0..ROWS).filter(|&id| row[id] == 0.0).collect();
        assert_eq!(allowed, [usize::from(next)]);
    }
}

#[test]
fn what_was_compiled_is_found_again_and_only_so_much_is_kept() {
    let grammars = grammars();
    let first = grammars.compile(&regex("a0")).expect("a grammar");
    for n in 1..super::KEPT_MAX {
        grammars.compile(&regex(&format!("a{n}"))).expect("a grammar");
    }
    assert_eq!(grammars.compile(&regex("a0")), Ok(first));
    grammars.compile(&regex("one more")).expect("a grammar");
    assert_eq!(grammars.kept.lock().expect("a lock").len(), super::KEPT_MAX);
    assert!(grammars.find(&regex("a0")).is_some() && grammars.find(&regex("a1")).is_none());
}

#[test]
fn a_model_without_an_end_token_keeps_to_no_grammar() {
    let tokens = (0..=255).map(|byte| vec![byte]);
    let grammars = Grammars::new(Arc::new(TokenBytes::new(tokens)), Vec::new(), 256);
    let BadGrammar(why) = grammars.compile(&regex("a")).expect_err("no end");
    assert!(why.contains("without an end token"), "{why}");
}

/// Everything that a stranger may try is refused soon and with a reason, or can be drawn from at a bounded cost.
#[test]
fn hostile_constraints_are_refused_quickly_and_say_why() {
    let nested = |n: usize, open: &str, middle: &str, close: &str| open.repeat(n) + middle + &close.repeat(n);
    let wide = |n: usize| {
        let fields: Vec<String> =
            (0..n).map(|i| format!(r#""f{i}":{{"type":"string","pattern":"^(a|b){{1,{}}}$"}}"#, i + 1)).collect();
        format!(r#"{{"type":"object","properties":{{{}}}}}"#, fields.join(","))
    };
    let all_of = |n: usize| {
        let any: Vec<String> = (0..n)
            .map(|i| format!(r#"{{"anyOf":[{{"minimum":{i}}},{{"maximum":{i}}},{{"multipleOf":{}}}]}}"#, i + 2))
            .collect();
        format!(r#"{{"type":"integer","allOf":[{}]}}"#, any.join(","))
    };
    let many = |n: usize| Constraint::Choice((0..n).map(|i| format!("choice number {i}")).collect());
    let rules: String = (0..40).map(|i| format!("r{i}: r{} r{}\n", i + 1, i + 1)).collect();
    // None: it can be drawn from.
    let cases = [
        ("no JSON", json("{"), Some("is not JSON")),
        ("no schema", json("[1]"), Some("must be an object")),
        ("unknown type", json(r#"{"type":"strin"}"#), Some("strin")),
        ("unknown keyword", json(r#"{"type":"object","unevaluatedProperties":false}"#), Some("unevaluatedProperties")),
        ("no value at all", json("false"), Some("schema is false")),
        ("contradiction", json(r#"{"type":"integer","minimum":5,"maximum":4}"#), Some("minimum (5) is greater")),
        ("itself", json(r##"{"$ref":"#"}"##), Some("allows no text")),
        ("itself, in all", json(r##"{"allOf":[{"$ref":"#"}]}"##), Some("allows no text")),
        ("from elsewhere", json(r#"{"$ref":"http://127.0.0.1:1/x"}"#), Some("ref 'http://127.0.0.1:1/x'")),
        ("from a file", json(r#"{"$ref":"file:///etc/passwd"}"#), Some("ref 'file:///etc/passwd'")),
        ("too large", json(&format!(r#"{{"description":"{}"}}"#, "x".repeat(70_000))), Some("65536")),
        ("deep", json(&nested(40, r#"{"items":"#, "{}", "}")), None),
        ("too deep", json(&nested(120, r#"{"items":"#, "{}", "}")), Some("nested deeper")),
        (
            "deep by reference",
            json(r##"{"$ref":"#/$defs/a","$defs":{"a":{"type":"array","items":{"$ref":"#/$defs/a"}}}}"##),
            None,
        ),
        ("wide", json(&wide(800)), None),
        ("all of any", json(&all_of(14)), Some("schema too large")),
        ("long string", json(r#"{"type":"string","minLength":1000000}"#), None),
        ("long list", json(r#"{"type":"array","minItems":100000000,"items":{"type":"array","minItems":1000}}"#), None),
        ("long numbers", json(r#"{"type":"number","minimum":1e300,"multipleOf":1e-300}"#), Some("too many digits")),
        ("no expression", regex("(a"), Some("unclosed group")),
        ("look-around", regex("(?=a)b"), Some("look-around")),
        ("back-reference", regex(r"(a)\1"), Some("backreferences are not supported")),
        ("ends in a backslash", regex("a\\"), Some("ends in a backslash")),
        ("repeats of repeats", regex("((a{1,1000}){1,1000}){1,1000}"), None),
        ("repeats", regex("(a|b|ab){1,100000}"), None),
        ("exponential", regex("(.*a.{40}|.*b.{41})*c"), None),
        ("nested expression", regex(&nested(90, "(", "a", ")*")), None),
        ("too nested expression", regex(&nested(5_000, "(", "a", ")")), Some("nested deeper")),
        ("no choice", Constraint::Choice(Vec::new()), Some("at least one")),
        ("an empty choice", Constraint::Choice(vec!["a".to_owned(), String::new()]), Some("no empty one")),
        ("many choices", many(2_000), None),
        ("too many choices", many(10_000), Some("65536")),
        ("no grammar", lark("what is this?"), Some("Expected token")),
        ("no rule", lark("start: nothing"), Some("unknown name: \"nothing\"")),
        ("no end", lark("start: start \"a\""), Some("allows no text")),
        ("nothing at all", lark("start: start"), Some("allows no text")),
        ("a chain of doublings", lark(&format!("start: r0\n{rules}r40: \"a\"")), None),
        ("repeats in a grammar", lark("start: (\"a\" | \"b\"){1000000000}"), None),
        ("too deep a grammar", lark(&format!("start: {}", nested(20_000, "(", "\"a\"", ")"))), Some("nested deeper")),
        ("ambiguous", lark("start: start start | \"a\" |"), None),
        (
            "JSON in a grammar",
            lark(r#"start: %json {"type":"object","properties":{"a":{"$ref":"file:///etc/passwd"}}}"#),
            Some("ref 'file:///etc/passwd'"),
        ),
    ];
    let grammars = grammars();
    for (name, constraint, refusal) in cases {
        let started = Instant::now();
        let outcome = grammars.compile(&constraint);
        assert!(started.elapsed() < COMPILE_MAX, "{name}: compiled for {:?}", started.elapsed());
        match (outcome, refusal) {
            (Err(BadGrammar(why)), Some(reason)) => assert!(why.contains(reason), "{name}: {why}"),
            (Ok(grammar), None) => follow(name, &grammar),
            (Err(why), None) => panic!("{name}: {why}"),
            (Ok(_), Some(_)) => panic!("{name}: was compiled"),
        }
    }
}

/// Far above what the limits allow, for machines with much else to do.
const COMPILE_MAX: Duration = Duration::from_secs(5);
const MASK_MAX: Duration = Duration::from_secs(1);

/// The last of the allowed tokens, a hundred times. A grammar that becomes too much says so.
fn follow(name: &str, grammar: &Grammar) {
    let mut state = grammar.begin();
    for _ in 0..100 {
        let started = Instant::now();
        let mut row = [0.0; ROWS];
        let mut step = state.mask(&mut row);
        let next = (0..ROWS).rev().find(|&id| row[id] == 0.0 && id != END as usize);
        if let (Ok(()), Some(id)) = (&step, next) {
            step = state.accept(id as u32);
        }
        assert!(started.elapsed() < MASK_MAX, "{name}: a token took {:?}", started.elapsed());
        match step {
            Ok(()) if next.is_some() => {}
            Ok(()) => return,
            Err(BadGrammar(why)) => {
                return assert!(!why.is_empty() && !why.contains("panic"), "{name}: {why}");
            }
        }
    }
}
