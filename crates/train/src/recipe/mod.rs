//! What a training run is told: one flat TOML file, its defaults, and their reasons.
//!
//! Every number that is not written in a recipe comes from a `Default` here and nowhere else.
//! How the file is read, and how `--set` overrides it, is in `file.rs`; which values are
//! refused is in `check.rs`.

mod check;
mod file;
mod keys;

use std::path::PathBuf;

use burn::tensor::FloatDType;
use checkpoint::OrderedMap;
use kernels::Quantizer;
use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer, Serialize};
use toml::Value;

/// A whole training run, resolved: every default is filled in and every value is checked.
///
/// Made by [`Recipe::open`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// What is trained.
    pub model: ModelSection,
    /// What it is trained on.
    pub data: DataSection,
    /// The adapter. Without effect if `train.method` is `full`.
    pub lora: LoraSection,
    /// What numbers are computed in.
    pub precision: PrecisionSection,
    /// AdamW.
    pub optimizer: OptimizerSection,
    /// The learning rate over the run.
    pub schedule: ScheduleSection,
    /// How long, in what portions, and what is written down.
    pub train: TrainSection,
    /// Learning from preferences. Without effect unless `train.loss` is `dpo`.
    pub dpo: DpoSection,
    /// The validation pass.
    pub eval: EvalSection,
}

/// `[model]`: a published model, or a configuration for fresh weights.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSection {
    /// A model folder, or `org/name` in the local Hugging Face cache. This or `config`.
    pub path: Option<String>,
    /// The `config.json` of a model that starts from fresh weights. This or `path`.
    pub config: Option<PathBuf>,
    /// The folder with the tokenizer. The model's own by default; a `config` has none, and rows
    /// of text need one.
    pub tokenizer: Option<PathBuf>,
    /// A PEFT adapter to go on from. Its rank, alpha and targets count then, not `[lora]`'s.
    pub adapter: Option<PathBuf>,
}

/// `[data]`: the rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    /// Folders with `train.jsonl` and `valid.jsonl`. A recipe may give one as a plain string.
    #[serde(deserialize_with = "one_or_more_paths")]
    pub path: Vec<PathBuf>,
    /// What share of the samples each folder gives; without it, every sample is visited once an epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<Vec<f64>>,
    /// Longer rows are cut to this many tokens.
    pub max_length: usize,
    /// Whether samples share rows of `max_length` tokens, each for itself, instead of being padded.
    pub packing: bool,
    /// Whether a batch holds samples of similar length, to have less padding.
    pub group_by_length: bool,
}

/// `[lora]`: the adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSection {
    /// The rank of modules that `rank_pattern` does not match.
    pub rank: usize,
    /// The numerator of the scale, for modules that `alpha_pattern` does not match.
    pub alpha: f64,
    /// Dropout on the adapter's input.
    pub dropout: f64,
    /// The adapted modules: ends of module names, globs, or `all-linear`. A recipe may give one
    /// as a plain string.
    #[serde(deserialize_with = "one_or_more_patterns")]
    pub target: Vec<String>,
    /// Modules left out although `target` matches.
    #[serde(deserialize_with = "one_or_more_patterns")]
    pub exclude: Vec<String>,
    /// Whether the scale is `alpha / √rank` instead of `alpha / rank`.
    pub use_rslora: bool,
    /// Whether the lengths of the updated weights' rows are trained too: DoRA, arXiv:2402.09353.
    pub use_dora: bool,
    /// How many times the learning rate of the second factors is that of the first: LoRA+, arXiv:2402.12354.
    pub loraplus_lr_ratio: f64,
    /// Which factor the experts of a layer share, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts_share: Option<ExpertsShare>,
    /// Pattern to rank. The first match in order counts.
    pub rank_pattern: OrderedMap<usize>,
    /// Pattern to alpha. The first match in order counts.
    pub alpha_pattern: OrderedMap<f64>,
    /// What the merged model will be written in: training then sees the merged weights as they will be rounded, so that
    /// the adapter's effect survives it. Without it, the base and the adapter are added unrounded.
    #[serde(with = "by_name", skip_serializing_if = "Option::is_none")]
    pub quantizer: Option<Quantizer>,
}

/// Which factors of their updates the experts of a layer share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExpertsShare {
    /// The first of every projection.
    A,
    /// The second of every projection.
    B,
    /// The first of gate and up, the second of down: those as wide as the residual stream.
    #[serde(rename = "outer")]
    Outer,
}

/// `[precision]`: what numbers are computed in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrecisionSection {
    /// The dtype of activations and of what they are multiplied with.
    pub compute: Compute,
    /// Whether the trained values are rounded to bf16 before the first step: a disturbance as small as a rounding, which
    /// tells how much of a difference between two runs is chaos.
    pub round_start: bool,
    /// What the loss is multiplied by before it is differentiated, at the start; a power of two. For `f16` alone.
    pub loss_scale: f64,
    /// Steps without overflow after which the scale doubles.
    pub loss_scale_growth_interval: u64,
}

/// The dtype of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Single precision.
    F32,
    /// Operands and what is kept for the backward pass in bf16, sums in f32.
    Bf16,
    /// The same in f16, with a loss scale that follows the gradients.
    F16,
    /// Operands and what is kept in E4M3, with a scale per 128 values of an activation and per 128 × 128 block of a
    /// weight; sums in f32.
    Fp8,
    /// The same without scales: a control that shows what they are worth.
    #[serde(rename = "fp8-unscaled")]
    Fp8Unscaled,
}

/// `[optimizer]`: AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerSection {
    /// The peak learning rate.
    pub learning_rate: f64,
    /// Decay of the running means of gradients and of their squares.
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The largest norm of all gradients together; 0 is off.
    pub clip: f64,
    /// The dtype of the running means. bf16 where everything is trained in FP8, else f32.
    pub moments: Option<Moments>,
    /// Whether bf16 means are rounded up or down at random, by how near they are.
    pub stochastic_rounding: bool,
}

/// The dtype of AdamW's running means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Moments {
    /// Single precision.
    F32,
    /// Half the memory.
    Bf16,
}

impl Moments {
    pub(crate) fn dtype(self) -> checkpoint::DType {
        match self {
            Self::F32 => checkpoint::DType::F32,
            Self::Bf16 => checkpoint::DType::BF16,
        }
    }

    pub(crate) fn float(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
        }
    }
}

impl OptimizerSection {
    /// The dtype of the running means, as resolved.
    pub(crate) fn moments(&self) -> Moments {
        self.moments.unwrap_or(Moments::F32)
    }
}

/// `[schedule]`: the learning rate over the run. What it computes is in
/// [`Schedule`](crate::Schedule).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleSection {
    /// The shape after the warmup.
    pub kind: ScheduleKind,
    /// Steps of linear rise to the peak.
    pub warmup_steps: u64,
    /// The learning rate of the last step, as a share of the peak. Without effect if constant.
    pub final_ratio: f64,
}

/// The shape of the learning rate after the warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Stays at the peak.
    Constant,
    /// Falls along a line.
    Linear,
    /// Falls along half a cosine wave.
    Cosine,
}

/// `[train]`: how long, in what portions, and what is written down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSection {
    /// What is trained: an adapter, or weights.
    pub method: Method,
    /// What is learned from the rows.
    pub loss: Loss,
    /// With `full`: the tensors that are trained, as runs of components of their names. All of them if there is none.
    #[serde(deserialize_with = "one_or_more_patterns")]
    pub unfrozen_parameters: Vec<String>,
    /// What of the routers changes. By default what `lora.target` or `unfrozen_parameters` choose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router: Option<RouterTraining>,
    /// Optimizer updates in all. This or `epochs`.
    pub steps: Option<u64>,
    /// Passes over the data. This or `steps`; one pass if a recipe has neither.
    pub epochs: Option<f64>,
    /// Rows in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches in a step.
    pub accumulate: usize,
    /// What order, initialization and dropout are drawn from.
    pub seed: u64,
    /// Whether every epoch has its own order; otherwise rows come as the file has them.
    pub shuffle: bool,
    /// Steps between two lines of metrics.
    pub log_every: u64,
    /// Steps between two validation passes. Without it, only at the end.
    pub eval_every: Option<u64>,
    /// Steps between two checkpoints. Without it, only at the end.
    pub save_every: Option<u64>,
    /// How many checkpoints are kept.
    pub keep_last: usize,
    /// Whether the checkpoint with the lowest validation loss is kept too, and is what the run leaves at its end.
    pub keep_best: bool,
    /// A loss over so many times the average before it is a spike; 0 is off. Needs `save_every`.
    pub spike_factor: f64,
    /// Spikes in a row after which the run goes back to a checkpoint and passes over their batches.
    pub spike_steps: u64,
    /// How often a run goes back before it stops.
    pub max_rollbacks: u64,
    /// What waits for the backward pass.
    pub checkpointing: Checkpointing,
    /// The factor α of the sequence-wise balance loss; 0 is off.
    pub balance_loss: f64,
    /// The step γ of the auxiliary-loss-free balancer; 0 is off.
    pub bias_update_speed: f64,
    /// What a fully trained model is written in.
    pub export_dtype: ExportDType,
}

/// What is learned from the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// The next token.
    CrossEntropy,
    /// Which of two answers to prefer, against the base without an adapter: arXiv:2305.18290.
    Dpo,
}

impl Loss {
    /// Up to this a loss is not high, whatever it was before. Preferences are learned from ln 2, which is no preference,
    /// towards zero, where single pairs are many times the average.
    pub(crate) fn calm(self) -> f64 {
        match self {
            Self::CrossEntropy => 0.0,
            Self::Dpo => std::f64::consts::LN_2,
        }
    }
}

/// `[dpo]`: learning from preferences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DpoSection {
    /// How much a difference in log-probability counts: how near the model stays to what it was.
    pub beta: f64,
    /// How often the labels are thought to be wrong.
    pub label_smoothing: f64,
}

impl Default for DpoSection {
    fn default() -> Self {
        Self {
            // The paper's, and TRL's.
            beta: 0.1,
            label_smoothing: 0.0,
        }
    }
}

/// What of the routers changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouterTraining {
    /// Nothing, as DeepSeek fine-tunes.
    Frozen,
    /// The weight: updated by the adapter, or trained with the rest.
    Trainable,
    /// The correction bias, by the balancer; the weight stays.
    BiasOnly,
}

/// What of a forward pass waits for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Checkpointing {
    /// All that the layers need for their gradients.
    None,
    /// What enters each layer; backward runs the layers again.
    Block,
}

impl From<Checkpointing> for model::Checkpointing {
    fn from(checkpointing: Checkpointing) -> Self {
        match checkpointing {
            Checkpointing::None => Self::None,
            Checkpointing::Block => Self::Block,
        }
    }
}

/// What a fully trained model is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportDType {
    /// Block FP8 if the base is, else bf16.
    Base,
    /// bfloat16.
    Bf16,
    /// Block FP8 for attention and experts, bf16 for the rest.
    Fp8,
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// A LoRA adapter on frozen weights.
    Lora,
    /// The weights themselves: all, or those that `unfrozen_parameters` choose.
    Full,
}

/// `[eval]`: the validation pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalSection {
    /// Rows in a batch.
    pub batch_size: usize,
    /// Batches after which the pass ends. Without it, all of them.
    pub max_batches: Option<u64>,
    /// Passes without a new lowest loss after which the run ends. Needs `train.eval_every`.
    pub patience: Option<u64>,
    /// What the model is to continue, at the start, every `generate_every` steps, and at the end.
    pub prompts: Vec<String>,
    /// Steps between two samples. Without it, only at the start and at the end.
    pub generate_every: Option<u64>,
    /// The most tokens of a sample.
    pub max_new_tokens: usize,
    /// Whether a prompt is put to the model as a user's message, with the chat template.
    pub chat: bool,
}

impl Default for DataSection {
    fn default() -> Self {
        Self {
            path: Vec::new(),
            weights: None,
            // Holds a question with its answer or a page of text; attention and activations grow
            // with it, and a machine without much memory should start.
            max_length: 1024,
            // Both change which samples share a step, and packing how many steps an epoch has.
            packing: false,
            group_by_length: false,
        }
    }
}

impl Default for LoraSection {
    fn default() -> Self {
        Self {
            // PEFT's own default, and enough for a style or a set of facts.
            rank: 8,
            // Twice the rank, a common rule: the scale is 2.
            alpha: 16.0,
            // An adapter of rank 8 has few parameters to overfit with, and dropout costs time.
            dropout: 0.0,
            // Every linear layer but the head: adapting attention alone learns less (QLoRA,
            // arXiv:2305.14314, section 4).
            target: vec!["all-linear".to_owned()],
            exclude: Vec::new(),
            // The plain scale is what other tools assume.
            use_rslora: false,
            // Costs a pass over every adapted weight per step; a matter of taste at ranks above 8.
            use_dora: false,
            // Both factors alike, as in every other tool's default. LoRA+ itself advises 16.
            loraplus_lr_ratio: 1.0,
            experts_share: None,
            rank_pattern: OrderedMap::default(),
            alpha_pattern: OrderedMap::default(),
            quantizer: None,
        }
    }
}

impl Default for PrecisionSection {
    fn default() -> Self {
        Self {
            // Right everywhere, and CPUs have no faster way; bf16 is for saving memory.
            compute: Compute::F32,
            round_start: false,
            // This and the next are PyTorch's: gradients around 1e-8 are in f16's range, and a scale that was halved by
            // one odd batch comes back.
            loss_scale: 65536.0,
            loss_scale_growth_interval: 2000,
        }
    }
}

impl Default for OptimizerSection {
    fn default() -> Self {
        Self {
            // QLoRA's for models up to 13 billion parameters (arXiv:2305.14314, appendix B). To
            // train every weight of a published model, take a tenth of it.
            learning_rate: 2e-4,
            // This and the next two are those of PyTorch's AdamW, so that its runs compare.
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.01,
            // DeepSeek-V3's (arXiv:2412.19437, section 4.2), as nearly everyone's.
            clip: 1.0,
            moments: None,
            // Rounded to the nearest, the mean of squares would stand still: with a decay of 0.999 a step moves it by
            // less than half of bf16's last bit.
            stochastic_rounding: true,
        }
    }
}

impl Default for ScheduleSection {
    fn default() -> Self {
        Self {
            // Needs no tuning for a run of known length.
            kind: ScheduleKind::Cosine,
            // An adapter starts as zero and its first updates are small; AdamW's bias correction
            // does the rest.
            warmup_steps: 0,
            // The last step is at this rate: at 0 it would be computed and thrown away. A tenth
            // is the usual end of pretraining schedules (arXiv:2203.15556, appendix B).
            final_ratio: 0.1,
        }
    }
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            // Fits where training everything does not.
            method: Method::Lora,
            loss: Loss::CrossEntropy,
            unfrozen_parameters: Vec::new(),
            router: None,
            steps: None,
            epochs: None,
            // Four rows of 1024 tokens fill the matrix kernels; more only costs memory, and
            // `accumulate` makes larger steps.
            batch_size: 4,
            accumulate: 1,
            // Any number would do; a fixed one makes runs repeat.
            seed: 0,
            // Rows are often sorted, by source or by date.
            shuffle: true,
            // A line every few seconds to a minute on one machine.
            log_every: 10,
            eval_every: None,
            save_every: None,
            // The newest, and one to fall back to; optimizer states are large.
            keep_last: 2,
            // Off, because a second copy of the optimizer's state is large, and because the last is what other tools leave.
            keep_best: false,
            // Off: losses of small batches differ a lot, and a run that goes back has seen other rows than the recipe
            // says. 2 or 3 is a spike for batches of thousands of tokens.
            spike_factor: 0.0,
            // One or two are outliers that AdamW and clipping forgive.
            spike_steps: 3,
            // A run that goes astray again after this has another problem than its batches.
            max_rollbacks: 3,
            // Running layers twice costs a third of the speed; it is for what does not fit otherwise.
            checkpointing: Checkpointing::None,
            // A published router is balanced already, and a short fine-tune should not move it.
            balance_loss: 0.0,
            bias_update_speed: 0.0,
            // What was opened is what comes back.
            export_dtype: ExportDType::Base,
        }
    }
}

impl Default for EvalSection {
    fn default() -> Self {
        Self {
            // What fits in training fits here, without gradients.
            batch_size: TrainSection::default().batch_size,
            max_batches: None,
            patience: None,
            prompts: Vec::new(),
            generate_every: None,
            // A few lines, in seconds.
            max_new_tokens: 64,
            chat: false,
        }
    }
}

impl Recipe {
    /// The resolved recipe as TOML, which [`Recipe::open`] reads back to an equal value.
    ///
    /// # Panics
    /// If a field that was set by hand has no form in TOML: an integer beyond 63 bits, or a path
    /// that is not UTF-8. What [`Recipe::open`] returns has none of these.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("settings that came from TOML can be written as TOML")
    }

    /// A number that differs between recipes that differ, in hexadecimal: 64-bit FNV-1a over the
    /// resolved TOML. It tells a changed recipe from an unchanged one, and resists no attack.
    ///
    /// # Panics
    /// As [`Recipe::to_toml`].
    ///
    /// Source: draft-eastlake-fnv, section 2.
    pub fn hash(&self) -> String {
        const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
        const PRIME: u64 = 0x0100_0000_01b3;
        let toml = self.to_toml();
        let hash = toml.bytes().fold(OFFSET_BASIS, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(PRIME)
        });
        format!("{hash:016x}")
    }

    /// How many optimizer updates the run makes on this many rows. The last epoch is rounded up
    /// to a whole step, and there is at least one.
    pub fn total_steps(&self, n_rows: usize) -> u64 {
        if let Some(steps) = self.train.steps {
            return steps;
        }
        let epochs = self.train.epochs.unwrap_or(DEFAULT_EPOCHS);
        let rows_per_step = self.train.batch_size as f64 * self.train.accumulate as f64;
        // Beyond 2^53 rows this rounds, and beyond 64 bits it saturates; no run gets there.
        ((epochs * n_rows as f64 / rows_per_step).ceil() as u64).max(1)
    }

    /// Fills in the defaults that depend on another key.
    pub(crate) fn resolve(&mut self) {
        let moments = match (self.train.method, self.precision.compute) {
            (Method::Full, Compute::Fp8 | Compute::Fp8Unscaled) => Moments::Bf16,
            _ => Moments::F32,
        };
        self.optimizer.moments.get_or_insert(moments);

        if self.train.steps.is_none() && self.train.epochs.is_none() {
            self.train.epochs = Some(DEFAULT_EPOCHS);
        }
    }
}

/// One pass: a small data set is learned in it, and a second pass is a decision.
const DEFAULT_EPOCHS: f64 = 1.0;

/// A quantizer as the text of its name.
mod by_name {
    use kernels::Quantizer;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(
        quantizer: &Option<Quantizer>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match quantizer {
            Some(quantizer) => serializer.collect_str(quantizer),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Quantizer>, D::Error> {
        let name = String::deserialize(deserializer)?;
        name.parse().map(Some).map_err(D::Error::custom)
    }
}

fn one_or_more_paths<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    let paths = one_or_more(deserializer, "a path or a list of paths")?;
    Ok(paths.into_iter().map(PathBuf::from).collect())
}

fn one_or_more_patterns<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<String>, D::Error> {
    one_or_more(deserializer, "a pattern or a list of patterns")
}

/// Reads a string, or a list of strings.
fn one_or_more<'de, D: Deserializer<'de>>(
    deserializer: D,
    expected: &str,
) -> Result<Vec<String>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let values = match value {
        Value::Array(values) => values,
        value => vec![value],
    };
    let texts = values.into_iter().map(|value| match value {
        Value::String(text) => Ok(text),
        value => Err(D::Error::invalid_type(
            Unexpected::Other(value.type_str()),
            &expected,
        )),
    });
    texts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_steps_is_given_or_follows_from_the_rows() {
        let check = |steps, epochs, n_rows, expected| {
            let mut recipe = Recipe::default();
            recipe.train.batch_size = 4;
            recipe.train.accumulate = 3;
            recipe.train.steps = steps;
            recipe.train.epochs = epochs;
            assert_eq!(recipe.total_steps(n_rows), expected, "{steps:?} {epochs:?}");
        };
        check(Some(7), None, 1000, 7);
        check(None, Some(1.0), 24, 2);
        check(None, Some(1.0), 25, 3);
        check(None, Some(0.5), 25, 2);
        check(None, Some(0.001), 1, 1);
        check(None, None, 12, 1);
    }

    #[test]
    fn the_hash_is_that_of_the_text_and_changes_with_a_setting() {
        let mut recipe = Recipe::default();
        let before = recipe.hash();
        assert_eq!(before.len(), 16);
        assert_eq!(before, Recipe::default().hash());
        recipe.optimizer.eps = 1.000_000_000_000_000_2e-8;
        assert_ne!(before, recipe.hash());
    }
}
