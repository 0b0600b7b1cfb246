//! The memory of a run, predicted before anything is loaded.

use checkpoint::Folder;
use model::footprint::{FrozenBytes, ModelShape, PassBytes, Trained, TrainingPass, WeightBytes};
use model::{AdapterWeights, Checkpointing, ModelConfig};
use serde::Serialize;

use crate::Result;
use crate::recipe::{Loss, Method, Moments, Recipe};

/// The program's own memory without a model: its threads, tokenizer and tables.
pub const PROGRAM: f64 = 32.0 * (1 << 20) as f64;

/// What is mapped of the program itself.
pub const PROGRAM_MAPPED: f64 = 24.0 * (1 << 20) as f64;

/// The largest micro-batch of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BatchShape {
    /// Rows: samples, packed rows, or both answers of each pair.
    pub rows: u64,
    /// Tokens of a row, padding included.
    pub seq: u64,
    /// Tokens with a target.
    pub trained_tokens: u64,
}

impl BatchShape {
    /// The largest that a recipe allows, whatever its data is.
    pub fn largest(recipe: &Recipe) -> Self {
        let per_row = if recipe.train.loss == Loss::Dpo { 2 } else { 1 };
        let rows = (recipe.train.batch_size as u64).saturating_mul(per_row);
        let seq = recipe.data.max_length as u64;
        Self {
            rows,
            seq,
            trained_tokens: rows.saturating_mul(seq),
        }
    }
}

/// Bytes of a run by component. All but `mapped` are the program's own memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct TrainingPlan {
    /// Frozen weights, as they are stored.
    pub mapped: f64,
    /// Trained weights in f32, and what is made of stored ones when they are opened.
    pub weights: f64,
    /// Low-rank updates.
    pub updates: f64,
    /// The optimizer's running means.
    pub moments: f64,
    /// What a forward pass leaves for the backward pass.
    pub saved: f64,
    /// Gradients of a step.
    pub gradients: f64,
    /// The most that a step takes at once, besides weights, updates and moments: saved activations, gradients and what
    /// operations need in between.
    pub step: f64,
    /// What threads keep from step to step for operations.
    pub scratch: f64,
    /// Writing the result: an adapter is copied, in blocks too small to reuse those of a step.
    pub result: f64,
    /// Gaps that the system's allocator leaves between blocks.
    pub gaps: f64,
}

/// How a run uses the heap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeapUse {
    /// Fast, with gaps between blocks.
    Fast,
    /// Without gaps.
    Tight,
}

/// A run before its model is opened, and what it will take.
#[derive(Debug)]
pub struct Forecast<'a> {
    /// The recipe.
    pub recipe: &'a Recipe,
    /// The model's config.
    pub config: &'a ModelConfig,
    /// The checkpoint, and the adapter to continue from.
    sources: (Option<&'a Folder>, Option<&'a AdapterWeights>),
    /// Ranks that share out the experts.
    ep: usize,
    /// The largest micro-batch.
    pub batch: BatchShape,
    /// Bytes of the weights that stay frozen.
    pub frozen: FrozenBytes,
}

impl<'a> Forecast<'a> {
    /// The forecast of a recipe, whatever its rows are.
    ///
    /// # Errors
    /// If a tensor's header cannot be read.
    pub fn new(
        recipe: &'a Recipe,
        config: &'a ModelConfig,
        sources: (Option<&'a Folder>, Option<&'a AdapterWeights>),
        ep: Option<usize>,
    ) -> Result<Self> {
        let mut forecast = Self {
            recipe,
            config,
            sources,
            ep: ep.unwrap_or(1).max(1),
            batch: BatchShape::largest(recipe),
            frozen: FrozenBytes::default(),
        };
        let training = recipe.training();
        match sources.0 {
            Some(folder) => {
                let is_compared = recipe.train.loss == Loss::Dpo;
                let reads = |key: &str| is_compared || !training.trains(key);
                forecast.frozen = FrozenBytes::of(folder, config, &reads)?;
            }
            // Fresh weights that are not trained are f32.
            None => forecast.frozen.held = FrozenBytes::fresh(config, &|key| !training.trains(key)),
        }
        Ok(forecast)
    }

    /// The forecast of a recipe on weights that are not here, and whose bytes are known.
    pub fn of_config(recipe: &'a Recipe, config: &'a ModelConfig, mapped: WeightBytes) -> Self {
        Self {
            recipe,
            config,
            sources: (None, None),
            ep: 1,
            batch: BatchShape::largest(recipe),
            frozen: FrozenBytes {
                mapped,
                ..FrozenBytes::default()
            },
        }
    }

    /// The same with another micro-batch.
    #[must_use]
    pub fn with_batch(self, batch: BatchShape) -> Self {
        Self { batch, ..self }
    }

    /// Bytes that are read as they are stored: of the weights that stay frozen, or while others are converted one by one.
    pub fn mapped(&self) -> f64 {
        self.frozen.mapped.all().max(self.frozen.largest_other)
    }

    /// What the run will take.
    pub fn plan(&self) -> TrainingPlan {
        self.plan_of(self.recipe, self.batch)
    }

    /// What it would take with another recipe and another micro-batch, of the same model and files.
    pub fn plan_of(&self, recipe: &Recipe, batch: BatchShape) -> TrainingPlan {
        let (training, fresh) = (recipe.training(), recipe.lora_config());
        let trained = match (recipe.train.method, self.sources.1) {
            (Method::Full, _) => Trained::Weights(&training),
            (Method::Lora, Some(adapter)) => Trained::Stored(adapter),
            (Method::Lora, None) => Trained::Fresh(&fresh),
        };
        let shape = ModelShape::new(self.config, trained).with_experts_shared(self.ep);
        TrainingPlan {
            mapped: self.mapped(),
            ..TrainingPlan::new(recipe, &shape, batch, self.frozen.held)
        }
    }
}

impl TrainingPlan {
    /// The plan of a recipe for a model of a shape. `held` are bytes that opening stored weights makes.
    pub fn new(recipe: &Recipe, shape: &ModelShape, batch: BatchShape, held: f64) -> Self {
        let pass = shape.training_pass(&TrainingPass {
            rows: batch.rows as f64,
            seq: batch.seq as f64,
            trained_tokens: batch.trained_tokens as f64,
            compute: recipe.precision.compute.into(),
            checkpointing: recipe.train.checkpointing,
            threads: kernels::n_threads() as f64,
            is_compared: recipe.train.loss == Loss::Dpo,
        });
        let trained = shape.trained() + shape.updates();
        let step = step_bytes(recipe, pass);
        Self {
            mapped: 0.0,
            weights: shape.trained() + held,
            updates: shape.updates(),
            moments: 2.0 * trained * moment_share(recipe),
            saved: pass.saved,
            gradients: pass.gradients,
            step,
            scratch: pass.scratch,
            result: shape.updates(),
            gaps: gap_share(recipe) * step,
        }
    }

    /// All of the program's own memory.
    pub fn own(&self) -> f64 {
        self.without_gaps() + self.gaps
    }

    /// All of it, if the heap has no gaps.
    pub fn without_gaps(&self) -> f64 {
        PROGRAM
            + self.weights
            + self.updates
            + self.moments
            + self.step
            + self.scratch
            + self.result
    }
}

/// Bytes of a running mean over those of its f32 values.
fn moment_share(recipe: &Recipe) -> f64 {
    match recipe.optimizer.moments() {
        Moments::F32 => 1.0,
        Moments::Bf16 => 0.5,
    }
}

/// Gaps over what a step takes. They come of blocks of many sizes in one heap; with block checkpointing, every large block is
/// mapped by itself.
fn gap_share(recipe: &Recipe) -> f64 {
    match recipe.train.checkpointing {
        Checkpointing::None => 0.08,
        Checkpointing::Block => 0.0,
    }
}

/// The most that a step takes: gradients of earlier micro-batches wait while others are made.
fn step_bytes(recipe: &Recipe, pass: PassBytes) -> f64 {
    match recipe.train.accumulate {
        0 | 1 => pass.pass,
        _ => pass.pass + pass.gradients,
    }
}
