//! The metrics of a run: `metrics.jsonl`, and event files for TensorBoard.
//!
//! Tags are those the field uses: `train/loss`, `eval/loss`, `perf/tokens_per_sec`, `moe/layer_03/load`.

#[cfg(test)]
mod tensorboard;

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Serialize, Serializer};
use serde_json::json;

use super::event_file::{EventFile, EventValue};
use super::{LastLine, METRICS_NAME, Metrics};
use crate::Result;
use crate::dpo::Rewards;
use crate::events::{Memory, SampledText, StepReport, TaskScore};
use crate::recipe::forecast::{PROGRAM_MAPPED, TrainingPlan};
use crate::routing::{LayerDrift, LayerLoad};

/// The metrics of a run in both forms.
#[derive(Debug)]
pub(crate) struct Journal {
    metrics: Metrics,
    events: EventFile,
}

/// The results of a validation pass.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Validation {
    /// Mean nats per trained token, or per pair.
    pub(crate) valid_loss: f64,
    /// Means over the pairs, if preferences are learned.
    #[serde(flatten, serialize_with = "as_valid")]
    pub(crate) rewards: Option<Rewards>,
    /// The drift of the routing from the reference's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) routing_drift: Vec<LayerDrift>,
}

/// The size of a split.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SplitCounts {
    /// Number of samples that are used.
    pub(crate) samples: usize,
    /// Number of samples that are not, because there is nothing in them to train on.
    pub(crate) left_out: usize,
    /// The split's rows and tokens.
    #[serde(flatten)]
    pub(crate) counts: data::Counts,
}

impl SplitCounts {
    pub(crate) fn of(corpus: &data::Corpus) -> Self {
        Self {
            samples: corpus.len(),
            left_out: corpus.left_out,
            counts: corpus.counts,
        }
    }
}

impl Journal {
    /// The journal of the run in a folder, continued after a line or from its beginning. Lines that will be written again
    /// are cut off.
    ///
    /// # Errors
    /// If a file cannot be written, or a line that should stay is malformed.
    pub(crate) fn open(run: &Path, last: Option<LastLine>) -> Result<Self> {
        Ok(Self {
            metrics: Metrics::open(&run.join(METRICS_NAME), last)?,
            events: EventFile::open(run, last)?,
        })
    }

    /// The counts of the splits, by their names, before the first step.
    pub(crate) fn data(&mut self, splits: &BTreeMap<&str, SplitCounts>) -> Result<()> {
        self.metrics.append(0, &json!({ "data": splits }))
    }

    /// The memory that a run took, with what was predicted, after its last step.
    pub(crate) fn memory(&mut self, step: u64, plan: &TrainingPlan, found: Memory) -> Result<()> {
        let memory = json!({
            "own_bytes": found.own_bytes,
            "mapped_bytes": found.mapped_bytes,
            "predicted_own_bytes": plan.own().round(),
            "predicted_mapped_bytes": (plan.mapped + PROGRAM_MAPPED).round(),
            "predicted": plan,
        });
        self.metrics.append(step, &json!({ "memory": memory }))
    }

    /// A step, and the load of the experts since the last line.
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
            values.push((tag("load"), EventValue::Histogram(layer.load.clone())));
            values.push((tag("load_entropy"), EventValue::Scalar(layer.entropy)));
            values.push((tag("dead_experts"), EventValue::Scalar(layer.dead as f64)));
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
                EventValue::Scalar(layer.drift),
            ));
        }
        self.events.append(step, &values)
    }

    /// A return to an earlier step, written with the first step after it.
    pub(crate) fn rollback(
        &mut self,
        step: u64,
        from_step: u64,
        loss: f64,
        smoothed_loss: f64,
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

    /// The scores of the tasks after a step.
    pub(crate) fn scores(&mut self, step: u64, scores: &[TaskScore]) -> Result<()> {
        self.metrics.append(step, &json!({ "scores": scores }))?;
        let value = |score: &TaskScore| {
            let TaskScore {
                task,
                metric,
                filter,
                value,
                ..
            } = score;
            scalar(&format!("eval/{task}/{metric},{filter}"), *value)
        };
        let values: Vec<_> = scores.iter().map(value).collect();
        self.events.append(step, &values)
    }

    /// The continuations of the prompts after a step.
    pub(crate) fn samples(&mut self, step: u64, samples: &[SampledText]) -> Result<()> {
        self.metrics.append(step, &json!({ "samples": samples }))?;
        let text = |(i, sample): (usize, &SampledText)| {
            // Indented, so that Markdown shows it as it is.
            let lines = |text: &str| text.replace('\n', "\n    ");
            let text = format!(
                "    {}\n\n    {}",
                lines(&sample.prompt),
                lines(&sample.text)
            );
            (format!("samples/{i}"), EventValue::Text(text))
        };
        let values: Vec<_> = samples.iter().enumerate().map(text).collect();
        self.events.append(step, &values)
    }
}

fn scalar(tag: &str, value: f64) -> (String, EventValue) {
    (tag.to_owned(), EventValue::Scalar(value))
}

/// With two digits, so that layers sort.
fn of_layer(layer: usize, name: &str) -> String {
    format!("moe/layer_{layer:02}/{name}")
}

/// The rewards of answers, under TRL's names.
fn of_rewards(split: &str, rewards: &Rewards) -> [(String, EventValue); 4] {
    rewards
        .named()
        .map(|(name, value)| scalar(&format!("{split}/{name}"), value))
}

/// The rewards of the validation split in a line of metrics.
fn as_valid<S: Serializer>(
    rewards: &Option<Rewards>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    let named = rewards.iter().flat_map(Rewards::named);
    serializer.collect_map(named.map(|(name, value)| (format!("valid_{name}"), value)))
}
