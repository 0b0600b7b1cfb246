//! Generation against the tokens of an independent implementation (`tests/goldens`).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use std::ops::ControlFlow;

use burn::tensor::{Int, Tensor, TensorData};
use checkpoint::{Adapter, Folder};
use data::Tokenizer;
use kernels::device;
use model::{AdapterWeights, Cache, CacheType, Compute, ForwardContext, Model, load};
use moeforge_infer::{
    Engine, Error, FinishReason, GenerateConfig, Generation, KvPrefix, SampleConfig, Sampler,
    Sequence, end_of_text,
};
use serde_json::{Value, json};

const ALL: [&str; 7] = [
    "deepseek_v2_lite",
    "deepseek_v2_group",
    "deepseek_v3",
    "deepseek_v3_fp8",
    "deepseek_v3_fp8_ue8m0",
    "qwen2_distill",
    "llama_distill",
];

/// The golden model with a cache of every form.
fn engines(name: &str) -> [Engine; 4] {
    let engine = engine(name);
    CacheType::ALL.map(|cache| {
        let mut engine = engine.clone();
        engine.cache = cache;
        engine
    })
}

/// The golden prompt and what follows it.
fn golden(name: &str) -> (Vec<u32>, Vec<u32>) {
    let text = std::fs::read_to_string(goldens::path(name).join("golden.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let mut list = |key: &str| serde_json::from_value(json["generation"][key].take()).unwrap();
    (list("prompt_ids"), list("new_tokens"))
}

fn engine(name: &str) -> Engine {
    Engine::open(&goldens::path(name), Compute::F32, device::of_tests()).unwrap()
}

fn greedy(max_tokens: usize) -> GenerateConfig {
    GenerateConfig {
        max_tokens,
        sample: SampleConfig::greedy(),
        stop_ids: Vec::new(),
        logprobs: None,
    }
}

#[test]
fn greedy_generation_gives_the_golden_tokens_as_they_come() {
    for name in ALL {
        let (prompt, expected) = golden(name);
        let (mut told, mut reads) = (Vec::new(), Vec::new());
        let generation = engine(name)
            .generate(&prompt, &greedy(expected.len()), &mut |id| {
                told.push(id);
                reads.push(device::reads());
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(generation.token_ids, expected, "{name}");
        assert_eq!(told, expected, "{name}");
        assert_eq!(generation.finish_reason, FinishReason::Length);
        assert_eq!(generation.decode_steps, expected.len() - 1);
        // Logits, and nothing else.
        assert!(reads.is_sorted_by(|a, b| a + 1 == *b), "{name}: {reads:?}");
    }
}

#[test]
fn generation_ends_at_any_stop_id_or_when_the_caller_says_so() {
    let mut engine = engine("deepseek_v3");
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
    assert_eq!(generation.finish_reason, FinishReason::EndOfText(stop));

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
    assert_eq!(generation.finish_reason, FinishReason::Cancelled);
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
            ..SampleConfig::greedy()
        };
        let config = GenerateConfig {
            sample,
            ..greedy(12)
        };
        let continued = engine
            .clone()
            .generate(&prompt, &config, &mut |_| ControlFlow::Continue(()));
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
    let ctx = &mut ForwardContext::new(Compute::F32);
    let last = engine.model.hidden(ids, ctx).slice([0..1, 699..700]);
    let last = last.reshape([1, engine.model.config.hidden_size]);
    let logits = engine.model.logits(last, ctx).into_data();
    let config = greedy(1).sample;
    let expected = Sampler::new(config)
        .unwrap()
        .sample(&logits.try_to_vec::<f32>().unwrap(), &prompt);
    let found = engine
        .clone()
        .generate(&prompt, &greedy(1), &mut |_| ControlFlow::Continue(()));
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
        let continued = engine
            .clone()
            .generate(prompt, &greedy(max_tokens), &mut |_| {
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
    let nothing = engine
        .clone()
        .generate(&[3], &greedy(0), &mut |_| panic!("no token may be told"));
    assert_eq!(nothing.unwrap().token_ids, [0u32; 0]);
}

#[test]
fn every_file_says_where_text_ends() {
    let copy = |config: Option<Value>, generation: Option<Value>| {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(goldens::path("qwen2_distill")).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        for (name, ids) in [
            ("config.json", config),
            ("generation_config.json", generation),
        ] {
            let path = folder.path().join(name);
            let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            match ids {
                Some(ids) => json["eos_token_id"] = ids,
                None => _ = json.as_object_mut().unwrap().remove("eos_token_id"),
            }
            std::fs::write(path, json.to_string()).unwrap();
        }
        folder
    };
    let check = |config: Value, generation: Option<Value>, expected: &[u32], notes: &[&str]| {
        let folder = copy(Some(config), generation);
        let opened = Folder::open(folder.path()).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let found = end_of_text(&opened, Some(&tokenizer)).unwrap();
        assert_eq!(found.ids, expected);
        assert_eq!(found.notes.len(), notes.len(), "{:?}", found.notes);
        for (note, part) in found.notes.iter().zip(notes) {
            assert!(note.contains(part), "{note}");
        }
    };
    // The tokenizer ends texts with 1.
    check(json!(1), Some(json!([1, 102])), &[1, 102], &[]);
    check(json!([1, 102]), Some(json!(null)), &[1, 102], &[]);
    check(json!(null), None, &[1], &[]);
    check(
        json!(7),
        Some(json!([8, 9])),
        &[1, 7, 8, 9],
        &["has [7], `generation_config.json` does not"],
    );
    check(
        json!([7, 320]),
        Some(json!([7, 320])),
        &[1, 7],
        &["below the vocabulary size 320, found [320]"],
    );

    let folder = copy(Some(json!("end")), None);
    let opened = Folder::open(folder.path()).unwrap();
    let problem = end_of_text(&opened, None).unwrap_err().to_string();
    assert!(
        problem.contains("config.json") && problem.contains("\"end\""),
        "{problem}"
    );
}

/// Prompts of different lengths, one of a single token.
fn prompts(name: &str) -> Vec<Vec<u32>> {
    let (prompt, more) = golden(name);
    let whole = [prompt, more].concat();
    [5, 1, 3, 8, 2, whole.len(), 4, 7]
        .map(|len| whole[..len].to_vec())
        .to_vec()
}

#[test]
fn a_sequence_in_a_batch_gives_the_text_it_gives_alone() {
    for (name, engine) in ALL
        .into_iter()
        .flat_map(|name| engines(name).map(|e| (name, e)))
    {
        let prompts = prompts(name);
        let config = GenerateConfig {
            sample: SampleConfig {
                temperature: 0.8,
                top_p: 0.9,
                seed: 3,
                ..SampleConfig::greedy()
            },
            ..greedy(9)
        };
        let alone = |prompt: &Vec<u32>| {
            let generation = engine
                .clone()
                .generate(prompt, &config, &mut |_| ControlFlow::Continue(()));
            generation.unwrap().token_ids
        };
        let expected: Vec<Vec<u32>> = prompts.iter().map(alone).collect();
        // Fewer places than prompts: some join when others have ended.
        for batch in [8, 3] {
            let found = engine
                .clone()
                .generate_all(&prompts, &config, batch, &mut |_, _| {});
            let found: Vec<_> = found.unwrap().into_iter().map(|g| g.token_ids).collect();
            assert_eq!(
                found, expected,
                "{name}, {batch} at a time, {:?}",
                engine.cache
            );
        }
    }
}

#[test]
fn logits_of_sequences_decoded_together_are_those_of_each_alone_bit_for_bit() {
    for (name, engine) in ALL
        .into_iter()
        .flat_map(|name| engines(name).map(|e| (name, e)))
    {
        let prompts = prompts(name);
        let mut caches = vec![Cache::new(&engine.model.config, engine.cache); prompts.len()];
        let ctx = |caches: &mut [Cache], ids: &[u32]| -> Vec<f32> {
            let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
            let shape = [caches.len(), ids.len() / caches.len()];
            let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, shape), &engine.device);
            let ctx = &mut ForwardContext::cached(Compute::F32, caches);
            let hidden = engine.model.hidden(ids, ctx);
            let hidden = hidden.reshape([shape[0] * shape[1], engine.model.config.hidden_size]);
            let logits = engine.model.logits(hidden, ctx).into_data();
            logits.try_to_vec().unwrap()
        };
        for (cache, prompt) in caches.chunks_mut(1).zip(&prompts) {
            ctx(cache, prompt);
        }
        for step in 0..3 {
            let ids: Vec<u32> = (0..8).map(|row| 7 * row + step + 2).collect();
            let mut apart = caches.clone();
            let alone = apart.chunks_mut(1).zip(&ids);
            let alone: Vec<f32> = alone.flat_map(|(cache, id)| ctx(cache, &[*id])).collect();
            let together = ctx(&mut caches, &ids);
            assert!(together == alone, "{name}, step {step}, {:?}", engine.cache);
        }
        let held = caches.iter().zip(&prompts);
        assert!(
            held.map(|(cache, prompt)| cache.len() - prompt.len())
                .all(|n| n == 3)
        );
    }
}

#[test]
fn a_prompt_that_continues_a_prefix_reads_only_what_is_new() {
    let names = ["deepseek_v3", "qwen2_distill"];
    for (name, engine) in names
        .into_iter()
        .flat_map(|name| engines(name).map(|e| (name, e)))
    {
        let (prompt, more) = golden(name);
        let run = |prefix, prompt: &[u32]| {
            let mut sequence = Sequence::new(&engine.model, prefix, prompt, &greedy(6)).unwrap();
            while sequence.finish_reason().is_none() {
                engine.clone().step([&mut sequence]).unwrap();
            }
            sequence.finish()
        };
        let new = || KvPrefix::new(&engine.model, engine.cache);
        let (first, prefix) = run(new(), &prompt);
        assert_eq!(first.token_ids, more[..6]);
        assert_eq!(prefix.token_ids(), [&prompt[..], &more[..5]].concat());

        // The answer, something else, the beginning alone, and something without it.
        let longer = [&prompt[..], &more[..6], &[9, 8, 7]].concat();
        let other = [&prompt[..], &[5, 6]].concat();
        for (prompt, read) in [(&longer, 4), (&other, 2), (&prompt, 1), (&vec![2, 3, 4], 3)] {
            let (found, after) = run(prefix.clone(), prompt);
            let (expected, _) = run(new(), prompt);
            assert_eq!(found.token_ids, expected.token_ids, "{name} {prompt:?}");
            assert_eq!(found.prefill_tokens, read, "{name} {prompt:?}");
            assert_eq!(after.token_ids()[..prompt.len()], prompt[..]);
        }
    }
}

const ADAPTERS: [&str; 4] = ["classic", "peft", "rslora", "dora"];

fn attach(model: &mut Model, name: &str) {
    let adapter = goldens::path("deepseek_v3").join(format!("adapter_{name}"));
    let adapter = Adapter::open(&adapter).unwrap();
    let adapter = AdapterWeights::read(&adapter, &model.config).unwrap();
    adapter.attach(model, &device::of_tests()).unwrap();
}

/// A model that holds all adapters, and the model alone and with each of them.
fn with_adapters(speculative: bool, compute: Compute) -> (Engine, Vec<Engine>) {
    let mut engine = engine("deepseek_v3");
    engine.compute = compute;
    let folder = Folder::open(&goldens::path("deepseek_v3")).unwrap();
    engine.mtp = speculative.then(|| load::load_mtp(&folder, &engine.device).unwrap());
    let mut alone = vec![engine.clone(); 1 + ADAPTERS.len()];
    for (engine, name) in alone[1..].iter_mut().zip(ADAPTERS) {
        attach(&mut engine.model, name);
    }
    // As a program does it.
    if compute == Compute::MatchWeight {
        engine.plan_repack(usize::MAX);
        for engine in &mut alone {
            engine.plan_repack(usize::MAX);
        }
    }
    for name in ADAPTERS {
        let attached = engine.add_adapter(|model| {
            attach(model, name);
            Ok::<_, ()>(())
        });
        attached.unwrap();
    }
    (engine, alone)
}

#[test]
fn a_sequence_with_its_adapter_gives_the_same_text_in_a_batch_of_several_adapters() {
    let config = GenerateConfig {
        logprobs: Some(2),
        ..greedy(9)
    };
    let prompts = prompts("deepseek_v3");
    let said = |found: Generation| (found.token_ids, found.logprobs);
    // Numbers of adapters from 1 on, 0 for none.
    let numbers = [0, 3, 1, 1, 4, 2, 0, 1];
    for (speculative, compute) in [
        (false, Compute::F32),
        (true, Compute::F32),
        (false, Compute::MatchWeight),
    ] {
        let (engine, alone) = with_adapters(speculative, compute);
        let texts = prompts.iter().zip(numbers);
        let expected = texts.clone().map(|(prompt, number)| {
            let go_on = &mut |_| ControlFlow::Continue(());
            said(
                alone[number]
                    .clone()
                    .generate(prompt, &config, go_on)
                    .unwrap(),
            )
        });
        let expected: Vec<_> = expected.collect();
        let without = alone[0]
            .clone()
            .generate(&prompts[3], &config, &mut |_| ControlFlow::Continue(()));
        assert_ne!(expected[3], said(without.unwrap()));
        for batch in [8, 3] {
            let begun = texts.clone().map(|(prompt, number)| {
                let begun = match number {
                    0 => engine.start(prompt, &config),
                    number => engine.start_with_adapter(number - 1, prompt, &config),
                };
                begun.unwrap()
            });
            let found = engine
                .clone()
                .finish_all(begun.collect(), batch, &mut |_, _| {});
            let found: Vec<_> = found.unwrap().into_iter().map(said).collect();
            assert!(
                found == expected,
                "{compute:?}, {batch} at a time, speculative: {speculative}"
            );
        }
    }
}
