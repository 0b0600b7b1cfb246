//! Loss, perplexity and bits per byte on text.

use data::Sample;
use model::Model;
use serde::Serialize;

use crate::answer_store::AnswerStore;
use crate::error::{Error, Result};
use crate::losses::{EvalConfig, SampleLoss, losses};

/// The score of a model on held-out text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextScore {
    /// Mean over all targets, in nats per token.
    pub loss: f64,
    /// The standard error of `loss`, if there are at least two samples; see [`perplexity`].
    pub standard_error: Option<f64>,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Bits per UTF-8 byte of the targets' text, comparable between models with different tokenizers. `None` if the
    /// text is not known, as for rows of token ids.
    pub bits_per_byte: Option<f64>,
    /// UTF-8 bytes of the targets' text, if it is known.
    pub bytes: Option<usize>,
    /// Number of targets.
    pub tokens: usize,
    /// The losses of the samples, in their order.
    pub per_sample: Vec<SampleLoss>,
}

/// Scores a model on samples.
///
/// # Units
/// The standard error is that of the ratio of summed loss to summed tokens, clustered by sample, since the tokens of
/// one sample are not independent. With loss sums `Lᵢ` and token counts `Tᵢ` of `n` samples with targets, and
/// `r = ΣLᵢ / ΣTᵢ`, it is `√(n / (n − 1) · Σ(Lᵢ − r·Tᵢ)²) / ΣTᵢ`. Pieces of one long row count as samples of their own.
///
/// # Errors
/// If there is no target, a sample does not fit the model, a loss is not finite, or the store fails.
///
/// Source: W. G. Cochran, Sampling Techniques, 3rd edition, section 2.11 (without the finite-population factor);
/// clustering as in arXiv:2411.00640.
pub fn perplexity(
    model: &Model,
    samples: &[Sample],
    config: &EvalConfig,
    store: &mut dyn AnswerStore,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<TextScore> {
    let all: Vec<&Sample> = samples.iter().collect();
    let per_sample = losses(model, &all, config, store, progress)?;
    TextScore::new(per_sample, known_bytes(samples))
}

impl TextScore {
    /// # Errors
    /// If there is no target.
    pub(crate) fn new(per_sample: Vec<SampleLoss>, bytes: Option<usize>) -> Result<Self> {
        let (loss_sum, tokens) = totals(&per_sample);
        if tokens == 0 {
            return Err(Error::Nothing { expected: "target" });
        }
        let loss = loss_sum / tokens as f64;
        Ok(Self {
            loss,
            standard_error: ratio_standard_error(&per_sample),
            perplexity: loss.exp(),
            bits_per_byte: bytes.map(|bytes| loss_sum / std::f64::consts::LN_2 / bytes as f64),
            bytes,
            tokens,
            per_sample,
        })
    }
}

/// Bytes of text behind all targets, if they are known for all. A single target may have none: it ends a text.
fn known_bytes(samples: &[Sample]) -> Option<usize> {
    let is_known = |sample: &Sample| sample.trained_bytes > 0 || sample.trained_tokens() <= 1;
    let bytes = samples.iter().map(|sample| sample.trained_bytes).sum();
    (samples.iter().all(is_known) && bytes > 0).then_some(bytes)
}

fn totals(per_sample: &[SampleLoss]) -> (f64, usize) {
    let loss_sum = per_sample.iter().map(|sample| sample.loss_sum).sum();
    let tokens = per_sample.iter().map(|sample| sample.tokens).sum();
    (loss_sum, tokens)
}

/// Standard error of the ratio of summed loss to summed tokens; see [`perplexity`]. `None` below two samples.
pub(crate) fn ratio_standard_error(per_sample: &[SampleLoss]) -> Option<f64> {
    let (loss_sum, tokens) = totals(per_sample);
    let ratio = loss_sum / tokens as f64;
    let counted = per_sample.iter().filter(|sample| sample.tokens > 0);
    let n = counted.clone().count() as f64;
    let squares: f64 = counted
        .map(|sample| (sample.loss_sum - ratio * sample.tokens as f64).powi(2))
        .sum();
    (n >= 2.0).then(|| (n / (n - 1.0) * squares).sqrt() / tokens as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(loss_sum: f64, tokens: usize) -> SampleLoss {
        SampleLoss { loss_sum, tokens }
    }

    fn sample(trained: usize, trained_bytes: usize) -> Sample {
        let mut marks = vec![true; trained + 1];
        marks[0] = false;
        Sample {
            ids: vec![0; trained + 1],
            trained: marks,
            trained_bytes,
            truncated: false,
        }
    }

    #[test]
    fn scores_are_those_worked_out_by_hand() {
        // r = 12 / 6 = 2; residuals 4 − 2·1 = 2, 2 − 2·2 = −2, 6 − 2·3 = 0; √(3/2 · 8) / 6 = √12 / 6.
        let per_sample = vec![loss(4.0, 1), loss(2.0, 2), loss(0.0, 0), loss(6.0, 3)];
        let score = TextScore::new(per_sample, Some(24)).unwrap();
        assert_eq!((score.loss, score.tokens), (2.0, 6));
        assert!((score.perplexity - 7.389_056_098_930_65).abs() < 1e-12);
        assert!((score.standard_error.unwrap() - 12f64.sqrt() / 6.0).abs() < 1e-12);
        // 12 nats are 17.312 bits.
        assert!((score.bits_per_byte.unwrap() - 17.312_340_490_667_56 / 24.0).abs() < 1e-12);
    }

    #[test]
    fn samples_of_equal_length_have_the_plain_error_of_their_mean() {
        // Means 1, 2, 3, 6 of 10 tokens each: deviation √(14/3), over √4.
        let per_sample: Vec<_> = [10.0, 20.0, 30.0, 60.0].map(|sum| loss(sum, 10)).to_vec();
        let found = ratio_standard_error(&per_sample).unwrap();
        assert!((found - (14f64 / 3.0).sqrt() / 2.0).abs() < 1e-12);
    }

    #[test]
    fn one_sample_has_no_standard_error_and_none_has_no_score() {
        let score = TextScore::new(vec![loss(4.0, 2), loss(0.0, 0)], None).unwrap();
        assert_eq!(score.standard_error, None);
        let problem = TextScore::new(vec![loss(0.0, 0)], None).unwrap_err();
        assert_eq!(
            problem.to_string(),
            "expected at least one target to score, found none"
        );
    }

    #[test]
    fn bytes_are_known_for_all_or_not_at_all() {
        for (samples, expected) in [
            (vec![sample(3, 9), sample(2, 4)], Some(13)),
            (vec![sample(3, 9), sample(1, 0)], Some(9)),
            (vec![sample(3, 9), sample(2, 0)], None),
            (vec![sample(1, 0)], None),
            (vec![], None),
        ] {
            assert_eq!(known_bytes(&samples), expected, "{samples:?}");
        }
    }
}
