//! Generation against the tokens of an independent implementation (`tests/goldens`).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::Folder;
use model::{Compute, Pass};
use moeforge_infer::{Engine, Error, GenerateConfig, SampleConfig, Sampler, Stop, end_of_text_ids};
use serde_json::Value;

const ALL: [&str; 7] = [
    "deepseek_v2_lite",
    "deepseek_v2_group",
    "deepseek_v3",
    "deepseek_v3_fp8",
    "deepseek_v3_fp8_ue8m0",
    "qwen2_distill",
    "llama_distill",
];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/goldens")
        .join(name)
}

/// The golden prompt and what follows it.
fn golden(name: &str) -> (Vec<u32>, Vec<u32>) {
    let text = std::fs::read_to_string(path(name).join("golden.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let mut list = |key: &str| serde_json::from_value(json["generation"][key].take()).unwrap();
    (list("prompt_ids"), list("new_tokens"))
}

fn engine(name: &str) -> Engine {
    Engine::open(&path(name), Device::flex()).unwrap()
}

fn greedy(max_tokens: usize) -> GenerateConfig {
    GenerateConfig {
        max_tokens,
        sample: SampleConfig {
            temperature: 0.0,
            top_p: 1.0,
            seed: 0,
        },
        stop_ids: Vec::new(),
        compute: Compute::F32,
    }
}

#[test]
fn greedy_generation_gives_the_golden_tokens_as_they_come() {
    for name in ALL {
        let (prompt, expected) = golden(name);
        let mut told = Vec::new();
        let generation = engine(name)
            .generate(&prompt, &greedy(expected.len()), &mut |id| {
                told.push(id);
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(generation.token_ids, expected, "{name}");
        assert_eq!(told, expected, "{name}");
        assert_eq!(generation.stopped, Stop::MaxTokens);
        assert_eq!(generation.decode_steps, expected.len() - 1);
    }
}

#[test]
fn generation_ends_at_any_stop_id_or_when_the_caller_says_so() {
    let engine = engine("deepseek_v3");
    let (prompt, expected) = golden("deepseek_v3");
    let stop = expected[4];
    let until = expected.iter().position(|id| *id == stop).unwrap();
    let config = GenerateConfig {
        stop_ids: vec![99_999, stop],
        ..greedy(24)
    };
    let generation = engine
        .generate(&prompt, &config, &mut |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(generation.token_ids, expected[..until]);
    assert_eq!(generation.stopped, Stop::EndOfText(stop));

    let mut left = 3;
    let generation = engine
        .generate(&prompt, &greedy(24), &mut |_| {
            left -= 1;
            if left == 0 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
        .unwrap();
    assert_eq!(generation.token_ids, expected[..3]);
    assert_eq!(generation.stopped, Stop::Caller);
}

#[test]
fn a_seed_gives_the_same_text_again() {
    let engine = engine("deepseek_v2_lite");
    let (prompt, _) = golden("deepseek_v2_lite");
    let sampled = |seed| {
        let sample = SampleConfig {
            temperature: 1.0,
            top_p: 0.95,
            seed,
        };
        let config = GenerateConfig {
            sample,
            ..greedy(12)
        };
        let continued = engine.generate(&prompt, &config, &mut |_| ControlFlow::Continue(()));
        continued.unwrap().token_ids
    };
    assert_eq!(sampled(1), sampled(1));
    assert_ne!(sampled(1), sampled(2));
}

#[test]
fn a_prompt_of_several_pieces_is_continued_as_if_read_at_once() {
    let engine = engine("llama_distill");
    let prompt: Vec<u32> = (0..700).map(|i| (i * i + 7 * i) % 311).collect();
    let ids = Tensor::<2, Int>::from_data(
        TensorData::new(
            prompt.iter().map(|id| *id as i32).collect::<Vec<_>>(),
            [1, 700],
        ),
        &engine.device,
    );
    let pass = &mut Pass::new(Compute::F32);
    let last = engine.model.hidden(ids, pass).slice([0..1, 699..700]);
    let last = last.reshape([1, engine.model.config.hidden_size]);
    let logits = engine.model.logits(last, pass).into_data();
    let config = greedy(1).sample;
    let expected = Sampler::new(config)
        .unwrap()
        .sample(&logits.try_to_vec::<f32>().unwrap());
    let found = engine.generate(&prompt, &greedy(1), &mut |_| ControlFlow::Continue(()));
    assert_eq!(found.unwrap().token_ids.first().copied(), expected);
}

#[test]
fn prompts_that_cannot_be_continued_are_refused() {
    let engine = engine("qwen2_distill");
    let (vocab, limit) = (
        engine.model.config.vocab_size,
        engine.model.config.max_position_embeddings,
    );
    let refused = |prompt: &[u32], max_tokens| -> Error {
        let continued = engine.generate(prompt, &greedy(max_tokens), &mut |_| {
            panic!("no token may be told")
        });
        continued.unwrap_err()
    };
    let check = |error: Error, expected: String| assert_eq!(error.to_string(), expected);
    check(
        refused(&[], 1),
        "expected a prompt of at least one token, found none".into(),
    );
    check(
        refused(&[3, vocab as u32], 1),
        format!("prompt token 1: expected an id below the vocabulary size {vocab}, found {vocab}"),
    );
    check(
        refused(&[3, 4], limit - 1),
        format!(
            "expected prompt and new tokens to fit the model's {limit} positions, found 2 prompt tokens and up to {} new ones",
            limit - 1
        ),
    );
    let nothing = engine.generate(&[3], &greedy(0), &mut |_| panic!("no token may be told"));
    assert_eq!(nothing.unwrap().token_ids, [0u32; 0]);
}

#[test]
fn every_file_says_where_text_ends() {
    let folder = Folder::open(&path("deepseek_v3")).unwrap();
    assert_eq!(end_of_text_ids(&folder, None).unwrap(), [1]);
    assert_eq!(end_of_text_ids(&folder, Some(7)).unwrap(), [1, 7]);
}
