//! Low-rank updates: which modules get one, how it is applied, and how adapters in PEFT's two dialects become ours.
//!
//! An update is `scale · b · a` on a weight `[out, in]`, with `a [rank, in]` and `b [out, rank]`. It is applied to the
//! activations, `y += (scale · drop(x) · aᵀ) · bᵀ`, or added to the weight tile by tile where a quantizer rounds the sum;
//! the updated weight is never formed whole while training (with DoRA on a trained weight it is, for its norms).
//!
//! DoRA (arXiv:2402.09353) gives every row of the updated weight a trained length: `m_i · (w + scale · b · a)_i / ‖·‖`, with
//! the norm a constant of the gradient.
//!
//! Dialects for routed experts (ARCHITECTURE of the formats, not of the update): *classic* has one pair per expert and
//! projection; *fused* (PEFT today) has two pairs of stacked factors per layer, `gate_up_proj` and `down_proj`, `A` with
//! rows `expert · rank + j` and `B` with columns `j · experts + expert`.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::Error;
use crate::decoder::Model;
use crate::modules::linear::Linear;
use crate::modules::experts::{Experts, ExpertsLora, FactorStacks};
use crate::decoder::visit::{PROJECTIONS, Site, matches};

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
    /// Which of the two scales.
    pub scaling: Scaling,
    /// Ranks of modules that match a pattern; the first match counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of modules that match a pattern; the first match counts.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Chance of an input element to be dropped.
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
    /// What adapters call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "A",
            Self::B => "B",
            Self::Outer => "outer",
        }
    }

    /// What an adapter calls so.
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

/// One adapted module, for the table that is printed.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapted {
    /// Path of the module, a layer's experts counted once per projection.
    pub module: String,
    /// Width of the bottleneck.
    pub rank: usize,
    /// Alpha.
    pub alpha: f64,
    /// Trained numbers.
    pub parameters: usize,
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

    /// The experts of a layer whose updates are asked for, by projection: all of them by the projection's path, or single
    /// ones by their own.
    fn chosen_experts(&self, path: &str, projection: &str, n_experts: usize) -> Vec<usize> {
        let of_all = format!("{path}.{projection}");
        let any = |patterns: &[String], module: &str| {
            let mut patterns = patterns.iter();
            patterns.any(|pattern| matches(pattern, &of_all) || matches(pattern, module))
        };
        let is_chosen = |expert: &usize| {
            let module = format!("{path}.{expert}.{projection}");
            any(&self.target, &module) && !any(&self.exclude, &module)
        };
        (0..n_experts).filter(is_chosen).collect()
    }
}

/// Puts fresh updates on the modules a config chooses; their effect is zero until they are trained.
///
/// # Errors
/// [`Error::NoMatch`] for a pattern (of `target`, `exclude`, `rank_pattern` or `alpha_pattern`) that matches nothing;
/// [`Error::Unsupported`] for experts whose projections are chosen apart, and for modules that have no DoRA.
pub fn attach(
    model: &mut Model,
    config: &LoraConfig,
    device: &Device,
) -> Result<Vec<Adapted>, Error> {
    check_patterns(model, config)?;
    let (mut adapted, mut failure, mut site_number) = (Vec::new(), None, 0);
    model.for_each_site(&mut |path, site| {
        site_number += 1;
        let found = match site {
            Site::Linear(linear) if config.adapts(path) => {
                attach_linear(linear, path, config, (site_number, device)).map(|one| vec![one])
            }
            Site::Linear(_) => Ok(vec![]),
            Site::Experts(experts) => attach_experts(experts, path, config, (site_number, device)),
        };
        match found {
            Ok(found) => adapted.extend(found),
            Err(error) => failure = failure.take().or(Some(error)),
        }
    });
    match failure {
        Some(error) => Err(error),
        None if adapted.is_empty() => Err(Error::NoMatch {
            pattern: config.target.join(", "),
            available: last_names(&model.module_paths()),
        }),
        None => Ok(adapted),
    }
}

/// Refuses a pattern that chooses nothing.
fn check_patterns(model: &Model, config: &LoraConfig) -> Result<(), Error> {
    let (modules, experts) = (model.module_paths(), model.expert_paths());
    let ranks = config.rank_pattern.iter().map(|(pattern, _)| pattern);
    let alphas = config.alpha_pattern.iter().map(|(pattern, _)| pattern);
    let of_modules = ranks.chain(alphas).map(|pattern| (pattern, false));
    let chosen = config.target.iter().chain(&config.exclude);
    for (pattern, may_be_expert) in chosen.map(|pattern| (pattern, true)).chain(of_modules) {
        let any = |paths: &[String]| paths.iter().any(|path| matches(pattern, path));
        let is_known = any(&modules) || (may_be_expert && any(&experts));
        if !is_known {
            return Err(Error::NoMatch {
                pattern: pattern.clone(),
                available: last_names(&modules),
            });
        }
    }
    Ok(())
}

fn last_names(modules: &[String]) -> String {
    let mut names: Vec<&str> = modules
        .iter()
        .filter_map(|module| module.rsplit('.').next())
        .collect();
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}

/// Refuses DoRA where there is none: PEFT has none for experts either, and the loss never holds the head's outputs.
pub(crate) fn check_dora(path: &str) -> Result<(), Error> {
    let is_expert = path.contains(".experts");
    if !is_expert && path != "lm_head" {
        return Ok(());
    }
    let (what, pattern) = if is_expert {
        ("routed experts", "experts")
    } else {
        ("the output head", "lm_head")
    };
    Err(Error::Unsupported(format!(
        "`{path}`: DoRA is for linear layers, not for {what}; leave them out with \
         `lora.exclude = [\"{pattern}\"]`, or set `lora.use_dora` to false"
    )))
}

fn attach_linear(
    linear: &mut Linear,
    path: &str,
    config: &LoraConfig,
    (site, device): (u64, &Device),
) -> Result<Adapted, Error> {
    let ([out, width], rank, alpha) = (
        linear.weight.dims(),
        config.rank_of(path),
        config.alpha_of(path),
    );
    let mut lora = Lora {
        lora_a: parameter(
            uniform(config.seed, path, rank * width, width),
            [rank, width],
            device,
        ),
        lora_b: parameter(vec![0.0; out * rank], [out, rank], device),
        scale: config.scaling.scale(alpha, rank),
        dropout: config.dropout,
        site,
        dora: None,
    };
    if config.use_dora {
        check_dora(path)?;
        let norms = lora.row_norms(&linear.weight);
        lora.dora = Some(Dora {
            lora_magnitude_vector: Param::initialized(
                ParamId::new(),
                norms.set_require_grad(device.is_autodiff()),
            ),
            norms: None,
        });
    }
    linear.lora = Some(lora);
    Ok(Adapted {
        module: path.into(),
        rank,
        alpha,
        parameters: rank * (width + out) + if config.use_dora { out } else { 0 },
    })
}

fn attach_experts(
    experts: &mut Experts,
    path: &str,
    config: &LoraConfig,
    (site, device): (u64, &Device),
) -> Result<Vec<Adapted>, Error> {
    let [n_experts, inner, hidden] = experts.dims();
    let by_projection =
        PROJECTIONS.map(|projection| config.chosen_experts(path, projection, n_experts));
    let Some(chosen) = by_projection.iter().find(|chosen| !chosen.is_empty()) else {
        return Ok(vec![]);
    };
    if let Some(other) = by_projection
        .iter()
        .find(|other| !other.is_empty() && *other != chosen)
    {
        return Err(Error::Unsupported(format!(
            "`{path}`: `lora.target` and `lora.exclude` choose {} experts for one projection and {} for another; \
             choose the same ones",
            chosen.len(),
            other.len()
        )));
    }
    if config.use_dora {
        check_dora(path)?;
    }
    let mut adapted = Vec::new();
    let mut stacks = |index: usize, [width, out]: [usize; 2]| {
        let path = format!("{path}.{}", PROJECTIONS[index]);
        let n = by_projection[index].len();
        (n > 0).then(|| {
            let (stacks, one) = fresh_stacks(config, &path, (n, [width, out]), device);
            adapted.push(one);
            stacks
        })
    };
    let lora = ExpertsLora {
        gate_proj: stacks(0, [hidden, inner]),
        up_proj: stacks(1, [hidden, inner]),
        gate_up_proj: None,
        is_fused: false,
        down_proj: stacks(2, [inner, hidden]),
        dropout: config.dropout,
        site,
    };
    experts.choose(chosen.clone());
    experts.lora = Some(lora);
    Ok(adapted)
}

/// Fresh factors of one projection of `n` experts.
fn fresh_stacks(
    config: &LoraConfig,
    path: &str,
    (n, [width, out]): (usize, [usize; 2]),
    device: &Device,
) -> (FactorStacks, Adapted) {
    let (rank, alpha) = (config.rank_of(path), config.alpha_of(path));
    let projection = path.rsplit('.').next().unwrap_or(path);
    let shared = config.experts_share.map(|share| share.factors(projection));
    let [n_a, n_b] = shared
        .unwrap_or_default()
        .map(|is_shared| if is_shared { 1 } else { n });
    let stacks = FactorStacks {
        lora_a: parameter(
            uniform(config.seed, path, n_a * rank * width, width),
            [n_a, rank, width],
            device,
        ),
        lora_b: parameter(vec![0.0; n_b * out * rank], [n_b, out, rank], device),
        scale: config.scaling.scale(alpha, rank),
    };
    let adapted = Adapted {
        module: path.into(),
        rank,
        alpha,
        parameters: rank * (n_a * width + n_b * out),
    };
    (stacks, adapted)
}

/// PEFT's initialization of `a`: uniform within `±1/√in` (Kaiming with a = √5).
fn uniform(seed: u64, path: &str, n: usize, width: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(mixed_seed(seed, path));
    let bound = 1.0 / (width as f32).sqrt();
    (0..n)
        .map(|_| (random.next_u32() >> 8) as f32 / (1u32 << 23) as f32 * bound - bound)
        .collect()
}
