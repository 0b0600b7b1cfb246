//! DoRA and rsLoRA against PEFT (`tests/goldens`), and updates of some experts or with shared factors against plain ones.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use std::collections::BTreeMap;

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::{Adapter, Folder, FolderWriter, Notes, Safetensors};
use moeforge_model::adapt::{self, LoraConfig, Scaling, Share};
use moeforge_model::export::merge;
use moeforge_model::export::{WeightFormat, export_subset};
use moeforge_model::{
    AdapterWeights, Cache, CacheType, Compute, ForwardContext, Model, ModuleMut, Training, load,
};

/// Logits that spread over about 10, in f32.
const LOGITS: f32 = 2e-4;
/// Relative error of gradient norms: f32 backward passes in another order.
const NORMS: f64 = 1e-3;
/// Relative error of a loss that is made of sums in another order.
const SUMS: f32 = 1e-5;

const METHODS: [&str; 2] = ["dora", "rslora"];
const MODELS: [&str; 2] = ["deepseek_v3", "qwen2_distill"];

fn open(name: &str, device: &Device) -> Model {
    let folder = Folder::open(&goldens::path(name)).unwrap();
    load::load(&folder, Training::Frozen, device).unwrap()
}

fn read(name: &str, method: &str, model: &Model) -> AdapterWeights {
    let adapter = Adapter::open(&goldens::path(name).join(format!("adapter_{method}"))).unwrap();
    AdapterWeights::read(&adapter, &model.config).unwrap()
}

fn adapted(name: &str, method: &str, device: &Device) -> Model {
    let mut model = open(name, device);
    read(name, method, &model)
        .attach(&mut model, device)
        .unwrap();
    model
}

fn scaling(method: &str) -> Scaling {
    if method == "rslora" {
        Scaling::RsLora
    } else {
        Scaling::Plain
    }
}

fn ids(name: &str, device: &Device) -> Tensor<2, Int> {
    let file = Safetensors::open(&goldens::path(name).join("golden.safetensors")).unwrap();
    let tensor = file.tensor("input_ids").unwrap();
    let ids: Vec<i32> = tensor
        .bytes
        .chunks(8)
        .map(|id| i64::from_le_bytes(id.try_into().unwrap()) as i32)
        .collect();
    let shape = [tensor.shape[0], tensor.shape[1]];
    Tensor::from_data(TensorData::new(ids, shape), device)
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

fn logits(model: &Model, ids: Tensor<2, Int>, ctx: &mut ForwardContext<'_>) -> Tensor<3> {
    let [batch, seq] = ids.dims();
    let hidden = model
        .hidden(ids, ctx)
        .reshape([batch * seq, model.config.hidden_size]);
    let logits = model.logits(hidden, ctx);
    let vocab = logits.dims()[1];
    logits.reshape([batch, seq, vocab])
}

/// The logits of the last positions, as many as the golden has.
fn last(logits: Tensor<3>, positions: usize) -> Vec<f32> {
    let [batch, seq, vocab] = logits.dims();
    values(logits.slice([0..batch, seq - positions..seq, 0..vocab]))
}

fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let pairs = found.iter().zip(expected);
    let largest = pairs.fold(0f32, |max, (f, e)| max.max((f - e).abs()));
    assert!(largest <= tolerance, "{what}: {largest}");
}

fn expected_logits(name: &str, method: &str) -> (Vec<f32>, usize) {
    let file = Safetensors::open(&goldens::path(name).join("methods.safetensors")).unwrap();
    let tensor = file.tensor(&format!("{method}.logits")).unwrap();
    (tensor.to_f32().unwrap(), tensor.shape[1])
}

fn loss(model: &Model, ids: &Tensor<2, Int>, ctx: &mut ForwardContext<'_>) -> Tensor<1> {
    let [batch, seq] = ids.dims();
    let none = Tensor::full([batch, 1], -100, &ids.device());
    let targets = Tensor::cat(vec![ids.clone().slice([0..batch, 1..seq]), none], 1);
    let hidden = model.hidden(ids.clone(), ctx);
    model.loss(hidden, targets, ctx).sum() / (batch * (seq - 1)) as f32
}

fn each(check: impl Fn(&str, &str)) {
    for name in MODELS {
        METHODS.iter().for_each(|method| check(name, method));
    }
}

#[test]
fn logits_are_those_of_peft() {
    let device = kernels::device::of_tests();
    each(|name, method| {
        let model = adapted(name, method, &device);
        let (expected, positions) = expected_logits(name, method);
        let ids = ids(name, &device);
        let found = logits(&model, ids.clone(), &mut ForwardContext::new(Compute::F32));
        assert_close(
            &last(found, positions),
            &expected,
            LOGITS,
            &format!("{name} {method}"),
        );

        // Decoded one by one over a cache, with absorbed latent attention.
        let [batch, seq] = ids.dims();
        let mut caches = vec![Cache::new(&model.config, CacheType::F32); batch];
        let prompt = ids.clone().slice([0..batch, 0..seq - positions]);
        logits(
            &model,
            prompt,
            &mut ForwardContext::cached(Compute::F32, &mut caches),
        );
        let one = |at| {
            let id = ids.clone().slice([0..batch, at..at + 1]);
            logits(
                &model,
                id,
                &mut ForwardContext::cached(Compute::F32, &mut caches),
            )
        };
        let steps = (seq - positions..seq).map(one).collect();
        let found = values(Tensor::cat(steps, 1));
        assert_close(
            &found,
            &expected,
            LOGITS,
            &format!("{name} {method}, decoded"),
        );
    });
}

#[test]
fn adapters_of_mlx_are_read() {
    let device = kernels::device::of_tests();
    for name in ["deepseek_v2_lite", "qwen2_distill"] {
        let mut model = open(name, &device);
        let adapter = Adapter::open(&goldens::path(name).join("adapter_mlx")).unwrap();
        let adapter = AdapterWeights::read(&adapter, &model.config).unwrap();
        adapter.attach(&mut model, &device).unwrap();
        let file = Safetensors::open(&goldens::path(name).join("mlx.safetensors")).unwrap();
        let expected = file.tensor("logits").unwrap();
        let found = logits(
            &model,
            ids(name, &device),
            &mut ForwardContext::new(Compute::F32),
        );
        let (found, expected) = (last(found, expected.shape[1]), expected.to_f32().unwrap());
        assert_close(&found, &expected, LOGITS, name);
    }
}

#[test]
fn gradients_are_those_of_peft() {
    let device = kernels::device::of_tests().autodiff();
    each(|name, method| {
        let json = std::fs::read_to_string(goldens::path(name).join("methods.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let mut model = adapted(name, method, &device);
        let loss = loss(
            &model,
            &ids(name, &device),
            &mut ForwardContext::new(Compute::F32),
        );
        let expected = json[method]["loss"].as_f64().unwrap() as f32;
        assert_close(
            &values(loss.clone().inner()),
            &[expected],
            SUMS * expected,
            name,
        );

        // Put each gradient in its parameter's place: the adapter's own files then name them as PEFT does.
        let found = model.gradients(&mut loss.backward());
        let mut found: BTreeMap<_, _> = found.into_iter().collect();
        model.map_parameters(&mut |name, values| found.remove(name).unwrap_or(values));
        let adapter = AdapterWeights::from_model(&model, scaling(method), 0.0);
        let (_, tensors) = adapter.files(".").unwrap();
        let expected = json[method]["grad_norms"].as_object().unwrap();
        assert_eq!(tensors.len(), expected.len(), "{name} {method}");
        for tensor in tensors {
            let squares = tensor.to_f32().unwrap();
            let squares = squares.iter().map(|g| f64::from(*g).powi(2));
            let (norm, wanted) = (
                squares.sum::<f64>().sqrt(),
                expected[&*tensor.name].as_f64().unwrap(),
            );
            assert!(
                (norm / wanted - 1.0).abs() < NORMS,
                "{name} {method} {}: {norm}, expected {wanted}",
                tensor.name
            );
        }
    });
}

#[test]
fn adapters_are_written_as_peft_wrote_them() {
    let device = kernels::device::of_tests();
    each(|name, method| {
        let original =
            Adapter::open(&goldens::path(name).join(format!("adapter_{method}"))).unwrap();
        let model = adapted(name, method, &device);
        let adapter = AdapterWeights::from_model(&model, scaling(method), 0.0);
        let (config, tensors) = adapter.files(".").unwrap();
        assert_eq!(config.use_dora, method == "dora");
        assert_eq!(tensors.len(), original.tensors().len(), "{name} {method}");
        for tensor in &tensors {
            let expected = original.tensor(&tensor.name).unwrap();
            assert_eq!(
                (&tensor.shape, tensor.to_f32().unwrap()),
                (&expected.shape, expected.to_f32().unwrap()),
                "{}",
                tensor.name
            );
        }
    });
}

#[test]
fn merged_models_predict_what_their_parts_do() {
    let device = kernels::device::of_tests();
    let place = tempfile::tempdir().unwrap();
    each(|name, method| {
        let base = Folder::open(&goldens::path(name)).unwrap();
        let adapter = read(name, method, &open(name, &device));
        let out = place.path().join(format!("{name}-{method}"));
        merge(&base, &adapter, WeightFormat::F32, &out, &mut |_, _| ()).unwrap();
        let merged = Folder::open(&out).unwrap();
        let merged = load::load(&merged, Training::Frozen, &device).unwrap();
        let (expected, positions) = expected_logits(name, method);
        let found = logits(
            &merged,
            ids(name, &device),
            &mut ForwardContext::new(Compute::F32),
        );
        assert_close(
            &last(found, positions),
            &expected,
            LOGITS,
            &format!("{name} {method}"),
        );
    });
}

#[test]
fn dora_on_fp8_has_the_gradients_of_dora_on_the_same_values() {
    let device = kernels::device::of_tests().autodiff();
    let ids = ids("deepseek_v3_fp8", &device);
    let base = Folder::open(&goldens::path("deepseek_v3_fp8")).unwrap();
    let mut packed = load::load(&base, Training::Frozen, &device).unwrap();
    let mut dense = load::load(&base, Training::Full, &device).unwrap();
    for model in [&mut packed, &mut dense] {
        attach(
            model,
            &LoraConfig {
                use_dora: true,
                exclude: vec!["experts".into()],
                ..config()
            },
            &device,
        );
    }
    let gradients = |model: &Model| -> BTreeMap<String, Vec<f32>> {
        let loss = loss(model, &ids, &mut ForwardContext::new(Compute::F32));
        let gradients = model.gradients(&mut loss.backward()).into_iter();
        let ours = gradients.filter(|(name, _)| name.contains(".lora."));
        ours.map(|(name, gradient)| (name, values(gradient)))
            .collect()
    };
    let (found, expected) = (gradients(&packed), gradients(&dense));
    assert!(
        found
            .keys()
            .any(|name| name.ends_with("lora_magnitude_vector"))
    );
    assert_eq!(found.len(), expected.len());
    for (name, found) in found {
        let largest = expected[&name]
            .iter()
            .fold(1e-3f32, |max, g| max.max(g.abs()));
        assert_close(&found, &expected[&name], 1e-3 * largest, &name);
    }
}

#[test]
fn fresh_updates_join_those_of_other_modules() {
    let device = kernels::device::of_tests();
    let mut model = open("qwen2_distill", &device);
    for target in ["q_proj", "o_proj"] {
        let config = LoraConfig {
            target: vec![target.into()],
            ..config()
        };
        adapt::attach(&mut model, &config, &device).unwrap();
    }
    for (path, module) in model.modules_mut() {
        let ModuleMut::Linear(linear) = module else {
            continue;
        };
        let is_target = path.ends_with("q_proj") || path.ends_with("o_proj");
        assert_eq!(linear.lora.is_some(), is_target, "{path}");
    }
}

#[test]
fn gradients_of_dora_are_finite_differences() {
    // With constant norms of rows, as in DoRA's gradient; a dense model, because routing may jump.
    let device = kernels::device::of_tests().autodiff();
    let ids = ids("qwen2_distill", &device);
    let mut model = open("qwen2_distill", &device);
    let config = LoraConfig {
        use_dora: true,
        ..config()
    };
    attach(&mut model, &config, &device);
    for (_, module) in model.modules_mut() {
        if let ModuleMut::Linear(linear) = module
            && let Some(dora) = linear.lora.as_mut().and_then(|lora| lora.dora.as_mut())
        {
            let norms = dora.lora_magnitude_vector.val().set_require_grad(false);
            dora.norms = Some(norms * 1.1);
        }
    }
    let direction = |values: &Tensor<1>| {
        let n = values.dims()[0];
        let values: Vec<f32> = (0..n).map(|i| (1.3 * i as f32 + n as f32).sin()).collect();
        Tensor::<1>::from_floats(values.as_slice(), &kernels::device::of_tests())
    };
    let gradients =
        model.gradients(&mut loss(&model, &ids, &mut ForwardContext::new(Compute::F32)).backward());
    for suffix in ["lora_a", "lora_b", "lora_magnitude_vector"] {
        let of = gradients.iter().filter(|(name, _)| name.ends_with(suffix));
        let slope: f32 = of
            .map(|(_, gradient)| values((gradient.clone() * direction(gradient)).sum())[0])
            .sum();
        let at = |step: f32| {
            let mut moved = model.clone();
            moved.map_parameters(&mut |name, values| {
                let step = if name.ends_with(suffix) { step } else { 0.0 };
                values.clone() + direction(&values) * step
            });
            values(loss(&moved, &ids, &mut ForwardContext::new(Compute::F32)).inner())[0]
        };
        let step = 1e-3;
        let found = (at(step) - at(-step)) / (2.0 * step);
        // A loss around 6 in f32 leaves 5e-4 of a difference over 2e-3, and curvature a little.
        assert!(
            (found - slope).abs() <= 2e-3 + 0.02 * slope.abs(),
            "{suffix}: {found}, expected {slope}"
        );
    }
}

fn config() -> LoraConfig {
    LoraConfig {
        target: vec!["all-linear".into()],
        exclude: vec![],
        rank: 3,
        alpha: 6.0,
        scaling: Scaling::Plain,
        rank_pattern: vec![],
        alpha_pattern: vec![],
        dropout: 0.0,
        seed: 7,
        use_dora: false,
        experts_share: None,
    }
}

/// Puts updates on a model and moves them away from zero.
fn attach(model: &mut Model, config: &LoraConfig, device: &Device) {
    adapt::attach(model, config, device).unwrap();
    let moved = |name: &str, values: Tensor<1>| {
        let n = values.dims()[0];
        let seed = name.len() as f32;
        let shift: Vec<f32> = (0..n)
            .map(|i| 0.05 * (seed + 0.7 * i as f32).sin())
            .collect();
        let shift = Tensor::from_floats(shift.as_slice(), &values.device());
        if name.contains(".lora.") {
            values + shift
        } else {
            values
        }
    };
    model.map_parameters(&mut |name, values| moved(name, values));
}

/// Saves the updates of a model and reads them back.
fn saved(model: &Model, notes: &Notes) -> AdapterWeights {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("adapter");
    let adapter = AdapterWeights::from_model(model, Scaling::Plain, 0.0);
    let (config, tensors) = adapter.files(".").unwrap();
    let mut writer = FolderWriter::create(&path).unwrap();
    Adapter::save_notes(&mut writer, notes).unwrap();
    Adapter::save_into(&mut writer, &config, &tensors).unwrap();
    writer.finish().unwrap();
    AdapterWeights::read(&Adapter::open(&path).unwrap(), &model.config).unwrap()
}

#[test]
fn shared_factors_are_the_same_factor_of_every_expert() {
    let device = kernels::device::of_tests().autodiff();
    let ids = ids("deepseek_v3", &device);
    let run = |model: &Model| {
        let loss = loss(model, &ids, &mut ForwardContext::new(Compute::F32));
        let gradients = model.gradients(&mut loss.backward()).into_iter();
        let gradients = gradients.map(|(name, gradient)| (name, values(gradient)));
        (
            values(loss.inner())[0],
            gradients.collect::<BTreeMap<_, _>>(),
        )
    };
    for share in [Share::A, Share::B, Share::Outer] {
        let mut model = open("deepseek_v3", &device);
        let config = LoraConfig {
            experts_share: Some(share),
            ..config()
        };
        attach(&mut model, &config, &device);
        let (loss, gradients) = run(&model);

        // As PEFT reads it: every expert has a copy.
        let mut apart = open("deepseek_v3", &device);
        saved(&model, &Notes::default())
            .attach(&mut apart, &device)
            .unwrap();
        let (loss_apart, gradients_apart) = run(&apart);
        assert_close(&[loss], &[loss_apart], SUMS * loss, share.name());
        for (name, found) in &gradients {
            let whole = &gradients_apart[name];
            let summed: Vec<f32> = (0..found.len())
                .map(|i| whole.iter().skip(i).step_by(found.len()).sum())
                .collect();
            let largest = summed.iter().fold(1e-3f32, |max, g| max.max(g.abs()));
            assert_close(
                found,
                &summed,
                1e-4 * largest,
                &format!("{} {name}", share.name()),
            );
        }
        let count = |model: &Model| -> usize {
            model.parameters().iter().map(|p| p.values.dims()[0]).sum()
        };
        assert!(count(&model) < count(&apart), "{}", share.name());

        // With the note it is shared again.
        let mut again = open("deepseek_v3", &device);
        let notes = Notes {
            experts_share: Some(share.name().into()),
            ..Notes::default()
        };
        saved(&model, &notes).attach(&mut again, &device).unwrap();
        assert_eq!(count(&again), count(&model), "{}", share.name());
        assert_eq!(run(&again), (loss, gradients), "{}", share.name());
    }
}

#[test]
fn updates_of_some_experts_leave_the_others_alone() {
    let device = kernels::device::of_tests().autodiff();
    let ids = ids("deepseek_v3", &device);
    let target = [
        "layers.1.mlp.experts.2",
        "layers.1.mlp.experts.5",
        "layers.2.mlp.experts.11",
    ];
    let config = LoraConfig {
        target: target.map(String::from).to_vec(),
        ..config()
    };
    let mut model = open("deepseek_v3", &device);
    attach(&mut model, &config, &device);
    let found = loss(&model, &ids, &mut ForwardContext::new(Compute::F32));
    let gradients = model.gradients(&mut found.backward());
    let largest = |g: &Tensor<1>| values(g.clone().abs().max())[0];
    assert_eq!(gradients.len(), 12);
    assert!(gradients.iter().all(|(_, g)| largest(g) > 0.0));

    // The weights merged and opened again say the same.
    let place = tempfile::tempdir().unwrap();
    let (base, out) = (
        Folder::open(&goldens::path("deepseek_v3")).unwrap(),
        place.path().join("merged"),
    );
    let adapter = saved(&model, &Notes::default());
    assert_eq!(adapter.modules().len(), 9);
    merge(&base, &adapter, WeightFormat::F32, &out, &mut |_, _| ()).unwrap();
    let merged = Folder::open(&out).unwrap();
    let merged = load::load(&merged, Training::Frozen, &device).unwrap();
    let expected = values(loss(&merged, &ids, &mut ForwardContext::new(Compute::F32)).inner());
    assert_close(
        &values(found.inner()),
        &expected,
        SUMS * expected[0],
        "merged",
    );

    let mut again = open("deepseek_v3", &device);
    adapter.attach(&mut again, &device).unwrap();
    let again = values(loss(&again, &ids, &mut ForwardContext::new(Compute::F32)).inner());
    assert_close(&again, &expected, SUMS * expected[0], "read again");
}

#[test]
fn trained_experts_have_the_gradients_of_full_training() {
    let device = kernels::device::of_tests().autodiff();
    let experts = ["layers.1.mlp.experts.3", "layers.2.mlp.experts.0.down_proj"];
    for (name, chosen) in [
        ("deepseek_v3", &experts[..]),
        ("deepseek_v3_fp8", &experts[..1]),
    ] {
        let base = Folder::open(&goldens::path(name)).unwrap();
        let ids = ids(name, &device);
        let patterns = chosen.iter().chain(&["mlp.gate"]);
        let patterns = patterns.map(|pattern| (*pattern).into()).collect();
        let some = Training::Subset(patterns, vec!["layers.2.mlp.gate".into()]);
        let run = |training| {
            let model = load::load(&base, training, &device).unwrap();
            let loss = loss(&model, &ids, &mut ForwardContext::new(Compute::F32));
            let gradients = model.gradients(&mut loss.backward()).into_iter();
            let by_key = gradients.flat_map(|(parameter, gradient)| {
                let gradient = values(gradient);
                let keys = model.parameter_keys(&parameter, gradient.len());
                keys.into_iter()
                    .map(move |(key, range)| (key, gradient[range].to_vec()))
            });
            let by_key: BTreeMap<_, _> = by_key.collect();
            (by_key, model)
        };
        let ((found, mut model), (expected, _)) = (run(some), run(Training::Full));
        assert_eq!(found.len(), chosen.len() + 3, "{:?}", found.keys());
        for (key, found) in &found {
            let largest = expected[key]
                .iter()
                .fold(1e-3f32, |max, g| max.max(g.abs()));
            assert_close(found, &expected[key], 1e-3 * largest, key);
        }

        // Written, what was not trained keeps its bytes, and what was comes back in the format it had.
        model.map_parameters(&mut |_, values| values * 2.0);
        let place = tempfile::tempdir().unwrap();
        let mut writer = FolderWriter::create(&place.path().join("out")).unwrap();
        let parameters = model.parameters();
        let mut values = |name: &str, range| {
            let found = parameters.iter().find(|p| p.name == name).unwrap();
            Ok(kernels::device::read(found.values.clone().slice([range])))
        };
        export_subset(&model, &base, &mut writer, &mut values).unwrap();
        writer.finish().unwrap();
        let written = Folder::open(&place.path().join("out")).unwrap();
        for key in base.names() {
            let [old, new] = [&base, &written].map(|folder| folder.tensor(key).unwrap());
            assert_eq!((old.dtype, &old.shape), (new.dtype, &new.shape), "{key}");
            let weight = key.strip_suffix("_scale_inv").unwrap_or(key);
            let is_trained = found.contains_key(weight);
            let codes_of_twice_the_scale = is_trained && weight == key && name.ends_with("fp8");
            if !codes_of_twice_the_scale {
                assert_eq!(old.bytes == new.bytes, !is_trained, "{key}");
            }
        }
    }
}

#[test]
fn what_cannot_be_chosen_is_refused() {
    let device = kernels::device::of_tests().autodiff();
    let base = Folder::open(&goldens::path("deepseek_v3")).unwrap();
    let training = |pattern: &str| Training::Subset(vec![pattern.into()], vec![]);
    let refused = |pattern| {
        let error = load::load(&base, training(pattern), &device);
        error.unwrap_err().to_string()
    };
    assert!(refused("layers.9").starts_with("pattern `layers.9` matches no tensor of the model"));
    let attached = |config: LoraConfig| {
        let mut model = open("deepseek_v3", &device);
        let error = adapt::attach(&mut model, &config, &device);
        error.unwrap_err().to_string()
    };
    let dora = attached(LoraConfig {
        use_dora: true,
        ..config()
    });
    assert!(
        dora.contains("not for routed experts; leave them out with `lora.exclude"),
        "{dora}"
    );
    let uneven = ["experts.2.up_proj", "experts.3.down_proj"]
        .map(String::from)
        .to_vec();
    let uneven = attached(LoraConfig {
        target: uneven,
        ..config()
    });
    assert!(uneven.contains("choose the same ones"), "{uneven}");
}
