//! Every key of a `config.json` is obeyed, refused, or named: there is no other outcome. One key at a time of every golden is
//! dropped, renamed, of another type or of another value; the logits are those of transformers for the changed file, made by
//! `tests/goldens/config_keys.py`.
//!
//! `--no-capture` prints the outcomes as a table.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::{DType, Folder, FolderWriter, Safetensors, TensorSpec};
use moeforge_model::export::WeightFormat;
use moeforge_model::export::gguf::write_gguf;
use moeforge_model::export::mix::{GgufType, Mix, MixScheme};
use moeforge_model::export::{convert, llama_cpp_differences};
use moeforge_model::{Compute, ForwardContext, ModelConfig, Training, load};
use serde::Deserialize;
use serde_json::{Value, json};

/// The bar for f32 logits.
const TOLERANCE: f32 = 2e-4;

#[derive(Deserialize)]
struct Cases {
    ids: Vec<i32>,
    positions: Vec<usize>,
    stride: usize,
    cases: Vec<Case>,
}

/// A changed config, and the number of the logits that transformers computes with it; none if it refuses.
#[derive(Deserialize)]
struct Case {
    golden: String,
    file: String,
    #[serde(default)]
    path: Vec<String>,
    #[serde(default)]
    action: String,
    #[serde(default)]
    value: Value,
    /// Of a variant: its name, and what it changes.
    variant: Option<String>,
    #[serde(default)]
    patch: BTreeMap<String, Value>,
    /// Modules that get a bias.
    #[serde(default)]
    biases: Vec<String>,
    logits: Option<usize>,
}

impl Case {
    fn name(&self) -> String {
        let of = |variant: &String| format!("{} {variant}", self.golden);
        let change = || {
            let (golden, path) = (&self.golden, self.path.join("."));
            format!("{golden} {path} {} {}", self.action, self.value)
        };
        self.variant.as_ref().map_or_else(change, of)
    }

    fn config(&self) -> Value {
        let mut config = published(&self.golden, &self.file);
        let Some((last, keys)) = self.path.split_last() else {
            for (key, value) in &self.patch {
                match value.as_str() {
                    Some("absent") => _ = config.as_object_mut().unwrap().remove(key),
                    _ => config[key] = value.clone(),
                }
            }
            return config;
        };
        let holder = keys
            .iter()
            .fold(&mut config, |holder, key| &mut holder[key]);
        let object = holder.as_object_mut().unwrap();
        match self.action.as_str() {
            "drop" => _ = object.remove(last),
            "rename" => {
                let value = object.remove(last).unwrap();
                object.insert(format!("{last}_x"), value);
            }
            _ => _ = object.insert(last.clone(), self.value.clone()),
        }
        config
    }
}

fn published(golden: &str, file: &str) -> Value {
    let path = goldens::path(golden).join(file);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

struct Reference {
    cases: Cases,
    logits: Safetensors,
}

impl Reference {
    fn open() -> Self {
        let folder = goldens::path("config_keys");
        let text = std::fs::read_to_string(folder.join("cases.json")).unwrap();
        Self {
            cases: serde_json::from_str(&text).unwrap(),
            logits: Safetensors::open(&folder.join("logits.safetensors")).unwrap(),
        }
    }

    fn expected(&self, number: usize) -> Vec<f32> {
        let tensor = self.logits.tensor(&number.to_string()).unwrap();
        tensor.to_f32().unwrap()
    }

    /// The same logits of a model.
    fn found(&self, folder: &Folder) -> Result<Vec<f32>, String> {
        let device = Device::flex();
        let model = load::load(folder, Training::Frozen, &device);
        let model = model.map_err(|error| error.to_string())?;
        let (ids, n) = (self.cases.ids.clone(), self.cases.ids.len());
        let ids: Tensor<2, Int> = Tensor::from_data(TensorData::new(ids, [1, n]), &device);
        let mut ctx = ForwardContext::new(Compute::F32);
        let hidden = model.hidden(ids, &mut ctx);
        let hidden = hidden.reshape([n, model.config.hidden_size]);
        let logits: Vec<f32> = model.logits(hidden, &ctx).into_data().try_to_vec().unwrap();
        let rows: Vec<&[f32]> = logits.chunks(model.config.vocab_size).collect();
        let wanted = |row: &usize| rows[*row].iter().step_by(self.cases.stride).copied();
        Ok(self.cases.positions.iter().flat_map(wanted).collect())
    }
}

/// A golden's folder with another config.
fn folder(golden: &str, config: &Value, extra: &[checkpoint::Tensor]) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    let source = Folder::open(&goldens::path(golden)).unwrap();
    let mut writer = FolderWriter::create(&place.path().join("model")).unwrap();
    for (file, names) in source.shards() {
        let tensors = names.iter().map(|name| source.tensor(name).unwrap());
        let first = file == source.shards()[0].0;
        let tensors: Vec<_> = tensors
            .chain(extra.iter().filter(|_| first).cloned())
            .collect();
        let specs: Vec<TensorSpec> = tensors.iter().map(checkpoint::Tensor::spec).collect();
        let bytes = |i: usize| Ok(tensors[i].bytes.clone());
        writer.add_shard(file, &specs, bytes).unwrap();
    }
    writer.write_index().unwrap();
    writer.write_json("config.json", config).unwrap();
    writer.finish().unwrap();
    place
}

fn open(place: &tempfile::TempDir) -> Folder {
    Folder::open(&place.path().join("model")).unwrap()
}

fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

/// What became of a changed key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// The logits change as those of the reference.
    Obeyed,
    /// An error.
    Refused,
    /// It is among the unknown keys.
    Named,
    /// It changes nothing, for the reference either.
    Harmless,
    /// None of these.
    Silent,
}

impl Reference {
    fn outcome(&self, case: &Case, plain: (&ModelConfig, &[f32])) -> Outcome {
        let (config, file) = (case.config(), Path::new("config.json"));
        let Ok(read) = ModelConfig::from_json(&config, file) else {
            return Outcome::Refused;
        };
        let unknown = ModelConfig::unknown_keys(&config, file).unwrap();
        let path = case.path.join(".");
        let name = if case.action == "rename" {
            format!("{path}_x")
        } else {
            path
        };
        if unknown.iter().any(|known| known.0 == name) {
            return Outcome::Named;
        }
        let found = if read == *plain.0 {
            plain.1.to_vec()
        } else {
            let place = folder(&case.golden, &config, &[]);
            let Ok(found) = self.found(&open(&place)) else {
                return Outcome::Refused;
            };
            if !load::audit(&open(&place)).unwrap().unknown.is_empty() {
                // A layer of another kind than the config says: its tensors are named as not used.
                return Outcome::Named;
            }
            found
        };
        let changed = difference(&found, plain.1) > TOLERANCE;
        match case
            .logits
            .map(|number| difference(&found, &self.expected(number)))
        {
            Some(off) if off <= TOLERANCE && changed => Outcome::Obeyed,
            Some(off) if off <= TOLERANCE => Outcome::Harmless,
            // The reference refuses another type of what changes nothing.
            None if !changed && read == *plain.0 => Outcome::Harmless,
            _ => Outcome::Silent,
        }
    }
}

#[test]
#[expect(
    clippy::print_stdout,
    reason = "the table of outcomes, for --no-capture"
)]
fn every_key_is_obeyed_refused_or_named() {
    let reference = Reference::open();
    let mut table: BTreeMap<(&str, &str), BTreeMap<Outcome, usize>> = BTreeMap::new();
    let (mut silent, mut plain) = (Vec::new(), BTreeMap::new());
    let cases = reference.cases.cases.iter();
    for case in cases.filter(|case| case.variant.is_none()) {
        let (config, logits) = plain.entry(case.golden.as_str()).or_insert_with(|| {
            let folder = Folder::open(&goldens::path(&case.golden)).unwrap();
            let config = load::read_config(&folder).unwrap();
            (config, reference.found(&folder).unwrap())
        });
        let outcome = reference.outcome(case, (config, logits));
        let row = table.entry((&case.golden, &case.action)).or_default();
        *row.entry(outcome).or_default() += 1;
        if outcome == Outcome::Silent {
            silent.push(case.name());
        }
    }
    println!("{}", markdown(&table));
    assert!(silent.is_empty(), "{silent:#?}");
}

fn markdown(table: &BTreeMap<(&str, &str), BTreeMap<Outcome, usize>>) -> String {
    let mut text = String::from(
        "| golden | one key at a time | obeyed | refused | named | harmless | none of these |\n|---|---|---|---|---|---|---|\n",
    );
    for ((golden, action), row) in table {
        let count = |outcome| row.get(&outcome).copied().unwrap_or(0);
        let counts = [
            Outcome::Obeyed,
            Outcome::Refused,
            Outcome::Named,
            Outcome::Harmless,
            Outcome::Silent,
        ]
        .map(|outcome| count(outcome).to_string());
        writeln!(text, "| {golden} | {action} | {} |", counts.join(" | ")).unwrap();
    }
    text
}

/// The cases are of every key of the goldens' configs: none was added to one and left out here.
#[test]
fn the_cases_have_every_key() {
    let reference = Reference::open();
    let cases = reference.cases.cases.iter();
    let known: BTreeSet<(&str, &str, &str)> = cases
        .filter_map(|case| Some((&*case.golden, &**case.path.first()?, &*case.action)))
        .collect();
    let goldens: BTreeSet<&str> = known.iter().map(|case| case.0).collect();
    assert_eq!(goldens.len(), 5);
    for golden in goldens {
        for file in ["config.json", "config_v5_style.json"] {
            for key in published(golden, file).as_object().unwrap().keys() {
                for action in ["drop", "rename"] {
                    assert!(known.contains(&(golden, key, action)), "{golden} {key}");
                }
            }
        }
    }
}

/// Biases as a function of their modules' names, as the script has them.
fn biases(golden: &str, modules: &[String]) -> Vec<checkpoint::Tensor> {
    let source = Folder::open(&goldens::path(golden)).unwrap();
    let of = |name: &str| {
        let module = name.strip_suffix(".weight")?;
        let kind = module.rsplit('.').next()?;
        modules.iter().any(|m| m == kind).then(|| {
            let seed: usize = name.bytes().map(usize::from).sum();
            let n = source.stored(name).unwrap().shape[0];
            let value = |i: usize| (((i * 37 + seed) % 41) as f32 - 20.0) / 80.0;
            let bytes: Vec<u8> = (0..n).flat_map(|i| value(i).to_le_bytes()).collect();
            let name = format!("{module}.bias");
            checkpoint::Tensor::new(&name, DType::F32, &[n], bytes.into()).unwrap()
        })
    };
    source.names().filter_map(of).collect()
}

/// The settings that no golden has compute what transformers computes, and come back from a GGUF, and from a folder made of
/// it, with the same results.
#[test]
fn variants_compute_as_the_reference_before_and_after_a_round_trip() {
    let reference = Reference::open();
    // A GGUF has no place for these.
    let lost = [
        "qwen2_distill yarn truncate",
        "qwen2_distill llama3",
        "deepseek_v3 attention_factor",
        "deepseek_v3 truncate",
        "deepseek_v3 half-split",
        "deepseek_v2_lite attention_factor",
    ];
    let (mut n, mut refused) = (0, Vec::new());
    for case in reference.cases.cases.iter().filter(|c| c.variant.is_some()) {
        n += 1;
        let extra = biases(&case.golden, &case.biases);
        let place = folder(&case.golden, &case.config(), &extra);
        let source = open(&place);
        let found = reference.found(&source).unwrap();
        let off = difference(&found, &reference.expected(case.logits.unwrap()));
        assert!(off <= TOLERANCE, "{}: {off}", case.name());
        let file = place.path().join("m.gguf");
        let mix = Mix::new(MixScheme::Plain(GgufType::F32), "").unwrap();
        if let Err(error) = write_gguf(&source, &mix, vec![], &file, &mut |_, _| {}) {
            let error = error.to_string();
            assert!(
                error.contains("a GGUF cannot describe"),
                "{}: {error}",
                case.name()
            );
            refused.push(case.name());
            continue;
        }
        let back = place.path().join("back");
        let gguf = Folder::open(&file).unwrap();
        convert(&gguf, WeightFormat::F32, &back, &mut |_, _| {}).unwrap();
        let back = Folder::open(&back).unwrap();
        assert_eq!(back.shards()[0].0, "model.safetensors");
        let class = back.config()["architectures"][0].as_str().unwrap();
        assert_eq!(source.config()["architectures"][0], class);
        for (folder, tolerance) in [(&gguf, 2e-5), (&back, 2e-5)] {
            let again = reference.found(folder).unwrap();
            let off = difference(&again, &found);
            assert!(off <= tolerance, "{}: {off}", case.name());
            assert!(load::unknown_keys(folder).unwrap().is_empty());
        }
    }
    assert!(n >= 25, "{n}");
    refused.sort_unstable();
    let mut lost = lost.map(String::from).to_vec();
    lost.sort_unstable();
    assert_eq!(refused, lost);
}

/// What llama.cpp computes otherwise is said.
#[test]
fn differences_of_llama_cpp_are_named() {
    let differences = |golden: &str, change: &dyn Fn(&mut Value)| {
        let mut config = published(golden, "config.json");
        change(&mut config);
        let config = ModelConfig::from_json(&config, Path::new("config.json")).unwrap();
        llama_cpp_differences(&config).join("; ")
    };
    assert_eq!(differences("deepseek_v3", &|_| {}), "");
    let betas = differences("deepseek_v3", &|c| {
        c["rope_scaling"]["beta_fast"] = json!(16)
    });
    assert!(betas.contains("`beta_fast` 16"), "{betas}");
    assert!(differences("deepseek_v2_group", &|_| {}).contains("two best scores"));
    assert!(differences("deepseek_v2_lite", &|_| {}).contains("26 or 27 layers, not 3"));
    let none = differences("deepseek_v2_lite", &|c| c["num_hidden_layers"] = json!(27));
    assert_eq!(none, "");
}

#[derive(Deserialize)]
struct PublishedConfig {
    like: Option<String>,
    config: serde_json::Map<String, Value>,
    #[serde(default)]
    unknown: Vec<String>,
    refused: Option<String>,
}

/// The configs of published models have no unknown key but those that are said, or are refused by the right key.
#[test]
fn published_configs_have_no_unknown_keys() {
    let text = std::fs::read_to_string(goldens::path("published_configs.json")).unwrap();
    let models: BTreeMap<String, PublishedConfig> = serde_json::from_str(&text).unwrap();
    assert!(models.len() > 25);
    for (name, model) in &models {
        let mut config = serde_json::Map::new();
        let mut lineage = vec![model];
        while let Some(like) = &lineage[lineage.len() - 1].like {
            lineage.push(&models[like]);
        }
        for model in lineage.into_iter().rev() {
            config.extend(model.config.clone());
        }
        let unknown = ModelConfig::unknown_keys(&Value::Object(config), Path::new("config.json"));
        match (&model.refused, unknown) {
            (None, Ok(unknown)) => {
                let unknown: Vec<String> = unknown.into_iter().map(|known| known.0).collect();
                assert_eq!(unknown, model.unknown, "{name}");
            }
            (Some(key), Err(error)) => {
                let error = error.to_string();
                assert!(error.contains(&format!("`{key}`")), "{name}: {error}");
            }
            (_, found) => panic!("{name}: {found:?}"),
        }
    }
}
