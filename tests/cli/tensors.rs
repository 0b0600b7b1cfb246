//! Bases and adapters whose tensors are not what they should be, under the verbs that rewrite models.

use std::collections::BTreeMap;
use std::path::Path;

use checkpoint::{DType, Folder, Tensor, write_safetensors};
use serde_json::Value;

use super::{golden, moeforge, refused};

/// A copy of a golden model in one shard, with its tensors changed.
fn changed(name: &str, place: &Path, change: impl Fn(Tensor) -> Option<Tensor>) -> String {
    let folder = Folder::open(&golden(name)).unwrap();
    let tensors = folder.names().map(|name| folder.tensor(name).unwrap());
    let tensors: Vec<Tensor> = tensors.filter_map(change).collect();
    std::fs::write(place.join("config.json"), folder.config().to_string()).unwrap();
    let file = place.join("model.safetensors");
    write_safetensors(&file, &tensors, &BTreeMap::new()).unwrap();
    place.to_string_lossy().into_owned()
}

fn path(name: &str) -> String {
    golden(name).to_string_lossy().into_owned()
}

/// A change of a model's tensors: none in place of one drops it.
type Rewrite = fn(Tensor) -> Option<Tensor>;

/// Changes that make a base incomplete, with words of the refusal.
fn damages() -> [(&'static str, Rewrite, &'static [&'static str]); 5] {
    [
        (
            "deepseek_v2_lite",
            |t| {
                let bias = "mlp.gate.e_score_correction_bias";
                let name = t.name.replace("post_attention_layernorm.weight", bias);
                Some(Tensor {
                    name: name.into(),
                    ..t
                })
            },
            &["e_score_correction_bias", "softmax"],
        ),
        (
            "deepseek_v2_lite",
            |t| (!t.name.contains("layers.1.mlp.experts.3.up_proj")).then_some(t),
            &["layers.1.mlp.experts.3.up_proj.weight"],
        ),
        (
            "deepseek_v2_lite",
            |t| (!t.name.contains("layers.0.")).then_some(t),
            &["model.layers.0."],
        ),
        (
            "llama_distill",
            |t| {
                let name = format!("_orig_mod.module.{}", t.name).into();
                Some(Tensor { name, ..t })
            },
            &["model.embed_tokens.weight", "_orig_mod.module.", "wrapper"],
        ),
        (
            "qwen2_distill",
            |t| {
                let name = t
                    .name
                    .replace("q_proj.weight", "q_proj.base_layer.weight")
                    .into();
                Some(Tensor { name, ..t })
            },
            &["q_proj.weight", "base_layer"],
        ),
    ]
}

#[test]
fn an_incomplete_base_is_refused_by_every_verb_that_rewrites_it() {
    for (name, change, words) in damages() {
        let place = tempfile::tempdir().unwrap();
        let model = changed(name, place.path(), change);
        let [adapter, out] = ["adapter", "out"].map(|name| place.path().join(name));
        let out = out.to_string_lossy().into_owned();
        // An adapter of anything: the base is looked at first.
        let adapter = match name {
            "deepseek_v2_lite" => path("deepseek_v2_lite/adapter_classic"),
            "qwen2_distill" => path("qwen2_distill/adapter_rslora"),
            _ => {
                write_adapter(&adapter, &["model.layers.0.self_attn.o_proj"]);
                adapter.to_string_lossy().into_owned()
            }
        };
        let with_adapter = ["--adapter", &adapter, "--out", &out];
        let (merge, export) = (
            ["merge", &model],
            ["export-adapter", &model, "--keep-ignored"],
        );
        for verb in [
            [&merge[..], &with_adapter[..]].concat(),
            [&export[..], &with_adapter[..]].concat(),
            vec!["quantize", &model, "--to", "hf:f32", "--out", &out],
            vec!["quantize", &model, "--to", "gguf:f32", "--out", &out],
        ] {
            refused(&moeforge(&verb), 1, words);
            assert!(!Path::new(&out).exists(), "{verb:?}");
        }
        let inspected = moeforge(&["inspect", &model, "--json"]);
        let report: Value = serde_json::from_slice(&inspected.stdout).unwrap();
        let problem = report["problem"].as_str().unwrap();
        assert!(words.iter().all(|word| problem.contains(word)), "{problem}");
        assert!(!report["missing_tensors"].as_array().unwrap().is_empty());
    }
}

/// An adapter of zeros for some modules `[64, 64]`.
fn write_adapter(folder: &Path, modules: &[&str]) {
    std::fs::create_dir(folder).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["o_proj"]}"#;
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    let factor = |module: &&str, part: &str, shape: [usize; 2]| {
        let name = format!("base_model.model.{module}.lora_{part}.weight");
        Tensor::new(&name, DType::F32, &shape, vec![0; 256].into()).unwrap()
    };
    let factors = |module| [factor(module, "A", [1, 64]), factor(module, "B", [64, 1])];
    let tensors: Vec<Tensor> = modules.iter().flat_map(factors).collect();
    let file = folder.join("adapter_model.safetensors");
    write_safetensors(&file, &tensors, &BTreeMap::new()).unwrap();
}

/// Half precision stays half precision, and what no update touches keeps its bytes.
#[test]
fn a_merge_keeps_what_it_need_not_touch() {
    let place = tempfile::tempdir().unwrap();
    let model = place.path().join("base").to_string_lossy().into_owned();
    let original = path("qwen2_distill");
    let quantize = ["quantize", &original, "--to", "hf:f16", "--out", &model];
    assert!(moeforge(&quantize).status.success());
    let adapter = path("qwen2_distill/adapter_rslora");
    let out = place.path().join("out").to_string_lossy().into_owned();
    let merge = [
        "merge",
        &model,
        "--adapter",
        &adapter,
        "--out",
        &out,
        "--json",
    ];
    let done = moeforge(&merge);
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    let [before, after] = [&model, &out].map(|path| Folder::open(Path::new(path)).unwrap());
    let file = checkpoint::Adapter::open(Path::new(&adapter)).unwrap();
    let (mut kept, mut merged) = (0, 0);
    for name in before.names() {
        let [old, new] = [&before, &after].map(|folder| folder.tensor(name).unwrap());
        assert_eq!(old.dtype, new.dtype, "{name}");
        let module = name.strip_suffix(".weight").unwrap_or(name);
        match file.contains(&format!("base_model.model.{module}.lora_A.weight")) {
            true => merged += 1,
            false => {
                kept += 1;
                assert_eq!(old.bytes, new.bytes, "{name}");
            }
        }
    }
    assert!(kept > 0 && merged > 0);
    let expected = [
        ("adapted", merged),
        ("unchanged", kept),
        ("adapter_tensors", 2 * merged),
    ];
    for (key, n) in expected {
        assert_eq!(report[key], n, "{key}");
    }
    assert_eq!(after.config()["torch_dtype"], "float16");
    let proj = "model.layers.0.mlp.up_proj.weight";
    assert_eq!(after.tensor(proj).unwrap().dtype, DType::F16);
}

#[test]
fn adapters_of_zeros_are_told_and_those_of_no_numbers_refused() {
    let place = tempfile::tempdir().unwrap();
    let adapter = place.path().join("zeros");
    write_adapter(&adapter, &["model.layers.0.self_attn.o_proj"]);
    let (model, zeros) = (
        path("llama_distill"),
        adapter.to_string_lossy().into_owned(),
    );
    let out = place.path().join("out").to_string_lossy().into_owned();
    let done = moeforge(&["merge", &model, "--adapter", &zeros, "--out", &out]);
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(
        done.status.success() && said.contains("changes nothing"),
        "{said}"
    );

    let file = adapter.join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(&file, bytes).unwrap();
    for verb in ["merge", "export-adapter"] {
        let out = place.path().join(verb).to_string_lossy().into_owned();
        let done = moeforge(&[verb, &model, "--adapter", &zeros, "--out", &out]);
        refused(&done, 1, &["o_proj.lora_B.weight", "finite", "inf"]);
        assert!(!Path::new(&out).exists());
    }
    write_safetensors(&file, &[], &BTreeMap::new()).unwrap();
    let done = moeforge(&["merge", &model, "--adapter", &zeros, "--out", &out]);
    refused(
        &done,
        1,
        &["zeros/adapter_model.safetensors", "at least one"],
    );
}

/// 8 bits in groups of 32, in a stack of experts, and 4 bits without a word in the config.
#[test]
fn weights_of_mlx_are_called_that() {
    let packed = |name: &'static str, size: usize| {
        move |t: Tensor| {
            if !t.name.contains(name) {
                return Some(t);
            }
            let shape = [t.shape[0], t.shape[1] / size];
            let bytes = vec![1; shape[0] * shape[1] * 4];
            Some(Tensor::new(&t.name, DType::U32, &shape, bytes.into()).unwrap())
        }
    };
    for (name, layer, size) in [
        ("deepseek_v2_lite", "shared_experts.up_proj", 4),
        ("qwen2_distill", "layers.1.mlp.down_proj.weight", 8),
    ] {
        let place = tempfile::tempdir().unwrap();
        let model = changed(name, place.path(), packed(layer, size));
        // The scales next to the weights give them away.
        let folder = Folder::open(place.path()).unwrap();
        let mut tensors: Vec<Tensor> = folder.names().map(|n| folder.tensor(n).unwrap()).collect();
        let packed = tensors.iter().find(|t| t.dtype == DType::U32).unwrap();
        let scales = packed.name.replace(".weight", ".scales");
        tensors.push(Tensor::new(&scales, DType::BF16, &[1], vec![0; 2].into()).unwrap());
        let file = place.path().join("copy.safetensors");
        write_safetensors(&file, &tensors, &BTreeMap::new()).unwrap();
        std::fs::rename(&file, place.path().join("model.safetensors")).unwrap();
        let out = place.path().join("out").to_string_lossy().into_owned();
        let done = moeforge(&["quantize", &model, "--to", "gguf:q8_0", "--out", &out]);
        refused(&done, 1, &["MLX-quantized", &scales, "--dequantize"]);
    }
}
