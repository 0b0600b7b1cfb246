//! Training runs side by side: how far the loss of each is from the first one's, step by step.
//!
//! Losses of single steps are noise, so both are smoothed by the same exponential average before they are compared.

use serde_json::{Value, json};

use crate::{Error, Result};

/// What a training run left.
#[derive(Clone, Debug)]
pub struct Curve {
    /// What the run is called.
    pub name: String,
    /// Nats per trained token of every step.
    pub losses: Vec<f64>,
    /// Tokens per second over the run.
    pub tokens_per_second: f64,
    /// The most that waited for a backward pass, where that is known.
    pub saved_activation_bytes: Option<u64>,
    /// The most memory it held, where that is known.
    pub peak_bytes: Option<u64>,
}

/// How curves are compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurveConfig {
    /// Weight of a new step in the exponential average, above 0 and at most 1.
    pub smoothing: f64,
    /// Steps left out at the start.
    pub skip: usize,
}

/// A run beside the first.
#[derive(Clone, Debug)]
pub struct CurveErrors {
    /// The run.
    pub curve: Curve,
    /// Its last smoothed loss.
    pub last_loss: f64,
    /// Of the smoothed losses, `|this − first| / first`, for every step that counts.
    pub errors: Vec<f64>,
}

impl CurveErrors {
    /// The mean over the steps.
    pub fn mean(&self) -> f64 {
        self.errors.iter().sum::<f64>() / self.errors.len() as f64
    }

    /// The largest of them.
    pub fn worst(&self) -> f64 {
        self.errors.iter().copied().fold(0.0, f64::max)
    }
}

/// All runs compared with the first.
#[derive(Clone, Debug)]
pub struct CurveReport {
    /// The runs, the first with errors of 0.
    pub runs: Vec<CurveErrors>,
    /// How they were compared.
    pub config: CurveConfig,
}

impl CurveReport {
    /// Compares runs with the first, over the steps that all have.
    ///
    /// # Errors
    /// If no step is left to compare.
    pub fn new(curves: Vec<Curve>, config: CurveConfig) -> Result<Self> {
        let steps = curves.iter().map(|curve| curve.losses.len()).min();
        let steps = steps.unwrap_or(0);
        if steps <= config.skip {
            return Err(Error::TooShort {
                skip: config.skip,
                found: steps,
            });
        }
        let first = smoothed(&curves[0].losses, config.smoothing);
        let runs = curves.into_iter().map(|curve| {
            let losses = smoothed(&curve.losses, config.smoothing);
            let pairs = losses.iter().zip(&first).take(steps).skip(config.skip);
            let errors = pairs.map(|(loss, first)| (loss - first).abs() / first);
            CurveErrors {
                errors: errors.collect(),
                last_loss: losses[steps - 1],
                curve,
            }
        });
        Ok(Self {
            runs: runs.collect(),
            config,
        })
    }

    /// A table, and what its numbers mean.
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "{:20}  last loss  mean error  worst error  tokens/s  kept MiB  peak MiB",
            "run"
        );
        for run in &self.runs {
            let curve = &run.curve;
            let mib = |bytes: Option<u64>| bytes.map_or(String::new(), |b| (b >> 20).to_string());
            let [mean, worst] = [run.mean(), run.worst()].map(|e| format!("{:.3} %", 100.0 * e));
            text += &format!(
                "\n{:20}  {:9.4}  {mean:>10}  {worst:>11}  {:8.0}  {:>8}  {:>8}",
                curve.name,
                run.last_loss,
                curve.tokens_per_second,
                mib(curve.saved_activation_bytes),
                mib(curve.peak_bytes),
            );
        }
        text + &format!(
            "\n\nerrors: |loss − {first}'s| / {first}'s, both smoothed with weight {}, over {} steps after the first {}",
            self.config.smoothing,
            self.runs[0].errors.len(),
            self.config.skip,
            first = self.runs[0].curve.name,
        )
    }

    /// The same as JSON.
    pub fn to_json(&self) -> Value {
        let runs = self.runs.iter().map(|run| {
            json!({
                "name": run.curve.name,
                "last_loss": run.last_loss,
                "mean_error": run.mean(),
                "worst_error": run.worst(),
                "tokens_per_second": run.curve.tokens_per_second,
                "saved_activation_bytes": run.curve.saved_activation_bytes,
                "peak_bytes": run.curve.peak_bytes,
            })
        });
        json!({
            "runs": runs.collect::<Vec<_>>(),
            "compared_with": self.runs[0].curve.name,
            "smoothing": self.config.smoothing,
            "skipped_steps": self.config.skip,
            "steps": self.runs[0].errors.len(),
        })
    }
}

/// The exponential average of a series, as far as it got at each step.
fn smoothed(values: &[f64], weight: f64) -> Vec<f64> {
    let mut average = values.first().copied().unwrap_or(0.0);
    let step = |value: &f64| {
        average += weight * (value - average);
        average
    };
    values.iter().map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(name: &str, losses: &[f64]) -> Curve {
        Curve {
            name: name.into(),
            losses: losses.into(),
            tokens_per_second: 100.0,
            saved_activation_bytes: Some(2 << 20),
            peak_bytes: Some(3 << 20),
        }
    }

    #[test]
    fn errors_are_of_smoothed_losses_after_the_steps_left_out() {
        let config = CurveConfig {
            smoothing: 0.5,
            skip: 1,
        };
        let runs = vec![
            curve("a", &[4.0, 2.0, 2.0]),
            curve("b", &[4.0, 3.0, 1.0, 9.0]),
        ];
        let report = CurveReport::new(runs, config).unwrap();
        // Smoothed: 4, 3, 2.5 and 4, 3.5, 2.25; the step that only one has is left out.
        let expected = [0.5 / 3.0, 0.25 / 2.5];
        let run = &report.runs[1];
        assert_eq!((run.errors.len(), run.last_loss), (2, 2.25));
        let close = |(a, b): (&f64, f64)| (a - b).abs() < 1e-12;
        assert!(run.errors.iter().zip(expected).all(close));
        assert!((run.worst() - 0.5 / 3.0).abs() < 1e-12);
        assert!((run.mean() - (0.5 / 3.0 + 0.1) / 2.0).abs() < 1e-12);
        let line = "b                        2.2500    13.333 %     16.667 %       100         2         3";
        assert!(report.to_text().contains(line), "{}", report.to_text());
        assert_eq!(report.to_json()["runs"][1]["peak_bytes"], 3 << 20);
    }

    #[test]
    fn runs_no_longer_than_what_is_left_out_are_refused() {
        let config = CurveConfig {
            smoothing: 0.5,
            skip: 1,
        };
        let error = CurveReport::new(vec![curve("a", &[4.0])], config).unwrap_err();
        assert_eq!(
            error.to_string(),
            "expected runs of more than the 1 steps that are left out, found 1"
        );
    }
}
