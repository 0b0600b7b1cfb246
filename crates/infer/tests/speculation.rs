//! Text with and without speculative decoding, of models whose drafts are mostly wrong, mostly right, and always right.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::module::Param;
use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::{Adapter, DType, Folder};
use kernels::{ExpertBank, Format, Ggml, Matrix};
use model::export::WeightFormat;
use model::export::convert;
use model::export::gguf::write_gguf;
use model::export::mix::{GgufType, Mix, MixScheme};
use model::modules::attention::Attention;
use model::modules::experts::{ExpertWeights, Experts};
use model::modules::linear::{Frozen, Linear, Weight};
use model::{AdapterWeights, CacheType, Compute, FeedForward, ForwardContext, ModuleMut, load};
use moeforge_infer::{
    Engine, FinishReason, GenerateConfig, Generation, KvPrefix, SampleConfig, Sequence,
};

const NAME: &str = "deepseek_v3";

fn path() -> PathBuf {
    goldens::path(NAME)
}

fn with_module(path: &Path, compute: Compute) -> Engine {
    let mut engine = Engine::open(path, compute, Device::flex()).unwrap();
    let folder = Folder::open(path).unwrap();
    engine.mtp = Some(load::load_mtp(&folder, &engine.device).unwrap());
    engine
}

/// The golden model with its own module: both have random weights, so drafts are wrong.
fn golden() -> Engine {
    with_module(&path(), Compute::F32)
}

fn change(linear: &mut Linear, change: &dyn Fn(&Matrix) -> Matrix) {
    let Weight::Frozen(frozen) = &linear.weight else {
        panic!("a frozen model")
    };
    let matrix = Arc::new(change(&frozen.matrix));
    linear.weight = Weight::Frozen(Frozen { matrix });
}

fn change_experts(experts: &mut Experts, changes: [&dyn Fn(&Matrix) -> Matrix; 3]) {
    let ExpertWeights::Frozen(frozen) = &mut experts.weights else {
        panic!("a frozen model")
    };
    let [gate, up, down] = changes;
    let of =
        |list: &[Matrix], change: &dyn Fn(&Matrix) -> Matrix| list.iter().map(change).collect();
    frozen.bank = Arc::new(ExpertBank::new(
        of(&frozen.bank.gate, gate),
        of(&frozen.bank.up, up),
        of(&frozen.bank.down, down),
    ));
}

fn scaled(matrix: &Matrix, scale: f32) -> Matrix {
    let values: Vec<f32> = matrix.to_f32().iter().map(|value| value * scale).collect();
    Matrix::from_f32(matrix.rows(), matrix.cols(), &values)
}

/// The golden model with scaled layer outputs, and a module that drafts as the model would without layers: the smaller
/// the scale, the more drafts are accepted. At 0 all are, and the next token depends on the last one alone.
fn guided(scale: f32) -> Engine {
    let mut engine = golden();
    let (smaller, as_it_is) = (|w: &Matrix| scaled(w, scale), |w: &Matrix| w.clone());
    for (path, module) in engine.model.modules_mut() {
        match module {
            ModuleMut::Linear(linear)
                if path.ends_with("o_proj") || path.ends_with("down_proj") =>
            {
                change(linear, &smaller);
            }
            ModuleMut::Linear(_) => {}
            ModuleMut::Experts(experts) => {
                change_experts(experts, [&as_it_is, &as_it_is, &smaller]);
            }
        }
    }
    let (norm, width) = (
        engine.model.model.norm.clone(),
        engine.model.config.hidden_size,
    );
    let mtp = engine.mtp.as_mut().unwrap();
    mtp.shared_head.norm = norm;
    mtp.enorm.weight = Param::from_tensor(Tensor::ones([width], &engine.device));
    let mut embedding = vec![0.0; 2 * width * width];
    (0..width).for_each(|i| embedding[2 * width * i + i] = 1.0);
    change(&mut mtp.eh_proj, &|_| {
        Matrix::from_f32(width, 2 * width, &embedding)
    });
    let nothing = |w: &Matrix| scaled(w, 0.0);
    let (Attention::Mla(mla), FeedForward::Moe(moe)) =
        (&mut mtp.layer.self_attn, &mut mtp.layer.mlp)
    else {
        panic!("a layer of DeepSeek V3")
    };
    change(&mut mla.o_proj, &nothing);
    change(
        &mut moe.shared_experts.as_mut().unwrap().down_proj,
        &nothing,
    );
    change_experts(&mut moe.experts, [&as_it_is, &as_it_is, &nothing]);
    engine
}

/// The engine without speculative decoding.
fn plain(engine: &Engine) -> Engine {
    let mut engine = engine.clone();
    engine.mtp = None;
    engine
}

/// An engine, and something of it, with a cache of every form.
fn in_every_form<T: Copy>((engine, of_it): (Engine, T)) -> [(Engine, T); 4] {
    CacheType::ALL.map(|cache| {
        let mut engine = engine.clone();
        engine.cache = cache;
        (engine, of_it)
    })
}

fn config(max_tokens: usize) -> GenerateConfig {
    GenerateConfig {
        max_tokens,
        sample: SampleConfig::greedy(),
        stop_ids: Vec::new(),
        logprobs: Some(3),
    }
}

fn samplers() -> [SampleConfig; 4] {
    let greedy = SampleConfig::greedy();
    let warm = SampleConfig {
        temperature: 0.7,
        top_p: 0.9,
        seed: 3,
        ..greedy
    };
    let penalized = SampleConfig {
        repetition_penalty: 1.3,
        repetition_window: 6,
        ..greedy
    };
    let all = SampleConfig {
        repetition_penalty: 1.1,
        top_k: 40,
        min_p: 0.01,
        seed: 11,
        ..warm
    };
    [greedy, warm, penalized, all]
}

/// Prompts of different lengths, one of a single token.
fn prompts() -> Vec<Vec<u32>> {
    let lengths = [5, 1, 3, 30, 2, 17, 9, 7];
    let prompt = |(i, len): (u32, u32)| {
        (0..len)
            .map(|at| (37 * i + 53 * at + at * at) % 280)
            .collect()
    };
    (0..).zip(lengths).map(prompt).collect()
}

/// The results that speculative decoding does not change.
fn said(generations: Vec<Generation>) -> Vec<impl PartialEq + std::fmt::Debug> {
    let said = |found: Generation| {
        let steps = (found.prefill_tokens, found.decode_steps);
        (found.token_ids, found.logprobs, found.finish_reason, steps)
    };
    generations.into_iter().map(said).collect()
}

/// Checks prompts together and one by one. Returns the numbers of drafted and accepted tokens.
fn check(engine: &Engine, config: &GenerateConfig, batches: &[usize]) -> [usize; 2] {
    let (prompts, without) = (prompts(), plain(engine));
    let all = |engine: &Engine, batch| {
        let found = engine
            .clone()
            .generate_all(&prompts, config, batch, &mut |_, _| {});
        found.unwrap()
    };
    let expected = said(all(&without, 1));
    let mut counts = [0; 2];
    for batch in batches {
        let found = all(engine, *batch);
        for generation in &found {
            assert!(generation.accepted <= generation.drafted);
            counts[0] += generation.drafted;
            counts[1] += generation.accepted;
        }
        assert_eq!(said(found), expected, "{batch} at a time, {config:?}");
    }
    counts
}

#[test]
fn drafts_change_no_token_and_no_probability() {
    let engines = [(golden(), 0.0), (guided(0.15), 0.2), (guided(0.0), 1.0)];
    for (engine, at_least) in engines.into_iter().flat_map(in_every_form) {
        for (i, sample) in samplers().into_iter().enumerate() {
            let config = GenerateConfig {
                sample,
                ..config(14)
            };
            let [drafted, right] = check(&engine, &config, &[1, 2, 4, 7]);
            let share = right as f64 / drafted as f64;
            assert!(drafted > 0, "{at_least} with sampler {i}");
            if i == 0 {
                assert!(share >= at_least, "{share}, expected {at_least}");
                assert!((share < 1.0) == (at_least < 1.0), "{share}");
            }
        }
    }
}

#[test]
fn speculation_with_an_adapter_gives_the_same_text() {
    for dialect in ["adapter_classic", "adapter_peft", "adapter_dora"] {
        for mut engine in [golden(), guided(0.15)] {
            let adapter = Adapter::open(&path().join(dialect)).unwrap();
            let adapter = AdapterWeights::read(&adapter, &engine.model.config).unwrap();
            adapter.attach(&mut engine.model, &engine.device).unwrap();
            let [drafted, _] = check(&engine, &config(10), &[1, 3]);
            assert!(drafted > 0);
        }
    }
}

/// In blocks where the width allows it.
fn in_blocks(matrix: &Matrix) -> Matrix {
    if !matrix.cols().is_multiple_of(32) {
        return matrix.clone();
    }
    let format = Ggml::Q8_0;
    let values = matrix.to_f32();
    let mut bytes = vec![0; values.len() / 32 * 34];
    for (values, bytes) in values
        .chunks(matrix.cols())
        .zip(bytes.chunks_mut(matrix.cols() / 32 * 34))
    {
        format.encode(values, bytes);
    }
    Matrix::dense(
        matrix.rows(),
        matrix.cols(),
        Format::Ggml(format),
        bytes.into(),
    )
    .unwrap()
}

#[test]
fn so_it_is_with_weights_in_blocks_and_products_in_int8() {
    for mut engine in [golden(), guided(0.15)] {
        engine.compute = Compute::MatchWeight;
        for (_, module) in engine.model.modules_mut() {
            match module {
                ModuleMut::Linear(linear) => change(linear, &in_blocks),
                ModuleMut::Experts(experts) => {
                    change_experts(experts, [&in_blocks, &in_blocks, &in_blocks]);
                }
            }
        }
        let mtp = engine.mtp.as_mut().unwrap();
        change(&mut mtp.eh_proj, &in_blocks);
        let FeedForward::Moe(moe) = &mut mtp.layer.mlp else {
            panic!("a layer of DeepSeek V3")
        };
        change_experts(&mut moe.experts, [&in_blocks, &in_blocks, &in_blocks]);
        let stored = check(&engine, &config(10), &[1, 3]);
        let (bytes, mut copied) = (engine.size_bytes(), 0);
        engine.plan_repack(usize::MAX);
        engine.repack_all(&mut |done, total| {
            assert!(done <= total);
            copied = done;
        });
        assert!(copied == bytes && bytes > plain(&engine).model.size_bytes());
        let laid = check(&engine, &config(10), &[1, 3]);
        assert!(stored[0] > 0 && laid[0] > 0);
    }
}

#[test]
fn so_it_is_with_a_gguf_file() {
    let (place, folder) = (tempfile::tempdir().unwrap(), Folder::open(&path()).unwrap());
    let in_blocks = GgufType::Ggml(Ggml::Q8_0);
    for (of, compute) in [
        (GgufType::F32, Compute::F32),
        (in_blocks, Compute::MatchWeight),
    ] {
        let mut mix = Mix::new(MixScheme::Plain(of), "").unwrap();
        let out = place.path().join(format!("{}.gguf", mix.scheme));
        mix.mtp = true;
        write_gguf(&folder, &mix, vec![], &out, &mut |_, _| {}).unwrap();
        let mut engine = with_module(&out, compute);
        let [drafted, _] = check(&engine, &config(10), &[1, 3]);
        assert!(drafted > 0);
        engine.repack_all(&mut |_, _| {});
        check(&engine, &config(10), &[1, 3]);
    }
}

/// As it is published: attention and experts of the module are in FP8, what its layer reads is not.
#[test]
fn so_it_is_with_a_folder_in_fp8() {
    let (place, golden) = (tempfile::tempdir().unwrap(), Folder::open(&path()).unwrap());
    let [coded, decoded] = ["fp8", "f32"].map(|name| place.path().join(name));
    convert(&golden, WeightFormat::Fp8, &coded, &mut |_, _| {}).unwrap();
    let folder = Folder::open(&coded).unwrap();
    convert(&folder, WeightFormat::F32, &decoded, &mut |_, _| {}).unwrap();
    let dtype = |name: &str| {
        let key = format!("model.layers.3.{name}.weight");
        folder.stored(&key).unwrap().dtype
    };
    let [attention, expert] = ["self_attn.kv_b_proj", "mlp.experts.3.up_proj"].map(dtype);
    assert_eq!([attention, expert], [DType::F8E4M3; 2]);
    assert_eq!(dtype("eh_proj"), DType::BF16);

    let engines = [coded, decoded].map(|path| with_module(&path, Compute::F32));
    let [drafted, _] = check(&engines[0], &config(10), &[1, 3]);
    assert!(drafted > 0);
    let text = [&prompts()[3][..], &[4, 9]].concat();
    let [found, expected] = engines.map(|engine| module_logits(&engine, &text));
    for (found, expected) in found.iter().zip(&expected) {
        assert!(
            (found - expected).abs() < 1e-4,
            "{found}, expected {expected}"
        );
    }
}

/// The module's logits for a whole text in one pass: those of position `i` are for token `i + 2`.
fn module_logits(engine: &Engine, text: &[u32]) -> Vec<f32> {
    let (model, mtp) = (&engine.model, engine.mtp.as_ref().unwrap());
    let ids: Vec<i32> = text.iter().map(|id| *id as i32).collect();
    let n = ids.len();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, n]), &engine.device);
    let ctx = &mut ForwardContext::new(Compute::F32);
    let hidden = model.hidden(ids.clone(), ctx).slice([0..1, 0..n - 1]);
    let hidden = mtp.hidden(model, hidden, ids.slice([0..1, 1..n]), ctx);
    let hidden = hidden.reshape([n - 1, model.config.hidden_size]);
    let logits = mtp.logits(model, hidden, ctx).into_data();
    logits.try_to_vec().unwrap()
}

/// The expected numbers of drafted and accepted tokens of a text, by the module's logits over all of it.
fn expected_drafts(engine: &Engine, prompt: &[u32], written: &[u32]) -> [usize; 2] {
    let text = [prompt, written].concat();
    let (n, logits) = (text.len(), module_logits(engine, &text));
    let drafts = logits.chunks(engine.model.config.vocab_size).map(|logits| {
        let ids = (0..logits.len()).rev();
        ids.max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
            .unwrap() as u32
    });
    let drafts: Vec<u32> = drafts.collect();

    // A pass reads token `at` and a draft of the token after it, which the module makes at the position before.
    let ([mut drafted, mut right], mut at) = ([0; 2], prompt.len());
    while at + 2 < n {
        drafted += 1;
        let is_right = drafts[at - 1] == text[at + 1];
        right += usize::from(is_right);
        at += 1 + usize::from(is_right);
    }
    [drafted, right]
}

#[test]
fn the_module_has_read_the_text_and_nothing_else() {
    // The golden module over layers that add little: it reads what they make, and is right now and then.
    let mut mixed = guided(0.15);
    mixed.mtp.as_mut().unwrap().layer = golden().mtp.unwrap().layer;
    let mut rights = 0;
    for engine in [golden(), mixed] {
        for prompt in prompts() {
            let run = |prefix, prompt: &[u32]| run(&engine, prefix, prompt, 40);
            let (found, prefix) = run(engine.empty_prefix(), &prompt);
            let counts = [found.drafted, found.accepted];
            assert_eq!(counts, expected_drafts(&engine, &prompt, &found.token_ids));
            // A text that continues from a prefix has the drafts of one that is read at once.
            let longer = [&prompt[..], &found.token_ids, &[9, 8]].concat();
            let (found, _) = run(prefix, &longer);
            let counts = [found.drafted, found.accepted];
            assert_eq!(counts, expected_drafts(&engine, &longer, &found.token_ids));
            rights += found.accepted;
        }
    }
    assert!(rights > 5, "{rights}");
}

fn run(engine: &Engine, prefix: KvPrefix, prompt: &[u32], n: usize) -> (Generation, KvPrefix) {
    let mut engine = engine.clone();
    let mut sequence = Sequence::new(&engine.model, prefix, prompt, &config(n)).unwrap();
    while sequence.finish_reason().is_none() {
        engine.step([&mut sequence]).unwrap();
    }
    sequence.finish()
}

/// A text that the caller ends after `n` tokens.
fn until(engine: &Engine, config: &GenerateConfig, n: usize) -> Generation {
    let mut left = n;
    let found = engine.clone().generate(&prompts()[0], config, &mut |_| {
        left -= 1;
        match left {
            0 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    });
    found.unwrap()
}

#[test]
fn a_text_ends_where_it_would_without_drafts() {
    // All drafts are accepted, so every second token needs no pass.
    for engine in [guided(0.0), guided(0.15)] {
        let whole = until(&engine, &config(12), 99);
        let without = plain(&engine);
        for n in 0..=12 {
            let found = until(&engine, &config(n), 99);
            assert_eq!(found.token_ids, whole.token_ids[..n]);
            assert_eq!(found.finish_reason, FinishReason::Length);
            assert!(found.drafted <= n.saturating_sub(2));
        }
        for n in 1..=11 {
            let [found, expected] = [&engine, &without].map(|engine| until(engine, &config(12), n));
            assert_eq!(
                (&found.token_ids, found.finish_reason),
                (&expected.token_ids, FinishReason::Cancelled)
            );
            assert_eq!(said(vec![found]), said(vec![expected]), "{n}");
        }
        for stop in &whole.token_ids {
            let config = GenerateConfig {
                stop_ids: vec![*stop],
                ..config(12)
            };
            let [found, expected] = [&engine, &without].map(|engine| until(engine, &config, 99));
            assert_eq!(found.finish_reason, FinishReason::EndOfText(*stop));
            assert_eq!(said(vec![found]), said(vec![expected]), "{stop}");
        }
    }
}

#[test]
fn texts_fill_the_models_positions() {
    for (engine, at_least) in [(guided(0.0), 4), (golden(), 0)] {
        let limit = engine.model.config.max_position_embeddings;
        let prompt: Vec<u32> = (0..limit as u32 - 9).map(|at| at * at % 280).collect();
        let [found, expected] = [&engine, &plain(&engine)]
            .map(|engine| run(engine, engine.empty_prefix(), &prompt, 9).0);
        assert!(found.drafted > 0 && found.accepted >= at_least);
        assert_eq!(said(vec![found]), said(vec![expected]));
    }
}

#[test]
fn a_conversation_is_the_same_with_speculative_decoding() {
    let engines = [golden(), guided(0.0), guided(0.15)];
    for (engine, ()) in engines.into_iter().flat_map(|e| in_every_form((e, ()))) {
        let without = plain(&engine);
        let mut prefixes = [engine.empty_prefix(), without.empty_prefix()];
        let mut text = vec![5, 6, 7];
        // Cut back by some tokens, then longer by others.
        for (turn, (cut, more)) in [(0, 1), (0, 2), (4, 3), (6, 0), (1, 12), (30, 1)]
            .into_iter()
            .enumerate()
        {
            text.truncate(text.len().saturating_sub(cut).max(1));
            text.extend((0..more).map(|i| 40 * turn as u32 + i));
            // Interrupted after some tokens, the last of which may be an accepted draft.
            let turns = prefixes
                .each_mut()
                .map(|prefix| std::mem::replace(prefix, engine.empty_prefix()));
            let [with, plain] = turns;
            let mut found = Vec::new();
            for (engine, prefix) in [(&engine, with), (&without, plain)] {
                let mut engine = engine.clone();
                let mut sequence =
                    Sequence::new(&engine.model, prefix, &text, &config(12)).unwrap();
                while sequence.finish_reason().is_none() {
                    engine.step([&mut sequence]).unwrap();
                    if sequence.token_ids().len() == 5 + turn {
                        sequence.stop();
                    }
                }
                found.push(sequence.finish());
            }
            let ids = found[1].0.token_ids.clone();
            let read: Vec<Vec<u32>> = found.iter().map(|f| f.1.token_ids().to_vec()).collect();
            assert_eq!(read[0], read[1], "turn {turn}");
            let (generations, after): (Vec<_>, Vec<_>) = found.into_iter().unzip();
            let mut said = said(generations);
            let expected = said.pop();
            assert_eq!(said.pop(), expected, "turn {turn}");
            prefixes = after.try_into().unwrap();
            text.extend(ids);
        }
    }
}

#[test]
fn a_prefix_without_drafts_stays_so() {
    let engine = guided(0.0);
    let (found, prefix) = run(
        &engine,
        KvPrefix::new(&engine.model, engine.cache),
        &[5, 6, 7],
        8,
    );
    assert_eq!(found.drafted, 0);
    let (found, _) = run(&plain(&engine), engine.empty_prefix(), &[5, 6, 7], 8);
    assert_eq!(found.drafted, 0);
    let (again, _) = run(&engine, prefix, &[5, 6, 7], 8);
    assert_eq!(again.token_ids, found.token_ids);
}
