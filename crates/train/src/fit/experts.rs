//! What a router does to its experts: how many tokens each gets, and how far it has drifted from the reference's.

use burn::tensor::{Int, Tensor};
use model::{RoutingRecord, routing_drift};
use serde::Serialize;

/// The load of one layer's experts over some steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerLoad {
    /// Which layer.
    pub layer: usize,
    /// Entropy of the experts' shares over that of even shares: 1 if all get as much, 0 if one gets everything.
    pub entropy: f64,
    /// Experts that got nothing.
    pub dead: usize,
    /// Slots per expert.
    pub load: Vec<u64>,
}

/// How one layer's picks differ from the reference's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerDrift {
    /// Which layer.
    pub layer: usize,
    /// Share of the picks that the reference does not make for the same token.
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
            // A single expert has all there is, evenly.
            entropy: if even > 0.0 { entropy / even } else { 1.0 },
            dead: load.iter().filter(|n| **n == 0).count(),
            load: load.to_vec(),
        }
    }
}

/// The experts that the tokens of a batch chose, padding left out: `top_k` for each token.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Picks {
    layer: usize,
    top_k: usize,
    ids: Vec<u16>,
}

impl Picks {
    /// Of one layer; the batch has rows of some lengths, padded to `cols`. Waits for the device.
    pub(crate) fn of(record: &RoutingRecord, lengths: &[usize], cols: usize) -> Self {
        Self::new(record.layer_idx, record.routed.ids.clone(), (lengths, cols))
    }

    /// How often each expert was picked.
    pub(crate) fn load(&self, n_experts: usize) -> Vec<f64> {
        let mut load = vec![0.0; n_experts];
        for id in &self.ids {
            load[usize::from(*id)] += 1.0;
        }
        load
    }

    fn new(layer: usize, ids: Tensor<2, Int>, (lengths, cols): (&[usize], usize)) -> Self {
        let [_, top_k] = ids.dims();
        let ids: Vec<u16> = ids.into_data().iter::<i64>().map(|id| id as u16).collect();
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

/// The drift of every layer over some batches, whose picks come in the same order in both models.
pub(crate) fn drift(picks: &[Picks], base: &[Picks]) -> Vec<LayerDrift> {
    let mut counts: Vec<(usize, usize, usize)> = Vec::new(); // layer, moved, all
    for (picks, base) in picks.iter().zip(base) {
        let moved = routing_drift(&picks.ids, &base.ids, picks.top_k);
        let all = picks.ids.len();
        match counts.iter_mut().find(|(layer, ..)| *layer == picks.layer) {
            Some(sum) => (sum.1, sum.2) = (sum.1 + moved, sum.2 + all),
            None => counts.push((picks.layer, moved, all)),
        }
    }
    let drift = |(layer, moved, all): (usize, usize, usize)| LayerDrift {
        layer,
        drift: moved as f64 / all.max(1) as f64,
    };
    counts.into_iter().map(drift).collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

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
    fn drift_counts_picks_and_not_their_order_and_no_padding() {
        let device = Device::flex();
        // Two rows of lengths 2 and 1, padded to 2; two picks a token.
        let picks = |layer, ids: [i32; 8]| {
            let ids = Tensor::from_data(TensorData::new(ids.to_vec(), [4, 2]), &device);
            Picks::new(layer, ids, (&[2, 1], 2))
        };
        let base = [picks(1, [0, 1, 2, 3, 4, 5, 6, 7]), picks(2, [0; 8])];
        let moved = [picks(1, [1, 0, 2, 9, 8, 9, 1, 1]), picks(2, [0; 8])];
        let found = drift(&moved, &base);
        let share = |layer, drift| LayerDrift { layer, drift };
        assert_eq!(found, [share(1, 3.0 / 6.0), share(2, 0.0)]);
    }
}
