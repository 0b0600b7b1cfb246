//! The config of low-rank updates: modules, sizes and scales.

use crate::config::ModelConfig;
use crate::keys::{Module, PROJECTIONS};
use crate::patterns::matches;

/// Which modules get an update, and of what size.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Patterns of module paths; see [`matches()`].
    pub target: Vec<String>,
    /// Patterns of modules to leave out.
    pub exclude: Vec<String>,
    /// Width of the bottleneck.
    pub rank: usize,
    /// `scale = alpha / rank`, or `alpha / √rank` with `rslora`.
    pub alpha: f64,
    /// How alpha becomes a scale.
    pub scaling: Scaling,
    /// Ranks of modules that match a pattern; the first match counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of modules that match a pattern; the first match counts.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Probability of dropping an input element.
    pub dropout: f32,
    /// Seed of the fresh factors.
    pub seed: u64,
    /// Whether the lengths of rows are trained too.
    pub use_dora: bool,
    /// Which factors the experts of a layer share.
    pub experts_share: Option<Share>,
}

/// Which factors of their updates the experts of a layer share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// The first of every projection.
    A,
    /// The second of every projection.
    B,
    /// Those of the residual stream's width: the first of gate and up, the second of down.
    Outer,
}

impl Share {
    /// Its name in adapters.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "A",
            Self::B => "B",
            Self::Outer => "outer",
        }
    }

    /// The one with a name.
    pub fn named(name: &str) -> Option<Self> {
        let mut all = [Self::A, Self::B, Self::Outer].into_iter();
        all.find(|share| share.name() == name)
    }

    /// Whether one projection's first and second factor are shared.
    pub(crate) fn factors(self, projection: &str) -> [bool; 2] {
        match self {
            Self::A => [true, false],
            Self::B => [false, true],
            Self::Outer => [projection != "down_proj", projection == "down_proj"],
        }
    }
}

/// How alpha becomes a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scaling {
    /// `alpha / rank`.
    Plain,
    /// `alpha / √rank`, arXiv:2312.03732.
    RsLora,
}

impl Scaling {
    /// The multiplier of an update.
    pub fn scale(self, alpha: f64, rank: usize) -> f32 {
        match self {
            Self::Plain => (alpha / rank as f64) as f32,
            Self::RsLora => (alpha / (rank as f64).sqrt()) as f32,
        }
    }

    /// The alpha with which an update of another rank has the same multiplier.
    pub(super) fn alpha(self, alpha: f64, [rank, other]: [usize; 2]) -> f64 {
        let ratio = other as f64 / rank as f64;
        match self {
            Self::Plain => alpha * ratio,
            Self::RsLora => alpha * ratio.sqrt(),
        }
    }
}

impl LoraConfig {
    pub(crate) fn rank_of(&self, module: &str) -> usize {
        self.rank_pattern
            .iter()
            .find(|(pattern, _)| matches(pattern, module))
            .map_or(self.rank, |(_, rank)| *rank)
    }

    pub(super) fn alpha_of(&self, module: &str) -> f64 {
        self.alpha_pattern
            .iter()
            .find(|(pattern, _)| matches(pattern, module))
            .map_or(self.alpha, |(_, alpha)| *alpha)
    }

    pub(crate) fn adapts(&self, module: &str) -> bool {
        self.target.iter().any(|pattern| matches(pattern, module))
            && !self.exclude.iter().any(|pattern| matches(pattern, module))
    }

    /// Whether the config adapts any expert of a model.
    pub fn adapts_experts(&self, config: &ModelConfig) -> bool {
        let Some(moe) = &config.moe else {
            return false;
        };
        let mut layers = (0..config.num_hidden_layers).filter(|layer| moe.is_moe_layer(*layer));
        layers.any(|layer_idx| {
            let path = Module::Experts.path(Some(layer_idx));
            let adapted = |projection: &&str| {
                !self
                    .adapted_experts(&path, projection, moe.n_routed_experts)
                    .is_empty()
            };
            PROJECTIONS.iter().any(adapted)
        })
    }

    /// The experts of a layer that the config adapts in a projection: all by the projection's path, or single ones by their own.
    pub(crate) fn adapted_experts(
        &self,
        path: &str,
        projection: &str,
        n_experts: usize,
    ) -> Vec<usize> {
        let all_experts = format!("{path}.{projection}");
        let any = |patterns: &[String], module: &str| {
            let mut patterns = patterns.iter();
            patterns.any(|pattern| matches(pattern, &all_experts) || matches(pattern, module))
        };
        let is_adapted = |expert: &usize| {
            let module = format!("{path}.{expert}.{projection}");
            any(&self.target, &module) && !any(&self.exclude, &module)
        };
        (0..n_experts).filter(is_adapted).collect()
    }
}
