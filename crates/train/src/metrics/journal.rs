//! Everything a run logs: `metrics.jsonl`, and event files for TensorBoard.
//!
//! Tags are those the field uses: `train/loss`, `eval/loss`, `perf/tokens_per_sec`, `moe/layer_03/load`.

#[cfg(test)]
mod tensorboard;

use serde::{Serialize, Serializer};
use serde_json::json;

use super::Metrics;
use super::event_file::{EventFile, Value};
use crate::Result;
use crate::dpo::Rewards;
use crate::fit::{LayerDrift, LayerLoad, Sample, StepReport};
use crate::run_dir::RunDir;

/// The metrics of a run in both forms.
#[derive(Debug)]
pub(crate) struct Journal {
    metrics: Metrics,
    events: EventFile,
}

/// What a validation pass found.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Validation {
    /// Mean nats per trained token, or per pair.
    pub(crate) valid_loss: f64,
    /// Means over the pairs, if preferences are learned.
    #[serde(flatten, serialize_with = "as_valid")]
    pub(crate) rewards: Option<Rewards>,
    /// How far the expert picks are from the reference's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) routing_drift: Vec<LayerDrift>,
}

impl Journal {
    /// Of a run that goes on after a step, or from its beginning. What will be written again is cut off.
    ///
    /// # Errors
    /// If a file cannot be written, or a line that should stay is malformed.
    pub(crate) fn open(run: &RunDir, last_step: Option<u64>) -> Result<Self> {
        Ok(Self {
            metrics: run.metrics(last_step)?,
            events: EventFile::open(run.path(), last_step)?,
        })
    }

    /// A step, and what the experts got since the last one that was written.
    pub(crate) fn step(
        &mut self,
        report: &StepReport,
        loads: &[LayerLoad],
        peak_bytes: Option<u64>,
    ) -> Result<()> {
        let step = report.step;
        self.metrics.append(step, report)?;
        let mut values = vec![
            scalar("train/loss", report.loss),
            scalar("train/learning_rate", report.learning_rate),
            scalar("train/grad_norm", report.grad_norm),
            scalar(
                "perf/tokens_per_sec",
                report.tokens as f64 / report.seconds.max(1e-9),
            ),
        ];
        values.extend(
            report
                .balance_loss
                .map(|loss| scalar("train/balance_loss", loss)),
        );
        values.extend(
            report
                .loss_scale
                .map(|scale| scalar("train/loss_scale", scale)),
        );
        values.extend(report.rewards.iter().flat_map(|r| of_rewards("train", r)));
        values.extend(peak_bytes.map(|bytes| scalar("memory/peak_bytes", bytes as f64)));
        if !loads.is_empty() {
            self.metrics.append(step, &json!({ "experts": loads }))?;
        }
        for layer in loads {
            let tag = |name| of_layer(layer.layer, name);
            values.push((tag("load"), Value::Histogram(layer.load.clone())));
            values.push((tag("load_entropy"), Value::Scalar(layer.entropy)));
            values.push((tag("dead_experts"), Value::Scalar(layer.dead as f64)));
        }
        self.events.append(step, &values)
    }

    /// A validation pass after a step.
    pub(crate) fn validation(&mut self, step: u64, found: &Validation) -> Result<()> {
        self.metrics.append(step, found)?;
        let mut values = vec![scalar("eval/loss", found.valid_loss)];
        values.extend(found.rewards.iter().flat_map(|r| of_rewards("eval", r)));
        for layer in &found.routing_drift {
            values.push((
                of_layer(layer.layer, "routing_drift"),
                Value::Scalar(layer.drift),
            ));
        }
        self.events.append(step, &values)
    }

    /// A return to an earlier step, written with the first step after it.
    pub(crate) fn rollback(
        &mut self,
        step: u64,
        from_step: u64,
        [loss, smoothed_loss]: [f64; 2],
        skipped_batches: &[[u64; 2]],
    ) -> Result<()> {
        let line = json!({"rolled_back": {
            "from_step": from_step,
            "loss": loss,
            "smoothed_loss": smoothed_loss,
            "skipped_batches": skipped_batches,
        }});
        self.metrics.append(step, &line)?;
        let n_rollbacks = skipped_batches.len() as f64;
        self.events
            .append(step, &[scalar("train/rollbacks", n_rollbacks)])
    }

    /// What the model writes after some prompts, after a step.
    pub(crate) fn samples(&mut self, step: u64, samples: &[Sample]) -> Result<()> {
        self.metrics.append(step, &json!({ "samples": samples }))?;
        let text = |(i, sample): (usize, &Sample)| {
            // Indented, so that Markdown shows it as it is.
            let lines = |text: &str| text.replace('\n', "\n    ");
            let text = format!(
                "    {}\n\n    {}",
                lines(&sample.prompt),
                lines(&sample.text)
            );
            (format!("samples/{i}"), Value::Text(text))
        };
        let values: Vec<_> = samples.iter().enumerate().map(text).collect();
        self.events.append(step, &values)
    }
}

fn scalar(tag: &str, value: f64) -> (String, Value) {
    (tag.to_owned(), Value::Scalar(value))
}

/// With two digits, so that layers sort.
fn of_layer(layer: usize, name: &str) -> String {
    format!("moe/layer_{layer:02}/{name}")
}

/// What answers earn, under TRL's names.
fn of_rewards(split: &str, rewards: &Rewards) -> [(String, Value); 4] {
    rewards
        .named()
        .map(|(name, value)| scalar(&format!("{split}/{name}"), value))
}

/// The rewards of the validation split in a line of metrics, beside those of the training rows.
fn as_valid<S: Serializer>(
    rewards: &Option<Rewards>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    let named = rewards.iter().flat_map(Rewards::named);
    serializer.collect_map(named.map(|(name, value)| (format!("valid_{name}"), value)))
}
