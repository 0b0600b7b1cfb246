//! The recipe of a training run: one flat TOML file, its defaults, and the reasons for them.
//!
//! Every number that a recipe does not give comes from the `Default` below its section and from nowhere else. `file.rs`
//! reads the file and applies `--set`, `keys.rs` knows the names of sections and keys, `choices.rs` the settings that are
//! one of a few words, `check.rs` refuses values, `changes.rs` says which may change when a run is resumed,
//! and `trained.rs` what is trained.

mod changes;
mod check;
mod choices;
mod file;
pub(crate) mod forecast;
mod keys;
mod resolved;
mod trained;
mod values;

#[cfg(test)]
mod tests;

use std::path::PathBuf;

use checkpoint::OrderedMap;
use kernels::Quantizer;
use model::adapt::Share;
use model::{Checkpointing, OperandRounding};
use serde::{Deserialize, Serialize};

pub(crate) use self::values::SettingWords;

pub use self::choices::{
    DpoReference, ExportDType, Loss, Method, Moments, RouterTraining, ScheduleKind,
};

/// The largest exponent of a loss scale: beyond it a scaled loss may leave f32.
pub(crate) const MAX_LOSS_SCALE_EXPONENT: u32 = 100;

/// A whole training run, resolved: every default is filled in and every value is checked.
///
/// Made by [`Recipe::open`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// The model to train.
    pub model: ModelSection,
    /// The data to train on.
    pub data: DataSection,
    /// The adapter. Without effect if `train.method` is `full`.
    pub lora: LoraSection,
    /// Number formats.
    pub precision: PrecisionSection,
    /// AdamW.
    pub optimizer: OptimizerSection,
    /// The learning rate over the run.
    pub schedule: ScheduleSection,
    /// Length, batches, seeds and checkpoints.
    pub train: TrainSection,
    /// Learning from preferences. Without effect unless `train.loss` is `dpo`.
    pub dpo: DpoSection,
    /// Validation and samples.
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
    /// The tokenizer's folder. The default is the model's own; a `config` has none, and rows of text need one.
    pub tokenizer: Option<PathBuf>,
    /// A PEFT adapter to continue from. Its rank, alpha and targets replace those of `[lora]`.
    pub adapter: Option<PathBuf>,
}

/// `[data]`: the rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    /// Folders with a training split and perhaps a validation split. A recipe may give one as a plain string.
    #[serde(deserialize_with = "values::one_or_more_paths")]
    pub path: Vec<PathBuf>,
    /// Each folder's share of the samples. Without it, an epoch visits every sample once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<Vec<f64>>,
    /// Keys of rows with the names of the columns that have them, where these differ.
    pub columns: OrderedMap<String>,
    /// Maximum length of a row in tokens; longer rows are truncated.
    pub max_length: usize,
    /// Whether several samples share a row of `max_length` tokens instead of being padded. No sample sees another.
    pub packing: bool,
    /// Whether a batch holds samples of similar length, which saves padding.
    pub group_by_length: bool,
}

impl Default for DataSection {
    fn default() -> Self {
        Self {
            path: Vec::new(),
            weights: None,
            columns: OrderedMap::default(),
            // Holds a question with its answer or a page of text. Attention and activations grow with it, and a machine
            // with little memory should be able to start.
            max_length: 1024,
            // Both change which samples share a step, and packing changes how many steps an epoch has.
            packing: false,
            group_by_length: false,
        }
    }
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
    /// The adapted modules: ends of module names, globs, or `all-linear`. A recipe may give one as a plain string.
    #[serde(deserialize_with = "values::one_or_more_patterns")]
    pub target: Vec<String>,
    /// Modules left out although `target` matches.
    #[serde(deserialize_with = "values::one_or_more_patterns")]
    pub exclude: Vec<String>,
    /// Whether the scale is `alpha / √rank` instead of `alpha / rank`.
    pub use_rslora: bool,
    /// Whether the lengths of the updated weights' rows are trained too: DoRA, arXiv:2402.09353.
    pub use_dora: bool,
    /// The learning rate of the second factors over that of the first: LoRA+, arXiv:2402.12354.
    pub loraplus_lr_ratio: f64,
    /// The factors that the experts of a layer share, if any: `A`, `B` or `outer`.
    #[serde(
        with = "values::optional_word",
        skip_serializing_if = "Option::is_none"
    )]
    pub experts_share: Option<Share>,
    /// Pattern to rank. The first match in order counts.
    pub rank_pattern: OrderedMap<usize>,
    /// Pattern to alpha. The first match in order counts.
    pub alpha_pattern: OrderedMap<f64>,
    /// The format that the merged model will be written in. Training then sees the merged weights as they will be
    /// rounded, so that the adapter's effect survives. Without it, base and adapter are added unrounded.
    #[serde(with = "values::quantizer", skip_serializing_if = "Option::is_none")]
    pub quantizer: Option<Quantizer>,
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
            // Every linear layer except the head: adapting attention alone learns less (QLoRA, arXiv:2305.14314,
            // section 4).
            target: vec!["all-linear".to_owned()],
            exclude: Vec::new(),
            // Other tools assume the plain scale.
            use_rslora: false,
            // Costs a pass over every adapted weight per step; a matter of taste at ranks above 8.
            use_dora: false,
            // Both factors alike, the default of every other tool. LoRA+ itself advises 16.
            loraplus_lr_ratio: 1.0,
            experts_share: None,
            rank_pattern: OrderedMap::default(),
            alpha_pattern: OrderedMap::default(),
            quantizer: None,
        }
    }
}

/// `[precision]`: number formats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrecisionSection {
    /// The format that operands of products are rounded to and saved activations are kept in: `f32`, `bf16`, `f16`, `fp8`
    /// or `fp8-unscaled`. Sums are f32.
    #[serde(with = "values::word")]
    pub compute: OperandRounding,
    /// Whether the trained values are rounded to bf16 before the first step: a disturbance as small as a rounding, which
    /// shows how much of a difference between two runs is chaos.
    pub round_start: bool,
    /// The first loss scale, a power of two. For `f16` alone.
    pub loss_scale: f64,
    /// Steps without overflow after which the loss scale doubles.
    pub loss_scale_growth_interval: u64,
}

impl Default for PrecisionSection {
    fn default() -> Self {
        Self {
            // Right everywhere, and CPUs have no faster way; bf16 is for saving memory.
            compute: OperandRounding::F32,
            round_start: false,
            // This and the next are PyTorch's: gradients around 1e-8 are in f16's range, and a scale that one odd batch
            // halved comes back.
            loss_scale: 65536.0,
            loss_scale_growth_interval: 2000,
        }
    }
}

impl PrecisionSection {
    /// The word for `compute` in a recipe.
    ///
    /// # Panics
    /// If `compute` was set by hand to a format that is for inference.
    pub fn compute_word(&self) -> &'static str {
        let word = self.compute.word();
        word.expect("formats for training have a word")
    }
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
    /// The tensors that are not decayed, as runs of components of their names.
    #[serde(deserialize_with = "values::one_or_more_patterns")]
    pub no_decay: Vec<String>,
    /// Maximum norm of the whole gradient; 0 turns clipping off.
    pub clip: f64,
    /// The dtype of the running means. The default is bf16 if everything is trained in FP8, else f32.
    pub moments: Option<Moments>,
    /// Whether bf16 means are rounded up or down at random, in proportion to the distance.
    pub stochastic_rounding: bool,
}

impl Default for OptimizerSection {
    fn default() -> Self {
        Self {
            // QLoRA's for models up to 13 billion parameters (arXiv:2305.14314, appendix B). To train every weight of a
            // published model, take a tenth of it.
            learning_rate: 2e-4,
            // This and the next two are those of PyTorch's AdamW, so that its runs compare.
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.01,
            // What transformers' Trainer spares. A norm's weight is meant to be near 1, and decay would pull it to 0.
            no_decay: SPARED.map(str::to_owned).to_vec(),
            // DeepSeek-V3's (arXiv:2412.19437, section 4.2), and nearly everyone's.
            clip: 1.0,
            moments: None,
            // Rounded to nearest, the mean of squares would stand still: with a decay of 0.999 a step moves it by less
            // than half of bf16's last bit.
            stochastic_rounding: true,
        }
    }
}

/// The patterns of biases and of the weights of norms.
pub(crate) const SPARED: [&str; 2] = ["bias", "*norm"];

impl OptimizerSection {
    /// Whether weight decay applies to a tensor.
    pub(crate) fn decays(&self, tensor: &str) -> bool {
        !self
            .no_decay
            .iter()
            .any(|pattern| model::matches(pattern, tensor))
    }

    /// The dtype of the running means, as resolved.
    pub(crate) fn moments(&self) -> Moments {
        self.moments.unwrap_or(Moments::F32)
    }
}

/// `[schedule]`: the learning rate over the run, computed by [`Schedule`](crate::Schedule).
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

impl Default for ScheduleSection {
    fn default() -> Self {
        Self {
            // Needs no tuning for a run of known length.
            kind: ScheduleKind::Cosine,
            // An adapter starts as zero and its first updates are small; AdamW's bias correction does the rest.
            warmup_steps: 0,
            // The last step is at this rate: at 0 it would be computed and thrown away. A tenth is the usual end of
            // pretraining schedules (arXiv:2203.15556, appendix B).
            final_ratio: 0.1,
        }
    }
}

/// `[train]`: length, batches, seeds and checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSection {
    /// An adapter, or weights.
    pub method: Method,
    /// The loss to minimize.
    pub loss: Loss,
    /// With `full`: the tensors to train, as runs of components of their names. None means all.
    #[serde(deserialize_with = "values::one_or_more_patterns")]
    pub unfrozen_parameters: Vec<String>,
    /// The part of the routers that is trained. The default follows `lora.target` or `unfrozen_parameters`.
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
    /// The seed of order, initialization and dropout.
    pub seed: u64,
    /// Whether every epoch has its own order; otherwise rows come in the order of the file.
    pub shuffle: bool,
    /// Steps between two lines of metrics.
    pub log_every: u64,
    /// Steps between two validation passes. Without it, only at the end.
    pub eval_every: Option<u64>,
    /// Steps between two checkpoints. Without it, only at the end.
    pub save_every: Option<u64>,
    /// Checkpoints to retain.
    pub keep_last: usize,
    /// Whether the best checkpoint is retained too, and becomes the result of the run.
    pub keep_best: KeepBest,
    /// A loss is a spike if it exceeds the average by this factor; 0 turns the watchdog off. Needs `save_every`.
    pub spike_factor: f64,
    /// Consecutive spikes after which the run goes back to a checkpoint and skips their batches.
    pub spike_steps: u64,
    /// Maximum number of rollbacks; the next one stops the run.
    pub max_rollbacks: u64,
    /// Activation checkpointing: `none` saves all activations for the backward pass, `block` only each layer's input and
    /// runs the layers again.
    #[serde(with = "values::word")]
    pub checkpointing: Checkpointing,
    /// The factor α of the sequence-wise balance loss; 0 turns it off.
    pub balance_loss: f64,
    /// The step γ of the auxiliary-loss-free balancer; 0 turns it off.
    pub bias_update_speed: f64,
    /// The format of a fully trained model.
    pub export_dtype: ExportDType,
}

/// What a best checkpoint is best in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum KeepBest {
    /// The validation loss, if `true`; nothing if `false`.
    Loss(bool),
    /// A metric of a task of `eval.tasks`: `mmlu acc`.
    Score(String),
}

impl KeepBest {
    /// Whether a best checkpoint is retained.
    pub fn is_on(&self) -> bool {
        *self != Self::Loss(false)
    }

    /// The names of the task and the metric, if it is best in one.
    pub(crate) fn score(&self) -> Option<&str> {
        match self {
            Self::Loss(_) => None,
            Self::Score(names) => Some(names),
        }
    }
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            // Fits when training everything does not.
            method: Method::Lora,
            loss: Loss::CrossEntropy,
            unfrozen_parameters: Vec::new(),
            router: None,
            steps: None,
            epochs: None,
            // Four rows of 1024 tokens fill the matrix kernels; more only costs memory, and `accumulate` makes larger
            // steps.
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
            // Off, because a second copy of the optimizer's state is large, and because other tools leave the last.
            keep_best: KeepBest::Loss(false),
            // Off: losses of small batches differ a lot, and a run that goes back has seen other rows than the recipe
            // says. 2 or 3 is a spike for batches of thousands of tokens.
            spike_factor: 0.0,
            // One or two are outliers that AdamW and clipping forgive.
            spike_steps: 3,
            // A run that goes astray again after this has another problem than its batches.
            max_rollbacks: 3,
            // Running layers twice costs a third of the speed; it is for models that do not fit otherwise.
            checkpointing: Checkpointing::None,
            // A published router is balanced already, and a short fine-tune should not move it.
            balance_loss: 0.0,
            bias_update_speed: 0.0,
            // The format that was opened comes back.
            export_dtype: ExportDType::Base,
        }
    }
}

/// `[dpo]`: learning from preferences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DpoSection {
    /// The weight of a difference in log-probability: the larger, the nearer the model stays to the reference.
    pub beta: f64,
    /// The assumed share of wrong labels.
    pub label_smoothing: f64,
    /// The model whose log-probabilities those of the trained one are compared with.
    pub reference: DpoReference,
}

impl Default for DpoSection {
    fn default() -> Self {
        Self {
            // The paper's, and TRL's.
            beta: 0.1,
            label_smoothing: 0.0,
            // TRL's: preferences are learned relative to what the adapter could do already.
            reference: DpoReference::Start,
        }
    }
}

/// `[eval]`: validation and samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalSection {
    /// Rows in a batch.
    pub batch_size: usize,
    /// Batches after which the pass ends. Without it, all of them.
    pub max_batches: Option<u64>,
    /// Passes without a new lowest loss after which the run ends. Needs `train.eval_every`.
    pub patience: Option<u64>,
    /// Prompts that the model continues at the start, every `generate_every` steps, and at the end.
    pub prompts: Vec<String>,
    /// Steps between two samples. Without it, only at the start and at the end.
    pub generate_every: Option<u64>,
    /// Maximum number of tokens of a sample.
    pub max_new_tokens: usize,
    /// Whether a prompt is sent as a user message, with the chat template.
    pub chat: bool,
    /// Tasks that the model is asked at the start, every `tasks_every` steps, and at the end: files of lm-evaluation-harness or
    /// folders of these, or files of questions.
    pub tasks: Vec<String>,
    /// Steps between two times that it is asked them. Without it, only at the start and at the end.
    pub tasks_every: Option<u64>,
    /// Maximum number of questions of a task.
    pub tasks_max_samples: Option<u64>,
    /// Bounds that the result must keep, as those of `eval --gate`; the baseline is the model at the start.
    pub gates: Vec<String>,
}

impl Default for EvalSection {
    fn default() -> Self {
        Self {
            // A batch that fits in training fits here, without gradients.
            batch_size: TrainSection::default().batch_size,
            max_batches: None,
            patience: None,
            prompts: Vec::new(),
            generate_every: None,
            // A few lines, in seconds.
            max_new_tokens: 64,
            chat: false,
            tasks: Vec::new(),
            tasks_every: None,
            tasks_max_samples: None,
            gates: Vec::new(),
        }
    }
}
