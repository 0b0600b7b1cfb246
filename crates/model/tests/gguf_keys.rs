//! Every key of a GGUF's metadata is obeyed, refused, or named. One key at a time is dropped, renamed, of another type or of
//! another value; the logits are those of the folder whose `config.json` says the same, which `config_keys.rs` holds against
//! transformers. What a key says in a `config.json` is written here a second time, by the meaning that it has in llama.cpp.
//!
//! `--no-capture` prints the outcomes as a table.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::{Folder, FolderWriter, Gguf, GgufValue, GgufWriter, TensorSpec};
use moeforge_model::export::gguf::write_gguf;
use moeforge_model::export::mix::{GgufType, Mix, MixScheme};
use moeforge_model::{Compute, ForwardContext, Training, load};
use serde_json::{Value, json};

/// The bar for f32 logits of the same weights.
const TOLERANCE: f32 = 2e-5;
const N: usize = 40;

fn logits(folder: &Folder) -> Result<Vec<f32>, String> {
    let device = Device::flex();
    let model = load::load(folder, Training::Frozen, &device);
    let model = model.map_err(|error| error.to_string())?;
    let ids: Vec<i32> = (0..N as i32)
        .map(|i| (7 * i * i + 3 * i + 2) % 256)
        .collect();
    let ids: Tensor<2, Int> = Tensor::from_data(TensorData::new(ids, [1, N]), &device);
    let mut ctx = ForwardContext::new(Compute::F32);
    let hidden = model.hidden(ids, &mut ctx);
    let hidden = hidden.reshape([N, model.config.hidden_size]);
    let logits = model.logits(hidden, &ctx);
    Ok(logits.into_data().try_to_vec().unwrap())
}

fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

/// A GGUF, and the folder that says the same.
struct Pair {
    name: &'static str,
    golden: &'static str,
    config: Value,
    gguf: Gguf,
    place: tempfile::TempDir,
}

impl Pair {
    fn new(name: &'static str, golden: &'static str, change: &dyn Fn(&mut Value)) -> Self {
        let folder = Folder::open(&goldens::path(golden)).unwrap();
        let mut config = folder.config().clone();
        change(&mut config);
        config["num_nextn_predict_layers"] = Value::Null;
        let place = tempfile::tempdir().unwrap();
        let mut file = goldens::path(&format!("gguf/{name}.gguf"));
        if !file.exists() {
            // Written by this program: the folder with the settings.
            let source = with_config(golden, &config, &place.path().join("source"));
            file = place.path().join("m.gguf");
            let mix = Mix::new(MixScheme::Plain(GgufType::F32), "").unwrap();
            write_gguf(&source, &mix, vec![], &file, &mut |_, _| {}).unwrap();
        }
        let gguf = Gguf::open(&file).unwrap();
        Self {
            name,
            golden,
            config,
            gguf,
            place,
        }
    }

    /// The keys of the metadata, those of the tokenizer left out.
    fn metadata(&self) -> BTreeMap<String, Value> {
        let folder = Folder::open(self.path().as_path()).unwrap();
        let entries = folder.metadata().unwrap().clone().into_iter();
        entries
            .filter(|(key, _)| !key.starts_with("tokenizer."))
            .collect()
    }

    fn path(&self) -> PathBuf {
        let file = goldens::path(&format!("gguf/{}.gguf", self.name));
        if file.exists() {
            file
        } else {
            self.place.path().join("m.gguf")
        }
    }

    /// The file with other metadata.
    fn changed(&self, metadata: &BTreeMap<String, Value>) -> Result<Folder, String> {
        let out = self.place.path().join("changed.gguf");
        _ = std::fs::remove_file(&out);
        let typed = |(key, value): (&String, &Value)| (key.clone(), GgufValue::of(value).unwrap());
        let metadata: Vec<_> = metadata.iter().map(typed).collect();
        let tensors: Vec<_> = self.gguf.tensors().collect();
        let specs: Vec<TensorSpec> = tensors.iter().map(|tensor| tensor.spec()).collect();
        let mut writer = GgufWriter::create(&out, &metadata, &specs).unwrap();
        for tensor in tensors {
            writer.write(&tensor.bytes).unwrap();
        }
        writer.finish().unwrap();
        Folder::open(&out).map_err(|error| error.to_string())
    }

    /// The logits of the folder with another config.
    fn expected(&self, config: &Value) -> Result<Vec<f32>, String> {
        let place = tempfile::tempdir().unwrap();
        logits(&with_config(
            self.golden,
            config,
            &place.path().join("folder"),
        ))
    }
}

fn with_config(golden: &str, config: &Value, out: &Path) -> Folder {
    let source = Folder::open(&goldens::path(golden)).unwrap();
    let mut writer = FolderWriter::create(out).unwrap();
    for (file, names) in source.shards() {
        let tensors: Vec<_> = names
            .iter()
            .map(|name| source.tensor(name).unwrap())
            .collect();
        let specs: Vec<TensorSpec> = tensors.iter().map(checkpoint::Tensor::spec).collect();
        writer
            .add_shard(file, &specs, |i| Ok(tensors[i].bytes.clone()))
            .unwrap();
    }
    writer.write_index().unwrap();
    writer.write_json("config.json", config).unwrap();
    writer.finish().unwrap();
    Folder::open(out).unwrap()
}

/// Keys after the architecture's name, of a `config.json`, and what an absent one means.
const MEANINGS: [(&str, &[&str], &str); 19] = [
    ("block_count", &["num_hidden_layers"], ""),
    ("embedding_length", &["hidden_size"], ""),
    ("feed_forward_length", &["intermediate_size"], ""),
    ("attention.head_count", &["num_attention_heads"], ""),
    ("attention.layer_norm_rms_epsilon", &["rms_norm_eps"], ""),
    ("rope.freq_base", &["rope_theta"], "10000"),
    ("attention.q_lora_rank", &["q_lora_rank"], "null"),
    ("leading_dense_block_count", &["first_k_dense_replace"], "0"),
    ("expert_count", &["n_routed_experts"], "0"),
    ("expert_shared_count", &["n_shared_experts"], "0"),
    ("expert_used_count", &["num_experts_per_tok"], ""),
    ("expert_weights_scale", &["routed_scaling_factor"], "1.0"),
    ("expert_weights_norm", &["norm_topk_prob"], "false"),
    ("expert_group_count", &["n_group"], "1"),
    ("expert_group_used_count", &["topk_group"], "1"),
    ("rope.scaling.factor", &["rope_scaling", "factor"], "1"),
    (
        "rope.scaling.original_context_length",
        &["rope_scaling", "original_max_position_embeddings"],
        "null",
    ),
    (
        "rope.scaling.yarn_beta_fast",
        &["rope_scaling", "beta_fast"],
        "32",
    ),
    (
        "rope.scaling.yarn_beta_slow",
        &["rope_scaling", "beta_slow"],
        "1",
    ),
];

/// The config that says the same as a changed key; none if there is no such config.
fn same(config: &Value, key: &str, value: Option<&Value>) -> Option<Value> {
    let mut config = config.clone();
    let absent = |text: &str| serde_json::from_str::<Value>(text).ok();
    if let Some((_, path, default)) = MEANINGS.iter().find(|known| known.0 == key) {
        let value = value.cloned().or_else(|| absent(default))?;
        let holder = path
            .iter()
            .fold(&mut config, |holder, key| &mut holder[*key]);
        let before = std::mem::replace(holder, value);
        let attention = config["rope_scaling"]["attention_factor"].as_f64();
        if let ("rope.scaling.factor", Some(attention)) = (key, attention) {
            // A GGUF's factor of the attention is relative to that which follows from the scaling factor.
            let own = |factor: &Value| factor.as_f64().map(|factor| 0.1 * factor.ln() + 1.0);
            let ratio = own(&config["rope_scaling"]["factor"])? / own(&before)?;
            config["rope_scaling"]["attention_factor"] = json!(attention * ratio);
        }
        return Some(config);
    }
    let factor = config["rope_scaling"]["factor"].as_f64();
    match (key, value) {
        ("rope.scaling.yarn_log_multiplier", value) => {
            let mscale = value.map(|value| value.as_f64().map(|value| value / 0.1));
            for key in ["mscale", "mscale_all_dim"] {
                config["rope_scaling"][key] = json!(mscale.unwrap_or(Some(0.0))?);
            }
        }
        ("rope.scaling.attn_factor", value) => {
            let own = 0.1 * factor?.ln() + 1.0;
            let times = value.map_or(Some(1.0), Value::as_f64)?;
            config["rope_scaling"]["attention_factor"] = json!(own * times);
        }
        ("rope.scaling.type", Some(kind)) if kind == "none" => {
            config["rope_scaling"] = Value::Null;
        }
        ("rope.scaling.type", kind) if kind.is_none_or(|kind| kind == "linear") => {
            config["rope_scaling"] = json!({ "type": "linear", "factor": factor? });
        }
        _ => return None,
    }
    Some(config)
}

/// Keys that change nothing: what a file is, and what follows from tensors or other keys.
const HARMLESS: [&str; 18] = [
    "general.name",
    "general.sampling.temp",
    "general.sampling.top_p",
    "general.type",
    "general.file_type",
    "general.size_label",
    "general.quantization_version",
    "context_length",
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_mla",
    "rope.dimension_count",
    "expert_gating_func",
    "expert_count",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
];

fn changes(value: &Value) -> Vec<(&'static str, Option<Value>)> {
    let mut changes = vec![("drop", None), ("rename", None)];
    changes.extend(
        match value {
            Value::Bool(flag) => vec![("retype", json!("yes")), ("change", json!(!flag))],
            Value::String(_) => vec![
                ("retype", json!(7)),
                ("change", json!("linear")),
                ("change", json!("none")),
                ("change", json!("longrope")),
            ],
            Value::Number(n) if n.is_f64() => {
                let n = n.as_f64().unwrap();
                vec![
                    ("retype", json!("x")),
                    ("change", json!(n * 1.5)),
                    ("change", json!(n * 0.5)),
                ]
            }
            other => {
                let n = other.as_u64().unwrap();
                vec![
                    ("retype", json!("x")),
                    ("change", json!(n + 1)),
                    ("change", json!(n * 2)),
                    ("change", json!(n / 2)),
                ]
            }
        }
        .into_iter()
        .map(|(action, value)| (action, Some(value))),
    );
    changes
}

#[test]
#[expect(
    clippy::print_stdout,
    reason = "the table of outcomes, for --no-capture"
)]
#[expect(clippy::too_many_lines, reason = "the outcomes in their order")]
fn every_key_of_a_gguf_is_obeyed_refused_or_named() {
    let without = |config: &mut Value| config["rope_scaling"] = Value::Null;
    let yarn = |config: &mut Value| {
        config["rope_scaling"] = json!({
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
            "beta_fast": 8.0, "beta_slow": 1.0, "attention_factor": 1.5,
        });
    };
    let pairs = [
        Pair::new("llama_f32", "llama_distill", &without),
        Pair::new("deepseek_v3_f32", "deepseek_v3", &|_| {}),
        Pair::new("deepseek_v2_lite_bf16", "deepseek_v2_lite", &|_| {}),
        Pair::new("qwen2_yarn", "qwen2_distill", &yarn),
    ];
    let (mut silent, mut table) = (Vec::new(), BTreeMap::new());
    for pair in &pairs {
        let plain = pair.expected(&pair.config).unwrap();
        let metadata = pair.metadata();
        let unchanged = logits(&pair.changed(&metadata).unwrap()).unwrap();
        let off = difference(&unchanged, &plain);
        assert!(off <= TOLERANCE, "{}: {off}", pair.name);
        let prefix = if pair.golden.starts_with("deepseek") {
            "deepseek2."
        } else {
            ""
        };
        for (key, value) in &metadata {
            let own = key.strip_prefix(prefix).unwrap_or(key);
            let own = own
                .strip_prefix("llama.")
                .or(own.strip_prefix("qwen2."))
                .unwrap_or(own);
            for (action, change) in changes(value) {
                let mut metadata = metadata.clone();
                metadata.remove(key);
                let name = if action == "rename" {
                    format!("{key}_x")
                } else {
                    key.clone()
                };
                match (action, &change) {
                    ("rename", _) => _ = metadata.insert(name.clone(), value.clone()),
                    (_, Some(change)) => _ = metadata.insert(name.clone(), change.clone()),
                    _ => {}
                }
                let opened = pair.changed(&metadata);
                let found = opened.as_ref().map_err(Clone::clone).and_then(logits);
                let is_named = opened.is_ok_and(|folder| {
                    let unknown = load::unknown_keys(&folder);
                    unknown.is_ok_and(|keys| keys.iter().any(|known| known.0 == name))
                });
                let expected = same(&pair.config, own, change.as_ref());
                let expected = expected.map(|config| pair.expected(&config));
                let outcome = match (found, expected) {
                    (Err(_), _) => "refused",
                    _ if is_named => "named",
                    (Ok(found), Some(Ok(expected)))
                        if difference(&found, &expected) <= TOLERANCE =>
                    {
                        if difference(&found, &plain) > TOLERANCE {
                            "obeyed"
                        } else {
                            "harmless"
                        }
                    }
                    (Ok(found), None)
                        if difference(&found, &plain) <= TOLERANCE && HARMLESS.contains(&own) =>
                    {
                        "harmless"
                    }
                    _ => "silent",
                };
                *table.entry((pair.name, action, outcome)).or_insert(0) += 1;
                if outcome == "silent" {
                    silent.push(format!("{} {key} {action} {change:?}", pair.name));
                }
            }
        }
    }
    println!("| file | one key at a time | outcome | cases |\n|---|---|---|---|");
    for ((name, action, outcome), n) in &table {
        println!("| {name} | {action} | {outcome} | {n} |");
    }
    assert!(silent.is_empty(), "{silent:#?}");
}
