//! Adapters of embeddings, heads, norms and tokens against PEFT (`tests/goldens/peft_kinds.py`), and adapters of ours as PEFT
//! reads them (`tests/goldens/peft_reads.py`).

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::{Adapter, Folder, FolderWriter, Safetensors};
use moeforge_model::export::{WeightFormat, merge};
use moeforge_model::{AdapterWeights, Compute, ForwardContext, Model, Training, load};

/// Error of logits, of the largest.
const RELATIVE: f32 = 2e-5;
/// Relative error of gradient norms: f32 backward passes in another order.
const NORMS: f64 = 1e-3;
/// Relative error of a loss, after updates too.
const LOSS: f64 = 2e-5;
const POSITIONS: usize = 2;
const KINDS: [&str; 7] = [
    "head",
    "embedding",
    "both",
    "saved_embedding",
    "saved_head",
    "saved_norms",
    "tokens",
];

/// Base and kind of every adapter, and its folder.
fn kinds() -> Vec<(&'static str, &'static str, PathBuf)> {
    let of_bases = ["qwen2_distill", "tied"].into_iter();
    let cases = of_bases.flat_map(|base| KINDS.map(|kind| (base, kind)));
    let more = [
        ("qwen2_distill", "stored_base"),
        ("deepseek_v3", "embedding"),
        ("deepseek_v3", "saved_norms"),
    ];
    let folder = |base, kind| goldens::path(&format!("peft_kinds/{base}_{kind}"));
    let cases = cases.chain(more);
    cases
        .map(|(base, kind)| (base, kind, folder(base, kind)))
        .collect()
}

/// A golden model; `tied` is one without a head of its own.
fn base(name: &str, place: &Path) -> Folder {
    if name != "tied" {
        return Folder::open(&goldens::path(name)).unwrap();
    }
    let out = place.join("tied");
    if !out.exists() {
        let untied = Folder::open(&goldens::path("qwen2_distill")).unwrap();
        let mut writer = FolderWriter::create(&out).unwrap();
        let names = untied.names().filter(|name| *name != "lm_head.weight");
        let tensors: Vec<_> = names.map(|name| untied.tensor(name).unwrap()).collect();
        let specs: Vec<_> = tensors.iter().map(checkpoint::Tensor::spec).collect();
        let bytes = |i: usize| Ok(&tensors[i].bytes);
        writer
            .add_shard("model.safetensors", &specs, bytes)
            .unwrap();
        let mut config = untied.config().clone();
        config["tie_word_embeddings"] = true.into();
        writer.write_json("config.json", &config).unwrap();
        writer.finish().unwrap();
    }
    Folder::open(&out).unwrap()
}

fn ids(name: &str, rows: Option<usize>, device: &Device) -> Tensor<2, Int> {
    let name = if name == "tied" {
        "qwen2_distill"
    } else {
        name
    };
    let file = Safetensors::open(&goldens::path(name).join("golden.safetensors")).unwrap();
    let tensor = file.tensor("input_ids").unwrap();
    let numbers = tensor.bytes.chunks(8);
    let numbers = numbers.map(|id| i64::from_le_bytes(id.try_into().unwrap()) as i32);
    let shape = [tensor.shape[0], tensor.shape[1]];
    let all = TensorData::new(numbers.collect::<Vec<i32>>(), shape);
    let all = Tensor::<2, Int>::from_data(all, device);
    all.slice([0..rows.unwrap_or(shape[0]), 0..12])
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

/// The logits of the last positions.
fn last_logits(model: &Model, ids: Tensor<2, Int>) -> Vec<f32> {
    let ([batch, seq], ctx) = (ids.dims(), &mut ForwardContext::new(Compute::F32));
    let width = model.config.hidden_size;
    let hidden = model
        .hidden(ids, ctx)
        .slice([0..batch, seq - POSITIONS..seq, 0..width]);
    values(model.logits(hidden.reshape([batch * POSITIONS, width]), ctx))
}

fn loss(model: &Model, ids: &Tensor<2, Int>) -> Tensor<1> {
    let ([batch, seq], ctx) = (ids.dims(), &mut ForwardContext::new(Compute::F32));
    let none = Tensor::full([batch, 1], -100, &ids.device());
    let targets = Tensor::cat(vec![ids.clone().slice([0..batch, 1..seq]), none], 1);
    let hidden = model.hidden(ids.clone(), ctx);
    model.loss(hidden, targets, ctx).sum() / (batch * (seq - 1)) as f32
}

#[track_caller]
fn assert_logits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest =
        |pairs: &mut dyn Iterator<Item = f32>| pairs.fold(0f32, |max, v| max.max(v.abs()));
    let size = largest(&mut expected.iter().copied());
    let off = largest(&mut found.iter().zip(expected).map(|(f, e)| f - e)) / size;
    assert!(off <= RELATIVE, "{what}: off by {off:.1e}");
}

fn attached(base: &Folder, adapter: &Path, device: &Device) -> (Model, AdapterWeights) {
    let mut model = load::load(base, Training::Frozen, device).unwrap();
    let adapter = Adapter::open(adapter).unwrap();
    let adapter = AdapterWeights::read(&adapter, &model.config).unwrap();
    adapter.attach(&mut model, device).unwrap();
    (model, adapter)
}

/// The tensors that PEFT computed, of a folder of goldens.
fn expected(folder: &str, name: &str) -> Vec<f32> {
    let file = Safetensors::open(&goldens::path(folder).join("logits.safetensors")).unwrap();
    file.tensor(name).unwrap().to_f32().unwrap()
}

fn numbers() -> serde_json::Value {
    let text = std::fs::read_to_string(goldens::path("peft_kinds/numbers.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn adapters_of_every_kind_compute_what_peft_computes_and_so_do_their_merges() {
    let (device, place) = (kernels::device::of_tests(), tempfile::tempdir().unwrap());
    for (name, kind, path) in kinds() {
        let (base, what) = (base(name, place.path()), format!("{name}_{kind}"));
        let (model, adapter) = attached(&base, &path, &device);
        let expected = expected("peft_kinds", &what);
        let ids = ids(name, None, &device);
        assert_logits(&last_logits(&model, ids.clone()), &expected, &what);

        let out = place.path().join(&what);
        let format = WeightFormat::F32;
        let report = merge(&base, &adapter, format, &out, &mut |_, _| {}).unwrap();
        assert_eq!(report.folded, adapter.n_tensors(), "{what}");
        assert_eq!(report.adapted, adapter.changed_keys().len(), "{what}");
        let parts_head = matches!(
            kind,
            "head" | "embedding" | "both" | "saved_embedding" | "saved_head"
        );
        assert_eq!(report.untied, name == "tied" && parts_head, "{what}");
        let merged = Folder::open(&out).unwrap();
        let tie = &merged.config()["tie_word_embeddings"];
        assert_eq!(tie.as_bool(), Some(name == "tied" && !parts_head), "{what}");
        let merged = load::load(&merged, Training::Frozen, &device).unwrap();
        assert_logits(
            &last_logits(&merged, ids),
            &expected,
            &format!("{what}, merged"),
        );
    }
}

#[test]
fn adapters_of_every_kind_are_written_as_peft_wrote_them() {
    let (device, place) = (kernels::device::of_tests(), tempfile::tempdir().unwrap());
    for (name, kind, path) in kinds() {
        let (model, adapter) = attached(&base(name, place.path()), &path, &device);
        let (config, tensors) = AdapterWeights::from_model(&model, adapter.scaling(), 0.0)
            .files(name)
            .unwrap();
        let out = place.path().join(format!("{name}_{kind}"));
        Adapter::save(&out, &config, &tensors).unwrap();
        let (ours, theirs) = (Adapter::open(&out).unwrap(), Adapter::open(&path).unwrap());
        assert_eq!(
            ours.tensors().len(),
            theirs.tensors().len(),
            "{name} {kind}"
        );
        for tensor in theirs.tensors() {
            let found = ours.tensor(&tensor.name).unwrap();
            let [found, expected] = [&found, tensor].map(|tensor| tensor.to_f32().unwrap());
            let pairs = found.iter().zip(&expected);
            let off = pairs.fold(0f32, |max, (f, e)| max.max((f - e).abs()));
            // Rows of tokens are kept as differences.
            assert!(off <= 1e-6, "{name} {kind} {}: {off:.1e}", tensor.name);
        }
    }
}

#[test]
fn adapters_of_every_kind_train_as_in_peft() {
    let (device, place) = (
        kernels::device::of_tests().autodiff(),
        tempfile::tempdir().unwrap(),
    );
    let numbers = numbers();
    for (name, kind, path) in kinds() {
        if (name, kind) == ("tied", "tokens") {
            continue;
        }
        let what = format!("{name}_{kind}");
        let (mut model, adapter) = attached(&base(name, place.path()), &path, &device);
        let ids = ids(name, None, &device);
        let expected = &numbers[&what];
        let mut optimizer = BTreeMap::new();
        for (update, wanted) in expected["losses"].as_array().unwrap().iter().enumerate() {
            let loss = loss(&model, &ids);
            let (found, wanted) = (values(loss.clone().inner())[0], wanted.as_f64().unwrap());
            let off = (f64::from(found) / wanted - 1.0).abs();
            assert!(
                off < LOSS,
                "{what}, update {update}: {found}, expected {wanted}"
            );
            let found = model.gradients(&mut loss.backward());
            let found: BTreeMap<String, Tensor<1>> = found.into_iter().collect();
            if update == 0 {
                let norms = expected["grad_norms"].as_object().unwrap();
                assert_norms(
                    &mut model.clone(),
                    &found,
                    (norms, adapter.scaling()),
                    &what,
                );
            }
            step(&mut model, found, &mut optimizer, update);
        }
    }
}

/// Puts each gradient in its parameter's place: the adapter's own files then name them as PEFT does.
fn assert_norms(
    model: &mut Model,
    gradients: &BTreeMap<String, Tensor<1>>,
    (expected, scaling): (
        &serde_json::Map<String, serde_json::Value>,
        moeforge_model::adapt::Scaling,
    ),
    what: &str,
) {
    let norm = |values: &[f32]| {
        let squares = values.iter().map(|g| f64::from(*g).powi(2));
        squares.sum::<f64>().sqrt()
    };
    model.map_parameters(&mut |name, values| gradients.get(name).cloned().unwrap_or(values));
    let (_, tensors) = AdapterWeights::from_model(model, scaling, 0.0)
        .files(".")
        .unwrap();
    for (name, wanted) in expected {
        let found = match name.contains("token_adapter") {
            // A file has rows, not differences.
            true => norm(&values(gradients["model.embed_tokens.lora.lora_a"].clone())),
            false => {
                let mut tensors = tensors.iter();
                let tensor = tensors.find(|tensor| *tensor.name == **name);
                norm(
                    &tensor
                        .unwrap_or_else(|| panic!("{what}: {name}"))
                        .to_f32()
                        .unwrap(),
                )
            }
        };
        let wanted = wanted.as_f64().unwrap();
        assert!(
            (found / wanted - 1.0).abs() < NORMS,
            "{what} {name}: {found}, expected {wanted}"
        );
    }
    assert_eq!(gradients.len(), expected.len(), "{what}");
}

/// An update of PyTorch's AdamW.
fn step(
    model: &mut Model,
    mut gradients: BTreeMap<String, Tensor<1>>,
    moments: &mut BTreeMap<String, [Vec<f64>; 2]>,
    update: usize,
) {
    let (rate, betas, epsilon, decay) = (1e-3, [0.9, 0.999], 1e-8, 0.01);
    let bias = betas.map(|beta: f64| 1.0 - beta.powi(update as i32 + 1));
    model.map_parameters(&mut |name, weights| {
        let Some(gradient) = gradients.remove(name) else {
            return weights;
        };
        let (device, gradient) = (weights.device(), values(gradient));
        let zeros = || vec![0.0; gradient.len()];
        let [first, second] = moments
            .entry(name.into())
            .or_insert_with(|| [zeros(), zeros()]);
        let old = values(weights);
        let new: Vec<f32> = (0..old.len())
            .map(|i| {
                let g = f64::from(gradient[i]);
                first[i] = betas[0] * first[i] + (1.0 - betas[0]) * g;
                second[i] = betas[1] * second[i] + (1.0 - betas[1]) * g * g;
                let size = (second[i] / bias[1]).sqrt() + epsilon;
                let old = f64::from(old[i]) * (1.0 - rate * decay);
                (old - rate * first[i] / bias[0] / size) as f32
            })
            .collect();
        Tensor::from_floats(new.as_slice(), &device)
    });
}

#[test]
fn adapters_that_peft_read_are_those_that_are_written() {
    let (device, place) = (kernels::device::of_tests(), tempfile::tempdir().unwrap());
    let logits = Safetensors::open(&goldens::path("peft_reads/logits.safetensors")).unwrap();
    assert!(logits.tensors().len() >= 10);
    let mut unread = 0;
    for entry in std::fs::read_dir(goldens::path("peft_reads")).unwrap() {
        let path = entry.unwrap().path();
        let case = path.file_name().unwrap().to_string_lossy().into_owned();
        let bases = [
            "deepseek_v2_lite",
            "deepseek_v3",
            "qwen2_distill",
            "llama_distill",
        ];
        let Some(name) = bases.into_iter().find(|base| case.starts_with(base)) else {
            continue;
        };
        let (model, adapter) = attached(&base(name, place.path()), &path, &device);
        let ids = ids(name, Some(1), &device);
        let original = Adapter::open(&path).unwrap();
        let written = AdapterWeights::from_model(&model, adapter.scaling(), 0.0);
        // A message is read back shortened.
        let [found, noted] = [
            written.unread_by_peft(),
            original.notes.unread_by_peft.clone(),
        ]
        .map(|text| text.map(|text| text.chars().take(100).collect::<String>()));
        assert_eq!(found, noted, "{case}");
        match logits.tensor(&case) {
            Ok(expected) if original.notes.unread_by_peft.is_none() => {
                let found = last_logits(&model, ids);
                assert_logits(&found, &expected.to_f32().unwrap(), &case);
            }
            _ => {
                assert!(original.notes.unread_by_peft.is_some(), "{case}");
                unread += 1;
            }
        }
        let (config, tensors) = written.files(name).unwrap();
        assert_eq!(config, original.config, "{case}");
        assert_eq!(tensors.len(), original.tensors().len(), "{case}");
        for tensor in &tensors {
            let expected = original.tensor(&tensor.name).unwrap();
            assert_eq!(tensor.bytes, expected.bytes, "{case} {}", tensor.name);
        }
    }
    assert!(unread >= 2);
}
