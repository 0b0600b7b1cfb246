//! What makes a run smaller, with what it costs.

use std::fmt::{Display, Formatter};

use ::train::{BatchShape, Forecast, Loss, Method, Moments, Recipe, TrainingPlan};
use model::export::WeightFormat;
use model::export::mix::{Mix, MixScheme};
use model::footprint::{StoredAs, WeightBytes, stored_bytes};
use model::{Checkpointing, ModelConfig, OperandRounding};
use serde_json::{Value, json};

use super::lines::size;
use crate::host::machine::MemoryLimit;

/// A change that saves memory.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Knob {
    /// What to type.
    pub(crate) change: String,
    /// Bytes that it saves by itself.
    pub(crate) saved_bytes: f64,
    /// What is given up for it.
    pub(crate) cost: String,
    /// Whether the run fits with it alone; none if no limit is known.
    pub(crate) fits: Option<bool>,
}

impl Knob {
    pub(super) fn to_json(&self) -> Value {
        json!({
            "change": self.change,
            "saved_bytes": self.saved_bytes.round(),
            "cost": self.cost,
            "fits": self.fits,
        })
    }
}

impl Display for Knob {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let saved = size(self.saved_bytes);
        write!(f, "{}  saves {saved}; {}", self.change, self.cost)?;
        match self.fits {
            Some(true) => f.write_str("; fits"),
            _ => Ok(()),
        }
    }
}

/// A changed recipe.
struct RecipeChange {
    settings: Vec<(&'static str, String)>,
    cost: &'static str,
    recipe: Recipe,
    batch: BatchShape,
}

/// What makes a training run smaller, the cheapest first: what changes no number of the result, then what changes its rounding,
/// then what is trained on and how much.
pub(crate) fn training_knobs(forecast: &Forecast<'_>, limit: Option<u64>) -> Vec<Knob> {
    let now = forecast.plan();
    let fits_without_weights = limit.is_some_and(|limit| now.without_gaps() <= limit as f64);
    // If only weights do not stay, it fits when they do.
    let needed = |plan: &TrainingPlan| match fits_without_weights {
        true => plan.own() + plan.mapped,
        false => plan.without_gaps(),
    };
    let now = now.own();
    let knobs = changes(forecast).into_iter().map(|change| {
        let plan = forecast.plan_of(&change.recipe, change.batch);
        let settings = change.settings.iter();
        let settings: Vec<String> = settings
            .map(|(key, value)| format!("--set {key}={value}"))
            .collect();
        Knob {
            change: settings.join(" "),
            saved_bytes: now - plan.own(),
            cost: change.cost.to_owned(),
            fits: limit.map(|limit| needed(&plan) <= limit as f64),
        }
    });
    // Less than a hundredth is no help.
    let mut knobs: Vec<Knob> = knobs
        .filter(|knob| knob.saved_bytes > now / 100.0)
        .collect();
    // What is enough by itself comes first.
    knobs.sort_by_key(|knob| knob.fits != Some(true));
    knobs
}

/// The recipe with all that costs least until it fits: settings for it, and its plan; none if nothing is enough.
pub(crate) fn proposal(forecast: &Forecast<'_>, limit: u64) -> Option<(String, TrainingPlan)> {
    let fits = |plan: &TrainingPlan| plan.without_gaps() <= limit as f64;
    let mut settings: Vec<(&'static str, String)> = Vec::new();
    let (mut recipe, mut batch) = (forecast.recipe.clone(), forecast.batch);
    loop {
        let current = KnobCandidate {
            recipe: &recipe,
            batch,
        };
        let before = forecast.plan_of(&recipe, batch);
        let mut next = current.changes().into_iter().filter(|change| {
            let plan = forecast.plan_of(&change.recipe, change.batch);
            plan.own() < 0.99 * before.own()
        });
        let change = next.next()?;
        for (key, value) in change.settings {
            settings.retain(|(known, _)| *known != key);
            settings.push((key, value));
        }
        (recipe, batch) = (change.recipe, change.batch);
        let plan = forecast.plan_of(&recipe, batch);
        if fits(&plan) {
            let words: Vec<String> = settings
                .iter()
                .map(|(key, value)| format!("--set {key}={value}"))
                .collect();
            return Some((words.join(" "), plan));
        }
    }
}

/// Weights with fewer bits, if they have more. `others` are the bytes of all but them.
pub(super) fn fewer_bits(
    config: &ModelConfig,
    weights: &WeightBytes,
    others: f64,
    limit: Option<&MemoryLimit>,
) -> Vec<Knob> {
    let four_bits = Mix::new(MixScheme::Q4KM, "").ok().map(StoredAs::Gguf);
    let formats = [
        (Some(StoredAs::Folder(WeightFormat::Fp8)), "hf:fp8", "8"),
        (four_bits, "gguf:q4_k_m", "4 to 6"),
    ];
    let knob = |(stored, format, bits): (Option<StoredAs>, &str, &str)| {
        let smaller = stored_bytes(config, &stored?).all();
        let saved_bytes = weights.all() - smaller;
        (saved_bytes > weights.all() / 10.0).then(|| Knob {
            change: format!("quantize --to {format}"),
            saved_bytes,
            cost: format!("weights with {bits} bits; `quantize --data` shows what it costs"),
            fits: limit.map(|limit| smaller + others <= limit.bytes as f64),
        })
    };
    formats.into_iter().filter_map(knob).collect()
}

/// A recipe that is changed further.
struct KnobCandidate<'a> {
    recipe: &'a Recipe,
    batch: BatchShape,
}

fn changes(forecast: &Forecast<'_>) -> Vec<RecipeChange> {
    KnobCandidate {
        recipe: forecast.recipe,
        batch: forecast.batch,
    }
    .changes()
}

impl KnobCandidate<'_> {
    fn changes(&self) -> Vec<RecipeChange> {
        let all = [
            self.checkpointing(),
            self.smaller_batch(),
            self.bf16_moments(),
            self.bf16(),
            self.lora(),
            self.shorter_rows(),
            self.lower_rank(),
            self.attention_only(),
        ];
        all.into_iter().flatten().collect()
    }

    fn change(
        &self,
        settings: Vec<(&'static str, String)>,
        cost: &'static str,
        edit: impl FnOnce(&mut Recipe),
    ) -> RecipeChange {
        let mut recipe = self.recipe.clone();
        edit(&mut recipe);
        RecipeChange {
            settings,
            cost,
            recipe,
            batch: self.batch,
        }
    }

    fn checkpointing(&self) -> Option<RecipeChange> {
        (self.recipe.train.checkpointing == Checkpointing::None).then(|| {
            self.change(
                vec![("train.checkpointing", "block".into())],
                "a step takes about a third longer, with the same bits",
                |recipe| recipe.train.checkpointing = Checkpointing::Block,
            )
        })
    }

    /// Half the rows in twice as many micro-batches.
    fn smaller_batch(&self) -> Option<RecipeChange> {
        let train = &self.recipe.train;
        let (rows, count) = (train.batch_size / 2, train.accumulate.saturating_mul(2));
        let is_even = train.batch_size >= 2 && train.batch_size.is_multiple_of(2);
        (is_even && !self.recipe.data.group_by_length).then(|| {
            let settings = vec![
                ("train.batch_size", rows.to_string()),
                ("train.accumulate", count.to_string()),
            ];
            let mut change = self.change(
                settings,
                "the same step in smaller parts, a little slower",
                |recipe| {
                    (recipe.train.batch_size, recipe.train.accumulate) = (rows, count);
                },
            );
            change.batch.rows = self.batch.rows / 2;
            change.batch.trained_tokens = self.batch.trained_tokens / 2;
            change
        })
    }

    fn bf16_moments(&self) -> Option<RecipeChange> {
        let moments = self.recipe.optimizer.moments.unwrap_or(Moments::F32);
        (moments == Moments::F32).then(|| {
            self.change(
                vec![("optimizer.moments", "bf16".into())],
                "running means with 8 bits, rounded at random",
                |recipe| recipe.optimizer.moments = Some(Moments::Bf16),
            )
        })
    }

    fn bf16(&self) -> Option<RecipeChange> {
        (self.recipe.precision.compute == OperandRounding::F32).then(|| {
            self.change(
                vec![("precision.compute", "bf16".into())],
                "operands of products are rounded to 8 bits",
                |recipe| recipe.precision.compute = OperandRounding::Bf16,
            )
        })
    }

    fn lora(&self) -> Option<RecipeChange> {
        let is_whole = self.recipe.train.method == Method::Full && self.recipe.model.path.is_some();
        is_whole.then(|| {
            self.change(
                vec![("train.method", "lora".into())],
                "an adapter is trained, not the weights",
                |recipe| {
                    recipe.train.method = Method::Lora;
                    recipe.train.unfrozen_parameters.clear();
                },
            )
        })
    }

    fn shorter_rows(&self) -> Option<RecipeChange> {
        let shorter = self.batch.seq / 2;
        (shorter >= 64).then(|| {
            let settings = vec![("data.max_length", shorter.to_string())];
            let mut change = self.change(settings, "longer rows are cut off there", |recipe| {
                recipe.data.max_length = shorter as usize;
            });
            change.batch.seq = shorter;
            change.batch.trained_tokens = self.batch.trained_tokens / 2;
            change
        })
    }

    /// Whether updates are made, by the recipe's rank and targets.
    fn is_fresh(&self) -> bool {
        self.recipe.train.method == Method::Lora && self.recipe.model.adapter.is_none()
    }

    fn lower_rank(&self) -> Option<RecipeChange> {
        let rank = self.recipe.lora.rank / 2;
        (self.is_fresh() && rank >= 4).then(|| {
            self.change(
                vec![("lora.rank", rank.to_string())],
                "an adapter that can learn less",
                |recipe| recipe.lora.rank = rank,
            )
        })
    }

    fn attention_only(&self) -> Option<RecipeChange> {
        let has_all =
            self.recipe.lora.target == ["all-linear"] && self.recipe.lora.exclude.is_empty();
        (self.is_fresh() && has_all && self.recipe.train.loss == Loss::CrossEntropy).then(|| {
            self.change(
                vec![("lora.exclude", "mlp".into())],
                "attention alone is adapted, which learns less",
                |recipe| recipe.lora.exclude = vec!["mlp".into()],
            )
        })
    }
}
