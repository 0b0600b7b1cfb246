//! AdamW over a model's trained tensors, by name.
//!
//! The moments are f32 and the defaults are PyTorch's. Gradients of the micro-batches of a step are added up here
//! first, so a step sees one gradient, whatever the number of micro-batches.

use std::collections::BTreeMap;

use kernels::AdamWStep;
use model::Model;

use burn::tensor::Tensor;

use crate::recipe::OptimizerSection;

/// The gradients of one step, added up.
#[derive(Debug, Default)]
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

    /// The square root of the sum of all squares.
    pub(crate) fn norm(&self) -> f64 {
        let squares = self.0.values().map(|gradient| {
            f64::from(kernels::sum_of_squares(gradient.clone()).into_scalar::<f32>())
        });
        squares.sum::<f64>().sqrt()
    }

    /// A tensor whose gradient is not finite, for a message.
    pub(crate) fn first_not_finite(&self) -> Option<&str> {
        let bad = |gradient: &Tensor<1>| {
            !kernels::sum_of_squares(gradient.clone())
                .into_scalar::<f32>()
                .is_finite()
        };
        self.0
            .iter()
            .find(|(_, gradient)| bad(gradient))
            .map(|(name, _)| name.as_str())
    }
}

/// The optimizer's settings and moments.
#[derive(Debug)]
pub(crate) struct AdamW {
    settings: OptimizerSection,
    /// First and second moment by parameter.
    pub(crate) moments: BTreeMap<String, [Tensor<1>; 2]>,
}

impl AdamW {
    pub(crate) fn new(settings: &OptimizerSection) -> Self {
        Self {
            settings: settings.clone(),
            moments: BTreeMap::new(),
        }
    }

    /// Update number `number`, from 1, at a learning rate; `norm` is the gradients' norm.
    pub(crate) fn step(
        &mut self,
        model: Model,
        mut gradients: Accumulated,
        rate: f64,
        (number, norm): (u64, f64),
    ) -> Model {
        let OptimizerSection {
            betas,
            eps,
            weight_decay,
            clip,
            ..
        } = self.settings;
        let gradient_scale = if clip > 0.0 && norm > clip {
            clip / norm
        } else {
            1.0
        };
        let step = AdamWStep {
            rate,
            betas,
            eps,
            weight_decay,
            number,
            gradient_scale,
        };
        model.map_parameters(&mut |name, values| {
            let gradient = gradients.0.remove(name)?;
            let zeros = || {
                [
                    Tensor::zeros(values.dims(), &values.device()),
                    Tensor::zeros(values.dims(), &values.device()),
                ]
            };
            let moments = self.moments.remove(name).unwrap_or_else(zeros);
            let (values, moments) = kernels::adamw(values, gradient, moments, step);
            self.moments.insert(name.into(), moments);
            Some(values)
        })
    }
}
