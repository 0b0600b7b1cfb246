//! The origin of a number that is not finite.

use burn::module::Module;
use burn::tensor::Tensor;
use data::Batch;
use kernels::device::read_ints;
use model::{ForwardContext, Recorder};

use super::forward::losses;
use crate::optimizer::Accumulated;
use crate::session::Session;

impl Session {
    /// The first tensor that is not finite on the way from the weights to the gradients: a trained weight, the residual
    /// stream after a part of the model, the loss, or a gradient, starting with those next to the loss.
    pub(crate) fn first_not_finite(&self, batches: &[Batch], gradients: &Accumulated) -> String {
        let parameters = self.model.parameters();
        let bad = parameters.iter().find(|p| !is_finite(p.values.clone()));
        let bad = bad.map(|parameter| format!("the weight `{}`", parameter.name));
        // Ranks that share out experts have different weights, and must go on together.
        if let Some(bad) = self.ranks.first_to_say(bad) {
            return bad;
        }
        let (model, device) = (self.model.clone().valid(), self.device());
        for batch in batches {
            let mut recorder = Recorder::of_residuals();
            let mut ctx = ForwardContext::recorded(self.compute(), &mut recorder);
            let losses = losses(&model, batch, &mut ctx, &device);
            let mut sums = recorder.residuals.into_iter();
            if let Some((path, _)) = sums.find(|(_, sum)| !is_finite(sum.clone().flatten(0, 1))) {
                return format!("the residual stream after `{path}`");
            }
            if !is_finite(losses) {
                return "the loss".into();
            }
        }
        let named = parameters.iter().rev().map(|parameter| &parameter.name);
        let mut bad = named.filter(|name| gradients.get(name).is_some_and(|g| !is_finite(g)));
        match bad.next() {
            Some(name) => format!("the gradient of `{name}`"),
            None => "the sum of the gradients' squares".into(),
        }
    }
}

fn is_finite(values: Tensor<1>) -> bool {
    read_ints(values.is_finite().all().int()) == [1]
}
