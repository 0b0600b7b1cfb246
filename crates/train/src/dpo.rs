//! Direct preference optimization: the model learns to prefer the better of two answers to each prompt.
//!
//! `loss = −log σ(β · ((log π(c) − log π(r)) − (log π₀(c) − log π₀(r))))` with `π` the trained model, `π₀` the reference,
//! and the log-probability of an answer the sum over its tokens. Label smoothing mixes in the loss of the opposite
//! preference with weight `ε`, the assumed share of wrong labels: `(1 − ε) · loss + ε · loss of the opposite`.
//!
//! Source: arXiv:2305.18290, equation 7. The smoothed loss is conservative DPO: E. Mitchell, *A note on DPO with noisy
//! preferences & relationship to IPO*, 2023. It is not the unbiased loss of robust DPO (arXiv:2403.00409), TRL's `robust`,
//! which subtracts the second term and divides by `1 − 2ε`.

use burn::tensor::Tensor;
use burn::tensor::activation::log_sigmoid;
use serde::Serialize;

use crate::recipe::DpoSection;

/// The rewards of a model's answers: `β` times the difference of their log-probabilities from the reference's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rewards {
    /// Mean over the chosen answers.
    #[serde(rename = "rewards/chosen")]
    pub chosen: f64,
    /// Mean over the rejected answers.
    #[serde(rename = "rewards/rejected")]
    pub rejected: f64,
    /// Mean of the difference.
    #[serde(rename = "rewards/margins")]
    pub margin: f64,
    /// Share of the pairs in which the chosen answer has the larger reward.
    #[serde(rename = "rewards/accuracies")]
    pub accuracy: f64,
}

impl Rewards {
    /// The rewards with their names in the metrics, which are TRL's.
    pub(crate) fn named(&self) -> [(&'static str, f64); 4] {
        [
            ("rewards/chosen", self.chosen),
            ("rewards/rejected", self.rejected),
            ("rewards/margins", self.margin),
            ("rewards/accuracies", self.accuracy),
        ]
    }

    /// The sum over pairs, from the rewards of both answers of each.
    pub(crate) fn sum(rewards: &[f32]) -> Self {
        let mut sum = Self::default();
        for pair in rewards.as_chunks::<2>().0 {
            let [chosen, rejected] = pair.map(f64::from);
            sum.add(Self {
                chosen,
                rejected,
                margin: chosen - rejected,
                accuracy: f64::from(u8::from(chosen > rejected)),
            });
        }
        sum
    }

    /// Adds the rewards of more pairs to a sum over pairs.
    pub(crate) fn add(&mut self, more: Self) {
        self.chosen += more.chosen;
        self.rejected += more.rejected;
        self.margin += more.margin;
        self.accuracy += more.accuracy;
    }

    /// The means, from the sums over pairs.
    pub(crate) fn mean(self, pairs: usize) -> Self {
        let of = |sum: f64| sum / pairs.max(1) as f64;
        Self {
            chosen: of(self.chosen),
            rejected: of(self.rejected),
            margin: of(self.margin),
            accuracy: of(self.accuracy),
        }
    }
}

/// The log-probability of every row's answer, from the loss of every position.
///
/// # Shapes
/// - `losses`: `[rows · seq]`
/// - returns: `[rows]`
pub(crate) fn log_probabilities(losses: Tensor<1>, rows: usize) -> Tensor<1> {
    let seq = losses.dims()[0] / rows.max(1);
    -losses.reshape([rows, seq]).sum_dim(1).squeeze_dim::<1>(1)
}

/// The loss of every pair, and the rewards of both answers. Rows are pairs one after another, the chosen answer first.
///
/// # Shapes
/// - `policy`, `reference`: log-probabilities, `[2 · pairs]`
/// - returns: `[pairs]`, in nats, and `[2 · pairs]`
pub(crate) fn losses(
    policy: Tensor<1>,
    reference: Tensor<1>,
    settings: &DpoSection,
) -> (Tensor<1>, Tensor<1>) {
    let pairs = policy.dims()[0] / 2;
    let rewards = ((policy - reference) * settings.beta).reshape([pairs, 2]);
    let of = |which: usize| {
        let column = rewards.clone().slice([0..pairs, which..which + 1]);
        column.reshape([pairs])
    };
    let margins = of(0) - of(1);
    let smoothing = settings.label_smoothing;
    let right = log_sigmoid(margins.clone()) * (1.0 - smoothing);
    let wrong = log_sigmoid(-margins) * smoothing;
    (-(right + wrong), rewards.reshape([2 * pairs]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use kernels::device::read;

    const POLICY: [f32; 6] = [-11.0, -12.5, -30.0, -20.0, -7.25, -7.0];
    const REFERENCE: [f32; 6] = [-12.0, -12.0, -29.0, -23.0, -7.25, -7.0];

    fn settings(label_smoothing: f64) -> DpoSection {
        DpoSection {
            beta: 0.25,
            label_smoothing,
            ..DpoSection::default()
        }
    }

    fn tensor(values: [f32; 6]) -> Tensor<1> {
        Tensor::from_floats(values, &Device::flex().autodiff())
    }

    fn found(policy: [f32; 6], smoothing: f64) -> (Vec<f32>, Rewards) {
        let (losses, rewards) = losses(tensor(policy), tensor(REFERENCE), &settings(smoothing));
        (read(losses), Rewards::sum(&read(rewards)))
    }

    /// The formula, by hand in f64: `-logsigmoid(β·δ)·(1 − ε) − logsigmoid(−β·δ)·ε`.
    fn by_hand(smoothing: f64) -> Vec<f64> {
        let log_sigmoid = |x: f64| -(-x).exp().ln_1p();
        let margin = |i: usize| f64::from(POLICY[2 * i] - POLICY[2 * i + 1]);
        let reference = |i: usize| f64::from(REFERENCE[2 * i] - REFERENCE[2 * i + 1]);
        let loss = |i: usize| {
            let logits = 0.25 * (margin(i) - reference(i));
            -log_sigmoid(logits) * (1.0 - smoothing) - log_sigmoid(-logits) * smoothing
        };
        (0..3).map(loss).collect()
    }

    #[test]
    fn losses_and_rewards_are_those_of_the_formula() {
        for smoothing in [0.0, 0.1] {
            let (losses, rewards) = found(POLICY, smoothing);
            for (found, expected) in losses.iter().zip(by_hand(smoothing)) {
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-6,
                    "{found} {expected}"
                );
            }
            // Differences to the reference: 1 and −0.5, −1 and 3, 0 and 0.
            let expected = Rewards {
                chosen: 0.0,
                rejected: 0.25 * 2.5,
                margin: 0.25 * -2.5,
                accuracy: 1.0,
            };
            assert_eq!(rewards, expected);
            assert_eq!(rewards.mean(3).accuracy, 1.0 / 3.0);
        }
        // A model that is its own reference knows nothing, whatever the smoothing.
        let (losses, rewards) = found(REFERENCE, 0.1);
        assert!(
            losses
                .iter()
                .all(|loss| (loss - std::f32::consts::LN_2).abs() < 1e-6)
        );
        assert_eq!(rewards, Rewards::default());
    }

    #[test]
    fn gradients_are_finite_differences() {
        let policy = tensor(POLICY).require_grad();
        let (losses, _) = losses(policy.clone(), tensor(REFERENCE), &settings(0.1));
        let gradients = losses.sum().backward();
        let gradient: Vec<f32> = policy
            .grad(&gradients)
            .unwrap()
            .into_data()
            .try_to_vec()
            .unwrap();
        let step = 0.05;
        let sum = |policy: [f32; 6]| found(policy, 0.1).0.iter().sum::<f32>();
        for (i, gradient) in gradient.into_iter().enumerate() {
            let [mut up, mut down] = [POLICY; 2];
            up[i] += step;
            down[i] -= step;
            let slope = (sum(up) - sum(down)) / (2.0 * step);
            // β³·step²/6 bounds what a central difference leaves out; f32 sums leave 1e-5.
            assert!((slope - gradient).abs() < 2e-5, "{i}: {slope} {gradient}");
        }
    }

    #[test]
    fn the_log_probability_of_an_answer_is_the_sum_over_its_tokens() {
        let losses = Tensor::from_floats([0.0, 1.5, 2.0, 0.0, 0.25, 0.0], &Device::flex());
        let found: Vec<f32> = log_probabilities(losses, 2)
            .into_data()
            .try_to_vec()
            .unwrap();
        assert_eq!(found, [-3.5, -0.25]);
    }
}
