//! Merge loss: the share of an adapter's effect that survives when it is merged into quantized weights.
//!
//! No file is written: a model with fake-quantized weights computes the same as an export in that format, on the
//! quantized modules.

use std::collections::BTreeMap;

use data::Sample;
use model::{Model, Quantizer};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::logits::Logits;

/// The result for one format.
#[derive(Clone, Debug)]
pub struct Survived {
    /// The format.
    pub quantizer: Quantizer,
    /// Loss of the merged model, in nats per target.
    pub loss: f64,
    /// Share of the effect on the logits that survives.
    pub logits: f64,
    /// Number of matrices by format. It is another than the requested one if the blocks of that do not divide the rows.
    pub matrices: BTreeMap<String, usize>,
    /// The share that survives if only one module is quantized, by its path.
    pub modules: Vec<(String, f64)>,
}

/// The survival of an adapter's effect, by format.
///
/// The effect `e` on the logits is the difference between the model as the adapter was trained and its base; `d` is the
/// difference between the merged, quantized model and the model as trained. The share `1 − ‖d‖² / ‖e‖²` survives: 1 is
/// all, 0 is no better than the base, and less is worse. The norms are over all targets, of logits without their mean
/// over the vocabulary, which no probability depends on.
#[derive(Clone, Debug)]
pub struct SurvivalReport {
    /// The format that the adapter was trained to be merged into, if any.
    pub trained_for: Option<Quantizer>,
    /// Loss of the base.
    pub base_loss: f64,
    /// Loss of the base with the adapter, as trained.
    pub trained_loss: f64,
    /// Number of targets.
    pub targets: usize,
    /// One per format.
    pub formats: Vec<Survived>,
}

/// The models to compare.
#[derive(Debug)]
pub struct SurvivalModels<'a> {
    /// The base.
    pub base: &'a Model,
    /// The base with the adapter attached.
    pub adapted: &'a Model,
    /// The format that the adapter was trained to be merged into, if any.
    pub trained_for: Option<Quantizer>,
}

/// The formats to measure, and how.
#[derive(Clone, Debug)]
pub struct SurvivalConfig {
    /// The formats.
    pub quantizers: Vec<Quantizer>,
    /// Number of samples on which each module is measured alone; 0 turns this off.
    pub module_samples: usize,
}

/// Measures survival on samples. `progress` gets the number of passes done and their total.
///
/// # Errors
/// If there is no target, the adapter has no effect, or a loss is not finite.
pub fn survival(
    models: &SurvivalModels<'_>,
    samples: &[Sample],
    config: &SurvivalConfig,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<SurvivalReport> {
    let mut trained = models.adapted.clone();
    if let Some(quantizer) = models.trained_for {
        trained.fake_quantize(quantizer, &mut |_| true)?;
    }
    let mut variants = Vec::new();
    for quantizer in &config.quantizers {
        let mut paths = Vec::new();
        let mut whole = models.adapted.clone();
        let formats = whole.fake_quantize(*quantizer, &mut |path| {
            paths.push(path.to_owned());
            true
        })?;
        variants.push(Variant {
            formats,
            ..Variant::new(whole, None)
        });
        for path in paths.into_iter().filter(|_| config.module_samples > 0) {
            let mut one = trained.clone();
            one.fake_quantize(*quantizer, &mut |other| other == path)?;
            variants.push(Variant::new(one, Some(path)));
        }
    }
    let samples = samples.iter().filter(|sample| sample.trained_tokens() > 0);
    let samples: Vec<&Sample> = samples.collect();
    // Base, adapter and every format on every sample; every module on the first samples.
    let (n_formats, n_variants) = (config.quantizers.len(), variants.len());
    let n_modules = n_variants - n_formats;
    let passes = |n: usize| n * (2 + n_formats) + n.min(config.module_samples) * n_modules;
    let mut sums = SurvivalSums::default();
    for (number, sample) in samples.iter().enumerate() {
        let with_modules = number < config.module_samples;
        sums.add([models.base, &trained], sample, &mut variants, with_modules);
        let merged = variants.iter().map(|variant| variant.loss);
        let loss = sums.base_loss + sums.trained_loss + merged.sum::<f64>();
        if !loss.is_finite() {
            let sample = number;
            return Err(Error::NotFinite { sample, loss });
        }
        progress(passes(number + 1), passes(samples.len()));
    }
    sums.report(models.trained_for, &config.quantizers, variants)
}

/// A model with quantized weights, and its sums over samples.
struct Variant {
    model: Model,
    /// The only quantized module; none if all are.
    path: Option<String>,
    /// Number of matrices by format, if all are quantized.
    formats: BTreeMap<String, usize>,
    loss: f64,
    /// Sum of squared differences to the trained model.
    squared_deviation: f64,
    /// Sum of squares of the effect on the same targets.
    squared_effect: f64,
}

impl Variant {
    fn new(model: Model, path: Option<String>) -> Self {
        Self {
            model,
            path,
            formats: BTreeMap::new(),
            loss: 0.0,
            squared_deviation: 0.0,
            squared_effect: 0.0,
        }
    }

    fn survives(&self) -> f64 {
        1.0 - self.squared_deviation / self.squared_effect
    }
}

/// Sums over samples.
#[derive(Default)]
struct SurvivalSums {
    targets: usize,
    base_loss: f64,
    trained_loss: f64,
}

impl SurvivalSums {
    fn add(
        &mut self,
        [base, trained]: [&Model; 2],
        sample: &Sample,
        variants: &mut [Variant],
        with_modules: bool,
    ) {
        let before = Logits::of(base, sample);
        let after = Logits::of(trained, sample);
        self.targets += after.targets.len();
        self.base_loss += before.loss();
        self.trained_loss += after.loss();
        let effect = after.squares_from(&before);
        let is_measured = |variant: &&mut Variant| with_modules || variant.path.is_none();
        for variant in variants.iter_mut().filter(is_measured) {
            let merged = Logits::of(&variant.model, sample);
            variant.loss += merged.loss();
            variant.squared_deviation += merged.squares_from(&after);
            variant.squared_effect += effect;
        }
    }

    fn report(
        self,
        trained_for: Option<Quantizer>,
        quantizers: &[Quantizer],
        variants: Vec<Variant>,
    ) -> Result<SurvivalReport> {
        if self.targets == 0 {
            return Err(Error::Nothing { expected: "target" });
        }
        let n = self.targets as f64;
        let mut formats: Vec<Survived> = Vec::new();
        for variant in variants {
            if variant.squared_effect == 0.0 && variant.path.is_none() {
                return Err(Error::NoEffect);
            }
            match (&variant.path, formats.last_mut()) {
                (Some(path), Some(format)) => {
                    format.modules.push((path.clone(), variant.survives()));
                }
                _ => formats.push(Survived {
                    quantizer: quantizers[formats.len()],
                    loss: variant.loss / n,
                    logits: variant.survives(),
                    matrices: variant.formats,
                    modules: Vec::new(),
                }),
            }
        }
        Ok(SurvivalReport {
            trained_for,
            base_loss: self.base_loss / n,
            trained_loss: self.trained_loss / n,
            targets: self.targets,
            formats,
        })
    }
}

impl SurvivalReport {
    /// The share of the loss improvement that a format keeps, if there is an improvement.
    pub fn gain_kept(&self, format: &Survived) -> Option<f64> {
        let gain = self.base_loss - self.trained_loss;
        (gain > 0.0).then(|| (self.base_loss - format.loss) / gain)
    }

    /// A table by format: losses, shares kept, and the modules that keep least.
    pub fn to_text(&self) -> String {
        const SHOWN: usize = 3;
        let trained = match self.trained_for {
            Some(quantizer) => format!("base + adapter, trained for {quantizer}"),
            None => "base + adapter, unmerged".into(),
        };
        let width = trained.len();
        let with_modules = self.formats.iter().any(|format| !format.modules.is_empty());
        let modules = if with_modules {
            "  modules that keep least, alone"
        } else {
            ""
        };
        let mut text = format!(
            "{:width$}  loss    gain kept  effect on logits kept{modules}\n",
            ""
        );
        text += &format!("{:width$}  {:.4}\n", "base", self.base_loss);
        text += &format!("{trained:width$}  {:.4}\n", self.trained_loss);
        for format in &self.formats {
            let mut modules: Vec<_> = format.modules.iter().collect();
            modules.sort_by(|a, b| a.1.total_cmp(&b.1));
            let modules = modules.iter().take(SHOWN);
            let modules: Vec<String> = modules
                .map(|(path, kept)| format!("{} {:.1} %", short(path), 100.0 * kept))
                .collect();
            let gain = self.gain_kept(format);
            let gain = gain.map_or("no gain".into(), |kept| format!("{:.1} %", 100.0 * kept));
            let line = format!(
                "{:width$}  {:.4}  {gain:>9}  {:19.1} %  {}",
                format!("merged in {}", format.quantizer),
                format.loss,
                100.0 * format.logits,
                modules.join(", "),
            );
            text += line.trim_end();
            text += "\n";
        }
        text += &format!("over {} targets", self.targets);
        for format in self
            .formats
            .iter()
            .filter(|format| format.matrices.len() > 1)
        {
            let counts = format
                .matrices
                .iter()
                .map(|(name, n)| format!("{name} for {n}"));
            let counts: Vec<String> = counts.collect();
            let counts = counts.join(", ");
            text += &format!("\n{}, by number of matrices: {counts}", format.quantizer);
        }
        text
    }

    /// All numbers as JSON, with every module.
    pub fn to_json(&self) -> Value {
        let formats = self.formats.iter().map(|format| {
            let modules = format.modules.iter();
            let modules: serde_json::Map<String, Value> = modules
                .map(|(path, kept)| (path.clone(), (*kept).into()))
                .collect();
            json!({
                "format": format.quantizer.to_string(),
                "loss": format.loss,
                "gain_kept": self.gain_kept(format),
                "matrices": format.matrices,
                "logits_kept": format.logits,
                "modules_kept": modules,
            })
        });
        json!({
            "trained_for": self.trained_for.map(|quantizer| quantizer.to_string()),
            "base_loss": self.base_loss,
            "adapter_loss": self.trained_loss,
            "targets": self.targets,
            "formats": formats.collect::<Vec<_>>(),
        })
    }
}

/// A module's path without the common prefix.
fn short(path: &str) -> &str {
    path.strip_prefix("model.").unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_gain_and_of_the_effect() {
        let report = SurvivalReport {
            trained_for: None,
            base_loss: 3.0,
            trained_loss: 1.0,
            targets: 10,
            formats: vec![Survived {
                quantizer: "gguf:q4_0".parse().unwrap(),
                loss: 1.5,
                logits: 0.875,
                matrices: BTreeMap::from([("gguf:f16".to_owned(), 1), ("gguf:q4_0".to_owned(), 2)]),
                modules: vec![("model.a".into(), 0.5), ("model.b".into(), -0.25)],
            }],
        };
        assert_eq!(report.gain_kept(&report.formats[0]), Some(0.75));
        let no_gain = SurvivalReport {
            base_loss: 1.0,
            ..report.clone()
        };
        assert_eq!(no_gain.gain_kept(&report.formats[0]), None);
        assert!(no_gain.to_text().contains("no gain"));
        let text = report.to_text();
        let line = text.lines().find(|line| line.contains("q4_0")).unwrap();
        let expected = "merged in gguf:q4_0       1.5000     75.0 %                 87.5 %  b -25.0 %, a 50.0 %";
        assert_eq!(line, expected);
        let end = "gguf:q4_0, by number of matrices: gguf:f16 for 1, gguf:q4_0 for 2";
        assert!(text.ends_with(end), "{text}");
        assert_eq!(
            report.to_json()["formats"][0]["modules_kept"]["model.b"],
            -0.25
        );
    }
}
