use super::{Biases, Evidence, RopeFactors, TokenKind, Vocabulary, config};
use crate::{
    model::spec::ModelSpec,
    weights::gguf::{
        architecture,
        metadata::{Metadata, Value as Stored},
        vocabulary::VocabularyModel,
    },
};
use serde_json::{Value, json};

/// The configuration of a small file of this architecture; each of `more` stands in its metadata too, with the
/// architecture in front of its key.
fn translated(name: &str, biases: Biases, more: &[(&str, Stored)]) -> Result<Value, String> {
    let mut metadata = Metadata::default();
    let whole = |n| Stored::Whole(n);
    let base = [
        ("embedding_length", whole(64)),
        ("block_count", whole(2)),
        ("attention.head_count", whole(4)),
        ("attention.key_length", whole(16)),
        ("feed_forward_length", whole(96)),
        ("context_length", whole(128)),
        ("attention.layer_norm_rms_epsilon", Stored::Real(1e-5)),
    ];
    for (key, value) in base.iter().chain(more) {
        metadata.insert(format!("{name}.{key}"), value.clone())?;
    }
    metadata.insert("tokenizer.ggml.eos_token_id".to_owned(), whole(1))?;
    let tokens = ["a", "</s>", "<|end|>", "<end_of_turn>", "<|im_end|>"];
    let vocabulary = Vocabulary {
        model: VocabularyModel::Bytes { pre: "gpt-2".to_owned(), merges: Vec::new() },
        tokens: tokens.map(str::to_owned).into(),
        kinds: vec![
            TokenKind::Normal,
            TokenKind::Control,
            TokenKind::Control,
            TokenKind::UserDefined,
            TokenKind::Normal,
        ],
        named: Vec::new(),
        template: None,
        control_eats_space: false,
    };
    let evidence = Evidence { vocab: 5, tied: true, biases, rope: RopeFactors::None };
    config(architecture::find(name)?, &metadata, &vocabulary, &evidence)
}

fn plain(name: &str, more: &[(&str, Stored)]) -> Result<Value, String> {
    translated(name, Biases::default(), more)
}

fn says(outcome: Result<Value, String>, what: &str) {
    let why = outcome.expect_err(what);
    assert!(why.contains(what), "{why:?} does not say {what:?}");
}

#[test]
fn tokens_that_are_known_to_end_a_turn_do_so_where_the_file_names_only_the_one_of_the_text() {
    let config = plain("llama", &[]).expect("valid");
    assert_eq!(config["eos_token_id"], json!([1, 2, 3]), "what is ordinary text ends nothing");
}

#[test]
fn a_window_that_an_architecture_is_not_known_to_have_is_refused() {
    let window = |n| ("attention.sliding_window", Stored::Whole(n));
    let pattern = |n| ("attention.sliding_window_pattern", Stored::Whole(n));
    for name in ["olmo2", "qwen2", "qwen3", "granite", "smollm3", "gemma"] {
        says(plain(name, &[window(8)]), "sliding_window");
        plain(name, &[window(0)]).expect("no window is none");
    }
    for name in ["olmo2", "llama", "phi3"] {
        says(plain(name, &[pattern(4)]), "sliding_window_pattern");
    }
    assert_eq!(plain("llama", &[window(8)]).expect("Mistral")["model_type"], "mistral");
    let gemma = plain("gemma3", &[window(8), pattern(3)]).expect("valid");
    assert_eq!((&gemma["sliding_window"], &gemma["sliding_window_pattern"]), (&json!(8), &json!(3)));
}

#[test]
fn biases_are_those_that_the_file_holds() {
    let of = |name, biases| {
        let config = translated(name, biases, &[]).expect("valid");
        let biases = ModelSpec::from_config(&config).expect("a spec").biases;
        [biases.qkv, biases.attention_out, biases.mlp]
    };
    assert_eq!(of("llama", Biases::default()), [false; 3]);
    assert_eq!(of("llama", Biases { qkv: true, attention_out: true, mlp: false }), [true, true, false]);
    assert_eq!(of("qwen3", Biases { mlp: true, ..Biases::default() }), [false, false, true]);
    assert_eq!(of("qwen2", Biases { qkv: true, ..Biases::default() }), [true, false, false]);
}

#[test]
fn scores_of_a_granite_are_scaled_as_by_llama_cpp_where_the_file_says_nothing() {
    let scale = |more: &[_]| {
        let spec = ModelSpec::from_config(&plain("granite", more).expect("valid")).expect("a spec");
        spec.layers[0].scores.scale
    };
    assert_eq!(scale(&[]), 0.25);
    assert_eq!(scale(&[("attention.scale", Stored::Real(0.0))]), 0.25);
    assert_eq!(scale(&[("attention.scale", Stored::Real(0.5))]), 0.5);
}

#[test]
fn a_factor_without_a_type_is_linear_and_beside_none_a_contradiction() {
    let kind = |kind: &str| ("rope.scaling.type", Stored::Text(kind.to_owned()));
    let factor = |factor| ("rope.scaling.factor", Stored::Real(factor));
    let scaling = |more: &[_]| plain("llama", more).map(|config| config["rope_scaling"].clone());
    let linear = Ok(json!({"rope_type": "linear", "factor": 4.0}));
    assert_eq!(scaling(&[factor(4.0)]), linear);
    assert_eq!(scaling(&[("rope.scale_linear", Stored::Real(4.0))]), linear);
    assert_eq!(scaling(&[kind("linear"), factor(4.0)]), linear);
    for nothing in [vec![], vec![factor(0.0)], vec![factor(1.0)], vec![kind("none"), factor(1.0)], vec![kind("linear")]]
    {
        assert_eq!(scaling(&nothing), Ok(Value::Null));
    }
    says(scaling(&[kind("none"), factor(4.0)]), "not scaled");
    says(scaling(&[kind("yarn")]), "`llama.rope.scaling.factor` is missing");
}
