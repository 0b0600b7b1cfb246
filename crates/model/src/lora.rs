//! Low-rank updates: which modules get one, how it is applied, and how adapters in PEFT's two dialects become ours.
//!
//! An update is `scale · b · a` on a weight `[out, in]`, with `a [rank, in]` and `b [out, rank]`. It is applied to the
//! activations, `y += (scale · drop(x) · aᵀ) · bᵀ`, or added to the weight tile by tile where a quantizer rounds the sum;
//! the updated weight is never formed whole while training.
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
use crate::linear::Linear;
use crate::moe::experts::{Experts, ExpertsLora, FactorStacks};
use crate::sites::{Site, matches};

/// The low-rank update of one linear layer.
#[derive(Module, Debug)]
pub struct Lora {
    /// `[rank, in]`.
    pub lora_a: Param<Tensor<2>>,
    /// `[out, rank]`.
    pub lora_b: Param<Tensor<2>>,
    /// Multiplier of the update.
    #[module(skip)]
    pub scale: f32,
    /// Chance of an input element to be dropped.
    #[module(skip)]
    pub dropout: f32,
    /// This site's number, for the dropout's seed.
    #[module(skip)]
    pub site: u64,
}

impl Lora {
    /// Width of the bottleneck.
    pub fn rank(&self) -> usize {
        self.lora_a.val().dims()[0]
    }
}

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
}

/// Puts fresh updates on the modules a config chooses; their effect is zero until they are trained.
///
/// # Errors
/// [`Error::NoMatch`] for a pattern (of `target`, `exclude`, `rank_pattern` or `alpha_pattern`) that matches nothing.
pub fn attach(
    model: &mut Model,
    config: &LoraConfig,
    device: &Device,
) -> Result<Vec<Adapted>, Error> {
    let modules = model.module_paths();
    let named = config
        .rank_pattern
        .iter()
        .map(|(p, _)| p)
        .chain(config.alpha_pattern.iter().map(|(p, _)| p));
    for pattern in config.target.iter().chain(&config.exclude).chain(named) {
        if !modules.iter().any(|module| matches(pattern, module)) {
            return Err(Error::NoMatch {
                pattern: pattern.clone(),
                available: last_names(&modules),
            });
        }
    }
    let mut adapted = Vec::new();
    let mut site_number = 0;
    model.for_each_site(&mut |path, site| {
        site_number += 1;
        match site {
            Site::Linear(linear) if config.adapts(path) => {
                adapted.push(attach_linear(linear, path, config, (site_number, device)))
            }
            Site::Linear(_) => {}
            Site::Experts(experts) => {
                adapted.extend(attach_experts(experts, path, config, (site_number, device)))
            }
        }
    });
    if adapted.is_empty() {
        let pattern = config.target.join(", ");
        return Err(Error::NoMatch {
            pattern,
            available: last_names(&modules),
        });
    }
    Ok(adapted)
}

/// Takes all low-rank updates off a model: what is left is its base. Weights are shared, not copied, so a clone costs
/// nothing.
pub fn detach(model: &mut Model) {
    model.for_each_site(&mut |_, site| match site {
        Site::Linear(linear) => linear.lora = None,
        Site::Experts(experts) => experts.lora = None,
    });
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

fn attach_linear(
    linear: &mut Linear,
    path: &str,
    config: &LoraConfig,
    (site, device): (u64, &Device),
) -> Adapted {
    let ([out, width], rank, alpha) = (
        linear.weight.dims(),
        config.rank_of(path),
        config.alpha_of(path),
    );
    linear.lora = Some(Lora {
        lora_a: parameter(
            uniform(config.seed, path, rank * width, width),
            [rank, width],
            device,
        ),
        lora_b: parameter(vec![0.0; out * rank], [out, rank], device),
        scale: config.scaling.scale(alpha, rank),
        dropout: config.dropout,
        site,
    });
    Adapted {
        module: path.into(),
        rank,
        alpha,
        parameters: rank * (width + out),
    }
}

fn attach_experts(
    experts: &mut Experts,
    path: &str,
    config: &LoraConfig,
    (site, device): (u64, &Device),
) -> Vec<Adapted> {
    let [n_experts, inner, hidden] = experts.dims();
    let mut adapted = Vec::new();
    let mut stacks = |projection: &str, [width, out]: [usize; 2]| {
        let path = format!("{path}.{projection}");
        config.adapts(&path).then(|| {
            let (rank, alpha) = (config.rank_of(&path), config.alpha_of(&path));
            adapted.push(Adapted {
                module: path.clone(),
                rank,
                alpha,
                parameters: n_experts * rank * (width + out),
            });
            FactorStacks {
                lora_a: parameter(
                    uniform(config.seed, &path, n_experts * rank * width, width),
                    [n_experts, rank, width],
                    device,
                ),
                lora_b: parameter(
                    vec![0.0; n_experts * out * rank],
                    [n_experts, out, rank],
                    device,
                ),
                scale: config.scaling.scale(alpha, rank),
            }
        })
    };
    let lora = ExpertsLora {
        gate_proj: stacks("gate_proj", [hidden, inner]),
        up_proj: stacks("up_proj", [hidden, inner]),
        gate_up_proj: None,
        is_fused: false,
        down_proj: stacks("down_proj", [inner, hidden]),
        dropout: config.dropout,
        site,
    };
    if !adapted.is_empty() {
        experts.lora = Some(lora);
    }
    adapted
}

/// A tensor that is trained.
pub(crate) fn parameter<const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    device: &Device,
) -> Param<Tensor<D>> {
    let tensor = Tensor::from_data(TensorData::new(values, shape), device);
    Param::initialized(
        ParamId::new(),
        tensor.set_require_grad(device.is_autodiff()),
    )
}

/// PEFT's initialization of `a`: uniform within `±1/√in` (Kaiming with a = √5).
fn uniform(seed: u64, path: &str, n: usize, width: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(mixed_seed(seed, path));
    let bound = 1.0 / (width as f32).sqrt();
    (0..n)
        .map(|_| (random.next_u32() >> 8) as f32 / (1u32 << 23) as f32 * bound - bound)
        .collect()
}

/// A seed for one named thing, so that its random values do not depend on what else there is. FNV-1a of the name.
pub(crate) fn mixed_seed(seed: u64, name: &str) -> u64 {
    seed ^ name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
