//! How tokens are chosen: what the command line says, else what the model's publisher recommends.

use anyhow::Context;
use checkpoint::Folder;
use data::Tokenizer;
use infer::SampleConfig;
use serde_json::Value;

use crate::open::Opened;

/// How each token is chosen, and what ends a text.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SamplingArgs {
    /// Divides the logits; 0 always takes the likeliest token. Default: generation_config.json's if it samples, else 0.
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// How many of the likeliest tokens to draw from, 0 for all. Default: generation_config.json's if it samples, else 0.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Mass of the likeliest tokens to draw from. Default: generation_config.json's if it samples, else 1.
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Draw from tokens at least so many times as likely as the likeliest. Default: generation_config.json's if it samples,
    /// else 0.
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Makes tokens less likely that the text or the prompt already has; 1 for no difference. Default:
    /// generation_config.json's, else 1.
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,
    /// How many of the last tokens the penalty looks at, 0 for all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    repetition_window: usize,
    /// Where the random numbers start.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// End the text before this string. May be repeated.
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Go on after tokens that end a text.
    #[arg(long)]
    ignore_eos: bool,
}

impl SamplingArgs {
    /// What is said, and for the rest what the model's `generation_config.json` says.
    ///
    /// # Errors
    /// If the file says something that is no number of the kind.
    pub(crate) fn config(&self, folder: &Folder) -> anyhow::Result<SampleConfig> {
        let published = recommended(folder.generation_config());
        let published = published.with_context(|| {
            let file = folder.path().join("generation_config.json");
            file.display().to_string()
        })?;
        Ok(SampleConfig {
            temperature: self.temperature.unwrap_or(published.temperature),
            top_k: self.top_k.unwrap_or(published.top_k),
            top_p: self.top_p.unwrap_or(published.top_p),
            min_p: self.min_p.unwrap_or(published.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(published.repetition_penalty),
            repetition_window: self.repetition_window,
            seed: self.seed,
        })
    }

    /// Tokens that end a text.
    ///
    /// # Errors
    /// If a file of the model says something that is no token of it.
    pub(crate) fn stop_ids(&self, opened: &Opened) -> anyhow::Result<Vec<u32>> {
        if self.ignore_eos {
            return Ok(vec![]);
        }
        let eos = opened.tokenizer.as_ref().and_then(Tokenizer::eos_id);
        Ok(infer::end_of_text_ids(&opened.folder, eos)?)
    }
}

/// What a model's publisher recommends. Without a word of sampling, the likeliest token.
fn recommended(config: Option<&Value>) -> anyhow::Result<SampleConfig> {
    let greedy = SampleConfig::greedy();
    let Some(config) = config else {
        return Ok(greedy);
    };
    let known = |key: &str| config.get(key).filter(|value| !value.is_null());
    let number = |key: &str, absent: f32| {
        let Some(value) = known(key) else {
            return Ok(absent);
        };
        let number = value.as_f64().map(|number| number as f32);
        number.with_context(|| format!("`{key}`: expected a number, found {value}"))
    };
    let penalty = SampleConfig {
        repetition_penalty: number("repetition_penalty", 1.0)?,
        ..greedy
    };
    if known("do_sample").and_then(Value::as_bool) != Some(true) {
        return Ok(penalty);
    }
    let top_k = match known("top_k") {
        None => 0,
        Some(value) => value
            .as_u64()
            .and_then(|top_k| usize::try_from(top_k).ok())
            .with_context(|| format!("`top_k`: expected a number from 0 up, found {value}"))?,
    };
    Ok(SampleConfig {
        // Absent ones are 1 in Hugging Face's tools.
        temperature: number("temperature", 1.0)?,
        top_p: number("top_p", 1.0)?,
        min_p: number("min_p", 0.0)?,
        top_k,
        ..penalty
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sampling_is_what_the_publisher_recommends() {
        let greedy = SampleConfig::greedy();
        let check = |config: Value, expected: SampleConfig| {
            assert_eq!(recommended(Some(&config)).unwrap(), expected, "{config}");
        };
        let all = json!({
            "do_sample": true, "temperature": 0.5, "top_p": 0.75, "top_k": 20, "min_p": 0.25,
            "repetition_penalty": 1.5,
        });
        let expected = SampleConfig {
            temperature: 0.5,
            top_p: 0.75,
            top_k: 20,
            min_p: 0.25,
            repetition_penalty: 1.5,
            ..greedy
        };
        check(all, expected);
        let plain = SampleConfig {
            temperature: 1.0,
            ..greedy
        };
        check(json!({"do_sample": true}), plain);
        check(json!({"do_sample": true, "top_k": null}), plain);
        check(json!({"do_sample": false, "temperature": 0.5}), greedy);
        check(json!({"temperature": 0.5}), greedy);
        let penalized = SampleConfig {
            repetition_penalty: 1.25,
            ..greedy
        };
        check(json!({"repetition_penalty": 1.25, "top_k": 3}), penalized);
        assert_eq!(recommended(None).unwrap(), greedy);
        for (config, expected) in [
            (
                json!({"do_sample": true, "top_p": "all"}),
                "`top_p`: expected a number",
            ),
            (
                json!({"do_sample": true, "top_k": -1}),
                "`top_k`: expected a number from 0 up, found -1",
            ),
        ] {
            let problem = recommended(Some(&config)).unwrap_err().to_string();
            assert!(problem.contains(expected), "{problem}");
        }
    }
}
