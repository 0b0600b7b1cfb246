//! Differences of two models' scores on the same items.
//!
//! An item that is hard for one model is hard for another, so the difference of two scores has a smaller error than
//! either score: it is computed from the differences of single items.
//!
//! Source: arXiv:2411.00640 (paired differences).

use serde::Serialize;

use crate::error::{Error, Result};
use crate::losses::SampleLoss;
use crate::perplexity::{TextScore, ratio_standard_error};
use crate::task::{MetricResult, RowValue};

/// The difference of a model's score to a baseline's, and its significance.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The model's score minus the baseline's.
    pub difference: f64,
    /// The standard error of `difference`, from paired items; `None` below two items.
    pub standard_error: Option<f64>,
    /// `difference / standard_error`, if finite.
    pub ratio: Option<f64>,
    /// Whether it is significant.
    pub verdict: Verdict,
}

/// Whether a difference exceeds chance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It exceeds twice its standard error.
    Beyond,
    /// It does not.
    Within,
    /// The variance is unknown: there are fewer than two items, or all differ by the same.
    Unknown,
}

/// The number of standard errors that a difference must exceed. About one in twenty does so by chance.
const ERRORS: f64 = 2.0;

impl Difference {
    fn new(difference: f64, standard_error: Option<f64>) -> Self {
        let spread = standard_error.filter(|error| *error > 0.0);
        let verdict = match (spread, standard_error) {
            (Some(error), _) if difference.abs() > ERRORS * error => Verdict::Beyond,
            (Some(_), _) => Verdict::Within,
            (None, Some(_)) if difference == 0.0 => Verdict::Within,
            (None, _) => Verdict::Unknown,
        };
        Self {
            difference,
            standard_error,
            ratio: spread.map(|error| difference / error),
            verdict,
        }
    }
}

/// The difference of the mean losses, in nats per token; negative if the model is better than the baseline. The
/// standard error is that of [`crate::perplexity`] with the samples' differences in place of their losses.
///
/// # Errors
/// [`Error::NotPaired`] if the two were not scored on the same targets, as with different tokenizers.
pub fn compare_text(baseline: &TextScore, model: &TextScore) -> Result<Difference> {
    let (first, second) = (&baseline.per_sample, &model.per_sample);
    expect_equal("number of samples", first.len(), second.len())?;
    for (first, second) in first.iter().zip(second) {
        expect_equal("targets in every sample", first.tokens, second.tokens)?;
    }
    let differences: Vec<SampleLoss> = first
        .iter()
        .zip(second)
        .map(|(first, second)| SampleLoss {
            loss_sum: second.loss_sum - first.loss_sum,
            tokens: first.tokens,
        })
        .collect();
    let sum: f64 = differences.iter().map(|sample| sample.loss_sum).sum();
    let error = ratio_standard_error(&differences);
    Ok(Difference::new(sum / baseline.tokens as f64, error))
}

/// The difference of a metric that is a mean over items. The standard error is that of the mean of the items' differences:
/// `√(Σ(dᵢ − d)² / (n(n − 1)))`.
///
/// # Errors
/// [`Error::NotPaired`] if the two were not measured on the same number of items; if the metric is no mean.
pub fn compare_metrics(baseline: &MetricResult, model: &MetricResult) -> Result<Difference> {
    let (first, second) = (&baseline.of_items, &model.of_items);
    expect_equal("number of items", first.len(), second.len())?;
    let n = first.len() as f64;
    let difference = |(first, second): (&RowValue, &RowValue)| match (first, second) {
        (RowValue::Number(first), RowValue::Number(second)) => Ok(second - first),
        _ => Err(Error::Aggregation {
            expected: "a mean of numbers",
            found: "another metric",
        }),
    };
    let differences: Vec<f64> = first
        .iter()
        .zip(second)
        .map(difference)
        .collect::<Result<_>>()?;
    let mean = differences.iter().sum::<f64>() / n;
    let squares: f64 = differences.iter().map(|d| (d - mean).powi(2)).sum();
    let error = (first.len() >= 2).then(|| (squares / (n * (n - 1.0))).sqrt());
    Ok(Difference::new(mean, error))
}

fn expect_equal(items: &'static str, first: usize, second: usize) -> Result<()> {
    if first == second {
        return Ok(());
    }
    Err(Error::NotPaired {
        items,
        first,
        second,
    })
}

#[cfg(test)]
mod tests {
    use data::{Metric, MetricUse};

    use super::*;

    fn text(samples: &[(f64, usize)]) -> TextScore {
        let loss = |(loss_sum, tokens): &(f64, usize)| SampleLoss {
            loss_sum: *loss_sum,
            tokens: *tokens,
        };
        TextScore::new(samples.iter().map(loss).collect(), None).unwrap()
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found}, not {expected}");
    }

    #[test]
    fn the_difference_of_losses_is_paired_by_sample() {
        // Losses far apart, differences −1, −1, −4 over 1, 2, 3 tokens: r = −6/6 = −1, residuals 0, 1, −1.
        let baseline = text(&[(1.0, 1), (20.0, 2), (90.0, 3)]);
        let model = text(&[(0.0, 1), (19.0, 2), (86.0, 3)]);
        let found = compare_text(&baseline, &model).unwrap();
        let error = (1.5f64 * 2.0).sqrt() / 6.0;
        close(found.difference, -1.0);
        close(found.standard_error.unwrap(), error);
        close(found.ratio.unwrap(), -1.0 / error);
        assert_eq!(found.verdict, Verdict::Beyond);
        assert!(baseline.standard_error.unwrap() > 20.0 * error);
    }

    #[test]
    fn the_difference_of_a_mean_is_paired_by_item() {
        let score = |numbers: &[f64]| {
            let values = numbers.iter().map(|number| RowValue::Number(*number));
            let of = MetricUse::usual(Metric::Acc);
            MetricResult::new("none", &of, values.collect()).unwrap()
        };
        // Differences 1, 0, 0, 1: mean 1/2, squares 1, error √(1/12).
        let first = score(&[0.0, 1.0, 0.0, 0.0]);
        let found = compare_metrics(&first, &score(&[1.0, 1.0, 0.0, 1.0])).unwrap();
        close(found.difference, 0.5);
        close(found.standard_error.unwrap(), (1f64 / 12.0).sqrt());
        assert_eq!(found.verdict, Verdict::Within);
    }

    #[test]
    fn a_difference_counts_beyond_twice_its_error() {
        for (difference, error, expected) in [
            (0.21, Some(0.1), Verdict::Beyond),
            (-0.21, Some(0.1), Verdict::Beyond),
            (0.19, Some(0.1), Verdict::Within),
            (0.0, Some(0.0), Verdict::Within),
            (0.5, Some(0.0), Verdict::Unknown),
            (0.5, None, Verdict::Unknown),
        ] {
            let found = Difference::new(difference, error);
            assert_eq!(found.verdict, expected, "{difference} ± {error:?}");
        }
    }

    #[test]
    fn different_items_are_not_compared() {
        let one = text(&[(1.0, 1), (1.0, 2)]);
        for (other, expected) in [
            (
                text(&[(1.0, 1)]),
                "the same number of samples for both models, found 2 and 1",
            ),
            (
                text(&[(1.0, 2), (1.0, 1)]),
                "the same targets in every sample for both models, found 1 and 2",
            ),
        ] {
            let problem = compare_text(&one, &other).unwrap_err().to_string();
            assert_eq!(problem, format!("expected {expected}"));
        }
    }
}
