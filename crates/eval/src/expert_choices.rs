//! The experts that models choose for the same tokens: how many differ, and how differently loaded the experts are.
//!
//! Source of the divergence of loads: J. Lin, IEEE Transactions on Information Theory 37 (1991) (Jensen-Shannon).

use burn::tensor::{Int, Tensor, TensorData};
use model::{Compute, ForwardContext, Model, Recorder, routing_drift};
use serde::{Deserialize, Serialize};

use crate::logits::RoutingChoices;

/// The experts that a model chooses for the tokens of some sequences.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertChoices {
    /// The sequences.
    ids: Vec<Vec<u32>>,
    layers: Vec<LayerChoices>,
}

#[derive(Clone, Debug, PartialEq)]
struct LayerChoices {
    layer: usize,
    top_k: usize,
    n_experts: usize,
    /// `[tokens, top_k]` of all sequences.
    ids: Vec<u32>,
}

/// The choices of a model compared with those of an earlier one for the same tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoutingComparison {
    /// The model.
    pub model: String,
    /// The earlier model.
    pub baseline: String,
    /// Tokens.
    pub tokens: usize,
    /// The layers that are mixtures in both, with the same number of experts and the same top-k.
    pub layers: Vec<LayerDivergence>,
}

/// A layer's choices compared.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerDivergence {
    /// The layer.
    pub layer: usize,
    /// Share of the model's choices that the earlier model does not make for the same token.
    pub changed: f64,
    /// The Jensen-Shannon divergence of the two models' shares of choices by expert, in bits: 0 if all experts have the same
    /// load, 1 if none has a load in both.
    pub load_divergence: f64,
}

impl ExpertChoices {
    /// What a model chooses for some sequences, none of them empty. A model without experts chooses nothing.
    pub fn new(model: &Model, compute: Compute, sequences: Vec<Vec<u32>>) -> Self {
        let mut layers: Vec<LayerChoices> = Vec::new();
        let device = model.model.norm.weight.val().device();
        for sequence in &sequences {
            let ids: Vec<i32> = sequence.iter().map(|id| *id as i32).collect(); // Below the vocabulary's size.
            let ids = TensorData::new(ids, [1, sequence.len()]);
            let mut recorder = Recorder::of_routing();
            let mut ctx = ForwardContext::recorded(compute, &mut recorder);
            model.hidden(Tensor::<2, Int>::from_data(ids, &device), &mut ctx);
            for record in &recorder.routing {
                let found = RoutingChoices::of(record);
                let ids = found.ids.iter().map(|id| *id as u32); // Numbers of experts.
                match layers.iter_mut().find(|known| known.layer == found.layer) {
                    Some(known) => known.ids.extend(ids),
                    None => layers.push(LayerChoices {
                        layer: found.layer,
                        top_k: found.top_k,
                        n_experts: found.n_experts,
                        ids: ids.collect(),
                    }),
                }
            }
        }
        Self {
            ids: sequences,
            layers,
        }
    }

    /// The comparison with an earlier model's choices; none if the two have no layer to compare, or read other tokens.
    pub fn compare(&self, baseline: &Self) -> Option<(usize, Vec<LayerDivergence>)> {
        let layers = self.layers.iter().filter_map(|layer| {
            let shape = |of: &LayerChoices| (of.layer, of.top_k, of.n_experts);
            let is_same = |other: &&LayerChoices| shape(other) == shape(layer);
            Some(layer.divergence(baseline.layers.iter().find(is_same)?))
        });
        let layers: Vec<LayerDivergence> = layers.collect();
        let tokens = self.ids.iter().map(Vec::len).sum();
        (self.ids == baseline.ids && !layers.is_empty()).then_some((tokens, layers))
    }
}

impl LayerChoices {
    fn divergence(&self, baseline: &Self) -> LayerDivergence {
        let changed = routing_drift(&self.ids, &baseline.ids, self.top_k);
        let [own, others] = [self, baseline].map(Self::shares);
        // The mean divergence of the two from their mean, p ln p being 0 for p = 0.
        let term = |p: f64, mean: f64| if p > 0.0 { p * (p / mean).log2() } else { 0.0 };
        let terms = own.iter().zip(&others).map(|(p, q)| {
            let mean = p.midpoint(*q);
            (term(*p, mean) + term(*q, mean)) / 2.0
        });
        LayerDivergence {
            layer: self.layer,
            changed: changed as f64 / self.ids.len().max(1) as f64,
            load_divergence: terms.sum::<f64>().max(0.0),
        }
    }

    /// Each expert's share of the choices.
    fn shares(&self) -> Vec<f64> {
        let mut shares = vec![0.0; self.n_experts];
        for id in &self.ids {
            if let Some(share) = shares.get_mut(*id as usize) {
                *share += 1.0 / self.ids.len() as f64;
            }
        }
        shares
    }
}

impl RoutingComparison {
    /// Means over the layers.
    pub fn means(&self) -> [f64; 2] {
        let mean = |of: fn(&LayerDivergence) -> f64| {
            self.layers.iter().map(of).sum::<f64>() / self.layers.len().max(1) as f64
        };
        [
            mean(|layer| layer.changed),
            mean(|layer| layer.load_divergence),
        ]
    }

    /// The layer with the most changed choices.
    pub fn most_changed(&self) -> Option<LayerDivergence> {
        let layers = self.layers.iter().copied();
        layers.max_by(|a, b| a.changed.total_cmp(&b.changed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choices(ids: &[u32]) -> ExpertChoices {
        ExpertChoices {
            ids: vec![vec![5; ids.len() / 2]],
            layers: vec![LayerChoices {
                layer: 3,
                top_k: 2,
                n_experts: 4,
                ids: ids.to_vec(),
            }],
        }
    }

    #[test]
    fn loads_may_stay_the_same_while_choices_change() {
        let compare = |a: &[u32], b: &[u32]| {
            let (tokens, layers) = choices(a).compare(&choices(b)).unwrap();
            assert_eq!((tokens, layers.len(), layers[0].layer), (a.len() / 2, 1, 3));
            (layers[0].changed, layers[0].load_divergence)
        };
        assert_eq!(compare(&[0, 1, 2, 3], &[0, 1, 2, 3]), (0.0, 0.0));
        // The order of a token's experts does not count.
        assert_eq!(compare(&[0, 1, 2, 3], &[1, 0, 3, 2]), (0.0, 0.0));
        assert_eq!(compare(&[0, 1, 2, 3], &[2, 3, 0, 1]), (1.0, 0.0));
        assert_eq!(compare(&[0, 1, 0, 1], &[2, 3, 2, 3]), (1.0, 1.0));
        // Shares of 1/2, 1/2, 0 and of 1/2, 1/4, 1/4.
        let (changed, divergence) = compare(&[0, 1, 0, 1], &[0, 1, 0, 2]);
        let expected = 0.5 * (0.5 * (0.5f64 / 0.375).log2())
            + 0.5 * (0.25 * (0.25f64 / 0.375).log2() + 0.25 * (0.25f64 / 0.125).log2());
        assert_eq!(changed, 0.25);
        assert!(
            (divergence - expected).abs() < 1e-12,
            "{divergence}, not {expected}"
        );
    }

    #[test]
    fn only_the_same_tokens_and_experts_are_compared() {
        let mut other = choices(&[0, 1]);
        assert!(other.compare(&choices(&[0, 1])).is_some());
        other.ids[0][0] = 6;
        assert_eq!(other.compare(&choices(&[0, 1])), None);
        let mut other = choices(&[0, 1]);
        other.layers[0].n_experts = 8;
        assert_eq!(other.compare(&choices(&[0, 1])), None);
        assert_eq!(ExpertChoices::default().compare(&choices(&[0, 1])), None);
    }
}
