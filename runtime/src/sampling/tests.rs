//! What the filters keep, how often it is drawn, and that nothing else has a say in it.

use super::{Sampler, Unsampled, logprobs::logprobs, params::SamplingParams, philox};
use crate::{
    grammar::{Constraint, Grammars},
    text::detokenize::TokenBytes,
};
use std::{collections::HashMap, sync::Arc};

/// A distribution over ids 0.. with these probabilities.
fn logits_of(probabilities: &[f64]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln() as f32).collect()
}

fn id<const N: usize>(sampler: &mut Sampler, mut logits: [f32; N]) -> u32 {
    sampler.sample(&mut logits).expect("a token").id
}

/// Draws from the same row over and over: every draw is the first of its own seed.
fn counts(params: &SamplingParams, logits: &[f32], draws: u64) -> Vec<u64> {
    let mut counts = vec![0; logits.len()];
    for seed in 0..draws {
        let mut sampler = Sampler::new(SamplingParams { seed, ..params.clone() }, &[]);
        counts[sampler.sample(&mut logits.to_vec()).expect("a token").id as usize] += 1;
    }
    counts
}

/// Pearson's statistic over the expected ones; whatever is expected never to come must not come.
fn chi_square(counts: &[u64], expected: &[f64]) -> f64 {
    let draws: u64 = counts.iter().sum();
    let total: f64 = expected.iter().sum();
    counts
        .iter()
        .zip(expected)
        .map(|(&count, &p)| {
            let want = p / total * draws as f64;
            if want == 0.0 {
                assert_eq!(count, 0, "a filtered token was drawn");
                return 0.0;
            }
            (count as f64 - want).powi(2) / want
        })
        .sum()
}

#[test]
fn every_filter_draws_its_distribution() {
    let p = [0.05, 0.3, 0.15, 0.2, 0.02, 0.18, 0.1];
    let base = SamplingParams::default();
    let square = |p: &[f64]| p.iter().map(|p| p * p).collect::<Vec<_>>();
    let keep = |ids: &[usize]| (0..p.len()).map(|id| if ids.contains(&id) { p[id] } else { 0.0 }).collect::<Vec<_>>();
    let cases = [
        ("plain", base.clone(), p.to_vec()),
        ("temperature 1/2", SamplingParams { temperature: 0.5, ..base.clone() }, square(&p)),
        ("top_k 3", SamplingParams { top_k: 3, ..base.clone() }, keep(&[1, 3, 5])),
        ("top_k beyond all", SamplingParams { top_k: 99, ..base.clone() }, p.to_vec()),
        // 0.3 + 0.2 + 0.18 = 0.68 is not enough for 0.7; with 0.15 it is.
        ("top_p 0.7", SamplingParams { top_p: 0.7, ..base.clone() }, keep(&[1, 3, 5, 2])),
        ("top_p tiny", SamplingParams { top_p: 1e-6, ..base.clone() }, keep(&[1])),
        ("min_p 0.4", SamplingParams { min_p: 0.4, ..base.clone() }, keep(&[1, 2, 3, 5])),
        // Among the best four, 0.3 + 0.2 reach 0.6 of 0.83.
        ("top_k 4, top_p 0.6", SamplingParams { top_k: 4, top_p: 0.6, ..base.clone() }, keep(&[1, 3])),
        ("all", SamplingParams { top_k: 5, top_p: 0.95, min_p: 0.55, ..base }, keep(&[1, 3, 5])),
    ];
    for (name, params, expected) in cases {
        let statistic = chi_square(&counts(&params, &logits_of(&p), 20_000), &expected);
        // Six degrees of freedom at most: 27.9 is passed by chance once in ten thousand.
        assert!(statistic < 27.9, "{name}: {statistic}");
    }
}

/// The draws of one seed are as good as those of many.
#[test]
fn a_sequence_of_draws_is_independent() {
    let p = [0.4, 0.1, 0.3, 0.2];
    let mut sampler = Sampler::new(SamplingParams { seed: 42, ..SamplingParams::default() }, &[]);
    let ids: Vec<u32> = (0..20_000).map(|_| sampler.sample(&mut logits_of(&p)).expect("a token").id).collect();
    let mut pairs = vec![0; 16];
    for pair in ids.chunks(2) {
        pairs[(pair[0] * 4 + pair[1]) as usize] += 1;
    }
    let expected: Vec<f64> = (0..16).map(|i| p[i / 4] * p[i % 4]).collect();
    let statistic = chi_square(&pairs, &expected);
    assert!(statistic < 44.3, "{statistic}");
    let mean = (0..100_000).map(|n| philox::uniform(7, n)).sum::<f64>() / 1e5;
    assert!((mean - 0.5).abs() < 0.005, "{mean}");
}

#[test]
fn a_large_vocabulary_is_cut_like_a_small_one() {
    // A slow decay, so that the cut lies far beyond the first look.
    let p: Vec<f64> = (0..5000).map(|id| 0.999f64.powi((id * 7919) % 5000)).collect();
    let params = SamplingParams { top_p: 0.5, ..SamplingParams::default() };
    let total: f64 = p.iter().sum();
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
    let mut sum = 0.0;
    let kept: Vec<usize> = order
        .into_iter()
        .take_while(|&id| {
            let before = sum;
            sum += p[id];
            before < 0.5 * total
        })
        .collect();
    let counts = counts(&params, &logits_of(&p), 3000);
    let drawn: Vec<usize> = (0..p.len()).filter(|&id| counts[id] > 0).collect();
    assert!(drawn.iter().all(|id| kept.contains(id)));
    assert!(drawn.len() > kept.len() / 3, "{} of {}", drawn.len(), kept.len());
}

/// Each draw falls where its point does in the running sum, whatever part of a large row that is.
#[test]
fn every_place_of_a_large_row_is_drawn_by_its_own_points() {
    let row: Vec<f32> =
        (0..2000u32).map(|id| if id % 7 == 3 { f32::NEG_INFINITY } else { -((id % 5) as f32) }).collect();
    let weights: Vec<f64> = row.iter().map(|&logit| f64::from(logit).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut before = 0.0;
    for (id, weight) in weights.into_iter().enumerate() {
        let point = (before + weight / 2.0) / total;
        before += weight;
        let drawn = super::filters::draw(&SamplingParams::default(), &mut row.clone(), 0.0, point);
        assert_eq!(drawn == Some(id as u32), weight > 0.0, "{id}: {drawn:?}");
    }
    let last = super::filters::draw(&SamplingParams::default(), &mut row.clone(), 0.0, 1.0);
    assert_eq!(last, Some(1999), "what rounding leaves is the last one's");
}

#[test]
fn greedy_takes_the_best_and_the_lowest_among_equals() {
    let mut sampler = Sampler::new(SamplingParams { temperature: 0.0, ..SamplingParams::default() }, &[]);
    assert_eq!(id(&mut sampler, [0.0, 3.0, 3.0, -1.0]), 1);
    assert_eq!(id(&mut sampler, [f32::NEG_INFINITY, -5.0]), 1);
}

#[test]
fn a_row_without_a_number_is_an_error() {
    for temperature in [0.0, 1.0] {
        for bad in [[f32::NAN, 1.0], [f32::INFINITY, 1.0], [f32::NEG_INFINITY; 2]] {
            let mut sampler = Sampler::new(SamplingParams { temperature, ..SamplingParams::default() }, &[]);
            assert_eq!(sampler.sample(&mut bad.clone()), Err(Unsampled::NotFinite), "{bad:?}");
        }
    }
    let tiny = SamplingParams { temperature: f32::MIN_POSITIVE, ..SamplingParams::default() };
    assert_eq!(id(&mut Sampler::new(tiny, &[]), [1.0, 2.0, -3e38]), 1);
}

#[test]
fn penalties_are_those_of_the_field() {
    let params = SamplingParams {
        repetition_penalty: 2.0,
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        ..SamplingParams::default()
    };
    // Token 0: prompt only. 1: once in the output. 2: thrice, negative. 3: never.
    let seen = HashMap::from([(0, 0), (1, 1), (2, 3)]);
    let mut logits = [4.0, 4.0, -1.0, 4.0];
    super::penalties::apply(&params, &seen, &mut logits);
    assert_eq!(logits, [2.0, 2.0 - 0.5 - 0.25, -2.0 - 1.5 - 0.25, 4.0]);

    // Over several steps, greedily: each choice makes itself less likely.
    let repeat = SamplingParams { temperature: 0.0, presence_penalty: 1.0, ..SamplingParams::default() };
    let mut sampler = Sampler::new(repeat, &[0]);
    let row = [1.0, 0.9, 0.5, -1.0];
    let chosen: Vec<u32> = (0..4).map(|_| sampler.sample(&mut row.clone()).expect("a token").id).collect();
    assert_eq!(chosen, [0, 1, 2, 0]);
}

/// What transformers' processors leave of a row: how much of [0, 1) draws each token is its probability there.
#[test]
fn penalties_and_filters_leave_what_those_of_transformers_leave() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../tests/golden/processed.json")).expect("valid JSON");
    for case in golden.as_array().expect("cases") {
        let numbers = |name: &str| -> Vec<f64> {
            case[name].as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect()
        };
        let param = |name: &str, default: f64| case["params"][name].as_f64().unwrap_or(default) as f32;
        let params = SamplingParams {
            temperature: param("temperature", 1.0),
            top_k: param("top_k", 0.0) as u32,
            top_p: param("top_p", 1.0),
            min_p: param("min_p", 0.0),
            repetition_penalty: param("repetition_penalty", 1.0),
            ..SamplingParams::default()
        };
        let seen = numbers("seen").into_iter().map(|id| (id as u32, 0)).collect();
        let mut logits: Vec<f32> = numbers("logits").into_iter().map(|x| x as f32).collect();
        super::penalties::apply(&params, &seen, &mut logits);
        let best = crate::kernels::cpu::largest(&logits);
        const POINTS: u32 = 20_000;
        let mut counts = vec![0u32; logits.len()];
        for point in 0..POINTS {
            let id =
                super::filters::draw(&params, &mut logits.clone(), best, (f64::from(point) + 0.5) / f64::from(POINTS));
            counts[id.expect("a token") as usize] += 1;
        }
        for (id, (&count, want)) in counts.iter().zip(numbers("probabilities")).enumerate() {
            let got = f64::from(count) / f64::from(POINTS);
            assert!((got - want).abs() <= 2.0 / f64::from(POINTS), "token {id}: {got}, not {want}: {case}");
        }
    }
}

#[test]
fn probabilities_told_add_up_to_one_and_are_those_of_the_raw_row() {
    let row: Vec<f32> = (0..1000).map(|id| ((id * 7919) % 1000) as f32 / 50.0 - 8.0).collect();
    let plain = logprobs(&row, 3, 20);
    let sum: f64 = (0..1000).map(|id| f64::from(logprobs(&row, id, 0).logprob).exp()).sum();
    assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    let mut order: Vec<u32> = (0..1000).collect();
    order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
    assert_eq!(plain.top.iter().map(|&(id, _)| id).collect::<Vec<_>>(), order[..20]);
    assert!(plain.top.iter().all(|&(id, logprob)| logprob == logprobs(&row, id, 0).logprob));
    assert_eq!(logprobs(&[1.0, 3.0, 3.0, 2.0], 0, 3).top.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [1, 2, 3]);

    // Whatever is done to the row on its way, and however few tokens there are.
    let params = SamplingParams {
        temperature: 2.0,
        top_k: 3,
        presence_penalty: 2.0,
        logit_bias: vec![(0, 50.0), (1, -50.0)],
        ..SamplingParams::default()
    };
    for seed in 0..20 {
        let params = SamplingParams { seed, ..params.clone() };
        let told = SamplingParams { logprobs: Some(9), ..params.clone() };
        let (mut plain, mut telling) = (Sampler::new(params, &[]), Sampler::new(told, &[]));
        for _ in 0..5 {
            let row = [0.5, 1.0, -1.0, 0.25];
            let sampled = telling.sample(&mut row.clone()).expect("a token");
            assert_eq!(
                plain.sample(&mut row.clone()).map(|sampled| sampled.id),
                Ok(sampled.id),
                "telling changes nothing"
            );
            assert_eq!(sampled.logprobs, Some(logprobs(&row, sampled.id, 9)));
        }
    }
}

#[test]
fn a_grammar_takes_memory_from_the_first_token_on_and_is_blamed_for_what_it_forbids() {
    // Two letters and the end.
    let vocabulary = Arc::new(TokenBytes::new(["a", "b", ""].map(Vec::from).into_iter()));
    let grammars = Grammars::new(vocabulary, vec![2], 3);
    let grammar = Some(grammars.compile(&Constraint::Regex("a".to_owned())).expect("a grammar"));
    for temperature in [0.0, 1.0] {
        let params = SamplingParams { temperature, grammar: grammar.clone(), ..SamplingParams::default() };
        let mut sampler = Sampler::new(params, &[]);
        assert!(sampler.grammar.is_none(), "nothing while it is queued");
        assert_eq!(id(&mut sampler, [0.0, 5.0, 1.0]), 0);
        assert!(sampler.grammar.is_some());
        let never = f32::NEG_INFINITY;
        assert!(matches!(sampler.sample(&mut [1.0, 1.0, never]), Err(Unsampled::Grammar(_))), "only the end is left");
    }
}

#[test]
fn a_bias_makes_tokens_likelier_or_impossible_at_every_step() {
    let p = [0.1, 0.2, 0.3, 0.4];
    let params =
        SamplingParams { logit_bias: vec![(0, 2f32.ln()), (3, -100.0), (99, 5.0)], ..SamplingParams::default() };
    let statistic = chi_square(&counts(&params, &logits_of(&p), 20_000), &[0.2, 0.2, 0.3, 0.0]);
    assert!(statistic < 27.9, "{statistic}");
    let greedy = SamplingParams { temperature: 0.0, logit_bias: vec![(1, 100.0)], ..SamplingParams::default() };
    let mut sampler = Sampler::new(greedy, &[]);
    assert_eq!([0; 3].map(|_| id(&mut sampler, [0.0, -1.0, 5.0])), [1, 1, 1]);
}
