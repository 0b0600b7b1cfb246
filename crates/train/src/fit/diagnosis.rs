//! The origin of a number that is not finite.

use burn::module::Module;
use burn::tensor::Tensor;
use data::Batch;
use kernels::device::read_ints;
use model::{ForwardContext, Recorder};

use super::forward::losses;
use crate::Result;
use crate::optimizer::Accumulated;
use crate::session::Session;

impl Session {
    /// The first tensor that is not finite on the way from the weights to the gradients: a trained weight, the residual
    /// stream after a part of the model, the loss, or a gradient, starting with those next to the loss.
    ///
    /// # Errors
    /// If ranks lose each other.
    pub(crate) fn first_not_finite(
        &self,
        batches: &[Batch],
        gradients: &Accumulated,
    ) -> Result<String> {
        // Ranks have different shards and gradients, and must go on together.
        let of_any = |tensors: &mut dyn Iterator<Item = (&String, Tensor<1>)>| {
            let bad = tensors.filter(|(_, values)| !is_finite(values.clone()));
            self.ranks
                .names_of_any(bad.map(|(name, _)| name.clone()).collect())
        };
        let parameters = self.model.parameters();
        let mut values = parameters.iter().map(|p| (&p.name, p.values.clone()));
        let bad = of_any(&mut values)?;
        if let Some(parameter) = parameters.iter().find(|p| bad.contains(&p.name)) {
            return Ok(format!("the weight `{}`", parameter.name));
        }
        let bad = of_any(&mut gradients.iter().map(|(name, sum)| (name, sum.clone())))?;
        let (model, device) = (self.model.clone().valid(), self.device());
        for batch in batches {
            let mut recorder = Recorder::of_residuals();
            let mut ctx = ForwardContext::recorded(self.compute(), &mut recorder);
            let losses = losses(&model, batch, &mut ctx, &device);
            let mut sums = recorder.residuals.into_iter();
            if let Some((path, _)) = sums.find(|(_, sum)| !is_finite(sum.clone().flatten(0, 1))) {
                return Ok(format!("the residual stream after `{path}`"));
            }
            if !is_finite(losses) {
                return Ok("the loss".into());
            }
        }
        let mut named = parameters.iter().rev().map(|parameter| &parameter.name);
        Ok(match named.find(|name| bad.contains(*name)) {
            Some(name) => format!("the gradient of `{name}`"),
            None => "the sum of the gradients' squares".into(),
        })
    }
}

fn is_finite(values: Tensor<1>) -> bool {
    read_ints(values.is_finite().all().int()) == [1]
}
