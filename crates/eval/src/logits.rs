//! The logits of a sample's targets, for comparing models.

use burn::tensor::{Device, Int, Tensor, TensorData};
use data::{IGNORE, Sample, collate};
use model::device::read_ints;
use model::{Compute, ForwardContext, Model, Recorder, RoutingRecord};

/// The logits of a sample's targets, without their mean over the vocabulary.
#[derive(Debug)]
pub(crate) struct Logits {
    pub(crate) targets: Vec<usize>,
    /// `[targets, vocab]`.
    values: Vec<f32>,
    vocab_size: usize,
}

/// The experts chosen for a sample's tokens in one layer.
#[derive(Debug)]
pub(crate) struct RoutingChoices {
    pub(crate) layer: usize,
    pub(crate) top_k: usize,
    pub(crate) n_experts: usize,
    /// `[tokens, top_k]`.
    pub(crate) ids: Vec<i64>,
}

impl RoutingChoices {
    /// Waits for the device.
    pub(crate) fn of(record: &RoutingRecord) -> Self {
        let ([_, n_experts], [_, top_k]) = (record.logits.dims(), record.routed.ids.dims());
        Self {
            layer: record.layer_idx,
            top_k,
            n_experts,
            ids: read_ints(record.routed.ids.clone()),
        }
    }
}

impl Logits {
    /// One pass. Waits for the device.
    pub(crate) fn of(model: &Model, sample: &Sample) -> Self {
        Self::with_routing(model, Compute::F32, sample).0
    }

    /// The logits, and the expert choices of every mixture layer.
    pub(crate) fn with_routing(
        model: &Model,
        compute: Compute,
        sample: &Sample,
    ) -> (Self, Vec<RoutingChoices>) {
        let batch = collate(&[sample], 0);
        let device: Device = model.model.norm.weight.val().device();
        let ids = TensorData::new(batch.input_ids.clone(), [1, batch.cols]);
        let mut recorder = Recorder::of_routing();
        let mut ctx = ForwardContext::recorded(compute, &mut recorder);
        let hidden = model.hidden(Tensor::<2, Int>::from_data(ids, &device), &mut ctx);
        let [_, seq, width] = hidden.dims();
        let at: Vec<usize> = (0..seq).filter(|i| batch.targets[*i] != IGNORE).collect();
        let rows: Vec<i32> = at.iter().map(|i| *i as i32).collect();
        let rows = Tensor::<1, Int>::from_data(rows.as_slice(), &device);
        let hidden = hidden.reshape([seq, width]).select(0, rows);
        let values = infer::read_logits(model, hidden, &ctx);
        let targets = at.iter().map(|i| batch.targets[*i] as usize).collect();
        let routing = recorder.routing.iter().map(RoutingChoices::of).collect();
        (Self::new(targets, values, model.config.vocab_size), routing)
    }

    fn new(targets: Vec<usize>, mut values: Vec<f32>, vocab_size: usize) -> Self {
        for row in values.chunks_mut(vocab_size) {
            let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / vocab_size as f64;
            row.iter_mut().for_each(|v| *v -= mean as f32);
        }
        Self {
            targets,
            values,
            vocab_size,
        }
    }

    /// The loss, summed over the targets, in nats.
    pub(crate) fn loss(&self) -> f64 {
        let rows = self.rows().zip(&self.targets);
        let losses = rows.map(|(row, target)| log_sum_exp(row) - f64::from(row[*target]));
        losses.sum()
    }

    pub(crate) fn squares_from(&self, other: &Self) -> f64 {
        let pairs = self.values.iter().zip(&other.values);
        pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    /// `Σ p · ln(p / q)` with `p` these probabilities and `q` the other's, summed over the targets, in nats.
    pub(crate) fn divergence_to(&self, other: &Self) -> f64 {
        let rows = self.rows().zip(other.rows());
        let of_row = |(p, q): (&[f32], &[f32])| {
            let norms = [p, q].map(log_sum_exp);
            let terms = p.iter().zip(q).map(|(p, q)| {
                let [p, q] = [f64::from(*p) - norms[0], f64::from(*q) - norms[1]];
                p.exp() * (p - q)
            });
            terms.sum::<f64>()
        };
        rows.map(of_row).sum()
    }

    /// The number of targets with the same most likely token.
    pub(crate) fn agreement_with(&self, other: &Self) -> usize {
        let rows = self.rows().zip(other.rows());
        rows.filter(|(a, b)| largest(a) == largest(b)).count()
    }

    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks(self.vocab_size)
    }
}

/// The index of the largest value; ties go to the first.
fn largest(row: &[f32]) -> usize {
    let better = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
    (0..row.len()).fold(0, better)
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|v| f64::from(v - largest).exp()).sum();
    sum.ln() + f64::from(largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_over_the_vocabulary_changes_nothing_and_a_rounding_does() {
        let logits = |shift: f32, values: [f32; 4]| {
            Logits::new(vec![2], values.map(|v| v + shift).to_vec(), 4)
        };
        let (a, b) = (
            logits(0.0, [1.0, 2.0, 4.0, 1.0]),
            logits(5.0, [1.0, 2.0, 4.0, 1.0]),
        );
        assert!(a.squares_from(&b) < 1e-9 && (a.loss() - b.loss()).abs() < 1e-6);
        let expected = (1f64.exp() * 2.0 + 2f64.exp() + 4f64.exp()).ln() - 4.0;
        assert!((a.loss() - expected).abs() < 1e-6, "{}", a.loss());
        let c = logits(0.0, [1.0, 2.0, 3.0, 2.0]);
        assert!((a.squares_from(&c) - 2.0).abs() < 1e-6);
    }

    #[test]
    fn divergence_is_that_written_out() {
        let logits = |values: [f32; 3]| Logits::new(vec![0], values.to_vec(), 3);
        let (p, q) = ([0.5f64, 0.25, 0.25], [0.25f64, 0.5, 0.25]);
        let [a, b] = [p, q].map(|p| logits(p.map(|p| p.ln() as f32 + 3.0)));
        let expected = 0.5 * 2f64.ln() - 0.25 * 2f64.ln();
        assert!((a.divergence_to(&b) - expected).abs() < 1e-6);
        assert!(a.divergence_to(&a).abs() < 1e-9);
        assert_eq!((a.agreement_with(&b), a.agreement_with(&a)), (0, 1));
    }
}
