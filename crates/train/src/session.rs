//! A training session: the parts that a run needs in memory.
//!
//! `open.rs` makes it from a recipe, `checkpoints.rs` saves and restores it, and `fit/` trains it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::tensor::Device;
use checkpoint::Folder;
use data::{Corpus, TokenizerFiles};
use kernels::Quantizer;
use kernels::fp8::Scales;
use model::Policy;
use model::adapt::{AdaptedModule, Scaling, Share};
use model::{Model, ModelConfig, OperandRounding};

use crate::Result;
use crate::checkpoint_state::RunState;
use crate::dataset::Dataset;
use crate::fit::ranks::{RankLayout, Ranks};
use crate::optimizer::AdamW;
use crate::recipe::forecast::TrainingPlan;
use crate::recipe::{Loss, Method, Recipe};
use crate::routing::BatchChoices;

/// Everything that a run needs in memory.
#[derive(Debug)]
pub struct Session {
    /// The resolved recipe.
    pub recipe: Recipe,
    /// The adapted modules; none for full training.
    pub adapted: Vec<AdaptedModule>,
    /// The format that merged weights are rounded to, if any: the recipe's, or that of the adapter to continue from.
    pub quantizer: Option<Quantizer>,
    /// Training rows.
    pub train: Dataset,
    /// Validation samples, if there are any.
    pub valid: Option<Corpus>,
    /// Tokens that end a text, as far as the tokenizer says.
    pub end_ids: Vec<u32>,
    /// The memory that it should take.
    pub plan: TrainingPlan,
    pub(crate) model: Model,
    pub(crate) update: UpdateForm,
    pub(crate) reference: Option<Reference>,
    /// The model as training started, if preferences are learned relative to it and it is not the base.
    pub(crate) start: Option<Model>,
    pub(crate) optimizer: AdamW,
    pub(crate) ranks: Ranks,
    pub(crate) state: RunState,
    pub(crate) base: Base,
    /// Where the model computes, with gradients.
    pub(crate) device: Device,
    pub(crate) pad_id: u32,
    /// One more than the largest id of the tokenizer, if there is one.
    pub(crate) tokenizer_size: Option<usize>,
}

/// The form of the low-rank updates, for the adapter's files and the precision policy.
#[derive(Debug)]
pub(crate) struct UpdateForm {
    /// How the adapter's alphas become scales.
    pub(crate) scaling: Scaling,
    /// The factors that the experts of a layer share.
    pub(crate) share: Option<Share>,
    /// How many matrices are rounded to which format.
    pub(crate) n_rounded: BTreeMap<String, usize>,
}

/// The base without an adapter and without gradients: routing is compared with it, and preferences are unless they have
/// a start to be compared with. There is none for full training on next tokens.
#[derive(Debug)]
pub(crate) struct Reference {
    pub(crate) model: Model,
    /// The choices of its routers on the validation rows, once they are known.
    pub(crate) choices: Option<Vec<BatchChoices>>,
}

impl Reference {
    pub(crate) fn new(model: Model) -> Self {
        Self {
            model,
            choices: None,
        }
    }
}

/// The origin of the model, for the files that are written with its weights.
#[derive(Debug)]
pub(crate) struct Base {
    /// The checkpoint; none for fresh weights.
    pub(crate) folder: Option<Folder>,
    /// `config.json` as it was read.
    pub(crate) config: serde_json::Value,
    /// The tokenizer's files, and their folder if it is not the checkpoint's.
    pub(crate) tokenizer: Option<TokenizerFiles>,
    pub(crate) tokenizer_folder: Option<PathBuf>,
    /// The name of the base in an adapter.
    pub(crate) name: String,
}

impl Session {
    /// Optimizer updates made so far.
    pub fn steps_done(&self) -> u64 {
        self.state.step
    }

    /// The step that the result is of: the last one, or the best if the recipe keeps it.
    pub fn result_step(&self) -> u64 {
        let best = self.state.best_step(&self.recipe.train.keep_best);
        best.unwrap_or(self.state.step)
    }

    /// Whether there is nothing left to train or to measure.
    pub fn is_finished(&self) -> bool {
        !self.is_unfinished()
    }

    /// Optimizer updates of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.recipe.total_steps(self.train.rows())
    }

    /// The tokenizer's files, if there is a tokenizer.
    pub fn tokenizer_files(&self) -> Option<&TokenizerFiles> {
        self.base.tokenizer.as_ref()
    }

    /// The checkpoint that training started from; none for fresh weights.
    pub fn base_folder(&self) -> Option<&Folder> {
        self.base.folder.as_ref()
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// Where the model computes, without gradients.
    pub fn device(&self) -> Device {
        self.device.clone().inner()
    }

    /// How ranks share the run out, nothing left open.
    pub fn layout(&self) -> RankLayout {
        self.ranks.layout
    }

    /// Why ranks do not share out the experts that are trained, unless they may.
    pub fn why_experts_stay_whole(&self) -> Option<&str> {
        self.ranks.why_whole.as_deref()
    }

    /// Number of trained values.
    pub fn trained_parameters(&self) -> usize {
        self.model
            .parameters()
            .iter()
            .map(|parameter| {
                let own = parameter.values.dims()[0];
                self.ranks.whole_len(&parameter.name, own)
            })
            .sum()
    }

    /// The formats in which values are stored, multiplied, added and saved.
    ///
    /// # Errors
    /// If a header of the base cannot be read.
    pub fn policy(&self) -> Result<Policy> {
        let compute = self.compute();
        let policy = match (&self.base.folder, self.recipe.train.method) {
            (Some(folder), Method::Lora) => {
                let policy = Policy::of_checkpoint(folder, compute)?;
                policy.with_lora(&self.update.n_rounded)
            }
            _ => Policy::trained(compute),
        };
        Ok(policy)
    }

    /// The format that operands of products are rounded to: the recipe's, FP8 with the model's own scales.
    pub fn compute(&self) -> OperandRounding {
        match self.recipe.precision.compute {
            OperandRounding::Fp8(Scales::One) => OperandRounding::Fp8(Scales::One),
            OperandRounding::Fp8(_) => OperandRounding::Fp8(self.model.config.fp8_scales),
            other => other,
        }
    }

    /// Whether rows come in pairs of a chosen and a rejected answer.
    pub(crate) fn learns_preferences(&self) -> bool {
        self.recipe.train.loss == Loss::Dpo
    }
}
