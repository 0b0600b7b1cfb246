//! The model against logits, routing, gradients and generations of an independent implementation (`tests/goldens`).

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]
#![expect(
    clippy::print_stdout,
    reason = "figures for whoever runs these with --no-capture"
)]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::{Adapter, DType, Folder, Safetensors};
use moeforge_model::adapt::{self, LoraConfig, Scaling};
use moeforge_model::export::{WeightFormat, merge};
use moeforge_model::{
    AdapterWeights, Cache, CacheType, Compute, ForwardContext, Model, ModuleMut, Mtp, Recorder,
    Training, keys, load,
};
use serde_json::Value;

/// The bar for f32 logits that spread over about 10.
const LOGITS: f32 = 2e-4;
/// Relative error of gradient norms: f32 backward passes in another order.
const NORMS: f64 = 1e-3;

const ALL: [&str; 7] = [
    "deepseek_v2_lite",
    "deepseek_v2_group",
    "deepseek_v3",
    "deepseek_v3_fp8",
    "deepseek_v3_fp8_ue8m0",
    "qwen2_distill",
    "llama_distill",
];

struct Golden {
    folder: Folder,
    tensors: Safetensors,
    json: Value,
}

impl Golden {
    fn open(name: &str) -> Self {
        let folder = goldens::path(name);
        let json = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        Self {
            tensors: Safetensors::open(&folder.join("golden.safetensors")).unwrap(),
            json: serde_json::from_str(&json).unwrap(),
            folder: Folder::open(&folder).unwrap(),
        }
    }

    fn floats(&self, name: &str) -> (Vec<f32>, Vec<usize>) {
        let tensor = self.tensors.tensor(name).unwrap();
        (tensor.to_f32().unwrap(), tensor.shape)
    }

    fn adapter(&self, dialect: &str, model: &mut Model, device: &Device) -> AdapterWeights {
        let adapter =
            Adapter::open(&self.folder.path().join(format!("adapter_{dialect}"))).unwrap();
        let weights = AdapterWeights::read(&adapter, &model.config).unwrap();
        weights.attach(model, device).unwrap();
        weights
    }

    fn ids(&self, device: &Device) -> Tensor<2, Int> {
        let tensor = self.tensors.tensor("input_ids").unwrap();
        let ids: Vec<i32> = tensor
            .bytes
            .chunks(8)
            .map(|id| i64::from_le_bytes(id.try_into().unwrap()) as i32)
            .collect();
        Tensor::from_data(
            TensorData::new(ids, [tensor.shape[0], tensor.shape[1]]),
            device,
        )
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .fold(0.0, |max, (a, b)| max.max((a - b).abs()))
}

fn logits(model: &Model, ids: Tensor<2, Int>, ctx: &mut ForwardContext<'_>) -> Vec<f32> {
    let [batch, seq] = ids.dims();
    let hidden = model
        .hidden(ids, ctx)
        .reshape([batch * seq, model.config.hidden_size]);
    values(model.logits(hidden, ctx))
}

/// Inputs shifted by one: the targets of every position, −100 at the end.
fn targets(ids: &Tensor<2, Int>) -> Tensor<2, Int> {
    let [batch, seq] = ids.dims();
    let last = Tensor::full([batch, 1], -100, &ids.device());
    Tensor::cat(vec![ids.clone().slice([0..batch, 1..seq]), last], 1)
}

fn mean_loss(model: &Model, ids: Tensor<2, Int>, ctx: &mut ForwardContext<'_>) -> Tensor<1> {
    let [batch, seq] = ids.dims();
    let targets = targets(&ids);
    let hidden = model.hidden(ids, ctx);
    model.loss(hidden, targets, ctx).sum() / (batch * (seq - 1)) as f32
}

#[test]
fn logits_and_routing_are_the_goldens() {
    let device = kernels::device::of_tests();
    for name in ALL {
        let golden = Golden::open(name);
        let model = load::load(&golden.folder, Training::Frozen, &device).unwrap();
        let mut recorder = Recorder::of_routing();
        let mut ctx = ForwardContext::recorded(Compute::F32, &mut recorder);
        let found = logits(&model, golden.ids(&device), &mut ctx);
        let difference = largest_difference(&found, &golden.floats("logits").0);
        println!("{name}: largest difference of the logits {difference:.1e}");
        assert!(difference <= LOGITS, "{name}: {difference}");

        for record in &recorder.routing {
            let expected = golden
                .tensors
                .tensor(&format!("router.{}.indices", record.layer_idx))
                .unwrap();
            let expected: Vec<i32> = expected
                .bytes
                .chunks(4)
                .map(|id| i32::from_le_bytes(id.try_into().unwrap()))
                .collect();
            let (weights, shape) = golden.floats(&format!("router.{}.weights", record.layer_idx));
            let ids: Vec<i32> = record.routed.ids.clone().into_data().try_to_vec().unwrap();
            let found = values(record.routed.weights.clone());
            // The goldens list a token's experts in no particular order: compare as sets with their weights.
            for token in 0..shape[0] {
                let row = token * shape[1]..(token + 1) * shape[1];
                let sorted = |ids: &[i32], weights: &[f32]| {
                    let mut pairs: Vec<_> =
                        ids.iter().copied().zip(weights.iter().copied()).collect();
                    pairs.sort_unstable_by_key(|(id, _)| *id);
                    pairs.into_iter().unzip::<_, _, Vec<_>, Vec<_>>()
                };
                let (ids, found) = sorted(&ids[row.clone()], &found[row.clone()]);
                let (expected_ids, expected) = sorted(&expected[row.clone()], &weights[row]);
                assert_eq!(
                    ids, expected_ids,
                    "{name} layer {} token {token}",
                    record.layer_idx
                );
                assert!(largest_difference(&found, &expected) < LOGITS);
            }
        }
    }
}

#[test]
fn both_dialects_of_the_config_mean_the_same() {
    for name in ALL {
        let folder = Folder::open(&goldens::path(name)).unwrap();
        let path = goldens::path(name).join("config_v5_style.json");
        let v5 = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let v5 = moeforge_model::ModelConfig::from_json(&v5, &path).unwrap();
        assert_eq!(v5, load::read_config(&folder).unwrap(), "{name}");
    }
}

#[test]
fn hidden_states_follow_the_goldens_to_the_last_norm() {
    let device = kernels::device::of_tests();
    for name in ALL {
        let golden = Golden::open(name);
        let model = load::load(&golden.folder, Training::Frozen, &device).unwrap();
        let found =
            values(model.hidden(golden.ids(&device), &mut ForwardContext::new(Compute::F32)));
        let (expected, _) = golden.floats("hidden.final_norm");
        let found = &found[..expected.len()]; // The FP8 goldens hold the first row only.
        assert!(largest_difference(found, &expected) < LOGITS, "{name}");
    }
}

#[test]
fn cached_decoding_gives_the_golden_tokens() {
    let device = kernels::device::of_tests();
    for name in ALL {
        let golden = Golden::open(name);
        let model = load::load(&golden.folder, Training::Frozen, &device).unwrap();
        let list = |key: &str| -> Vec<i32> {
            golden.json["generation"][key]
                .as_array()
                .unwrap()
                .iter()
                .map(|id| id.as_i64().unwrap() as i32)
                .collect()
        };
        let (prompt, expected) = (list("prompt_ids"), list("new_tokens"));
        // Prefill in one pass, and in two: the second continues a cache with the expanded form, or, short, with the
        // absorbed one.
        for pieces in [
            vec![&prompt[..]],
            vec![&prompt[..3], &prompt[3..]],
            vec![&prompt[..5], &prompt[5..]],
        ] {
            let mut caches = [Cache::new(&model.config, CacheType::F32)];
            let mut step = |ids: &[i32]| {
                let ids = Tensor::<2, Int>::from_data(
                    TensorData::new(ids.to_vec(), [1, ids.len()]),
                    &device,
                );
                let all = logits(
                    &model,
                    ids,
                    &mut ForwardContext::cached(Compute::F32, &mut caches),
                );
                let last = &all[all.len() - model.config.vocab_size..];
                (0..last.len())
                    .max_by(|a, b| last[*a].total_cmp(&last[*b]))
                    .unwrap() as i32
            };
            let mut next = pieces.iter().map(|piece| step(piece)).last().unwrap();
            let mut found = vec![next];
            while found.len() < expected.len() {
                next = step(&[next]);
                found.push(next);
            }
            assert_eq!(found, expected, "{name}");
        }
    }
}

#[test]
fn cached_logits_are_the_full_ones() {
    let device = kernels::device::of_tests();
    for name in ALL {
        let golden = Golden::open(name);
        let model = load::load(&golden.folder, Training::Frozen, &device).unwrap();
        let ids = golden.ids(&device);
        let ([batch, seq], vocab) = (ids.dims(), model.config.vocab_size);
        let full = logits(&model, ids.clone(), &mut ForwardContext::new(Compute::F32));
        let mut caches = vec![Cache::new(&model.config, CacheType::F32); batch];
        for position in 0..seq {
            let one = ids.clone().slice([0..batch, position..position + 1]);
            let found = logits(
                &model,
                one,
                &mut ForwardContext::cached(Compute::F32, &mut caches),
            );
            for row in 0..batch {
                let expected = &full[(row * seq + position) * vocab..][..vocab];
                let difference = largest_difference(&found[row * vocab..][..vocab], expected);
                assert!(difference <= LOGITS, "{name} at {position}: {difference}");
            }
        }
        assert!(caches.iter().all(|cache| cache.len() == seq));
    }
}

/// Logits of some positions for the token after the next.
fn mtp_logits(
    model: &Model,
    mtp: &Mtp,
    hidden: Tensor<3>,
    next_ids: Tensor<2, Int>,
    ctx: &mut ForwardContext<'_>,
) -> Vec<f32> {
    let hidden = mtp.hidden(model, hidden, next_ids, ctx);
    let [batch, seq, width] = hidden.dims();
    values(mtp.logits(model, hidden.reshape([batch * seq, width]), ctx))
}

#[test]
fn what_multi_token_prediction_says_is_the_goldens() {
    let (device, golden) = (kernels::device::of_tests(), Golden::open("deepseek_v3"));
    let model = load::load(&golden.folder, Training::Frozen, &device).unwrap();
    let mtp = load::load_mtp(&golden.folder, &device).unwrap();
    // The file's copies are the model's own.
    assert!(mtp.embed_tokens.is_none() && mtp.shared_head.head.is_none());
    let (expected, shape) = golden.floats("mtp.logits");
    let [batch, seq, vocab] = shape[..] else {
        panic!("{shape:?}")
    };
    let ids = golden.ids(&device);
    let hidden = model.hidden(ids.clone(), &mut ForwardContext::new(Compute::F32));
    let hidden = hidden.slice([0..batch, 0..seq]);
    let next_ids = ids.slice([0..batch, 1..seq + 1]);
    let ctx = &mut ForwardContext::new(Compute::F32);
    let found = mtp_logits(&model, &mtp, hidden.clone(), next_ids.clone(), ctx);
    let difference = largest_difference(&found, &expected);
    println!("multi-token prediction: logits differ by at most {difference:.1e}");
    assert!(difference <= LOGITS, "{difference}");

    // In pieces, after one that was forgotten again.
    let mut caches = vec![Mtp::cache(&model.config, CacheType::F32); batch];
    for (start, piece) in [(0, 3), (3, 20), (3, 9), (12, 1), (13, 2), (15, seq - 15)] {
        caches.iter_mut().for_each(|cache| cache.truncate(start));
        let piece = start..start + piece;
        let hidden = hidden.clone().slice([0..batch, piece.clone()]);
        let next_ids = next_ids.clone().slice([0..batch, piece.clone()]);
        let ctx = &mut ForwardContext::cached(Compute::F32, &mut caches);
        let found = mtp_logits(&model, &mtp, hidden, next_ids, ctx);
        for (row, found) in found.chunks(piece.len() * vocab).enumerate() {
            let expected = &expected[(row * seq + start) * vocab..][..found.len()];
            let difference = largest_difference(found, expected);
            assert!(difference <= LOGITS, "{piece:?}: {difference}");
        }
    }
}

#[test]
fn a_model_without_multi_token_prediction_says_so() {
    let device = kernels::device::of_tests();
    let folder = Golden::open("deepseek_v2_lite").folder;
    let error = load::load_mtp(&folder, &device).unwrap_err().to_string();
    assert!(error.contains("num_nextn_predict_layers"), "{error}");
    let mut config = load::read_config(&folder).unwrap();
    let fresh = load::fresh_mtp(&config, 0, &device).unwrap();
    assert!(fresh.is_none());
    config.num_nextn_predict_layers = 1;
    let fresh = load::fresh_mtp(&config, 0, &device).unwrap().unwrap();
    assert_eq!(
        fresh.eh_proj.weight.dims(),
        [config.hidden_size, 2 * config.hidden_size]
    );
    assert!(fresh.size_bytes() > fresh.eh_proj.weight.size_bytes());
}

#[test]
fn loss_and_gradients_are_the_goldens() {
    let device = kernels::device::of_tests().autodiff();
    for name in ALL {
        let golden = Golden::open(name);
        let model = load::load(&golden.folder, Training::Full, &device).unwrap();
        let loss = mean_loss(
            &model,
            golden.ids(&device),
            &mut ForwardContext::new(Compute::F32),
        );
        let mut gradients = loss.backward();
        let loss = f64::from(loss.into_scalar::<f32>());
        let expected = golden.json["loss"].as_f64().unwrap();
        assert!(
            (loss / expected - 1.0).abs() < 1e-5,
            "{name}: loss {loss}, expected {expected}"
        );

        let mut norms: std::collections::BTreeMap<String, f64> = Default::default();
        for (parameter, gradient) in model.gradients(&mut gradients) {
            let gradient = values(gradient);
            for (key, range) in model.parameter_keys(&parameter, gradient.len()) {
                let norm = gradient[range]
                    .iter()
                    .map(|g| f64::from(*g).powi(2))
                    .sum::<f64>()
                    .sqrt();
                norms.insert(key, norm);
            }
        }
        let expected = golden.json["grad_norms"].as_object().unwrap();
        assert_eq!(
            norms.keys().collect::<Vec<_>>(),
            expected
                .keys()
                .collect::<std::collections::BTreeSet<_>>()
                .into_iter()
                .collect::<Vec<_>>(),
            "{name}"
        );
        for (key, norm) in &norms {
            let expected = expected[key].as_f64().unwrap();
            assert!(
                (norm / expected - 1.0).abs() < NORMS,
                "{name} {key}: {norm}, expected {expected}"
            );
        }
    }
}

/// The fixtures that come with adapters, and PEFT's two dialects.
const ADAPTED: [&str; 2] = ["deepseek_v2_lite", "deepseek_v3"];
const DIALECTS: [&str; 2] = ["peft", "classic"];

#[test]
fn adapters_of_both_dialects_give_the_golden_logits() {
    let device = kernels::device::of_tests();
    for (name, dialect) in ADAPTED
        .into_iter()
        .flat_map(|name| DIALECTS.map(|dialect| (name, dialect)))
    {
        let golden = Golden::open(name);
        let mut model = load::load(&golden.folder, Training::Frozen, &device).unwrap();
        golden.adapter(dialect, &mut model, &device);
        let found = logits(
            &model,
            golden.ids(&device),
            &mut ForwardContext::new(Compute::F32),
        );
        let difference =
            largest_difference(&found, &golden.floats(&format!("lora_{dialect}.logits")).0);
        println!("{name} {dialect}: largest difference of the logits {difference:.1e}");
        assert!(difference <= LOGITS, "{name} {dialect}: {difference}");
    }
}

#[test]
fn adapted_decoding_agrees_with_the_whole_sequence() {
    // The absorbed form must see the update of kv_b_proj.
    let device = kernels::device::of_tests();
    for name in ADAPTED {
        let golden = Golden::open(name);
        let mut model = load::load(&golden.folder, Training::Frozen, &device).unwrap();
        golden.adapter("peft", &mut model, &device);
        let ids = golden.ids(&device);
        let ([batch, seq], vocab) = (ids.dims(), model.config.vocab_size);
        let full = golden.floats("lora_peft.logits").0;
        let mut caches = vec![Cache::new(&model.config, CacheType::F32); batch];
        for position in 0..seq {
            let one = ids.clone().slice([0..batch, position..position + 1]);
            let found = logits(
                &model,
                one,
                &mut ForwardContext::cached(Compute::F32, &mut caches),
            );
            for row in 0..batch {
                let expected = &full[(row * seq + position) * vocab..][..vocab];
                let difference = largest_difference(&found[row * vocab..][..vocab], expected);
                assert!(difference <= LOGITS, "{name} at {position}: {difference}");
            }
        }
    }
}

#[test]
fn adapters_are_written_as_they_were_read() {
    let device = kernels::device::of_tests();
    for (name, dialect) in ADAPTED
        .into_iter()
        .flat_map(|name| DIALECTS.map(|dialect| (name, dialect)))
    {
        let golden = Golden::open(name);
        let mut model = load::load(&golden.folder, Training::Frozen, &device).unwrap();
        golden.adapter(dialect, &mut model, &device);
        let original =
            Adapter::open(&golden.folder.path().join(format!("adapter_{dialect}"))).unwrap();
        let (config, tensors) = AdapterWeights::from_model(&model, Scaling::Plain, 0.0)
            .files(".")
            .unwrap();
        assert_eq!(
            (config.r, config.lora_alpha),
            (original.config.r, original.config.lora_alpha)
        );
        // Besides the experts: what PEFT would take for experts by its name.
        let [found, expected] = [&config, &original.config].map(|config| {
            let parameters = config.target_parameters.iter().flatten();
            let of_experts = parameters.filter(|name| name.starts_with("mlp.experts."));
            of_experts.cloned().collect::<Vec<_>>()
        });
        assert_eq!(found, expected, "{name} {dialect}");
        assert_eq!(tensors.len(), original.tensors().len(), "{name} {dialect}");
        for tensor in &tensors {
            let expected = original.tensor(&tensor.name).unwrap();
            assert_eq!(tensor.shape, expected.shape, "{}", tensor.name);
            assert_eq!(
                tensor.to_f32().unwrap(),
                expected.to_f32().unwrap(),
                "{}",
                tensor.name
            );
        }
    }
}

#[test]
fn stacked_updates_of_one_parameter_stay_stacked() {
    let device = kernels::device::of_tests();
    let golden = Golden::open("deepseek_v3");
    for down in [true, false] {
        let mut model = load::load(&golden.folder, Training::Frozen, &device).unwrap();
        golden.adapter("peft", &mut model, &device);
        for (_, module) in model.modules_mut() {
            if let ModuleMut::Experts(experts) = module
                && let Some(lora) = &mut experts.lora
            {
                *if down {
                    &mut lora.gate_up_proj
                } else {
                    &mut lora.down_proj
                } = None;
            }
        }
        let run = |model: &Model| {
            logits(
                model,
                golden.ids(&device),
                &mut ForwardContext::new(Compute::F32),
            )
        };
        let expected = run(&model);

        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("adapter");
        let adapter = AdapterWeights::from_model(&model, Scaling::Plain, 0.0);
        let (config, tensors) = adapter.files(".").unwrap();
        let targets = config.target_parameters.clone().unwrap();
        let name = if down { "down_proj" } else { "gate_up_proj" };
        assert_eq!(targets, [format!("mlp.experts.{name}")]);
        let mut writer = checkpoint::FolderWriter::create(&path).unwrap();
        Adapter::save_into(&mut writer, &config, &tensors).unwrap();
        writer.finish().unwrap();
        let read = AdapterWeights::read(&Adapter::open(&path).unwrap(), &model.config).unwrap();
        let mut again = load::load(&golden.folder, Training::Frozen, &device).unwrap();
        read.attach(&mut again, &device).unwrap();
        assert_eq!(run(&again), expected);
    }
}

#[test]
fn adapter_gradients_are_the_goldens() {
    let device = kernels::device::of_tests().autodiff();
    for name in ADAPTED {
        let golden = Golden::open(name);
        let mut model = load::load(&golden.folder, Training::Frozen, &device).unwrap();
        golden.adapter("peft", &mut model, &device);
        let loss = mean_loss(
            &model,
            golden.ids(&device),
            &mut ForwardContext::new(Compute::F32),
        );
        let mut gradients = loss.backward();
        let found = model.gradients(&mut gradients);
        // Put each gradient in its parameter's place: the adapter's own files then name them as PEFT does.
        let mut by_name: std::collections::BTreeMap<_, _> = found.into_iter().collect();
        model.map_parameters(&mut |name, values| by_name.remove(name).unwrap_or(values));
        let (_, tensors) = AdapterWeights::from_model(&model, Scaling::Plain, 0.0)
            .files(".")
            .unwrap();
        let expected = golden.json["lora_peft"]["grad_norms"].as_object().unwrap();
        assert_eq!(tensors.len(), expected.len());
        for tensor in &tensors {
            let norm = tensor
                .to_f32()
                .unwrap()
                .iter()
                .map(|g| f64::from(*g).powi(2))
                .sum::<f64>()
                .sqrt();
            let expected = expected[&*tensor.name].as_f64().unwrap();
            assert!(
                (norm / expected - 1.0).abs() < NORMS,
                "{name} {}: {norm}, expected {expected}",
                tensor.name
            );
            if let Ok(whole) = golden
                .tensors
                .tensor(&format!("lora_peft.grad.{}", tensor.name))
            {
                let difference =
                    largest_difference(&tensor.to_f32().unwrap(), &whole.to_f32().unwrap());
                assert!(difference < 1e-4, "{name} {}: {difference}", tensor.name);
            }
        }
    }
}

#[test]
fn merged_models_are_base_plus_adapter() {
    let device = kernels::device::of_tests();
    for (name, dialect) in ADAPTED
        .into_iter()
        .flat_map(|name| DIALECTS.map(|dialect| (name, dialect)))
    {
        let golden = Golden::open(name);
        let mut model = load::load(&golden.folder, Training::Frozen, &device).unwrap();
        let adapter = golden.adapter(dialect, &mut model, &device);
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("merged");
        let report = merge(
            &golden.folder,
            &adapter,
            WeightFormat::F32,
            &out,
            &mut |_, _| {},
        )
        .unwrap();
        assert_eq!(report.adapted, adapter.modules().len());

        let merged = Folder::open(&out).unwrap();
        assert_eq!(
            merged.names().collect::<Vec<_>>(),
            golden.folder.names().collect::<Vec<_>>(),
            "no tensor is lost, MTP included"
        );
        let found = logits(
            &load::load(&merged, Training::Frozen, &device).unwrap(),
            golden.ids(&device),
            &mut ForwardContext::new(Compute::F32),
        );
        let expected = golden.floats(&format!("lora_{dialect}.logits")).0;
        let difference = largest_difference(&found, &expected);
        println!("{name} {dialect}: merged logits differ by {difference:.1e}");
        assert!(difference <= 1e-4, "{name} {dialect}: {difference}");
        for tensor in golden
            .tensors
            .tensors()
            .iter()
            .filter(|tensor| tensor.name.starts_with("lora_peft.merged.") && dialect == "peft")
        {
            let key = tensor.name.trim_start_matches("lora_peft.merged.");
            let found = merged.tensor(key).unwrap().to_f32().unwrap();
            assert!(
                largest_difference(&found, &tensor.to_f32().unwrap()) < 1e-6,
                "{key}"
            );
        }
    }
}

#[test]
fn fp8_products_are_the_goldens() {
    let device = kernels::device::of_tests();
    for name in ["deepseek_v3_fp8", "deepseek_v3_fp8_ue8m0"] {
        let golden = Golden::open(name);
        let model = load::load(&golden.folder, Training::Frozen, &device).unwrap();
        let fp8 = Compute::Fp8(model.config.fp8_scales);
        let found = logits(&model, golden.ids(&device), &mut ForwardContext::new(fp8));
        let expected = golden.floats("w8a8_logits").0;
        let sum: f32 = found
            .iter()
            .zip(&expected)
            .map(|(a, b)| (a - b).abs())
            .sum();
        let mean = sum / expected.len() as f32;
        println!("{name}: logits of FP8 products differ by {mean:.1e} in the mean");
        // Weights alone in FP8 differ from this by 0.36.
        assert!(mean < 5e-3, "{name}: {mean}");
    }
}

#[test]
fn models_merged_in_fp8_keep_what_the_adapter_leaves_alone() {
    let device = kernels::device::of_tests().autodiff();
    for (name, in_powers) in [
        ("deepseek_v3", false),
        ("deepseek_v3_fp8", false),
        ("deepseek_v3_fp8_ue8m0", true),
    ] {
        let golden = Golden::open(name);
        let mut model = load::load(&golden.folder, Training::Frozen, &device).unwrap();
        adapt::attach(&mut model, &small_lora(&["o_proj", "experts"]), &device).unwrap();
        // Fresh factors are an update of zero.
        model.map_parameters(&mut |_, values| values + 0.02);
        let adapter = AdapterWeights::from_model(&model, Scaling::Plain, 0.0);
        let run = |model: &Model| {
            logits(
                model,
                golden.ids(&device),
                &mut ForwardContext::new(Compute::F32),
            )
        };
        let expected = run(&model);

        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("merged");
        let report = merge(
            &golden.folder,
            &adapter,
            WeightFormat::Fp8,
            &out,
            &mut |_, _| {},
        );
        assert_eq!(report.unwrap().adapted, adapter.modules().len());
        let merged = Folder::open(&out).unwrap();
        for key in golden
            .folder
            .names()
            .filter(|key| !key.ends_with("_scale_inv"))
        {
            let (before, after) = (
                golden.folder.tensor(key).unwrap(),
                merged.tensor(key).unwrap(),
            );
            let module = key.trim_end_matches(".weight");
            let endings = ["_proj.weight", "_with_mqa.weight"];
            // MTP's `eh_proj` lies outside of attention and experts, and is published in bf16.
            let is_lowered = !key.ends_with("eh_proj.weight")
                && endings.iter().any(|ending| key.ends_with(ending));
            assert_eq!(after.dtype == DType::F8E4M3, is_lowered, "{key}");
            if adapter.update(module).is_some() {
                let scales = merged.tensor(&keys::scale_key(key)).unwrap();
                let is_power = |scale: &f32| scale.to_bits().trailing_zeros() >= 23;
                let all_powers = scales.to_f32().unwrap().iter().all(is_power);
                assert_eq!(all_powers, in_powers, "{key}");
            } else if before.dtype == after.dtype {
                assert_eq!(before.bytes, after.bytes, "{key}");
            }
        }
        let found = run(&load::load(&merged, Training::Frozen, &device).unwrap());
        let size = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
        let error = size(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
        let relative = (error / size(&mut expected.iter().copied())).sqrt();
        println!("{name}: logits of the FP8 merge differ by {relative:.1e} of their size");
        // The goldens' own products in FP8 move these random models' logits by 0.27 of their size: routing flips.
        assert!(relative < 0.6, "{name}: {relative}");
    }
}

/// The settings of a small LoRA.
fn small_lora(target: &[&str]) -> LoraConfig {
    LoraConfig {
        target: target.iter().map(|target| (*target).into()).collect(),
        exclude: vec![],
        rank: 3,
        alpha: 6.0,
        scaling: Scaling::Plain,
        rank_pattern: vec![],
        alpha_pattern: vec![],
        dropout: 0.0,
        seed: 5,
        use_dora: false,
        experts_share: None,
    }
}

#[test]
fn adapters_of_other_models_are_refused() {
    let device = kernels::device::of_tests();
    let (v2, v3) = (
        Golden::open("deepseek_v2_lite"),
        Golden::open("deepseek_v3"),
    );
    let mut model = load::load(&v3.folder, Training::Frozen, &device).unwrap();
    let adapter = Adapter::open(&v2.folder.path().join("adapter_classic")).unwrap();
    let error = AdapterWeights::read(&adapter, &model.config)
        .unwrap()
        .attach(&mut model, &device)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("adapter_model.safetensors") && error.contains("expected"),
        "{error}"
    );
}

#[test]
fn fp8_weights_train_like_their_dequantized_twin() {
    let device = kernels::device::of_tests().autodiff();
    let golden = Golden::open("deepseek_v3_fp8");
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("twin");
    let config = load::read_config(&golden.folder).unwrap();
    let nothing = AdapterWeights::from_model(
        &load::fresh(&config, Training::Full, 0, &kernels::device::of_tests()).unwrap(),
        Scaling::Plain,
        0.0,
    );
    merge(
        &golden.folder,
        &nothing,
        WeightFormat::F32,
        &out,
        &mut |_, _| {},
    )
    .unwrap();
    let settings = small_lora(&["all-linear"]);
    let gradients = |folder: &Folder| {
        let mut model = load::load(folder, Training::Frozen, &device).unwrap();
        adapt::attach(&mut model, &settings, &device).unwrap();
        // Fresh factors have lora_b zero and so no gradient of lora_a: give both some values.
        model.map_parameters(&mut |name, values| {
            let shift = if name.ends_with("lora_b") { 0.01 } else { 0.0 };
            values + shift
        });
        let loss = mean_loss(
            &model,
            golden.ids(&device),
            &mut ForwardContext::new(Compute::F32),
        );
        let mut gradients = loss.backward();
        (loss.into_scalar::<f32>(), model.gradients(&mut gradients))
    };
    let ((loss, found), (twin_loss, twin)) = (
        gradients(&golden.folder),
        gradients(&Folder::open(&out).unwrap()),
    );
    assert!((loss - twin_loss).abs() < 1e-5, "{loss} {twin_loss}");
    assert!(found.len() > 20);
    for ((name, gradient), (_, twin)) in found.into_iter().zip(twin) {
        let (gradient, twin) = (values(gradient), values(twin));
        let size = twin.iter().fold(0f32, |max, g| max.max(g.abs()));
        let difference = largest_difference(&gradient, &twin);
        assert!(
            difference <= 1e-4 * size.max(1e-3),
            "{name}: {difference} of {size}"
        );
    }
}
