//! How far the predictions of one model are from another's.

use data::Sample;
use model::Model;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::logits::Logits;

/// What a model predicts, against a reference.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Divergence {
    /// Mean Kullback-Leibler divergence from the reference to the model, in nats per target.
    pub kl: f64,
    /// Share of the targets for which both find the same token most probable.
    pub top1_agreement: f64,
    /// Loss of the reference, in nats per target.
    pub reference_loss: f64,
    /// Loss of the model.
    pub loss: f64,
    /// How many targets there are.
    pub targets: usize,
}

/// Compares a model with a reference on samples. `progress` is told how many are done and how many there are.
///
/// # Errors
/// If there is no target, or a loss is not finite.
pub fn divergence(
    reference: &Model,
    model: &Model,
    samples: &[Sample],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Divergence> {
    let (mut kl, mut agreed, mut losses, mut targets) = (0.0, 0, [0.0; 2], 0);
    for (number, sample) in samples.iter().enumerate() {
        if sample.trained_tokens() == 0 {
            continue;
        }
        let [expected, found] = [reference, model].map(|model| Logits::of(model, sample));
        kl += expected.divergence_to(&found);
        agreed += expected.agreement_with(&found);
        losses[0] += expected.loss();
        losses[1] += found.loss();
        targets += expected.targets.len();
        let loss = losses[0] + losses[1];
        if !loss.is_finite() {
            return Err(Error::NotFinite {
                sample: number,
                loss,
            });
        }
        progress(number + 1, samples.len());
    }
    if targets == 0 {
        return Err(Error::Nothing { expected: "target" });
    }
    let n = targets as f64;
    Ok(Divergence {
        kl: kl / n,
        top1_agreement: agreed as f64 / n,
        reference_loss: losses[0] / n,
        loss: losses[1] / n,
        targets,
    })
}
