//! AdamW over a model's trained tensors, by name.
//!
//! The moments are f32 or bf16 and the defaults are PyTorch's. The gradients of a step's micro-batches are added up first,
//! so that an update sees one gradient, whatever the number of micro-batches.

use std::collections::BTreeMap;

use kernels::AdamWStep;
use model::Model;

use burn::tensor::{DType, Tensor};

use crate::recipe::{Moments, OptimizerSection, Recipe};

/// The gradients of one step, added up.
#[derive(Clone, Debug, Default)]
pub(crate) struct Accumulated(BTreeMap<String, Tensor<1>>);

impl Accumulated {
    pub(crate) fn add(&mut self, gradients: Vec<(String, Tensor<1>)>) {
        for (name, gradient) in gradients {
            let sum = match self.0.remove(&name) {
                Some(sum) => sum + gradient,
                None => gradient,
            };
            self.0.insert(name, sum);
        }
    }

    /// The sums of squares of each tensor, by name: one, or one for each expert of a stack, as many as `experts` says. The
    /// norm is the root of their sum.
    pub(crate) fn squares<'a>(
        &'a self,
        experts: &'a BTreeMap<String, usize>,
    ) -> impl Iterator<Item = (&'a String, Tensor<1>)> {
        self.iter().map(|(name, sum)| {
            let parts = experts.get(name).copied().unwrap_or(1);
            (name, kernels::sums_of_squares(sum.clone(), parts))
        })
    }

    /// All tensors by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Tensor<1>)> {
        self.0.iter()
    }

    /// A tensor's gradient.
    pub(crate) fn get(&self, name: &str) -> Option<Tensor<1>> {
        self.0.get(name).cloned()
    }
}

/// The scalars of one update.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepScalars {
    /// The update's number, from 1.
    pub(crate) number: u64,
    /// The learning rate.
    pub(crate) rate: f64,
    /// The gradients' norm, without the loss scale.
    pub(crate) norm: f64,
    /// The gradients are larger by this factor.
    pub(crate) loss_scale: f64,
}

/// The optimizer's settings and moments.
#[derive(Debug)]
pub(crate) struct AdamW {
    settings: OptimizerSection,
    /// First and second moment by parameter.
    pub(crate) moments: BTreeMap<String, [Tensor<1>; 2]>,
    /// LoRA+: the learning rate of the second factors over that of everything else.
    lora_b_ratio: f64,
    /// The seed of the moments' stochastic rounding, if they are rounded so.
    noise_seed: Option<u64>,
}

/// Added to the norm before the gradient is clipped by it, as PyTorch's `clip_grad_norm_` does.
const CLIP_EPS: f64 = 1e-6;

impl AdamW {
    pub(crate) fn new(recipe: &Recipe) -> Self {
        let (settings, seed) = (&recipe.optimizer, recipe.train.seed);
        let is_rounded = settings.moments() == Moments::Bf16 && settings.stochastic_rounding;
        Self {
            settings: settings.clone(),
            moments: BTreeMap::new(),
            lora_b_ratio: recipe.lora.loraplus_lr_ratio,
            noise_seed: is_rounded.then_some(seed),
        }
    }

    /// Updates a model's trained tensors. `first_element` numbers the first value of those that are parts of a tensor.
    pub(crate) fn step(
        &mut self,
        model: &mut Model,
        mut gradients: Accumulated,
        scalars: StepScalars,
        first_element: &dyn Fn(&str) -> usize,
    ) {
        let StepScalars {
            number,
            rate,
            norm,
            loss_scale,
        } = scalars;
        let OptimizerSection {
            betas,
            eps,
            weight_decay,
            clip,
            ..
        } = self.settings;
        let clipped = if clip > 0.0 {
            (clip / (norm + CLIP_EPS)).min(1.0)
        } else {
            1.0
        };
        let step = AdamWStep {
            rate,
            betas,
            eps,
            weight_decay,
            number,
            gradient_scale: clipped / loss_scale,
            noise: None,
            first: 0,
        };
        let dtype = self.settings.moments().float();
        model.map_parameters(&mut |name, values| {
            let Some(gradient) = gradients.0.remove(name) else {
                return values;
            };
            let zeros = || Tensor::zeros(values.dims(), (&values.device(), DType::from(dtype)));
            let moments = self.moments.remove(name);
            let moments = moments.unwrap_or_else(|| [zeros(), zeros()]);
            let is_lora_b = name.ends_with(".lora_b");
            let step = AdamWStep {
                rate: rate * if is_lora_b { self.lora_b_ratio } else { 1.0 },
                weight_decay: if self.settings.decays(name) {
                    weight_decay
                } else {
                    0.0
                },
                noise: self.noise_seed.map(|seed| noise_seed(seed, name, number)),
                first: first_element(name) as u64,
                ..step
            };
            let (values, moments) = kernels::adamw(values, gradient, moments, step);
            self.moments.insert(name.into(), moments);
            values
        });
    }
}

/// A seed for one parameter in one update, which depends on nothing else.
fn noise_seed(seed: u64, name: &str, number: u64) -> u64 {
    let bytes = number.to_le_bytes().into_iter().chain(name.bytes());
    checkpoint::fnv1a(seed, bytes)
}
