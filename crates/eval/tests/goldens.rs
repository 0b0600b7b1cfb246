//! Scores against the losses of an independent implementation (`tests/goldens`).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use burn::tensor::Device;
use data::{Choice, Sample};
use infer::Engine;
use model::{Compute, device};
use moeforge_eval::{EvalConfig, ExpertLoad, RowValue, expert_loads, multiple_choice, perplexity};
use serde_json::Value;

/// Of the golden loss, which is a mean in f32.
const GOLDEN: f64 = 1e-5;
/// Between batch sizes: f32 sums of matrix products in another order.
const BATCHED: f64 = 1e-6;

fn engine(name: &str) -> Engine {
    Engine::open(&goldens::path(name), Compute::F32, Device::flex()).unwrap()
}

fn config(batch_size: usize) -> EvalConfig {
    EvalConfig {
        batch_size,
        compute: Compute::F32,
    }
}

fn sample(ids: &[u32]) -> Sample {
    let trained = (0..ids.len()).map(|position| position > 0).collect();
    Sample {
        ids: ids.to_vec(),
        trained,
        trained_bytes: 0,
        truncated: false,
    }
}

/// The golden inputs as samples, and their loss. The safetensors file is read by hand: this crate knows no files.
fn golden(name: &str) -> (Vec<Sample>, f64) {
    let file = std::fs::read(goldens::path(name).join("golden.safetensors")).unwrap();
    let (length, rest) = file.split_first_chunk::<8>().unwrap();
    let (header, bytes) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Value = serde_json::from_slice(header).unwrap();
    let number = |value: &Value| value.as_u64().unwrap() as usize;
    let place = &header["input_ids"]["data_offsets"];
    let cols = number(&header["input_ids"]["shape"][1]);
    let (ids, _) = bytes[number(&place[0])..number(&place[1])].as_chunks::<8>();
    let ids: Vec<u32> = ids
        .iter()
        .map(|id| i64::from_le_bytes(*id) as u32)
        .collect();

    let json = std::fs::read_to_string(goldens::path(name).join("golden.json")).unwrap();
    let json: Value = serde_json::from_str(&json).unwrap();
    (
        ids.chunks(cols).map(sample).collect(),
        json["loss"].as_f64().unwrap(),
    )
}

fn relative(a: f64, b: f64) -> f64 {
    (a / b - 1.0).abs()
}

#[test]
fn the_loss_is_the_golden_one_whatever_the_batch() {
    for name in ["qwen2_distill", "deepseek_v3"] {
        let (engine, (samples, expected)) = (engine(name), golden(name));
        for batch_size in [0, 1, 2, 5] {
            let score = perplexity(
                &engine.model,
                &samples,
                &config(batch_size),
                &mut (),
                &mut |_, _| {},
            )
            .unwrap();
            assert!(
                relative(score.loss, expected) < GOLDEN,
                "{name}: loss {}, expected {expected}",
                score.loss
            );
            assert_eq!(score.perplexity, score.loss.exp());
            assert_eq!(score.bits_per_byte, None);
        }
    }
}

#[test]
fn passes_change_nothing_and_samples_keep_their_order() {
    for name in ["qwen2_distill", "deepseek_v3"] {
        let (engine, (golden, _)) = (engine(name), golden(name));
        // Of many lengths, with one token that has no target and one sample that has none.
        let mut samples: Vec<Sample> = [31, 5, 40, 2, 17, 1, 8, 33, 12]
            .map(|length| sample(&golden[length % 2].ids[..length]))
            .to_vec();
        samples[4].trained[9] = false;
        let (mut told, before) = (Vec::new(), device::reads());
        let mut tell = |done, total| told.push((done, total));
        let batched = perplexity(&engine.model, &samples, &config(1), &mut (), &mut tell).unwrap();
        assert_eq!(told, [(5, 9), (9, 9)]);
        assert_eq!(
            device::reads() - before,
            2 * told.len(),
            "losses and tokens of each pass"
        );
        let tokens: Vec<usize> = batched.per_sample.iter().map(|loss| loss.tokens).collect();
        assert_eq!(tokens, [30, 4, 39, 1, 15, 0, 7, 32, 11]);
        for (index, found) in batched.per_sample.iter().enumerate() {
            let alone = &samples[index..index + 1];
            if found.tokens == 0 {
                assert_eq!(found.loss_sum, 0.0);
                continue;
            }
            let alone =
                perplexity(&engine.model, alone, &config(1), &mut (), &mut |_, _| {}).unwrap();
            let expected = alone.per_sample[0].loss_sum;
            assert!(
                relative(found.loss_sum, expected) < BATCHED,
                "{name}, sample {index}: {}, alone {expected}",
                found.loss_sum
            );
        }
    }
}

#[test]
fn a_model_chooses_what_it_would_have_written() {
    let engine = engine("qwen2_distill");
    let json = std::fs::read_to_string(goldens::path("qwen2_distill").join("golden.json")).unwrap();
    let json: Value = serde_json::from_str(&json).unwrap();
    let list = |key: &str| -> Vec<u32> {
        serde_json::from_value(json["generation"][key].clone()).unwrap()
    };
    let (prompt, written) = (list("prompt_ids"), &list("new_tokens")[..4]);
    let choice = |continuation: &[u32]| {
        let mut sample = sample(&[&prompt[..], continuation].concat());
        sample.trained[..prompt.len()].fill(false);
        sample
    };
    let other: Vec<u32> = written.iter().map(|id| (id + 100) % 300).collect();
    let question = |answer| Choice {
        samples: vec![choice(&other), choice(written)],
        texts: vec!["abcd".into(), "efgh".into()],
        answer,
    };
    let questions = [question(1), question(0), question(1)];
    let score = multiple_choice(
        &engine.model,
        "t",
        &questions,
        &config(3),
        &mut (),
        &mut |_, _| {},
    )
    .unwrap();
    let right = [1.0, 0.0, 1.0].map(RowValue::Number);
    assert!(score.metrics.iter().all(|metric| metric.of_items == right));
    assert_eq!(score.n, 3);
}

#[test]
fn samples_that_do_not_fit_the_model_are_refused() {
    let engine = engine("qwen2_distill");
    let check = |ids: &[u32], expected: &str| {
        let samples = [sample(&[1, 2]), sample(ids)];
        let problem = perplexity(&engine.model, &samples, &config(2), &mut (), &mut |_, _| {});
        assert_eq!(problem.unwrap_err().to_string(), expected);
    };
    check(
        &[3, 320],
        "sample 1: expected token ids below the vocabulary size 320, found 320",
    );
    check(
        &[1; 1025],
        "sample 1: expected at most the model's 1024 positions, found 1025 tokens",
    );
    let problem = perplexity(&engine.model, &[], &config(2), &mut (), &mut |_, _| {});
    assert_eq!(
        problem.unwrap_err().to_string(),
        "expected at least one target to score, found none"
    );
}

#[test]
fn expert_loads_are_the_goldens() {
    let engine = engine("deepseek_v3");
    let (samples, _) = golden("deepseek_v3");
    let text = std::fs::read_to_string(goldens::path("deepseek_v3").join("golden.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let loads = |samples: &[Sample], batch_size| -> Vec<ExpertLoad> {
        expert_loads(&engine.model, samples, &config(batch_size), &mut |_, _| ()).unwrap()
    };
    let found = loads(&samples, 2);
    assert_eq!(
        found.iter().map(|load| load.layer).collect::<Vec<_>>(),
        [1, 2]
    );
    for load in &found {
        let counts = json["balance"][load.layer.to_string()]["expert_load"].as_array();
        let counts: Vec<f64> = counts
            .unwrap()
            .iter()
            .map(|n| n.as_f64().unwrap())
            .collect();
        let slots = counts.iter().sum::<f64>();
        for (share, count) in load.tokens.iter().zip(&counts) {
            assert!((share - count / slots).abs() < 1e-12, "{share} {count}");
        }
        assert!((load.gates.iter().sum::<f64>() - 1.0).abs() < 1e-9);
    }
    // Every sample counts the same, and padding not at all.
    let short = sample(&samples[1].ids[..9]);
    let pair = [samples[0].clone(), short];
    let apart = [loads(&pair[..1], 1), loads(&pair[1..], 1)];
    for (layer, load) in loads(&pair, 2).iter().enumerate() {
        for (expert, share) in load.gates.iter().enumerate() {
            let mean = (apart[0][layer].gates[expert] + apart[1][layer].gates[expert]) / 2.0;
            assert!((share - mean).abs() < 1e-6, "{share} {mean}");
        }
    }
}
