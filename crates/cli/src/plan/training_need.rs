//! The plan of a training run.

use std::path::Path;

use ::train::{BatchShape, Forecast, Method, Recipe, TrainingPlan};
use anyhow::Context;
use checkpoint::{Adapter, Folder};
use model::{AdapterWeights, Checkpointing, ModelConfig, load};

use super::knobs::{fewer_bits, proposal, training_knobs};
use super::lines::{PlanLine, described, format_lines};
use super::memory_plan::{DiskReads, Plan, PlanTarget, ReadFor};
use super::run_memory::own_lines;
use crate::open::{find, name_of, read_json};
use crate::train::usage;

/// A recipe, and what its files say without being read.
pub(super) struct TrainingNeed {
    recipe: Recipe,
    config: ModelConfig,
    folder: Option<Folder>,
    adapter: Option<AdapterWeights>,
    name: String,
}

impl TrainingNeed {
    /// Opens a recipe with some settings.
    pub(super) fn open(path: &Path, settings: Vec<String>) -> anyhow::Result<Self> {
        let recipe = Recipe::open(path, &settings).map_err(usage)?;
        let (folder, config, name) = match (&recipe.model.path, &recipe.model.config) {
            (Some(model), _) => {
                let found = find(model)?;
                let folder = Folder::open(&found)?;
                let config = load::read_config(&folder)?;
                (Some(folder), config, name_of(&found))
            }
            (None, file) => {
                let file = file
                    .as_deref()
                    .context("a recipe has a model or a config")?;
                let config = ModelConfig::from_json(&read_json(file)?, file)?;
                (None, config, file.display().to_string())
            }
        };
        let adapter = recipe.model.adapter.as_deref();
        let adapter = adapter.map(|folder| {
            AdapterWeights::read(&Adapter::open(folder)?, &config).map_err(anyhow::Error::from)
        });
        Ok(Self {
            adapter: adapter.transpose()?,
            recipe,
            config,
            folder,
            name,
        })
    }

    /// The plan for the largest rows that the recipe allows.
    pub(super) fn plan(&self, target: &PlanTarget) -> anyhow::Result<Plan> {
        let sources = (self.folder.as_ref(), self.adapter.as_ref());
        let forecast = Forecast::new(&self.recipe, &self.config, sources, None)?;
        let plan = forecast.plan();
        let limit = target.limit.as_ref();
        let bytes = limit.map(|limit| limit.bytes);
        let is_over = limit.is_some_and(|limit| plan.without_gaps() > limit.bytes as f64);
        let disk = self.disk(&plan, target);
        let mut knobs = Vec::new();
        if disk.is_some() {
            let weights = &forecast.frozen.mapped;
            knobs = fewer_bits(&self.config, weights, plan.own(), limit);
        }
        knobs.extend(training_knobs(&forecast, bytes));
        let proposal = bytes
            .filter(|_| is_over)
            .and_then(|bytes| proposal(&forecast, bytes));
        Ok(Plan {
            title: self.title(forecast.batch),
            mapped: format_lines(&forecast.frozen.mapped, "mapped"),
            own: own_lines(&plan),
            details: self.details(&forecast, &plan),
            knobs,
            proposal: proposal.map(|(settings, plan)| (settings, plan.own())),
            by_row: 0.0,
            tokens_per_second: None,
            disk,
        })
    }

    /// What is read from disk because frozen weights do not all stay in memory: once in the forward pass of each micro-batch, and
    /// once in its backward pass.
    fn disk(&self, plan: &TrainingPlan, target: &PlanTarget) -> Option<DiskReads> {
        let limit = target.limit.as_ref().filter(|_| target.has_disk)?;
        let (own, bytes) = (plan.without_gaps(), limit.bytes as f64);
        let excess = own + plan.mapped - bytes;
        let passes = 2.0 * self.recipe.train.accumulate as f64;
        (own <= bytes && excess > 0.0).then_some(DiskReads {
            weights: excess,
            bytes: passes * excess,
            each: ReadFor::Step,
            bandwidth: target.disk_bandwidth,
        })
    }

    fn title(&self, batch: BatchShape) -> String {
        let train = &self.recipe.train;
        let checkpointing = match train.checkpointing {
            Checkpointing::None => "no checkpointing",
            Checkpointing::Block => "block checkpointing",
        };
        format!(
            "{}\n{} of micro-batches of {} rows with at most {} tokens, {} in a step; compute {}, {checkpointing}",
            described(&self.name, &self.config),
            match train.method {
                Method::Lora => "LoRA",
                Method::Full => "full training",
            },
            batch.rows,
            batch.seq,
            train.accumulate,
            self.recipe.precision.compute_word(),
        )
    }

    fn details(&self, forecast: &Forecast<'_>, plan: &TrainingPlan) -> Vec<PlanLine> {
        let mut other = self.recipe.clone();
        let (name, otherwise) = match other.train.checkpointing {
            Checkpointing::None => (
                "saved activations with block checkpointing",
                Checkpointing::Block,
            ),
            Checkpointing::Block => (
                "saved activations without checkpointing",
                Checkpointing::None,
            ),
        };
        other.train.checkpointing = otherwise;
        let other = forecast.plan_of(&other, forecast.batch);
        let line = |what: &str, bytes| PlanLine {
            what: what.into(),
            bytes,
            note: "",
        };
        vec![
            line("of a step: saved activations", plan.saved),
            line("of a step: gradients", plan.gradients),
            line(name, other.saved),
        ]
    }
}
