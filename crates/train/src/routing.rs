//! The routing of a step or a validation pass: the load of every expert, and the drift from the reference's choices.

use std::collections::BTreeMap;

use model::routing_drift;
use serde::Serialize;

/// Slots per expert, by layer.
pub(crate) type ExpertLoads = Vec<(usize, Vec<f64>)>;

/// The load of one layer's experts over some steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerLoad {
    /// Which layer.
    pub layer: usize,
    /// Entropy of the experts' shares over that of even shares: 1 for even load, 0 if one expert gets everything.
    pub entropy: f64,
    /// Experts without a token.
    pub dead: usize,
    /// Slots per expert.
    pub load: Vec<u64>,
}

/// The drift of one layer's routing from the reference's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerDrift {
    /// Which layer.
    pub layer: usize,
    /// Share of the choices that the reference does not make for the same token.
    pub drift: f64,
}

impl LayerLoad {
    /// Of the counts of one layer.
    pub(crate) fn new(layer: usize, load: &[u64]) -> Self {
        let total: f64 = load.iter().map(|n| *n as f64).sum();
        let shares = load.iter().filter(|n| **n > 0).map(|n| *n as f64 / total);
        let entropy: f64 = shares.map(|share| -share * share.ln()).sum();
        let even = (load.len() as f64).ln();
        Self {
            layer,
            // A single expert is evenly loaded.
            entropy: if even > 0.0 { entropy / even } else { 1.0 },
            dead: load.iter().filter(|n| **n == 0).count(),
            load: load.to_vec(),
        }
    }
}

/// The experts chosen for the tokens of a batch without padding: `top_k` for each token.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BatchChoices {
    layer: usize,
    top_k: usize,
    ids: Vec<u16>,
}

impl BatchChoices {
    /// How often each expert was chosen.
    pub(crate) fn load(&self, n_experts: usize) -> Vec<f64> {
        let mut load = vec![0.0; n_experts];
        for id in &self.ids {
            load[usize::from(*id)] += 1.0;
        }
        load
    }

    /// Of one layer, from the ids of a batch of rows of these lengths padded to `cols`.
    pub(crate) fn new(
        layer: usize,
        top_k: usize,
        ids: impl Iterator<Item = u16>,
        lengths: &[usize],
        cols: usize,
    ) -> Self {
        let ids: Vec<u16> = ids.collect();
        let rows = ids.chunks(cols * top_k).zip(lengths);
        Self {
            layer,
            top_k,
            ids: rows
                .flat_map(|(row, len)| &row[..len * top_k])
                .copied()
                .collect(),
        }
    }
}

/// Adds a layer's load to a sum.
pub(crate) fn add_load(loads: &mut ExpertLoads, layer_idx: usize, load: Vec<f64>) {
    match loads.iter_mut().find(|(layer, _)| *layer == layer_idx) {
        Some((_, sum)) => sum
            .iter_mut()
            .zip(load)
            .for_each(|(sum, load)| *sum += load),
        None => loads.push((layer_idx, load)),
    }
}

/// By layer: choices that the reference does not make for the same token, and all choices.
pub(crate) type DriftCounts = BTreeMap<usize, [u64; 2]>;

/// Counts over some batches. The choices of both models are in the same order.
pub(crate) fn drift_counts(choices: &[BatchChoices], reference: &[BatchChoices]) -> DriftCounts {
    let mut counts = DriftCounts::new();
    for (choices, reference) in choices.iter().zip(reference) {
        let changed = routing_drift(&choices.ids, &reference.ids, choices.top_k);
        let [changed_sum, all] = counts.entry(choices.layer).or_default();
        *changed_sum += changed as u64;
        *all += choices.ids.len() as u64;
    }
    counts
}

/// The drift of every layer.
pub(crate) fn drift(counts: DriftCounts) -> Vec<LayerDrift> {
    let drift = |(layer, [changed, all]): (usize, [u64; 2])| LayerDrift {
        layer,
        drift: changed as f64 / all.max(1) as f64,
    };
    counts.into_iter().map(drift).collect()
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn entropy_and_dead_experts_are_of_the_shares() {
        let even = LayerLoad::new(3, &[7, 7, 7, 7]);
        assert_eq!((even.entropy, even.dead), (1.0, 0));
        let half = LayerLoad::new(3, &[5, 0, 5, 0]);
        assert!(
            (half.entropy - 0.5).abs() < 1e-15 && half.dead == 2,
            "{half:?}"
        );
        assert_eq!(LayerLoad::new(3, &[0, 9]).entropy, 0.0);
        assert_eq!(LayerLoad::new(3, &[9]).entropy, 1.0);
        assert_eq!(LayerLoad::new(3, &[0, 0]).entropy, 0.0);
    }

    #[test]
    fn drift_counts_choices_and_not_their_order_and_no_padding() {
        // Two rows of lengths 2 and 1, padded to 2; two choices per token.
        let choices = |layer, ids: [i32; 8]| {
            let ids = ids.into_iter().map(|id| id as u16);
            BatchChoices::new(layer, 2, ids, &[2, 1], 2)
        };
        let base = [choices(1, [0, 1, 2, 3, 4, 5, 6, 7]), choices(2, [0; 8])];
        let changed = [choices(1, [1, 0, 2, 9, 8, 9, 1, 1]), choices(2, [0; 8])];
        let found = drift(drift_counts(&changed, &base));
        let share = |layer, drift| LayerDrift { layer, drift };
        assert_eq!(found, [share(1, 3.0 / 6.0), share(2, 0.0)]);
    }
}
