//! What a recipe trains: a part of the model's weights, or low-rank updates.

use model::Training;
use model::adapt::{LoraConfig, Scaling};

use super::{Method, Recipe, RouterTraining};

/// The routers' weights, as a pattern.
const ROUTER: &str = "mlp.gate";

impl Recipe {
    /// The low-rank updates, with what `train.router` adds to their targets.
    pub(crate) fn lora_config(&self) -> LoraConfig {
        let lora = &self.lora;
        let router = |training| (self.train.router == Some(training)).then(|| ROUTER.to_owned());
        let with = |patterns: &[String], more: Option<String>| {
            patterns.iter().cloned().chain(more).collect()
        };
        LoraConfig {
            target: with(&lora.target, router(RouterTraining::Trainable)),
            exclude: with(&lora.exclude, router(RouterTraining::Frozen)),
            rank: lora.rank,
            alpha: lora.alpha,
            scaling: if lora.use_rslora {
                Scaling::RsLora
            } else {
                Scaling::Plain
            },
            rank_pattern: lora.rank_pattern.0.clone(),
            alpha_pattern: lora.alpha_pattern.0.clone(),
            dropout: lora.dropout as f32,
            seed: self.train.seed,
            use_dora: lora.use_dora,
            experts_share: lora.experts_share,
        }
    }

    /// The part of the model's own weights that is trained.
    pub(crate) fn training(&self) -> Training {
        let train = &self.train;
        if train.method == Method::Lora {
            return Training::Frozen;
        }
        let (mut patterns, mut frozen) = (train.unfrozen_parameters.clone(), vec![]);
        let all = patterns.is_empty();
        if all {
            patterns.push("*".into());
        }
        match train.router {
            Some(RouterTraining::Frozen | RouterTraining::BiasOnly) => frozen.push(ROUTER.into()),
            Some(RouterTraining::Trainable) if !all => patterns.push(ROUTER.into()),
            _ => {}
        }
        if all && frozen.is_empty() {
            return Training::Full;
        }
        Training::Subset(patterns, frozen)
    }

    /// Whether some weights are trained and others are not.
    pub(crate) fn is_partial(&self) -> bool {
        matches!(self.training(), Training::Subset(..))
    }
}
