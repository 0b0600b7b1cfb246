//! PEFT's `adapter_config.json`: the base of a LoRA adapter, its modules, and its scale.
//!
//! The file has some fifty settings, and a new PEFT adds more. Ignoring a setting would silently make a wrong model, so every
//! setting is refused by name unless it is understood here or has no effect on the result. The caller, who knows the model's
//! modules, matches the patterns.
//!
//! Source: huggingface/peft: src/peft/tuners/lora/config.py, `LoraConfig`.

use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::error::shown;
use crate::json::{self, CONFIG_LIMIT};
use crate::{Error, OrderedMap, Result};

/// The settings of a LoRA adapter, under PEFT's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    /// Always `LORA`.
    pub peft_type: String,
    /// The task of the model, `CAUSAL_LM` here.
    #[serde(default)]
    pub task_type: Option<String>,
    /// The base model's folder or name, as the author wrote it.
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    /// The base's revision on the Hub, if it is not the main one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The rank of modules that `rank_pattern` does not match.
    pub r: usize,
    /// The numerator of the scaling, for modules that `alpha_pattern` does not match.
    #[serde(serialize_with = "serialize_number")]
    pub lora_alpha: f64,
    /// Dropout on the adapter's input while training.
    #[serde(default)]
    pub lora_dropout: f64,
    /// Whether the scaling is `lora_alpha / √r` instead of `lora_alpha / r`.
    #[serde(default)]
    pub use_rslora: bool,
    /// Whether the lengths of the updated weights' rows are trained too.
    #[serde(default)]
    pub use_dora: bool,
    /// Regex on a module's name to its rank. The first match in order counts.
    #[serde(default)]
    pub rank_pattern: OrderedMap<usize>,
    /// Regex on a module's name to its alpha. The first match in order counts.
    #[serde(default, serialize_with = "serialize_numbers")]
    pub alpha_pattern: OrderedMap<f64>,
    /// The adapted modules.
    #[serde(default)]
    pub target_modules: Option<TargetModules>,
    /// The adapted parameters that are not modules' weights: stacked experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_parameters: Option<Vec<String>>,
    /// Modules left out although `target_modules` matches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// The adapted layers, if not all. A file may give a single number.
    #[serde(default, deserialize_with = "deserialize_layers")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Which biases are trained: always `none`.
    pub bias: String,
    /// Whether the base's weights are `[in, out]`: always false.
    pub fan_in_fan_out: bool,
    /// Modules that are trained and stored whole, by the last parts of their names.
    #[serde(default)]
    pub modules_to_save: Option<Vec<String>>,
    /// The tokens whose rows of the embedding are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trainable_token_indices: Option<TrainableTokens>,
    /// The initialization of the adapter: a bool or a name. Only those that do not change the base are accepted.
    #[serde(default)]
    pub init_lora_weights: Value,
    /// Whether PEFT loads the adapter frozen.
    #[serde(default)]
    pub inference_mode: bool,
}

/// Names of modules.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// The last parts of module names.
    List(Vec<String>),
    /// A regex on whole module names, or `all-linear`.
    Regex(String),
}

/// Tokens whose rows are trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TrainableTokens {
    /// Of the embedding.
    OfEmbedding(Vec<usize>),
    /// Of modules, by the last parts of their names.
    ByModule(OrderedMap<Vec<usize>>),
}

impl AdapterConfig {
    /// A plain LoRA adapter of this rank and alpha that targets nothing yet.
    pub fn new(r: usize, lora_alpha: f64) -> Self {
        Self {
            peft_type: "LORA".to_owned(),
            task_type: Some("CAUSAL_LM".to_owned()),
            base_model_name_or_path: None,
            revision: None,
            r,
            lora_alpha,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            rank_pattern: OrderedMap::default(),
            alpha_pattern: OrderedMap::default(),
            target_modules: None,
            target_parameters: None,
            exclude_modules: None,
            layers_to_transform: None,
            bias: "none".to_owned(),
            fan_in_fan_out: false,
            modules_to_save: None,
            trainable_token_indices: None,
            init_lora_weights: Value::Bool(true),
            inference_mode: true,
        }
    }

    /// Reads and checks an `adapter_config.json`.
    ///
    /// # Errors
    /// If the file is malformed, a value is out of range, or a setting is unsupported.
    pub fn open(path: &Path) -> Result<Self> {
        let text = json::read_object(path, CONFIG_LIMIT)?;
        let settings: OrderedMap<Value> = json::parse(path, &text)?;
        check_settings(path, &settings)?;
        // Old files lack settings that are always the same; everything was checked above.
        let mut settings: serde_json::Map<String, Value> = settings.0.into_iter().collect();
        for (key, value) in [
            ("bias", Value::from("none")),
            ("fan_in_fan_out", Value::from(false)),
        ] {
            settings.insert(key.to_owned(), value);
        }
        settings.retain(|_, value| !value.is_null());
        let config: Self = match serde_json::from_value(settings.clone().into()) {
            Ok(config) => config,
            Err(cause) => return Err(mistyped(path, &settings, cause)),
        };
        config.check_ranges(path)?;
        Ok(config)
    }

    /// The file's content, checked as [`open`](Self::open) checks it. `path` is named in errors.
    ///
    /// # Errors
    /// If a value is out of range or unsupported.
    pub(crate) fn to_json(&self, path: &Path) -> Result<Value> {
        let to_error = |cause| Error::Json {
            path: path.to_owned(),
            cause,
        };
        let value = serde_json::to_value(self).map_err(to_error)?;
        let entries = value.as_object().into_iter().flatten();
        let settings = entries
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        check_settings(path, &settings)?;
        self.check_ranges(path)?;
        Ok(value)
    }

    fn check_ranges(&self, path: &Path) -> Result<()> {
        let refuse = |key: &str, expected, found: String| {
            Err(Error::UnsupportedSetting {
                file: path.to_owned(),
                key: key.to_owned(),
                expected,
                found,
            })
        };
        if self.r == 0 {
            return refuse("r", "a rank of at least 1", self.r.to_string());
        }
        if let Some((pattern, r)) = self.rank_pattern.iter().find(|(_, r)| **r == 0) {
            let found = format!("{r} for `{}`", shown(pattern));
            return refuse("rank_pattern", "ranks of at least 1", found);
        }
        if !self.lora_alpha.is_finite() {
            return refuse("lora_alpha", "a finite number", self.lora_alpha.to_string());
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            let found = self.lora_dropout.to_string();
            return refuse("lora_dropout", "a number from 0 to below 1", found);
        }
        Ok(())
    }
}

/// Settings that are read, or that do not change the values of a trained adapter.
const ACCEPTED: [&str; 25] = [
    "task_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
    "trainable_token_indices",
    "inference_mode",
    // The following have no effect.
    "auto_mapping",
    "eva_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    // Meaningless without `init_lora_weights` to match, which is checked.
    "corda_config",
    "loftq_config",
];

/// Initializations that leave the base's weights as published. The others (PiSSA, OLoRA, CorDA,
/// LoftQ, LoRA-GA) subtract something from them, so the adapter fits no published base.
const INITIALIZATIONS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Refuses every setting that would change the result and is not understood.
fn check_settings(path: &Path, settings: &OrderedMap<Value>) -> Result<()> {
    let refuse = |key: &str, expected, value: &Value| {
        Err(Error::UnsupportedSetting {
            file: path.to_owned(),
            key: shown(key),
            expected,
            found: shown(&value.to_string()),
        })
    };
    // First, because the settings of other methods say less than their name.
    let peft_type = settings.iter().find(|(key, _)| *key == "peft_type");
    let peft_type = peft_type.map_or(&Value::Null, |(_, value)| value);
    if peft_type != "LORA" {
        return refuse("peft_type", "\"LORA\"", peft_type);
    }
    for (key, value) in settings.iter() {
        let (is_good, expected) = match key {
            "peft_type" => continue,
            "bias" => (is_unset(value) || value == "none", "\"none\""),
            "init_lora_weights" => (
                value.is_null()
                    || value.is_boolean()
                    || value
                        .as_str()
                        .is_some_and(|name| INITIALIZATIONS.contains(&name)),
                "true, false, \"gaussian\", \"eva\" or \"orthogonal\"",
            ),
            _ if ACCEPTED.contains(&key) => continue,
            _ => (is_unset(value), "null, false or empty"),
        };
        if !is_good {
            return refuse(key, expected, value);
        }
    }
    Ok(())
}

/// The error of settings that are none of PEFT's, with the one at fault: what is read into a struct has no names any more.
fn mistyped(
    path: &Path,
    settings: &serde_json::Map<String, Value>,
    cause: serde_json::Error,
) -> Error {
    let stands_alone = |(key, value): &(&String, &Value)| {
        let others = serde_json::to_value(AdapterConfig::new(1, 1.0));
        let mut alone = others.unwrap_or_default();
        alone[key.as_str()] = (*value).clone();
        serde_json::from_value::<AdapterConfig>(alone).is_err()
    };
    match settings.iter().find(stands_alone) {
        Some((key, value)) => Error::UnsupportedSetting {
            file: path.to_owned(),
            key: shown(key),
            expected: "a value of the type that PEFT writes",
            found: shown(&value.to_string()),
        },
        None => Error::Json {
            path: path.to_owned(),
            cause,
        },
    }
}

/// Whether a setting has an empty value.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) | Value::Number(_) => false,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(entries) => entries.is_empty(),
    }
}

/// Writes a whole number without a point, as PEFT does: its own readers expect integers.
fn serialize_number<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    number(*value).serialize(serializer)
}

fn serialize_numbers<S: Serializer>(
    values: &OrderedMap<f64>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(values.iter().map(|(key, value)| (key, number(*value))))
}

fn number(value: f64) -> Value {
    const EXACT: f64 = (1u64 << 53) as f64;
    if value.fract() == 0.0 && value.abs() < EXACT {
        Value::from(value as i64)
    } else {
        Value::from(value)
    }
}

fn deserialize_layers<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<usize>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Layers {
        One(usize),
        Many(Vec<usize>),
    }

    Ok(match Option::deserialize(deserializer)? {
        Some(Layers::One(layer)) => Some(vec![layer]),
        Some(Layers::Many(layers)) => Some(layers),
        None => None,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn read(text: &str) -> Result<AdapterConfig> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapter_config.json");
        fs::write(&path, text).unwrap();
        AdapterConfig::open(&path)
    }

    /// Reads a configuration with these settings and the required ones.
    fn read_with(settings: &str) -> Result<AdapterConfig> {
        read(&format!(
            r#"{{"peft_type": "LORA", "r": 4, "lora_alpha": 8, {settings}}}"#
        ))
    }

    #[test]
    fn settings_that_matter_are_read() {
        let config = read_with(
            r#""revision": "v2", "use_rslora": true, "use_dora": true, "lora_dropout": 0.1, "target_modules": "all-linear",
               "rank_pattern": {"z.*": 2, "a": 1}, "alpha_pattern": {"a": 0.5},
               "target_parameters": ["mlp.experts.down_proj"], "exclude_modules": ["q_proj"],
               "layers_to_transform": 3, "init_lora_weights": "gaussian", "inference_mode": null,
               "modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [7, 3]}"#,
        );
        let expected = AdapterConfig {
            task_type: None,
            revision: Some("v2".into()),
            use_rslora: true,
            use_dora: true,
            lora_dropout: 0.1,
            target_modules: Some(TargetModules::Regex("all-linear".into())),
            rank_pattern: OrderedMap(vec![("z.*".into(), 2), ("a".into(), 1)]),
            alpha_pattern: OrderedMap(vec![("a".into(), 0.5)]),
            target_parameters: Some(vec!["mlp.experts.down_proj".into()]),
            exclude_modules: Some(TargetModules::List(vec!["q_proj".into()])),
            layers_to_transform: Some(vec![3]),
            modules_to_save: Some(vec!["lm_head".into()]),
            trainable_token_indices: Some(TrainableTokens::ByModule(OrderedMap(vec![(
                "embed_tokens".into(),
                vec![7, 3],
            )]))),
            init_lora_weights: "gaussian".into(),
            inference_mode: false,
            ..AdapterConfig::new(4, 8.0)
        };
        assert_eq!(config.unwrap(), expected);
    }

    /// Setting, its name, and how a message shows its value.
    const REFUSED: &[(&str, &str, &str)] = &[
        (r#""use_qalora": true"#, "use_qalora", "true"),
        (r#""lora_bias": true"#, "lora_bias", "true"),
        (r#""fan_in_fan_out": true"#, "fan_in_fan_out", "true"),
        (r#""bias": "all""#, "bias", r#""all""#),
        (
            r#""layer_replication": [[0, 4]]"#,
            "layer_replication",
            "[[0,4]]",
        ),
        (r#""layers_pattern": "h""#, "layers_pattern", r#""h""#),
        (
            r#""alora_invocation_tokens": [1, 2]"#,
            "alora_invocation_tokens",
            "[1,2]",
        ),
        (
            r#""megatron_config": {"a": 1}"#,
            "megatron_config",
            r#"{"a":1}"#,
        ),
        (r#""arrow_config": {"a": 1}"#, "arrow_config", r#"{"a":1}"#),
        (
            r#""init_lora_weights": "pissa_niter_16""#,
            "init_lora_weights",
            r#""pissa_niter_16""#,
        ),
        (
            r#""init_lora_weights": "loftq""#,
            "init_lora_weights",
            r#""loftq""#,
        ),
        (r#""not_yet_invented": 7"#, "not_yet_invented", "7"),
        (r#""rank_pattern": {"q": 0}"#, "rank_pattern", "0 for `q`"),
        (r#""lora_dropout": 1.0"#, "lora_dropout", "1"),
    ];

    #[test]
    fn settings_that_would_change_the_result_are_refused_by_name_and_value() {
        for (settings, key, found) in REFUSED {
            let error = read_with(settings).unwrap_err().to_string();
            assert!(
                error.contains(&format!("unsupported `{key}`: expected ")),
                "{error}"
            );
            assert!(error.ends_with(&format!(", found {found}")), "{error}");
        }
        let dora = read(r#"{"peft_type": "LOHA", "use_dora": true}"#)
            .unwrap_err()
            .to_string();
        assert!(
            dora.contains("unsupported `peft_type`: expected \"LORA\", found "),
            "{dora}"
        );
        assert!(read("{}").unwrap_err().to_string().ends_with("found null"));
    }

    #[test]
    fn settings_without_effect_are_passed_over() {
        read_with(
            r#""use_dora": false, "modules_to_save": [], "bias": "none", "loftq_config": {},
               "peft_version": "0.99", "megatron_core": "megatron.core",
               "not_yet_invented": null, "auto_mapping": {"base_model_class": "X"},
               "runtime_config": {"ephemeral_gpu_offload": false}, "qalora_group_size": 16"#,
        )
        .unwrap();
    }

    #[test]
    fn malformed_settings_are_refused() {
        for (text, expected) in [
            (
                r#"{"peft_type": "LORA", "lora_alpha": 8}"#,
                "missing field `r`",
            ),
            (
                r#"{"peft_type": "LORA", "r": -1, "lora_alpha": 8}"#,
                "unsupported `r`: expected a value of the type that PEFT writes, found -1",
            ),
            (
                r#"{"peft_type": "LORA", "r": 0, "lora_alpha": 8}"#,
                "expected a rank of at least 1, found 0",
            ),
            (
                r#"{"peft_type": "LORA", "r": 1, "r": 2, "lora_alpha": 8}"#,
                "key `r` appears twice",
            ),
            ("[]", "expected a JSON object"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(
                error.contains(expected),
                "expected {expected:?} in {error:?}"
            );
        }
    }

    #[test]
    fn what_is_written_is_what_peft_writes_and_reads_back_equal() {
        let mut config = AdapterConfig::new(4, 8.0);
        config.alpha_pattern = OrderedMap(vec![("b".into(), 2.0), ("a".into(), 0.5)]);
        config.layers_to_transform = Some(vec![0, 2]);
        let value = config.to_json(Path::new("x")).unwrap();
        assert_eq!(value["lora_alpha"].to_string(), "8");
        assert_eq!(value["alpha_pattern"].to_string(), r#"{"b":2,"a":0.5}"#);
        assert_eq!(
            value.get("target_parameters"),
            None,
            "an older PEFT would not know it"
        );
        assert_eq!(read(&value.to_string()).unwrap(), config);

        config.lora_alpha = f64::NAN;
        let error = config.to_json(Path::new("x")).unwrap_err().to_string();
        assert_eq!(
            error,
            "`x`: unsupported `lora_alpha`: expected a finite number, found NaN"
        );
    }
}
