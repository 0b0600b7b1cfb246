//! mlx-lm's `adapter_config.json`.
//!
//! Its `scale` is the multiplier of the update itself; PEFT's is `alpha / rank`.
//!
//! Source: ml-explore/mlx-lm: mlx_lm/tuner/utils.py, `load_adapters`.

use std::path::Path;

use serde::Deserialize;

use crate::json::{CONFIG_LIMIT, parse, read_object};
use crate::{AdapterConfig, Error, Result, error::shown};

#[derive(Debug, Deserialize)]
struct MlxConfig {
    #[serde(default = "lora")]
    fine_tune_type: String,
    lora_parameters: MlxLoraParameters,
}

#[derive(Debug, Deserialize)]
struct MlxLoraParameters {
    rank: usize,
    scale: f64,
    #[serde(default)]
    dropout: f64,
}

fn lora() -> String {
    "lora".to_owned()
}

/// Reads the file as PEFT's settings for the same update.
///
/// # Errors
/// If the file is malformed, a value is out of range, or the folder has no low-rank update.
pub(crate) fn read_config(path: &Path) -> Result<AdapterConfig> {
    let text = read_object(path, CONFIG_LIMIT)?;
    let settings: MlxConfig = parse(path, &text)?;
    let refuse = |key: &str, expected, found: String| {
        Err(Error::UnsupportedSetting {
            file: path.to_owned(),
            key: key.to_owned(),
            expected,
            found,
        })
    };
    let use_dora = match settings.fine_tune_type.as_str() {
        "lora" => false,
        "dora" => true,
        other => return refuse("fine_tune_type", "\"lora\" or \"dora\"", shown(other)),
    };
    let MlxLoraParameters {
        rank,
        scale,
        dropout,
    } = settings.lora_parameters;
    if !scale.is_finite() {
        return refuse(
            "lora_parameters.scale",
            "a finite number",
            scale.to_string(),
        );
    }
    let config = AdapterConfig {
        lora_dropout: dropout,
        use_dora,
        ..AdapterConfig::new(rank, scale * rank as f64)
    };
    // The rest is checked like a file of PEFT's own.
    config.to_json(path)?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<AdapterConfig> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapter_config.json");
        std::fs::write(&path, text).unwrap();
        read_config(&path)
    }

    #[test]
    fn the_scale_is_the_multiplier_itself() {
        let text = r#"{"fine_tune_type": "dora", "num_layers": 16,
            "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.1, "keys": ["a"]}}"#;
        let config = read(text).unwrap();
        assert_eq!((config.r, config.lora_alpha), (8, 160.0));
        assert_eq!((config.use_dora, config.lora_dropout), (true, 0.1));
    }

    #[test]
    fn what_is_no_low_rank_update_is_refused() {
        for (text, expected) in [
            (
                r#"{"fine_tune_type": "full", "lora_parameters": {"rank": 8, "scale": 20.0}}"#,
                "unsupported `fine_tune_type`: expected \"lora\" or \"dora\", found full",
            ),
            (
                r#"{"lora_parameters": {"rank": 0, "scale": 20.0}}"#,
                "expected a rank of at least 1, found 0",
            ),
            (
                r#"{"lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 1.0}}"#,
                "expected a number from 0 to below 1",
            ),
            (
                r#"{"lora_parameters": {"rank": 8}}"#,
                "missing field `scale`",
            ),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
