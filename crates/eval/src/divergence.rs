//! How far the predictions of one model are from another's, and how far their routers' choices.

use data::Sample;
use model::{Compute, Model, routing_drift};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::logits::{Logits, Picks};
use crate::losses::SampleLoss;
use crate::perplexity::ratio_standard_error;

/// What a model predicts, against a reference.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Divergence {
    /// Mean Kullback-Leibler divergence from the reference to the model, in nats per target.
    pub kl: f64,
    /// Of `kl`, from how samples differ; none below two of them.
    pub kl_error: Option<f64>,
    /// Share of the targets for which both find the same token most probable.
    pub top1_agreement: f64,
    /// Loss of the reference, in nats per target.
    pub reference_loss: f64,
    /// Loss of the model.
    pub loss: f64,
    /// How many targets there are.
    pub targets: usize,
    /// Of every layer that is a mixture in both, of as many experts of which a token takes as many.
    pub routing: Vec<RoutingDivergence>,
}

/// What a layer's router chooses, against the reference's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoutingDivergence {
    /// Which layer.
    pub layer: usize,
    /// Share of the model's picks that the reference does not make for the same token.
    pub moved: f64,
    /// How many picks there are.
    pub picks: usize,
}

impl Divergence {
    /// One line.
    pub fn to_text(&self) -> String {
        let error = self
            .kl_error
            .map_or(String::new(), |error| format!(" ± {error:.1e}"));
        format!(
            "over {} targets: KL {:.2e}{error} nats, the same most probable token for {:.1} %, loss {:.4} to {:.4}",
            self.targets,
            self.kl,
            100.0 * self.top1_agreement,
            self.reference_loss,
            self.loss
        )
    }
}

/// Compares the second of two models with the first, the reference, which computes in f32. `progress` is told how many are done and how many there are.
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
        let [(expected, base), (found, picks)] = [(reference, Compute::F32), (model, compute)]
            .map(|(model, compute)| Logits::with_picks(model, compute, sample));
        compare_picks(&mut routing, &picks, &base);
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

/// Adds the picks of one sample; `moved` is their number until all are there.
fn compare_picks(routing: &mut Vec<RoutingDivergence>, picks: &[Picks], base: &[Picks]) {
    for picks in picks {
        let is_same = |base: &&Picks| {
            let shape = |picks: &Picks| (picks.layer, picks.top_k, picks.n_experts);
            shape(base) == shape(picks)
        };
        let Some(base) = base.iter().find(is_same) else {
            continue;
        };
        let moved = routing_drift(&picks.ids, &base.ids, picks.top_k) as f64;
        match routing.iter_mut().find(|found| found.layer == picks.layer) {
            Some(found) => {
                found.moved += moved;
                found.picks += picks.ids.len();
            }
            None => routing.push(RoutingDivergence {
                layer: picks.layer,
                moved,
                picks: picks.ids.len(),
            }),
        }
    }
}

impl RoutingDivergence {
    fn mean(self) -> Self {
        Self {
            moved: self.moved / self.picks as f64,
            ..self
        }
    }
}
