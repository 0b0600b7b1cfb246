//! The divergence of one model's predictions from another's, and of their expert routing.

use data::Sample;
use model::{Compute, Model, routing_drift};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::logits::{Logits, RoutingChoices};
use crate::losses::SampleLoss;
use crate::perplexity::ratio_standard_error;

/// The divergence of a model's predictions from a reference's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Divergence {
    /// Mean Kullback-Leibler divergence from the reference to the model, in nats per target.
    pub kl: f64,
    /// The standard error of `kl` over samples; none below two samples.
    pub kl_error: Option<f64>,
    /// Share of the targets with the same most likely token.
    pub top1_agreement: f64,
    /// Loss of the reference, in nats per target.
    pub reference_loss: f64,
    /// Loss of the model.
    pub loss: f64,
    /// Number of targets.
    pub targets: usize,
    /// The layers that are mixtures in both models, with the same number of experts and the same top-k.
    pub routing: Vec<RoutingDivergence>,
}

/// A layer's expert choices compared with the reference's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoutingDivergence {
    /// The layer.
    pub layer: usize,
    /// Share of the model's choices that the reference does not make for the same token.
    pub changed: f64,
    /// Number of choices.
    pub choices: usize,
}

impl Divergence {
    /// One line.
    pub fn to_text(&self) -> String {
        let error = self
            .kl_error
            .map_or(String::new(), |error| format!(" ± {error:.1e}"));
        format!(
            "over {} targets: KL {:.2e}{error} nats, same most likely token {:.1} %, loss {:.4} to {:.4}",
            self.targets,
            self.kl,
            100.0 * self.top1_agreement,
            self.reference_loss,
            self.loss
        )
    }
}

/// Compares the second of two models with the first, the reference, which computes in f32. `progress` gets the number
/// of samples done and their total.
///
/// # Errors
/// If the models have vocabularies of different sizes, there is no target, or a loss is not finite.
pub fn divergence(
    [reference, model]: [&Model; 2],
    compute: Compute,
    samples: &[Sample],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Divergence> {
    let [expected, found] = [reference, model].map(|model| model.config.vocab_size);
    if expected != found {
        return Err(Error::OtherVocabulary { expected, found });
    }
    let (mut kl, mut agreed, mut losses, mut targets) = (Vec::new(), 0, [0.0; 2], 0);
    let mut routing: Vec<RoutingDivergence> = Vec::new();
    for (number, sample) in samples.iter().enumerate() {
        if sample.trained_tokens() == 0 {
            continue;
        }
        let [(expected, base), (found, routed)] = [(reference, Compute::F32), (model, compute)]
            .map(|(model, compute)| Logits::with_routing(model, compute, sample));
        compare_routing(&mut routing, &routed, &base);
        kl.push(SampleLoss {
            loss_sum: expected.divergence_to(&found),
            tokens: expected.targets.len(),
        });
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
        kl: kl.iter().map(|sample| sample.loss_sum).sum::<f64>() / n,
        kl_error: ratio_standard_error(&kl),
        top1_agreement: agreed as f64 / n,
        reference_loss: losses[0] / n,
        loss: losses[1] / n,
        targets,
        routing: routing.into_iter().map(RoutingDivergence::mean).collect(),
    })
}

/// Adds the choices of one sample; `changed` counts them until the mean is taken.
fn compare_routing(
    routing: &mut Vec<RoutingDivergence>,
    routed: &[RoutingChoices],
    base: &[RoutingChoices],
) {
    for choices in routed {
        let is_same = |base: &&RoutingChoices| {
            let shape =
                |choices: &RoutingChoices| (choices.layer, choices.top_k, choices.n_experts);
            shape(base) == shape(choices)
        };
        let Some(base) = base.iter().find(is_same) else {
            continue;
        };
        let changed = routing_drift(&choices.ids, &base.ids, choices.top_k) as f64;
        let known = routing
            .iter_mut()
            .find(|known| known.layer == choices.layer);
        match known {
            Some(known) => {
                known.changed += changed;
                known.choices += choices.ids.len();
            }
            None => routing.push(RoutingDivergence {
                layer: choices.layer,
                changed,
                choices: choices.ids.len(),
            }),
        }
    }
}

impl RoutingDivergence {
    fn mean(self) -> Self {
        Self {
            changed: self.changed / self.choices as f64,
            ..self
        }
    }
}
