//! Fresh low-rank updates, as a config chooses them.

use burn::module::{Param, ParamId};
use burn::tensor::Device;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::attach::{AdaptedModule, ExpertUpdates, UpdateSite, check_dora};
use crate::Error;
use crate::keys::{PROJECTIONS, seed_for};
use crate::modules::experts::{Experts, ExpertsLora, FactorStacks};
use crate::modules::linear::Weight;
use crate::modules::lora::{Dora, Lora, parameter};
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
}

impl LoraConfig {
    fn rank_of(&self, module: &str) -> usize {
        self.rank_pattern
            .iter()
            .find(|(pattern, _)| matches(pattern, module))
            .map_or(self.rank, |(_, rank)| *rank)
    }

    fn alpha_of(&self, module: &str) -> f64 {
        self.alpha_pattern
            .iter()
            .find(|(pattern, _)| matches(pattern, module))
            .map_or(self.alpha, |(_, alpha)| *alpha)
    }

    fn adapts(&self, module: &str) -> bool {
        self.target.iter().any(|pattern| matches(pattern, module))
            && !self.exclude.iter().any(|pattern| matches(pattern, module))
    }

    /// The experts of a layer that the config adapts in a projection: all by the projection's path, or single ones by their own.
    fn adapted_experts(&self, path: &str, projection: &str, n_experts: usize) -> Vec<usize> {
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

    /// The fresh update of a linear layer, if the config adapts it.
    pub(super) fn linear(
        &self,
        site: &UpdateSite<'_>,
        weight: &Weight,
    ) -> Result<Option<(Lora, AdaptedModule)>, Error> {
        let (path, device) = (site.path, site.device);
        if !self.adapts(path) {
            return Ok(None);
        }
        let [out, width] = weight.dims();
        let (rank, alpha) = (self.rank_of(path), self.alpha_of(path));
        let a = uniform(self.seed, path, rank * width, width);
        let mut lora = Lora {
            lora_a: parameter(a, [rank, width], device),
            lora_b: parameter(vec![0.0; out * rank], [out, rank], device),
            scale: self.scaling.scale(alpha, rank),
            dropout: self.dropout,
            dropout_stream: site.number,
            dora: None,
        };
        if self.use_dora {
            check_dora(path)?;
            let norms = lora.row_norms(weight);
            let magnitudes = norms.set_require_grad(device.is_autodiff());
            lora.dora = Some(Dora {
                lora_magnitude_vector: Param::initialized(ParamId::new(), magnitudes),
                norms: None,
            });
        }
        let adapted = AdaptedModule {
            module: path.into(),
            rank,
            alpha,
            parameters: rank * (width + out) + if self.use_dora { out } else { 0 },
        };
        Ok(Some((lora, adapted)))
    }

    /// The fresh updates of a layer's experts, if the config adapts any.
    pub(super) fn experts(
        &self,
        site: &UpdateSite<'_>,
        experts: &Experts,
    ) -> Result<Option<ExpertUpdates>, Error> {
        let [n_experts, inner, hidden] = experts.dims();
        let Some((expert_ids, adapts)) = self.expert_ids(site.path, n_experts)? else {
            return Ok(None);
        };
        if self.use_dora {
            check_dora(site.path)?;
        }
        let mut adapted = Vec::new();
        let mut stacks = |index: usize, widths: [usize; 2]| {
            adapts[index].then(|| {
                let path = format!("{}.{}", site.path, PROJECTIONS[index]);
                let (stacks, module) = self.stacks(&path, expert_ids.len(), widths, site.device);
                adapted.push(module);
                stacks
            })
        };
        let lora = ExpertsLora {
            gate_proj: stacks(0, [hidden, inner]),
            up_proj: stacks(1, [hidden, inner]),
            gate_up_proj: None,
            is_fused: false,
            down_proj: stacks(2, [inner, hidden]),
            dropout: self.dropout,
            dropout_stream: site.number,
        };
        Ok(Some(ExpertUpdates {
            lora,
            subset: Some(expert_ids),
            adapted,
        }))
    }

    /// The adapted experts of a layer, the same for every projection that is adapted, and which projections are; none if none
    /// are.
    fn expert_ids(
        &self,
        path: &str,
        n_experts: usize,
    ) -> Result<Option<(Vec<usize>, [bool; 3])>, Error> {
        let by_projection =
            PROJECTIONS.map(|projection| self.adapted_experts(path, projection, n_experts));
        let mut adapted = by_projection.iter().filter(|ids| !ids.is_empty());
        let Some(expert_ids) = adapted.next() else {
            return Ok(None);
        };
        if let Some(other) = adapted.find(|other| *other != expert_ids) {
            return Err(Error::Unsupported(format!(
                "`{path}`: `lora.target` and `lora.exclude` choose {} experts for one projection and {} for another; \
                 choose the same ones",
                expert_ids.len(),
                other.len()
            )));
        }
        let adapts = [0, 1, 2].map(|index: usize| !by_projection[index].is_empty());
        Ok(Some((expert_ids.clone(), adapts)))
    }

    /// Fresh factors of one projection of `n` experts, of an input and an output width.
    fn stacks(
        &self,
        path: &str,
        n: usize,
        [width, out]: [usize; 2],
        device: &Device,
    ) -> (FactorStacks, AdaptedModule) {
        let (rank, alpha) = (self.rank_of(path), self.alpha_of(path));
        let projection = path.rsplit('.').next().unwrap_or(path);
        let shared = self.experts_share.map(|share| share.factors(projection));
        let shared = shared.unwrap_or_default();
        let [n_a, n_b] = shared.map(|is_shared| if is_shared { 1 } else { n });
        let a = uniform(self.seed, path, n_a * rank * width, width);
        let stacks = FactorStacks {
            lora_a: parameter(a, [n_a, rank, width], device),
            lora_b: parameter(vec![0.0; n_b * out * rank], [n_b, out, rank], device),
            scale: self.scaling.scale(alpha, rank),
        };
        let adapted = AdaptedModule {
            module: path.into(),
            rank,
            alpha,
            parameters: rank * (n_a * width + n_b * out),
        };
        (stacks, adapted)
    }
}

/// PEFT's initialization of `a`: uniform within `±1/√in` (Kaiming with a = √5).
fn uniform(seed: u64, path: &str, n: usize, width: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed_for(seed, path));
    let bound = 1.0 / (width as f32).sqrt();
    (0..n)
        .map(|_| (random.next_u32() >> 8) as f32 / (1u32 << 23) as f32 * bound - bound)
        .collect()
}
