//! Every tensor of every golden and adapter, dropped, renamed, doubled, transposed and retyped, under `logits`, `merge` and
//! `quantize`: the result is right, or the refusal names the tensor. There is no third outcome.
//!
//! `cargo nextest run --workspace --test tensors --no-capture` prints the tables.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]
#![expect(
    clippy::print_stdout,
    reason = "the tables of outcomes, for --no-capture"
)]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor};
use checkpoint::{Adapter, DType, Folder, Tensor as Stored, write_safetensors};
use moeforge_model::export::gguf::write_gguf;
use moeforge_model::export::mix::{Mix, MixScheme};
use moeforge_model::export::{WeightFormat, convert, merge};
use moeforge_model::{AdapterWeights, Compute, ForwardContext, Model, Training, load};
use rayon::prelude::*;
use serde_json::{Value, json};

/// The goldens, each with an adapter if it has one.
const BASES: [(&str, Option<&str>); 6] = [
    ("deepseek_v2_lite", Some("adapter_classic")),
    ("deepseek_v2_group", None),
    ("deepseek_v3", Some("adapter_peft")),
    ("deepseek_v3_fp8", None),
    ("qwen2_distill", Some("adapter_rslora")),
    ("llama_distill", None),
];
const ADAPTERS: [&str; 9] = [
    "deepseek_v2_lite/adapter_classic",
    "deepseek_v2_lite/adapter_mlx",
    "deepseek_v3/adapter_peft",
    "deepseek_v3/adapter_dora",
    "qwen2_distill/adapter_rslora",
    "qwen2_distill/adapter_mlx",
    "peft_kinds/qwen2_distill_both",
    "peft_kinds/qwen2_distill_saved_norms",
    "peft_kinds/qwen2_distill_tokens",
];
/// Of logits, to what the same weights give in another way.
const TOLERANCE: f32 = 2e-4;

/// What is done to one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    Drop,
    Rename,
    /// As a wrapper of the whole model would.
    Wrap,
    /// A second one, under another name.
    Double,
    Transpose,
    /// The same bytes as integers.
    Integers,
    /// The values, rounded to bf16.
    Round,
    /// One value is NaN.
    NotANumber,
}

impl Change {
    const ALL: [Self; 8] = [
        Self::Drop,
        Self::Rename,
        Self::Wrap,
        Self::Double,
        Self::Transpose,
        Self::Integers,
        Self::Round,
        Self::NotANumber,
    ];

    /// The tensors after the change; none if it is none of this tensor.
    fn made(self, tensors: &[Stored], at: usize) -> Option<Vec<Stored>> {
        let (mut tensors, old) = (tensors.to_vec(), tensors[at].clone());
        let named = |name: String| Stored {
            name: name.into(),
            ..old.clone()
        };
        let is_plain = matches!(old.dtype, DType::F32 | DType::BF16);
        match self {
            Self::Drop => _ = tensors.remove(at),
            Self::Rename => tensors[at] = named(format!("{}.moved", old.name)),
            Self::Wrap => tensors[at] = named(format!("_orig_mod.{}", old.name)),
            Self::Double => tensors.push(named(format!("module.{}", old.name))),
            Self::Transpose => match old.shape[..] {
                [rows, cols] if rows != cols => tensors[at].shape = vec![cols, rows],
                [len] => tensors[at].shape = vec![len, 1],
                _ => return None,
            },
            Self::Integers => {
                tensors[at].dtype = match old.dtype {
                    DType::F32 => DType::I32,
                    DType::BF16 | DType::F16 => DType::I16,
                    _ => DType::U8,
                }
            }
            Self::Round if is_plain => {
                let values = old.to_f32().unwrap().into_iter();
                let bytes = values.flat_map(|value| half::bf16::from_f32(value).to_le_bytes());
                let bytes: Vec<u8> = bytes.collect();
                tensors[at] =
                    Stored::new(&old.name, DType::BF16, &old.shape, bytes.into()).unwrap();
            }
            Self::NotANumber if is_plain => {
                let mut values = old.to_f32().unwrap();
                let middle = values.len() / 2;
                values[middle] = f32::NAN;
                tensors[at] = stored(&old.name, &old.shape, &values);
            }
            Self::Round | Self::NotANumber => return None,
        }
        Some(tensors)
    }
}

fn stored(name: &str, shape: &[usize], values: &[f32]) -> Stored {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Stored::new(name, DType::F32, shape, bytes.into()).unwrap()
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Right,
    Refused,
    Wrong(String),
}

/// Logits of a few tokens.
fn logits(model: &Model) -> Vec<f32> {
    let ids = Tensor::<2, Int>::from_ints([[5, 6, 7, 8]], &Device::flex());
    let hidden = model.hidden(ids, &mut ForwardContext::new(Compute::F32));
    let hidden = hidden.reshape([4, model.config.hidden_size]);
    let logits = model.logits(hidden, &ForwardContext::new(Compute::F32));
    logits.into_data().try_to_vec().unwrap()
}

fn logits_of(path: &Path) -> Result<Vec<f32>, String> {
    let folder = Folder::open(path).map_err(|error| error.to_string())?;
    let model = load::load(&folder, Training::Frozen, &Device::flex());
    model
        .map(|model| logits(&model))
        .map_err(|error| error.to_string())
}

/// The verbs, from a model and a folder to write to, to logits.
type Verb = (
    &'static str,
    fn(&Path, Option<&Path>, &Path) -> Result<Vec<f32>, String>,
);

const VERBS: [Verb; 4] = [
    ("logits", |model, _, _| logits_of(model)),
    ("merge", |model, adapter, out| {
        let base = Folder::open(model).map_err(|error| error.to_string())?;
        let Some(adapter) = adapter else {
            return convert(&base, WeightFormat::Bf16, out, &mut |_, _| {})
                .map_err(|error| error.to_string())
                .map(|_| vec![]);
        };
        let config = load::read_config(&base).map_err(|error| error.to_string())?;
        let adapter = Adapter::open(adapter).unwrap();
        let adapter = AdapterWeights::read(&adapter, &config).map_err(|error| error.to_string())?;
        let merged = merge(&base, &adapter, WeightFormat::F32, out, &mut |_, _| {});
        merged.map_err(|error| error.to_string())?;
        logits_of(out)
    }),
    ("quantize hf", |model, _, out| {
        let base = Folder::open(model).map_err(|error| error.to_string())?;
        convert(&base, WeightFormat::F32, out, &mut |_, _| {})
            .map_err(|error| error.to_string())?;
        logits_of(out)
    }),
    ("quantize gguf", |model, _, out| {
        let base = Folder::open(model).map_err(|error| error.to_string())?;
        let mut schemes = MixScheme::all().into_iter();
        let scheme = schemes.find(|scheme| scheme.to_string() == "f32").unwrap();
        let (mix, out) = (Mix::new(scheme, "").unwrap(), out.join("model.gguf"));
        std::fs::create_dir_all(out.parent().unwrap()).unwrap();
        write_gguf(&base, &mix, vec![], &out, &mut |_, _| {}).map_err(|error| error.to_string())?;
        logits_of(&out)
    }),
];

/// Writes a model of one shard.
fn write_model(place: &Path, config: &Value, tensors: &[Stored]) {
    std::fs::create_dir_all(place).unwrap();
    std::fs::write(place.join("config.json"), config.to_string()).unwrap();
    let file = place.join("model.safetensors");
    write_safetensors(&file, tensors, &BTreeMap::new()).unwrap();
}

/// Whether logits are those of the same weights, or an error names the tensor.
fn judged(found: Result<Vec<f32>, String>, expected: &[f32], names: &[&str]) -> Outcome {
    match found {
        Err(message) if names.iter().any(|name| message.contains(name)) => Outcome::Refused,
        Err(message) => Outcome::Wrong(format!("names another thing: {message}")),
        Ok(found) => {
            let pairs = found.iter().zip(expected);
            let off = pairs.fold(0f32, |max, (f, e)| {
                if (f - e).is_nan() {
                    f32::NAN
                } else {
                    max.max((f - e).abs())
                }
            });
            match found.len() == expected.len() && off <= TOLERANCE {
                true => Outcome::Right,
                false => Outcome::Wrong(format!("logits off by {off:.1e}, and nothing said")),
            }
        }
    }
}

/// Prints how often each change had which outcome, and fails on wrong ones.
fn table(title: &str, outcomes: Vec<(String, Change, Outcome)>) {
    let mut counts: BTreeMap<Change, [usize; 3]> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (what, change, outcome) in outcomes {
        let place = match &outcome {
            Outcome::Right => 0,
            Outcome::Refused => 1,
            Outcome::Wrong(problem) => {
                wrong.push(format!("{what}, {change:?}: {problem}"));
                2
            }
        };
        counts.entry(change).or_default()[place] += 1;
    }
    println!("\n| {title} | right | refused by name | wrong |\n|---|---|---|---|");
    for (change, [right, refused, wrong]) in counts {
        println!("| {change:?} | {right} | {refused} | {wrong} |");
    }
    let first = &wrong[..wrong.len().min(12)];
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        first.join("\n")
    );
}

/// The verbs' logits of a changed model.
fn of_verbs(place: &Path, adapter: Option<&Path>) -> Vec<Result<Vec<f32>, String>> {
    let verbs = VERBS.iter().map(|(name, verb)| {
        let out = place.join(name);
        verb(&place.join("model"), adapter, &out)
    });
    verbs.collect()
}

fn check_model(name: &str, adapter: Option<&str>) {
    let folder = Folder::open(&goldens::path(name)).unwrap();
    let tensors: Vec<Stored> = folder
        .names()
        .map(|name| folder.tensor(name).unwrap())
        .collect();
    let adapter = adapter.map(|adapter| goldens::path(name).join(adapter));
    let run = |tensors: &[Stored]| {
        let place = tempfile::tempdir().unwrap();
        write_model(&place.path().join("model"), folder.config(), tensors);
        of_verbs(place.path(), adapter.as_deref())
    };
    let plain: Vec<Vec<f32>> = run(&tensors).into_iter().map(Result::unwrap).collect();
    let changes = (0..tensors.len()).into_par_iter().flat_map(|at| {
        let tensors = &tensors;
        Change::ALL
            .into_par_iter()
            .map(move |change| (at, change, change.made(tensors, at)))
    });
    let outcomes = changes.flat_map(|(at, change, changed)| {
        let tensor = &tensors[at];
        // NaN in a base is the base's. What leaves a model right takes long: one expert stands for all.
        let is_other_expert =
            tensor.name.contains(".experts.") && !tensor.name.contains(".experts.0.");
        let is_long = is_other_expert && matches!(change, Change::Double | Change::Round);
        let changed = changed.filter(|_| change != Change::NotANumber && !is_long);
        let Some(changed) = changed else {
            return vec![];
        };
        let expected = match change {
            // The same numbers, in f32.
            Change::Round => {
                let mut rounded = tensors.clone();
                rounded[at] = stored(&tensor.name, &tensor.shape, &changed[at].to_f32().unwrap());
                run(&rounded).into_iter().map(Result::unwrap).collect()
            }
            _ => plain.clone(),
        };
        let found = run(&changed).into_iter().zip(expected).zip(VERBS);
        let judge = |((found, expected), (verb, _)): ((_, Vec<f32>), Verb)| {
            let outcome = judged(found, &expected, &[&tensor.name]);
            (format!("{name} {verb} {}", tensor.name), change, outcome)
        };
        found.map(judge).collect()
    });
    table(name, outcomes.collect());
}

#[test]
fn every_tensor_of_every_model_counts_or_is_named() {
    for (name, adapter) in BASES {
        check_model(name, adapter);
    }
}

fn base_of(adapter: &str) -> PathBuf {
    let name = adapter.trim_start_matches("peft_kinds/");
    let bases = ["deepseek_v2_lite", "deepseek_v3", "qwen2_distill"];
    let base = bases
        .into_iter()
        .find(|base| name.starts_with(base))
        .unwrap();
    goldens::path(base)
}

/// The logits of a base with an adapter on it, and merged into it.
fn with_adapter(base: &Path, adapter: &Path, place: &Path) -> [Result<Vec<f32>, String>; 2] {
    let attached = || {
        let folder = Folder::open(base).unwrap();
        let mut model = load::load(&folder, Training::Frozen, &Device::flex()).unwrap();
        let adapter = Adapter::open(adapter).map_err(|error| error.to_string())?;
        let adapter =
            AdapterWeights::read(&adapter, &model.config).map_err(|error| error.to_string())?;
        let attached = adapter.attach(&mut model, &Device::flex());
        attached.map_err(|error| error.to_string())?;
        Ok(logits(&model))
    };
    let merged = || {
        let folder = Folder::open(base).unwrap();
        let adapter = Adapter::open(adapter).map_err(|error| error.to_string())?;
        let config = load::read_config(&folder).unwrap();
        let adapter = AdapterWeights::read(&adapter, &config).map_err(|error| error.to_string())?;
        let out = place.join("merged");
        merge(&folder, &adapter, WeightFormat::F32, &out, &mut |_, _| {})
            .map_err(|error| error.to_string())?;
        logits_of(&out)
    };
    [attached(), merged()]
}

/// An adapter with its settings and tensors, both perhaps changed.
fn run_adapter(
    base: &Path,
    original: &Adapter,
    settings: &Value,
    tensors: &[Stored],
) -> [Result<Vec<f32>, String>; 2] {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("adapter");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("adapter_config.json"), settings.to_string()).unwrap();
    let file = folder.join(original.path().file_name().unwrap());
    write_safetensors(&file, tensors, &BTreeMap::new()).unwrap();
    with_adapter(base, &folder, place.path())
}

fn settings_of(adapter: &Adapter) -> Value {
    let path = adapter.path().with_file_name("adapter_config.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn every_tensor_of_every_adapter_counts_or_is_named() {
    for name in ADAPTERS {
        let (base, adapter) = (base_of(name), Adapter::open(&goldens::path(name)).unwrap());
        let (settings, tensors) = (settings_of(&adapter), adapter.tensors().to_vec());
        let plain = run_adapter(&base, &adapter, &settings, &tensors).map(Result::unwrap);
        let places = (0..tensors.len()).into_par_iter();
        let outcomes = places.flat_map_iter(|at| {
            let tensor = &tensors[at];
            let changes = Change::ALL.into_iter();
            let changes = changes.filter_map(|change| Some((change, change.made(&tensors, at)?)));
            let judge = |(change, changed): (Change, Vec<Stored>)| {
                let expected = match change {
                    Change::Round => {
                        let mut rounded = tensors.clone();
                        rounded[at] =
                            stored(&tensor.name, &tensor.shape, &changed[at].to_f32().unwrap());
                        run_adapter(&base, &adapter, &settings, &rounded).map(Result::unwrap)
                    }
                    _ => plain.clone(),
                };
                // What lacks a factor is named by the other one's name, and the module by both.
                let module = tensor.name.trim_start_matches("base_model.model.");
                let module = module
                    .split(".lora_")
                    .next()
                    .unwrap()
                    .trim_end_matches(".weight");
                let module = module
                    .trim_end_matches(".base_layer")
                    .trim_end_matches(".m");
                let found = run_adapter(&base, &adapter, &settings, &changed);
                let found = found.into_iter().zip(expected);
                let outcomes = found.map(|(found, expected)| {
                    let outcome = judged(found, &expected, &[&tensor.name, module]);
                    (format!("{name} {}", tensor.name), change, outcome)
                });
                outcomes.collect::<Vec<_>>()
            };
            changes.flat_map(judge).collect::<Vec<_>>()
        });
        table(name, outcomes.collect());
    }
}

/// A setting's other values, of its kind and of another.
fn others(key: &str, value: &Value) -> Vec<Value> {
    let more = match (key, value) {
        ("lora_alpha", _) => vec![json!(12)],
        ("target_modules", _) => vec![json!(["o_proj"]), json!("nothing"), json!([])],
        ("peft_type", _) => vec![json!("LOHA"), json!("lora")],
        (_, Value::Bool(flag)) => vec![json!(!flag)],
        (_, Value::Number(number)) => vec![json!(number.as_f64().unwrap() + 1.0), json!(7)],
        (_, Value::String(_)) => vec![json!("other")],
        (_, Value::Array(_)) => vec![json!(["other"])],
        (_, Value::Object(_)) => vec![json!({"other": 3})],
        (_, Value::Null) => vec![json!(true), json!(["x"]), json!({"x": 1})],
    };
    let retyped = [json!("text"), json!(3), json!([1]), json!({"a": [0]})];
    more.into_iter().chain(retyped).collect()
}

#[test]
fn every_setting_of_every_adapter_counts_or_is_named() {
    println!(
        "\n| adapter | key | as before | refused by name | changed as it says |\n|---|---|---|---|---|"
    );
    let names = ADAPTERS.into_iter().filter(|name| !name.contains("mlx"));
    let wrong: Vec<String> = names.flat_map(check_settings).collect();
    let first = &wrong[..wrong.len().min(20)];
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        first.join("\n")
    );
}

/// Changes every setting of an adapter. Prints what came of it, and returns what went wrong.
fn check_settings(name: &str) -> Vec<String> {
    let (base, adapter) = (base_of(name), Adapter::open(&goldens::path(name)).unwrap());
    let (settings, tensors) = (settings_of(&adapter), adapter.tensors().to_vec());
    let plain = run_adapter(&base, &adapter, &settings, &tensors).map(Result::unwrap);
    let keys: Vec<&String> = settings.as_object().unwrap().keys().collect();
    let rows = keys.into_par_iter().map(|key| {
        let (mut counts, mut wrong) = ([0; 3], Vec::new());
        for changed in variants(&settings, key) {
            let found = run_adapter(&base, &adapter, &changed, &tensors);
            let scaled = scaled(&adapter, &settings, &changed);
            let expected = match &scaled {
                Some(tensors) => {
                    run_adapter(&base, &adapter, &settings, tensors).map(Result::unwrap)
                }
                None => plain.clone(),
            };
            for (found, expected) in found.into_iter().zip(&expected) {
                match judged(found, expected, &[key.as_str(), "magnitude", "rank"]) {
                    Outcome::Right => counts[if scaled.is_some() { 2 } else { 0 }] += 1,
                    Outcome::Refused => counts[1] += 1,
                    Outcome::Wrong(problem) => {
                        wrong.push(format!("{name} {key} = {}: {problem}", changed[key]));
                    }
                }
            }
        }
        let [same, refused, changed] = counts;
        (
            format!("| {name} | {key} | {same} | {refused} | {changed} |"),
            wrong,
        )
    });
    let rows: Vec<(String, Vec<String>)> = rows.collect();
    rows.iter().for_each(|(row, _)| println!("{row}"));
    rows.into_iter().flat_map(|(_, wrong)| wrong).collect()
}

/// The settings without one, with it under another name, and with other values for it.
fn variants(settings: &Value, key: &str) -> Vec<Value> {
    let mut without = settings.clone();
    without.as_object_mut().unwrap().shift_remove(key);
    let mut renamed = without.clone();
    renamed[format!("{key}_")] = settings[key].clone();
    let others = others(key, &settings[key]).into_iter().map(|value| {
        let mut changed = settings.clone();
        changed[key] = value;
        changed
    });
    [without, renamed].into_iter().chain(others).collect()
}

/// The tensors with which the old settings mean what the new ones mean: second factors times the ratio of the scales. None if
/// the scale is the same, or cannot be said by these settings alone.
fn scaled(adapter: &Adapter, old: &Value, new: &Value) -> Option<Vec<Stored>> {
    let scale = |settings: &Value| {
        let (rank, alpha) = (settings["r"].as_f64()?, settings["lora_alpha"].as_f64()?);
        match settings["use_rslora"].as_bool().unwrap_or(false) {
            true => Some(alpha / rank.sqrt()),
            false => Some(alpha / rank),
        }
    };
    let patterns = ["rank_pattern", "alpha_pattern"];
    let has_patterns = patterns
        .iter()
        .any(|key| old[*key].as_object().is_some_and(|map| !map.is_empty()));
    let ratio = (scale(new)? / scale(old)?) as f32;
    if has_patterns || ratio == 1.0 {
        return None;
    }
    let times = |tensor: &Stored| match tensor.name.contains("lora_B")
        || tensor.name.contains("embedding_B")
    {
        true => {
            let values: Vec<f32> = tensor.to_f32().unwrap().iter().map(|v| v * ratio).collect();
            stored(&tensor.name, &tensor.shape, &values)
        }
        false => tensor.clone(),
    };
    Some(adapter.tensors().iter().map(times).collect())
}
