//! Models in GGUF files: the logits of an independent implementation, training on quantized weights, and the way back to
//! a folder. The files are made by `tests/goldens/gguf_models.py`.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::{Folder, FolderWriter, Safetensors, TensorSpec};
use moeforge_model::adapt::{self, LoraConfig, Scaling};
use moeforge_model::export::WeightFormat;
use moeforge_model::export::gguf::write_gguf;
use moeforge_model::export::importance::Importance;
use moeforge_model::export::mix::{Mix, MixScheme};
use moeforge_model::export::{MergeReport, convert};
use moeforge_model::{
    Cache, CacheType, Compute, Error, ForwardContext, Model, Training, keys, load,
};

const MODELS: [&str; 6] = [
    "llama_f32",
    "llama_q4_1",
    "qwen2_q5_0",
    "deepseek_v3_f32",
    "deepseek_v3_q8_0",
    "deepseek_v2_lite_bf16",
];
/// Those with a split up-projection of latent attention.
const SPLIT: [&str; 2] = ["deepseek_v3_f32", "deepseek_v3_q8_0"];
/// The bar for f32 logits that spread over about 10.
const LOGITS: f32 = 2e-4;

fn open(name: &str) -> Folder {
    Folder::open(&goldens::path(&format!("gguf/{name}.gguf"))).unwrap()
}

fn ids(name: &str, device: &Device) -> Tensor<2, Int> {
    let file = Safetensors::open(&goldens::path("gguf/golden.safetensors")).unwrap();
    let tensor = file.tensor(&format!("{name}.ids")).unwrap();
    let id = |bytes: &[u8]| i32::from_le_bytes(bytes.try_into().unwrap());
    let ids: Vec<i32> = tensor.bytes.chunks(4).map(id).collect();
    let n = ids.len();
    Tensor::from_data(TensorData::new(ids, [1, n]), device)
}

fn logits(model: &Model, ids: Tensor<2, Int>) -> Vec<f32> {
    logits_of(model, ids, &mut ForwardContext::new(Compute::F32))
}

fn logits_of(model: &Model, ids: Tensor<2, Int>, ctx: &mut ForwardContext<'_>) -> Vec<f32> {
    let [batch, seq] = ids.dims();
    let hidden = model.hidden(ids, ctx);
    let hidden = hidden.reshape([batch * seq, model.config.hidden_size]);
    let logits = model.logits(hidden, ctx);
    logits.into_data().try_to_vec().unwrap()
}

fn load(folder: &Folder) -> Model {
    load::load(folder, Training::Frozen, &Device::flex()).unwrap()
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let difference = (found - expected).abs();
        assert!(
            difference <= tolerance,
            "{what} at {i}: {found}, expected {expected}"
        );
    }
}

#[test]
fn logits_are_the_goldens() {
    let file = Safetensors::open(&goldens::path("gguf/golden.safetensors")).unwrap();
    for name in MODELS {
        let expected = file.tensor(&format!("{name}.logits")).unwrap();
        let found = logits(&load(&open(name)), ids(name, &Device::flex()));
        assert_close(&found, &expected.to_f32().unwrap(), LOGITS, name);
    }
}

/// Token by token, with absorbed attention over both stored parts of the up-projection.
#[test]
fn cached_logits_are_the_full_ones() {
    let device = Device::flex();
    for name in MODELS {
        let (model, ids) = (load(&open(name)), ids(name, &device));
        let ([_, seq], full) = (ids.dims(), logits(&model, ids.clone()));
        let mut caches = [Cache::new(&model.config, CacheType::F32)];
        for (position, expected) in full.chunks(model.config.vocab_size).enumerate() {
            let one = ids.clone().slice([0..1, position..position + 1]);
            let found = logits_of(
                &model,
                one,
                &mut ForwardContext::cached(Compute::F32, &mut caches),
            );
            assert_close(&found, expected, LOGITS, &format!("{name} at {position}"));
        }
        assert_eq!(caches[0].len(), seq);
    }
}

#[test]
fn a_deepseek_opens_with_the_config_it_had() {
    for (name, source) in [
        ("deepseek_v3_f32", "deepseek_v3"),
        ("deepseek_v2_lite_bf16", "deepseek_v2_lite"),
    ] {
        let found = load::read_config(&open(name)).unwrap();
        let folder = Folder::open(&goldens::path(source)).unwrap();
        let mut expected = load::read_config(&folder).unwrap();
        // The converter leaves multi-token prediction out.
        expected.num_nextn_predict_layers = 0;
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn experts_and_halves_are_views_of_the_file() {
    let folder = open("deepseek_v3_q8_0");
    let expert = |n: usize| {
        let key = format!("model.layers.1.mlp.experts.{n}.up_proj.weight");
        folder.tensor(&key).unwrap()
    };
    let [first, second] = [expert(0), expert(1)];
    assert_eq!(first.shape, [24, 64]);
    assert_eq!(
        first.bytes.as_ptr().wrapping_add(first.bytes.len()),
        second.bytes.as_ptr()
    );
    let key = "model.layers.0.self_attn.kv_b_proj.weight";
    let whole = load::read_matrix(&folder, key, [4 * 32, 32], [128, 128]).unwrap();
    let halves = ["k_b", "v_b"].map(|half| key.replace("kv_b", half));
    let sizes = halves.map(|half| folder.tensor(&half).unwrap().bytes.len());
    assert_eq!(whole.size_bytes(), sizes[0] + sizes[1]);
    for shape in [[4 * 31, 32], [4 * 32, 31], [130, 32]] {
        let error = load::read_matrix(&folder, key, shape, [128, 128]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("expected"), "{error}");
    }
}

#[test]
fn nothing_in_a_gguf_is_unknown_and_its_bytes_stay() {
    for name in MODELS {
        let audit = load::audit(&open(name)).unwrap();
        assert!(audit.unknown.is_empty(), "{name}: {:?}", audit.unknown);
    }
    for (name, class) in [("llama_q4_1", "Q4_1"), ("qwen2_q5_0", "Q5_0")] {
        let folder = open(name);
        let key = "model.layers.1.self_attn.q_proj.weight";
        assert_eq!(folder.tensor(key).unwrap().dtype.to_string(), class);
        let matrix = load::read_matrix(&folder, key, [64, 64], [128, 128]).unwrap();
        assert_eq!(matrix.size_bytes(), folder.tensor(key).unwrap().bytes.len());
    }
}

/// A folder of the decoded values computes the same, and in it the file's rows have a folder's order.
#[test]
fn a_gguf_converts_to_a_folder_that_computes_the_same() {
    for name in MODELS {
        let place = tempfile::tempdir().unwrap();
        let before = logits(&load(&open(name)), ids(name, &Device::flex()));
        let formats = [
            ("f32", WeightFormat::F32, 2e-5),
            ("bf16", WeightFormat::Bf16, 0.3),
        ];
        for (dir, dtype, tolerance) in formats {
            let out = place.path().join(dir);
            convert(&open(name), dtype, &out, &mut |_, _| {}).unwrap();
            let folder = Folder::open(&out).unwrap();
            let config = load::read_config(&folder).unwrap();
            let mut keys: Vec<String> = keys::keys(&config).into_iter().map(|k| k.0).collect();
            keys.sort_unstable();
            assert!(folder.names().eq(keys), "{name}");
            let after = logits(&load(&folder), ids(name, &Device::flex()));
            assert_close(&after, &before, tolerance, name);
        }
    }
}

/// Gradients of updates on quantized weights are those on the same weights in f32.
#[test]
fn updates_train_on_quantized_weights_as_on_their_values() {
    let device = Device::flex().autodiff();
    for name in ["llama_q4_1", "qwen2_q5_0"].into_iter().chain(SPLIT) {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("f32");
        convert(&open(name), WeightFormat::F32, &out, &mut |_, _| {}).unwrap();
        let gradients = |folder: &Folder| {
            let mut model = load::load(folder, Training::Frozen, &device).unwrap();
            adapt::attach(&mut model, &all_linears(), &device).unwrap();
            model.map_parameters(&mut |name, values| {
                values + if name.ends_with("lora_b") { 0.01 } else { 0.0 }
            });
            let ids = ids(name, &device);
            let (inputs, targets) = (ids.clone().slice([0..1, 0..23]), ids.slice([0..1, 1..24]));
            let mut ctx = ForwardContext::new(Compute::F32);
            let hidden = model.hidden(inputs, &mut ctx);
            let mut gradients = model.loss(hidden, targets, &ctx).mean().backward();
            model.gradients(&mut gradients)
        };
        let (found, expected) = (
            gradients(&open(name)),
            gradients(&Folder::open(&out).unwrap()),
        );
        assert!(found.len() >= 3 * 7 * 2, "{}", found.len());
        for ((key, found), (_, expected)) in found.into_iter().zip(expected) {
            let [found, expected]: [Vec<f32>; 2] =
                [found, expected].map(|g| g.into_data().try_to_vec().unwrap());
            let largest = expected.iter().fold(1e-3f32, |max, g| max.max(g.abs()));
            assert_close(&found, &expected, 1e-4 * largest, &key);
        }
    }
}

/// Another golden: a folder, or one of the GGUFs.
fn source(name: &str) -> Folder {
    Folder::open(&goldens::path(name)).unwrap()
}

fn some_ids(model: &Model) -> Tensor<2, Int> {
    const SEQ: usize = 24;
    let vocab = model.config.vocab_size;
    let ids: Vec<i32> = (0..SEQ)
        .map(|i| (7 * i * i + 3 * i) % vocab)
        .map(|id| id as i32)
        .collect();
    Tensor::from_data(TensorData::new(ids, [1, SEQ]), &Device::flex())
}

fn write(source: &Folder, scheme: &str, parts: &str, out: &Path) -> Result<MergeReport, Error> {
    write_gguf(
        source,
        &mix(scheme, parts),
        vec![],
        out,
        &mut |done, total| assert!(done <= total),
    )
}

fn mix(scheme: &str, parts: &str) -> Mix {
    let all = MixScheme::all();
    let scheme = all
        .iter()
        .find(|known| known.to_string() == scheme)
        .unwrap();
    Mix::new(*scheme, parts).unwrap()
}

/// Experts of 24 columns, most of them without tokens, heads of 16, blocks of 32.
#[test]
fn importance_of_columns_keeps_logits_closer() {
    let place = tempfile::tempdir().unwrap();
    for name in ["deepseek_v3", "qwen2_distill", "gguf/deepseek_v3_f32.gguf"] {
        let before = source(name);
        let model = load(&before);
        let row = |seed: usize| {
            let id =
                |i: usize| ((7 * i * i + (3 + seed) * i + seed) % model.config.vocab_size) as u32;
            (0..24).map(id).collect::<Vec<u32>>()
        };
        let rows: Vec<Vec<u32>> = (1..9).map(row).collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let importance = Importance::measure(&before, &model, &rows, &mut |_| {}).unwrap();
        let expected = logits(&model, some_ids(&model));
        for scheme in ["q4_0", "q4_1", "q5_0", "q5_1"] {
            let errors = [None, Some(importance.clone())].map(|importance| {
                let out = place.path().join("m.gguf");
                let mut mix = mix(scheme, "");
                mix.importance = importance;
                let report = write_gguf(&before, &mix, vec![], &out, &mut |_, _| {}).unwrap();
                assert_eq!(report.weighted > 0, mix.importance.is_some());
                let found = logits(&load(&Folder::open(&out).unwrap()), some_ids(&model));
                std::fs::remove_file(&out).unwrap();
                let squares = found.iter().zip(&expected).map(|(a, b)| (a - b) * (a - b));
                squares.sum::<f32>()
            });
            assert!(errors[1] < errors[0], "{name} {scheme}: {errors:?}");
        }
    }
}

#[test]
fn a_written_gguf_computes_what_the_model_does() {
    for name in [
        "deepseek_v3",
        "deepseek_v2_lite",
        "deepseek_v2_group",
        "deepseek_v3_fp8",
        "qwen2_distill",
        "llama_distill",
        "gguf/llama_q4_1.gguf",
        "gguf/deepseek_v3_q8_0.gguf",
    ] {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("m.gguf");
        let before = source(name);
        let report = write(&before, "f32", "", &out).unwrap();
        assert!(report.errors.iter().all(|error| error.1 < 1e-7), "{name}");
        let (model, written) = (load(&before), load(&Folder::open(&out).unwrap()));
        let ids = some_ids(&model);
        let (found, expected) = (logits(&written, ids.clone()), logits(&model, ids));
        assert_close(&found, &expected, 2e-5, name);
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
        let error = write(&before, "f32", "", &out).unwrap_err().to_string();
        assert!(error.contains("m.gguf"), "{error}");
    }
}

/// What a model's module for multi-token prediction says of some ids.
fn module_logits(folder: &Folder) -> Vec<f32> {
    let (model, mtp) = (load(folder), load::load_mtp(folder, &Device::flex()));
    let (mtp, ids) = (mtp.unwrap(), some_ids(&model));
    let n = ids.dims()[1] - 1;
    let ctx = &mut ForwardContext::new(Compute::F32);
    let hidden = model.hidden(ids.clone(), ctx).slice([0..1, 0..n]);
    let hidden = mtp.hidden(&model, hidden, ids.slice([0..1, 1..n + 1]), ctx);
    let hidden = hidden.reshape([n, model.config.hidden_size]);
    let logits = mtp.logits(&model, hidden, ctx);
    logits.into_data().try_to_vec().unwrap()
}

fn write_with_module(source: &Folder, scheme: &str, parts: &str, out: &Path) -> Folder {
    let mut mix = mix(scheme, parts);
    mix.mtp = true;
    let report = write_gguf(source, &mix, vec![], out, &mut |done, total| {
        assert!(done <= total)
    });
    report.unwrap();
    Folder::open(out).unwrap()
}

#[test]
fn a_gguf_keeps_multi_token_prediction_if_asked() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    let before = source("deepseek_v3");
    write(&before, "f32", "", &path("without.gguf")).unwrap();
    let without = Folder::open(&path("without.gguf")).unwrap();
    assert!(load::load_mtp(&without, &Device::flex()).is_err());

    let (expected, model) = (module_logits(&before), load(&before));
    let first = write_with_module(&before, "f32", "", &path("first.gguf"));
    assert_close(&module_logits(&first), &expected, 2e-5, "f32");
    let ids = some_ids(&model);
    let [of_file, of_folder] = [&load(&first), &model].map(|model| logits(model, ids.clone()));
    assert_close(&of_file, &of_folder, 2e-5, "the model beside it");
    let audit = load::audit(&first).unwrap();
    assert!(audit.unknown.is_empty() && !audit.mtp.is_empty());
    // The folder's copies are the model's own.
    assert!(before.contains("model.layers.3.embed_tokens.weight"));
    assert!(!first.contains("model.layers.3.embed_tokens.weight"));

    let again = write_with_module(&first, "f32", "", &path("again.gguf"));
    assert_eq!(module_logits(&again), module_logits(&first));
    let folder = path("folder");
    convert(&again, WeightFormat::F32, &folder, &mut |_, _| {}).unwrap();
    let folder = Folder::open(&folder).unwrap();
    assert_close(&module_logits(&folder), &expected, 2e-5, "a folder again");

    let mixed = write_with_module(&before, "q8_0", "mtp=f16", &path("mixed.gguf"));
    let dtype = |key: &str| mixed.tensor(key).unwrap().dtype.to_string();
    assert_eq!(dtype("model.layers.3.eh_proj.weight"), "F16");
    assert_eq!(dtype("model.layers.3.enorm.weight"), "F32");
    assert_eq!(dtype("model.layers.3.self_attn.q_a_proj.weight"), "Q8_0");
}

#[test]
fn so_it_does_with_an_embedding_and_a_head_of_the_modules_own() {
    let place = tempfile::tempdir().unwrap();
    let before = source("deepseek_v3");
    let tensors = before.names().map(|name| before.tensor(name).unwrap());
    let tensors: Vec<_> = tensors.collect();
    let specs: Vec<TensorSpec> = tensors.iter().map(|tensor| tensor.spec()).collect();
    let mut writer = FolderWriter::create(&place.path().join("own")).unwrap();
    let written = writer.add_shard("model.safetensors", &specs, |i| {
        let (name, mut bytes) = (&specs[i].name, tensors[i].bytes.to_vec());
        if name.ends_with(".3.embed_tokens.weight") || name.ends_with(".shared_head.head.weight") {
            // Rows of other tokens.
            let row_bytes = bytes.len() / specs[i].shape[0];
            bytes.rotate_left(5 * row_bytes);
        }
        Ok(bytes)
    });
    written.unwrap();
    writer.write_index().unwrap();
    writer.write_json("config.json", before.config()).unwrap();
    writer.finish().unwrap();
    let own = Folder::open(&place.path().join("own")).unwrap();
    let file = write_with_module(&own, "f32", "", &place.path().join("m.gguf"));
    let (found, expected) = (module_logits(&file), module_logits(&own));
    assert_close(&found, &expected, 2e-5, "own");
    let shared = module_logits(&before);
    let moved = found.iter().zip(&shared).filter(|(a, b)| a != b).count();
    assert!(moved > shared.len() / 2, "{moved}");
}

/// What is stored in the wanted type keeps its bytes.
#[test]
fn a_gguf_written_again_in_its_own_type_keeps_its_bytes() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("m.gguf");
    let before = open("deepseek_v3_q8_0");
    write(&before, "q8_0", "", &out).unwrap();
    let after = Folder::open(&out).unwrap();
    assert!(before.names().eq(after.names()));
    for name in before.names() {
        let [before, after] = [&before, &after].map(|folder| folder.tensor(name).unwrap());
        assert_eq!(before.dtype, after.dtype, "{name}");
        assert_eq!(before.bytes, after.bytes, "{name}");
    }
}

#[test]
fn fewer_bits_keep_less_and_parts_have_types_of_their_own() {
    let place = tempfile::tempdir().unwrap();
    let before = source("deepseek_v3");
    let worst = |scheme: &str, parts: &str| {
        let out = place.path().join(format!("{scheme}{}.gguf", parts.len()));
        let report = write(&before, scheme, parts, &out).unwrap();
        let worst = report
            .errors
            .iter()
            .map(|error| error.1)
            .fold(0.0, f64::max);
        (worst, Folder::open(&out).unwrap())
    };
    let [f16, q8, q5, q4] = ["f16", "q8_0", "q5_1", "q4_0"].map(|scheme| worst(scheme, "").0);
    assert!(
        f16 < q8 && q8 < q5 && q5 < q4 && q4 < 0.2,
        "{f16} {q8} {q5} {q4}"
    );
    let (_, mixed) = worst("q4_0", "experts=q5_0, attn=bf16,embed=f32");
    let dtype = |key: &str| mixed.tensor(key).unwrap().dtype.to_string();
    assert_eq!(dtype("model.layers.1.mlp.experts.3.up_proj.weight"), "Q5_0");
    // Rows of 24 values are no whole blocks.
    assert_eq!(
        dtype("model.layers.1.mlp.experts.3.down_proj.weight"),
        "F16"
    );
    assert_eq!(
        dtype("model.layers.1.mlp.shared_experts.up_proj.weight"),
        "Q4_0"
    );
    assert_eq!(dtype("model.layers.1.self_attn.q_a_proj.weight"), "BF16");
    assert_eq!(dtype("model.embed_tokens.weight"), "F32");
    assert_eq!(dtype("lm_head.weight"), "Q8_0");
    assert_eq!(dtype("model.layers.1.mlp.gate.weight"), "F32");
    assert_eq!(dtype("model.layers.1.input_layernorm.weight"), "F32");
}

#[test]
fn what_a_gguf_cannot_say_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("m.gguf");
    let json = std::fs::read_to_string(goldens::path("qwen2_distill/config.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&json).unwrap();
    json["rope_scaling"] = serde_json::json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    });
    let folder = place.path().join("qwen2");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("config.json"), json.to_string()).unwrap();
    let weights = "model.safetensors";
    std::fs::copy(
        goldens::path("qwen2_distill").join(weights),
        folder.join(weights),
    )
    .unwrap();
    let error = write(&Folder::open(&folder).unwrap(), "f32", "", &out).unwrap_err();
    assert!(error.to_string().contains("Llama 3"), "{error}");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
    for (parts, expected) in [
        ("experts=q9", "expected one of f32, bf16, f16, q8_0"),
        (
            "heads=q8_0",
            "a part of experts, shared, attn, ffn, embed, head",
        ),
        ("experts", "found ``"),
    ] {
        let problem = Mix::new(MixScheme::all()[0], parts).unwrap_err();
        assert!(problem.contains(expected), "{problem}");
    }
}

fn all_linears() -> LoraConfig {
    LoraConfig {
        target: vec!["all-linear".into()],
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
